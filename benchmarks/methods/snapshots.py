# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: SVRG that takes its snapshots within the steps.

A strategy says when a snapshot is taken, and what its mean gradient is made of.
Both are data: ``STRATEGIES`` has the settings of those under study, which
:func:`method` turns into a method.

* ``WHEN``: ``decide(memory, svrg, params, at)`` returns a :class:`Decision`
  about the step to come.
* ``MEANS``: ``take(memory, svrg, params, at)`` takes a snapshot. It returns the
  state after it, the memory, and the number of gradients of a batch computed.
  ``correct(memory, svrg, params, at, step)`` returns the corrected gradient and
  then the same.

Both have ``init``, which makes their memory: what they know from step to step.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.methods.gate import Decision, Gate, Moment
from benchmarks.methods.method import Context, Method
import optax_svrg

STRATEGIES: dict[str, Mapping[str, Any]] = {
  "full pass": {},
  "gradient table": {"mean": "table"},
  "a pass each 2 epochs": {"every": 2},
  "a pass each 4 epochs": {"every": 4},
  "coin flips": {"when": "coin"},
  "1/2 sampled": {"share": 1 / 2},
  "1/2 sampled, max_alpha=1/2": {"share": 1 / 2, "max_alpha": 1 / 2},
  "1/8 sampled": {"share": 1 / 8},
  "1/8 sampled, alpha=1": {"share": 1 / 8, "alpha": 1.0},
  "1/8 sampled, max_alpha=1/8": {"share": 1 / 8, "max_alpha": 1 / 8},
  "growing samples": {"share": 1 / 16, "growth": 2.0},
  "mean of the previous epoch": {"mean": "previous"},
  "mean so far": {"mean": "running"},
  "mean so far, max_alpha=1/2": {"mean": "running", "max_alpha": 1 / 2},
  "first half": {"stop": 1 / 2},
  "second half": {"start": 1 / 2},
  "gated": {"when": "gate"},
}


@dataclasses.dataclass(frozen=True)
class Epochs:
  """At the start of epochs.

  Attributes:
    every: epochs between snapshots.
    start: share of the training before the first one.
    stop: share of the training after which no variance is reduced.
  """

  every: int = 1
  start: float = 0.0
  stop: float = 1.0

  def init(self, params: optax.Params) -> Any:
    """Nothing is remembered."""
    return ()

  def decide(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> Decision:
    """Decides from the number of the epoch alone."""
    first, last = (int(x * at.num_epochs) for x in (self.start, self.stop))
    enabled = (at.epoch >= first) & (at.epoch < last)
    due = enabled & at.is_start & (at.epoch % self.every == 0)
    return Decision(enabled, due, memory)


@dataclasses.dataclass(frozen=True)
class CoinFlips:
  """Before any step, by chance: once per epoch on average (loopless SVRG)."""

  def init(self, params: optax.Params) -> Any:
    """Nothing is remembered."""
    return ()

  def decide(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> Decision:
    """Flips the coin."""
    due = jax.random.bernoulli(at.key, 1 / at.num_steps) | (at.step == 0)
    return Decision(jnp.ones([], bool), due, memory)


class Step(NamedTuple):
  """Inputs of the correction of a step.

  Attributes:
    update: ``update`` of the transformation.
    grads: the gradient of the batch.
    grad_fn: that gradient as a function of the parameters.
    batch_index: number of the batch.
  """

  update: Callable
  grads: optax.Updates
  grad_fn: Callable
  batch_index: Any


@dataclasses.dataclass(frozen=True)
class Pass:
  """The mean over a random sample of the batches of the epoch.

  Attributes:
    share: share of the batches in the sample of the first epoch.
    growth: factor of the share from epoch to epoch, up to all batches.
  """

  share: float = 1.0
  growth: float = 1.0

  def init(self, params: optax.Params, num_steps: int) -> Any:
    """Nothing is remembered."""
    return ()

  def take(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> tuple[Any, Any, Any]:
    """Takes a snapshot by a pass over the sample."""
    share = jnp.minimum(self.share * self.growth**at.epoch, 1)
    size = jnp.ceil(share * at.num_steps).astype(jnp.int32)
    order = jax.random.permutation(at.key, at.num_steps)

    def mean_grad_fn(params: optax.Params) -> optax.Updates:
      add = lambda i, total: optax.tree.add(
        total, at.batch_grad_fn(params, order[i])
      )
      zeros = optax.tree.zeros_like(params)
      return optax.tree.scale(1 / size, jax.lax.fori_loop(0, size, add, zeros))

    return optax_svrg.take_snapshot(svrg, params, mean_grad_fn), memory, size

  def correct(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment, step: Step
  ) -> tuple[optax.Updates, Any, Any, Any]:
    """Computes the gradient at the snapshot, if there is one."""
    computed = (svrg.num_snapshots > 0).astype(jnp.int32)
    grads, svrg = step.update(step.grads, svrg, params, grad_fn=step.grad_fn)
    return grads, svrg, memory, computed


@dataclasses.dataclass(frozen=True)
class Table(Pass):
  """The mean over all batches, whose gradients are kept for the steps."""

  def init(self, params: optax.Params, num_steps: int) -> Any:
    """An empty table."""
    return jax.tree.map(
      lambda p: jnp.zeros((num_steps, *p.shape), p.dtype), params
    )

  def take(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> tuple[Any, Any, Any]:
    """Takes a snapshot by a pass that fills the table."""
    table = jax.lax.map(
      lambda i: at.batch_grad_fn(params, i), jnp.arange(at.num_steps)
    )
    mean = jax.tree.map(lambda t: t.mean(axis=0), table)
    svrg = optax_svrg.take_snapshot(svrg, params, lambda _: mean)
    return svrg, table, jnp.int32(at.num_steps)

  def correct(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment, step: Step
  ) -> tuple[optax.Updates, Any, Any, Any]:
    """Looks the gradient at the snapshot up."""
    entry = jax.tree.map(lambda t: t[step.batch_index], memory)
    grads, svrg = step.update(step.grads, svrg, params, snapshot_grads=entry)
    return grads, svrg, memory, 0


@dataclasses.dataclass(frozen=True)
class PreviousEpoch(Pass):
  """The means of parameters and gradients over the steps of an epoch before."""

  def init(self, params: optax.Params, num_steps: int) -> Any:
    """Sums of parameters and of gradients."""
    return optax.tree.zeros_like(params), optax.tree.zeros_like(params)

  def take(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> tuple[Any, Any, Any]:
    """Takes a snapshot without a pass; none in the first epoch."""
    mean_params, mean_grads = optax.tree.scale(1 / at.num_steps, memory)
    taken = optax_svrg.take_snapshot(svrg, mean_params, lambda _: mean_grads)
    svrg = optax.tree.where(at.epoch > 0, taken, svrg)
    return svrg, optax.tree.zeros_like(memory), jnp.int32(0)

  def correct(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment, step: Step
  ) -> tuple[optax.Updates, Any, Any, Any]:
    """Adds to the sums, too."""
    memory = optax.tree.add(memory, (params, step.grads))
    return super().correct(memory, svrg, params, at, step)


@dataclasses.dataclass(frozen=True)
class RunningMean(Pass):
  """The mean of the gradients at the snapshot that steps have computed."""

  def take(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment
  ) -> tuple[Any, Any, Any]:
    """Takes a snapshot without a pass, whose mean becomes known later."""
    zeros = optax.tree.zeros_like(params)
    svrg = optax_svrg.take_snapshot(svrg, params, lambda _: zeros)
    return svrg, memory, jnp.int32(0)

  def correct(
    self, memory: Any, svrg: Any, params: optax.Params, at: Moment, step: Step
  ) -> tuple[optax.Updates, Any, Any, Any]:
    """Corrects with the mean of the steps before, and then updates it."""
    entry = step.grad_fn(svrg.snapshot_params)
    # Nothing is known in the first step, whose gradient passes unchanged.
    known = svrg._replace(
      num_snapshots=jnp.where(at.is_start, 0, svrg.num_snapshots)
    )
    grads, after = step.update(step.grads, known, params, snapshot_grads=entry)
    seen = at.step % at.num_steps
    return (
      grads,
      after._replace(
        num_snapshots=svrg.num_snapshots,
        mean_grads=jax.tree.map(
          lambda m, s: m + (s - m) / (seen + 1), svrg.mean_grads, entry
        ),
      ),
      memory,
      1,
    )


WHEN = {"epochs": Epochs, "coin": CoinFlips, "gate": Gate}
MEANS = {
  "pass": Pass,
  "table": Table,
  "previous": PreviousEpoch,
  "running": RunningMean,
}


class SnapshotsState(NamedTuple):
  """State of :func:`transform`.

  Attributes:
    step: number of updates made.
    extra_gradients: number of gradients of a batch computed in addition to
      those of the steps.
    svrg: state of the transformation.
    when: what the strategy remembers in order to decide.
    mean: what it remembers in order to know the mean gradient.
  """

  step: jax.Array
  extra_gradients: jax.Array
  svrg: Any
  when: Any
  mean: Any


def transform(
  svrg: optax.GradientTransformationExtraArgs,
  when: Any,
  mean: Any,
  num_steps: int,
  num_epochs: int,
) -> optax.GradientTransformationExtraArgs:
  """SVRG that takes its snapshots by itself."""

  def init_fn(params: optax.Params) -> SnapshotsState:
    return SnapshotsState(
      step=jnp.zeros([], jnp.int32),
      extra_gradients=jnp.zeros([], jnp.int32),
      svrg=svrg.init(params),
      when=when.init(params),
      mean=mean.init(params, num_steps),
    )

  def update_fn(
    updates: optax.Updates,
    state: SnapshotsState,
    params: optax.Params,
    *,
    grad_fn: Callable,
    batch_index: Any,
    batch_grad_fn: Callable,
    **extra_args: Any,
  ) -> tuple[optax.Updates, SnapshotsState]:
    del extra_args
    at = Moment(state.step, num_steps, num_epochs, batch_grad_fn)
    decision = when.decide(state.when, state.svrg, params, at)
    # As before the first snapshot: no gradient there is computed.
    number = state.svrg.num_snapshots
    enabled = state.svrg._replace(
      num_snapshots=jnp.where(decision.enabled, number, 0)
    )
    before, memory, passed = jax.lax.cond(
      decision.due,
      lambda: mean.take(state.mean, enabled, params, at),
      lambda: (enabled, state.mean, jnp.int32(0)),
    )
    step = Step(svrg.update, updates, grad_fn, batch_index)
    corrected, after, memory, computed = mean.correct(
      memory, before, params, at, step
    )
    extra = state.extra_gradients + decision.extra_gradients + passed + computed
    return corrected, SnapshotsState(
      state.step + 1, extra, after, decision.memory, memory
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def method(
  context: Context,
  when: str = "epochs",
  mean: str = "pass",
  alpha: float | None = None,
  max_alpha: float = 1.0,
  **settings: Any,
) -> Method:
  """SVRG with a snapshot strategy."""
  made = []
  for kind in (WHEN[when], MEANS[mean]):
    names = {f.name for f in dataclasses.fields(kind)} & settings.keys()
    made.append(kind(**{name: settings.pop(name) for name in names}))
  if settings:
    raise TypeError(f"{when} and {mean} do not have {', '.join(settings)}.")
  if alpha is None:
    svrg = optax_svrg.adaptive_svrg(max_alpha=max_alpha)
  else:
    svrg = optax_svrg.alpha_svrg(alpha)
  return Method(transform(svrg, *made, context.steps_per_epoch, context.epochs))
