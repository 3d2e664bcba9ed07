# SPDX-License-Identifier: Apache-2.0
"""Compares SAGA with plain training at equal gradient evaluations, over a grid.

Run ``python -m benchmarks.saga --help``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import math
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click
from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks import grid, reporting, train
from benchmarks.models import small as models

PLAIN = ("plain", "plain-fixed")
ADAPTIVE, ROUNDED = "adaptive-saga", "adaptive-saga-bfloat16"
METHODS: dict[str, Callable[..., train.Method]] = {
  name: train.METHODS[name] for name in (*PLAIN, "saga", ADAPTIVE)
}
ROUNDED_METHODS = {
  ROUNDED: functools.partial(train.adaptive_saga, table_dtype=jnp.bfloat16)
}
SEEDS, MORE_SEEDS = 3, 5

# Around what suits the plain optimizer, one grid for all methods.
LEARNING_RATES = {
  ("mlp2", "sgd"): (0.15, 0.3, 0.6),
  ("mlp2", "momentum"): (0.02, 0.05, 0.1),
  ("mlp2", "adamw"): (0.003, 0.01, 0.03),
  ("mlp4", "sgd"): (0.15, 0.3, 0.6),
  ("mlp4", "momentum"): (0.05, 0.1, 0.2),
  ("mlp4", "adamw"): (0.0025, 0.005, 0.01),
  ("vit", "adamw"): (0.003, 0.01, 0.03),
  ("mixer", "adamw"): (0.01, 0.03, 0.1),
  ("mixer", "momentum"): (0.03, 0.1, 0.3),
}


class Cell(grid.Cell):
  """A problem of the grid."""

  @property
  def name(self) -> str:
    """What the cell is called on the command line."""
    kind = [f"noise-{self.label_noise:g}"] if self.label_noise else []
    kind += [self.augment] if self.augment != "none" else []
    return "-".join(map(str, [*self[:4], f"{self.epochs}-epochs", *kind]))

  @property
  def learning_rates(self) -> Sequence[float]:
    """The peak learning rates that are tried."""
    return LEARNING_RATES[self.model, self.optimizer]


def _fashion(
  model: str,
  optimizer: str,
  batch_size: int,
  epochs: int,
  train_examples: int = 10_240,
  **kind: Any,
) -> Cell:
  # A multiple of all sizes of a batch.
  return Cell(
    *("fashion-mnist", model, optimizer, batch_size, train_examples, epochs),
    **kind,
  )


def _mnist(model: str, optimizer: str, batch_size: int, epochs: int) -> Cell:
  return Cell("mnist-5k", model, optimizer, batch_size, 4_000, epochs)


_SMALL, _SMALLER = 5_120, 2_560
CELLS = {
  cell.name: cell
  for cell in (
    _fashion("mlp2", "sgd", 128, 12),
    _fashion("mlp2", "momentum", 128, 12),
    _fashion("mlp2", "adamw", 128, 12),
    _fashion("mlp2", "adamw", 512, 36),
    _fashion("mlp2", "adamw", 64, 12, label_noise=0.3),
    _fashion("mlp2", "adamw", 128, 12, augment="shift-flip"),
    _mnist("mlp2", "sgd", 64, 12),
    _mnist("mlp2", "adamw", 64, 36),
    _fashion("mlp4", "sgd", 128, 12, 20_480),
    _fashion("mlp4", "sgd", 128, 36),
    _fashion("mlp4", "sgd", 128, 36, label_noise=0.3),
    _fashion("mlp4", "momentum", 128, 12),
    _fashion("mlp4", "momentum", 64, 12),
    _fashion("mlp4", "adamw", 128, 12, 20_480),
    _fashion("mlp4", "adamw", 512, 36),
    _fashion("mlp4", "adamw", 64, 12, label_noise=0.3),
    _fashion("mlp4", "sgd", 128, 12, augment="shift-flip"),
    _fashion("mlp4", "adamw", 128, 12, augment="dropout"),
    _mnist("mlp4", "momentum", 64, 36),
    _mnist("mlp4", "adamw", 128, 12),
    _fashion("vit", "adamw", 128, 12, _SMALL),
    _fashion("vit", "adamw", 64, 36, _SMALLER),
    _fashion("vit", "adamw", 64, 12, _SMALL, label_noise=0.3),
    _fashion("vit", "adamw", 128, 12, _SMALL, augment="shift-flip"),
    _mnist("vit", "adamw", 64, 12),
    _fashion("mixer", "adamw", 128, 12, _SMALL),
    _fashion("mixer", "adamw", 512, 36, _SMALL),
    _fashion("mixer", "momentum", 64, 12, _SMALL),
    _fashion("mixer", "adamw", 64, 12, _SMALL, label_noise=0.3),
    _mnist("mixer", "momentum", 128, 12),
  )
}
# Where a table of half the bytes is compared.
ROUNDED_CELLS = tuple(
  name
  for name in CELLS
  if name.startswith(("fashion-mnist-mlp4-sgd-128", "fashion-mnist-vit"))
)


class Summary(NamedTuple):
  """The results of a cell, each method at its own best learning rate.

  Attributes:
    lrs: the learning rate of each method.
    losses: final train losses of each method by seed.
    accuracies: mean validation accuracy of each method.
    better_plain: which plain method has the lower mean loss.
    against_plain: adaptive SAGA against it.
  """

  lrs: dict[str, float]
  losses: dict[str, dict[int, float]]
  accuracies: dict[str, float]
  better_plain: str
  against_plain: grid.Comparison


def summarise(rows: Sequence[dict]) -> Summary:
  """Compares adaptive SAGA with the better plain method.

  Args:
    rows: the runs of a cell.
  """
  names = [name for name in METHODS if any(r["method"] == name for r in rows)]
  lrs = {name: grid.best_lr(rows, name) for name in names}
  losses = {name: grid.losses(rows, name, lrs[name]) for name in names}
  means = {name: statistics.fmean(x.values()) for name, x in losses.items()}
  better = min(PLAIN, key=means.__getitem__)
  return Summary(
    lrs,
    losses,
    {
      name: statistics.fmean(
        row["validation_accuracy"]
        for row in rows
        if row["method"] == name and row["lr"] == lrs[name]
      )
      for name in names
    },
    better,
    grid.compare(losses[ADAPTIVE], losses[better]),
  )


def is_close(comparison: grid.Comparison) -> bool:
  """Whether three seeds do not settle a comparison: by 2 s.d., or by 8 %."""
  return (
    1.5 <= abs(comparison.deviations) <= 3
    or -0.11 <= comparison.relative <= -0.05
  )


def state_bytes(cell: grid.Cell) -> tuple[int, int]:
  """Bytes of the parameters, and of the state of adaptive SAGA, in float32."""
  shape, num_classes = (1, 28, 28), 10
  model = nnx.eval_shape(
    lambda: models.MODELS[cell.model](shape, num_classes, rngs=nnx.Rngs(0))
  )
  params = nnx.as_pure(nnx.state(model, nnx.Param))
  options = grid.options(cell, (ADAPTIVE,), SEEDS, None, Path())
  transform = train.adaptive_saga(options, cell.train_examples).transform
  state = jax.eval_shape(transform.init, params)
  return _bytes(params), _bytes(state)


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def table(summaries: Mapping[str, Summary]) -> str:
  """A line for each cell, in Markdown, and the wins, ties and losses."""
  lines = []
  for name, summary in summaries.items():
    params, state = state_bytes(CELLS[name])
    lines.append(
      [
        name,
        *(
          f"{statistics.fmean(losses.values()):#.3g}"
          f" ± {grid.std(losses.values()):#.1g} ({summary.lrs[method]:g})"
          for method, losses in summary.losses.items()
        ),
        grid.verdict(summary.against_plain),
        *(
          f"{100 * summary.accuracies[method]:.1f}"
          for method in (summary.better_plain, ADAPTIVE)
        ),
        f"{state / 2**20:.0f} ({state / params:.0f})",
      ]
    )
  columns = (
    *("cell", "plain", "plain, fixed batches", "SAGA", "adaptive SAGA"),
    *("adaptive against the better plain", "accuracy, plain (%)"),
    *("accuracy, adaptive (%)", "MiB of state (copies of the parameters)"),
  )
  comparisons = {n: s.against_plain for n, s in summaries.items()}
  verdicts = [c.verdict for c in comparisons.values()]
  count = ", ".join(f"{v} {verdicts.count(v)}" for v in grid.VERDICTS)
  clean = [c for n, c in comparisons.items() if CELLS[n].augment == "none"]
  lower = sum(c.relative <= -0.08 for c in clean)
  return "\n".join(
    [
      reporting.markdown_table(columns, lines),
      "",
      f"adaptive SAGA against the better plain: {count}",
      f"at least 8 % below it: {lower} of {len(clean)} cells without"
      " augmentation",
    ]
  )


def rounded_table(rows: Mapping[str, Sequence[dict]]) -> str:
  """Adaptive SAGA with a table in bfloat16 against one in float32."""
  lines = []
  for name, runs in rows.items():
    lr = grid.best_lr(runs, ADAPTIVE)
    ours, theirs = (grid.losses(runs, m, lr) for m in (ROUNDED, ADAPTIVE))
    comparison = grid.compare(ours, theirs)
    lines.append(
      [
        name,
        *(
          f"{statistics.fmean(x.values()):#.3g} ± {grid.std(x.values()):#.1g}"
          for x in (theirs, ours)
        ),
        grid.verdict(comparison),
      ]
    )
  columns = ("cell", "float32", "bfloat16", "bfloat16 against float32")
  return reporting.markdown_table(columns, lines)


@click.command(cls=train.Command)
@grid.data_dir_option
@grid.cell_option(CELLS)
@grid.out_option("saga")
def main(data_dir: Path, cells: Sequence[str], out: Path) -> None:
  """Trains with plain and SAGA in every cell, and compares them.

  All methods take one gradient per example and epoch. Each cell with three
  seeds, with five where these do not settle it.
  """
  out.mkdir(parents=True, exist_ok=True)

  def run(
    name: str,
    methods: Mapping[str, Callable[..., train.Method]],
    lrs: Iterable[float],
    seeds: int,
  ) -> list[dict]:
    return grid.run_cell(
      CELLS[name],
      methods,
      tuple(lrs),
      range(seeds),
      data_dir,
      out / f"{name}.json",
    )

  rows, rounded = {}, {}
  for name in cells or CELLS:
    runs = run(name, METHODS, CELLS[name].learning_rates, SEEDS)
    summary = summarise(runs)
    if is_close(summary.against_plain):
      for method in (*PLAIN, ADAPTIVE):
        lr = summary.lrs[method]
        runs = run(name, {method: METHODS[method]}, [lr], MORE_SEEDS)
    rows[name] = runs
    if name in ROUNDED_CELLS:
      lr = grid.best_lr(runs, ADAPTIVE)
      rounded[name] = run(name, ROUNDED_METHODS, [lr], SEEDS)
    click.echo(name, err=True)
  summaries = {name: summarise(runs) for name, runs in rows.items()}
  click.echo(table(summaries))
  if rounded:
    click.echo(f"\n{rounded_table(rounded)}")


if __name__ == "__main__":
  main()
