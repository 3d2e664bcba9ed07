# SPDX-License-Identifier: Apache-2.0
"""Compares adaptive SAGA with what one might add to it.

Run ``python -m benchmarks.saga_variants --help``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import optax

from benchmarks import grid, saga, train
import optax_svrg

# Problem and learning rate, the latter the best for adaptive SAGA.
CELLS = {
  "fashion-mnist-mlp2-momentum-128-12-epochs": 0.1,
  "fashion-mnist-mlp4-sgd-128-12-epochs": 0.3,
  "fashion-mnist-mlp4-adamw-64-12-epochs-noise-0.3": 0.0025,
  "fashion-mnist-vit-adamw-128-12-epochs": 0.01,
}
# AdamW's, for its metric.
_B2, _EPS = 0.999, 1e-8


class Variant(NamedTuple):
  """Something added to adaptive SAGA.

  Attributes:
    guarded: whether the coefficient is divided by the greater variance.
    per_leaf: whether each array of parameters has a coefficient of its own.
    preconditioned: whether inner products are in AdamW's metric: components
      divided by its mean squares.
    share: of the components that is corrected, those of the largest variance
      over the first full table, so that only this part need be kept.
    refreshed: number of entries that are computed anew in each step besides
      that of its batch, the oldest ones.
    fills: at the beginning of which epochs all entries are computed anew.
  """

  guarded: bool = True
  per_leaf: bool = False
  preconditioned: bool = False
  share: float = 1.0
  refreshed: int = 0
  fills: tuple[int, ...] = ()

  def epochs(self, epochs: int) -> int:
    """How many take as many gradients as those of adaptive SAGA."""
    return (epochs - len(self.fills)) // (1 + self.refreshed)


VARIANTS = {
  "guard of the exact variance": Variant(),
  "without the guard": Variant(guarded=False),
  "coefficient per array": Variant(per_leaf=True),
  "AdamW's metric": Variant(preconditioned=True),
  "half a table": Variant(share=0.5),
  "a tenth of a table": Variant(share=0.1),
  "warm start": Variant(fills=(0,)),
  "all entries anew, twice": Variant(fills=(2, 6)),
  "one more entry anew, each step": Variant(refreshed=1),
}


class VariantState(NamedTuple):
  """State of :func:`variant_saga`.

  Attributes:
    saga: the table, its mean, and what is logged.
    products: averages of the inner products, one column for each array of
      parameters or one for all: of entry and gradient, of the entry with
      itself, and of the gradient with itself, all less the mean of the table.
    squares: averages of the squares of the corrected gradient.
    is_kept: the components that are corrected.
    visited: the step at which each entry was last computed.
  """

  saga: optax_svrg.SAGAState
  products: jax.Array
  squares: optax.Updates
  is_kept: optax.Updates
  visited: jax.Array


def variant_saga(
  variant: Variant, num_batches: int, decay: float = 0.97
) -> optax.GradientTransformationExtraArgs:
  """Adaptive SAGA with an addition.

  Args:
    variant: the addition.
    num_batches: number of fixed batches.
    decay: of the averages.

  Returns:
    A transformation as that of :func:`optax_svrg.adaptive_saga`, whose
    ``update`` takes ``batch_grad_fn(params, batch_index)`` too, the gradient of
    any batch.
  """
  # Keeps the table, and corrects nothing. Not the number, which does neither.
  keeper = optax_svrg.alpha_saga(jnp.zeros([]), num_batches)

  def init_fn(params):
    num_leaves = len(jax.tree.leaves(params)) if variant.per_leaf else 1
    return VariantState(
      keeper.init(params),
      jnp.zeros((3, num_leaves)),
      jax.tree.map(jnp.zeros_like, params),
      jax.tree.map(lambda p: jnp.full(p.shape, variant.share == 1), params),
      jnp.full(num_batches, -1),
    )

  def store(state, grads, i):
    _, table = keeper.update(grads, state.saga, batch_index=i)
    return state._replace(
      saga=table._replace(count=state.saga.count),
      visited=state.visited.at[i].set(state.saga.count),
    )

  def fill(state, params, batch_grad_fn):
    def one(state, i):
      return store(state, batch_grad_fn(params, i), i), None

    return jax.lax.scan(one, state, jnp.arange(num_batches))[0]

  def choose(state):
    """Keeps the components of the largest variance."""
    variances = jax.tree.map(lambda t: jnp.var(t, axis=0), state.saga.table)
    threshold = jnp.quantile(
      jnp.concatenate([v.ravel() for v in jax.tree.leaves(variances)]),
      1 - variant.share,
    )
    return jax.tree.map(lambda v: v > threshold, variances)

  def update_fn(
    updates, state, params=None, *, batch_index, batch_grad_fn, **extra_args
  ):
    del extra_args
    count = state.saga.count
    if variant.fills:
      starts = num_batches * jnp.array(variant.fills)
      state = jax.lax.cond(
        jnp.any(count == starts),
        lambda s: fill(s, params, batch_grad_fn),
        lambda s: s,
        state,
      )
    for _ in range(variant.refreshed):
      oldest = jnp.argmin(state.visited)
      state = store(state, batch_grad_fn(params, oldest), oldest)
    if variant.share < 1:
      is_kept = jax.lax.cond(
        count == num_batches, choose, lambda s: s.is_kept, state
      )
      state = state._replace(is_kept=is_kept)
    is_filled = state.saga.is_filled
    known = is_filled[batch_index]
    entry = jax.lax.cond(
      known,
      lambda: jax.tree.map(lambda t: t[batch_index], state.saga.table),
      lambda: jax.tree.map(jnp.zeros_like, updates),
    )
    mean = optax.tree.scale(
      num_batches / jnp.maximum(is_filled.sum(), 1), state.saga.mean_grads
    )
    control = jax.tree.map(
      lambda s, m, k: jnp.where(k & known, s - m, 0), entry, mean, state.is_kept
    )
    centred = jax.tree.map(
      lambda g, m, k: jnp.where(k & known, g - m, 0),
      updates,
      mean,
      state.is_kept,
    )
    covariance, variance, total = state.products
    if variant.guarded:
      variance = jnp.maximum(variance, total)
    ratio = covariance / jnp.where(variance > 0, variance, 1)
    alpha = jnp.where(known, jnp.clip(ratio, 0, 1), 0)
    controls, treedef = jax.tree.flatten(control)
    alphas = alpha if variant.per_leaf else jnp.repeat(alpha, len(controls))
    corrected = optax.tree.sub(
      updates,
      jax.tree.unflatten(
        treedef, [a * c for a, c in zip(alphas, controls, strict=True)]
      ),
    )
    products = _products(variant, control, centred, state.squares, count)
    products = jnp.where(
      products[1] > 0,
      decay * state.products + (1 - decay) * products,
      state.products,
    )
    state = store(state, updates, batch_index)
    return corrected, state._replace(
      saga=state.saga._replace(count=count + 1, alpha=alpha.mean()),
      products=products,
      squares=optax.tree.update_moment(corrected, state.squares, _B2, 2),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _products(
  variant: Variant,
  control: optax.Updates,
  centred: optax.Updates,
  squares: optax.Updates,
  count: jax.Array,
) -> jax.Array:
  """One observation for ``VariantState.products``."""
  weights = jax.tree.map(jnp.ones_like, squares)
  if variant.preconditioned:
    weights = jax.tree.map(
      lambda v: 1 / (jnp.sqrt(v) + _EPS) ** 2,
      optax.tree.bias_correction(squares, _B2, jnp.maximum(count, 1)),
    )
  products = jnp.array(
    [
      [
        jnp.vdot(w * x, y)
        for w, x, y in zip(*map(jax.tree.leaves, (weights, a, b)), strict=True)
      ]
      for a, b in ((centred, control), (control, control), (centred, centred))
    ]
  )
  return products if variant.per_leaf else products.sum(axis=1, keepdims=True)


def _method(variant: Variant) -> Callable[..., train.Method]:
  def make(options: train.Options, num_examples: int) -> train.Method:
    num_batches = train.num_fixed_batches(options, num_examples)
    return train.Method(
      variant_saga(variant, num_batches),
      optax.constant_schedule(1.0),
      has_fixed_batches=True,
    )

  return make


def _in_fixed_order(name: str) -> Callable[..., train.Method]:
  def make(options: train.Options, num_examples: int) -> train.Method:
    method = train.METHODS[name](options, num_examples)
    return method._replace(has_fixed_order=True)

  return make


BASE = {name: train.METHODS[name] for name in ("plain-fixed", "adaptive-saga")}
METHODS = {
  **BASE,
  **{f"{name}, order fixed": _in_fixed_order(name) for name in BASE},
  **{name: _method(variant) for name, variant in VARIANTS.items()},
}


def run_cell(
  name: str, seeds: Sequence[int], data_dir: Path | None, out: Path
) -> list[dict]:
  """Trains with every variant at the same number of gradient evaluations.

  Args:
    name: of the problem.
    seeds: the seeds.
    data_dir: the folder of Fashion-MNIST.
    out: folder of the results.

  Returns:
    A row for each run, see :func:`benchmarks.grid.run_cell`.
  """
  cell = saga.CELLS[name]
  by_epochs: dict[int, dict] = {}
  for method, make in METHODS.items():
    variant = VARIANTS.get(method, Variant())
    by_epochs.setdefault(variant.epochs(cell.epochs), {})[method] = make
  rows = []
  for epochs, methods in by_epochs.items():
    rows += grid.run_cell(
      cell._replace(epochs=epochs),
      methods,
      (CELLS[name],),
      seeds,
      data_dir,
      out / f"{name}-{epochs}.json",
    )
  return rows


@click.command(cls=train.Command)
@grid.data_dir_option
@grid.cell_option(CELLS)
@click.option(
  "--seeds", type=click.IntRange(min=2), default=3, show_default=True
)
@grid.out_option("saga_variants")
def main(data_dir: Path, cells: Sequence[str], seeds: int, out: Path) -> None:
  """Trains with each addition, at the same number of gradient evaluations.

  Prints the final train losses, mean over the seeds, divided by those of
  adaptive SAGA, and their geometric means.
  """
  out.mkdir(parents=True, exist_ok=True)
  rows: dict[str, Any] = {}
  for name in cells or CELLS:
    rows[name] = run_cell(name, range(seeds), data_dir, out)
    click.echo(name, err=True)
  click.echo(grid.relative_table(rows, METHODS, CELLS, "adaptive-saga"))


if __name__ == "__main__":
  main()
