# SPDX-License-Identifier: Apache-2.0
"""Adaptive SAGA with additions."""

from typing import NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

import optax_svrg


class VariantState(NamedTuple):
  """State of :func:`transform`."""

  step: jax.Array  # Number of updates made.
  # Number of gradients of a batch computed in addition to those of the steps.
  extra_gradients: jax.Array
  saga: optax_svrg.SAGAState  # State of the library's transformation.
  is_kept: optax.Updates  # The components that are corrected.
  visited: jax.Array  # The step at which each entry was last computed.


def transform(
  num_batches: int,
  share: float = 1.0,
  filled_first: bool = False,
  refreshed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Adaptive SAGA with an addition.

  Args:
    num_batches: number of fixed batches.
    share: share of the components that is corrected, those of the largest
      variance over the first full table, so that only these need be kept.
    filled_first: whether all entries are computed before the first step.
    refreshed: number of entries computed again in each step in addition to that
      of its batch, the oldest ones.
  """
  saga = optax_svrg.adaptive_saga(num_batches)

  def init_fn(params):
    return VariantState(
      step=jnp.zeros([], jnp.int32),
      extra_gradients=jnp.zeros([], jnp.int32),
      saga=saga.init(params),
      is_kept=jax.tree.map(lambda p: jnp.full(p.shape, share == 1), params),
      visited=jnp.full(num_batches, -1),
    )

  def visit(state, grads, i):
    corrected, after = saga.update(grads, state.saga, batch_index=i)
    visited = state.visited.at[i].set(state.step)
    return corrected, state._replace(saga=after, visited=visited)

  def choose(state):
    """Keeps the components of the largest variance."""
    table = entries(state.saga, num_batches)
    variances = jax.tree.map(lambda t: t.var(axis=0), table)
    flat, _ = jax.flatten_util.ravel_pytree(variances)
    threshold = jnp.quantile(flat, 1 - share)
    return jax.tree.map(lambda v: v > threshold, variances)

  def update_fn(
    updates, state, params, *, batch_index, batch_grad_fn, **extra_args
  ):
    def revisit(i, state):
      _, state = visit(state, batch_grad_fn(params, i), i)
      return state._replace(extra_gradients=state.extra_gradients + 1)

    if filled_first:
      missing = jnp.where(state.step == 0, num_batches, 0)
      state = jax.lax.fori_loop(0, missing, revisit, state)
    for _ in range(refreshed):
      state = revisit(jnp.argmin(state.visited), state)
    if share < 1:
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
