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
"""A control variate, and its coefficient of least variance, estimated online.

For gradients g, the control variate s and its exact mean m, the variance of
g - alpha (s - m) is least for alpha = Cov(g, s) / Var(s). As E[s - m] = 0,

    Cov(g, s) = E<g - c, s - m> for any constant c,    Var(s) = E||s - m||^2,

so that two dot products per step are enough. Here c = m.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks

# Differences of this many roundings of the mean are taken for none.
_ROUNDINGS = 4


class CoefficientEstimate(NamedTuple):
  """Running averages behind an estimated coefficient, all scalars.

  The averages are exponential, start at 0 after a snapshot, and are not
  corrected for that: only their ratios are used. Their dtype is float32, or
  float64 if parameters are of that precision. Variances are sums over all
  components of the gradient of one update.

  Attributes:
    covariance: of the gradient with the control variate.
    variance: of the control variate.
    second_moment: of the corrected gradient about the mean gradient of the
      snapshot, which is at least the variance of the corrected gradient.
    variance_ratio: estimate of the variance of the corrected gradient divided
      by that of the plain gradient, 1 before the first estimate, see
      :func:`optax_svrg.adaptive_svrg`.
  """

  covariance: jax.Array
  variance: jax.Array
  second_moment: jax.Array
  variance_ratio: jax.Array


def correct(
  updates: optax.Updates,
  control: optax.Updates,
  mean_grads: optax.Updates,
  coefficient: jax.Array,
  active: Any,
) -> optax.Updates:
  """Subtracts a control variate from a gradient: g - alpha (s - m).

  Args:
    updates: the gradient g of a batch.
    control: the control variate s of that batch, a tree of the same form.
    mean_grads: its mean m.
    coefficient: alpha, a real scalar.
    active: whether to correct at all, a scalar, which may be traced.

  Returns:
    The corrected gradient, formed in at least float32, in the dtypes of g. If
    not active, g bit for bit; likewise each component that would not be finite.
  """

  def correct_leaf(g: jax.Array, s: jax.Array, mean: jax.Array) -> jax.Array:
    dtype = _checks.wide_dtype(g.dtype)
    a = coefficient.astype(dtype)
    # In this order g = s and a = 1 give the mean to the last bit.
    corrected = (
      _widen(g, dtype) - a * _widen(jnp.asarray(s), dtype)
    ) + a * mean.astype(dtype)
    corrected = corrected.astype(g.dtype)
    return jnp.where(active & jnp.isfinite(corrected), corrected, g)

  return jax.tree.map(correct_leaf, updates, control, mean_grads)


def all_finite(tree: Any) -> jax.Array:
  """Whether all numbers of a tree of arrays are finite, a scalar."""
  # Not isfinite(x).all(), for which XLA for CPU writes to memory whether each
  # number is.
  finite = [jnp.sum(jnp.subtract(x, x)) == 0 for x in jax.tree.leaves(tree)]
  return jnp.stack(finite).all() if finite else jnp.ones([], bool)


def eagerly(condition: jax.Array) -> Any:
  """A Python bool where the value is known.

  Eagerly a Python branch does what lax.cond would compile anew for each new
  grad_fn.
  """
  traced = isinstance(condition, jax.core.Tracer)
  return condition if traced else bool(condition)


def init(params: optax.Params) -> CoefficientEstimate:
  """Averages of nothing, in the precision that fits the parameters."""
  dtypes = [
    np.finfo(_checks.wide_dtype(_checks.dtype_of(p))).dtype
    for p in jax.tree.leaves(params)
  ]
  dtype = max(dtypes, key=lambda d: d.itemsize, default=np.dtype(np.float32))
  # Arrays of their own, so that the state can be donated.
  return CoefficientEstimate(
    covariance=jnp.zeros([], dtype),
    variance=jnp.zeros([], dtype),
    second_moment=jnp.zeros([], dtype),
    variance_ratio=jnp.ones([], dtype),
  )


def reset(estimate: CoefficientEstimate) -> CoefficientEstimate:
  """Forgets the averages; the variance ratio stays as it was last known."""
  return estimate._replace(
    covariance=jnp.zeros_like(estimate.covariance),
    variance=jnp.zeros_like(estimate.variance),
    second_moment=jnp.zeros_like(estimate.second_moment),
  )


def coefficient(
  estimate: CoefficientEstimate,
  max_alpha: Any,
  start: float,
  guarded: bool = False,
) -> jax.Array:
  """The best coefficient by the averages.

  Args:
    estimate: the averages.
    max_alpha: upper bound of the result.
    start: the coefficient while there are no averages.
    guarded: whether to divide by the variance of the gradient where that is
      greater, which takes the smaller one of the slopes of g over s and of s
      over g. Where s comes from the recent past, as from a table, a gradient
      that varies more is one that grows from visit to visit, as oscillations
      do under steps that are too large, and to subtract their delayed echo
      would feed them. Otherwise both vary about alike.

  Returns:
    A scalar between 0 and ``max_alpha``, of the dtype of the averages.
  """
  variance = estimate.variance
  known = variance > 0
  if guarded:
    left = estimate.variance_ratio
    gradient = estimate.second_moment / jnp.where(left > 0, left, 1)
    variance = jnp.maximum(variance, jnp.where(left > 0, gradient, 0))
  ratio = estimate.covariance / jnp.where(known, variance, 1)
  dtype = variance.dtype
  return jnp.clip(
    jnp.where(known, ratio, start), 0, jnp.asarray(max_alpha, dtype)
  )


def products(
  grads: optax.Updates,
  control: optax.Updates,
  mean: optax.Updates,
  active: Any,
  estimate: CoefficientEstimate,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One observation of the covariance and of the variance.

  A control variate that differs from its mean by rounding alone has no
  variance: both results are then 0.

  Args:
    grads: the gradient g of a batch.
    control: the control variate s of that batch, a tree of the same form.
    mean: its mean m.
    active: whether there is a mean; if not, there is no variance.
    estimate: the averages, whose dtype the results have.

  Returns:
    Two real scalars: the inner products of s - m with g - m and with itself;
    and whether both are finite, which they are not where g or s is not.
  """
  dtype = estimate.variance.dtype
  zero = jnp.zeros([], dtype)
  covariance, variance, rounding = zero, zero, zero
  for g, s, m in zip(
    *map(jax.tree.leaves, (grads, control, mean)), strict=True
  ):
    # As far as the gradient is rounded, not as widely as sums are formed.
    eps = float(jnp.finfo(g.dtype).eps)
    wide = _checks.wide_dtype(g.dtype)
    g, s, m = (x.astype(wide) for x in (g, s, m))
    covariance += _dot(g - m, s - m).astype(dtype)
    # The other way round: XLA for CPU would write s - m to memory if both had
    # it.
    variance += _dot(m - s, m - s).astype(dtype)
    rounding += ((_ROUNDINGS * eps) ** 2 * _dot(m, m)).astype(dtype)
  known = (variance > rounding) & active
  return (
    jnp.where(known, covariance, 0),
    jnp.where(known, variance, 0),
    # Of both, so that what corrects waits for both, and can overwrite s.
    jnp.isfinite(covariance + variance),
  )


def second_moment(
  grads: optax.Updates, mean: optax.Updates, estimate: CoefficientEstimate
) -> jax.Array:
  """The squared distance of two trees, in the dtype of the averages."""
  dtype = estimate.variance.dtype
  total = jnp.zeros([], dtype)
  for g, m in zip(jax.tree.leaves(grads), jax.tree.leaves(mean), strict=True):
    wide = _checks.wide_dtype(g.dtype)
    difference = g.astype(wide) - m.astype(wide)
    total += _dot(difference, difference).astype(dtype)
  return total


def update(
  estimate: CoefficientEstimate,
  covariance: jax.Array,
  variance: jax.Array,
  moment: jax.Array,
  alpha: jax.Array,
  decay: Any,
) -> CoefficientEstimate:
  """Takes an observation into the averages.

  An observation that is not finite, or without variance, is passed over, so
  that one bad gradient does not spoil those that follow.

  Args:
    estimate: the averages.
    covariance: first result of :func:`products`, of the gradient of the update.
    variance: second result, likewise.
    moment: squared distance of the corrected gradient from the mean.
    alpha: the coefficient that was used.
    decay: of the averages.

  Returns:
    The new averages.
  """
  dtype = estimate.variance.dtype
  usable = jnp.isfinite(covariance + variance + moment) & (variance > 0)
  decay = jnp.asarray(decay, dtype)

  def average(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(usable, decay * old + (1 - decay) * new, old)

  covariance = average(estimate.covariance, covariance)
  variance = average(estimate.variance, variance)
  moment = average(estimate.second_moment, moment)
  alpha = alpha.astype(dtype)
  # What the correction takes away from the variance, whatever the mean is.
  reduction = jnp.maximum(alpha * (2 * covariance - alpha * variance), 0)
  total = moment + reduction
  known = usable & (total > 0)
  ratio = jnp.where(
    known, moment / jnp.where(known, total, 1), estimate.variance_ratio
  )
  return CoefficientEstimate(covariance, variance, moment, ratio)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """The real inner product of two arrays."""
  return jnp.sum((x * y.conj()).real)


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
  """Casts to a wider dtype a value that is rounded to its own.

  XLA may keep the excess precision of a fused gradient, and then two gradients
  that were computed alike differ by a rounding.
  """
  if x.dtype.itemsize >= dtype.itemsize:
    return x.astype(dtype)
  info = jnp.finfo(x.dtype)
  return jax.lax.reduce_precision(x.astype(dtype), info.nexp, info.nmant)
