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
"""alpha-SVRG (Yin et al., 2025), also with a coefficient estimated online."""

from collections.abc import Callable
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _control_variate, _sharding

_FLAT_HINT = (
  " The stored snapshot is a single vector. If optax.flatten made it so,"
  " write optax.chain(alpha_svrg(...), optax.flatten(...)) instead of"
  " optax.flatten(alpha_svrg(...))."
)
_MASKED_HINT = (
  "the snapshot holds optax.MaskedNode placeholders: alpha_svrg is wrapped in"
  " optax.masked or optax.partition and sees only part of the parameters,"
  " while grad_fn needs all of them. Write optax.chain(alpha_svrg(...),"
  " optax.masked(...)) or optax.chain(alpha_svrg(...), optax.partition(...))"
  " instead."
)


class SVRGState(NamedTuple):
  """State of :func:`optax_svrg.alpha_svrg` and of :func:`adaptive_svrg`.

  Attributes:
    count: number of updates made, which the schedule of the coefficient sees.
    num_snapshots: number of snapshots taken; the transformation is inert while
      it is 0.
    alpha: the coefficient used by the last update, for logging.
    snapshot_params: copy of the parameters at the last snapshot, of their
      dtypes or of ``snapshot_dtype``.
    mean_grads: mean gradient over the data set at ``snapshot_params``, of the
      parameters' dtypes.
    is_finite: whether ``mean_grads`` are finite; the transformation is inert
      while they are not.
    estimate: the averages of :func:`optax_svrg.adaptive_svrg` since the last
      snapshot, otherwise ``None``.
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
  num_snapshots: jax.Array  # shape=(), dtype=jnp.int32
  alpha: jax.Array  # shape=(), JAX's default float dtype
  snapshot_params: optax.Params
  mean_grads: optax.Updates
  is_finite: jax.Array  # shape=(), dtype=jnp.bool_
  estimate: _control_variate.CoefficientEstimate | None = None


def alpha_svrg(
  alpha: optax.ScalarOrSchedule,
  *,
  axis_name: Any = None,
  snapshot_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Stochastic variance reduced gradient with a coefficient (alpha-SVRG).

  Replaces the gradient :math:`\nabla f_B(\theta)` of a mini-batch :math:`B` by

  .. math::

    \nabla f_B(\theta) - \alpha \left(\nabla f_B(\theta_{\text{snapshot}})
    - \nabla f(\theta_{\text{snapshot}})\right)

  where :math:`\theta_{\text{snapshot}}` is a copy of the parameters taken now
  and then by :func:`optax_svrg.take_snapshot`, and
  :math:`\nabla f(\theta_{\text{snapshot}})` the mean gradient over the data set
  there. The correction has mean zero, so the result is unbiased for every
  :math:`\alpha`. :math:`\alpha = 1` is SVRG, and the paper decays it linearly
  from 0.5 or 0.75 to 0, see :func:`optax_svrg.linear_decay`.

  Put it first in :func:`optax.chain`, before clipping, noise, gradient
  accumulation and everything else that is not linear, followed by any
  optimizer. Until the first snapshot the gradient passes unchanged; so it does
  after a snapshot whose mean gradient is not finite, until the next one, and in
  a step whose gradient at the snapshot is not finite (with ``axis_name``: on
  the device that this happens on).

  Args:
    alpha: the coefficient: a finite real number, a scalar array, or a schedule,
      which is given the number of updates made so far. While it is 0, the
      gradient passes unchanged, bit for bit, and ``grad_fn`` is not evaluated;
      for the Python number 0 ``grad_fn`` is not even traced.
    axis_name: name of the axis (or tuple of names) of an enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap` over which
      gradients are to be averaged. The updates and ``grad_fn`` are then
      device-local, and the corrected gradient is averaged in one reduction.
      With ``None`` they must have been averaged before, both alike.
    snapshot_dtype: dtype of the stored snapshot, ``None`` for the parameters'.
      With :obj:`jax.numpy.bfloat16` it takes half the memory of float32
      parameters. Both gradients of the correction are taken at the rounded
      snapshot, in the parameters' dtypes, so the result is still unbiased.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs`. Its ``init`` takes
    parameters with float or complex leaves (or :class:`jax.ShapeDtypeStruct`
    in their place) and returns an :class:`SVRGState`. Its ``update`` needs
    exactly one of two extra arguments:

    * ``grad_fn``: a function from parameters to the gradient of the same
      mini-batch, with the same augmentation and dropout mask, as in
      :func:`optax.contrib.sam`; or
    * ``snapshot_grads``: that gradient at the stored snapshot, already
      computed.

    Updates keep their structure, shapes and dtypes. Sums are formed in float32
    for narrower dtypes.

  Raises:
    TypeError: if ``alpha`` is not a real number, array or schedule, if
      ``snapshot_dtype`` is not a float or complex dtype, if parameters are not
      of such a dtype (by ``init``), or if ``grad_fn`` cannot be called (by
      ``update``).
    ValueError: if ``alpha`` is not finite or not a scalar, if
      ``snapshot_dtype`` would drop imaginary parts (by ``init``), and by
      ``update``: if neither or both of ``grad_fn`` and ``snapshot_grads`` are
      given (also when a wrapper has dropped them), if updates, parameters or
      gradients do not match the state in structure, shape or kind of dtype, if
      a wrapper has masked or flattened the snapshot that ``grad_fn`` needs, if
      ``axis_name`` is no enclosing axis or the gradients have already been
      summed over it.

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
    <https://arxiv.org/abs/2311.05589>`_, 2025

    Johnson and Zhang, `Accelerating Stochastic Gradient Descent using
    Predictive Variance Reduction
    <https://proceedings.neurips.cc/paper/2013/hash/ac1dd209cbcc5e5d1c6e28598e8cbbe8-Abstract.html>`_,
    2013

  .. warning::
    ``optax.MultiSteps(optax.chain(alpha_svrg(...), ...))`` corrects with the
    last micro-batch only. Write ``optax.chain(alpha_svrg(...),
    optax.MultiSteps(...).gradient_transformation())``.

  .. seealso:: :func:`optax_svrg.adaptive_svrg`,
    :func:`optax_svrg.take_snapshot`, :func:`optax_svrg.mean_gradient`,
    :func:`optax_svrg.linear_decay`
  """
  if not callable(alpha):
    _checks.check_coefficient(alpha, "alpha")
  snapshot_dtype = _checks.as_dtype(snapshot_dtype, "snapshot_dtype")
  # A number is known now; an array may hold a traced value.
  always_off = isinstance(alpha, (int, float, np.number)) and alpha == 0

  def init_fn(params: optax.Params) -> SVRGState:
    return _init(params, snapshot_dtype)

  def update_fn(
    updates: optax.Updates,
    state: SVRGState,
    params: optax.Params | None = None,
    *,
    grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
    snapshot_grads: optax.Updates | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SVRGState]:
    del extra_args  # Meant for other transformations of the chain.
    _check_update(updates, state, params, grad_fn, snapshot_grads, axis_name)
    value = alpha(state.count) if callable(alpha) else alpha
    _checks.check_coefficient(value, "alpha")
    coefficient = jnp.where(
      _has_mean(state), jnp.asarray(value, state.alpha.dtype), 0
    )
    active = False if always_off else _control_variate.eagerly(coefficient != 0)

    if active is not False:
      mean_grads = _sharding.to_device(state.mean_grads)

      def correct(snapshot_grads: optax.Updates) -> optax.Updates:
        return _control_variate.correct(
          updates,
          snapshot_grads,
          mean_grads,
          coefficient,
          active & _control_variate.all_finite(snapshot_grads),
        )

      if grad_fn is None:
        updates = correct(snapshot_grads)
      else:
        updates = _evaluate(
          grad_fn, correct, lambda: updates, updates, state, active, axis_name
        )
    if axis_name is not None:
      updates = jax.lax.pmean(updates, axis_name)
    return updates, state._replace(
      count=optax.safe_increment(state.count), alpha=coefficient
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def adaptive_svrg(
  decay: float = 0.97,
  *,
  max_alpha: float = 1.0,
  axis_name: Any = None,
  snapshot_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""SVRG whose coefficient is estimated from step to step.

  The same estimator as :func:`optax_svrg.alpha_svrg`, with the same arguments
  of ``update`` and the same :func:`optax_svrg.take_snapshot`. The coefficient
  is the one of least variance,

  .. math::

    \alpha^* = \frac{\operatorname{Cov}(g, s)}{\operatorname{Var}(s)}
    \qquad \text{for } g = \nabla f_B(\theta),
    \; s = \nabla f_B(\theta_{\text{snapshot}}),

  which falls from 1 at the snapshot to 0 as far as the two gradients of a batch
  cease to resemble each other. As the mean
  :math:`\mu = \nabla f(\theta_{\text{snapshot}})` of :math:`s` is known, it
  takes two inner products per step, and neither a schedule nor the length of
  the training:

  .. math::

    \hat\alpha = \operatorname{clip}\left(
    \frac{\operatorname{EMA}\langle g - \mu, s - \mu\rangle}
    {\operatorname{EMA}\lVert s - \mu\rVert^2},
    0, \alpha_{\max}\right)

  The averages run over the steps before this one, so that the coefficient does
  not depend on the batch that it is used for and the corrected gradient stays
  unbiased. A snapshot empties them: the next coefficient is 1, or ``max_alpha``
  if that is less.

  How far the mean gradient has moved since the snapshot is noise in the first
  average. Where it has moved farther than the gradients of batches differ, i.e.
  with large batches and large steps, the estimate is rough and tends to be too
  small, which gives away some of the reduction but does no other harm.

  **A mean over a sample.** If :func:`optax_svrg.take_snapshot` is given the
  mean gradient over only :math:`n` of the :math:`N` batches, its error has the
  variance :math:`(1/n - 1/N) \operatorname{Var}(s)` and is the same in all
  steps until the next snapshot, so that it does not average out. The estimate
  does not see it. The variance of the sum of :math:`N` corrected gradients is

  .. math::

    N \left(\operatorname{Var}(g) - 2 \alpha \operatorname{Cov}(g, s)
    + \frac{\alpha^2}{q} \operatorname{Var}(s)\right), \qquad q = \frac{n}{N},

  least for :math:`q \alpha^*`: a mean over a share :math:`q` is worth that
  share of the reduction. Give ``max_alpha=q``. With more, training can end
  worse than without any correction.

  Where the variance of the control variate is 0 (full batches) the averages,
  and with them the coefficient, stay as they are; so they do after a gradient
  that is not finite.

  **Does it pay?** ``optax.tree.get(opt_state, "variance_ratio")`` estimates the
  variance of the corrected gradient, divided by that of the plain gradient:

  .. math::

    \frac{M}{M + 2\alpha C - \alpha^2 V}, \qquad
    M = \operatorname{EMA}\lVert \tilde g - \mu\rVert^2,

  where :math:`\tilde g` is the corrected gradient, and :math:`C` and :math:`V`
  are the two averages above. The reduction :math:`2\alpha C - \alpha^2 V` is
  unbiased; :math:`M` exceeds the variance of :math:`\tilde g` by
  :math:`\lVert\nabla f(\theta) - \mu\rVert^2`, hence the ratio is
  overestimated as long as it is below 1, the more so the farther the mean
  gradient has moved since the snapshot. Like the averages it lags behind by
  about ``1 / (1 - decay)`` steps. As far as variance goes, a control variate is
  worth its gradients if the ratio is below one over their number: below 1/3
  with a full pass for each epoch.

  Args:
    decay: of the two averages, in [0, 1). The default is chosen by measurement,
      see ``benchmarks/README.md``.
    max_alpha: positive upper bound of the coefficient.
    axis_name: see :func:`optax_svrg.alpha_svrg`. The inner products of the
      device-local gradients are averaged as well: two scalars.
    snapshot_dtype: see :func:`optax_svrg.alpha_svrg`.

  Returns:
    An :class:`optax.GradientTransformationExtraArgs` as that of
    :func:`optax_svrg.alpha_svrg`. In its :class:`SVRGState` ``alpha`` is the
    coefficient used last, 0 before the first snapshot, and ``estimate`` holds
    the averages, in float32 or, for parameters of double precision, in float64.
    The coefficient is real for complex parameters too.

  Raises:
    TypeError: if ``decay`` or ``max_alpha`` is not a real number; otherwise as
      :func:`optax_svrg.alpha_svrg`.
    ValueError: if ``decay`` is not in [0, 1), or ``max_alpha`` not positive or
      not finite; otherwise as :func:`optax_svrg.alpha_svrg`.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jnp.array([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    >>> y = jnp.array([3.0, 1.0, 2.0, 0.0])
    >>> loss = lambda w, i: 0.5 * jnp.mean((x[i] @ w - y[i]) ** 2)
    >>> grad = jax.grad(loss)
    >>> batches = [jnp.array([0, 1]), jnp.array([2, 3])]
    >>> tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.1))
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
    >>> print(f"{optax.tree.get(state, 'alpha'):.2f}")
    1.00

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025, whose optimal coefficient this
    estimates. The estimate is the regression coefficient of control variates,
    e.g. Owen, `Monte Carlo theory, methods and examples
    <https://artowen.su.domains/mc/>`_, 2013, chapter 8.9.

  .. seealso:: :func:`optax_svrg.alpha_svrg`,
    :func:`optax_svrg.take_snapshot`
  """
  _checks.check_decay(decay, "decay")
  _checks.check_positive(max_alpha, "max_alpha")
  snapshot_dtype = _checks.as_dtype(snapshot_dtype, "snapshot_dtype")

  def init_fn(params: optax.Params) -> SVRGState:
    return _init(params, snapshot_dtype)._replace(
      estimate=_control_variate.init(params)
    )

  def update_fn(
    updates: optax.Updates,
    state: SVRGState,
    params: optax.Params | None = None,
    *,
    grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
    snapshot_grads: optax.Updates | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SVRGState]:
    del extra_args  # Meant for other transformations of the chain.
    _check_update(updates, state, params, grad_fn, snapshot_grads, axis_name)
    assert state.estimate is not None
    estimate = state.estimate
    # Without a mean there is nothing to learn from either.
    active = _control_variate.eagerly(_has_mean(state))
    coefficient = jnp.where(
      active, _control_variate.coefficient(estimate, max_alpha, start=1), 0
    ).astype(state.alpha.dtype)

    if active is not False:
      mean_grads = _sharding.to_device(state.mean_grads)

      def observe(
        snapshot_grads: optax.Updates,
        updates: optax.Updates = updates,
        mean_grads: optax.Updates = mean_grads,
      ) -> tuple[optax.Updates, list[jax.Array]]:
        """The corrected gradient and what the estimate takes from it."""
        covariance, variance, is_finite = _control_variate.products(
          updates, snapshot_grads, mean_grads, active, estimate
        )
        # At 0 the gradient passes as it is, but the estimate goes on.
        corrected = _control_variate.correct(
          updates,
          snapshot_grads,
          mean_grads,
          coefficient,
          (coefficient != 0) & is_finite,
        )
        seen = [covariance, variance]
        if axis_name is None:
          seen.append(
            _control_variate.second_moment(corrected, mean_grads, estimate)
          )
        return corrected, seen

      def pass_by() -> tuple[optax.Updates, list[jax.Array]]:
        # What is seen of nothing: zeros that vary over the same axes.
        nothing = jax.tree.map(lambda g: jnp.ravel(g)[:0], updates)
        return updates, observe(nothing, nothing, nothing)[1]

      if grad_fn is None:
        updates, seen = observe(snapshot_grads)
      else:
        updates, seen = _evaluate(
          grad_fn, observe, pass_by, updates, state, active, axis_name
        )
      num_devices = 1
      if axis_name is not None:
        updates, seen = jax.lax.pmean((updates, seen), axis_name)
        seen.append(
          _control_variate.second_moment(updates, mean_grads, estimate)
        )
        # The mean over independent batches varies less.
        num_devices = jax.lax.axis_size(axis_name)
      covariance, variance, moment = seen
      estimate = _control_variate.update(
        estimate,
        covariance / num_devices,
        variance / num_devices,
        moment,
        coefficient,
        decay,
      )
    elif axis_name is not None:
      updates = jax.lax.pmean(updates, axis_name)
    return updates, state._replace(
      count=optax.safe_increment(state.count),
      alpha=coefficient,
      estimate=estimate,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def take_snapshot(
  opt_state: optax.OptState,
  params: optax.Params,
  mean_grad_fn: Callable[[optax.Params], optax.Updates],
) -> optax.OptState:
  """Moves the snapshot of every SVRG state inside ``opt_state`` to ``params``.

  When to call it is up to the user: every epoch (the paper), every so many
  steps, at growing intervals, or by the flip of a coin (loopless SVRG).

  It is a pure function, works eagerly and inside :func:`jax.jit`,
  :func:`jax.lax.cond`, :func:`jax.lax.scan` and :func:`jax.shard_map`, and
  keeps the structure, shapes, dtypes and shardings of ``opt_state``. The
  snapshot is a copy, so that parameters and optimizer state can be donated
  together.

  Args:
    opt_state: any nesting of Optax states with one or more
      :class:`optax_svrg.SVRGState` inside.
    params: the parameters, the tree given to ``init``.
    mean_grad_fn: a function from parameters to the mean gradient over the data
      set, a tree of the same structure and shapes; usually
      :func:`optax_svrg.mean_gradient`. It is called at the snapshot as stored,
      i.e. rounded to ``snapshot_dtype`` but in the parameters' dtypes. It is
      called once per distinct rounding: once, as a rule.

  Returns:
    ``opt_state`` with new ``snapshot_params`` and ``mean_grads``, and
    ``num_snapshots`` increased by one. ``is_finite`` tells whether the mean
    gradient is usable: if not, updates pass unchanged until the next snapshot.
    The averages of :func:`optax_svrg.adaptive_svrg` are emptied.

  Raises:
    TypeError: if ``mean_grad_fn`` cannot be called.
    ValueError: if there is no :class:`optax_svrg.SVRGState` in ``opt_state``,
      or if ``params`` or the mean gradient do not match it in structure, shape
      or kind of dtype.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> params = jnp.array([1.0, 2.0])
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.adam(1e-3))
    >>> state = optax_svrg.take_snapshot(tx.init(params), params, jnp.square)
    >>> print(optax.tree.get(state, "mean_grads"))
    [1. 4.]
    >>> print(optax.tree.get(state, "num_snapshots"))
    1

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025 (the snapshot); Kovalev et al.,
    `Don't Jump Through Hoops and Remove Those Loops
    <https://arxiv.org/abs/1901.08689>`_, 2019 (loopless SVRG)
  """
  if not callable(mean_grad_fn):
    raise TypeError(f"mean_grad_fn must be a function, got {mean_grad_fn!r}.")
  # An nnx.Optimizer's state has a Variable around each leaf.
  pure_state, pure_params = _as_pure(opt_state), _as_pure(params)
  nodes = jax.tree.leaves(pure_state, is_leaf=_is_state)
  states = [node for node in nodes if _is_state(node)]
  if not states:
    raise ValueError(
      "opt_state holds no SVRGState: there is neither alpha_svrg nor"
      f" adaptive_svrg in this optimizer. Got {jax.tree.structure(opt_state)}."
    )
  for state in states:
    _check_params(pure_params, state.snapshot_params)

  leaves, treedef = jax.tree.flatten(params)
  dtypes = [_checks.dtype_of(leaf) for leaf in leaves]

  def like_params(snapshot: list[Any]) -> optax.Params:
    return jax.tree.unflatten(
      treedef, map(jnp.asarray, _sharding.to_device(snapshot), dtypes)
    )

  means: dict[Any, optax.Updates] = {}

  def refresh(node: Any) -> Any:
    if not _is_state(node):
      return node
    stored = _map_unmasked(_copy_into, node.snapshot_params, pure_params)
    # Leaves that a wrapper has masked are not stored: they enter as they are.
    snapshot = jax.tree.leaves(_unmask(stored, pure_params))
    rounding = tuple(map(_checks.dtype_of, snapshot))
    if rounding not in means:
      mean = _as_pure(mean_grad_fn(like_params(snapshot)))
      _checks.check_same_tree(
        mean, pure_params, "the result of mean_grad_fn", "params"
      )
      means[rounding] = mean
    mean_grads = _map_unmasked(_copy_into, node.mean_grads, means[rounding])
    return node._replace(
      num_snapshots=optax.safe_increment(node.num_snapshots),
      snapshot_params=stored,
      mean_grads=mean_grads,
      is_finite=_copy_into(
        node.is_finite,
        _control_variate.all_finite(_sharding.to_device(mean_grads)),
      ),
      estimate=node.estimate and _control_variate.reset(node.estimate),
    )

  new_state = jax.tree.map(refresh, pure_state, is_leaf=_is_state)
  return jax.tree.unflatten(
    jax.tree.structure(opt_state), jax.tree.leaves(new_state)
  )


def _init(params: optax.Params, snapshot_dtype: Any) -> SVRGState:
  _checks.check_inexact(params, "params")
  _checks.check_dtype_fits(params, snapshot_dtype, "snapshot_dtype")
  return SVRGState(
    count=jnp.zeros([], jnp.int32),
    num_snapshots=jnp.zeros([], jnp.int32),
    alpha=jnp.zeros([], float),
    snapshot_params=jax.tree.map(
      lambda p: _copy(p, snapshot_dtype or _checks.dtype_of(p)), params
    ),
    mean_grads=jax.tree.map(
      lambda p: jnp.zeros_like(p, _checks.dtype_of(p)), params
    ),
    is_finite=jnp.ones([], bool),
  )


def _has_mean(state: SVRGState) -> jax.Array:
  """Whether ``mean_grads`` are more than a placeholder, and usable."""
  return (state.num_snapshots > 0) & state.is_finite


def _is_state(node: Any) -> bool:
  return isinstance(node, SVRGState)


def _as_pure(tree: Any) -> Any:
  """The tree without nnx.Variable; there is none before Flax is imported."""
  as_pure = getattr(sys.modules.get("flax.nnx"), "as_pure", None)
  return tree if as_pure is None else as_pure(tree)


def _copy(x: Any, dtype: Any) -> Any:
  """A copy in a buffer of its own, so that params and state can be donated."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return jnp.array(x, dtype)


def _copy_into(old: Any, new: Any) -> jax.Array:
  """A copy of ``new`` with the dtype and the placement of ``old``."""
  copy = _copy(new, old.dtype)
  concrete = isinstance(old, jax.Array) and not any(
    isinstance(x, jax.core.Tracer) for x in (old, copy)
  )
  # An array that is not committed to its devices follows the others.
  if (
    concrete
    and old.committed
    and not old.sharding.is_equivalent_to(copy.sharding, copy.ndim)
  ):
    copy = jax.device_put(copy, old.sharding)
  return _sharding.to_memory_of(old, copy)


def _map_unmasked(fn: Callable, masked: Any, full: Any) -> Any:
  """Maps over two trees; what is masked in the first one stays masked."""
  return jax.tree.map(
    lambda m, x: m if _checks.is_masked(m) else fn(m, x),
    masked,
    full,
    is_leaf=_checks.is_masked,
  )


def _unmask(masked: Any, full: Any) -> Any:
  """Fills the masked places of the first tree from the second."""
  return jax.tree.map(
    lambda m, x: x if _checks.is_masked(m) else m,
    masked,
    full,
    is_leaf=_checks.is_masked,
  )


def _has_masked(tree: Any) -> bool:
  return any(
    map(_checks.is_masked, jax.tree.leaves(tree, is_leaf=_checks.is_masked))
  )


def _is_flat(tree: Any) -> bool:
  return jax.tree_util.all_leaves([tree]) and np.ndim(tree) == 1


def _check_params(params: optax.Params, snapshot: optax.Params) -> None:
  """Raises unless ``params`` have the form of a (perhaps masked) snapshot."""
  hint = ""
  if _has_masked(snapshot):
    try:
      snapshot = _unmask(snapshot, params)
    except (ValueError, TypeError) as e:
      raise ValueError(
        f"params must have the tree structure given to init: {e}"
      ) from e
  elif _is_flat(snapshot):
    hint = _FLAT_HINT
  try:
    _checks.check_same_tree(params, snapshot, "params", "the stored snapshot")
  except ValueError as e:
    raise ValueError(f"{e}{hint}") from e


def _check_update(
  updates: optax.Updates,
  state: SVRGState,
  params: optax.Params | None,
  grad_fn: Any,
  snapshot_grads: Any,
  axis_name: Any,
) -> None:
  """Checks the arguments of update before anything is computed."""
  if (grad_fn is None) == (snapshot_grads is None):
    given = "neither" if grad_fn is None else "both"
    raise ValueError(
      "SVRG needs exactly one of the extra arguments grad_fn and"
      f" snapshot_grads, got {given}. Call update(grads, state, params,"
      " grad_fn=lambda p: jax.grad(loss)(p, batch)); a wrapper may have dropped"
      " the argument."
    )
  snapshot = state.snapshot_params
  _checks.check_same_tree(updates, snapshot, "updates", "the stored snapshot")
  if params is not None:
    _checks.check_same_tree(params, snapshot, "params", "the stored snapshot")
  if axis_name is not None:
    _checks.check_varying(updates, axis_name, "updates")
  if grad_fn is None:
    try:
      _check_gradient(snapshot_grads, updates, axis_name, "snapshot_grads")
    except ValueError as e:
      if _has_masked(snapshot):
        raise ValueError(f"{e} Note that {_MASKED_HINT}") from e
      raise
  else:
    if not callable(grad_fn):
      raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
    if _has_masked(snapshot):
      raise ValueError(f"grad_fn cannot be evaluated: {_MASKED_HINT}")


def _check_gradient(
  grads: Any, updates: optax.Updates, axis_name: Any, name: str
) -> None:
  _checks.check_same_tree(grads, updates, name, "updates")
  if axis_name is not None:
    _checks.check_varying(grads, axis_name, name)


def _evaluate(
  grad_fn: Callable[[optax.Params], optax.Updates],
  use: Callable[[optax.Updates], Any],
  otherwise: Callable[[], Any],
  updates: optax.Updates,
  state: SVRGState,
  active: Any,
  axis_name: Any,
) -> Any:
  """What is made of the gradient at the snapshot, or else while not active.

  Both are branches as a whole, so that while not active nothing is read.
  """

  def evaluate() -> Any:
    # mean_grads have the dtypes of the parameters.
    snapshot = optax.tree.cast_like(
      _sharding.to_device(state.snapshot_params), state.mean_grads
    )
    try:
      grads = grad_fn(snapshot)
      _check_gradient(grads, updates, axis_name, "the result of grad_fn")
    except Exception as e:
      if _is_flat(snapshot):
        raise ValueError(
          f"grad_fn failed at the snapshot with {e!r}.{_FLAT_HINT}"
        ) from e
      raise
    return use(
      jax.tree.map(lambda s, g: jnp.asarray(s, g.dtype), grads, updates)
    )

  return (
    evaluate() if active is True else jax.lax.cond(active, evaluate, otherwise)
  )
