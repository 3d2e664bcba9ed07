# SPDX-License-Identifier: Apache-2.0
"""Deterministic streams of batches, read with Grain.

A batch is a function of the seed and the number of the step alone, the
augmentation of an example a function of the seed, the epoch and the example. So
a stream can start at any step, passes over the same steps see the same batches,
and neither the number of processes, devices, threads nor workers matters.

See :class:`benchmarks.data.sources.Source` for what a source of examples is.
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
  """A batch.

  Attributes:
    images: uint8 of the shape (batch, image_size, image_size, channels).
    labels: int32 of the shape (batch,).
    weights: float32 of the shape (batch,), 1, or 0 for padding.
    index: int32, the number of the batch among fixed batches, else its
      position in the epoch.
    step: int32, the number of the step, from 0 on in the first epoch, from
      which the draws on the device follow.
  """

  images: Any
  labels: Any
  weights: Any
  index: Any
  step: Any


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, *key: int) -> np.ndarray:
  """Numbers from 0 to ``size - 1`` in an order that follows from the rest."""
  permutation = _rng(seed, *key).permutation(size)
  permutation.setflags(write=False)
  return permutation


def _rng(seed: int, *key: int) -> np.random.Generator:
  return np.random.Generator(
    np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))
  )


@dataclasses.dataclass(frozen=True)
class Visits:
  """Which examples are in the batch of each step.

  By default each epoch goes through the examples in an order of its own, and
  drops those that do not fill a batch. With fixed batches, as tables of
  gradients need them, each example belongs to one batch for good, and the order
  of the batches is new in each epoch. No example is dropped: the batches are as
  even as can be, and short ones are filled up with examples of their own, which
  do not count.

  Attributes:
    num_examples: number of examples of the source.
    batch_size: examples in a batch, of all processes.
    seed: from which everything follows, not negative.
    has_fixed_batches: whether the batches are fixed.
  """

  num_examples: int
  batch_size: int
  seed: int
  has_fixed_batches: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self) -> None:
    for name, low in (("num_examples", 1), ("batch_size", 1), ("seed", 0)):
      value = getattr(self, name)
      if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}.")
    if not self.steps_per_epoch:
      raise ValueError(
        "batch_size must be at most the number of examples,"
        f" {self.num_examples}, got {self.batch_size}."
      )

  @property
  def steps_per_epoch(self) -> int:
    """Number of batches in an epoch."""
    if self.has_fixed_batches:
      return math.ceil(self.num_examples / self.batch_size)
    return self.num_examples // self.batch_size

  def batch(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The batch of a step."""
    if step < 0:
      raise ValueError(f"step must not be negative, got {step}.")
    epoch, position = divmod(step, self.steps_per_epoch)
    if not self.has_fixed_batches:
      start = position * self.batch_size
      order = _permutation(self.num_examples, self.seed, epoch)
      indices = order[start : start + self.batch_size]
      return indices, np.ones(self.batch_size, bool), position
    number = int(_permutation(self.steps_per_epoch, self.seed, epoch)[position])
    bounds = [
      (i * self.num_examples) // self.steps_per_epoch
      for i in (number, number + 1)
    ]
    members = _permutation(self.num_examples, self.seed)[slice(*bounds)]
    is_real = np.arange(self.batch_size) < len(members)
    return np.resize(members, self.batch_size), is_real, number


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Makes the part of a batch that this process holds.

  Attributes:
    source: the examples.
    batch: from the number of a step to its indices, which of them count, and
      the number of the batch.
    transform: of an image of the example of this index at this step.
    rows: which rows of a batch this process holds.
  """

  source: Source
  batch: Callable[[int], tuple[np.ndarray, np.ndarray, int]]
  transform: Callable[[int, int, np.ndarray], np.ndarray]
  rows: np.ndarray

  def __call__(self, step: int) -> Batch:
    indices, is_real, number = self.batch(step)
    images, labels = [], []
    for index in indices[self.rows].tolist():
      example = self.source[index]
      images.append(self.transform(step, index, example["image"]))
      labels.append(example["label"])
    return Batch(
      np.stack(images),
      np.array(labels, np.int32),
      is_real[self.rows].astype(np.float32),
      np.int32(number),
      np.int32(step),
    )


def _augment(
  recipe: recipe_lib.Recipe,
  visits: Visits,
  step: int,
  index: int,
  image: np.ndarray,
) -> np.ndarray:
  rng = _rng(visits.seed, step // visits.steps_per_epoch, index)
  return recipe_lib.augment(recipe, rng, image)


def _resize(
  recipe: recipe_lib.Recipe, step: int, index: int, image: np.ndarray
) -> np.ndarray:
  del step, index
  return recipe_lib.resize(recipe, image)


def _in_order(
  num_examples: int, batch_size: int, step: int
) -> tuple[np.ndarray, np.ndarray, int]:
  """Like ``Visits.batch``, for batches in the order of the source."""
  indices = np.arange(step * batch_size, (step + 1) * batch_size)
  return indices % num_examples, indices < num_examples, step


def _local_rows(batch_size: int, sharding: NamedSharding | None) -> np.ndarray:
  """The rows of a batch that lie on devices of this process."""
  rows = np.arange(batch_size)
  if sharding is None:
    return rows
  num_shards = math.prod(
    sharding.mesh.shape[name] for name in _axes(sharding.spec)
  )
  if batch_size % num_shards:
    raise ValueError(
      "batch_size must be a multiple of the number of shards,"
      f" {num_shards}, got {batch_size}."
    )
  parts = sharding.addressable_devices_indices_map((batch_size,)).values()
  return np.unique(np.concatenate([rows[part] for part in parts]))


def _axes(spec: P) -> tuple[str, ...]:
  """The axes that the examples are divided among."""
  axes = spec[0] if spec else None
  return (axes,) if isinstance(axes, str) else axes or ()


def _to_devices(
  batch_size: int,
  sharding: NamedSharding | None,
  rows: np.ndarray,
  batch: Batch,
) -> Batch:
  if sharding is None:
    # The CPU may keep an array as it is, and with it what a worker shares.
    return jax.device_put(jax.tree.map(np.copy, batch))

  def place(array: np.ndarray) -> jax.Array:
    if not array.ndim:
      return jax.make_array_from_callback(
        (), NamedSharding(sharding.mesh, P()), lambda _: array
      )
    every = np.arange(batch_size)
    return jax.make_array_from_callback(
      (batch_size, *array.shape[1:]),
      sharding,
      lambda where: array[np.searchsorted(rows, every[where[0]])],
    )

  return jax.tree.map(place, batch)


def _stream(
  source: Source,
  batch: Callable[[int], tuple[np.ndarray, np.ndarray, int]],
  transform: Callable[[int, int, np.ndarray], np.ndarray],
  steps: range,
  batch_size: int,
  sharding: NamedSharding | None,
  num_workers: int,
) -> grain.DatasetIterator[Batch]:
  if num_workers < 0:
    raise ValueError(f"num_workers must not be negative, got {num_workers}.")
  rows = _local_rows(batch_size, sharding)
  dataset = (
    grain.MapDataset.range(steps.start, steps.stop)
    .map(_Reader(source, batch, transform, rows))
    .to_iter_dataset(
      grain.ReadOptions(
        num_threads=_NUM_THREADS, prefetch_buffer_size=_NUM_THREADS
      )
    )
  )
  if num_workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads some of its own.
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=num_workers)
    )
  dataset = dataset.map(
    functools.partial(_to_devices, batch_size, sharding, rows)
  )
  return iter(
    grain.experimental.ThreadPrefetchIterDataset(
      dataset, prefetch_buffer_size=_BUFFER_SIZE
    )
  )


def train_batches(
  source: Source,
  recipe: recipe_lib.Recipe,
  visits: Visits,
  start: int,
  stop: int,
  sharding: NamedSharding | None = None,
  num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
  """The batches of steps, augmented, read ahead."""
  if visits.num_examples != len(source):
    raise ValueError(
      "visits must be of as many examples as source,"
      f" {len(source)}, got {visits.num_examples}."
    )
  if not 0 <= start <= stop:
    raise ValueError(
      f"start and stop must be steps in ascending order, got {start}, {stop}."
    )
  return _stream(
    source,
    visits.batch,
    functools.partial(_augment, recipe, visits),
    range(start, stop),
    visits.batch_size,
    sharding,
    num_workers,
  )


def validation_batches(
  source: Source,
  recipe: recipe_lib.Recipe,
  batch_size: int,
  sharding: NamedSharding | None = None,
  num_workers: int = 0,
) -> grain.DatasetIterator[Batch]:
  """All examples once, in the order of the source."""
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  return _stream(
    source,
    functools.partial(_in_order, len(source), batch_size),
    functools.partial(_resize, recipe),
    range(math.ceil(len(source) / batch_size)),
    batch_size,
    sharding,
    num_workers,
  )
