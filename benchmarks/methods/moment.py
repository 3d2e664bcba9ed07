# SPDX-License-Identifier: Apache-2.0
"""Where a training is, for snapshot strategies."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


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
    """Whether the step is the first one of its epoch."""
    return self.step % self.num_steps == 0

  @property
  def key(self) -> jax.Array:
    """A random key of this step, the same in all trainings."""
    return jax.random.fold_in(jax.random.key(0), self.step)


class Decision(NamedTuple):
  """What a strategy decides about a step.

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
