# SPDX-License-Identifier: Apache-2.0
"""SAGA over mini-batches, also with a coefficient estimated online."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_svrg import (
  _checks,
  _compensated,
  _control_variate,
  _sharding,
  _table,
)


class SAGAState(NamedTuple):
  """State of :func:`optax_svrg.alpha_saga` and of :func:`adaptive_saga`.

  Attributes:
    count: number of updates made, which the schedule of the coefficient sees.
    alpha: coefficient applied by the last update, for logging: 0 where the
      gradient passed unchanged, as while the entry of its batch was empty.
    is_filled: for each batch, whether its gradient has been stored.
    table: last gradient of each batch: the tree of the parameters with a
      leading axis of batches (with more than ten batches, several short ones,
      in row-major order), in the parameters' dtypes or in ``table_dtype``;
      zeros where it is empty.
    mean_grads: mean of the table, in the parameters' dtypes promoted with
      float32.
    mean_error: rounding error of ``mean_grads``.
    estimate: averages of :func:`optax_svrg.adaptive_saga`, otherwise ``None``.
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
  alpha: jax.Array  # shape=(), JAX's default float dtype
  is_filled: jax.Array  # shape=(num_batches,), dtype=jnp.bool_
  table: optax.Updates
  mean_grads: optax.Updates
  mean_error: optax.Updates
  estimate: _control_variate.CoefficientEstimate | None = None


def alpha_saga(
  alpha: optax.ScalarOrSchedule,
  num_batches: int,
  *,
  table_dtype: Any = None,
  axis_name: Any = None,
  shard_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SAGA over mini-batches: variance reduction without a second gradient.

  The data set is divided into fixed batches, which are visited in any order, as
  a rule in a new random one each epoch. Of each batch :math:`i` the last
  gradient :math:`s_i` is kept in a table, whose mean :math:`\bar s` is always
  known. The gradient :math:`g_i` of a batch is replaced by

  .. math::

    g_i - \alpha \left(s_i - \bar s\right),

  and then takes the place of :math:`s_i`. For a batch that is drawn uniformly
  the correction has mean zero, so the result is unbiased for every
  :math:`\alpha`. :math:`\alpha = 1` is SAGA. As the entries are an epoch old,
  that is too much for neural networks: see :func:`adaptive_saga`.

  A batch without an entry is not corrected, and :math:`\bar s` is the mean over
  those that have one, so that the result is unbiased from the first step on,
  also if batches are drawn with replacement. In the first of several epochs
  without replacement nothing is corrected. For SAGA as it is published, fill
  the table at the initial parameters before the training, see the example.

  Put it first in :func:`optax.chain`, before clipping, noise, gradient
  accumulation and everything else that is not linear, followed by any
  optimizer. What is random within a batch, as augmentation and dropout, may be
  drawn anew at each visit: the result stays unbiased, but the less a batch
  resembles itself, the less is gained.

  **Memory.** The table takes ``num_batches`` times the bytes of the parameters,
  half of that with ``table_dtype=jnp.bfloat16`` for float32 parameters; its
  mean takes another two copies. It is updated in place if the state is donated
  or carried by :func:`jax.lax.scan`. Larger batches make a smaller table.

  Args:
    alpha: the coefficient: a finite real number, a scalar array, or a schedule,
      which is given the number of updates made so far. While it is 0, the
      gradient passes unchanged, bit for bit, and the table is still filled; for
      the Python number 0 it is not.
    num_batches: number of the fixed batches, at least 1.
    table_dtype: dtype of the table, ``None`` for the parameters'. The mean is
      that of the rounded entries, so the result is still unbiased.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap` over which
      gradients are to be averaged. The updates are then device-local; they are
      averaged in one reduction, and the table holds averaged gradients. With
      ``None`` they must have been averaged before.
    shard_axis_name: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``init`` takes
    parameters with float or complex leaves (or :class:`jax.ShapeDtypeStruct`
    in their place) and returns a :class:`SAGAState`. Its ``update`` needs the
    extra argument ``batch_index``, an integer or scalar integer array in
    [0, ``num_batches``): which of the fixed batches the updates are the
    gradient of. Where a traced index is out of this range, the gradient passes
    unchanged, ``alpha`` is 0, and the table stays as it is; so the gradient
    does where a corrected one would not be finite. Components of a gradient
    that are not finite, in ``table_dtype``, are not stored.

    Updates keep their structure, shapes and dtypes. Sums are formed in float32
    for narrower dtypes. The mean of the table is compensated for rounding, so
    that its error does not grow with the number of updates.

  Raises:
    TypeError: if ``alpha`` is not a real number, array or schedule, if
      ``num_batches`` is not an integer, if ``table_dtype`` is not a float or
      complex dtype, if parameters are not of such a dtype (by ``init``), or if
      ``batch_index`` is not an integer (by ``update``).
    ValueError: if ``alpha`` is not finite or not a scalar, if ``num_batches``
      is less than 1, by ``init``: if ``table_dtype`` would drop imaginary parts
      or the table does not fit into the memory of the device; and by
      ``update``: if ``batch_index`` is not given (also when a wrapper has
      dropped it), known to be out of range, or not a scalar, if the state was
      made with other arguments than this transformation, if updates or
      parameters do not match the state in structure, shape or kind of dtype, if
      ``axis_name`` is no enclosing axis or the gradients have already been
      summed over it.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    >>> y = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> loss = lambda w, i: 0.5 * jnp.mean((x[i] @ w - y[i]) ** 2)
    >>> batches = jnp.array([[0, 1], [2, 3]])
    >>> tx = optax.chain(optax_svrg.alpha_saga(1.0, len(batches)),
    ...                  optax.sgd(0.1))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, i):
    ...   grads = jax.grad(loss)(params, batches[i])
    ...   updates, state = tx.update(grads, state, params, batch_index=i)
    ...   return optax.apply_updates(params, updates), state
    >>> for i in range(len(batches)):  # Optional: fills the table.
    ...   _, state = step(params, state, i)
    >>> for epoch in range(50):
    ...   for i in jax.random.permutation(jax.random.key(epoch), len(batches)):
    ...     params, state = step(params, state, i)
    >>> print(f"{loss(params, jnp.arange(4)):.4f}")
    0.0486

  References:
    Defazio et al., `SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014

    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025, for the coefficient.

  .. seealso:: :func:`optax_svrg.adaptive_saga`, :func:`optax_svrg.alpha_svrg`
  """
  rule = _control_variate.Given(alpha)
  return _saga(rule, num_batches, table_dtype, axis_name, shard_axis_name)


def adaptive_saga(
  num_batches: int,
  *,
  decay: float = 0.97,
  max_alpha: float = 1.0,
  table_dtype: Any = None,
  axis_name: Any = None,
  shard_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SAGA over mini-batches whose coefficient is estimated from step to step.

  The same estimator as :func:`optax_svrg.alpha_saga`, with the same arguments
  of ``update``. The coefficient is the one of least variance, estimated as that
  of :func:`optax_svrg.adaptive_svrg`, with the stored gradient :math:`s_i` for
  the snapshot's and the mean :math:`\bar s` of the table for the mean gradient:

  .. math::

    \hat\alpha = \operatorname{clip}\left(
    \frac{\operatorname{EMA}\langle g_i - \bar s, s_i - \bar s\rangle}
    {\max\left(\operatorname{EMA}\lVert s_i - \bar s\rVert^2,
    \operatorname{EMA}\lVert g_i - \bar s\rVert^2\right)},
    0, \alpha_{\max}\right)

  over the steps before this one, so that the corrected gradient stays unbiased.
  It starts at 0 and rises as the learning rate falls and entries age less. It
  falls where augmentation or dropout make a batch differ from itself.

  The second term of the maximum, which is derived from the averages that are
  there, is a guard. Gradients that grow from visit to visit are a sign of steps
  that are too large, and then the entries are an echo of old oscillations.
  Visit the batches in a random order: in one that repeats, entries all have the
  same age, and such echoes pass for variance between batches.

  This takes one gradient per step, as the plain optimizer does, and memory for
  the table, see :func:`alpha_saga`. It gains most with small batches and noisy
  gradients, and may lose with few large batches, see ``benchmarks/README.md``.

  Args:
    num_batches: see :func:`optax_svrg.alpha_saga`.
    decay: of the two averages, in [0, 1).
    max_alpha: positive upper bound of the coefficient.
    table_dtype: see :func:`optax_svrg.alpha_saga`.
    axis_name: see :func:`optax_svrg.alpha_saga`. The estimate is made of the
      averaged gradients, and needs no further reduction.
    shard_axis_name: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` as that of
    :func:`optax_svrg.alpha_saga`. In its :class:`SAGAState` ``alpha`` is the
    coefficient used last, and ``estimate`` holds the averages, in float32 or,
    for parameters of double precision, in float64. The coefficient is real for
    complex parameters too. ``optax.tree.get(opt_state, "variance_ratio")``
    estimates what the correction leaves of the variance of the gradient, see
    :func:`optax_svrg.adaptive_svrg` for what it assumes.

  Raises:
    TypeError: if ``decay`` or ``max_alpha`` is not a real number; otherwise as
      :func:`optax_svrg.alpha_saga`.
    ValueError: if ``decay`` is not in [0, 1), or ``max_alpha`` not positive or
      not finite; otherwise as :func:`optax_svrg.alpha_saga`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    >>> y = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> loss = lambda w, i: 0.5 * jnp.mean((x[i] @ w - y[i]) ** 2)
    >>> batches = jnp.array([[0, 1], [2, 3]])
    >>> tx = optax.chain(optax_svrg.adaptive_saga(len(batches)),
    ...                  optax.sgd(0.1))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, i):
    ...   grads = jax.grad(loss)(params, batches[i])
    ...   updates, state = tx.update(grads, state, params, batch_index=i)
    ...   return optax.apply_updates(params, updates), state
    >>> for epoch in range(50):
    ...   for i in jax.random.permutation(jax.random.key(epoch), len(batches)):
    ...     params, state = step(params, state, i)
    >>> print(f"{loss(params, jnp.arange(4)):.4f}")
    0.0486

  References:
    Defazio et al., `SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014

    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025, whose optimal coefficient this
    estimates.

  .. seealso:: :func:`optax_svrg.alpha_saga`,
    :func:`optax_svrg.adaptive_svrg`
  """
  rule = _control_variate.Estimated(decay, max_alpha, start=0, guarded=True)
  return _saga(rule, num_batches, table_dtype, axis_name, shard_axis_name)


def _saga(
  rule: _control_variate.Rule,
  num_batches: int,
  table_dtype: Any,
  axis_name: Any,
  shard_axis_name: Any,
) -> optax.GradientTransformationExtraArgs:
  """SAGA with any rule for the coefficient."""
  num_batches = _checks.check_count(num_batches, "num_batches")
  table_dtype = _checks.as_dtype(table_dtype, "table_dtype")
  shard_axes = _checks.as_axes(shard_axis_name)

  def init_fn(params: optax.Params) -> SAGAState:
    return _init(params, num_batches, table_dtype, rule)

  def update_fn(
    updates: optax.Updates,
    state: SAGAState,
    params: optax.Params | None = None,
    *,
    batch_index: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SAGAState]:
    del extra_args  # Meant for other transformations of the chain.
    _checks.check_state(state, SAGAState, rule.estimates)
    _check_trees(updates, state, params, axis_name)
    _check_table(updates, state, params, num_batches, table_dtype)
    batch_index = _check_index(batch_index, num_batches)
    updates, state = _checks.as_arrays((updates, state))
    value = rule.coefficient(state.count, state.estimate)
    if axis_name is not None:
      updates = jax.lax.pmean(updates, axis_name)
    if not rule.always_off:
      value = jnp.asarray(value, state.alpha.dtype)
      correction, state = _visit(
        updates, state, batch_index, value, sum_axes=shard_axes
      )
      updates = correction.updates
      state = state._replace(
        alpha=correction.alpha,
        estimate=rule.update(state.estimate, correction),
      )
    return updates, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Compiled for eager use, as _control_variate.correct.
@functools.partial(jax.jit, inline=True, static_argnames="sum_axes")
def _visit(
  updates: optax.Updates,
  state: SAGAState,
  batch_index: Any,
  coefficient: jax.Array,
  *,
  sum_axes: Any,
) -> tuple[_control_variate.Correction, SAGAState]:
  """Corrects a gradient by the entry of its batch, whose place it takes."""
  entry = _read(state, batch_index)
  active = entry.is_known & entry.has_grads
  correction = _control_variate.correct(
    updates,
    entry.grads,
    entry.mean,
    jnp.where(active, coefficient, 0),
    active,
    state.estimate,
    sum_axes=sum_axes,
  )
  return correction, _write(state, entry, updates)


class _Entry(NamedTuple):
  """What the table holds for a batch.

  Attributes:
    position: index in the table.
    is_known: whether the index is within the table.
    has_grads: whether there is a gradient at the position.
    grads: the stored gradient.
    mean: mean of the entries that are filled.
  """

  position: jax.Array
  is_known: jax.Array
  has_grads: jax.Array
  grads: optax.Updates
  mean: optax.Updates


def _read(state: SAGAState, batch_index: Any) -> _Entry:
  num_batches = state.is_filled.shape[0]
  index = _checks.wide_index(batch_index)
  # A traced index out of range stands for no entry.
  is_known = (index >= 0) & (index < num_batches)
  position = jnp.where(is_known, index, 0)
  has_grads = jax.lax.dynamic_index_in_dim(
    state.is_filled, position, 0, keepdims=False
  )

  def read() -> optax.Updates:
    # Of a table in the memory of the host, the entry alone is moved.
    return _sharding.to_device(_table.read(state.table, num_batches, position))

  def in_branch() -> optax.Updates:
    # XLA for CPU would fuse the reading with what uses the entry, do that after
    # the entry is overwritten, and copy the table for it (TestInPlace). XLA for
    # TPU would copy the table into the layout that a branch has.
    mean = _sharding.to_device(state.mean_grads)
    empty = lambda: jax.tree.map(
      lambda t, m: jnp.zeros_like(m, t.dtype), state.table, mean
    )
    return jax.lax.cond(has_grads, read, empty)

  num_filled = jnp.maximum(state.is_filled.sum(), 1)
  return _Entry(
    position,
    is_known,
    has_grads,
    jax.lax.platform_dependent(cpu=in_branch, default=read),
    # Exactly the mean of the table once this is full.
    jax.tree.map(
      lambda m: m * (num_batches / num_filled).astype(m.dtype),
      _sharding.to_device(state.mean_grads),
    ),
  )


def _write(state: SAGAState, entry: _Entry, grads: optax.Updates) -> SAGAState:
  """Stores a gradient, and moves the mean by what that changes."""
  num_batches = state.is_filled.shape[0]

  def stored(old: jax.Array, g: jax.Array) -> jax.Array:
    new = g.astype(old.dtype)
    # Whatever is stored leaves the estimator unbiased, but it must be a number.
    return jnp.where(entry.is_known & jnp.isfinite(new), new, old)

  new = jax.tree.map(stored, entry.grads, grads)
  means, errors = [], []
  for mean, error, before, after in zip(
    *map(
      jax.tree.leaves,
      (
        *_sharding.to_device((state.mean_grads, state.mean_error)),
        entry.grads,
        new,
      ),
    ),
    strict=True,
  ):
    pair = _compensated.replace(mean, error, before, after, num_batches)
    means.append(pair[0])
    errors.append(pair[1])
  like_mean = functools.partial(
    jax.tree.unflatten, jax.tree.structure(state.mean_grads)
  )
  return state._replace(
    is_filled=jax.lax.dynamic_update_index_in_dim(
      state.is_filled, entry.has_grads | entry.is_known, entry.position, 0
    ),
    table=_table.write(
      state.table,
      _sharding.to_memory_of(state.table, new),
      num_batches,
      entry.position,
    ),
    mean_grads=_sharding.to_memory_of(state.mean_grads, like_mean(means)),
    mean_error=_sharding.to_memory_of(state.mean_error, like_mean(errors)),
  )


def _init(
  params: optax.Params,
  num_batches: int,
  table_dtype: Any,
  rule: _control_variate.Rule,
) -> SAGAState:
  _checks.check_inexact(params, "params")
  _checks.check_dtype_fits(params, table_dtype, "table_dtype")
  # First, as it may not fit.
  table = _sharding.table(params, num_batches, table_dtype)

  def zeros(p: Any) -> Any:
    return jnp.zeros_like(p, _checks.wide_dtype(_checks.dtype_of(p)))

  return SAGAState(
    count=jnp.zeros([], jnp.int32),
    alpha=jnp.zeros([], float),
    is_filled=jnp.zeros(num_batches, bool),
    table=table,
    mean_grads=jax.tree.map(zeros, params),
    mean_error=jax.tree.map(zeros, params),
    estimate=rule.init(params),
  )


def _check_trees(
  updates: optax.Updates,
  state: SAGAState,
  params: optax.Params | None,
  axis_name: Any,
) -> None:
  """Checks what update is given against the state."""
  mean = state.mean_grads
  _checks.check_same_tree(updates, mean, "updates", "the table's entries")
  if params is not None:
    _checks.check_same_tree(params, mean, "params", "the table's entries")
  if axis_name is not None:
    _checks.check_varying(updates, axis_name, "updates")


def _check_table(
  updates: optax.Updates,
  state: SAGAState,
  params: optax.Params | None,
  num_batches: int,
  table_dtype: Any,
) -> None:
  """Checks the table of a state, which may come from a checkpoint."""
  axes = _table.axes_of(num_batches)
  (num_filled,) = state.is_filled.shape
  shapes = {t.shape[: len(axes)] for t in jax.tree.leaves(state.table)}
  if num_filled != num_batches or shapes - {axes}:
    raise ValueError(
      f"state holds a table of {num_filled} batches in {shapes}, but"
      f" num_batches is {num_batches}, for which it is {axes}. Entries that are"
      " never visited would stay in the mean: make the state with the init of"
      " this transformation."
    )
  _checks.check_leaf_dtypes(
    state.table,
    updates if params is None else params,
    table_dtype,
    "the table of state",
    "table_dtype",
  )


def _check_index(batch_index: Any, num_batches: int) -> Any:
  """Returns ``batch_index``; raises unless it can be one, if that is known."""
  if batch_index is None:
    raise ValueError(
      "SAGA needs the extra argument batch_index, which says which of the"
      f" {num_batches} fixed batches this gradient is of. Call update(grads,"
      f" state, params, batch_index=i).{_checks.DROPPED_HINT}"
    )
  _checks.check_index(batch_index, "batch_index")
  if not isinstance(batch_index, jax.core.Tracer):
    index = int(batch_index)
    if not 0 <= index < num_batches:
      raise ValueError(
        f"batch_index must be in [0, {num_batches}), the batches that"
        f" num_batches={num_batches} gave to the table, got {index}."
      )
  return batch_index
