# SPDX-License-Identifier: Apache-2.0
"""The parts of JAX that have no public name, each behind one function.

What another version of JAX lacks falls back or fails here, with a message, and
not in the middle of a training.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend


def varying_axes(x: Any) -> frozenset[Any]:
  """Manual mesh axes over which the type of an array says that it varies.

  Empty where types do not track this: outside of :func:`jax.shard_map`, with
  ``check_vma=False``, under :func:`jax.pmap` and :func:`jax.vmap`.
  """
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  # JAX 0.9 and older have ``vma`` instead.
  manual = getattr(aval, "manual_axis_type", None)
  if manual is not None:
    return manual.varying
  return getattr(aval, "vma", None) or frozenset()


def vary_like(tree: Any, like: Any) -> Any:
  """Makes arrays vary, by their types, over all axes that others vary over.

  Args:
    tree: the arrays.
    like: a tree of the same structure, of arrays or
      :class:`jax.ShapeDtypeStruct`.
  """

  def cast(x: Any, y: Any) -> Any:
    missing = varying_axes(y) - varying_axes(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

  return jax.tree.map(cast, tree, like)


def on_host(x: Any) -> bool:
  """Returns whether an array, or one of this type, is in the host's memory."""
  type_ = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
  space = getattr(type_, "memory_space", None)
  return space is not None and space == jax.memory.Space.Host


def is_committed(x: jax.Array) -> bool:
  """Returns whether an array is tied to its devices."""
  return getattr(x, "committed", True)


def on_host_processor(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Lets the processor of the host compute on arrays in its memory."""
  from jax.experimental import compute_on

  # JAX 0.12 has renamed it.
  wrap: Any = getattr(compute_on, "compute_on2", compute_on.compute_on)
  return wrap(
    fn,
    compute_type="device_host",
    out_memory_spaces=jax.memory.Space.Host,
  )


def outside_of_branches(fn: Callable[[], Any]) -> Callable[[], Any]:
  """Computes convolutions ahead of a branch on CPU.

  Inside of one, XLA for CPU does not use its fast implementation of them (JAX
  0.10 to 0.12: 3 to 8 times slower).

  Args:
    fn: a function that would be called in a branch of :func:`jax.lax.cond`.

  Returns:
    A function to call there, which has the result if ``fn`` has convolutions.
  """
  if jax.default_backend() != "cpu":
    return fn
  program, result = jax.make_jaxpr(fn, return_shape=True)()
  treedef = jax.tree.structure(result)
  run = jax.extend.core.jaxpr_as_fun(program)
  if not _has_primitive(program.jaxpr, "conv_general_dilated"):
    return lambda: jax.tree.unflatten(treedef, run())
  leaves = run()
  return lambda: jax.tree.unflatten(treedef, leaves)


def _has_primitive(jaxpr: Any, name: str) -> bool:
  """Returns whether a program has a primitive, at any depth."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == name:
      return True
    for inner in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns") and _has_primitive(inner, name):
        return True
  return False


def coordination_client() -> Any:
  """The client of the service that ``jax.distributed.initialize`` starts.

  Returns:
    The client, ``None`` in a single process.

  Raises:
    ImportError: if this version of JAX keeps it elsewhere.
  """
  if jax.process_count() == 1:
    return None
  try:
    from jax._src import distributed

    return distributed.global_state.client
  except (ImportError, AttributeError) as e:
    raise ImportError(
      f"JAX {jax.__version__} does not have jax._src.distributed.global_state"
      ".client, through which optax_svrg.lockstep compares the batches of the"
      " processes. Use another version of JAX, or do without lockstep: give"
      " every process equally many batches of the same shapes."
    ) from e
