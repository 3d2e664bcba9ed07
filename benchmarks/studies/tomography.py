# SPDX-License-Identifier: Apache-2.0
"""Poisson tomography by subsets: ``python -m benchmarks tomography``.

SVRG with a table of the gradients of fixed subsets of angles, as a chain of
Optax parts: the correction, a diagonal preconditioner, which is a learning rate
for each pixel and renewed at chosen epochs, and a projection after the step.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
import time
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from benchmarks import cli
from benchmarks.harness import figures, publishing, report, store
import optax_svrg

SIZE, NUM_ANGLES, NUM_BINS, NUM_SUBSETS = 64, 60, 95, 20
TARGET = 0.01  # Relative error of the image.
_BACKGROUND, _COUNTS = 0.5, 8.0  # Counts of the brightest bin: about 300.
_SMOOTHNESS, _EDGE = 0.3, 0.1  # Of the prior.
_RENEWALS = (0, 1, 2, 4, 8)  # Epochs at which the preconditioner is renewed.
_MOMENTUM = 0.8
_ITERATIONS, _RESTARTS = 400, 3
_START = 0.3  # Value of all pixels.
# Whether it corrects, and has momentum.
_METHODS = {
  "SVRG, preconditioned, momentum": (True, True),
  "SVRG, preconditioned": (True, False),
  "subset descent, preconditioned, momentum": (False, True),
  "subset descent, preconditioned": (False, False),
}
_LBFGS = "L-BFGS-B"
NOTES = f"""\
Poisson counts of a {SIZE} x {SIZE} image at {NUM_ANGLES} angles x {NUM_BINS}
bins, a smooth penalty of differences of neighbours, no negative values;
{NUM_SUBSETS} fixed subsets of angles, in a new random order each epoch. SVRG
takes the gradients of the snapshot from a table, renewed each epoch. Steps are
1; the diagonal preconditioner is renewed at epochs 0, 1, 2, 4 and 8; momentum
is Nesterov's, {_MOMENTUM}. The error is the distance from the converged image,
over its norm. Seconds are those of the processor, on one core, without
compilation, in float64; all methods share the code of the projections."""

Subset = dict[str, jax.Array]
# Images, and the seconds of the processor until then.
Curve = list[tuple[np.ndarray, float]]


def phantom() -> np.ndarray:
  """An image of ellipses, from 0 to 1."""
  y, x = np.mgrid[:SIZE, :SIZE] * 2 / (SIZE - 1) - 1
  image = np.zeros((SIZE, SIZE))
  for value, a, b, x0, y0, angle in (
    (0.6, 0.69, 0.92, 0.0, 0.0, 0.0),
    (-0.3, 0.64, 0.86, 0.0, 0.02, 0.0),
    (0.4, 0.21, 0.25, 0.0, -0.35, 0.0),
    (-0.25, 0.11, 0.31, 0.22, 0.0, -0.3),
    (-0.25, 0.16, 0.41, -0.22, 0.0, 0.3),
    (0.5, 0.08, 0.08, 0.1, 0.45, 0.0),
    (0.7, 0.05, 0.08, -0.15, 0.6, 0.5),
  ):
    c, s = np.cos(angle), np.sin(angle)
    u, v = c * (x - x0) + s * (y - y0), c * (y - y0) - s * (x - x0)
    image[(u / a) ** 2 + (v / b) ** 2 <= 1] += value
  return image.clip(0).ravel()


def project(image: jax.Array, bins: jax.Array, shares: jax.Array) -> jax.Array:
  """Sums along parallel rays, ``(angles, bins)``."""
  angles = jnp.arange(len(bins))[:, None]
  out = jnp.zeros((len(bins), NUM_BINS), image.dtype)
  out = out.at[angles, bins].add((1 - shares) * image)
  return out.at[angles, bins + 1].add(shares * image)


def expected(image: jax.Array, subset: Subset) -> jax.Array:
  """Means of the counts of an image."""
  sums = project(image, subset["bins"], subset["shares"])
  return _COUNTS * sums + _BACKGROUND


def make_subsets() -> Subset:
  """Poisson data; a leading axis of subsets, each of angles far apart."""
  angles = np.arange(NUM_ANGLES) * np.pi / NUM_ANGLES
  y, x = (np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2).reshape(2, -1)
  position = np.outer(np.cos(angles), x) + np.outer(np.sin(angles), y)
  position += (NUM_BINS - 1) / 2
  bins = np.floor(position).astype(np.int32)
  data = {"bins": bins, "shares": position - bins}
  mean = expected(jnp.asarray(phantom()), data)
  data["counts"] = np.random.default_rng(0).poisson(mean).astype(float)
  divide = lambda x: x.reshape(-1, NUM_SUBSETS, x.shape[-1]).swapaxes(0, 1)
  return {name: jnp.asarray(divide(x)) for name, x in data.items()}


def prior(image: jax.Array) -> jax.Array:
  """A smooth penalty of differences of neighbours, linear at edges."""
  square = image.reshape(SIZE, SIZE)
  return _SMOOTHNESS * sum(
    jnp.sum(jnp.sqrt(jnp.diff(square, axis=axis) ** 2 + _EDGE**2) - _EDGE)
    for axis in (0, 1)
  )


def loss(image: jax.Array, subset: Subset) -> jax.Array:
  """The objective times the number of subsets, from the data of one."""
  mean = expected(image, subset)
  nll = jnp.sum(mean - subset["counts"] * jnp.log(mean))
  return NUM_SUBSETS * nll + prior(image)


def objective(image: jax.Array, subsets: Subset) -> jax.Array:
  """Negative log likelihood and prior."""
  return jnp.mean(jax.vmap(loss, (None, 0))(image, subsets))


@jax.jit
def diagonal(image: jax.Array, subsets: Subset) -> jax.Array:
  """One over a diagonal that is not below the Hessian of the objective."""

  def surrogate(subset: Subset) -> jax.Array:
    forward = lambda x: _COUNTS * project(x, subset["bins"], subset["shares"])
    mean, adjoint = jax.vjp(forward, image)
    curvature = subset["counts"] / (mean + _BACKGROUND) ** 2
    return adjoint(curvature * forward(jnp.ones_like(image)))[0]

  of_data = jnp.sum(jax.vmap(surrogate)(subsets), axis=0)
  # Each of four neighbours: twice the largest curvature.
  return 1 / (of_data + 8 * _SMOOTHNESS / _EDGE)


def _stopwatch() -> Callable[[Any], tuple[np.ndarray, float]]:
  """Starts; returns a function from an image to it and the seconds since."""
  start = time.process_time()
  return lambda image: (np.array(image), time.process_time() - start)


def by_subsets(
  has_correction: bool, has_momentum: bool, subsets: Subset, epochs: int
) -> Curve:
  """Steps through the subsets in random order."""
  precondition = optax.inject_hyperparams(optax.scale_by_learning_rate)
  tx = optax.chain(
    optax_svrg.alpha_svrg(1.0) if has_correction else optax.identity(),
    precondition(learning_rate=jnp.ones(SIZE**2)),
    optax.trace(_MOMENTUM, nesterov=True) if has_momentum else optax.identity(),
  )
  grad_fn = jax.grad(loss)
  subset_of = lambda i: jax.tree.map(lambda x: x[i], subsets)
  batches = list(map(subset_of, range(NUM_SUBSETS)))

  @jax.jit
  def epoch(image, state, table, order):
    def step(carry, i):
      image, state = carry
      extra = {"snapshot_grads": table[i]} if has_correction else {}
      grads = grad_fn(image, subset_of(i))
      updates, state = tx.update(grads, state, image, **extra)
      image = optax.apply_updates(image, updates)
      return (optax.projections.projection_non_negative(image), state), None

    return jax.lax.scan(step, (image, state), order)[0]

  def run(epochs: int) -> Curve:
    rng = np.random.default_rng(0)
    curve, timed = [], _stopwatch()
    image, table = jnp.full(SIZE**2, _START), None
    state = tx.init(image)
    for number in range(epochs):
      if number in _RENEWALS:
        state = optax.tree.set(state, learning_rate=diagonal(image, subsets))
      if has_correction:
        mean, table = optax_svrg.gradient_table(grad_fn, image, batches)
        state = optax_svrg.take_snapshot(state, image, lambda _: mean)  # noqa: B023
      order = rng.permutation(NUM_SUBSETS)
      image, state = epoch(image, state, table, order)
      curve.append(timed(image))
    return curve

  run(2)  # Compiles.
  return run(epochs)


def by_lbfgs(subsets: Subset, iterations: int, image: np.ndarray) -> Curve:
  """SciPy's L-BFGS-B on a compiled gradient."""
  compiled = jax.jit(jax.value_and_grad(objective))
  jax.block_until_ready(compiled(image, subsets))
  curve, timed = [], _stopwatch()
  scipy.optimize.minimize(
    compiled,
    image,
    (subsets,),
    jac=True,
    method="L-BFGS-B",
    bounds=[(0, None)] * SIZE**2,
    callback=lambda image: curve.append(timed(image)),
    options={"maxiter": iterations, "maxfun": 10**6, "ftol": 0, "gtol": 1e-8},
  )
  return curve


def _reference(subsets: Subset) -> tuple[np.ndarray, float]:
  """The converged image, and the norm of its projected gradient."""
  image = np.full(SIZE**2, _START)
  for _ in range(_RESTARTS):
    image = by_lbfgs(subsets, 2 * _ITERATIONS, image)[-1][0]
  gradient = np.asarray(jax.grad(objective)(jnp.asarray(image), subsets))
  projected = np.where(image > 0, gradient, np.minimum(gradient, 0))
  return image, float(np.linalg.norm(projected))


def first_below(curve: Mapping[str, Any], target: float) -> float | None:
  """Seconds until the error is below a target."""
  pairs = zip(curve["seconds"], curve["error"], strict=True)
  return next((seconds for seconds, error in pairs if error <= target), None)


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """Makes the published files from the stored curves."""
  curves = document["curves"]
  base = first_below(curves[_LBFGS], TARGET)
  rows, lines = [], []
  for name, curve in curves.items():
    seconds = [first_below(curve, error) for error in (0.1, TARGET)]
    texts = ("not reached" if s is None else f"{s:#.2g}" for s in seconds)
    rows.append(
      [
        *(name, *texts),
        f"{seconds[1] / base:.2f}" if base and seconds[1] else "",
        *(f"{curve['error'][-1]:.1e}", f"{curve['seconds'][-1]:#.2g}"),
      ]
    )
    family = "saga" if name == _LBFGS else "svrg" if "SVRG" in name else "plain"
    y = [e if e < 10 else None for e in curve["error"]]
    lines.append(figures.Line(name, family, curve["seconds"], y))
  columns = ["method", "s to 10 %", "s to 1 %", "of L-BFGS-B's"]
  table = report.markdown_table([*columns, "last error", "after s"], rows)
  parts = [
    "# Poisson tomography by subsets",
    f"    {document['command']}",
    f"{NOTES}\nThe projected gradient at the converged image has the norm"
    f" {document['gradient_norm']:.0e}.",
    table,
  ]
  panel = figures.Panel(
    "Image error", "seconds", "error", lines, references=[(TARGET, "1 %")]
  )
  figure = figures.Figure("Poisson tomography", [panel])
  return publishing.files(parts, figure)


@click.command()
@cli.options(
  ("--epochs", cli.positive, 40, ""),
  ("--iterations", cli.positive, _ITERATIONS, ""),
)
@cli.out_option("tomography")
@cli.publish_option
def main(epochs: int, iterations: int, out: Path, publish: bool) -> None:
  """Reconstructs an image by SVRG over subsets, and by L-BFGS-B."""
  with jax.enable_x64(True):
    subsets = make_subsets()
    image, gradient_norm = _reference(subsets)
    start = np.full(SIZE**2, _START)
    curves = {_LBFGS: by_lbfgs(subsets, iterations, start)}
    for name, parts in _METHODS.items():
      curves[name] = by_subsets(*parts, subsets, epochs)
  norm = np.linalg.norm(image)
  document = {
    "module": __name__,
    "command": "python -m benchmarks tomography",
    **store.environment(),
    "gradient_norm": gradient_norm,
    "curves": {
      name: {
        "seconds": [float(f"{s:.4g}") for _, s in curve],
        "error": [
          float(f"{np.linalg.norm(x - image) / norm:.4g}") for x, _ in curve
        ],
      }
      for name, curve in curves.items()
    },
  }
  store.write_json(out / "runs.json", document)
  publishing.show("tomography", document, publish)
