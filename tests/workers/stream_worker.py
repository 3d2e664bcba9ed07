# SPDX-License-Identifier: Apache-2.0
"""Reads batches in one of several processes; see test_streams.py."""

import json
import sys

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from benchmarks.data import recipe as recipe_lib
from benchmarks.data import streams

RECIPE = recipe_lib.Recipe(image_size=12, num_channels=3, num_classes=5)
BATCH_SIZE = 8
_NUM_DEVICES = 8


class Source:
  """Images of noise, whose label is their index modulo the classes.

  Attributes:
    visited: the indices that were asked for.
  """

  def __init__(self, num_examples=27, num_channels=3):
    self._images = np.random.default_rng(0).integers(
      256, size=(num_examples, 14, 13, num_channels), dtype=np.uint8
    )
    self.visited = []

  def __len__(self):
    return len(self._images)

  def __getitem__(self, index):
    self.visited.append(index)
    return {"image": self._images[index], "label": index % 5}


def visits(source, **kwargs):
  """Those of the tests, of a source."""
  return streams.Visits(len(source), BATCH_SIZE, 3, **kwargs)


def _local(array):
  """What this process holds, each row once, in the order of the whole."""
  parts = {
    shard.index[0].start or 0: np.asarray(shard.data)
    for shard in array.addressable_shards
  }
  return np.concatenate([parts[start] for start in sorted(parts)])


def main(num_processes, process, port, out):
  """Writes all batches as this process has them, and what it has read."""
  num_processes, process = int(num_processes), int(process)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", _NUM_DEVICES // num_processes)
  if num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      f"127.0.0.1:{port}", num_processes=num_processes, process_id=process
    )
  mesh = jax.make_mesh((_NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
  grid = jax.make_mesh(
    (4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2
  )
  source = Source()
  mix = jax.jit(
    recipe_lib.mix, static_argnums=0, out_shardings=NamedSharding(mesh, P())
  )
  arrays = {}
  for fixed in (False, True):
    each = visits(source, has_fixed_batches=fixed)
    for batch in streams.train_batches(
      source, RECIPE, each, 0, 5, NamedSharding(mesh, P("data"))
    ):
      name = f"{int(fixed)}_{batch.step}"
      assert batch.step.sharding.is_fully_replicated
      arrays[f"local_images_{name}"] = _local(batch.images)
      arrays[f"local_labels_{name}"] = _local(batch.labels)
      arrays[f"local_weights_{name}"] = _local(batch.weights)
      key = jax.random.fold_in(jax.random.key(0), int(batch.step))
      mixed = mix(RECIPE, key, batch.images, batch.labels)
      for i, array in enumerate(mixed):
        arrays[f"mixed_{i}_{name}"] = np.asarray(array.addressable_data(0))
  # Divided along one of two axes.
  for batch in streams.validation_batches(
    source, RECIPE, 8, NamedSharding(grid, P("data"))
  ):
    arrays[f"local_validation_{batch.step}"] = _local(batch.images)
  np.savez(out, **arrays)
  with open(f"{out}.json", "w") as file:
    json.dump(source.visited, file)


if __name__ == "__main__":
  main(*sys.argv[1:])
