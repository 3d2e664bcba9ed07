# SPDX-License-Identifier: Apache-2.0
"""The solvers: those of this package, and those of others."""

from collections.abc import Callable, Sequence
import functools
import math
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
_MAX_NEWTON = 3_000  # Columns of a Hessian that is factorised.


class Found(NamedTuple):
  """Result of one call of a solver."""

  weights: np.ndarray  # Where it has arrived.
  # Products with the features and with their transpose, in passes over the
  # data; `None` if it does not say.
  passes: float | None


class Solver(NamedTuple):
  """A solver."""

  solve: Callable[[Problem, Any], Found]  # Solves a problem with an effort.
  # Numbers of iterations, or tolerances, in the order of the work.
  efforts: Sequence[float]
  # Whether it can solve a problem.
  accepts: Callable[[Problem], bool] = lambda problem: True
  uses_jax: bool = False  # Whether its first call compiles.


def _fit_linear(problem: Problem, tol: float) -> Found:
  loss = (
    optax.losses.sigmoid_binary_cross_entropy
    if problem.is_binary
    else optax.losses.softmax_cross_entropy_with_integer_labels
  )
  x, y, l2, l1 = problem
  fit = optax_svrg.fit_linear(
    loss, x, y, l2=l2, l1=l1, intercept=False, tol=tol
  )
  return Found(np.asarray(fit.weights), fit.num_epochs)


# Cached: programs are compiled for each function object.
@functools.lru_cache
def _mean_loss(l2: float) -> tuple[Callable[..., jax.Array], Callable]:
  """The smooth part of the objective; compiled, with its gradient."""

  def loss(weights: jax.Array, batch: Any) -> jax.Array:
    features, labels = batch
    logits = features @ weights
    if logits.shape[1] == 1:
      logits = jnp.pad(logits, ((0, 0), (1, 0)))
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    )
    return jnp.mean(losses) + l2 / 2 * jnp.sum(weights**2)

  return loss, jax.jit(jax.value_and_grad(loss))


def _minimize(method: str, problem: Problem, tol: float) -> Found:
  start, data = jnp.zeros(problem.shape), (problem.features, problem.labels)
  prox = optax_svrg.prox_l1(problem.l1) if problem.l1 else None
  loss, _ = _mean_loss(problem.l2)
  result = optax_svrg.minimize(
    loss, start, data, method=method, prox=prox, tol=tol
  )
  passes = result.num_epochs + len(result.history)
  passes += _passes_of_estimates(result.num_epochs, len(problem.labels))
  return Found(np.asarray(result.params), passes)


def _passes_of_estimates(num_epochs: int, num_examples: int) -> float:
  """Passes of the step sizes of ``minimize``: 5 products, two passes each."""
  num_batches = num_examples // -(-num_examples // 100)
  epochs = [0, *(2**k for k in range(20) if 2**k < num_epochs)]
  return sum(10 * min(max(8, i), num_batches) / num_batches for i in epochs)


def _scikit_learn(solver: str, problem: Problem, count: float) -> Found:
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
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ConvergenceWarning)
    model.fit(problem.features, problem.labels)
  is_first_order = solver in ("saga", "lbfgs")
  passes = float(model.n_iter_[0]) if is_first_order else None
  return Found(model.coef_.T, passes)


def _scipy(problem: Problem, count: float) -> Found:
  """L-BFGS; with l1, L-BFGS-B on positive and negative parts of weights."""
  _, value_and_grad = _mean_loss(problem.l2)
  data = tuple(map(jnp.asarray, problem[:2]))
  size, l1 = math.prod(problem.shape), problem.l1

  def smooth(w: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = value_and_grad(w.reshape(problem.shape), data)
    return float(value), np.asarray(grad).ravel()

  def split(parts: np.ndarray) -> tuple[float, np.ndarray]:
    value, grad = smooth(parts[:size] - parts[size:])
    return value + l1 * parts.sum(), np.concatenate([grad + l1, l1 - grad])

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


def _is_small_l2(problem: Problem) -> bool:
  return not problem.l1 and math.prod(problem.shape) <= _MAX_NEWTON


_PASSES = tuple(25 * 2**k for k in range(6))
SOLVERS = {
  "fit_linear": Solver(
    _fit_linear, [10 ** (-k / 2) for k in range(4, 18)], uses_jax=True
  ),
  **{
    f"minimize, {method}": Solver(
      functools.partial(_minimize, method),
      [10.0**-k for k in range(3, 8)],
      uses_jax=True,
    )
    for method in ("saga", "svrg")
  },
  **{
    f"scikit-learn {name}": Solver(
      functools.partial(_scikit_learn, name), efforts, accepts
    )
    for name, efforts, accepts in (
      ("saga", _PASSES, lambda problem: True),
      ("lbfgs", _PASSES, lambda problem: not problem.l1),
      ("newton-cholesky", [4, 8, 16], _is_small_l2),
      (
        "liblinear",
        [10.0**-k for k in range(1, 10)],
        lambda problem: problem.is_binary,
      ),
    )
  },
  "SciPy L-BFGS, compiled gradient": Solver(_scipy, _PASSES, uses_jax=True),
}
