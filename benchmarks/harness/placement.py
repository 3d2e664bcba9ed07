# SPDX-License-Identifier: Apache-2.0
"""Placement of the examples on one device, or on those of all processes."""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

_AXIS = "data"


class Examples(NamedTuple):
  """Examples of a data set.

  Attributes:
    images: the images, flattened.
    labels: their classes.
    indices: their numbers in the data set.
  """

  images: Any
  labels: Any
  indices: Any


class Placement:
  """Places weights and examples.

  On a single device all examples are put there once, and batches are gathered
  by the compiled program. With more devices, each batch is divided among them,
  and each process loads the examples of its own devices, whichever the batches
  are: so these are the same for any number of devices and processes.

  Attributes:
    num_devices: of all processes.
    replicated: the sharding of what is the same on all devices, ``None`` on a
      single one.
  """

  def __init__(self) -> None:
    self.num_devices = jax.device_count()
    self.replicated = None
    if self.num_devices > 1:
      self._mesh = jax.make_mesh(
        (self.num_devices,), (_AXIS,), axis_types=(AxisType.Auto,)
      )
      self.replicated = NamedSharding(self._mesh, P())

  def store(self, images: np.ndarray, labels: np.ndarray) -> Any:
    """Arrays that a compiled program needs to look examples up."""
    if self.num_devices > 1:
      return ()
    return jax.device_put((images, labels))

  def refer(self, images: np.ndarray, labels: np.ndarray, indices: Any) -> Any:
    """References to examples in a compiled program."""
    if self.num_devices == 1:
      return indices
    indices = np.asarray(indices)
    spec = P(*[None] * (indices.ndim - 1), _AXIS)
    if indices.shape[-1] % self.num_devices:
      spec = P()
    sharding = NamedSharding(self._mesh, spec)

    def load(array: np.ndarray) -> jax.Array:
      return jax.make_array_from_callback(
        indices.shape + array.shape[1:],
        sharding,
        lambda where: array[indices[where[: indices.ndim]]],
      )

    return Examples(
      load(images), load(labels), load(np.arange(len(images), dtype=np.int32))
    )

  def in_batches(self, reference: Any, size: int) -> Any:
    """Divides examples, so that each batch is of all devices."""
    size = min(size, len(jax.tree.leaves(reference)[0]))
    shards = 1 if size % self.num_devices else self.num_devices

    def divide(x: jax.Array) -> jax.Array:
      # The rows of a device stay where they are.
      rest = x.shape[1:]
      x = x.reshape(shards, -1, size // shards, *rest).swapaxes(0, 1)
      return x.reshape(-1, size, *rest)

    return jax.tree.map(divide, reference)

  def padded_size(self, size: int) -> int:
    """The least multiple of the number of devices that is at least this."""
    return self.num_devices * math.ceil(size / self.num_devices)


def look_up(store: Any, reference: Any) -> Examples:
  """The examples that a reference stands for, in a compiled program."""
  if isinstance(reference, Examples):
    return reference
  return Examples(*(x[reference] for x in store), reference)
