# SPDX-License-Identifier: Apache-2.0
"""The solvers: those of this package, and those of others."""

from collections.abc import Callable, Sequence
import functools
import importlib.metadata
import math
import time
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from benchmarks.studies.convex.problems import Problem
import optax_svrg

BASELINE = "scikit-learn saga"
_BATCH_SIZE = 8  # Of nemos.
_MAX_NEWTON = 3_000  # Columns of a Hessian that is factorised.


class Found(NamedTuple):
  """Result of one call of a solver.

  Attributes:
    weights: where it has arrived.
    passes: products with the features and with their transpose, in passes over
      the data; ``None`` if it does not say.
    compiling: seconds of the call that went into compilation, as far as it is
      known from the call itself.
  """

  weights: np.ndarray
  passes: float | None
  compiling: float = 0.0


class Solver(NamedTuple):
  """A solver.

  Attributes:
    package: the package that it is in.
    prepare: makes a call without arguments from a problem and an effort.
    efforts: numbers of iterations, or tolerances, in the order of the work.
    accepts: whether it can solve a problem.
    is_stochastic: whether its steps are on batches of examples.
    uses_jax: whether its first call compiles.
  """

  package: str
  prepare: Callable[[Problem, Any], Callable[[], Found]]
  efforts: Sequence[float]
  accepts: Callable[[Problem], bool] = lambda problem: True
  is_stochastic: bool = True
  uses_jax: bool = False


def _fit_linear(problem: Problem, tol: float) -> Callable[[], Found]:
  loss = (
    optax.losses.sigmoid_binary_cross_entropy
    if problem.is_binary
    else optax.losses.softmax_cross_entropy_with_integer_labels
  )

  def run() -> Found:
    fit = optax_svrg.fit_linear(
      loss,
      problem.features,
      problem.labels,
      l2=problem.l2,
      l1=problem.l1,
      intercept=False,
      tol=tol,
    )
    return Found(np.asarray(fit.weights), fit.num_epochs)

  return run


def _logits(weights: jax.Array, features: jax.Array) -> jax.Array:
  logits = features @ weights
  is_binary = logits.shape[1] == 1
  return jnp.pad(logits, ((0, 0), (1, 0))) if is_binary else logits


# Cached: programs are compiled for each function object.
@functools.lru_cache
def _mean_loss(l2: float) -> Callable[..., jax.Array]:
  """The smooth part of the objective."""

  def loss(
    weights: jax.Array, features: jax.Array, labels: jax.Array
  ) -> jax.Array:
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      _logits(weights, features), labels
    )
    return jnp.mean(losses) + l2 / 2 * jnp.sum(weights**2)

  return loss


@functools.lru_cache
def _batch_loss(l2: float) -> Callable[..., jax.Array]:
  return lambda weights, batch: _mean_loss(l2)(weights, *batch)


def _minimize(method: str, problem: Problem, tol: float) -> Callable[[], Found]:
  loss = _batch_loss(problem.l2)
  prox = optax_svrg.prox_l1(problem.l1) if problem.l1 else None

  def run() -> Found:
    result = optax_svrg.minimize(
      loss,
      jnp.zeros(problem.shape),
      (problem.features, problem.labels),
      method=method,
      prox=prox,
      tol=tol,
    )
    passes = result.num_epochs + len(result.history)
    passes += _passes_of_estimates(result.num_epochs, len(problem.labels))
    return Found(np.asarray(result.params), passes)

  return run


def _passes_of_estimates(num_epochs: int, num_examples: int) -> float:
  """Passes of the step sizes of ``minimize``: 5 products, two passes each."""
  num_batches = num_examples // -(-num_examples // 100)
  passes, epoch = 0.0, 0
  while epoch < max(1, num_epochs):
    passes += 10 * min(max(8, epoch), num_batches) / num_batches
    epoch = max(1, 2 * epoch)
  return passes


def _scikit_learn(
  solver: str, problem: Problem, count: float
) -> Callable[[], Found]:
  """Iterations; for liblinear, which counts none, the tolerance."""
  is_count = solver != "liblinear"
  strength = problem.l2 + problem.l1
  model = LogisticRegression(
    C=1 / (strength * len(problem.labels)),
    l1_ratio=problem.l1 / strength,
    fit_intercept=False,
    solver=solver,
    tol=0.0 if is_count else count,
    max_iter=int(count) if is_count else 10_000,
    random_state=0,
  )

  def run() -> Found:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)
      model.fit(problem.features, problem.labels)
    is_first_order = solver in ("saga", "lbfgs")
    passes = float(model.n_iter_[0]) if is_first_order else None
    return Found(model.coef_.T, passes)

  return run


def _copt(name: str, problem: Problem, count: float) -> Callable[[], Found]:
  import copt  # Optional.
  import copt.penalty

  passes = {"saga": 1, "svrg": 3}[name]
  labels = problem.labels.astype(np.float64)
  loss = copt.loss.LogLoss(problem.features, labels, alpha=problem.l2)
  prox = None
  if problem.l1:
    prox = copt.penalty.L1Norm(problem.l1).prox_factory(problem.shape[0])

  def run() -> Found:
    times = [time.process_time()]
    np.random.seed(0)
    found = getattr(copt, f"minimize_{name}")(
      loss.partial_deriv,
      problem.features,
      labels,
      np.zeros(problem.shape[0]),
      step_size=1 / (3 * loss.max_lipschitz),  # As in its examples.
      alpha=problem.l2,
      prox=prox,
      max_iter=math.ceil(count / passes),
      tol=0.0,
      callback=lambda _: times.append(time.process_time()),
    )
    # The first iteration compiles; it is taken to be as long as the others.
    first, *others = np.diff(times[: 1 + math.ceil(count / passes)])
    compiling = max(0.0, float(first - np.mean(others)))
    return Found(found.x[:, None], passes * len(times[1:]), compiling)

  return run


def _nemos(problem: Problem, count: float) -> Callable[[], Found]:
  from nemos.solvers import ProxSVRG, SVRG  # Optional.

  loss = _mean_loss(problem.l2)
  features, labels = map(jnp.asarray, problem[:2])
  weights = jnp.zeros(problem.shape)
  # It has a rule for Poisson models only, so it gets the step of ours.
  chosen = np.random.default_rng(0).permutation(len(labels))[: 8 * _BATCH_SIZE]
  step_size = 1 / optax_svrg.smoothness(
    jax.grad(lambda w, batch: loss(w, *batch)),
    weights,
    [(features[i], labels[i]) for i in np.split(chosen, 8)],
    num_iters=5,
  )
  options = {
    "maxiter": math.ceil(count / 3),
    "key": jax.random.key(0),
    "stepsize": float(step_size),
    "tol": 0.0,
    "batch_size": _BATCH_SIZE,
  }
  if problem.l1:

    def prox(w: jax.Array, l1: jax.Array, scaling: Any = 1.0) -> jax.Array:
      return w - jnp.clip(w, -l1 * scaling, l1 * scaling)

    solve = ProxSVRG(loss, prox, **options).run
    args: tuple[Any, ...] = (weights, problem.l1, features, labels)
  else:
    solve = SVRG(loss, **options).run
    args = (weights, features, labels)

  def run() -> Found:
    start = time.process_time()
    compiled = jax.jit(solve).lower(*args).compile()
    compiling = time.process_time() - start
    found, state = compiled(*args)[:2]
    return Found(np.asarray(found), 3.0 * int(state.iter_num) + 1, compiling)

  return run


def _scipy(problem: Problem, count: float) -> Callable[[], Found]:
  """L-BFGS; with l1, L-BFGS-B on positive and negative parts of weights."""
  value_and_grad = _compiled_gradient(problem.l2)
  features, labels = map(jnp.asarray, problem[:2])
  size, l1 = math.prod(problem.shape), problem.l1

  def smooth(w: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = value_and_grad(w.reshape(problem.shape), features, labels)
    return float(value), np.asarray(grad).ravel()

  def split(parts: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = smooth(parts[:size] - parts[size:])
    return value + l1 * parts.sum(), np.concatenate([grad + l1, l1 - grad])

  def run() -> Found:
    found = scipy.optimize.minimize(
      split if l1 else smooth,
      np.zeros(2 * size if l1 else size),
      jac=True,
      method="L-BFGS-B",
      bounds=[(0, None)] * (2 * size) if l1 else None,
      options={"maxiter": int(count), "maxfun": 10**6, "ftol": 0, "gtol": 0},
    )
    w = found.x[:size] - found.x[size:] if l1 else found.x
    return Found(w, float(found.nfev))

  return run


@functools.lru_cache
def _compiled_gradient(l2: float) -> Callable[..., Any]:
  return jax.jit(jax.value_and_grad(_mean_loss(l2)))


def _is_l2(problem: Problem) -> bool:
  return not problem.l1


_PASSES = tuple(25 * 2**k for k in range(6))
_PARTIAL = functools.partial
SOLVERS = {
  "fit_linear": Solver(
    "optax_svrg",
    _fit_linear,
    [10 ** (-k / 2) for k in range(4, 18)],
    uses_jax=True,
  ),
  **{
    f"minimize, {method}": Solver(
      "optax_svrg",
      _PARTIAL(_minimize, method),
      [10.0**-k for k in range(3, 8)],
      uses_jax=True,
    )
    for method in ("saga", "svrg")
  },
  BASELINE: Solver("scikit-learn", _PARTIAL(_scikit_learn, "saga"), _PASSES),
  **{
    f"copt {name}": Solver(
      "copt", _PARTIAL(_copt, name), _PASSES, lambda problem: problem.is_binary
    )
    for name in ("saga", "svrg")
  },
  "nemos SVRG": Solver("nemos", _nemos, _PASSES),
  "scikit-learn lbfgs": Solver(
    "scikit-learn",
    _PARTIAL(_scikit_learn, "lbfgs"),
    _PASSES,
    _is_l2,
    is_stochastic=False,
  ),
  "scikit-learn newton-cholesky": Solver(
    "scikit-learn",
    _PARTIAL(_scikit_learn, "newton-cholesky"),
    [4, 8, 16],
    lambda problem: _is_l2(problem) and math.prod(problem.shape) <= _MAX_NEWTON,
    is_stochastic=False,
  ),
  "scikit-learn liblinear": Solver(
    "scikit-learn",
    _PARTIAL(_scikit_learn, "liblinear"),
    [10.0**-k for k in range(1, 10)],
    lambda problem: problem.is_binary,
    is_stochastic=False,
  ),
  "SciPy L-BFGS, compiled gradient": Solver(
    "scipy", _scipy, _PASSES, is_stochastic=False, uses_jax=True
  ),
}


def versions() -> dict[str, str | None]:
  """The packages of the solvers, ``None`` where one is not installed."""
  found: dict[str, str | None] = {}
  for package in dict.fromkeys(solver.package for solver in SOLVERS.values()):
    try:
      found[package] = importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found
