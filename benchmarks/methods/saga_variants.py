# SPDX-License-Identifier: Apache-2.0
"""Adaptive SAGA with additions."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.methods.method import Context, Method
import optax_svrg

VARIANTS: dict[str, Mapping[str, Any]] = {
  "half a table": {"share": 0.5},
  "a tenth of a table": {"share": 0.1},
  "table filled first": {"filled_first": True},
  "one more entry per step": {"refreshed": 1},
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """An addition to adaptive SAGA.

  Attributes:
    share: share of the components that is corrected, those of the largest
      variance over the first full table, so that only these need be kept.
    filled_first: whether all entries are computed before the first step.
    refreshed: number of entries computed again in each step in addition to that
      of its batch, the oldest ones.
  """

  share: float = 1.0
  filled_first: bool = False
  refreshed: int = 0


def equal_epochs(settings: Mapping[str, Any], epochs: int) -> int:
  """Number of epochs that take as many gradients as adaptive SAGA's."""
  variant = Variant(**settings)
  return (epochs - variant.filled_first) // (1 + variant.refreshed)


class VariantState(NamedTuple):
  """State of :func:`transform`.

  Attributes:
    step: number of updates made.
    extra_gradients: number of gradients of a batch computed in addition to
      those of the steps.
    saga: state of the library's transformation.
    is_kept: the components that are corrected.
    visited: the step at which each entry was last computed.
  """

  step: jax.Array
  extra_gradients: jax.Array
  saga: optax_svrg.SAGAState
  is_kept: optax.Updates
  visited: jax.Array


def transform(
  variant: Variant, num_batches: int
) -> optax.GradientTransformationExtraArgs:
  """Adaptive SAGA with an addition."""
  saga = optax_svrg.adaptive_saga(num_batches)

  def init_fn(params: optax.Params) -> VariantState:
    return VariantState(
      step=jnp.zeros([], jnp.int32),
      extra_gradients=jnp.zeros([], jnp.int32),
      saga=saga.init(params),
      is_kept=jax.tree.map(
        lambda p: jnp.full(p.shape, variant.share == 1), params
      ),
      visited=jnp.full(num_batches, -1),
    )

  def visit(
    state: VariantState, grads: optax.Updates, i: Any
  ) -> tuple[optax.Updates, VariantState]:
    corrected, after = saga.update(grads, state.saga, batch_index=i)
    visited = state.visited.at[i].set(state.step)
    return corrected, state._replace(saga=after, visited=visited)

  def revisit(
    state: VariantState, params: optax.Params, i: Any, batch_grad_fn: Callable
  ) -> VariantState:
    _, state = visit(state, batch_grad_fn(params, i), i)
    return state._replace(extra_gradients=state.extra_gradients + 1)

  def refresh(
    state: VariantState, params: optax.Params, batch_grad_fn: Callable
  ) -> VariantState:
    """Computes the entries again that are due."""
    if variant.filled_first:
      state = jax.lax.cond(
        state.step == 0,
        lambda state: jax.lax.fori_loop(
          0,
          num_batches,
          lambda i, state: revisit(state, params, i, batch_grad_fn),
          state,
        ),
        lambda state: state,
        state,
      )
    for _ in range(variant.refreshed):
      oldest = jnp.argmin(state.visited)
      state = revisit(state, params, oldest, batch_grad_fn)
    return state

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
    corrected, state = visit(state, updates, batch_index)
    corrected = jax.tree.map(jnp.where, state.is_kept, corrected, updates)
    return corrected, state._replace(step=state.step + 1)

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
