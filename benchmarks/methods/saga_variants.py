# SPDX-License-Identifier: Apache-2.0
"""Adaptive SAGA with additions."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.methods import coefficients
from benchmarks.methods.method import Context, Method
import optax_svrg

# AdamW's, for its metric.
_B2, _EPS = 0.999, 1e-8
_DECAY = 0.97

VARIANTS: dict[str, Mapping[str, Any]] = {
  "exact variance in the guard": {},
  "without the guard": {"guarded": False},
  "coefficient per array": {"per_leaf": True},
  "AdamW's metric": {"preconditioned": True},
  "half a table": {"share": 0.5},
  "a tenth of a table": {"share": 0.1},
  "table filled first": {"fills": (0,)},
  "table refilled twice": {"fills": (2, 6)},
  "one more entry per step": {"refreshed": 1},
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """An addition to adaptive SAGA.

  Attributes:
    guarded: whether the coefficient is divided by the larger variance, of
      gradients or of entries.
    per_leaf: whether each array of parameters has a coefficient of its own.
    preconditioned: whether inner products are in AdamW's metric: components
      divided by its mean squares.
    share: share of the components that is corrected, those of the largest
      variance over the first full table, so that only these need be kept.
    refreshed: number of entries computed again in each step in addition to that
      of its batch, the oldest ones.
    fills: epochs at whose beginning all entries are computed again.
  """

  guarded: bool = True
  per_leaf: bool = False
  preconditioned: bool = False
  share: float = 1.0
  refreshed: int = 0
  fills: Sequence[int] = ()


def equal_epochs(settings: Mapping[str, Any], epochs: int) -> int:
  """How many epochs take as many gradients as those of adaptive SAGA."""
  variant = Variant(**settings)
  return (epochs - len(variant.fills)) // (1 + variant.refreshed)


class VariantState(NamedTuple):
  """State of :func:`transform`.

  Attributes:
    step: number of updates made.
    extra_gradients: number of gradients of a batch computed in addition to
      those of the steps.
    saga: state of the library's transformation, which keeps the table.
    products: averages of the inner products of entry and gradient, of the entry
      with itself, and of the gradient with itself, all minus the mean of the
      table; a column for each array of parameters, or one for all.
    squares: averages of the squares of the corrected gradient.
    is_kept: the components that are corrected.
    visited: the step at which each entry was last computed.
  """

  step: jax.Array
  extra_gradients: jax.Array
  saga: optax_svrg.SAGAState
  products: jax.Array
  squares: optax.Updates
  is_kept: optax.Updates
  visited: jax.Array


def transform(
  variant: Variant, num_batches: int
) -> optax.GradientTransformationExtraArgs:
  """Adaptive SAGA with an addition.

  Args:
    variant: the addition.
    num_batches: number of fixed batches.

  Returns:
    A transformation for a :class:`benchmarks.methods.Method`.
  """
  # Keeps the table and corrects nothing; the number 0 would keep none.
  keeper = optax_svrg.alpha_saga(jnp.zeros([]), num_batches)

  def init_fn(params: optax.Params) -> VariantState:
    num_leaves = len(jax.tree.leaves(params)) if variant.per_leaf else 1
    return VariantState(
      step=jnp.zeros([], jnp.int32),
      extra_gradients=jnp.zeros([], jnp.int32),
      saga=keeper.init(params),
      products=jnp.zeros((3, num_leaves)),
      squares=jax.tree.map(jnp.zeros_like, params),
      is_kept=jax.tree.map(
        lambda p: jnp.full(p.shape, variant.share == 1), params
      ),
      visited=jnp.full(num_batches, -1),
    )

  def store(state: VariantState, grads: optax.Updates, i: Any) -> VariantState:
    _, saga = keeper.update(grads, state.saga, batch_index=i)
    visited = state.visited.at[i].set(state.step)
    return state._replace(saga=saga, visited=visited)

  def refresh(
    state: VariantState, params: optax.Params, batch_grad_fn: Callable
  ) -> VariantState:
    """Computes the entries again that are due."""

    def fill(state: VariantState) -> VariantState:
      def one(state: VariantState, i: jax.Array) -> tuple[VariantState, None]:
        return store(state, batch_grad_fn(params, i), i), None

      state, _ = jax.lax.scan(one, state, jnp.arange(num_batches))
      extra = state.extra_gradients + num_batches
      return state._replace(extra_gradients=extra)

    if variant.fills:
      starts = num_batches * jnp.array(variant.fills)
      is_due = jnp.any(state.step == starts)
      state = jax.lax.cond(is_due, fill, lambda s: s, state)
    for _ in range(variant.refreshed):
      oldest = jnp.argmin(state.visited)
      state = store(state, batch_grad_fn(params, oldest), oldest)
    extra = state.extra_gradients + variant.refreshed
    return state._replace(extra_gradients=extra)

  def choose(state: VariantState) -> optax.Updates:
    """Keeps the components of the largest variance."""
    variances = jax.tree.map(
      lambda t: t.var(axis=0), entries(state.saga, num_batches)
    )
    threshold = jnp.quantile(
      jnp.concatenate([v.ravel() for v in jax.tree.leaves(variances)]),
      1 - variant.share,
    )
    return jax.tree.map(lambda v: v > threshold, variances)

  def deviations(
    updates: optax.Updates, state: VariantState, i: Any
  ) -> tuple[optax.Updates, optax.Updates]:
    """Entry and gradient minus the mean of the table; 0 where not corrected."""
    filled = state.saga.is_filled
    scale = num_batches / jnp.maximum(filled.sum(), 1)
    mean = optax.tree.scale(scale, state.saga.mean_grads)
    table = entries(state.saga, num_batches)
    entry = jax.tree.map(lambda t: t[i], table)
    centre = lambda x, m, k: jnp.where(k & filled[i], x - m, 0)
    control, centred = (
      jax.tree.map(centre, x, mean, state.is_kept) for x in (entry, updates)
    )
    return control, centred

  def coefficient(state: VariantState, i: Any) -> jax.Array:
    covariance, variance, total = state.products
    if variant.guarded:
      variance = jnp.maximum(variance, total)
    ratio = covariance / jnp.where(variance > 0, variance, 1)
    return jnp.where(state.saga.is_filled[i], jnp.clip(ratio, 0, 1), 0)

  def observe(
    state: VariantState, control: optax.Updates, centred: optax.Updates
  ) -> jax.Array:
    """The averages of the inner products after this step."""
    weighted = lambda x: x
    if variant.preconditioned:
      count = jnp.maximum(state.step, 1)
      squares = optax.tree.bias_correction(state.squares, _B2, count)
      weighted = lambda x: jax.tree.map(
        lambda a, v: a / (jnp.sqrt(v) + _EPS) ** 2, x, squares
      )
    products = jnp.stack(
      [
        coefficients.inner_products(weighted(a), b, variant.per_leaf)
        for a, b in ((centred, control), (control, control), (centred, centred))
      ]
    )
    new = _DECAY * state.products + (1 - _DECAY) * products
    return jnp.where(products[1] > 0, new, state.products)

  def update_fn(
    updates: optax.Updates,
    state: VariantState,
    params: optax.Params | None = None,
    *,
    batch_index: Any,
    batch_grad_fn: Callable,
    **extra_args: Any,
  ) -> tuple[optax.Updates, VariantState]:
    del extra_args
    state = refresh(state, params, batch_grad_fn)
    if variant.share < 1:
      is_due = state.step == num_batches
      is_kept = jax.lax.cond(is_due, choose, lambda s: s.is_kept, state)
      state = state._replace(is_kept=is_kept)
    control, centred = deviations(updates, state, batch_index)
    alpha = coefficient(state, batch_index)
    corrected = coefficients.subtract(updates, alpha, control)
    products = observe(state, control, centred)
    state = store(state, updates, batch_index)
    return corrected, state._replace(
      step=state.step + 1,
      saga=state.saga._replace(alpha=alpha.mean()),
      products=products,
      squares=optax.tree.update_moment(corrected, state.squares, _B2, 2),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def entries(saga: optax_svrg.SAGAState, num_batches: int) -> optax.Updates:
  """The table with a single axis of batches."""
  return jax.tree.map(
    lambda t, m: t.reshape(-1, *m.shape)[:num_batches],
    saga.table,
    saga.mean_grads,
  )


def method(context: Context, **settings: Any) -> Method:
  """Adaptive SAGA with an addition, see :class:`Variant`."""
  variant = Variant(**settings)
  return Method(
    transform(variant, context.num_fixed_batches), has_fixed_batches=True
  )
