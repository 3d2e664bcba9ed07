# SPDX-License-Identifier: Apache-2.0
"""Deterministic streams of batches, read with Grain.

A batch is a function of the seed and the number of the step alone, the
augmentation of an example a function of the seed, the epoch and the example. So
a stream can start at any step, passes over the same steps see the same batches,
and neither the number of processes, devices, threads nor workers matters.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

from absl import flags
import grain
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from benchmarks.data import recipe as recipe_lib
from benchmarks.data.sources import Source

_NUM_THREADS = 4  # Each reads a batch.
_BUFFER_SIZE = 2  # Batches ahead of the training, on the device.


class Batch(NamedTuple):
  """A batch."""

  images: Any  # Uint8, (batch, image_size, image_size, channels).
  labels: Any  # Int32, (batch,).
  weights: Any  # Float32, (batch,), 1, or 0 for padding.
  # Int32, its number among fixed batches, else its position in the epoch.
  index: Any
  # Int32, from 0 on in the first epoch; the draws on the device follow from it.
  step: Any


def _rng(seed: int, *key: int) -> np.random.Generator:
  return np.random.Generator(
    np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
  )


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, *key: int) -> np.ndarray:
  """Numbers from 0 to ``size - 1`` in an order that follows from the rest."""
  return _rng(seed, *key).permutation(size)


@dataclasses.dataclass(frozen=True)
class Visits:
  """Which examples are in the batch of each step.

  By default each epoch goes through the examples in an order of its own, and
  drops those that do not fill a batch. With fixed batches, as tables of
  gradients need them, each example belongs to one batch for good, and the order
  of the batches is new in each epoch. No example is dropped: the batches are as
  even as can be, and short ones are filled up with examples of their own, which
  do not count.
  """

  num_examples: int  # Of the source.
  batch_size: int  # Of all processes.
  seed: int  # From which everything follows, not negative.
  has_fixed_batches: bool = dataclasses.field(default=False, kw_only=True)

  @property
  def steps_per_epoch(self) -> int:
    """Number of batches in an epoch."""
    if self.has_fixed_batches:
      return math.ceil(self.num_examples / self.batch_size)
    return self.num_examples // self.batch_size

  def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The batch of a step."""
    epoch, position = divmod(step, self.steps_per_epoch)
    if not self.has_fixed_batches:
      start = position * self.batch_size
      order = _permutation(self.num_examples, self.seed, epoch)
      indices = order[start : start + self.batch_size]
      return indices, np.ones(self.batch_size, bool), position
    number = int(_permutation(self.steps_per_epoch, self.seed, epoch)[position])
    bounds = np.array([number, number + 1]) * self.num_examples
    start, stop = bounds // self.steps_per_epoch
    members = _permutation(self.num_examples, self.seed)[start:stop]
    is_real = np.arange(self.batch_size) < len(members)
    return np.resize(members, self.batch_size), is_real, number


def _stream(
  source: Source,
  batch: Callable[[int], tuple[np.ndarray, np.ndarray, int]],
  transform: Callable[[int, int, np.ndarray], np.ndarray],
  steps: range,
  batch_size: int,
  sharding: NamedSharding,
  num_workers: int,
) -> grain.DatasetIterator[Batch]:
  """The batches of steps, each made by ``batch`` as by :meth:`Visits.batch`."""
  # Those that lie on devices of this process.
  parts = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = np.unique([np.arange(batch_size)[part] for part in parts])

  def read(step: int) -> Batch:
    indices, is_real, number = batch(step)
    images, labels = [], []
    for index in indices[rows].tolist():
      example = source[index]
      images.append(transform(step, index, example["image"]))
      labels.append(example["label"])
    return Batch(
      np.stack(images),
      np.array(labels, np.int32),
      is_real[rows].astype(np.float32),
      np.int32(number),
      np.int32(step),
    )

  def place(array: np.ndarray) -> jax.Array:
    placed = sharding if array.ndim else NamedSharding(sharding.mesh, P())
    # The CPU may keep an array as it is, and with it what a worker shares.
    return jax.make_array_from_process_local_data(placed, np.copy(array))

  options = grain.ReadOptions(
    num_threads=_NUM_THREADS, prefetch_buffer_size=_NUM_THREADS
  )
  dataset = grain.MapDataset.range(steps.start, steps.stop).map(read)
  dataset = dataset.to_iter_dataset(options)
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads some of its own.
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  return iter(
    grain.experimental.ThreadPrefetchIterDataset(
      dataset.map(lambda batch: jax.tree.map(place, batch)),
      prefetch_buffer_size=_BUFFER_SIZE,
    )
  )


def train_batches(
  source: Source,
  recipe: recipe_lib.Recipe,
  visits: Visits,
  start: int,
  stop: int,
  sharding: NamedSharding,
  num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
  """The batches of steps, augmented, read ahead by workers or this process."""

  def augment(step: int, index: int, image: np.ndarray) -> np.ndarray:
    rng = _rng(visits.seed, step // visits.steps_per_epoch, index)
    return recipe_lib.augment(recipe, rng, image)

  steps, size = range(start, stop), visits.batch_size
  return _stream(
    source, visits.batch, augment, steps, size, sharding, num_workers
  )


def validation_batches(
  source: Source,
  recipe: recipe_lib.Recipe,
  batch_size: int,
  sharding: NamedSharding,
  num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
  """All examples once, in the order of the source."""
  num_examples = len(source)

  def batch(step: int) -> tuple[np.ndarray, np.ndarray, int]:
    indices = np.arange(step * batch_size, (step + 1) * batch_size)
    return indices % num_examples, indices < num_examples, step

  def resize(step: int, index: int, image: np.ndarray) -> np.ndarray:
    return recipe_lib.resize(recipe, image)

  steps = range(math.ceil(num_examples / batch_size))
  return _stream(
    source, batch, resize, steps, batch_size, sharding, num_workers
  )
