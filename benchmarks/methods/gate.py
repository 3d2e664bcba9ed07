# SPDX-License-Identifier: Apache-2.0
"""A gate that enables variance reduction where it seems worth its gradients."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_svrg


class Moment(NamedTuple):
  """The beginning of a step.

  Attributes:
    step: number of steps made.
    num_steps: number of steps of an epoch.
    num_epochs: number of epochs of the training.
    batch_grad_fn: the gradient of any batch of the epoch, a function of the
      parameters and of its number.
  """

  step: jax.Array
  num_steps: int
  num_epochs: int
  batch_grad_fn: Callable

  @property
  def epoch(self) -> jax.Array:
    """Number of the epoch."""
    return self.step // self.num_steps

  @property
  def is_start(self) -> jax.Array:
    """True for the first step of an epoch."""
    return self.step % self.num_steps == 0

  @property
  def key(self) -> jax.Array:
    """A random key of this step, the same in all trainings."""
    return jax.random.fold_in(jax.random.key(0), self.step)


class Decision(NamedTuple):
  """Decision of a strategy about a step.

  Attributes:
    enabled: whether variance is reduced.
    due: whether a snapshot is taken before it.
    memory: what the strategy remembers from now on.
    extra_gradients: number of gradients of a batch that the decision took.
  """

  enabled: jax.Array
  due: jax.Array
  memory: Any
  extra_gradients: Any = 0


class Payoff(NamedTuple):
  """Cost of noise in an interval of training; real scalars.

  Attributes:
    progress: by how much the loss has decreased.
    gain: by how much more, at most, it would have decreased with a control
      variate.
    variance_ratio: the variance that the control variate leaves, divided by
      that without it.
  """

  progress: jax.Array
  gain: jax.Array
  variance_ratio: jax.Array

  def pays(self, cost: float) -> jax.Array:
    """Returns whether variance reduction is worth its gradients.

    It must lower the loss by more than as many gradients would with plain
    steps, and the variance by more than its cost: smaller steps lessen noise,
    too, for nothing but slower progress.
    """
    return (self.gain > (cost - 1) * self.progress) & (
      self.variance_ratio * cost < 1
    )


def payoff(
  moments: optax_svrg.RunningMoments, displacement: optax.Updates
) -> Payoff:
  r"""Estimates the cost of noise since the snapshot, from plain steps.

  For an interval of plain steps that have moved the parameters by :math:`d`
  from those of the snapshot, the loss has changed, up to third order, by
  :math:`\langle \bar s, d \rangle + \frac{1}{2} \langle \bar g - \bar s, d
  \rangle`. The second term, the curvature along the path, holds all that noise
  has cost: its effect of first order averages out. A control variate that
  leaves the share :math:`r` of the variance saves at most :math:`1 - r` of it.
  """
  change = optax.tree.sub(moments.mean_grads, moments.mean_snapshot_grads)
  curvature = optax.tree.vdot(change, displacement) / 2
  ratio = moments.variance_ratio(moments.optimal_alpha(per="tree"))
  slope = optax.tree.vdot(moments.mean_snapshot_grads, displacement)
  return Payoff(-slope - curvature, (1 - ratio) * curvature, ratio)


class GateState(NamedTuple):
  """State of :class:`Gate`.

  Attributes:
    start: the parameters at the start of the epoch.
    is_open: whether variance is reduced.
  """

  start: optax.Params
  is_open: jax.Array


@dataclasses.dataclass(frozen=True)
class Gate:
  """At the start of each epoch while a gate is open.

  It opens after a probe whose :class:`Payoff` pays, and closes after an epoch
  in which the variance has decreased by less than the cost.

  Attributes:
    probes: batches of a probe.
    every: epochs between probes.
    cost: gradients per step, with the pass of the snapshot.
  """

  probes: int = 4
  every: int = 4
  cost: float = 3.0

  def init(self, params: optax.Params) -> GateState:
    """A closed gate."""
    return GateState(jax.tree.map(jnp.array, params), jnp.zeros([], bool))

  def decide(
    self, memory: GateState, svrg: Any, params: optax.Params, at: Moment
  ) -> Decision:
    """Decides at the start of an epoch."""

    def probe() -> jax.Array:
      chosen = jax.random.permutation(at.key, at.num_steps)[: self.probes]

      def see(moments: Any, i: jax.Array) -> tuple[Any, None]:
        pair = (at.batch_grad_fn(p, i) for p in (params, memory.start))
        return moments.update(*pair), None

      moments = optax_svrg.RunningMoments.create(params)
      moments, _ = jax.lax.scan(see, moments, chosen)
      displacement = optax.tree.sub(params, memory.start)
      return payoff(moments, displacement).pays(self.cost)

    is_probed = at.is_start & ~memory.is_open & (at.epoch > 0)
    is_probed &= at.epoch % self.every == 0
    stays = memory.is_open & (svrg.estimate.variance_ratio * self.cost < 1)
    is_open = jax.lax.cond(
      is_probed,
      probe,
      lambda: jnp.where(at.is_start, stays, memory.is_open),
    )
    start = optax.tree.where(at.is_start, params, memory.start)
    return Decision(
      is_open,
      is_open & at.is_start,
      GateState(start, is_open),
      jnp.where(is_probed, 2 * self.probes, 0),
    )
