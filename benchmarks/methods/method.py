# SPDX-License-Identifier: Apache-2.0
"""Interface between methods and the trainer."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import numpy as np
import optax


class Context(NamedTuple):
  """The training that a method is made for."""

  num_examples: int  # Number of training examples.
  batch_size: int  # Examples of a batch.
  epochs: int  # Number of epochs.

  @property
  def steps_per_epoch(self) -> int:
    """Number of batches drawn in each epoch: the remainder is dropped."""
    return self.num_examples // self.batch_size

  @property
  def num_fixed_batches(self) -> int:
    """Number of fixed batches: they hold all examples, as even as can be."""
    return math.ceil(self.num_examples / self.batch_size)


class Method(NamedTuple):
  """A method of variance reduction.

  ``transform.update`` gets ``grad_fn``, the gradient of the batch as a function
  of the parameters; ``batch_index``, the number of the batch;
  ``batch_grad_fn(params, batch_index)``, the gradient of any batch of the
  epoch; and ``factors_fn(params, whole)``, per-example gradients, see
  :func:`benchmarks.methods.balanced.factors`. A transformation may take its
  snapshots by itself; it then counts the gradients it computes in a field
  ``extra_gradients`` of its state.
  """

  # The transformation that precedes the optimizer.
  transform: optax.GradientTransformation
  # Coefficient of the correction as far as it is known in advance, by step. The
  # trainer takes the snapshots of an interval where it is not 0 throughout;
  # `None` if the trainer is to take none.
  coefficient: optax.Schedule | None = None
  # Whether each example belongs to one batch for good, instead of being drawn
  # in each epoch.
  has_fixed_batches: bool = False
  # Whether fixed batches have the same order in each epoch.
  has_fixed_order: bool = False
  # From the transformation's state, a random order of the examples and the
  # number of steps to the state at the start of an epoch, with the field
  # `order`; `None` for the random one.
  next_order: Callable[..., Any] | None = None

  def uses_snapshot(self, start: int, stop: int) -> bool:
    """Returns whether a step from ``start`` to ``stop`` uses the snapshot."""
    if self.coefficient is None:
      return False
    return bool(np.any(self.coefficient(np.arange(start, stop)) != 0))

  def num_steps(self, context: Context) -> int:
    """Number of steps of an epoch."""
    if self.has_fixed_batches:
      return context.num_fixed_batches
    return context.steps_per_epoch
