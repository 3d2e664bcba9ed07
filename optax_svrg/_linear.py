# SPDX-License-Identifier: Apache-2.0
"""Linear models: SAGA on a table of residuals, then Newton's method."""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple
import warnings

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np

from optax_svrg import _checks, _linear_data, _minimize, _programs

_BATCH_SIZE = 32
# What a step of SAGA costs besides its arithmetic, in floating-point operations
# of large matrix products: some 10 µs of a core, some 100 µs of an accelerator.
_STEP_OVERHEAD = {"cpu": 5e5}
_ACCELERATOR_OVERHEAD = 1e9
_NEWTON_RATE = 0.05  # Expected of Newton's method before it has been tried.
_MAX_FORCING = 0.3
_NEWTON_STEPS = 3
_MIN_PRODUCTS = 20  # Of a step's Hessian with vectors, at most that or more.
_NUM_ITERS = 8  # Of the power method.
_MAX_ATTEMPTS = 6  # At a step of Newton's method, with more and more damping.
_DAMPING = 1e-6  # Of the first such attempt, relative to the curvature.
_MAX_FAILURES = 24
_BLOCKS = (2, 4, 8)  # Epochs of SAGA between two evaluations.


class LinearFit(NamedTuple):
  """Result of :func:`optax_svrg.fit_linear`.

  Attributes:
    weights: ``(d, k)``, or ``(d,)`` for a single output.
    intercept: ``(k,)``, or a scalar for a single output; zeros if
      ``intercept=False``.
    num_epochs: number of passes over the data: epochs of SAGA, evaluations of
      the full gradient, and Hessian-vector products.
    gradient_norm: Euclidean norm of the gradient of the objective or, with
      ``l1``, of its subgradient of least norm, which bounds that of the
      proximal gradient mapping for every step size.
    gap: upper bound of the objective less its minimum, up to rounding;
      infinite if ``l2=0``.
    converged: whether ``gradient_norm`` is at most ``tol``.
  """

  weights: jax.Array
  intercept: jax.Array
  num_epochs: int
  gradient_norm: float
  gap: float
  converged: bool


class _Local(NamedTuple):
  """Quantities that a program computes from outputs.

  Attributes:
    value: mean loss.
    residuals: ``(N, k)``, the gradients of the weighted losses.
    table: the residuals in the low dtype.
    curve: their vjp, the Hessian of the losses times ``(N, k)``.
    curvature: ``(N,)``, second derivatives of the weighted losses.
    slope: ``(k,)``, the sum of the residuals.
  """

  value: jax.Array
  residuals: jax.Array
  table: jax.Array
  curve: Any
  curvature: jax.Array
  slope: jax.Array


class _Point(NamedTuple):
  """An iterate and what is known about it.

  Attributes:
    w: ``(k, D)``, the intercept in the last column.
    value: the objective.
    local: of its outputs.
    grads: ``(k, D)``, gradient of the mean loss.
    subgradient: ``(k, D)``, of the objective, of least norm.
    norm: of the subgradient.
    gap: bound of the suboptimality.
  """

  w: np.ndarray
  value: float
  local: _Local
  grads: np.ndarray
  subgradient: np.ndarray
  norm: float
  gap: float


class _Programs(NamedTuple):
  """The compiled functions for one loss."""

  outputs: Callable[..., jax.Array]
  gradients: Callable[..., jax.Array]
  local: Callable[..., _Local]
  intercept_hessian: Callable[..., jax.Array]
  direction: Callable[..., Any]
  epoch: Callable[..., Any]


def _product(w: jax.Array, x: Any) -> jax.Array:
  """Outputs ``(N, k)`` of weights ``(k, D)``."""
  if isinstance(x, sparse.BCOO):
    return x @ w.T
  # Else a GPU rounds the factors to 10 bits.
  return jnp.matmul(x, w.T, precision="highest")


def _adjoint(r: jax.Array, x: Any) -> jax.Array:
  if isinstance(x, sparse.BCOO):
    return (x.T @ r).T
  # Without the barrier XLA on CPU takes twice the time for float64 (JAX 0.10).
  rows = jax.lax.optimization_barrier(r.T)
  return jnp.matmul(rows, x, precision="highest")


def _to_dtype(targets: jax.Array, dtype: Any) -> jax.Array:
  is_float = jnp.issubdtype(targets.dtype, jnp.floating)
  return targets.astype(dtype) if is_float else targets


def _make_programs(
  loss: _linear_data.Loss, flat: bool, is_small: bool
) -> _Programs:
  # Few numbers take less time than LLVM's optimisation of their programs.
  is_quick = is_small and jax.default_backend() == "cpu"
  options = {"xla_backend_optimization_level": 0} if is_quick else None
  jit = functools.partial(jax.jit, compiler_options=options)

  def total(z: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses = loss(z[:, 0] if flat else z, targets)
    losses = losses.sum(axis=1) if losses.ndim == 2 else losses
    return jnp.vdot(weights, losses)

  return _Programs(
    # Partials, so that these programs go when their loss does.
    jit(functools.partial(_product)),
    jit(functools.partial(_adjoint)),
    jit(functools.partial(_local, total), static_argnames="low"),
    jit(functools.partial(_intercept_hessian)),
    jit(functools.partial(_direction)),
    jit(functools.partial(_epoch, jax.grad(total))),
  )


def _local(
  total: Callable[..., jax.Array],
  z: jax.Array,
  shift: jax.Array,
  targets: jax.Array,
  weights: jax.Array,
  low: Any,
) -> _Local:
  """Value and derivatives of the mean loss at shifted outputs."""
  z = z + shift[None]
  value, r = jax.value_and_grad(total)(z, targets, weights)
  targets, weights = _to_dtype(targets, low), weights.astype(low)
  # The Hessian is symmetric, and a vjp is a tree that a program can return.
  table, curve = jax.vjp(
    lambda z: jax.grad(total)(z, targets, weights), z.astype(low)
  )
  square = jnp.maximum(jnp.sum(table * table, axis=1), jnp.finfo(low).tiny)
  # Exact for one output, otherwise that in the direction of the residual.
  curvature = jnp.sum(table * curve(table)[0], axis=1) / square
  return _Local(value, r, table, curve, curvature, jnp.sum(r, axis=0))


def _intercept_hessian(curve: Any, table: jax.Array) -> jax.Array:
  return jax.vmap(
    lambda e: jnp.sum(curve(jnp.broadcast_to(e, table.shape))[0], axis=0)
  )(jnp.eye(table.shape[1], dtype=table.dtype))


def _direction(
  x: Any,
  curve: Any,
  inverse: jax.Array | None,
  l2: jax.Array,
  rhs: jax.Array,
  free: jax.Array,
  forcing: jax.Array,
  max_products: int,
) -> tuple[jax.Array, jax.Array]:
  """Newton's direction for the free weights, and the number of products."""

  def hessian(v: jax.Array) -> jax.Array:
    (r,) = curve(_product(v, x))
    if inverse is not None:  # The intercept follows, so that their sum stays 0.
      shift = jnp.sum(r, axis=0) @ inverse
      r = r - curve(jnp.broadcast_to(shift, r.shape))[0]
    return free * (_adjoint(r, x) + l2 * v)

  return _conjugate_gradients(hessian, rhs, forcing, max_products)


def _epoch(
  residual: Callable[..., jax.Array],
  carry: tuple[jax.Array, jax.Array, jax.Array],
  batches: Any,
  targets: jax.Array,
  weights: jax.Array,
  order: jax.Array,
  step_size: jax.Array,
  shrink: jax.Array,
  clip: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Steps of SAGA through all batches; carries weights, mean and table."""
  w, mean, table = carry
  num_batches = len(order)

  def batched(x: jax.Array) -> jax.Array:
    return x.reshape(num_batches, -1, *x.shape[1:])

  targets = batched(_to_dtype(targets, w.dtype))
  weights = batched(weights.astype(w.dtype))
  is_dense = isinstance(batches, jax.Array)
  split = batched(batches) if is_dense else batches

  def step(carry: Any, i: jax.Array) -> Any:
    w, mean, table = carry
    x = jax.tree.map(lambda x: x[i], split)
    if not is_dense:
      x = sparse.BCOO(x, shape=(weights.shape[1], w.shape[1]))
    new = residual(_product(w, x), targets[i], weights[i])
    change = _adjoint(new - table[i], x)
    w = w - step_size * (num_batches * change + mean)
    w = shrink * (w - jnp.clip(w, -clip, clip))
    return (w, mean + change, table.at[i].set(new)), None

  carry, _ = jax.lax.scan(step, (w, mean, batched(table)), order)
  return *carry[:2], carry[2].reshape(table.shape)


def _conjugate_gradients(
  hessian: Callable[[jax.Array], jax.Array],
  rhs: jax.Array,
  forcing: jax.Array,
  max_products: int,
) -> tuple[jax.Array, jax.Array]:
  """Solves ``hessian(v) = rhs`` up to ``forcing``; also counts the products."""

  def body(carry: Any) -> Any:
    v, r, p, rr, count, _ = carry
    product = hessian(p)
    curvature = jnp.vdot(p, product)
    is_convex = curvature > 0
    length = jnp.where(is_convex, rr / curvature, 0)
    # The first direction is that of the gradient, whatever the curvature.
    v = jnp.where(is_convex | (count > 0), v + length * p, p)
    r = r - length * product
    new = jnp.vdot(r, r)
    return v, r, r + new / rr * p, new, count + 1, is_convex

  def unfinished(carry: Any) -> Any:
    _, _, _, rr, count, is_convex = carry
    return (count < max_products) & is_convex & (rr > forcing**2)

  carry: Any = (jnp.zeros_like(rhs), rhs, rhs, jnp.vdot(rhs, rhs), 0, True)
  v, _, _, _, count, _ = jax.lax.while_loop(unfinished, body, carry)
  return v, count


class _Problem:
  """The objective, its compiled programs, and steps of the two methods."""

  def __init__(
    self,
    loss: _linear_data.Loss,
    data: _linear_data.Data,
    num_outputs: int,
    flat: bool,
    intercept: bool,
    l2: float,
    l1: float,
  ):
    self.data = data
    self.l2, self.l1 = l2 * data.penalised, l1 * data.penalised
    self.strong = l2
    self.intercept = intercept
    self.programs = _programs.program(
      loss,
      ("fit_linear", flat, data.is_small),
      lambda call: _make_programs(call, flat, data.is_small),
    )
    self.dtype = np.dtype(data.features.dtype)
    self.low = np.dtype(data.low.dtype)
    self.start = np.zeros((num_outputs, len(data.penalised)), self.dtype)
    self.num_batches = data.num_batches
    work = 4 * len(data.weights) // data.num_batches * self.start.size
    overhead = _STEP_OVERHEAD.get(jax.default_backend(), _ACCELERATOR_OVERHEAD)
    # Of an epoch of SAGA, in passes of large matrix products.
    self.epoch_cost = 1 + overhead / work

  def _local(self, z: jax.Array, shift: np.ndarray) -> Any:
    return self.programs.local(
      z,
      shift.astype(self.dtype),
      self.data.targets,
      self.data.weights,
      self.low,
    )

  def inverse_hessian(self, local: _Local) -> np.ndarray:
    """That for the intercept alone."""
    hessian = self.programs.intercept_hessian(local.curve, local.table)
    # Singular for softmax, which does not see equal shifts.
    return np.linalg.pinv(np.asarray(hessian, np.float64), rcond=1e-6)

  def _best_intercept(
    self, w: np.ndarray, accuracy: float
  ) -> tuple[np.ndarray, _Local, float]:
    """Newton's method for the intercept, which needs no pass over the data.

    Args:
      w: the point.
      accuracy: the gradient at which to stop, if rounding allows it.

    Returns:
      The point, what is known about its outputs, and how much the objective
      exceeds that of the best intercept at most, as far as can be told.
    """
    z = self.programs.outputs(w, self.data.features)
    at = np.zeros(len(w))
    best = self._local(z, at)
    if not self.intercept:
      return w, best, 0.0
    eps = float(np.finfo(self.dtype).eps)
    scale, inverse, is_flat = 1.0, None, False
    slope = np.asarray(best.slope, np.float64)
    for _ in range(60):
      if not np.abs(slope).max() > max(accuracy, eps / 8) or scale < 1e-8:
        break
      if inverse is None:
        inverse = self.inverse_hessian(best)
        is_flat = not inverse.any()  # As in the tails of Huber's loss.
      step = slope if is_flat else inverse @ slope
      new = self._local(z, at - scale * step)
      new_slope = np.asarray(new.slope, np.float64)
      is_halved = np.abs(new_slope).max() < np.abs(slope).max() / 2
      slack = 4 * eps * abs(float(best.value))
      if not (is_halved or float(new.value) < float(best.value) - slack):
        if np.abs(slope).max() < 64 * eps:
          break  # It is but rounding.
        scale /= 4
        continue
      at, best, slope = at - scale * step, new, new_slope
      scale = 4 * scale if is_flat else min(1.0, 4 * scale)
      if not is_halved:
        inverse = None  # It has changed too much to be used again.
    w = w.copy()
    w[:, -1] += at
    excess = 0.0 if inverse is None else float(slope @ inverse @ slope)
    return w, best, math.inf if is_flat else excess

  def assess(self, w: np.ndarray, accuracy: float = 0.0) -> _Point:
    """Everything about a point, whose intercept is optimised first.

    Args:
      w: the point.
      accuracy: up to which gradient; the gap is a bound if it is 0.
    """
    w, local, excess = self._best_intercept(w, accuracy)
    grads = np.asarray(
      self.programs.gradients(local.residuals, self.data.features), np.float64
    )
    wide = w.astype(np.float64)
    clipped = np.clip(grads, -self.l1, self.l1)
    smooth = grads + self.l2 * wide
    sub = np.where(
      w == 0,
      smooth - np.clip(smooth, -self.l1, self.l1),
      smooth + self.l1 * np.sign(w),
    )
    value = float(local.value)
    value += float(np.sum(self.l2 / 2 * wide**2 + self.l1 * abs(wide)))
    gap = math.inf
    if self.strong > 0:
      # The duality gap, as a sum without cancellation.
      terms = (grads - clipped + self.l2 * wide) ** 2 / (2 * self.strong)
      terms += abs(wide) * (self.l1 + np.sign(w) * clipped)
      gap = float(np.sum(terms * self.data.penalised)) + excess
    norm = float(np.linalg.norm(sub))
    return _Point(w, value, local, grads, sub, norm, gap)

  def curvature(self, point: _Point, chosen: np.ndarray) -> float:
    """The largest curvature of the chosen batches."""
    h = np.asarray(point.local.curvature).reshape(self.num_batches, -1)
    rows = self.data.batch_rows
    largest = max(_largest_eigenvalue(rows(i), h[i]) for i in chosen)
    if not largest > 0:  # E.g. in the tails of the Huber loss.
      ones = np.full(h.shape[1], 1 / h.size, h.dtype)
      largest = _largest_eigenvalue(rows(chosen[0]), ones)
    return self.num_batches * max(largest, float(np.finfo(self.low).tiny))

  def saga(
    self, point: _Point, epochs: int, step_size: float, rng: Any
  ) -> np.ndarray:
    """Epochs of SAGA on the table of residuals, from a fresh table."""
    low = functools.partial(np.asarray, dtype=self.low)
    carry = low(point.w), low(point.grads), point.local.table
    for _ in range(epochs):
      carry = self.programs.epoch(
        carry,
        self.data.batches,
        self.data.targets,
        self.data.weights,
        rng.permutation(self.num_batches).astype(np.int32),
        low(step_size),
        low(1 / (1 + step_size * self.l2))[None],
        low(step_size * self.l1)[None],
      )
    return np.asarray(carry[0]).astype(self.dtype)

  def newton_direction(
    self, point: _Point, forcing: float, damping: float, max_products: int
  ) -> tuple[np.ndarray, int]:
    """An inexact direction of Newton's method where the objective is smooth.

    With ``l1`` that is where a weight is not 0, or is about to leave it.
    """
    free = (self.l1 == 0) | (point.w != 0) | (point.subgradient != 0)
    low = functools.partial(np.asarray, dtype=self.low)
    inverse = None
    if self.intercept:
      # Eliminated, as it is optimised after each step.
      free[:, -1] = False
      inverse = low(self.inverse_hessian(point.local))
    v, count = self.programs.direction(
      self.data.low,
      point.local.curve,
      inverse,
      low(self.l2 + damping)[None],
      low(-point.subgradient / point.norm * free),
      low(free),
      low(forcing),
      max_products,
    )
    return np.asarray(v, np.float64) * point.norm, int(count)

  def move(self, point: _Point, direction: np.ndarray) -> np.ndarray:
    """A step that, with ``l1``, ends where a weight would change its sign."""
    w = point.w + direction
    sign = np.where(point.w == 0, -point.subgradient, point.w)
    w = np.where((self.l1 > 0) & (w * sign <= 0), 0, w)
    return w.astype(self.dtype)


def _largest_eigenvalue(x: Any, h: np.ndarray) -> float:
  """Of ``x.T @ diag(h) @ x``, nearly, by the power method."""
  v = x.T @ np.random.default_rng(0).normal(size=len(h)).astype(h.dtype)
  norm = 0.0
  for _ in range(_NUM_ITERS):
    norm = float(np.linalg.norm(v))
    if not norm > 0:
      break
    v = x.T @ (h * (x @ (v / norm)))
  return float(np.linalg.norm(v)) if norm > 0 else 0.0


class _Solver:
  """Takes turns of SAGA and of Newton's method, by what they have achieved."""

  def __init__(self, problem: _Problem, rng: Any, tol: float, max_epochs: int):
    self.problem, self.rng, self.tol = problem, rng, tol
    self.max_epochs = max_epochs
    self.point = problem.assess(problem.start)
    if not math.isfinite(self.point.value):
      raise ValueError("loss must be finite at zero weights.")
    self.best = self.point
    self.passes, self.epochs, self.blocks = 1, 0, 0
    self.rates = {"saga": math.inf, "newton": _NEWTON_RATE}
    self.shortening, self.damping, self.curvature = 1.0, 0.0, 0.0
    self.failures = self.setbacks = 0

  def saga(self) -> None:
    """A block of epochs; undone, and the step shortened, if it is worse."""
    problem, rng = self.problem, self.rng
    epochs = min(
      _BLOCKS[min(self.blocks, len(_BLOCKS) - 1)],
      max(1, self.max_epochs - self.passes - 1),
    )
    probes = min(max(8, self.epochs), problem.num_batches)
    chosen = rng.permutation(problem.num_batches)[:probes]
    self.curvature = problem.curvature(self.point, chosen)
    step_size = self.shortening / self.curvature
    self.passes += epochs + 1
    self.epochs, self.blocks = self.epochs + epochs, self.blocks + 1
    # What has failed may succeed nearer the minimum.
    self.rates["newton"] += (
      0.1 * (_NEWTON_RATE - self.rates["newton"]) / (1 + self.setbacks)
    )
    old = self.point.norm
    if self.accept(problem.saga(self.point, epochs, step_size, rng)):
      cost = 1 + epochs * problem.epoch_cost
      self.rates["saga"] = _rate(old, self.point.norm, cost)
    else:
      self.shortening /= 4
      self.rates["saga"] -= 0.01

  def newton(self) -> None:
    """A few steps, each of which is damped until it makes things better."""
    start, passes, forcing = self.point.norm, self.passes, _MAX_FORCING
    for _ in range(_NEWTON_STEPS):
      norm = self.point.norm
      if not self.newton_step(max(forcing, min(0.9, self.tol / norm / 2))):
        self.rates["newton"], self.setbacks = 0.0, self.setbacks + 1
        return
      # Eisenstat and Walker: as exact as the model has turned out to be.
      forcing = min(_MAX_FORCING, (self.point.norm / norm) ** 1.5)
      cost = self.passes - passes
      self.rates["newton"] = _rate(start, self.point.norm, cost)
      self.setbacks = 0
      if self.is_done():
        return

  def newton_step(self, forcing: float) -> bool:
    """A step, with more and more damping; returns whether there is a better."""
    for _ in range(_MAX_ATTEMPTS):
      left = self.max_epochs - self.passes - 1
      direction, count = self.problem.newton_direction(
        self.point,
        forcing,
        self.damping * self.curvature,
        # A first attempt must not take most of the budget.
        min(max(_MIN_PRODUCTS, self.passes // 4), max(1, left)),
      )
      self.passes += count + 1
      if self.accept(self.problem.move(self.point, direction)):
        self.damping = self.damping / 4 if self.damping > 1e-8 else 0.0
        return True
      self.damping = max(_DAMPING, 64 * self.damping)
    return False

  def accept(self, w: np.ndarray) -> bool:
    """Moves to a new point unless it is worse."""
    old = self.point
    new = self.problem.assess(w, accuracy=old.norm / 100)
    if new.norm <= self.tol:
      new = self.problem.assess(new.w)
    slack = self.rounding(old)
    if not (
      new.value < old.value - slack
      or (new.value <= old.value + slack and new.norm < old.norm)
    ):
      self.failures += 1
      return False
    self.point, self.failures = new, 0
    if new.norm < self.best.norm:
      self.best = new
    return True

  def rounding(self, point: _Point) -> float:
    """Differences of the objective below this are not seen."""
    return 8 * float(np.finfo(self.problem.dtype).eps) * (1 + abs(point.value))

  def is_done(self) -> bool:
    """True if it has converged, makes no progress, or must stop."""
    return (
      self.best.norm <= self.tol
      or self.passes >= self.max_epochs
      or self.failures >= _MAX_FAILURES
    )

  def run(self, report: Callable[..., None]) -> None:
    """Lets the method of the higher rate go on, until it is done."""
    while not self.is_done():
      getattr(self, max(self.rates, key=self.rates.__getitem__))()
      report(self.passes, self.best.norm)
    if not self.best.norm <= self.tol:
      # The last point is the one of least value. The gap shall be a bound.
      is_less = self.point.value < self.best.value - self.rounding(self.best)
      best = self.point if is_less else self.best
      self.best = self.problem.assess(best.w)


def _rate(before: float, after: float, cost: float) -> float:
  """Decades of the norm per pass."""
  return math.log10(before / max(after, 1e-300)) / cost


def fit_linear(
  loss: _linear_data.Loss,
  features: Any,
  targets: Any,
  *,
  num_outputs: int | None = None,
  l2: float = 0.0,
  l1: float = 0.0,
  intercept: bool = True,
  sample_weight: Any = None,
  batch_size: int | None = None,
  tol: float = 1e-6,
  max_epochs: int = 1000,
  seed: int = 0,
  progress: bool = False,
) -> LinearFit:
  r"""Fits a linear model, to high precision.

  .. math::

    \min_{W, b} \; \frac{\sum_i s_i \, \ell(x_i W + b, y_i)}{\sum_i s_i}
    + \frac{l_2}{2} \lVert W\rVert^2 + l_1 \lVert W\rVert_1

  by SAGA with the residuals of examples for a table, ``(n, k)``, and by
  Newton's method with conjugate gradients. SAGA begins, in float32. Afterwards
  the one goes on that has reduced the gradient more for what a pass over the
  data costs. SAGA does most of the work where the data are many and redundant,
  Newton's method where the problem is badly conditioned, or near the minimum.
  No step that makes things worse is kept.

  **Other conventions.** The loss is a mean, and the intercept not penalised.

  * scikit-learn's ``LogisticRegression``, ``C``: ``l2 = 1 / (C * sum(s))``, or
    ``l1``. Its ``Ridge`` and ``Lasso``, ``alpha``, with
    :func:`optax.losses.squared_error`: ``l2 = 2 * alpha / sum(s)`` for the one,
    ``l1 = 2 * alpha`` for the other. Its ``PoissonRegressor``: ``l2 = alpha``.
  * nemos' ``Ridge`` and ``Lasso``: their strength is ``l2`` or ``l1``.
  * benchopt's ``lmbd``, of sums: ``l2 = lmbd / n``, for ``benchmark_ridge``
    with :func:`optax.losses.l2_loss`.

  Args:
    loss: a function ``loss(outputs, targets)`` to the losses of examples,
      ``(n,)``, convex and twice differentiable in the outputs, as
      :func:`optax.losses.softmax_cross_entropy_with_integer_labels`,
      ``sigmoid_binary_cross_entropy``, ``squared_error``, ``huber_loss``, or
      ``lambda z, y: jnp.exp(z) - y * z`` for counts. Losses ``(n, k)`` are
      summed over outputs. Programs are compiled for each function object: make
      it once.
    features: ``(n, d)`` with a float dtype, an array or a
      :class:`jax.experimental.sparse.BCOO`, which is never made dense. Results
      have its dtype, as far as ``jax_enable_x64`` allows, or float32 if that is
      wider. A copy is kept, centred if there is an intercept, and for float64
      another one in float32.
    targets: ``(n,)`` or ``(n, k)``. Integers are labels from 0 if there is more
      than one output.
    num_outputs: ``k``. With ``None``, it is the number of columns of
      ``targets``; otherwise one if ``loss`` takes outputs ``(n,)``, else the
      largest label plus 1.
    l2: not negative.
    l1: not negative. Weights that it makes 0 are exactly 0.
    intercept: whether there is one.
    sample_weight: ``(n,)``, not negative; an integer is as good as so many
      repetitions. ``None`` for ones.
    batch_size: number of examples of a step of SAGA, ``None`` for 32, more for
      sparse features.
    tol: positive; stops when the norm of the gradient is at most this.
    max_epochs: stops after about so many passes over the data.
    seed: of the order of the examples.
    progress: whether to show a progress bar with the gradient norm, which needs
      ``rich`` or ``tqdm``.

  Returns:
    A :class:`LinearFit`.

  Raises:
    ImportError: if ``progress`` is set and neither package is installed.
    TypeError: if an argument has the wrong type, or ``features`` no float
      dtype.
    ValueError: if an argument is out of range, there are no examples, lengths
      differ, features or targets are not finite, or there is only one class.

  Warns:
    UserWarning: in one line if ``tol`` is not reached, with the reason and what
      to do.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> x = jax.random.normal(jax.random.key(0), (500, 4))
    >>> y = jnp.argmax(x[:, :3], axis=1)
    >>> loss = optax.losses.softmax_cross_entropy_with_integer_labels
    >>> fit = optax_svrg.fit_linear(loss, x, y, l2=1e-2)
    >>> print(fit.weights.shape, fit.converged, fit.gap < 1e-8)
    (4, 3) True True
    >>> labels = jnp.argmax(x @ fit.weights + fit.intercept, axis=1)
    >>> print(jnp.mean(labels == y) > 0.95)
    True

  References:
    Defazio et al., `SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014

    Andrew and Gao, `Scalable Training of L1-Regularized Log-Linear Models
    <https://dl.acm.org/doi/10.1145/1273496.1273501>`_, 2007, for the steps of
    Newton's method with ``l1``

    Eisenstat and Walker, `Choosing the Forcing Terms in an Inexact Newton
    Method <https://doi.org/10.1137/0917003>`_, 1996

  .. seealso:: :func:`optax_svrg.minimize`
  """
  x = _linear_data.check_features(features)
  n, d = x.shape
  dtype = _linear_data.wide_dtype(x)
  y = _linear_data.check_targets(targets, n)
  s = _linear_data.check_weights(sample_weight, n)
  l2 = _minimize.check_not_negative(l2, "l2")
  l1 = _minimize.check_not_negative(l1, "l1")
  _checks.check_positive(tol, "tol")
  max_epochs = _checks.check_count(max_epochs, "max_epochs")
  if batch_size is None:
    stored = x.nse if isinstance(x, sparse.BCOO) else n * d
    batch_size = max(
      _BATCH_SIZE, 4 * n * d // max(1, stored) if stored < n * d else 0
    )
  batch_size = min(_checks.check_count(batch_size, "batch_size"), n)
  outputs = _linear_data.match(loss, y, num_outputs, dtype)
  rng = np.random.default_rng(_checks.check_count(seed, "seed", 0))
  bar = _minimize.progress_bar(progress, "fit_linear", max_epochs)
  data = _linear_data.arrange(x, outputs.targets, s, intercept, batch_size, rng)
  problem = _Problem(
    outputs.loss, data, outputs.number, outputs.flat, intercept, l2, l1
  )
  solver = _Solver(problem, rng, tol, max_epochs)
  with bar as report:
    solver.run(report)
  best = solver.best
  converged = best.norm <= tol
  if not converged:
    warnings.warn(
      _minimize.not_converged(
        "fit_linear",
        solver.passes,
        max_epochs,
        best.norm,
        tol,
        _linear_data.scale_advice(data.features, d),
      ),
      stacklevel=2,
    )
  w = best.w[:, :d].T
  b = best.w[:, d] - data.center @ w if intercept else np.zeros(len(best.w))
  b = b.astype(dtype)
  if outputs.loss is _linear_data.softmax_loss:
    b = b - b.mean()  # It does not see the mean.
  if outputs.flat:
    w, b = w[:, 0], b[0]
  w, b = jax.device_put((w, b))
  return LinearFit(w, b, solver.passes, best.norm, best.gap, converged)
