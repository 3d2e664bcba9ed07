# SPDX-License-Identifier: Apache-2.0
"""SAGA over mini-batches, with a given or an estimated coefficient."""

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
  """State of :func:`optax_svrg.alpha_saga` and :func:`adaptive_saga`.

  Attributes:
    count: number of updates made, the argument of a schedule.
    alpha: coefficient applied by the last update, for logging: 0 where the
      gradient passed unchanged.
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
  memory_kind: str | None = None,
  axis_name: Any = None,
  shard_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SAGA over mini-batches: variance reduction without a second gradient.

  The data set is divided into fixed batches, which are visited in random order.
  A table keeps the last gradient :math:`s_i` of each batch :math:`i` and their
  mean :math:`\bar s`. The gradient :math:`g_i` of a batch is replaced by

  .. math::

    g_i - \alpha \left(s_i - \bar s\right),

  and then stored in place of :math:`s_i`. For a uniformly drawn batch the
  correction has mean zero, so the result is unbiased for every :math:`\alpha`.
  :math:`\alpha = 1` is SAGA, for convex problems; for neural networks, whose
  gradients change within an epoch, see :func:`adaptive_saga`.

  **Donate the state** (``jax.jit(step, donate_argnums=...)``) or carry it in
  :func:`jax.lax.scan`: the table is then updated in place. Otherwise every step
  copies it, which can take many times as long as the step itself. The table
  takes ``num_batches`` times the memory of the parameters, and its mean two
  copies more.

  A batch without a stored gradient is not corrected, and :math:`\bar s` is the
  mean over the stored ones; in the first epoch without replacement nothing is
  corrected. To start with a full table, make one pass at the initial
  parameters, as in the example. Put the transformation first in
  :func:`optax.chain`, before every other nonlinear one.

  Args:
    alpha: see :func:`optax_svrg.alpha_svrg`. While it is 0 the table is still
      filled, except for the Python number 0.
    num_batches: number of fixed batches, at least 1.
    table_dtype: dtype of the table, ``None`` for the parameters'. The mean is
      that of the rounded entries, so the result is still unbiased.
    memory_kind: kind of memory of the table, ``None`` for the parameters'. With
      ``"pinned_host"`` it is in the memory of the host, and each step moves one
      gradient to the device and one back. Give a jitted step that donates the
      state its ``out_shardings``.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap` over which to
      average. The updates must then be device-local (see
      :func:`optax_svrg.device_local`); the table holds averages. With ``None``,
      the updates must already be averages.
    shard_axis_name: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``init`` takes
    parameters with float or complex leaves (or :class:`jax.ShapeDtypeStruct`)
    and returns a :class:`SAGAState`. Its ``update`` needs the extra argument
    ``batch_index``, an integer in [0, ``num_batches``): the fixed batch whose
    gradient this is. If a traced index is out of range or the corrected
    gradient is not finite, the gradient passes unchanged. Components that are
    not finite in ``table_dtype`` are not stored.

    Updates keep their structure, shapes and dtypes. Arithmetic is in float32
    for narrower dtypes, and the mean of the table is compensated for rounding.

  Raises:
    TypeError: if an argument, a parameter (``init``) or ``batch_index``
      (``update``) has the wrong type or dtype.
    ValueError: if ``alpha`` is not a finite scalar, or ``num_batches`` less
      than 1; from ``init``, if ``table_dtype`` would drop imaginary parts or
      the table does not fit into the device's memory; from ``update``, if
      ``batch_index`` is missing or known to be out of range, if updates,
      parameters or the state do not match this transformation, or if
      ``axis_name`` is not an enclosing axis or the gradients have already been
      summed over it.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    >>> y = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> loss = lambda w, i: 0.5 * jnp.mean((x[i] @ w - y[i]) ** 2)
    >>> batches = jnp.array([[0, 1], [2, 3]])
    >>> saga = optax_svrg.alpha_saga(1.0, len(batches))
    >>> w = jnp.zeros(2)
    >>> state = saga.init(w)
    >>> for i in range(len(batches)):  # Optional: fills the table.
    ...   _, state = saga.update(
    ...       jax.grad(loss)(w, batches[i]), state, batch_index=i)
    >>> def step(carry, i):
    ...   w, state = carry
    ...   updates, state = saga.update(
    ...       jax.grad(loss)(w, batches[i]), state, batch_index=i)
    ...   return (w - 0.1 * updates, state), None
    >>> order = jax.random.randint(jax.random.key(0), (100,), 0, len(batches))
    >>> (w, state), _ = jax.lax.scan(step, (w, state), order)
    >>> print(f"{loss(w, jnp.arange(4)):.4f}")
    0.0486

  References:
    Defazio et al., `SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014
  """
  rule = _control_variate.Given(alpha)
  table = _Table(num_batches, table_dtype, memory_kind)
  return _saga(rule, table, axis_name, shard_axis_name)


def adaptive_saga(
  num_batches: int,
  *,
  decay: float = 0.97,
  max_alpha: float = 1.0,
  table_dtype: Any = None,
  memory_kind: str | None = None,
  axis_name: Any = None,
  shard_axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SAGA over mini-batches with a coefficient estimated during training.

  The estimator of :func:`optax_svrg.alpha_saga`, with the same argument of
  ``update``, for neural networks: one gradient per step, as for the plain
  optimizer, and memory for the table. The coefficient of least variance is
  estimated over the steps before this one, so the result stays unbiased:

  .. math::

    \hat\alpha = \operatorname{clip}\left(
    \frac{\operatorname{EMA}\langle g_i - \bar s, s_i - \bar s\rangle}
    {\max\left(\operatorname{EMA}\lVert s_i - \bar s\rVert^2,
    \operatorname{EMA}\lVert g_i - \bar s\rVert^2\right)},
    0, \alpha_{\max}\right)

  It starts at 0 and rises as the learning rate decreases. The second term of
  the maximum guards against gradients that grow from visit to visit, a sign of
  steps that are too large. Visit the batches in a new random order each epoch:
  a fixed order loses the gain. Augmentation and dropout may differ from visit
  to visit, but reduce the gain.

  **Donate the state** (``jax.jit(step, donate_argnums=...)``) or carry it in
  :func:`jax.lax.scan`: otherwise every step copies the table, which can take
  many times as long as the step itself.

  Args:
    num_batches: see :func:`optax_svrg.alpha_saga`.
    decay: decay rate of the two averages, in [0, 1).
    max_alpha: positive upper bound of the coefficient.
    table_dtype: see :func:`optax_svrg.alpha_saga`.
    memory_kind: see :func:`optax_svrg.alpha_saga`.
    axis_name: see :func:`optax_svrg.alpha_saga`.
    shard_axis_name: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` like that of
    :func:`optax_svrg.alpha_saga`, whose :class:`SAGAState` holds the averages
    in ``estimate``. The coefficient is real for complex parameters too.

  Raises:
    TypeError: if ``decay`` or ``max_alpha`` is not a real number; otherwise as
      :func:`optax_svrg.alpha_saga`.
    ValueError: if ``decay`` is not in [0, 1), or ``max_alpha`` not positive and
      finite; otherwise as :func:`optax_svrg.alpha_saga`.

  Examples:
    >>> import functools, jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jax.random.normal(jax.random.key(0), (8, 16, 3))
    >>> y = jnp.sin(x).sum(axis=-1)
    >>> loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)
    >>> tx = optax.chain(optax_svrg.adaptive_saga(len(x)), optax.adam(0.1))
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
    ... def step(params, state, x, y, i):
    ...   grads = jax.grad(loss)(params, x, y)
    ...   updates, state = tx.update(grads, state, params, batch_index=i)
    ...   return optax.apply_updates(params, updates), state
    >>> for epoch in range(10):
    ...   for i in jax.random.permutation(jax.random.key(epoch), len(x)):
    ...     params, state = step(params, state, x[i], y[i], i)
    >>> bool(optax.tree.get(state, "alpha") > 0.5)
    True

  References:
    Defazio et al., `SAGA <https://arxiv.org/abs/1407.0202>`_, 2014; Yin et al.,
    `A Coefficient Makes SVRG Effective <https://arxiv.org/abs/2311.05589>`_,
    2025, for the coefficient of least variance.
  """
  rule = _control_variate.Estimated(decay, max_alpha, start=0, guarded=True)
  table = _Table(num_batches, table_dtype, memory_kind)
  return _saga(rule, table, axis_name, shard_axis_name)


class _Table(NamedTuple):
  """Arguments that describe the table, as the user gives them."""

  num_batches: Any
  dtype: Any
  memory_kind: Any

  def checked(self) -> "_Table":
    """Returns them in canonical form; raises if one is wrong."""
    if not isinstance(self.memory_kind, str | None):
      raise TypeError(f"memory_kind must be a str, got {self.memory_kind!r}.")
    return _Table(
      _checks.check_count(self.num_batches, "num_batches"),
      _checks.as_dtype(self.dtype, "table_dtype"),
      self.memory_kind,
    )


def _saga(
  rule: _control_variate.Rule,
  table: _Table,
  axis_name: Any,
  shard_axis_name: Any,
) -> optax.GradientTransformationExtraArgs:
  """SAGA with any rule for the coefficient."""
  table = table.checked()
  shard_axes = _checks.as_axes(shard_axis_name)

  def init_fn(params: optax.Params) -> SAGAState:
    return _init(params, table, rule)

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
    _check_table(updates, state, params, table)
    batch_index = _check_index(batch_index, table.num_batches)
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
  """Corrects a gradient by the stored one of its batch, and replaces that."""
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
  """Entry of the table for one batch.

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
  """Stores a gradient, and updates the mean by the difference."""
  num_batches = state.is_filled.shape[0]

  def stored(old: jax.Array, g: jax.Array) -> jax.Array:
    new = g.astype(old.dtype)
    # Whatever is stored leaves the estimator unbiased, but it must be a number.
    return jnp.where(entry.is_known & jnp.isfinite(new), new, old)

  new = jax.tree.map(stored, entry.grads, grads)
  # XLA for CPU would keep what the mean and its error have in common in memory,
  # unless it takes them for different computations (JAX 0.10 and 0.12:
  # TestInPlace.test_temporary_arrays).
  other_count = jax.lax.platform_dependent(
    entry.position,
    cpu=lambda position: jnp.where(position >= 0, jnp.int32(num_batches), 0),
    default=lambda position: jnp.full_like(position, num_batches, jnp.int32),
  )
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
    args = mean, error, before, after
    means.append(_compensated.replace(*args, num_batches)[0])
    errors.append(_compensated.replace(*args, other_count)[1])
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
  params: optax.Params, table: _Table, rule: _control_variate.Rule
) -> SAGAState:
  _checks.check_inexact(params, "params")
  _checks.check_dtype_fits(params, table.dtype, "table_dtype")
  # First, as it may not fit.
  entries = _sharding.table(params, *table)

  def zeros(p: Any) -> Any:
    return jnp.zeros_like(p, _checks.wide_dtype(_checks.dtype_of(p)))

  return SAGAState(
    count=jnp.zeros([], jnp.int32),
    alpha=jnp.zeros([], float),
    is_filled=jnp.zeros(table.num_batches, bool),
    table=entries,
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
  """Checks the arguments of update against the state."""
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
  table: _Table,
) -> None:
  """Checks the table of a state, which may come from a checkpoint."""
  num_batches = table.num_batches
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
    table.dtype,
    "the table of state",
    "table_dtype",
  )


def _check_index(batch_index: Any, num_batches: int) -> Any:
  """Returns ``batch_index``; raises if it is known to be invalid."""
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
