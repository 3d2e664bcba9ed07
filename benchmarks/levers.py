# SPDX-License-Identifier: Apache-2.0
"""Ways to make SVRG cheaper: what each takes, and what it costs in loss.

All of them are compositions of the public functions. Here they are optax
transformations that take their snapshots within the compiled steps, so that
``benchmarks.train`` can run and count them as it does any method.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks import train
import optax_svrg

# Of the gate.
PROBES = 4  # Batches of a probe.
_PROBE_EVERY = 4  # Epochs.
_COST = 3.0  # Gradients per step, with the pass.


@dataclasses.dataclass(frozen=True)
class Lever:
  """What is done otherwise than with a full pass at the start of each epoch.

  Attributes:
    make: makes the transformation.
    every: epochs between snapshots.
    share: of the batches of an epoch, drawn at random, that the mean gradient
      of a snapshot is taken over, given the number of the epoch.
    is_loopless: whether a coin decides before each step if a snapshot is taken:
      one per epoch on average.
    has_table: whether the pass keeps the gradients of the batches, so that the
      steps need not compute them.
    mean: ``"pass"``; ``"previous"``, the snapshot is the mean of the parameters
      during the epoch before, and its mean gradient that of the gradients of
      the steps there; or ``"running"``, the mean of the gradients at the
      snapshot that the steps have computed so far.
    is_on: in which epochs variance is reduced, given the number of the epoch
      and that of all epochs.
    is_gated: whether :meth:`optax_svrg.RunningMoments.payoff` decides that
      instead.
  """

  make: Callable[[], optax.GradientTransformationExtraArgs] = (
    optax_svrg.adaptive_svrg
  )
  every: int = 1
  share: Callable[[Any], Any] = lambda epoch: 1.0
  is_loopless: bool = False
  has_table: bool = False
  mean: str = "pass"
  is_on: Callable[[Any, int], Any] = lambda epoch, epochs: True
  is_gated: bool = False


def _sampled(share: float, **kwargs: Any) -> Lever:
  make = functools.partial(optax_svrg.adaptive_svrg, **kwargs)
  return Lever(make, share=lambda epoch: share)


LEVERS = {
  "adaptive SVRG": Lever(),
  "gradient table": Lever(has_table=True),
  "a pass each 2 epochs": Lever(every=2),
  "a pass each 4 epochs": Lever(every=4),
  "coin flips": Lever(is_loopless=True),
  "1/2 sampled": _sampled(1 / 2),
  "1/2 sampled, max_alpha=1/2": _sampled(1 / 2, max_alpha=1 / 2),
  "1/8 sampled, alpha = 1": dataclasses.replace(
    _sampled(1 / 8), make=functools.partial(optax_svrg.alpha_svrg, 1.0)
  ),
  "1/8 sampled": _sampled(1 / 8),
  "1/8 sampled, max_alpha=1/8": _sampled(1 / 8, max_alpha=1 / 8),
  "growing samples": Lever(share=lambda epoch: jnp.minimum(2.0**epoch / 16, 1)),
  "mean of the epoch before": Lever(mean="previous"),
  "mean so far": Lever(mean="running"),
  "mean so far, max_alpha=1/2": Lever(
    functools.partial(optax_svrg.adaptive_svrg, max_alpha=1 / 2),
    mean="running",
  ),
  "first half": Lever(is_on=lambda epoch, epochs: epoch < epochs // 2),
  "second half": Lever(is_on=lambda epoch, epochs: epoch >= epochs // 2),
  "gated": Lever(is_gated=True),
}


class LeverState(NamedTuple):
  """State of :func:`pull`.

  Attributes:
    step: number of updates made.
    extra_gradients: number of gradients of a batch computed beside those of the
      steps.
    svrg: the state of the transformation.
    table: the gradients of the batches at the snapshot, ``None`` without one.
    sums: of the parameters and of the gradients over the epoch, for
      ``mean="previous"``; else ``None``.
    start: the parameters at the start of the epoch, for the gate; else
      ``None``.
    is_open: whether the gate is.
  """

  step: jax.Array
  extra_gradients: jax.Array
  svrg: Any
  table: Any
  sums: Any
  start: Any
  is_open: jax.Array


def pull(
  lever: Lever, num_steps: int, num_epochs: int
) -> optax.GradientTransformationExtraArgs:
  """SVRG that takes its snapshots by itself.

  Args:
    lever: which, and how.
    num_steps: number of steps of an epoch.
    num_epochs: number of epochs.

  Returns:
    A transformation whose ``update`` takes ``grad_fn(params)``, the gradient of
    the batch; ``batch_index``, its number within the epoch; and
    ``batch_grad_fn(params, batch_index)``, the gradient of any batch of the
    epoch.
  """
  svrg = lever.make()

  def init_fn(params):
    copy = lambda: jax.tree.map(jnp.array, params)
    table = jax.tree.map(
      lambda p: jnp.zeros((num_steps, *p.shape), p.dtype), params
    )
    return LeverState(
      step=jnp.zeros([], jnp.int32),
      extra_gradients=jnp.zeros([], jnp.int32),
      svrg=svrg.init(params),
      table=table if lever.has_table else None,
      sums=2 * (optax.tree.zeros_like(params),)
      if lever.mean == "previous"
      else None,
      start=copy() if lever.is_gated else None,
      is_open=jnp.zeros([], bool),
    )

  def take(state, params, batch_grad_fn, key):
    """A snapshot, of the gradients of a sample of batches."""
    epoch = state.step // num_steps
    order = jax.random.permutation(key, num_steps)
    size = jnp.ceil(lever.share(epoch) * num_steps).astype(jnp.int32)

    def mean_grad_fn(params):
      def add(i, carry):
        total, table = carry
        grads = batch_grad_fn(params, order[i])
        if lever.has_table:
          table = jax.tree.map(lambda t, g: t.at[order[i]].set(g), table, grads)
        return optax.tree.add(total, grads), table

      nonlocal state
      total, table = jax.lax.fori_loop(
        0, size, add, (optax.tree.zeros_like(params), state.table)
      )
      state = state._replace(table=table)
      return optax.tree.scale(1 / size, total)

    taken = optax_svrg.take_snapshot(state.svrg, params, mean_grad_fn)
    return state._replace(
      svrg=taken, extra_gradients=state.extra_gradients + size
    )

  def take_without_pass(state, params):
    """A snapshot whose mean gradient is known, or becomes known later on."""
    if lever.mean == "running":
      zeros = optax.tree.zeros_like(params)
      taken = optax_svrg.take_snapshot(state.svrg, params, lambda _: zeros)
      return state._replace(svrg=taken)
    means = optax.tree.scale(1 / num_steps, state.sums)
    mean_params, mean_grads = means
    taken = optax_svrg.take_snapshot(
      state.svrg, mean_params, lambda _: mean_grads
    )
    return state._replace(svrg=taken, sums=optax.tree.zeros_like(means))

  def decide(state, params, batch_grad_fn, key):
    """Opens the gate after a probe, closes it if variance falls too little."""

    def probe():
      chosen = jax.random.permutation(key, num_steps)[:PROBES]

      def see(moments, i):
        pair = (batch_grad_fn(p, i) for p in (params, state.start))
        return moments.update(*pair), None

      moments = optax_svrg.RunningMoments.create(params)
      moments, _ = jax.lax.scan(see, moments, chosen)
      payoff = moments.payoff(optax.tree.sub(params, state.start))
      return payoff.pays(_COST), 2 * PROBES

    epoch = state.step // num_steps
    is_due = ~state.is_open & (epoch > 0) & (epoch % _PROBE_EVERY == 0)
    left = state.svrg.estimate.variance_ratio
    is_open, extra = jax.lax.cond(
      is_due, probe, lambda: (state.is_open & (left * _COST < 1), 0)
    )
    return state._replace(
      is_open=is_open,
      extra_gradients=state.extra_gradients + extra,
      start=params,
    )

  def begin_epoch(state, params, batch_grad_fn, key):
    epoch = state.step // num_steps
    if lever.is_gated:
      state = decide(state, params, batch_grad_fn, key)
      wanted = state.is_open
    else:
      wanted = lever.is_on(epoch, num_epochs)
    if lever.mean == "pass":
      new = functools.partial(take, batch_grad_fn=batch_grad_fn, key=key)
    else:
      new = take_without_pass
      wanted &= (lever.mean == "running") | (epoch > 0)
    is_due = wanted & (epoch % lever.every == 0)
    state = jax.lax.cond(is_due, new, lambda s, p: s, state, params)
    return jax.lax.cond(wanted, lambda s: s, _switch_off, state)

  def update_fn(
    updates, state, params, *, grad_fn, batch_index, batch_grad_fn, **extra_args
  ):
    del extra_args
    key = jax.random.fold_in(jax.random.key(0), state.step)
    is_start = state.step % num_steps == 0
    is_due, begin = is_start, begin_epoch
    if lever.is_loopless:
      flipped = jax.random.bernoulli(key, 1 / num_steps)
      is_due, begin = flipped | (state.step == 0), take
    state = jax.lax.cond(
      is_due,
      lambda s, p: begin(s, p, batch_grad_fn, key),
      lambda s, p: s,
      state,
      params,
    )
    before = state.svrg
    extra = {"grad_fn": grad_fn}
    if lever.has_table:
      extra = {
        "snapshot_grads": jax.tree.map(lambda t: t[batch_index], state.table)
      }
    elif lever.mean == "running":
      # Needed for the mean even where there is none to correct with.
      extra = {"snapshot_grads": grad_fn(before.snapshot_params)}
    used = before
    if lever.mean == "running":
      used = before._replace(
        num_snapshots=jnp.where(is_start, 0, before.num_snapshots)
      )
    corrected, after = svrg.update(updates, used, params, **extra)
    if lever.mean == "running":
      seen = state.step % num_steps
      after = after._replace(
        num_snapshots=before.num_snapshots,
        mean_grads=jax.tree.map(
          lambda m, s: m + (s - m) / (seen + 1),
          before.mean_grads,
          extra["snapshot_grads"],
        ),
      )
    computed = 0 if lever.has_table else _is_on(state).astype(jnp.int32)
    state = state._replace(
      step=state.step + 1,
      svrg=after,
      extra_gradients=state.extra_gradients + computed,
    )
    if lever.mean == "previous":
      state = state._replace(sums=optax.tree.add(state.sums, (params, updates)))
    return corrected, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_on(state: LeverState) -> jax.Array:
  return state.svrg.num_snapshots > 0


def _switch_off(state: LeverState) -> LeverState:
  """As before the first snapshot: no gradient there is computed."""
  zero = jnp.zeros_like(state.svrg.num_snapshots)
  return state._replace(svrg=state.svrg._replace(num_snapshots=zero))


def method(lever: Lever) -> Callable[[train.Options, int], train.Method]:
  """A lever as a method of ``benchmarks.train``."""

  def make(options: train.Options, num_examples: int) -> train.Method:
    steps = train.steps_per_epoch(options, num_examples)
    return train.Method(
      pull(lever, steps, options.epochs),
      # It takes its snapshots by itself.
      coefficient=optax.constant_schedule(0.0),
    )

  return make


METHODS = {name: method(lever) for name, lever in LEVERS.items()}
