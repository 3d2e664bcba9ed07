# SPDX-License-Identifier: Apache-2.0
"""Device-local gradients, and the placement of optimizer states."""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax

from optax_svrg import _checks, _compat, _table


def device_local(fn: Callable[..., Any], axis_name: Any) -> Callable[..., Any]:
  """Keeps ``jax.grad`` from summing a gradient over the devices.

  Under the type checking of :func:`jax.shard_map`, :func:`jax.grad` sums the
  gradient of replicated parameters over the axis. With ``axis_name``, the
  functions of this package take gradients that are not summed, in order to
  reduce only once. This differentiates with respect to parameters that vary
  over the axis, although they are equal on all devices. Under :func:`jax.pmap`,
  :func:`jax.vmap` and ``check_vma=False`` it calls ``fn`` as it is.

  Args:
    fn: ``fn(params, *args, **kwargs)`` that differentiates with respect to
      ``params``, usually ``jax.grad(loss)`` or ``jax.value_and_grad(loss)``.
    axis_name: name of the axis (or tuple of names) of the enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap`.

  Returns:
    A function with the arguments and results of ``fn``. Its results, the value
    of the loss too, are those of one device: average them by
    :func:`jax.lax.pmean`.

  Raises:
    TypeError: if ``fn`` cannot be called.
    ValueError: if ``axis_name`` is not an enclosing axis, when the function is
      called.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",),
    ...                      axis_types=(jax.sharding.AxisType.Auto,))
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> grad = optax_svrg.device_local(jax.grad(loss), "data")
    >>> mean_grad = jax.shard_map(
    ...     lambda w, x: jax.lax.pmean(grad(w, x), "data"),
    ...     mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    >>> print(jax.jit(mean_grad)(jnp.ones(2), jnp.ones((8, 2))))
    [4. 4.]
  """
  if not callable(fn):
    raise TypeError(f"fn must be a function, got {fn!r}.")

  @functools.wraps(fn)
  def local(params: optax.Params, *args: Any, **kwargs: Any) -> Any:
    axes = _checks.tracked_axes(axis_name)

    def vary(p: Any) -> Any:
      fixed = axes - _compat.varying_axes(p)
      return jax.lax.pcast(p, tuple(fixed), to="varying") if fixed else p

    return fn(jax.tree.map(vary, params), *args, **kwargs)

  return local


def state_shardings(
  tx: optax.GradientTransformation, params: optax.Params
) -> optax.OptState:
  """Shardings of an optimizer's state, for parameters on a mesh.

  Arrays like a parameter (a snapshot, Adam's moments) are sharded as that
  parameter; so are stacks of them (SAGA's table), over whose leading axes
  nothing is sharded; everything else is replicated. An array is like a
  parameter if its path in the state ends with the parameter's path, and its
  shape with the parameter's shape.

  Give them to ``jax.jit(tx.init, out_shardings=...)``, which loses shardings on
  meshes of type ``Auto``, and to the target of a restored checkpoint, where
  scalars would otherwise be tied to the device from which they were saved.

  Args:
    tx: any Optax optimizer, with or without a transformation of this package.
    params: the parameters, or :class:`jax.ShapeDtypeStruct` in their place,
      each with a :class:`jax.sharding.NamedSharding`. To shard only the state
      (ZeRO), or to keep it in the memory of the host (``pinned_host``), give
      structs with the shardings that the state shall have.

  Returns:
    A tree like ``tx.init(params)`` with :class:`jax.sharding.NamedSharding` as
    leaves.

  Raises:
    ValueError: if ``params`` has no leaves, a leaf has no
      :class:`jax.sharding.NamedSharding`, or they are on different meshes.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",),
    ...                      axis_types=(AxisType.Auto,))
    >>> sharding = NamedSharding(mesh, P("data"))
    >>> params = jax.device_put(jnp.ones((8, 4)), sharding)
    >>> tx = optax.chain(optax_svrg.adaptive_saga(10), optax.adamw(1e-3))
    >>> shardings = optax_svrg.state_shardings(tx, params)
    >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
    >>> print(state[0].table.sharding.spec == P(None, "data"))
    True
  """
  shardings = _shardings_by_path(params)
  mesh = next(iter(shardings.values()))[1].mesh
  replicated = NamedSharding(mesh, PartitionSpec())
  abstract = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params
  )

  def sharding_of(path: Any, x: Any, is_on_host: bool) -> NamedSharding:
    sharding = device_sharding_of(path, x)
    return sharding.with_memory_kind("pinned_host") if is_on_host else sharding

  def device_sharding_of(path: Any, x: Any) -> NamedSharding:
    if path[-1:] == (jax.tree_util.GetAttrKey("is_filled"),):
      return replicated  # Of SAGA: not like a parameter of that shape.
    # From the longest end of the path to the shortest.
    for start in range(len(path) + 1):
      shape, sharding = shardings.get(path[start:], (None, replicated))
      stacked = x.ndim - len(shape) if shape is not None else -1
      if stacked >= 0 and x.shape[stacked:] == shape:
        spec = PartitionSpec(*[None] * stacked, *sharding.spec)
        return sharding.update(spec=spec)
    return replicated

  program, state = jax.make_jaxpr(tx.init, return_shape=True)(abstract)
  on_host = map(_compat.on_host, program.out_avals)
  return jax.tree_util.tree_map_with_path(
    sharding_of,
    state,
    jax.tree.unflatten(jax.tree.structure(state), on_host),
  )


def _shardings_by_path(
  params: optax.Params,
) -> dict[Any, tuple[tuple[int, ...], NamedSharding]]:
  """Shape and sharding of each parameter; raises unless all have a mesh."""
  found: dict[Any, tuple[tuple[int, ...], NamedSharding]] = {}
  mesh = None
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
      raise ValueError(
        "params must have a jax.sharding.NamedSharding each, got"
        f" {sharding!r} {_checks.path_of(path)}."
      )
    mesh = mesh or sharding.mesh
    if sharding.mesh != mesh:
      raise ValueError(
        f"params must be on one mesh, got {mesh} and {sharding.mesh}"
        f" {_checks.path_of(path)}."
      )
    found[path] = (leaf.shape, sharding)
  if not found:
    raise ValueError("params must have at least one leaf, got none.")
  return found


def _is_placed(x: Any) -> bool:
  """Returns whether an array is known to be on certain devices."""
  return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def _to_host(x: jax.Array) -> jax.Array:
  return jax.device_put(x, jax.memory.Space.Host)


def to_device(tree: Any) -> Any:
  """Moves arrays in the memory of the host to that of the device."""
  return jax.tree.map(
    lambda x: (
      jax.device_put(x, jax.memory.Space.Device) if _compat.on_host(x) else x
    ),
    tree,
  )


def to_memory_of(old: Any, new: Any) -> Any:
  """Moves the second tree, on the device, to where the first one is."""
  return jax.tree.map(
    lambda o, n: _to_host(n) if _compat.on_host(o) else n,
    old,
    new,
  )


def owned(tree: Any) -> Any:
  """Copies NumPy arrays, which their owner may overwrite.

  JAX reads a NumPy array when the device comes to it, or uses its memory as its
  own: even ``jnp.array`` on CPU does not copy before it returns.
  """
  return jax.tree.map(
    lambda x: np.array(x) if isinstance(x, np.ndarray) else x, tree
  )


def table(
  params: optax.Params,
  num_batches: int,
  dtype: Any,
  memory_kind: str | None = None,
) -> optax.Updates:
  """Zeros like the parameters, with leading axes of batches, placed alike.

  Args:
    params: the parameters.
    num_batches: number of batches, see :mod:`optax_svrg._table`.
    dtype: dtype of all leaves, ``None`` for those of the parameters.
    memory_kind: kind of memory, ``None`` for that of the parameters.

  Returns:
    A tree like ``params``.

  Raises:
    ValueError: if it is known not to fit, or ``memory_kind`` is unavailable.
  """
  if memory_kind is not None:
    _check_memory_kind(params, memory_kind)
  on_host = memory_kind is not None and memory_kind.endswith("host")
  _check_memory(params, num_batches, dtype, on_host=on_host)
  axes = _table.axes_of(num_batches)

  def entries(p: Any) -> Any:
    entry_dtype = dtype or _checks.dtype_of(p)
    if memory_kind is None or not _is_placed(p):
      entry = jnp.zeros_like(p, entry_dtype)
      rows = jnp.broadcast_to(entry, (*axes, *entry.shape))
      return jax.jit(_to_host)(rows) if on_host else rows
    # Not made on the device first, where it may not fit.
    sharding = p.sharding
    if isinstance(sharding, NamedSharding):
      spec = PartitionSpec(*[None] * len(axes), *sharding.spec)
      sharding = sharding.update(spec=spec)
    shape = (*axes, *p.shape)

    def zeros(index: Any) -> np.ndarray:
      lengths = [
        len(range(*i.indices(n))) for i, n in zip(index, shape, strict=True)
      ]
      return np.zeros(lengths, entry_dtype)

    return jax.make_array_from_callback(
      shape, sharding.with_memory_kind(memory_kind), zeros
    )

  return jax.tree.map(entries, params)


def _check_memory_kind(params: optax.Params, memory_kind: str) -> None:
  """Raises ValueError where the devices are known not to have it."""
  for leaf in filter(_is_placed, jax.tree.leaves(params)):
    device: Any
    for device in leaf.sharding.addressable_devices:
      kinds = [memory.kind for memory in device.addressable_memories()]
      if memory_kind not in kinds:
        raise ValueError(
          f"memory_kind must be one of {', '.join(kinds)} for {device}, got"
          f" {memory_kind!r}."
        )


def _check_memory(
  params: optax.Params, num_batches: int, dtype: Any, *, on_host: bool
) -> None:
  """Raises if the table is known not to fit where it is to be."""
  needed = 0
  num_entries = math.prod(_table.axes_of(num_batches))
  devices = set()
  for p in jax.tree.leaves(params):
    if isinstance(p, (jax.core.Tracer, jax.ShapeDtypeStruct)):
      return  # Where it will be placed is not known.
    shape = np.shape(p)
    copies = 1
    if isinstance(p, jax.Array):
      shape = p.sharding.shard_shape(shape)
      devices |= p.sharding.addressable_devices
      # Those of all devices of this process share its memory.
      copies = len(p.sharding.addressable_devices) if on_host else 1
    itemsize = np.dtype(dtype or _checks.dtype_of(p)).itemsize
    needed += num_entries * math.prod(shape) * itemsize * copies
  memories: dict[Any, int | None] = (
    {"the host": _checks.host_memory()}
    if on_host
    else {
      device: _checks.device_memory(device)
      for device in devices or {jax.local_devices()[0]}
    }
  )
  for where, available in memories.items():
    if available is not None and needed > available:
      raise ValueError(
        f"the table for {num_batches} batches needs {needed} bytes, and"
        f" {where} has {available}. Larger batches, a dtype of fewer"
        " bytes and sharded parameters make the table smaller."
      )
