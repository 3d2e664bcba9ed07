# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: SVRG that takes its snapshots within the steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.methods.method import Context, Method
import optax_svrg


class SnapshotsState(NamedTuple):
  """State of :func:`method`."""

  # Number of gradients of a batch computed in addition to those of the steps.
  extra_gradients: jax.Array
  svrg: Any  # State of the transformation.
  table: Any  # Gradients of the batches at the snapshot; empty if not kept.


def method(
  context: Context,
  alpha: float | None = None,
  max_alpha: float = 1.0,
  every: int = 1,
  by_chance: bool = False,
  start: float = 0.0,
  stop: float = 1.0,
  share: float = 1.0,
  growth: float = 1.0,
  keeps_table: bool = False,
) -> Method:
  """SVRG that takes its snapshots by itself.

  Args:
    context: the training.
    alpha: the coefficient; ``None`` for the one that is estimated.
    max_alpha: upper bound of the estimate.
    every: epochs between snapshots.
    by_chance: whether a snapshot is taken before any step, once per epoch on
      average (loopless SVRG), instead of at the start of epochs.
    start: share of the training before the first one.
    stop: share of the training after which no variance is reduced.
    share: share of the batches of the epoch, drawn at random, whose mean
      gradient is taken in the first epoch.
    growth: factor of the share from epoch to epoch, up to all batches.
    keeps_table: whether the gradients of all batches are kept for the steps.
  """
  if alpha is None:
    svrg = optax_svrg.adaptive_svrg(max_alpha=max_alpha)
  else:
    svrg = optax_svrg.alpha_svrg(alpha)
  num_steps = context.steps_per_epoch
  first, last = (int(x * context.epochs) for x in (start, stop))

  def init_fn(params):
    zeros = lambda p: jnp.zeros((num_steps, *p.shape), p.dtype)
    return SnapshotsState(
      extra_gradients=jnp.zeros([], jnp.int32),
      svrg=svrg.init(params),
      table=jax.tree.map(zeros, params) if keeps_table else (),
    )

  def take(before, params, key, batch_grad_fn):
    """Takes a snapshot; also returns the table and the number of gradients."""
    if keeps_table:
      grads = lambda i: batch_grad_fn(params, i)
      table = jax.lax.map(grads, jnp.arange(num_steps))
      mean = jax.tree.map(lambda t: t.mean(axis=0), table)
      taken = optax_svrg.take_snapshot(before, params, lambda _: mean)
      return taken, table, jnp.int32(num_steps)
    taken_share = jnp.minimum(share * growth ** (before.count // num_steps), 1)
    size = jnp.ceil(taken_share * num_steps).astype(jnp.int32)
    order = jax.random.permutation(key, num_steps)

    def mean_grad_fn(params):
      add = lambda i, total: optax.tree.add(
        total, batch_grad_fn(params, order[i])
      )
      zeros = optax.tree.zeros_like(params)
      return optax.tree.scale(1 / size, jax.lax.fori_loop(0, size, add, zeros))

    return optax_svrg.take_snapshot(before, params, mean_grad_fn), (), size

  def update_fn(
    updates, state, params, *, grad_fn, batch_index, batch_grad_fn, **extra_args
  ):
    before = state.svrg
    # The same in all trainings.
    key = jax.random.fold_in(jax.random.key(0), before.count)
    epoch, step = jnp.divmod(before.count, num_steps)
    enabled = (epoch >= first) & (epoch < last)
    due = enabled & (step == 0) & (epoch % every == 0)
    if by_chance:
      due = jax.random.bernoulli(key, 1 / num_steps) | (before.count == 0)
    # As before the first snapshot: no gradient there is computed.
    number = jnp.where(enabled, before.num_snapshots, 0)
    before = before._replace(num_snapshots=number)
    before, table, extra_gradients = jax.lax.cond(
      due,
      lambda: take(before, params, key, batch_grad_fn),
      lambda: (before, state.table, jnp.int32(0)),
    )
    if keeps_table:
      source = {"snapshot_grads": jax.tree.map(lambda t: t[batch_index], table)}
    else:
      source = {"grad_fn": grad_fn}
      extra_gradients += (before.num_snapshots > 0).astype(jnp.int32)
    corrected, after = svrg.update(updates, before, params, **source)
    return corrected, SnapshotsState(
      state.extra_gradients + extra_gradients, after, table
    )

  return Method(optax.GradientTransformationExtraArgs(init_fn, update_fn))
