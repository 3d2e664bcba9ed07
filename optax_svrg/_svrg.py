# SPDX-License-Identifier: Apache-2.0
"""alpha-SVRG (Yin et al., 2025), with a given or an estimated coefficient."""

from collections.abc import Callable
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import optax

from optax_svrg import (
  _checks,
  _compat,
  _control_variate,
  _sharding,
  _snapshot,
)

_MASKED_HINT = (
  "the snapshot holds optax.MaskedNode placeholders: alpha_svrg is wrapped in"
  " optax.masked or optax.partition and sees only part of the parameters,"
  " while grad_fn needs all of them. Write optax.chain(alpha_svrg(...),"
  " optax.masked(...)) or optax.chain(alpha_svrg(...), optax.partition(...))"
  " instead."
)
# What an error of a function says that is given an array of another shape.
_WORDS_OF_SHAPE = ("shape", "dimension", "rank", "axis", "axes", "index")


def alpha_svrg(
  alpha: optax.ScalarOrSchedule,
  *,
  axis_name: Any = None,
  shard_axis_name: Any = None,
  snapshot_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Stochastic variance reduced gradient with a coefficient (alpha-SVRG).

  Replaces the gradient :math:`\nabla f_B(\theta)` of a mini-batch :math:`B` by

  .. math::

    \nabla f_B(\theta) - \alpha \left(\nabla f_B(\theta_{\text{snapshot}})
    - \nabla f(\theta_{\text{snapshot}})\right)

  where :func:`optax_svrg.take_snapshot` stores a copy of the parameters,
  :math:`\theta_{\text{snapshot}}`, and the mean gradient over the data set
  there. The correction has mean zero, so the result is unbiased for every
  :math:`\alpha`. :math:`\alpha = 1` is SVRG; the paper decays it linearly from
  0.5 or 0.75 to 0, see :func:`optax_svrg.linear_decay`.

  Put it first in :func:`optax.chain`, before clipping, noise, gradient
  accumulation and every other nonlinear transformation, followed by any
  optimizer. The gradient passes unchanged, with ``alpha`` 0 in the state, until
  the first snapshot (eager updates warn once), after a snapshot whose mean
  gradient is not finite, and in steps whose corrected gradient would not be
  finite.

  Args:
    alpha: the coefficient: a finite real number, a scalar array, or a schedule
      of the number of updates made so far. While it is 0 the gradient passes
      unchanged, bit for bit, and ``grad_fn`` is not evaluated.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap` over which to
      average. The updates and ``grad_fn`` must then be device-local (see
      :func:`optax_svrg.device_local`), and the corrected gradient is averaged
      in one reduction. With ``None``, both must already be averages.
    shard_axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map` over which the parameters are sharded by hand
      (FSDP). Inner products are summed over it, so that all shards share one
      coefficient and fall back together. Not needed for sharded arrays under
      :func:`jax.jit`.
    snapshot_dtype: dtype of the stored snapshot, ``None`` for the parameters'.
      Both gradients of the correction are taken at the rounded snapshot, so the
      result is still unbiased.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``init`` takes
    parameters with float or complex leaves (or :class:`jax.ShapeDtypeStruct`)
    and returns an :class:`SVRGState`. Its ``update`` needs exactly one of two
    extra arguments:

    * ``grad_fn``: a function from parameters to the gradient of the same
      mini-batch, with the same augmentation and dropout mask; or
    * ``snapshot_grads``: that gradient at the stored snapshot.

    Updates keep their structure, shapes and dtypes. Arithmetic and the mean
    gradient are in float32 for narrower dtypes.

  Raises:
    TypeError: if an argument, a parameter (``init``) or ``grad_fn``
      (``update``) has the wrong type or dtype.
    ValueError: if ``alpha`` is not a finite scalar, or ``snapshot_dtype`` would
      drop imaginary parts (``init``); from ``update``, if neither or both extra
      arguments are given, if updates, parameters, gradients or the state do not
      match this transformation, if a wrapper has masked or flattened the
      snapshot, or if ``axis_name`` is not an enclosing axis or the gradients
      have already been summed over it.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    >>> y = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> loss = lambda w, i: 0.5 * jnp.mean((x[i] @ w - y[i]) ** 2)
    >>> grad = jax.grad(loss)
    >>> batches = [jnp.array([0, 1]), jnp.array([2, 3])]
    >>> tx = optax.chain(optax_svrg.alpha_svrg(1.0), optax.sgd(0.1))
    >>> params = jnp.zeros(2)
    >>> state = tx.init(params)
    >>> @jax.jit
    ... def step(params, state, batch):
    ...   grad_fn = lambda p: grad(p, batch)
    ...   updates, state = tx.update(
    ...       grad_fn(params), state, params, grad_fn=grad_fn)
    ...   return optax.apply_updates(params, updates), state
    >>> for epoch in range(50):
    ...   state = optax_svrg.take_snapshot(
    ...       state, params,
    ...       lambda p: optax_svrg.mean_gradient(grad, p, batches))
    ...   for batch in batches:
    ...     params, state = step(params, state, batch)
    >>> print(f"{loss(params, jnp.arange(4)):.4f}")
    0.0486

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025; Johnson and Zhang, `Accelerating
    Stochastic Gradient Descent using Predictive Variance Reduction
    <https://papers.nips.cc/paper/4937>`_, 2013

  .. warning::
    Under :func:`jax.vmap`, which turns branches into selections, and on CPU for
    gradients with convolutions, ``grad_fn`` is evaluated in every step.
  """
  return _svrg(
    _control_variate.Given(alpha), axis_name, shard_axis_name, snapshot_dtype
  )


def adaptive_svrg(
  *,
  decay: float = 0.97,
  max_alpha: float = 1.0,
  axis_name: Any = None,
  shard_axis_name: Any = None,
  snapshot_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SVRG with a coefficient that is estimated during training.

  The estimator of :func:`optax_svrg.alpha_svrg`, with the same arguments of
  ``update``, but the coefficient of least variance,

  .. math::

    \alpha^* = \frac{\operatorname{Cov}(g, s)}{\operatorname{Var}(s)}
    \qquad \text{for } g = \nabla f_B(\theta),
    \; s = \nabla f_B(\theta_{\text{snapshot}}),

  is estimated from two inner products per step, with
  :math:`\mu = \nabla f(\theta_{\text{snapshot}})`:

  .. math::

    \hat\alpha = \operatorname{clip}\left(
    \frac{\operatorname{EMA}\langle g - \mu, s - \mu\rangle}
    {\operatorname{EMA}\lVert s - \mu\rVert^2},
    0, \alpha_{\max}\right)

  The averages run over the steps before this one, so the result stays unbiased.
  A snapshot resets them: the next coefficient is 1, or ``max_alpha`` if that is
  less. Steps whose gradient is not finite, or without variance at the snapshot,
  leave them unchanged. The estimate tends to be too small with large batches
  and large steps.

  If the mean gradient of the snapshot is taken over a sample of the batches, a
  share :math:`q`, give ``max_alpha=q``: with more, training can end worse than
  without any correction. The documentation derives this, and what
  ``variance_ratio`` of :func:`optax_svrg.summary` estimates.

  Args:
    decay: decay rate of the two averages, in [0, 1).
    max_alpha: positive upper bound of the coefficient.
    axis_name: see :func:`optax_svrg.alpha_svrg`; the reduction includes two
      more scalars.
    shard_axis_name: see :func:`optax_svrg.alpha_svrg`.
    snapshot_dtype: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` like that of
    :func:`optax_svrg.alpha_svrg`, whose :class:`SVRGState` holds the averages
    in ``estimate``. The coefficient is real for complex parameters too.

  Raises:
    TypeError: if ``decay`` or ``max_alpha`` is not a real number; otherwise as
      :func:`optax_svrg.alpha_svrg`.
    ValueError: if ``decay`` is not in [0, 1), or ``max_alpha`` not positive and
      finite; otherwise as :func:`optax_svrg.alpha_svrg`.

  Examples:
    The coefficient falls as the parameters move away from the snapshot:

    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> batches = jax.random.normal(jax.random.key(0), (8, 4, 3))
    >>> grad = jax.grad(lambda w, x: jnp.mean(jnp.cosh(x @ w - 1)))
    >>> tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.2))
    >>> params = jnp.zeros(3)
    >>> state = optax_svrg.take_snapshot(
    ...     tx.init(params), params,
    ...     lambda p: optax_svrg.mean_gradient(grad, p, batches))
    >>> for batch in batches:
    ...   grad_fn = lambda p: grad(p, batch)
    ...   updates, state = tx.update(
    ...       grad_fn(params), state, params, grad_fn=grad_fn)
    ...   params = optax.apply_updates(params, updates)
    >>> print(f"{optax_svrg.summary(state)['alpha']:.1f}")
    0.8

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025; Owen, `Monte Carlo theory,
    methods and examples <https://artowen.su.domains/mc/>`_, 2013, chapter 8.9
    (regression estimate of a control variate's coefficient)
  """
  rule = _control_variate.Estimated(decay, max_alpha, start=1, guarded=False)
  return _svrg(rule, axis_name, shard_axis_name, snapshot_dtype)


def _svrg(
  rule: _control_variate.Rule,
  axis_name: Any,
  shard_axis_name: Any,
  snapshot_dtype: Any,
) -> optax.GradientTransformationExtraArgs:
  """SVRG with any rule for the coefficient."""
  snapshot_dtype = _checks.as_dtype(snapshot_dtype, "snapshot_dtype")
  shard_axes = _checks.as_axes(shard_axis_name)
  once = _Once()

  def init_fn(params: optax.Params) -> _snapshot.SVRGState:
    return _snapshot.init(params, snapshot_dtype, rule)

  def update_fn(
    updates: optax.Updates,
    state: _snapshot.SVRGState,
    params: optax.Params | None = None,
    *,
    grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
    snapshot_grads: optax.Updates | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, _snapshot.SVRGState]:
    del extra_args  # Meant for other transformations of the chain.
    _checks.check_state(state, _snapshot.SVRGState, rule.estimates)
    _check_trees(updates, state, params, snapshot_dtype, axis_name)
    _check_second(updates, state, grad_fn, snapshot_grads, axis_name)
    updates, state = _checks.as_arrays((updates, state))

    available = _control_variate.everywhere(
      [_snapshot.has_mean(state)], shard_axes
    )
    value = rule.coefficient(state.count, state.estimate)
    coefficient = jnp.where(available, jnp.asarray(value, state.alpha.dtype), 0)
    # An estimate needs the second gradient even where the coefficient is 0.
    needed: Any = available if rule.estimates else coefficient != 0
    needed = False if rule.always_off else _control_variate.eagerly(needed)

    def correct(grads: optax.Updates) -> _control_variate.Correction:
      return _control_variate.correct(
        updates,
        jax.tree.map(lambda s, g: jnp.asarray(s, g.dtype), grads, updates),
        _sharding.to_device(state.mean_grads),
        coefficient,
        available,
        state.estimate,
        sum_axes=shard_axes,
        fixed_unit=axis_name is not None,
      )

    def second_gradient() -> optax.Updates:
      snapshot = _for_grad_fn(state, params, updates, snapshot_dtype)
      return _second_gradient(grad_fn, snapshot, updates, axis_name)

    def skip() -> _control_variate.Correction:
      return _control_variate.no_correction(
        updates,
        coefficient,
        state.estimate,
        sum_axes=shard_axes,
        fixed_unit=axis_name is not None,
      )

    if needed is False:
      alpha = jnp.zeros_like(coefficient)
      correction = _control_variate.Correction(updates, alpha, None)
      if not rule.always_off and not state.num_snapshots:
        once.before_the_first_snapshot(value, grad_fn and second_gradient)
    elif grad_fn is None:
      correction = correct(snapshot_grads)
    elif needed is True:
      correction = correct(second_gradient())
    else:
      gradient = _compat.outside_of_branches(second_gradient)
      # As a whole, so that nothing is read while it is not needed.
      correction = jax.lax.cond(needed, lambda: correct(gradient()), skip)
    if axis_name is not None:
      correction = _average(
        correction, coefficient, state, axis_name, shard_axes
      )
    return correction.updates, state._replace(
      count=optax.safe_increment(state.count),
      alpha=correction.alpha,
      estimate=rule.update(state.estimate, correction),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Once:
  """Checks and warnings that a transformation makes once, when eager."""

  def __init__(self) -> None:
    self._checked = False
    self._warned = False

  def before_the_first_snapshot(
    self, coefficient: Any, evaluate: Callable[[], Any] | None
  ) -> None:
    """Warns that nothing is corrected, and refuses a wrong ``grad_fn``.

    Args:
      coefficient: coefficient that would be applied after a snapshot.
      evaluate: computes the gradient at the snapshot by ``grad_fn``; ``None``
        without one.
    """
    if evaluate is not None and not self._checked:
      self._checked = True
      try:
        jax.eval_shape(evaluate)
      except jax.errors.JAXTypeError:
        pass  # It needs values, e.g. for NumPy, and is checked by its results.
    if not self._warned and coefficient != 0:
      self._warned = True
      warnings.warn(
        "no snapshot has been taken yet, so gradients pass uncorrected. Before"
        " the steps, write opt_state = optax_svrg.take_snapshot(opt_state,"
        " params, mean_grad_fn).",
        stacklevel=4,
      )


def _average(
  correction: _control_variate.Correction,
  coefficient: jax.Array,
  state: _snapshot.SVRGState,
  axis_name: Any,
  shard_axes: Any,
) -> _control_variate.Correction:
  """Averages the corrections of all devices in one reduction."""
  updates, _, seen = correction
  if seen is None:
    updates = jax.lax.pmean(updates, axis_name)
    return _control_variate.Correction(updates, coefficient, None)
  products = seen.covariance, seen.variance
  updates, products = jax.lax.pmean((updates, products), axis_name)
  seen = _control_variate.averaged(
    # The unit is the same on all devices: that of the state.
    seen._replace(covariance=products[0], variance=products[1]),
    updates,
    _sharding.to_device(state.mean_grads),
    jax.lax.axis_size(axis_name),
    shard_axes,
  )
  return _control_variate.Correction(updates, coefficient, seen)


def _for_grad_fn(
  state: _snapshot.SVRGState,
  params: optax.Params | None,
  updates: optax.Updates,
  snapshot_dtype: Any,
) -> optax.Params:
  """The snapshot on the device, in the dtypes of the parameters."""
  snapshot = _sharding.to_device(state.snapshot_params)
  if snapshot_dtype is None:
    return snapshot
  like = updates if params is None else params
  return jax.tree.map(
    lambda s, p: s.astype(_checks.dtype_of(p)), snapshot, like
  )


def _second_gradient(
  grad_fn: Any,
  snapshot: optax.Params,
  updates: optax.Updates,
  axis_name: Any,
) -> optax.Updates:
  """Evaluates ``grad_fn`` at the snapshot."""
  try:
    grads = grad_fn(snapshot)
    _check_gradient(grads, updates, axis_name, "the result of grad_fn")
  except Exception as e:
    if hint := _hint(e, snapshot):
      raise ValueError(f"grad_fn failed at the snapshot: {e!r}.{hint}") from e
    raise
  return grads


def _hint(error: Exception, snapshot: optax.Params) -> str:
  """Says how the form of the snapshot may explain an error of ``grad_fn``."""
  about_shapes = isinstance(error, (TypeError, ValueError, IndexError)) and any(
    word in str(error).lower() for word in _WORDS_OF_SHAPE
  )
  if _snapshot.is_flat(snapshot) and about_shapes:
    return _snapshot.FLAT_HINT
  nodes = jax.tree.leaves(snapshot, is_leaf=lambda x: x is None)
  if any(x is None for x in nodes):
    return (
      " The snapshot holds None where the parameters do. With Equinox, write"
      " params, static = eqx.partition(model, eqx.is_inexact_array) and grad_fn"
      " = lambda p: eqx.filter_grad(lambda q: loss(eqx.combine(q, static),"
      " batch))(p)."
    )
  return ""


def _check_trees(
  updates: optax.Updates,
  state: _snapshot.SVRGState,
  params: optax.Params | None,
  snapshot_dtype: Any,
  axis_name: Any,
) -> None:
  """Checks the arguments of update against the state."""
  snapshot = state.snapshot_params
  _checks.check_same_tree(updates, snapshot, "updates", "the stored snapshot")
  if params is not None:
    _checks.check_same_tree(params, snapshot, "params", "the stored snapshot")
  _checks.check_leaf_dtypes(
    snapshot,
    updates if params is None else params,
    snapshot_dtype,
    "the stored snapshot",
    "snapshot_dtype",
  )
  if axis_name is not None:
    _checks.check_varying(updates, axis_name, "updates")


def _check_second(
  updates: optax.Updates,
  state: _snapshot.SVRGState,
  grad_fn: Any,
  snapshot_grads: Any,
  axis_name: Any,
) -> None:
  """Checks the extra argument, before anything is computed."""
  if (grad_fn is None) == (snapshot_grads is None):
    given = "neither" if grad_fn is None else "both"
    raise ValueError(
      "SVRG needs exactly one of the extra arguments grad_fn and"
      f" snapshot_grads, got {given}. Call update(grads, state, params,"
      f" grad_fn=lambda p: jax.grad(loss)(p, batch)).{_checks.DROPPED_HINT}"
    )
  is_masked = _snapshot.has_masked(state.snapshot_params)
  if grad_fn is None:
    try:
      _check_gradient(snapshot_grads, updates, axis_name, "snapshot_grads")
    except ValueError as e:
      if is_masked:
        raise ValueError(f"{e} Note that {_MASKED_HINT}") from e
      raise
  elif not callable(grad_fn):
    raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
  elif is_masked:
    raise ValueError(f"grad_fn cannot be evaluated: {_MASKED_HINT}")


def _check_gradient(
  grads: Any, updates: optax.Updates, axis_name: Any, name: str
) -> None:
  _checks.check_same_tree(grads, updates, name, "updates")
  if axis_name is not None:
    _checks.check_varying(grads, axis_name, name)
