# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The mean gradient over a data set, and a table of those of its batches."""

from collections.abc import Callable, Iterable, Sized
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _lockstep, _sharding


def mean_gradient(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  axis_name: Any = None,
) -> optax.Updates:
  r"""Mean gradient over a data set that is streamed in batches.

  .. math::

    \nabla f(\theta) = \frac{1}{n} \sum_B |B| \, \nabla f_B(\theta),
    \qquad n = \sum_B |B|

  Each batch counts by its number of examples, so a short last batch is weighted
  rightly. One accumulator of the size of the parameters is kept, in float32 for
  narrower dtypes; it is donated from batch to batch. The accumulation is
  compiled once per shape of a batch, and the host does not wait for the device
  between batches. Wrap ``batches`` to see progress, e.g. in ``tqdm``.

  Args:
    grad_fn: a pure function ``grad_fn(params, batch)`` to the mean gradient
      over that batch, a tree like ``params``; usually ``jax.grad(loss)``. As
      with :func:`jax.jit`, what it closes over is compiled in, and a new
      function object is compiled anew: make it once, outside of the training
      loop. To have values of a changing closure passed as arguments, give a
      :class:`jax.tree_util.Partial`.
    params: parameters with float or complex leaves, at which gradients are
      taken.
    batches: any iterable of batches: a generator, a data loader, an array whose
      first axis is the batches, a tuple of traced batches inside
      :func:`jax.jit`. A batch is a tree of arrays whose
      leading axis is the examples, of the same length in all leaves; leaves
      without axes (a number, a PRNG key) count for nothing. All batches have
      the same structure and numbers of axes.
      Where ``params`` are spread over several processes, each has its own
      iterable, and they are kept in step by :func:`optax_svrg.lockstep`.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap`, each member
      of which has ``batches`` of its own and a device-local ``grad_fn``. The
      result is reduced once, at the end of the pass.

  Returns:
    The mean gradient: a tree with the structure and shapes of ``params``, and
    their dtypes promoted with float32.

  Raises:
    TypeError: if ``grad_fn`` cannot be called, ``batches`` is a mapping or not
      iterable, or leaves of ``params`` or of a batch have no
      dtype that is fit for it.
    ValueError: if ``batches`` is empty, a batch is empty or its leaves disagree
      in their number of examples, a batch differs from the first one in
      structure or number of axes, a gradient differs from ``params`` in
      structure, shape or kind of dtype, ``axis_name`` is no enclosing axis, or
      gradients have already been summed over it; if another process has
      other batches than this one.
    TimeoutError: if another process has not come to a batch in 300 s.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> x = jnp.array([[1., 2.], [3., 1.], [2., 2.], [1., 0.], [2., 0.]])
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w = jnp.array([1.0, -1.0])
    >>> print(optax_svrg.mean_gradient(jax.grad(loss), w, [x[:4], x[4:]]))
    [4. 0.]

    Data that lie on the device as one array need no loop in Python: give them
    as a single batch to a ``grad_fn`` that scans over micro-batches, which all
    have the same size. A remainder makes a second batch.

    >>> def scanned_grad(w, x):
    ...   micro_batches = x.reshape(-1, 2, *x.shape[1:])
    ...   def body(total, micro_batch):
    ...     return total + jax.grad(loss)(w, micro_batch), None
    ...   total, _ = jax.lax.scan(body, jnp.zeros_like(w), micro_batches)
    ...   return total / len(micro_batches)
    >>> x = jnp.arange(20.0).reshape(10, 2)
    >>> print(optax_svrg.mean_gradient(scanned_grad, w, [x]))
    [-18. -20.]
    >>> print(optax_svrg.mean_gradient(jax.grad(loss), w, [x]))
    [-18. -20.]

    ``optax.microbatching.microbatch`` makes such a function of any gradient.

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025
  """
  _check_arguments(grad_fn, params, batches)
  total, _, num_examples = _pass(grad_fn, params, batches, None)
  if axis_name is not None:
    _checks.check_varying(total, axis_name, "the gradients of grad_fn")
    # Every member has as many examples: shapes are the same on all devices.
    total = jax.lax.pmean(total, axis_name)
  return jax.tree.map(lambda t: t / num_examples, total)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientTable:
  """The gradients of the batches of a data set, as an argument of programs.

  ``table[i]``, for a Python or traced integer ``i`` in [0, ``len(table)``), is
  the gradient of batch ``i``, to be given to ``update`` as ``snapshot_grads``.
  A Python integer out of this range raises an IndexError; a traced one gives
  numbers that are not finite, which ``update`` takes for a gradient that cannot
  be used, so that the plain one passes.

  Attributes:
    grads: a tree like the parameters, with a leading axis of batches on each
      leaf.
    num_batches: how many there are.
  """

  grads: optax.Updates
  num_batches: int = dataclasses.field(metadata={"static": True})

  def __len__(self) -> int:
    return self.num_batches

  def __getitem__(self, index: Any) -> optax.Updates:
    index = _checks.check_index(index, "the index of a table")
    last = self.num_batches - 1
    if not isinstance(index, jax.core.Tracer) and not 0 <= index <= last:
      raise IndexError(f"the table has batches 0 to {last}, got {index}.")
    index = _checks.wide_index(index)
    is_known = (index >= 0) & (index <= last)
    entry = jax.tree.map(
      lambda t: jax.lax.dynamic_index_in_dim(t, index, 0, keepdims=False),
      self.grads,
    )
    return jax.tree.map(
      lambda x: jnp.where(is_known, x, jnp.nan), _sharding.to_device(entry)
    )


def gradient_table(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  dtype: Any = None,
  memory_kind: str | None = None,
) -> tuple[optax.Updates, GradientTable]:
  """The mean gradient over a data set, and the gradient of each batch.

  The pass of :func:`optax_svrg.mean_gradient` computes the gradients of all
  batches at the snapshot. Where the steps visit the same batches, in any order,
  they can take them from this table instead of computing them again: two
  gradients per example and epoch instead of three, for the memory of as many
  copies of the parameters as there are batches.

  Args:
    grad_fn: as for :func:`optax_svrg.mean_gradient`.
    params: likewise.
    batches: likewise. An iterable without a length is read into a list first.
    dtype: dtype of the table, ``None`` for the parameters'. The mean is that of
      the rounded gradients, so that the estimator stays unbiased.
    memory_kind: kind of memory of the table, ``None`` for that of the
      parameters. With ``"pinned_host"`` it is in the memory of the host from
      the beginning, and ``table[i]`` moves one gradient to the device. It needs
      ``params`` that are not traced.

  Returns:
    The mean gradient, as of :func:`optax_svrg.mean_gradient`, and a
    :class:`GradientTable`, in the order of ``batches``.

  Raises:
    TypeError: as :func:`optax_svrg.mean_gradient`, or if ``dtype`` is not a
      float or complex dtype.
    ValueError: as :func:`optax_svrg.mean_gradient`; if ``dtype`` would drop
      imaginary parts; if the devices of ``params`` have no ``memory_kind``; or,
      before any gradient is computed, if the table does not fit into the memory
      of the device, or of the host, with the bytes that it needs.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> loss = lambda w, x: jnp.mean((w - x) ** 2)
    >>> grad = jax.grad(loss)
    >>> batches = [jnp.array([0.0, 2.0]), jnp.array([4.0, 8.0])]
    >>> params = jnp.array(1.0)
    >>> tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
    >>> mean, table = optax_svrg.gradient_table(grad, params, batches)
    >>> print(mean, table[1])
    -5.0 -10.0
    >>> state = optax_svrg.take_snapshot(
    ...     tx.init(params), params, lambda _: mean)
    >>> @jax.jit
    ... def step(params, state, batch, table, i):
    ...   updates, state = tx.update(
    ...       grad(params, batch), state, params, snapshot_grads=table[i])
    ...   return optax.apply_updates(params, updates), state
    >>> for i in (1, 0):
    ...   params, state = step(params, state, batches[i], table, i)
    >>> print(f"{params:.2f}")
    1.90

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025, whose code has a variant that
    keeps the gradients of an epoch; Johnson and Zhang, `Accelerating Stochastic
    Gradient Descent using Predictive Variance Reduction
    <https://papers.nips.cc/paper/4937>`_, 2013

  .. seealso:: :func:`optax_svrg.adaptive_saga`, which needs no pass.
  """
  _check_arguments(grad_fn, params, batches)
  dtype = _checks.as_dtype(dtype, "dtype")
  _checks.check_dtype_fits(params, dtype, "dtype")
  if not isinstance(batches, Sized):
    batches = list(batches)
  total, table, num_examples = _pass(
    grad_fn,
    params,
    batches,
    _sharding.table(params, len(batches), dtype, memory_kind),
  )
  mean = jax.tree.map(lambda t: t / num_examples, total)
  return mean, GradientTable(table, len(batches))


def flatten_grad_fn(grad_fn: Callable[..., Any]) -> tuple[list[Any], Any]:
  """A gradient function as arguments of a program, and what it is compiled for.

  A :class:`jax.tree_util.Partial` is a tree: its arrays are arguments, its
  function is static. Other functions are static as a whole.
  """
  if not isinstance(grad_fn, jax.tree_util.Partial):
    grad_fn = jax.tree_util.Partial(grad_fn)
  return jax.tree.flatten(grad_fn)


def _check_arguments(grad_fn: Any, params: Any, batches: Any) -> None:
  if not callable(grad_fn):
    raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
  _checks.check_inexact(params, "params")
  _checks.check_batches(batches)


def _pass(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  table: Any,
) -> tuple[optax.Updates, Any, int]:
  """Sums the gradients of batches, and stores them if there is a table."""
  leaves, treedef = flatten_grad_fn(grad_fn)

  total = jax.tree.map(
    lambda p: jnp.zeros_like(p, _checks.wide_dtype(_checks.dtype_of(p))),
    params,
  )
  # Flat, as only tuples of shardings can be hashed.
  carry = tuple(tuple(jax.tree.leaves(x)) for x in (total, table))
  shardings = None
  if any(map(_sharding.on_host, jax.tree.leaves(table))):
    # Else JAX pairs donated buffers of one kind of memory with the other.
    shardings = jax.tree.map(lambda x: x.sharding, carry)
  accumulate = _accumulation(treedef, shardings)
  if _lockstep.spans_processes(params):
    batches = _lockstep.lockstep(batches)
  num_examples = 0
  first_ndims = None
  for index, batch in enumerate(batches):
    num_examples += _checks.check_batch(batch, f"batches[{index}]")
    ndims = jax.tree.map(np.ndim, batch)
    first_ndims = ndims if first_ndims is None else first_ndims
    _check_ndims(ndims, first_ndims, index)
    carry = accumulate(carry, index, leaves, params, batch)
  if not num_examples:
    raise ValueError("batches must hold at least one batch, got none.")
  total, table = (
    jax.tree.unflatten(jax.tree.structure(tree), leaves)
    for tree, leaves in zip((total, table), carry, strict=True)
  )
  return total, table, num_examples


# Compiled functions are kept for as many gradients as a program may use in
# turn, not for ever: jax.jit would keep each closure and what it refers to.
@functools.lru_cache(maxsize=16)
def _accumulation(treedef: Any, shardings: Any) -> Callable[..., Any]:
  """The jitted accumulation for one ``grad_fn``, given as a tree structure.

  Args:
    treedef: of ``grad_fn``.
    shardings: of what is accumulated, ``None`` to leave them to the compiler.

  Returns:
    A function that adds to the sum of the gradients, and stores the gradient in
    the table, both tuples of leaves; the latter is empty without a table.
  """

  @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
  def accumulate(
    carry: Any, index: Any, leaves: Any, params: optax.Params, batch: Any
  ) -> Any:
    total, table = carry
    total, batch = _in_sequence(total, batch)
    grads = jax.tree.unflatten(treedef, leaves)(params, batch)
    _checks.check_same_tree(grads, params, "the result of grad_fn", "params")
    grads = jax.tree.leaves(grads)
    weight = _checks.leading_axes(batch)[0][1]
    if table:
      grads = [
        jnp.asarray(g, t.dtype) for g, t in zip(grads, table, strict=True)
      ]
      table = tuple(
        jax.lax.dynamic_update_index_in_dim(t, g, index, 0)
        for t, g in zip(
          table, _sharding.to_memory_of(list(table), grads), strict=True
        )
      )
    total = tuple(
      t + weight * jnp.asarray(g, t.dtype)
      for t, g in zip(total, grads, strict=True)
    )
    return total, table

  return accumulate


def _in_sequence(total: Any, batch: Any) -> tuple[Any, Any]:
  """Makes a batch wait for the total before it.

  Inside a jit with several batches XLA would compute all gradients first, and
  hold them in memory until it adds them up.
  """
  varying = {
    jax.typeof(x).manual_axis_type.varying
    for x in jax.tree.leaves((total, batch))
  }
  # A barrier may make what it holds vary over all axes that any of it does.
  if len(varying) > 1:
    return total, batch
  return jax.lax.optimization_barrier((total, batch))


def _check_ndims(ndims: Any, first_ndims: Any, index: int) -> None:
  """Raises unless a batch has the form of the first, given by axes per leaf."""
  name = f"batches[{index}]"
  _checks.check_same_tree(ndims, first_ndims, name, "batches[0]")
  for (path, ndim), first_ndim in zip(
    jax.tree_util.tree_leaves_with_path(ndims),
    jax.tree.leaves(first_ndims),
    strict=True,
  ):
    if ndim != first_ndim:
      raise ValueError(
        f"{name} must have the numbers of axes of batches[0], got {ndim}"
        f" instead of {first_ndim} {_checks.path_of(path)}."
      )
