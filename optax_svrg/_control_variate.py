# SPDX-License-Identifier: Apache-2.0
"""A control variate, and its coefficient: given, or estimated online.

For gradients g, the control variate s and its exact mean m, the variance of
g - alpha (s - m) is least for alpha = Cov(g, s) / Var(s). As E[s - m] = 0,

    Cov(g, s) = E<g - c, s - m> for any constant c,    Var(s) = E||s - m||^2,

so that two inner products per step are enough. Here c = m.

A method is a source of control variates (a snapshot, a table) and a rule for
the coefficient, :class:`Given` or :class:`Estimated`.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _compat

# Deviations below this many roundings of the mean are treated as zero.
_ROUNDINGS = 4
# float32 sums of more terms, one after the other, lose digits that matter.
_LONGEST_SEQUENTIAL_SUM = 8192


class CoefficientEstimate(NamedTuple):
  """Running averages behind an estimated coefficient, all scalars.

  The averages are exponential, start at 0 after a snapshot, and are not
  corrected for that: only their ratios are used. Their dtype is float32, or
  float64 if parameters are of that precision. Variances are sums over all
  components of the gradient of one update.

  Attributes:
    covariance: of the gradient with the control variate, in units of
      ``unit ** 2``.
    variance: of the control variate, in the same units.
    second_moment: of the corrected gradient about the mean gradient of the
      snapshot, which is at least the variance of the corrected gradient, in the
      same units.
    variance_ratio: estimate of the variance of the corrected gradient divided
      by that of the plain gradient, 1 before the first estimate, see
      :func:`optax_svrg.adaptive_svrg`.
    unit: a power of two: 1 as long as squares of gradients are in the range of
      the dtype.
  """

  covariance: jax.Array
  variance: jax.Array
  second_moment: jax.Array
  variance_ratio: jax.Array
  unit: jax.Array


class Observation(NamedTuple):
  """Inner products of one step, scalars in units of ``unit ** 2``.

  Attributes:
    covariance: <g - m, s - m>.
    variance: ||s - m||^2; 0 where s differs from m by rounding alone, or there
      is no s.
    second_moment: squared distance of the corrected gradient from m; NaN where
      a gradient was not finite, or not looked at.
    unit: a power of two.
  """

  covariance: jax.Array
  variance: jax.Array
  second_moment: jax.Array
  unit: jax.Array


class Correction(NamedTuple):
  """A corrected gradient.

  Attributes:
    updates: the gradient.
    alpha: the coefficient that was applied: 0 if the gradient passed unchanged.
    seen: the observation of this step, ``None`` for a given coefficient.
  """

  updates: optax.Updates
  alpha: jax.Array
  seen: Observation | None


@dataclasses.dataclass(frozen=True)
class Given:
  """A coefficient that the user gives.

  Attributes:
    alpha: a number, an array, or a schedule.
  """

  alpha: optax.ScalarOrSchedule

  estimates = False

  def __post_init__(self) -> None:
    if not callable(self.alpha):
      _checks.check_coefficient(self.alpha, "alpha")

  @property
  def always_off(self) -> bool:
    """Returns whether the coefficient is the Python number 0."""
    return isinstance(self.alpha, (int, float, np.number)) and self.alpha == 0

  def init(self, params: optax.Params) -> None:
    """Returns no state, as nothing is estimated."""

  def coefficient(self, count: jax.Array, estimate: Any) -> Any:
    """The coefficient after ``count`` updates."""
    value = self.alpha(count) if callable(self.alpha) else self.alpha
    _checks.check_coefficient(value, "alpha")
    return value

  def update(self, estimate: Any, correction: Correction) -> None:
    """Does nothing, as nothing is estimated."""


@dataclasses.dataclass(frozen=True)
class Estimated:
  """The coefficient of least variance, estimated from the steps before.

  Attributes:
    decay: of the averages, in [0, 1).
    max_alpha: upper bound of the coefficient.
    start: the coefficient while there are no averages.
    guarded: whether to divide by the variance of the gradient where that is
      greater, which takes the smaller one of the slopes of g over s and of s
      over g. Where s comes from the recent past, as from a table, a gradient
      that varies more is one that grows from visit to visit, as oscillations
      do under steps that are too large, and to subtract their delayed echo
      would feed them. Otherwise both vary about alike.
  """

  decay: Any
  max_alpha: Any
  start: float
  guarded: bool

  estimates = True
  always_off = False

  def __post_init__(self) -> None:
    _checks.check_decay(self.decay, "decay")
    _checks.check_positive(self.max_alpha, "max_alpha")

  def init(self, params: optax.Params) -> CoefficientEstimate:
    """Returns empty averages, in the precision of the parameters."""
    dtype = _scalar_dtype(params)
    # Arrays of their own, so that the state can be donated.
    return CoefficientEstimate(
      covariance=jnp.zeros([], dtype),
      variance=jnp.zeros([], dtype),
      second_moment=jnp.zeros([], dtype),
      variance_ratio=jnp.ones([], dtype),
      unit=jnp.ones([], dtype),
    )

  def coefficient(self, count: jax.Array, estimate: Any) -> jax.Array:
    """Returns the coefficient of least variance, from 0 to ``max_alpha``."""
    return _best(estimate, self.max_alpha, self.start, self.guarded)

  def update(self, estimate: Any, correction: Correction) -> Any:
    """Includes the observation of a step, if there is one, in the averages."""
    if correction.seen is None:
      return estimate
    return _average(estimate, correction.seen, correction.alpha, self.decay)


Rule = Given | Estimated


def reset(estimate: CoefficientEstimate) -> CoefficientEstimate:
  """Resets the averages; the variance ratio keeps its last value."""
  return estimate._replace(
    covariance=jnp.zeros_like(estimate.covariance),
    variance=jnp.zeros_like(estimate.variance),
    second_moment=jnp.zeros_like(estimate.second_moment),
  )


def eagerly(condition: jax.Array) -> Any:
  """A Python bool where the value is known.

  Eagerly a Python branch does what lax.cond would compile for each new grad_fn.
  """
  traced = isinstance(condition, jax.core.Tracer)
  return condition if traced else bool(condition)


# Compiled for eager use, where dispatching its operations one by one would take
# longer than an optimizer; inlined in a program.
@functools.partial(
  jax.jit, inline=True, static_argnames=("sum_axes", "fixed_unit")
)
def correct(
  updates: optax.Updates,
  control: optax.Updates,
  mean: optax.Updates,
  coefficient: jax.Array,
  active: Any,
  estimate: CoefficientEstimate | None,
  *,
  sum_axes: Any = None,
  fixed_unit: bool = False,
) -> Correction:
  """Subtracts a control variate from a gradient: g - alpha (s - m).

  Args:
    updates: the gradient g of a batch.
    control: the control variate s of that batch, a tree of the same form.
    mean: its mean m.
    coefficient: alpha, a real scalar.
    active: whether there is a control variate, a boolean scalar.
    estimate: the averages so far, ``None`` for a given coefficient.
    sum_axes: mapped axes over which the arrays are shards of larger ones.
    fixed_unit: whether inner products must be in the unit of ``estimate``, as
      they are to be averaged over devices.

  Returns:
    The correction, formed in at least float32, in the dtypes of g. The gradient
    passes bit for bit if not active, if the coefficient is 0, or if a component
    of the corrected gradient would not be finite; a coefficient that is not
    finite is not hidden.
  """

  def subtract(
    alpha: jax.Array, g: jax.Array, s: jax.Array, m: jax.Array
  ) -> jax.Array:
    dtype = _checks.wide_dtype(g.dtype)
    a = alpha.astype(dtype)
    # In this order g = s and a = 1 give the mean to the last bit.
    corrected = (
      _widen(g, dtype) - a * _widen(jnp.asarray(s), dtype)
    ) + a * m.astype(dtype)
    return corrected.astype(g.dtype)

  corrected = jax.tree.map(
    functools.partial(subtract, coefficient), updates, control, mean
  )
  got = None
  if estimate is None:
    is_finite = all_finite(corrected, sum_axes)
  else:
    trees = updates, control, mean
    products = functools.partial(
      _products, *trees, corrected, coefficient, sum_axes=sum_axes
    )
    got = products(estimate.unit)
    is_finite = got.defect == 0
    if not fixed_unit:
      got = _in_fitting_unit(got, products, trees, sum_axes)
  usable = is_finite | ~jnp.isfinite(coefficient)
  used = active & (coefficient != 0) & usable
  seen = None if got is None else _observation(got, active, usable)
  # Subtracted once more, by another coefficient to XLA: otherwise it keeps the
  # corrected gradient in memory from the sums to the result.
  applied = jnp.where(used, coefficient, 0)

  def result(g: jax.Array, s: jax.Array, m: jax.Array) -> jax.Array:
    return jnp.where(used, subtract(applied, g, s, m), g)

  return Correction(jax.tree.map(result, updates, control, mean), applied, seen)


def no_correction(
  updates: optax.Updates,
  alpha: jax.Array,
  estimate: CoefficientEstimate | None,
  *,
  sum_axes: Any,
  fixed_unit: bool,
) -> Correction:
  """Returns the gradient unchanged, with the types of :func:`correct`."""
  # A zero that varies over the mapped axes that the inner products vary over.
  zeros = [jnp.zeros_like(g.real).sum() for g in jax.tree.leaves(updates)]
  zero = _total(zeros, alpha.dtype, sum_axes) + jnp.zeros_like(alpha)
  seen = None
  if estimate is not None:
    none = zero.astype(estimate.unit.dtype)
    unit = estimate.unit if fixed_unit else none + 1
    seen = Observation(none, none, none + jnp.nan, unit)
  return Correction(updates, zero, seen)


def all_finite(tree: Any, sum_axes: Any = None) -> jax.Array:
  """Returns whether all numbers of a tree are finite, a scalar."""
  defects = [jnp.sum(_defect(x)) for x in jax.tree.leaves(tree)]
  return _total(defects, jnp.float32, sum_axes) == 0


def everywhere(conditions: list[jax.Array], sum_axes: Any) -> jax.Array:
  """Returns whether all conditions hold on all devices of mapped axes."""
  return _total([~c for c in conditions], jnp.int32, sum_axes) == 0


def averaged(
  seen: Observation,
  updates: optax.Updates,
  mean: optax.Updates,
  num_devices: int,
  sum_axes: Any,
) -> Observation:
  """The observation of an average over devices.

  Args:
    seen: averages of the observations of the devices.
    updates: average of their corrected gradients.
    mean: the mean m.
    num_devices: number of devices.
    sum_axes: mapped axes over which the arrays are shards of larger ones.
  """

  def square(g: jax.Array, m: jax.Array) -> jax.Array:
    difference = _scaled(g, seen.unit) - _scaled(m, seen.unit)
    return jnp.sum(_real_product(difference, difference))

  squares = map(square, jax.tree.leaves(updates), jax.tree.leaves(mean))
  return Observation(
    # The mean over independent batches varies less.
    seen.covariance / num_devices,
    seen.variance / num_devices,
    _total(squares, seen.unit.dtype, sum_axes),
    seen.unit,
  )


@functools.partial(jax.jit, inline=True, static_argnames=("start", "guarded"))
def _best(
  estimate: CoefficientEstimate, max_alpha: Any, start: float, guarded: bool
) -> jax.Array:
  variance = estimate.variance
  known = variance > 0
  if guarded:
    ratio = estimate.variance_ratio
    # Where the correction has left nothing, the gradient varies as s does.
    plain = estimate.second_moment / jnp.where(ratio > 0, ratio, 1)
    variance = jnp.maximum(variance, plain)
  slope = estimate.covariance / jnp.where(known, variance, 1)
  return jnp.clip(
    jnp.where(known, slope, start), 0, jnp.asarray(max_alpha, variance.dtype)
  )


@functools.partial(jax.jit, inline=True)
def _average(
  estimate: CoefficientEstimate,
  seen: Observation,
  alpha: jax.Array,
  decay: Any,
) -> CoefficientEstimate:
  """The averages after one more observation.

  An observation that is not finite, or without variance, is passed over, so
  that one bad gradient does not spoil those that follow.
  """
  total = seen.covariance + seen.variance + seen.second_moment
  usable = jnp.isfinite(total) & (seen.variance > 0)
  # The larger unit, in which neither overflows.
  is_known = estimate.variance > 0
  unit = jnp.where(is_known, jnp.maximum(estimate.unit, seen.unit), seen.unit)
  decay = jnp.asarray(decay, unit.dtype)
  kept = jnp.where(is_known, decay * (estimate.unit / unit) ** 2, 0)
  taken = (1 - decay) * (seen.unit / unit) ** 2

  def average(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(usable, kept * old + taken * new, old)

  covariance = average(estimate.covariance, seen.covariance)
  variance = average(estimate.variance, seen.variance)
  moment = average(estimate.second_moment, seen.second_moment)
  alpha = alpha.astype(unit.dtype)
  # What the correction takes away from the variance, whatever the mean is.
  reduction = jnp.maximum(alpha * (2 * covariance - alpha * variance), 0)
  plain = moment + reduction
  ratio = jnp.where(
    usable & (plain > 0),
    moment / jnp.where(plain > 0, plain, 1),
    estimate.variance_ratio,
  )
  averages = CoefficientEstimate(
    covariance,
    variance,
    moment,
    ratio,
    jnp.where(usable, unit, estimate.unit),
  )
  return _in_next_unit(averages, seen)


def _in_next_unit(
  estimate: CoefficientEstimate, seen: Observation
) -> CoefficientEstimate:
  """The averages in the unit for the next step.

  It changes where squares have overflowed, next to which averages vanish, or
  where they have vanished and there are no averages.
  """
  low, _, high = units(estimate.unit.dtype)
  # A gradient that was not finite has left NaN.
  overflown = jnp.isinf(seen.second_moment) | jnp.isinf(seen.variance)
  vanished = (
    (estimate.variance == 0)
    & (seen.variance == 0)
    & (seen.second_moment < _least(estimate.unit.dtype))
  )
  unit = jnp.where(vanished, seen.unit * low, estimate.unit)
  unit = jnp.clip(jnp.where(overflown, seen.unit * high, unit), low, high)
  kept = lambda x: jnp.where(overflown, 0, x)
  return estimate._replace(
    covariance=kept(estimate.covariance),
    variance=kept(estimate.variance),
    second_moment=kept(estimate.second_moment),
    unit=unit,
  )


def _in_fitting_unit(
  products: "_Products",
  evaluate: Callable[[jax.Array], "_Products"],
  trees: tuple[Any, Any, Any],
  sum_axes: Any,
) -> "_Products":
  """The inner products, once more in another unit if they are out of range.

  Not on TPU, where the branch would take memory and traffic in each step: the
  observation is passed over there, and the next step has another unit.
  """
  dtype = products.unit.dtype
  total = products.covariance + products.variance + products.moment
  least = _least(_narrowest(trees[0], dtype))
  in_range = jnp.isfinite(total) & (
    (products.variance > least) | (products.rounding > least)
  )

  def fit() -> _Products:
    return evaluate(_fitting_unit(trees, dtype, sum_axes))

  products = _compat.vary_like(products, jax.eval_shape(fit))
  return jax.lax.platform_dependent(
    tpu=lambda: products,
    default=lambda: jax.lax.cond(in_range, lambda: products, fit),
  )


def _observation(
  products: "_Products", active: Any, usable: jax.Array
) -> Observation:
  # Not where the variance is below the rounding, which would hide a NaN.
  is_constant = products.variance <= products.rounding
  known = active & usable & ~is_constant
  zero = jnp.zeros_like(products.variance)
  return Observation(
    jnp.where(known, products.covariance, zero),
    jnp.where(known, products.variance, zero),
    jnp.where(usable, products.moment, jnp.nan),
    products.unit,
  )


def _least(dtype: Any) -> float:
  """Below this, squares of the smaller components have begun to vanish."""
  info = jnp.finfo(dtype)
  return float(info.tiny) / float(info.eps) ** 2


class _Products(NamedTuple):
  """Inner products in units of ``unit ** 2``.

  Attributes:
    covariance: <g - m, s - m>.
    variance: ||s - m||^2.
    moment: ||g - alpha (s - m) - m||^2.
    rounding: what ``variance`` may be by rounding alone.
    defect: 0, or NaN where a component of the corrected gradient is not finite.
    unit: a power of two.
  """

  covariance: jax.Array
  variance: jax.Array
  moment: jax.Array
  rounding: jax.Array
  defect: jax.Array
  unit: jax.Array


def _products(
  grads: Any,
  control: Any,
  mean: Any,
  corrected: Any,
  coefficient: jax.Array,
  unit: jax.Array,
  *,
  sum_axes: Any,
) -> _Products:
  sums = []
  leaves = map(jax.tree.leaves, (grads, control, mean, corrected))
  for g, s, m, c in zip(*leaves, strict=True):
    # As far as the gradient is rounded, not as widely as sums are formed.
    eps = _ROUNDINGS * float(jnp.finfo(g.dtype).eps)
    wide = _checks.wide_dtype(g.dtype)
    g, s, m = (_scaled(x, unit, wide) for x in (g, s, m))
    rest = (g - m) + coefficient.astype(wide) * (m - s)
    sums.append(
      _sums(
        _real_product(g - m, s - m),
        _real_product(s - m, s - m),
        _real_product(rest, rest),
        eps**2 * _real_product(m, m),
        _defect(c).astype(rest.real.dtype),
      )
    )
  total = functools.partial(_total, dtype=unit.dtype, sum_axes=sum_axes)
  covariance, variance, moment, rounding, defect = (
    total([x[i] for x in sums]) for i in range(5)
  )
  return _Products(covariance, variance, moment, rounding, defect, unit)


def _sums(*terms: jax.Array) -> tuple[jax.Array, ...]:
  """The sums of arrays of one shape, in one sweep."""

  def one_by_one() -> tuple[jax.Array, ...]:
    # lax.reduce makes all results vary over the mapped axes of any.
    sums = tuple(map(jnp.sum, terms))
    return _compat.vary_like(sums, jax.eval_shape(together))

  def together() -> tuple[jax.Array, ...]:
    zeros = tuple(jnp.zeros([], x.dtype) for x in terms)
    rows = jax.lax.reduce(
      terms,
      _compat.vary_like(zeros, terms),
      lambda x, y: tuple(map(jnp.add, x, y)),
      (terms[0].ndim - 1,),
    )
    return tuple(map(jnp.sum, rows))

  if not terms[0].ndim:
    return terms
  # XLA for CPU does not fuse sums into one loop, unless they are one operation,
  # which it then adds up in order: not accurate along a long axis. Of several
  # devices, it would gather what is sharded.
  is_long = terms[0].shape[-1] > _LONGEST_SEQUENTIAL_SUM
  if is_long or jax.device_count() > 1:
    return one_by_one()
  return jax.lax.platform_dependent(cpu=together, default=one_by_one)


def _defect(x: jax.Array) -> jax.Array:
  """Zeros, but NaN where a number is not finite."""
  # Not isfinite(x), for which XLA for CPU writes to memory whether each number
  # is.
  x = x - x
  return x.real + x.imag if jnp.iscomplexobj(x) else x


def _fitting_unit(
  trees: tuple[Any, Any, Any], dtype: Any, sum_axes: Any
) -> jax.Array:
  """The unit that fits the components of g - m, s - m and m."""
  largest = jnp.zeros([], dtype)
  for g, s, m in zip(*map(jax.tree.leaves, trees), strict=True):
    wide = _checks.wide_dtype(g.dtype)
    g, s, m = (x.astype(wide) for x in (g, s, m))
    for x in (g - m, s - m, m):
      largest = jnp.maximum(largest, largest_part(x).astype(dtype))
  if sum_axes is not None:
    tracked = _checks.tracked_axes(sum_axes)
    varying = tuple(_compat.varying_axes(largest) & tracked)
    axes = varying if tracked else sum_axes
    largest = jax.lax.pmax(largest, axes) if axes else largest
  return unit_of(largest)


def largest_part(x: jax.Array) -> jax.Array:
  """The largest magnitude of any real or imaginary part."""
  if jnp.iscomplexobj(x):
    return jnp.maximum(largest_part(x.real), largest_part(x.imag))
  return jnp.max(jnp.abs(x), initial=0)


def unit_of(largest: jax.Array) -> jax.Array:
  """The unit in which squares of numbers up to this one are in the range.

  Args:
    largest: their largest magnitude.

  Returns:
    1, or a power of two far above or far below 1: one of :func:`units`.
  """
  low, one, high = units(largest.dtype)
  # In float32: for more than 2^46, 2^85, in which 2^40 squares of the largest
  # number do not overflow; for less than 2^-46, 2^-85.
  exponent = jnp.finfo(largest.dtype).maxexp * 9 // 25
  unit = jnp.where(largest > 2.0**exponent, high, one)
  return jnp.where(largest < 2.0**-exponent, low, unit)


def units(dtype: Any) -> jax.Array:
  """The three powers of two that are units, from the smallest."""
  most = 2.0 ** (jnp.finfo(dtype).maxexp * 2 // 3)
  return jnp.array([1 / most, 1, most], dtype)


def _scaled(x: jax.Array, unit: jax.Array, dtype: Any = None) -> jax.Array:
  dtype = _checks.wide_dtype(x.dtype) if dtype is None else dtype
  return x.astype(dtype) * (1 / unit).astype(dtype)


def _total(parts: Any, dtype: Any, sum_axes: Any) -> jax.Array:
  """The sum over leaves and, with ``sum_axes``, over their shards."""
  parts = [x.astype(dtype) for x in parts]
  if sum_axes is None:
    return sum(parts, jnp.zeros([], dtype))
  tracked = _checks.tracked_axes(sum_axes)
  if not tracked:  # All leaves count as sharded.
    return jax.lax.psum(sum(parts, jnp.zeros([], dtype)), sum_axes)
  # A leaf that is the same on all devices counts once.
  by_axes: dict[frozenset[Any], jax.Array] = {}
  for x in parts:
    axes = _compat.varying_axes(x) & tracked
    by_axes[axes] = by_axes.get(axes, jnp.zeros([], dtype)) + x
  return sum(
    (
      jax.lax.psum(x, tuple(axes)) if axes else x for axes, x in by_axes.items()
    ),
    jnp.zeros([], dtype),
  )


def _narrowest(grads: optax.Updates, default: Any) -> Any:
  """The narrowest real dtype that inner products are formed in."""
  dtypes = [
    np.finfo(_checks.wide_dtype(g.dtype)).dtype for g in jax.tree.leaves(grads)
  ]
  return min(dtypes, key=lambda d: d.itemsize, default=default)


def _scalar_dtype(params: optax.Params) -> Any:
  dtypes = [
    np.finfo(_checks.wide_dtype(_checks.dtype_of(p))).dtype
    for p in jax.tree.leaves(params)
  ]
  return max(dtypes, key=lambda d: d.itemsize, default=np.dtype(np.float32))


def _real_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """Component by component, the real part of the product with a conjugate."""
  return (x * y.conj()).real


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
  """Casts to a wider dtype a value that is rounded to its own.

  XLA may keep the excess precision of a fused gradient, and then two gradients
  that were computed alike differ by a rounding.
  """
  if x.dtype.itemsize >= dtype.itemsize:
    return x.astype(dtype)
  info = jnp.finfo(x.dtype)
  return jax.lax.reduce_precision(x.astype(dtype), info.nexp, info.nmant)
