# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments and dtypes shared by all modules.

Every check runs on shapes and dtypes alone, so that it works on tracers and
costs nothing in a compiled step.
"""

from collections.abc import Sequence
import math
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _compat

_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, int, float, complex)

_keystr = jax.tree_util.keystr


def is_masked(node: Any) -> bool:
  """Returns whether a node is the placeholder that ``optax.masked`` leaves."""
  return isinstance(node, optax.MaskedNode)


def path_of(path: Any) -> str:
  """A key path as the user would write it; the root of a tree has no path."""
  return f"at {_keystr(path)}" if path else "at the root"


def as_arrays(tree: Any) -> Any:
  """The tree with JAX arrays in place of NumPy's and of numbers."""
  return jax.tree.map(
    lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), tree
  )


def as_axes(axis_name: Any) -> tuple[Any, ...] | None:
  """Names of axes as a tuple; ``None`` for none."""
  if axis_name is None:
    return None
  names = isinstance(axis_name, (tuple, list))
  return tuple(axis_name) if names else (axis_name,)


def dtype_kind(dtype: Any) -> str:
  """Returns the kind of a dtype: complex, real, or that of an integer."""
  for kind in (jnp.complexfloating, jnp.floating):
    if jnp.issubdtype(dtype, kind):
      return kind.__name__
  return str(dtype)


def dtype_of(leaf: Any) -> Any:
  """The dtype that JAX gives to an array, struct or Python number."""
  if not hasattr(leaf, "dtype"):
    return jnp.result_type(leaf)
  # float64 of NumPy is float32 to JAX, unless x64 is enabled.
  is_number = isinstance(leaf.dtype, np.dtype) and leaf.dtype.kind in "fciu"
  return jax.dtypes.canonicalize_dtype(leaf.dtype) if is_number else leaf.dtype


def wide_dtype(dtype: Any) -> Any:
  """Dtype of sums: float32 for narrower ones."""
  # Not jnp.promote_types, which refuses under strict dtype promotion.
  return np.promote_types(dtype, np.float32)


def device_memory(device: jax.Device) -> int | None:
  """Free bytes of a device; of a CPU, those of the host. None if unknown."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  return host_memory() if device.platform == "cpu" else None


def host_memory() -> int | None:
  """Available bytes of this machine, all of them where that is unknown."""
  try:
    with open("/proc/meminfo") as f:
      lines = dict(line.split(":", 1) for line in f)
    # What can be had without swapping: caches of files count as free.
    return 1024 * int(lines["MemAvailable"].split()[0])
  except (OSError, KeyError, ValueError):
    pass
  if hasattr(os, "sysconf"):
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return None


def check_inexact(tree: Any, name: str) -> None:
  """Raises TypeError at the first leaf that has no gradient."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not (hasattr(leaf, "dtype") or isinstance(leaf, (int, float, complex))):
      raise TypeError(
        f"{name} must have float or complex leaves, got a"
        f" {type(leaf).__name__} {path_of(path)}. With Equinox, write params,"
        " static = eqx.partition(model, eqx.is_inexact_array), give params, and"
        " let the loss call eqx.combine(params, static)."
      )
    dtype = dtype_of(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"{name} must have float or complex leaves, got {dtype}"
        f"{list(np.shape(leaf))} {path_of(path)}. Keep such leaves out of"
        f" {name}, e.g. let the loss close over them."
      )


def as_dtype(dtype: Any, name: str) -> Any:
  """Returns a float or complex dtype, or None; raises TypeError for others.

  Args:
    dtype: anything that names a dtype, or ``None``.
    name: what to call it in the message.
  """
  if dtype is None:
    return None
  if isinstance(dtype, jax.Array):
    raise TypeError(
      f"{name} must be a dtype, got a JAX array. With optax.inject_hyperparams,"
      " which takes what can be called for a schedule, write"
      f' static_args=("{name}",).'
    )
  try:
    canonical = jax.dtypes.canonicalize_dtype(dtype)
  except TypeError as e:
    raise TypeError(f"{name} must be a dtype, got {dtype!r}.") from e
  if not jnp.issubdtype(canonical, jnp.inexact):
    raise TypeError(
      f"{name} must be a float or complex dtype, got {canonical}."
    )
  return canonical


def check_dtype_fits(params: Any, dtype: Any, name: str) -> None:
  """Raises ValueError if a dtype, unless ``None``, drops imaginary parts."""
  if dtype is None:
    return
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if dtype_kind(dtype_of(leaf)) != dtype_kind(dtype):
      raise ValueError(
        f"{name}={dtype} cannot hold parameters of dtype {dtype_of(leaf)}"
        f" {path_of(path)}."
      )


def check_same_tree(got: Any, want: Any, got_name: str, want_name: str) -> None:
  """Raises ValueError unless two trees agree in structure, shape, dtype kind.

  Args:
    got: the tree to check, with array-like leaves.
    want: the tree that it must match.
    got_name: what to call ``got`` in the message.
    want_name: what to call ``want`` in the message.
  """
  got_leaves = jax.tree_util.tree_leaves_with_path(got)
  want_leaves = jax.tree_util.tree_leaves_with_path(want)
  got_def: Any = jax.tree.structure(got)
  want_def: Any = jax.tree.structure(want)
  if got_def != want_def:
    detail = _difference(
      [path for path, _ in got_leaves], [path for path, _ in want_leaves]
    )
    detail = detail or f"other containers: {got_def} instead of {want_def}"
    raise ValueError(
      f"{got_name} must have the tree structure of {want_name}: {detail}."
      f"{_pair_hint(got, want_def)}"
    )
  for (path, g), (_, w) in zip(got_leaves, want_leaves, strict=True):
    if np.shape(g) != np.shape(w):
      raise ValueError(
        f"{got_name} must have the shapes of {want_name}, got"
        f" {np.shape(g)} instead of {np.shape(w)} {path_of(path)}."
        f"{_per_example_hint(got_leaves, want_leaves)}"
      )
    if dtype_kind(dtype_of(g)) != dtype_kind(dtype_of(w)):
      raise ValueError(
        f"{got_name} must have the kinds of dtype of {want_name}, got"
        f" {dtype_of(g)} instead of {dtype_of(w)} {path_of(path)}."
      )


def _difference(got: Sequence[Any], want: Sequence[Any]) -> str:
  """The paths that are missing in one list, and unexpected in it."""
  got, want = (list(map(_keystr, paths)) for paths in (got, want))
  missing = [p for p in want if p not in set(got)]
  extra = [p for p in got if p not in set(want)]
  return "; ".join(
    f"{what} {', '.join(p or 'a bare leaf' for p in paths[:3])}"
    + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    for what, paths in (("missing", missing), ("unexpected", extra))
    if paths
  )


def _pair_hint(got: Any, want_def: Any) -> str:
  """Advice about a gradient that comes in a pair with something else."""
  if not isinstance(got, tuple) or len(got) != 2:
    return ""
  first, second = map(jax.tree.structure, got)
  if second == want_def:
    return (
      " It is a pair (value, gradient), as jax.value_and_grad returns it: use"
      " jax.grad, or take the second part."
    )
  if first == want_def:
    return (
      " It is a pair (gradient, auxiliary data), as has_aux=True makes it: take"
      " the first part."
    )
  return ""


def _per_example_hint(got_leaves: Any, want_leaves: Any) -> str:
  """Advice about gradients of examples in place of their mean."""
  if all(
    np.ndim(g) == np.ndim(w) + 1 and np.shape(g)[1:] == np.shape(w)
    for (_, g), (_, w) in zip(got_leaves, want_leaves, strict=True)
  ):
    return (
      " These look like per-example gradients: average them over the leading"
      " axis, jax.tree.map(lambda g: g.mean(axis=0), grads)."
    )
  return ""


def check_state(state: Any, kind: Any, estimates: bool) -> None:
  """Raises unless a state is of the type that a transformation makes.

  Args:
    state: the state given to update.
    kind: the type of its own.
    estimates: whether it estimates the coefficient.

  Raises:
    TypeError: for another type, also for what a checkpoint becomes if it is
      restored without a target.
    ValueError: if the state is stacked, or belongs to a transformation of the
      other kind.
  """
  if not isinstance(state, kind):
    raise TypeError(
      f"state must be the {kind.__name__} that init returns, got a"
      f" {type(state).__name__}.{RESTORE_HINT}"
    )
  if np.ndim(state.count):
    raise ValueError(
      f"state is stacked, its count has the shape {np.shape(state.count)}: call"
      " update inside jax.vmap or jax.pmap over the leading axis."
    )
  if (state.estimate is not None) != estimates:
    made_by, given_to = (
      ("an alpha", "an adaptive") if estimates else ("an adaptive", "an alpha")
    )
    raise ValueError(
      f"state has {'no ' if estimates else 'an '}estimate: it was made by"
      f" {made_by} transformation and given to {given_to} one. Make the state"
      " with the init of the same transformation."
    )


DROPPED_HINT = (
  " A wrapper may have dropped the argument: apply_gradients of a linen"
  " TrainState (use optax_svrg.flax.TrainState), jaxopt.OptaxSolver and"
  " optimistix.OptaxMinimiser do (call update in a loop of your own)."
)
RESTORE_HINT = (
  " A checkpoint restored without a target loses the types of its nodes: give"
  " tx.init(params) as the target."
)


def check_leaf_dtypes(
  tree: Any, params: Any, dtype: Any, name: str, argument: str
) -> None:
  """Raises ValueError unless stored leaves have the dtypes they were made with.

  Args:
    tree: what a state stores of the parameters.
    params: a tree of the same structure with the parameters' dtypes.
    dtype: dtype of all leaves, ``None`` for those of ``params``.
    name: what to call the tree in the message.
    argument: the argument that gives ``dtype``.
  """
  for (path, stored), p in zip(
    jax.tree_util.tree_leaves_with_path(tree),
    jax.tree.leaves(params),
    strict=True,
  ):
    want = dtype_of(p) if dtype is None else dtype
    if stored.dtype != want:
      raise ValueError(
        f"{name} has dtype {stored.dtype} {path_of(path)}, but"
        f" {argument}={None if dtype is None else str(dtype)} makes it {want}."
        " The state was made with other arguments: make it with the init of"
        " this transformation. Where parameters and gradients differ in dtype,"
        " give update the params, too."
      )


def check_coefficient(value: Any, name: str) -> None:
  """Raises unless ``value`` is one finite real number, as far as is known.

  Args:
    value: a number or array; a tracer is checked by its shape and dtype only.
    name: what to call it in the message.
  """
  if isinstance(value, (bool, np.bool_)) or not isinstance(
    value, (int, float, np.ndarray, np.number, jax.Array)
  ):
    raise TypeError(f"{name} must be a real number, got {value!r}.")
  if jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar, got an array of shape {jnp.shape(value)}."
    )
  dtype = dtype_of(value)
  if not (
    jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
  ):
    raise TypeError(f"{name} must be a real number, got dtype {dtype}.")
  if not isinstance(value, jax.core.Tracer) and not math.isfinite(value):
    raise ValueError(f"{name} must be finite, got {value}.")


def check_decay(value: Any, name: str) -> None:
  """Raises unless ``value`` is a number in [0, 1)."""
  check_coefficient(value, name)
  if not isinstance(value, jax.core.Tracer) and not 0 <= value < 1:
    raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_positive(value: Any, name: str) -> None:
  """Raises unless ``value`` is a positive finite number."""
  check_coefficient(value, name)
  if not isinstance(value, jax.core.Tracer) and not value > 0:
    raise ValueError(f"{name} must be positive, got {value}.")


def check_count(value: Any, name: str, least: int = 1) -> int:
  """Returns ``value`` as an int; raises unless it is an integer in range."""
  if isinstance(value, jax.Array):
    raise TypeError(
      f"{name} must be an integer, got a JAX array. With"
      " optax.inject_hyperparams, which makes arrays of numbers, write"
      f' static_args=("{name}",).'
    )
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"{name} must be an integer, got {value!r}.")
  if value < least:
    raise ValueError(f"{name} must be at least {least}, got {value}.")
  return int(value)


def check_index(value: Any, name: str) -> Any:
  """Returns ``value``; raises unless it is one integer."""
  if isinstance(value, (bool, np.bool_)) or not isinstance(
    value, (int, np.ndarray, np.integer, jax.Array)
  ):
    raise TypeError(f"{name} must be an integer, got {value!r}.")
  dtype = dtype_of(value)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise TypeError(f"{name} must be an integer, got dtype {dtype}.")
  if jnp.ndim(value):
    raise ValueError(
      f"{name} must be a scalar, got an array of shape {jnp.shape(value)}."
    )
  return value


def wide_index(index: Any) -> jax.Array:
  """An index as an array, which any number of batches can be compared with."""
  index = jnp.asarray(index)
  return index if index.dtype.itemsize >= 4 else index.astype(jnp.int32)


def is_sparse(node: Any) -> bool:
  """Returns whether a node is a sparse array; its leaves are its non-zeros."""
  # Whoever has one has imported the module, which is slow to import.
  sparse = sys.modules.get("jax.experimental.sparse")
  return sparse is not None and isinstance(node, sparse.JAXSparse)


def leading_axes(tree: Any) -> list[tuple[Any, int]]:
  """Path and length of the leading axis of each array that has axes."""
  shapes = [
    (path, getattr(leaf, "shape", ()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=is_sparse
    )
  ]
  return [(path, shape[0]) for path, shape in shapes if shape]


def check_same_size(
  sizes: Sequence[tuple[Any, int]], name: str, of: str
) -> int:
  """Returns the length of all leading axes; raises unless it is the same."""
  first_path, first_size = sizes[0]
  for path, size in sizes:
    if size != first_size:
      raise ValueError(
        f"{name} must have the same number of {of} in all leaves, got"
        f" {first_size} {path_of(first_path)} and {size} {path_of(path)}."
      )
  return first_size


def check_batches(batches: Any) -> None:
  """Raises TypeError for iterables that do not yield batches."""
  # Not by iter(batches): a data loader may start its workers then.
  iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
  if not iterable or isinstance(batches, (dict, str)):
    raise TypeError(
      "batches must be an iterable of batches, got a"
      f" {type(batches).__name__}. For a single batch write [batch]."
    )


def check_batch(batch: Any, name: str, *, is_first: bool = True) -> int:
  """Returns the number of examples of a batch; raises if it has none.

  Args:
    batch: a tree of arrays, dense or sparse.
    name: what to call it in the message.
    is_first: whether it is the first batch, of which is known that its leaves
      mean what those of the others do.
  """
  leaves = jax.tree_util.tree_leaves_with_path(batch, is_leaf=is_sparse)
  for path, leaf in leaves:
    if is_sparse(leaf):
      continue
    if not isinstance(leaf, _ARRAY_LIKE):
      raise TypeError(
        f"{name} must be a tree of arrays, got a {type(leaf).__name__}"
        f" {path_of(path)}."
      )
    if (
      isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "USOMm"
    ):
      raise TypeError(
        f"{name} must be a tree of numbers, got an array of dtype {leaf.dtype}"
        f" {path_of(path)}. Encode it as integers, or leave it out."
      )
  sizes = leading_axes(batch)
  if not sizes:
    raise ValueError(
      f"{name} must have leaves whose leading axis is the examples, got none in"
      f" {jax.tree.structure(batch)}."
    )
  if is_first or any(size != 2 for _, size in sizes):
    _check_no_legacy_key(leaves, name)
  num_examples = check_same_size(sizes, name, "examples")
  if not num_examples:
    raise ValueError(f"{name} has no examples.")
  return num_examples


def _check_no_legacy_key(leaves: Any, name: str) -> None:
  for path, leaf in leaves:
    if getattr(leaf, "shape", None) == (2,) and leaf.dtype == np.uint32:
      raise ValueError(
        f"{name} has a uint32 array of shape (2,) {path_of(path)}, which would"
        " count as two examples. If it is a random key of jax.random.PRNGKey,"
        " use jax.random.key, whose keys have no axes; if it is data, cast it"
        " to int32."
      )


def axes_of(tree: Any) -> tuple[Any, list[tuple[Any, int]]]:
  """The structure of a tree of arrays, and paths and numbers of axes."""
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sparse)
  # The shape of a sparse array is part of its structure.
  structure = jax.tree.structure(tree, is_leaf=is_sparse)
  return structure, [(path, np.ndim(x)) for path, x in leaves]


def check_same_axes(got: Any, want: Any, got_name: str, want_name: str) -> None:
  """Raises ValueError unless two results of :func:`axes_of` agree."""
  (got_def, got_axes), (want_def, want_axes) = got, want
  if got_def != want_def:
    detail = _difference([p for p, _ in got_axes], [p for p, _ in want_axes])
    detail = detail or f"other containers: {got_def} instead of {want_def}"
    raise ValueError(
      f"{got_name} must have the tree structure of {want_name}: {detail}."
    )
  for (path, ndim), (_, want_ndim) in zip(got_axes, want_axes, strict=True):
    if ndim != want_ndim:
      raise ValueError(
        f"{got_name} must have the numbers of axes of {want_name}, got {ndim}"
        f" instead of {want_ndim} {path_of(path)}."
      )


def check_varying(tree: Any, axis_name: Any, name: str) -> None:
  """Raises ValueError if gradients were reduced over ``axis_name`` already.

  Under the type checking of ``jax.shard_map`` the gradient of replicated
  parameters is summed over the axis by ``jax.grad`` itself. Averaging it again
  would be a no-op, and the gradient as many times too large as there are
  devices. Where types are not tracked (``pmap``, ``vmap``, ``check_vma=False``)
  nothing is summed implicitly and there is nothing to check.

  Args:
    tree: the gradients.
    axis_name: name of a mapped axis, or a tuple of names.
    name: what to call the gradients in the message.
  """
  tracked = tracked_axes(axis_name)
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not tracked <= _compat.varying_axes(leaf):
      raise ValueError(
        f"{name} must be device-local with axis_name={axis_name!r}, but"
        f" {path_of(path)} it does not vary over that axis: it has already"
        " been summed. Inside jax.shard_map jax.grad sums the gradient of"
        " replicated parameters; write"
        f" optax_svrg.device_local(jax.grad(loss), {axis_name!r}), which"
        f" differentiates with respect to jax.lax.pcast(params, {axis_name!r},"
        " to='varying'), instead."
      )


def tracked_axes(axis_name: Any) -> frozenset[Any]:
  """Those of the named axes over which types tell whether a value varies.

  Args:
    axis_name: name of a mapped axis, or a tuple of names.

  Raises:
    ValueError: if it is no enclosing axis.
  """
  try:
    axis_index = jax.lax.axis_index(axis_name)
  except NameError as e:
    raise ValueError(
      f"axis_name={axis_name!r} is not an axis of the enclosing"
      " jax.shard_map, jax.pmap or jax.vmap."
    ) from e
  return _compat.varying_axes(axis_index)
