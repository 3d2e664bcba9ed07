# SPDX-License-Identifier: Apache-2.0
"""Mean gradient over a data set, and a table of its batches' gradients."""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import (
  _checks,
  _compat,
  _compensated,
  _lockstep,
  _programs,
  _sharding,
  _table,
)


def mean_gradient(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  weights: Callable[[Any], Any] | None = None,
  axis_name: Any = None,
) -> optax.Updates:
  r"""Mean gradient over a data set that is streamed in batches.

  .. math::

    \nabla f(\theta) = \frac{1}{n} \sum_B |B| \, \nabla f_B(\theta),
    \qquad n = \sum_B |B|

  Each batch is weighted by its number of examples. The mean is accumulated in
  float32 for narrower dtypes, with compensation for rounding. The accumulation
  is compiled once per shape of a batch, and the host does not wait for the
  device between batches. Wrap ``batches`` to see progress, e.g. in ``tqdm``.

  Args:
    grad_fn: a pure function ``grad_fn(params, batch)`` to the mean gradient
      over that batch, a tree like ``params``; usually ``jax.grad(loss)``. Make
      it once, outside of the training loop: as with :func:`jax.jit`, a new
      function object is compiled again. To pass values that change, give a
      :class:`jax.tree_util.Partial`.
    params: parameters with float or complex leaves, at which gradients are
      taken.
    batches: any iterable of batches: a generator, a data loader, an array with
      a leading axis of batches; inside :func:`jax.jit` also traced. A batch is
      a tree of arrays, dense or sparse, with a leading axis of examples, of the
      same length in all leaves; scalar leaves are ignored. All batches have the
      same structure and numbers of axes. NumPy arrays are copied, so a loader
      may reuse its buffers. Where ``params`` span several processes, each
      process gives its own iterable, and :func:`optax_svrg.lockstep` is applied
      to it.
    weights: a function from a batch to its weight, a real scalar, instead of
      its number of examples; e.g. ``lambda batch: batch["mask"].sum()`` for
      padded batches. A batch of weight 0 is ignored.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap` whose members
      each have ``batches`` of their own and a device-local ``grad_fn``. The
      result is averaged over it once, at the end.

  Returns:
    The mean gradient, a tree like ``params`` in their dtypes promoted with
    float32. Inside :func:`jax.jit`, NaN if all weights are 0.

  Raises:
    TypeError: if ``grad_fn`` or ``weights`` cannot be called, ``batches`` is a
      mapping or not iterable, or a leaf has an unsuitable dtype.
    ValueError: if ``batches`` or a batch is empty, batches differ in structure
      or number of axes, or their leaves in length, a weight is not a scalar,
      all weights are 0, a gradient does not match ``params``, or ``axis_name``
      is not an enclosing axis or gradients have already been summed over it; if
      processes have different batches.
    TimeoutError: if another process does not reach a batch within 300 s. To
      wait longer, give ``optax_svrg.lockstep(batches, timeout=...)``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> x = jnp.array([[1., 2.], [3., 1.], [2., 2.], [1., 0.], [2., 0.]])
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w = jnp.array([1.0, -1.0])
    >>> print(optax_svrg.mean_gradient(jax.grad(loss), w, [x[:4], x[4:]]))
    [4. 0.]

    Inside :func:`jax.jit`, batches of equal shape are scanned:

    >>> grad = jax.grad(loss)
    >>> mean = jax.jit(lambda w, batches: optax_svrg.mean_gradient(
    ...     grad, w, batches))
    >>> print(mean(w, jnp.arange(20.0).reshape(5, 2, 2)))
    [-18. -20.]
  """
  _check_arguments(grad_fn, params, batches, weights)
  total, _ = _pass(grad_fn, params, batches, weights, None)
  if axis_name is not None:
    _checks.check_varying(total.mean, axis_name, "the gradients of grad_fn")
    total = _reduced(total, axis_name, has_weights=weights is not None)
  return _result(total, params, has_weights=weights is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientTable:
  """Gradients of the batches of a data set, as an argument of programs.

  ``table[i]``, for a Python or traced integer ``i`` in [0, ``len(table)``), is
  the gradient of batch ``i``: the argument ``snapshot_grads`` of ``update``. A
  Python integer out of range raises an IndexError; a traced one gives NaN, with
  which ``update`` passes the gradient unchanged.

  Attributes:
    grads: a tree like the parameters, with a leading axis of batches on each
      leaf; with more than ten batches, several short ones, in row-major order.
    num_batches: number of batches.
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
    entry = _table.read(self.grads, self.num_batches, index)
    return jax.tree.map(
      lambda x: jnp.where(is_known, x, jnp.nan), _sharding.to_device(entry)
    )


def gradient_table(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  num_batches: int | None = None,
  weights: Callable[[Any], Any] | None = None,
  dtype: Any = None,
  memory_kind: str | None = None,
) -> tuple[optax.Updates, GradientTable]:
  """Mean gradient over a data set, and the gradient of each batch.

  If the steps visit the batches of the snapshot pass, in any order, they can
  take the gradients at the snapshot from this table: two gradients per example
  and epoch instead of three, for the memory of as many copies of the parameters
  as there are batches.

  Args:
    grad_fn: see :func:`optax_svrg.mean_gradient`.
    params: see :func:`optax_svrg.mean_gradient`.
    batches: see :func:`optax_svrg.mean_gradient`.
    num_batches: number of batches, where ``batches`` has no usable length. With
      neither, all batches are read into memory first.
    weights: see :func:`optax_svrg.mean_gradient`.
    dtype: dtype of the table, ``None`` for the parameters'. The mean is that of
      the rounded gradients, so the estimator stays unbiased.
    memory_kind: kind of memory of the table, ``None`` for the parameters'. With
      ``"pinned_host"`` it is in the memory of the host, and ``table[i]`` moves
      one gradient to the device.

  Returns:
    The mean gradient, as of :func:`optax_svrg.mean_gradient`, and a
    :class:`GradientTable` in the order of ``batches``.

  Raises:
    TypeError: as :func:`optax_svrg.mean_gradient`, or if ``dtype`` is not a
      float or complex dtype, or ``num_batches`` not an integer.
    ValueError: as :func:`optax_svrg.mean_gradient`; if the number of batches
      differs from ``num_batches`` or their length; if ``dtype`` would drop
      imaginary parts; if the devices of ``params`` have no ``memory_kind``; or,
      before any gradient is computed, if the table does not fit into memory.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> grad = jax.grad(lambda w, x: jnp.mean((w - x) ** 2))
    >>> batches = [jnp.array([0.0, 2.0]), jnp.array([4.0, 8.0])]
    >>> params = jnp.array(1.0)
    >>> tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
    >>> mean, table = optax_svrg.gradient_table(grad, params, batches)
    >>> print(mean, table[1])
    -5.0 -10.0
    >>> state = optax_svrg.take_snapshot(
    ...     tx.init(params), params, lambda _: mean)
    >>> for i in (1, 0):
    ...   updates, state = tx.update(
    ...       grad(params, batches[i]), state, params, snapshot_grads=table[i])
    ...   params = optax.apply_updates(params, updates)
    >>> print(f"{params:.2f}")
    1.90
  """
  _check_arguments(grad_fn, params, batches, weights)
  dtype = _checks.as_dtype(dtype, "dtype")
  _checks.check_dtype_fits(params, dtype, "dtype")
  if num_batches is not None:
    num_batches = _checks.check_count(num_batches, "num_batches")
  else:
    num_batches = _length(batches)
  if num_batches is None:
    # Of a loader that may reuse its buffers.
    batches = [_sharding.owned(batch) for batch in batches]
    num_batches = len(batches)
  rows = _sharding.table(params, num_batches, dtype, memory_kind)
  empty = GradientTable(rows, num_batches)
  total, table = _pass(grad_fn, params, batches, weights, empty)
  return _result(total, params, has_weights=weights is not None), table


def _length(batches: Any) -> int | None:
  """Returns the length of an iterable, or None if it has none."""
  try:
    return len(batches)
  except Exception:  # Whatever a loader raises for a stream.
    return None


def split_partial(grad_fn: Callable[..., Any]) -> tuple[Callable, tuple, dict]:
  """Splits a Partial into its function and its arguments."""
  if isinstance(grad_fn, jax.tree_util.Partial):
    return grad_fn.func, grad_fn.args, dict(grad_fn.keywords)
  return grad_fn, (), {}


def _check_arguments(
  grad_fn: Any, params: Any, batches: Any, weights: Any
) -> None:
  if not callable(grad_fn):
    raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
  if weights is not None and not callable(weights):
    raise TypeError(
      f"weights must be a function from a batch to its weight, got {weights!r}."
    )
  _checks.check_inexact(params, "params")
  _checks.check_batches(batches)


class _Total(NamedTuple):
  """A weighted mean over the batches so far.

  Attributes:
    mean: the mean, leaf by leaf.
    error: rounding error of each leaf.
    weight: sum of the weights.
    weight_error: its rounding error.
  """

  mean: list[jax.Array]
  error: list[jax.Array]
  weight: jax.Array
  weight_error: jax.Array


def _nothing(params: optax.Params) -> _Total:
  def zeros() -> list[jax.Array]:
    return [
      jnp.zeros_like(p, _checks.wide_dtype(_checks.dtype_of(p)))
      for p in jax.tree.leaves(params)
    ]

  return _Total(zeros(), zeros(), jnp.zeros([]), jnp.zeros([]))


def _include(
  total: _Total, grads: list[jax.Array], weight: jax.Array
) -> _Total:
  """Includes one more batch in the mean."""
  sum_, rest = _compensated.two_sum(total.weight, weight)
  sum_, rest = _compensated.two_sum(sum_, total.weight_error + rest)
  is_zero = weight == 0
  share = weight / jnp.where(is_zero, 1, sum_)
  # A weight below 0 makes the mean NaN.
  share = jnp.where(weight < 0, jnp.nan, share)
  means, errors = [], []
  for m, e, g in zip(total.mean, total.error, grads, strict=True):
    mean, error = _compensated.include(
      m, e, share.astype(m.dtype), g.astype(m.dtype)
    )
    means.append(jnp.where(is_zero, m, mean))
    errors.append(jnp.where(is_zero, e, error))
  return _Total(means, errors, sum_, rest)


def _reduced(total: _Total, axis_name: Any, *, has_weights: bool) -> _Total:
  """Averages over the members of a mapped axis."""
  if not has_weights:
    # Every member has as many examples: shapes are the same on all devices.
    return total._replace(mean=jax.lax.pmean(total.mean, axis_name))
  weighted = [
    jnp.where(total.weight == 0, 0, m * total.weight.astype(m.dtype))
    for m in total.mean
  ]
  weighted, weight = jax.lax.psum((weighted, total.weight), axis_name)
  safe = jnp.where(weight == 0, 1, weight)
  mean = [m / safe.astype(m.dtype) for m in weighted]
  return total._replace(mean=mean, weight=weight)


def _result(
  total: _Total, params: optax.Params, *, has_weights: bool
) -> optax.Updates:
  """Returns the mean as a tree; NaN if all weights are 0."""
  mean = total.mean
  if has_weights:
    is_zero = total.weight == 0
    if not isinstance(is_zero, jax.core.Tracer) and np.any(is_zero):
      raise ValueError("weights must not be 0 for all batches.")
    mean = [jnp.where(is_zero, jnp.nan, m) for m in mean]
  return jax.tree.unflatten(jax.tree.structure(params), mean)


def _pass(
  grad_fn: Callable[..., Any],
  params: optax.Params,
  batches: Iterable[Any],
  weights: Callable[[Any], Any] | None,
  table: GradientTable | None,
) -> tuple[_Total, Any]:
  """Averages the gradients of batches, and stores them if there is a table."""
  if _lockstep.spans_processes(params):
    batches = _lockstep.lockstep(batches)
  num_batches = None if table is None else table.num_batches
  carry = (_nothing(params), table)
  # Within jax.jit every new array is traced.
  if isinstance(jnp.zeros([]), jax.core.Tracer):
    return _scan(grad_fn, params, _runs(batches, num_batches), weights, carry)
  return _loop(grad_fn, params, _checked(batches, num_batches), weights, carry)


def _checked(batches: Iterable[Any], num_batches: int | None) -> Iterator[Any]:
  """Yields the batches, and checks their form and number."""
  count = 0
  first = None
  promise = f"batches must hold {num_batches} batches, as num_batches or their"
  for batch in batches:
    if count == num_batches:
      raise ValueError(f"{promise} length says, but there are more.")
    name = f"batches[{count}]"
    _checks.check_batch(batch, name, is_first=not count)
    axes = _checks.axes_of(batch)
    first = first or axes
    _checks.check_same_axes(axes, first, name, "batches[0]")
    count += 1
    yield batch
  if not count:
    raise ValueError("batches must hold at least one batch, got none.")
  if num_batches is not None and count < num_batches:
    raise ValueError(f"{promise} length says, but there are only {count}.")


def _weight(
  weights: Callable[[Any], Any] | None, batch: Any
) -> float | jax.Array:
  """Returns the weight of a batch."""
  if weights is None:
    return float(_checks.leading_axes(batch)[0][1])
  weight = jnp.asarray(weights(batch))
  if weight.ndim or jnp.iscomplexobj(weight):
    raise ValueError(
      "weights must return a real scalar, got an array of shape"
      f" {weight.shape} and dtype {weight.dtype}."
    )
  return weight.astype(float)


def _advance(
  grad_fn: Callable[..., Any],
  params: optax.Params,
  carry: tuple[_Total, Any],
  index: Any,
  batch: Any,
  weight: Any,
) -> tuple[_Total, Any]:
  """Includes the gradient of a batch in the mean and in the table."""
  total, table = carry
  grads = grad_fn(params, batch)
  _checks.check_same_tree(grads, params, "the result of grad_fn", "params")
  leaves = jax.tree.leaves(grads)
  if table is not None:
    rows = jax.tree.leaves(table.grads)
    # The mean is that of the gradients as they are stored.
    leaves = [
      jnp.asarray(g, t.dtype) for g, t in zip(leaves, rows, strict=True)
    ]
    new = _sharding.to_memory_of(rows, leaves)
    rows = _table.write(rows, new, table.num_batches, index)
    table = dataclasses.replace(
      table, grads=jax.tree.unflatten(jax.tree.structure(table.grads), rows)
    )
  return _include(total, leaves, jnp.asarray(weight, float)), table


def _loop(
  grad_fn: Callable[..., Any],
  params: optax.Params,
  batches: Iterator[Any],
  weights: Callable[[Any], Any] | None,
  carry: tuple[_Total, GradientTable | None],
) -> tuple[_Total, GradientTable | None]:
  """A program per batch, with the accumulators donated from one to the next."""
  shardings = None
  if any(map(_compat.on_host, jax.tree.leaves(carry[1]))):
    # Else JAX pairs donated buffers of one kind of memory with the other.
    shardings = jax.tree.map(lambda x: x.sharding, carry)
  fn, args, kwargs = split_partial(grad_fn)
  # Under jax.vmap the accumulators get an axis, and cannot be reused.
  leaves = jax.tree.leaves(params)
  donate = not any(isinstance(x, jax.core.Tracer) for x in leaves)
  accumulate = _programs.program(
    fn,
    ("mean_gradient", donate, *jax.tree.leaves(shardings)),
    lambda call: _accumulation(call, shardings, donate),
    warn_level=4,
  )
  for index, batch in enumerate(batches):
    batch = _sharding.owned(batch)
    weight = _weight(weights, batch)
    carry = accumulate(carry, index, batch, weight, args, kwargs, params)
  return carry


def _accumulation(
  grad_fn: Callable[..., Any], shardings: Any, donate: bool
) -> Any:
  """Returns the jitted accumulation of one batch."""

  @functools.partial(
    jax.jit, donate_argnums=0 if donate else (), out_shardings=shardings
  )
  def accumulate(
    carry: Any,
    index: Any,
    batch: Any,
    weight: Any,
    args: Any,
    kwargs: Any,
    params: optax.Params,
  ) -> Any:
    bound = functools.partial(grad_fn, *args, **kwargs)
    return _advance(bound, params, carry, index, batch, weight)

  return accumulate


def _runs(
  batches: Iterable[Any], num_batches: int | None
) -> list[tuple[Any, list[jax.Array]]]:
  """Stacks batches of equal shapes: tree structures and their leaves."""
  if isinstance(batches, (jax.Array, np.ndarray)) and batches.ndim:
    for _ in _checked(batches[:1], None):
      pass
    return [(jax.tree.structure(0), [jnp.asarray(batches)])]
  runs: list[tuple[Any, Any, list[Any]]] = []
  for batch in _checked(batches, num_batches):
    leaves, treedef = jax.tree.flatten(batch)
    leaves = list(map(jnp.asarray, _sharding.owned(leaves)))
    shapes = [(x.shape, x.dtype) for x in leaves]
    if not runs or runs[-1][:2] != (treedef, shapes):
      runs.append((treedef, shapes, []))
    runs[-1][2].append(leaves)
  return [
    (treedef, [jnp.stack(column) for column in zip(*members, strict=True)])
    for treedef, _, members in runs
  ]


def _scan(
  grad_fn: Callable[..., Any],
  params: optax.Params,
  runs: list[tuple[Any, list[jax.Array]]],
  weights: Callable[[Any], Any] | None,
  carry: tuple[_Total, GradientTable | None],
) -> tuple[_Total, GradientTable | None]:
  """Scans each run of batches inside a program.

  It holds one gradient at a time, where XLA for CPU would compute those of all
  batches before it adds them up.
  """
  params = _checks.as_arrays(params)

  def step(treedef: Any, carry: Any, indexed: Any) -> tuple[Any, None]:
    index, leaves = indexed
    batch = jax.tree.unflatten(treedef, leaves)
    weight = _weight(weights, batch)
    return _advance(grad_fn, params, carry, index, batch, weight), None

  start = 0
  for treedef, stacked in runs:
    step_of_run = functools.partial(step, treedef)
    stop = start + stacked[0].shape[0]
    indexed = (jnp.arange(start, stop), stacked)
    first = jax.tree.map(lambda x: x[0], indexed)
    carry_type, _ = jax.eval_shape(step_of_run, carry, first)
    carry = _compat.vary_like(carry, carry_type)
    carry, _ = jax.lax.scan(step_of_run, carry, indexed)
    start = stop
  return carry
