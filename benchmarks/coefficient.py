# SPDX-License-Identifier: Apache-2.0
"""Compares ways to estimate the coefficient of adaptive SVRG.

Run ``python -m benchmarks.coefficient --help``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import optax

from benchmarks import grid, train
import optax_svrg

# Problem and learning rate, the latter about the best for plain.
CELLS = {
  "fashion-mnist-mlp4-adamw-128": 0.005,
  "mnist-5k-mlp4-sgd-128": 0.3,
  "mnist-5k-mlp4-adamw-64": 0.005,
  "mnist-5k-mlp2-sgd-64": 0.3,
  "fashion-mnist-mlp2-adamw-512": 0.03,
  "fashion-mnist-mlp4-sgd-512": 0.3,
  "fashion-mnist-logreg-adamw-128": 0.03,
}


class Variant(NamedTuple):
  """A way to estimate the coefficient.

  Attributes:
    decay: of the averages.
    current: whether the averages include the batch that is corrected.
    per_leaf: whether each array of parameters has a coefficient of its own.
    start: the averages after a snapshot: ``"empty"``; ``"full"``, as if all
      steps before had been like the first one; or ``"kept"``, not reset.
  """

  decay: float
  current: bool = False
  per_leaf: bool = False
  start: str = "empty"

  @property
  def name(self) -> str:
    """What the variant is called in the table."""
    parts = [f"decay {self.decay:g}"]
    parts += ["with the current batch"] * self.current
    parts += ["per leaf"] * self.per_leaf
    if self.start != "empty":
      parts.append({"full": "start full", "kept": "never reset"}[self.start])
    return ", ".join(parts)


DECAYS = (0.8, 0.9, 0.97, 0.99)
VARIANTS = (
  *(Variant(decay) for decay in DECAYS),
  *(Variant(decay, current=True) for decay in DECAYS),
  *(Variant(decay, per_leaf=True) for decay in DECAYS),
  *(Variant(decay, start="full") for decay in (0.9, 0.97)),
  *(Variant(decay, start="kept") for decay in (0.9, 0.97)),
)


class VariantState(NamedTuple):
  """State of :func:`variant_svrg`.

  Attributes:
    svrg: what all methods of this family have.
    seen: ``num_snapshots`` of ``svrg`` at the last update.
    covariance: averages of the inner products of the control variate with the
      gradient, one for each leaf or one for all, both centred.
    variance: those of the control variate with itself.
  """

  svrg: optax_svrg.SVRGState
  seen: jax.Array
  covariance: jax.Array
  variance: jax.Array


def variant_svrg(variant: Variant) -> optax.GradientTransformationExtraArgs:
  """SVRG with an estimated coefficient, in all the ways under study."""
  svrg = optax_svrg.alpha_svrg(1.0)

  def init_fn(params):
    num_leaves = len(jax.tree.leaves(params)) if variant.per_leaf else 1
    state = svrg.init(params)
    return VariantState(
      state,
      jnp.zeros_like(state.num_snapshots),
      jnp.zeros(num_leaves),
      jnp.zeros(num_leaves),
    )

  def update_fn(updates, state, params=None, *, grad_fn, **extra_args):
    del extra_args
    svrg_state = state.svrg
    g, treedef = jax.tree.flatten(updates)
    s = jax.tree.leaves(grad_fn(svrg_state.snapshot_params))
    mean = jax.tree.leaves(svrg_state.mean_grads)
    products = jnp.array(
      [
        [jnp.vdot(x - m, y - m) for x, y, m in zip(a, s, mean, strict=True)]
        for a in (g, s)
      ]
    )
    if not variant.per_leaf:
      products = products.sum(axis=1, keepdims=True)
    old = jnp.stack([state.covariance, state.variance])
    first = svrg_state.num_snapshots != state.seen
    if variant.start != "kept":
      old = jnp.where(first, 0, old)
    new = variant.decay * old + (1 - variant.decay) * products
    if variant.start == "full":
      new = jnp.where(first, products, new)
    covariance, variance = new if variant.current else old
    known = variance > 0
    ratio = jnp.where(known, covariance / jnp.where(known, variance, 1), 1)
    alpha = jnp.clip(ratio, 0, 1)
    alphas = alpha if variant.per_leaf else jnp.repeat(alpha, len(g))
    corrected = [
      x - a * (y - m) for x, y, m, a in zip(g, s, mean, alphas, strict=True)
    ]
    svrg_state = svrg_state._replace(
      count=svrg_state.count + 1, alpha=alpha.mean()
    )
    return jax.tree.unflatten(treedef, corrected), VariantState(
      svrg_state, svrg_state.num_snapshots, *new
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _method(variant: Variant) -> Callable[..., train.Method]:
  def make(options: train.Options, num_examples: int) -> train.Method:
    return train.Method(variant_svrg(variant), optax.constant_schedule(1.0))

  return make


METHODS = {
  "plain": train.plain,
  "svrg": train.svrg,
  **{variant.name: _method(variant) for variant in VARIANTS},
}


@click.command(cls=train.Command)
@grid.data_dir_option
@grid.cell_option(CELLS)
@click.option(
  "--seeds", type=click.IntRange(min=2), default=3, show_default=True
)
@grid.out_option("coefficient")
def main(data_dir: Path, cells: Sequence[str], seeds: int, out: Path) -> None:
  """Trains with each way to estimate the coefficient.

  Prints the final train losses, mean over the seeds, divided by those of plain,
  and their geometric means.
  """
  out.mkdir(parents=True, exist_ok=True)
  rows: dict[str, Any] = {}
  for name in cells or CELLS:
    rows[name] = grid.run_cell(
      grid.CELLS[name],
      METHODS,
      (CELLS[name],),
      range(seeds),
      data_dir,
      out / f"{name}.json",
    )
    click.echo(name)
  click.echo(grid.relative_table(rows, METHODS, CELLS, "plain"))


if __name__ == "__main__":
  main()
