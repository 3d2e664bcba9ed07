# SPDX-License-Identifier: Apache-2.0
"""Measures the variance of gradients, and the best coefficient, over training.

Run ``python -m benchmarks.variance --help``.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import itertools
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click
from flax import nnx
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np
import optax

from benchmarks import reporting, train
from benchmarks.data import arrays as data
from benchmarks.models import small as models
import optax_svrg

# Constant over training; what the paper's analysis had is not known.
LEARNING_RATES = {"sgd": 0.1, "adamw": 0.001}
METHODS = ("plain", "svrg", "alpha-svrg", "adaptive", "optimal")
METRICS = optax_svrg.GradientVariance._fields
_ROWS = {
  "cosine_distance": "directional",
  "total_variance": "total variance",
  "spectral_norm": "spectral norm",
  "train_loss": "train loss",
}

# The paper's optimal coefficient by epoch: mean over the epoch without the
# snapshot, and mean over the last 15 % of it. CIFAR-10, batches of 1024,
# digitised from the figures of its project page.
PAPER = {
  ("logreg", "sgd"): (
    *((0.81, 0.79), (0.95, 0.95), (0.96, 0.96), (0.96, 0.96), (0.96, 0.96)),
    *((0.96, 0.96), (0.98, 0.97), (0.97, 0.97), (0.96, 0.95), (0.95, 0.95)),
  ),
  ("mlp2", "sgd"): (
    *((0.45, 0.39), (0.84, 0.79), (0.79, 0.76), (0.77, 0.75), (0.76, 0.73)),
    *((0.73, 0.71), (0.75, 0.72), (0.72, 0.69), (0.67, 0.63), (0.66, 0.64)),
  ),
  ("mlp4", "sgd"): (
    *((0.77, 0.91), (0.88, 0.82), (0.75, 0.71), (0.69, 0.63), (0.71, 0.65)),
    *((0.67, 0.61), (0.68, 0.62), (0.58, 0.53), (0.56, 0.51), (0.52, 0.47)),
  ),
  ("logreg", "adamw"): (
    *((0.80, 0.79), (0.89, 0.89), (0.87, 0.87), (0.89, 0.88), (0.90, 0.89)),
    *((0.90, 0.90), (0.90, 0.90), (0.92, 0.92), (0.91, 0.91), (0.88, 0.88)),
  ),
  ("mlp2", "adamw"): (
    *((0.23, 0.17), (0.70, 0.60), (0.72, 0.67), (0.69, 0.64), (0.67, 0.63)),
    *((0.67, 0.65), (0.66, 0.60), (0.63, 0.60), (0.61, 0.59), (0.53, 0.53)),
  ),
  ("mlp4", "adamw"): (
    *((0.10, 0.09), (0.63, 0.54), (0.65, 0.57), (0.59, 0.55), (0.61, 0.53)),
    *((0.59, 0.54), (0.57, 0.53), (0.53, 0.49), (0.53, 0.47), (0.47, 0.41)),
  ),
}


class OptimalState(NamedTuple):
  """State of :func:`optimal_svrg`.

  Attributes:
    svrg: what all methods of this family have.
    alphas: a coefficient for each component, set from outside.
  """

  svrg: optax_svrg.SVRGState
  alphas: Any


def optimal_svrg() -> optax.GradientTransformationExtraArgs:
  """SVRG with a coefficient for each component, which somebody else finds."""
  svrg = optax_svrg.alpha_svrg(1.0)

  def init_fn(params):
    return OptimalState(svrg.init(params), jax.tree.map(jnp.ones_like, params))

  def update_fn(updates, state, params=None, *, grad_fn):
    s = grad_fn(state.svrg.snapshot_params)
    updates = corrected(updates, s, state.svrg.mean_grads, state.alphas)
    # For the record, as the paper draws it.
    alpha = mean_of_live(state.alphas)
    return updates, state._replace(svrg=state.svrg._replace(alpha=alpha))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def corrected(grads: Any, snapshot_grads: Any, mean: Any, alphas: Any) -> Any:
  """The estimator; coefficients that are NaN count as 0."""
  alphas = jax.tree.map(jnp.nan_to_num, alphas)
  return jax.tree.map(
    lambda g, s, m, a: g - a * (s - m), grads, snapshot_grads, mean, alphas
  )


def mean_of_live(alphas: Any) -> jax.Array:
  """Mean over all components that have a coefficient, i.e. are not NaN."""
  leaves = [jnp.ravel(a) for a in jax.tree.leaves(alphas)]
  return jnp.nanmean(jnp.concatenate(leaves))


class Point(NamedTuple):
  """What is measured at one moment, over all batches of the epoch.

  What a method does not have is NaN.

  Attributes:
    epoch: number of epochs trained, with a fraction.
    train_loss: mean loss over the batches.
    cosine_distance: see :class:`optax_svrg.GradientVariance`, of the corrected
      gradients; likewise the next two.
    total_variance: see there.
    spectral_norm: see there.
    alpha: the coefficient of the next step; its mean for one per component.
    optimal_component: mean of the best coefficients of all components.
    optimal_tree: the best single coefficient.
    variance_ratio: variance of the corrected gradients divided by that of the
      plain ones.
    estimated_ratio: that as estimated online by adaptive SVRG.
  """

  epoch: float
  train_loss: float
  cosine_distance: float
  total_variance: float
  spectral_norm: float
  alpha: float
  optimal_component: float
  optimal_tree: float
  variance_ratio: float
  estimated_ratio: float


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all trainings have in common.

  Attributes:
    epochs: number of epochs.
    batch_size: number of examples of a batch.
    points: measurements per epoch of adaptive, and how often the coefficients
      of ``optimal`` are found anew.
    sparse_points: measurements per epoch of the other methods.
  """

  epochs: int
  batch_size: int
  points: int
  sparse_points: int


class Training:
  """Trains one model with one optimizer, and measures on the way.

  Args:
    settings: what all trainings have in common.
    dataset: the data set, its arrays on the device.
    model: name of the model.
    optimizer: name of the optimizer.
    method: name of the method.
  """

  def __init__(
    self,
    settings: Settings,
    dataset: data.Dataset,
    model: str,
    optimizer: str,
    method: str,
  ):
    self._settings = settings
    self._method = method
    self._num_examples = len(dataset.train_labels)
    self._steps = self._num_examples // settings.batch_size
    self._train = (dataset.train_images, dataset.train_labels)
    self._graphdef, params = nnx.split(
      models.MODELS[model](
        dataset.image_shape, dataset.num_classes, rngs=nnx.Rngs(0)
      ),
      nnx.Param,
    )
    self._params = nnx.as_pure(params)
    self._grad = jax.grad(self._loss)
    transforms = {
      "plain": optax.identity,
      "svrg": lambda: optax_svrg.alpha_svrg(1.0),
      "alpha-svrg": lambda: optax_svrg.alpha_svrg(
        optax_svrg.linear_decay(0.75, settings.epochs, self._steps)
      ),
      "adaptive": optax_svrg.adaptive_svrg,
      "optimal": optimal_svrg,
    }
    self._transform = optax.with_extra_args_support(transforms[method]())
    self._optimizer = train.OPTIMIZERS[optimizer].make(
      lambda _: LEARNING_RATES[optimizer]
    )
    # Compiled functions of its own, which end with it.
    self._begin = jax.jit(self._begin_fn)
    self._advance = jax.jit(self._advance_fn)
    self._measure = jax.jit(self._measure_fn)

  def run(self) -> tuple[list[Point], np.ndarray]:
    """Trains.

    Returns:
      The measurements, and the coefficients of all steps, an array of the shape
      (epochs, steps per epoch).
    """
    settings = self._settings
    state = self._transform.init(self._params)
    opt_state = self._optimizer.init(self._params)
    carry = (self._params, state, opt_state)
    points, alphas = [], []
    is_dense = self._method in ("adaptive", "optimal")
    dense = self._starts(settings.points if is_dense else 0)
    sparse = self._starts(settings.sparse_points)
    for epoch in range(settings.epochs):
      batches, snapshot_grads, carry = self._begin(epoch, carry, self._train)
      used = jnp.zeros(self._steps)
      stops = sorted({*dense, *sparse})
      for start, stop in itertools.pairwise([*stops, self._steps]):
        measured, optimal = self._measure(batches, snapshot_grads, carry)
        if self._method == "adaptive" or start in sparse:
          points.append(self._point(epoch + start / self._steps, measured))
        if self._method == "optimal":
          params, state, opt_state = carry
          carry = (params, state._replace(alphas=optimal), opt_state)
        carry, used = self._advance(batches, carry, used, start, stop)
      alphas.append(np.asarray(used))
    return points, np.stack(alphas)

  def _starts(self, points: int) -> list[int]:
    """The steps before which something is measured, the first one always."""
    last = self._steps - 1
    return sorted(
      {0, *np.linspace(0, last, max(points, 1), dtype=int).tolist()}
    )

  def _point(self, epoch: float, measured: Mapping[str, Any]) -> Point:
    return Point(epoch, **{name: float(x) for name, x in measured.items()})

  def _loss(self, params: optax.Params, batch: Any) -> jax.Array:
    images, labels = batch
    logits = nnx.merge(self._graphdef, params)(images)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def _grads(self, params: optax.Params, batches: Any) -> Any:
    """The gradients of all batches, with a leading axis."""
    return jax.lax.map(lambda batch: self._grad(params, batch), batches)

  def _begin_fn(
    self, epoch: Any, carry: Any, train_set: Any
  ) -> tuple[Any, Any, Any]:
    """The batches of an epoch, and a snapshot over these very batches."""
    params, state, opt_state = carry
    shape = (self._steps, self._settings.batch_size)
    key = jax.random.fold_in(jax.random.key(1), epoch)
    order = jax.random.permutation(key, self._num_examples)
    order = order[: self._steps * self._settings.batch_size].reshape(shape)
    batches = jax.tree.map(lambda x: x[order], train_set)
    if self._method == "plain":
      return batches, None, carry
    grads = self._grads(params, batches)
    mean = jax.tree.map(lambda s: s.mean(axis=0), grads)
    state = optax_svrg.take_snapshot(state, params, lambda _: mean)
    return batches, grads, (params, state, opt_state)

  def _advance_fn(
    self, batches: Any, carry: Any, used: Any, start: Any, stop: Any
  ) -> tuple[Any, Any]:
    """Trains from one step of the epoch to another."""

    def step(i, carry_and_used):
      (params, state, opt_state), used = carry_and_used
      batch = jax.tree.map(lambda x: x[i], batches)
      grad_fn = lambda p: self._grad(p, batch)
      updates, state = self._transform.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      updates, opt_state = self._optimizer.update(updates, opt_state, params)
      params = optax.apply_updates(params, updates)
      alpha = optax.tree.get(state, "alpha", 0.0)
      return (params, state, opt_state), used.at[i].set(alpha)

    return jax.lax.fori_loop(start, stop, step, (carry, used))

  def _measure_fn(
    self, batches: Any, snapshot_grads: Any, carry: Any
  ) -> tuple[dict[str, Any], Any]:
    """All of a :class:`Point` but the epoch, and the best coefficients."""
    params, state, _ = carry
    grads = self._grads(params, batches)
    loss = jax.lax.map(lambda batch: self._loss(params, batch), batches).mean()
    plain = optax_svrg.gradient_variance(grads)
    unknown = jnp.nan
    if self._method == "plain":
      values = (0.0, unknown, unknown, 1.0, unknown)
      return self._measured(loss, plain, values), None

    # Within the bounds of the authors' code.
    optimal = jax.tree.map(
      lambda a: jnp.clip(a, -2, 2),
      optax_svrg.optimal_alpha(grads, snapshot_grads),
    )
    if self._method == "optimal":
      alphas, alpha = optimal, mean_of_live(optimal)
    else:
      # What the next step will use.
      first = lambda tree: jax.tree.map(lambda x: x[0], tree)
      _, after = self._transform.update(
        first(grads), state, params, snapshot_grads=first(snapshot_grads)
      )
      alpha = optax.tree.get(after, "alpha")
      alphas = jax.tree.map(lambda _: alpha, params)
    mean = optax.tree.get(state, "mean_grads")
    after_correction = optax_svrg.gradient_variance(
      jax.vmap(corrected, (0, 0, None, None))(
        grads, snapshot_grads, mean, alphas
      )
    )
    values = (
      alpha,
      mean_of_live(optimal),
      optax_svrg.optimal_alpha(grads, snapshot_grads, per="tree"),
      after_correction.total_variance / plain.total_variance,
      optax.tree.get(state, "variance_ratio", unknown),
    )
    return self._measured(loss, after_correction, values), optimal

  @staticmethod
  def _measured(
    loss: Any, variance: optax_svrg.GradientVariance, values: Sequence[Any]
  ) -> dict[str, Any]:
    return {
      "train_loss": loss,
      **variance._asdict(),
      **dict(zip(Point._fields[5:], values, strict=True)),
    }


class EpochMeans(NamedTuple):
  """An epoch in three numbers, the first two as the paper's values are given.

  Attributes:
    mean: mean over the epoch without the moment of the snapshot.
    end: mean over the last 15 % of the epoch; its last measurement if there is
      none in that part.
    start: at the snapshot.
  """

  mean: float
  end: float
  start: float


def by_epoch(points: Sequence[Point], field: str) -> list[EpochMeans]:
  """Summarises each epoch of a training.

  Args:
    points: measurements of one training.
    field: what of them.

  Returns:
    An item for each epoch.
  """
  result = []
  for epoch, group in itertools.groupby(points, lambda p: int(p.epoch + 1e-9)):
    (_, start), *values = [(p.epoch - epoch, getattr(p, field)) for p in group]
    late = [y for x, y in values if x >= 0.85] or [values[-1][1]]
    result.append(
      EpochMeans(
        statistics.fmean(y for _, y in values), statistics.fmean(late), start
      )
    )
  return result


class Observation(NamedTuple):
  """One of the paper's observations, on our data.

  Attributes:
    claim: what the paper observes.
    case: where it was looked for.
    measured: the numbers.
    holds: whether they agree; ``None`` if a number is not finite.
  """

  claim: str
  case: str
  measured: str
  holds: bool | None


def observations(
  coefficients: Mapping[tuple[str, str], Sequence[EpochMeans]],
) -> list[Observation]:
  """Looks for the paper's observations.

  Args:
    coefficients: results of :func:`by_epoch` for the best coefficients, by
      model and optimizer.

  Returns:
    An observation for each case that the given models and optimizers allow.
  """
  # The first epoch is a subject of its own.
  overall = {
    key: statistics.fmean(epoch.mean for epoch in epochs[1:])
    for key, epochs in coefficients.items()
  }
  found = []

  def add(claim: str, case: str, values: Sequence[float], holds: bool) -> None:
    measured = ", ".join(f"{value:.2f}" for value in values)
    known = bool(np.isfinite(values).all())
    found.append(Observation(claim, case, measured, holds if known else None))

  optimizers = dict.fromkeys(optimizer for _, optimizer in coefficients)
  # From shallow to deep.
  names = sorted(
    {model for model, _ in coefficients}, key=models.NUM_LAYERS.__getitem__
  )
  for optimizer in optimizers:
    values = [overall[model, optimizer] for model in names]
    if len(values) > 1:
      falling = all(a > b for a, b in itertools.pairwise(values))
      add("deeper is smaller", optimizer, values, falling)
  for model in names:
    if {"sgd", "adamw"} <= set(optimizers):
      values = [overall[model, "sgd"], overall[model, "adamw"]]
      smaller = values[1] < values[0]
      add("AdamW is smaller than SGD", model, values, smaller)
  for (model, optimizer), epochs in coefficients.items():
    # It falls in each epoch, and by more than its end moves over training.
    falls = [epoch.start - epoch.end for epoch in epochs[1:]]
    drift = abs(epochs[-1].end - epochs[1].end)
    fall = statistics.fmean(falls)
    add(
      "saw-tooth: least and mean fall within an epoch, drift",
      f"{model} {optimizer}",
      [min(falls), fall, drift],
      min(falls) > 0 and fall > drift,
    )
  for (model, optimizer), epochs in coefficients.items():
    if model != "logreg":
      values = [epochs[1].end, epochs[-1].end]
      drop = values[1] < values[0]
      add("drop across training", f"{model} {optimizer}", values, drop)
  for (model, optimizer), epochs in coefficients.items():
    if model != "logreg" and optimizer == "adamw":
      values = [epochs[0].mean, epochs[1].mean]
      low = values[0] < 0.5 * values[1]
      add("very low first epoch under AdamW", model, values, low)
  return found


def coefficient_table(results: Mapping[tuple[str, str], Any]) -> str:
  """The best coefficient by epoch beside the paper's, in Markdown."""
  columns = ["epoch"]
  for model, optimizer in results:
    columns += [f"{model} {optimizer}", "paper"]
  lines = []
  ours = {
    key: by_epoch(methods["adaptive"][0], "optimal_component")
    for key, methods in results.items()
  }
  for epoch in range(len(next(iter(ours.values())))):
    line = [f"{epoch + 1}"]
    for key, values in ours.items():
      line.append(f"{values[epoch].mean:.2f} / {values[epoch].end:.2f}")
      paper = PAPER[key][epoch : epoch + 1]
      line.append("{:.2f} / {:.2f}".format(*paper[0]) if paper else "")
    lines.append(line)
  return reporting.markdown_table(columns, lines)


def estimate_table(results: Mapping[tuple[str, str], Any]) -> str:
  """What is estimated online beside the truth, in Markdown."""
  lines = []
  for (model, optimizer), methods in results.items():
    points = [p for p in methods["adaptive"][0] if p.epoch % 1 > 1e-9]
    mean = lambda field, points=points: statistics.fmean(
      getattr(point, field) for point in points
    )
    error = statistics.fmean(abs(p.alpha - p.optimal_tree) for p in points)
    lines.append(
      [
        f"{model} {optimizer}",
        f"{mean('optimal_tree'):.3f}",
        f"{mean('alpha'):.3f}",
        f"{error:.3f}",
        f"{mean('variance_ratio'):.3f}",
        f"{mean('estimated_ratio'):.3f}",
      ]
    )
  return reporting.markdown_table(
    [
      "",
      "best coefficient",
      "estimate",
      "mean absolute error",
      "variance ratio",
      "estimate",
    ],
    lines,
  )


def variance_table(results: Mapping[tuple[str, str], Any]) -> str:
  """Means over training of the measures of each method, in Markdown."""
  lines = []
  for (model, optimizer), all_points in results.items():
    methods = _at_common_moments(all_points)
    for metric in METRICS:
      means = {
        method: statistics.fmean(getattr(p, metric) for p in _after(points))
        for method, points in methods.items()
      }
      lines.append(
        [f"{model} {optimizer}", _ROWS[metric]]
        + [f"{value:.3g}" for value in means.values()]
      )
    losses = [points[-1].train_loss for points in methods.values()]
    lines.append(
      [f"{model} {optimizer}", "train loss at the last measurement"]
      + [f"{loss:.3g}" for loss in losses]
    )
  return reporting.markdown_table(["", "mean over training", *METHODS], lines)


def _at_common_moments(methods: Mapping[str, Any]) -> dict[str, list[Point]]:
  """The points of each method at the moments that all of them have.

  Variance grows from a snapshot to the next, so that methods can be compared
  at the same moments only.
  """
  moments = [{p.epoch for p in points} for points, _ in methods.values()]
  common = set.intersection(*moments)
  return {
    method: [p for p in points if p.epoch in common]
    for method, (points, _) in methods.items()
  }


def _after(points: Sequence[Point]) -> list[Point]:
  """The points that are not at a snapshot, where variance vanishes."""
  return [point for point in points if point.epoch % 1 > 1e-9]


def _as_json(x: Any) -> Any:
  """The same with ``None`` for numbers that are not finite."""
  if isinstance(x, dict):
    return {name: _as_json(value) for name, value in x.items()}
  if isinstance(x, list):
    return [_as_json(value) for value in x]
  return x if np.isfinite(x) else None


def draw_coefficients(
  path: Path, results: Mapping[tuple[str, str], Any]
) -> None:
  """Draws the best coefficients over training, and the online estimate."""
  rows = list(dict.fromkeys(optimizer for _, optimizer in results))
  columns = list(dict.fromkeys(model for model, _ in results))
  figure = Figure(
    figsize=(5 * len(columns), 2.8 * len(rows)), layout="constrained"
  )
  axes = figure.subplots(
    len(rows), len(columns), sharex=True, sharey=True, squeeze=False
  )
  for (model, optimizer), methods in results.items():
    axis = axes[rows.index(optimizer), columns.index(model)]
    points, alphas = methods["adaptive"]
    epochs, steps = alphas.shape
    x = np.array([point.epoch for point in points])
    groups = np.split(
      np.arange(len(x)), np.flatnonzero(np.diff(x.astype(int))) + 1
    )
    for label, field, color in (
      ("best, mean over components (paper)", "optimal_component", "C0"),
      ("best single coefficient", "optimal_tree", "C2"),
    ):
      y = np.array([getattr(point, field) for point in points])
      for i, group in enumerate(groups):
        axis.plot(
          x[group],
          y[group],
          ".-",
          color=color,
          markersize=3,
          linewidth=1,
          label=None if i else label,
        )
    for epoch in range(epochs):
      axis.plot(
        epoch + np.arange(steps) / steps,
        alphas[epoch],
        color="C3",
        linewidth=1.2,
        label=None if epoch else "estimated online (adaptive_svrg)",
      )
    axis.set(title=f"{model}, {optimizer}", ylim=(0, 1.05))
    axis.grid(alpha=0.3)
  for axis in axes[-1]:
    axis.set_xlabel("epochs")
  for axis in axes[:, 0]:
    axis.set_ylabel("coefficient")
  axes[0, 0].legend(loc="lower left", fontsize="small")
  figure.savefig(path, format="png", dpi=110)


def draw_metrics(
  path: Path, results: Mapping[tuple[str, str], Any], optimizer: str
) -> None:
  """Draws the measures of variance and the loss over training."""
  columns = [model for model, name in results if name == optimizer]
  figure = Figure(figsize=(5 * len(columns), 9), layout="constrained")
  axes = figure.subplots(len(_ROWS), len(columns), sharex=True, squeeze=False)
  for column, model in enumerate(columns):
    for row, (field, title) in enumerate(_ROWS.items()):
      axis = axes[row, column]
      methods = _at_common_moments(results[model, optimizer])
      for index, (method, points) in enumerate(methods.items()):
        shown = points if field == "train_loss" else _after(points)
        axis.plot(
          [point.epoch for point in shown],
          [getattr(point, field) for point in shown],
          color=f"C{index}",
          linewidth=1,
          label=method,
        )
      axis.grid(alpha=0.3)
      if field != "cosine_distance":
        axis.set_yscale("log")
      if not column:
        axis.set_ylabel(title)
    axes[0, column].set_title(f"{model}, {optimizer}")
    axes[-1, column].set_xlabel("epochs")
  axes[0, 0].legend(fontsize="small")
  figure.savefig(path, format="png", dpi=110)


@click.command(cls=train.Command)
@click.option(
  "--dataset",
  type=click.Choice(data.DATASETS),
  default="fashion-mnist",
  show_default=True,
)
@click.option(
  "--data-dir",
  type=click.Path(exists=True, file_okay=False, path_type=Path),
  help="Folder of the files of fashion-mnist or cifar-10.",
)
@click.option(
  "--epochs", type=click.IntRange(min=3), default=10, show_default=True
)
@click.option(
  "--batch-size", type=click.IntRange(min=1), default=1024, show_default=True
)
@click.option(
  "--model",
  "names",
  multiple=True,
  type=click.Choice(list(models.NUM_LAYERS)),
  default=list(models.NUM_LAYERS),
  show_default=True,
  help="May be repeated.",
)
@click.option(
  "--optimizer",
  "optimizers",
  multiple=True,
  type=click.Choice(list(LEARNING_RATES)),
  default=list(LEARNING_RATES),
  show_default=True,
  help="May be repeated.",
)
@click.option(
  "--train-examples",
  type=click.IntRange(min=1),
  help="Take only so many, the first ones; all by default.",
)
@click.option(
  "--points",
  type=click.IntRange(min=3),
  default=12,
  show_default=True,
  help="Measurements per epoch of adaptive; the other methods have a third.",
)
@click.option(
  "--out",
  type=click.Path(file_okay=False, path_type=Path),
  default=Path("results", "variance"),
  show_default=True,
  help="Folder for results.json, coefficient.png, sgd.png and adamw.png.",
)
def main(
  dataset: str,
  data_dir: Path | None,
  epochs: int,
  batch_size: int,
  names: Sequence[str],
  optimizers: Sequence[str],
  train_examples: int | None,
  points: int,
  out: Path,
) -> None:
  """Measures gradient variance and the best coefficient over training.

  Each model is trained with SGD and AdamW at a constant learning rate, one
  seed, with plain, SVRG, alpha-SVRG, adaptive, and the best coefficient of each
  component, which is found as often as adaptive is measured. A measurement
  takes the gradients of all batches of the epoch at frozen weights.
  """
  loaded = data.load(dataset, data_dir)
  # Once for all trainings.
  images, labels = jax.device_put(
    (
      loaded.train_images[:train_examples],
      loaded.train_labels[:train_examples],
    )
  )
  loaded = loaded._replace(train_images=images, train_labels=labels)
  if len(loaded.train_labels) < 3 * batch_size:
    raise click.UsageError(
      "--batch-size must leave at least three batches of"
      f" {len(loaded.train_labels)} training examples, got {batch_size}."
    )
  settings = Settings(epochs, batch_size, points, max(points // 3, 2))
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise click.UsageError(f"--out {out}: {e.strerror}.") from e
  # Each once, from shallow to deep.
  names = [name for name in models.NUM_LAYERS if name in names]
  optimizers = [name for name in LEARNING_RATES if name in optimizers]
  results: dict[tuple[str, str], dict[str, Any]] = {}
  for optimizer, model in itertools.product(optimizers, names):
    results[model, optimizer] = {}
    for method in METHODS:
      click.echo(f"{model}, {optimizer}, {method}", err=True)
      training = Training(settings, loaded, model, optimizer, method)
      results[model, optimizer][method] = training.run()
  found = observations(
    {
      key: by_epoch(methods["adaptive"][0], "optimal_component")
      for key, methods in results.items()
    }
  )
  reporting.write_json(
    out / "results.json",
    {
      "dataset": dataset,
      "sha256": loaded.sha256,
      "train_examples": len(loaded.train_labels),
      "settings": dataclasses.asdict(settings),
      "learning_rates": LEARNING_RATES,
      **train.environment(),
      "runs": [
        {
          "model": model,
          "optimizer": optimizer,
          "method": method,
          "points": [_as_json(point._asdict()) for point in measured],
          "alphas": _as_json(alphas.tolist()),
        }
        for (model, optimizer), methods in results.items()
        for method, (measured, alphas) in methods.items()
      ],
      "observations": [observation._asdict() for observation in found],
    },
  )
  draw_coefficients(out / "coefficient.png", results)
  for optimizer in optimizers:
    draw_metrics(out / f"{optimizer}.png", results, optimizer)
  verdicts = {True: "holds", False: "does not hold", None: "diverged"}
  lines = [[o.claim, o.case, o.measured, verdicts[o.holds]] for o in found]
  for text in (
    "Best coefficient, mean over components: mean of the epoch / of its end",
    coefficient_table(results),
    "Best single coefficient and variance ratio, and their online estimates",
    estimate_table(results),
    "Gradient variance, without the moments of snapshots",
    variance_table(results),
    "The paper's observations",
    reporting.markdown_table(["claim", "case", "measured", ""], lines),
  ):
    click.echo(f"{text}\n")


if __name__ == "__main__":
  main()
