# SPDX-License-Identifier: Apache-2.0
"""Trains an architecture with each method, for test_paper.

The argument is its name. Prints, as JSON, the result of each run and the names
of the programs that were compiled in its first epoch, and later.
"""

import dataclasses
import json
import logging
import sys

import jax
import numpy as np

from benchmarks import paper, reporting
from benchmarks.data import sources

SMOKE = paper.SCALES["smoke"]


def make_images(size=60, seed=0):
  rng = np.random.default_rng(seed)

  def source(size):
    images = rng.integers(0, 256, (size, 16, 16, 3), np.uint8)
    return sources.ArraySource("random", images, rng.integers(0, 4, size))

  return sources.ImageData(source(size), source(20), 4, 3, "random")


def make_settings(model, **changes):
  settings = paper.Settings(
    dataset="random",
    fingerprint="random",
    model=model,
    changes=SMOKE.changes.get(model, {}),
    image_size=SMOKE.image_size,
    train_examples=60,
    validation_examples=20,
    epochs=3,
    warmup_epochs=1,
    batch_size=20,
    lr=4e-3,
    alpha0=0.75,
    drop_path=0.0,
    dtype="float32",
    is_table_kept=True,
  )
  return dataclasses.replace(settings, **changes)


class Compiled(logging.Handler):
  """Collects the names of the programs that are compiled."""

  def __init__(self):
    super().__init__()
    self.names = []

  def emit(self, record):
    words = record.getMessage().split()
    if words[0] == "Compiling":
      self.names.append(words[1])


def main(model):
  compiled = Compiled()
  logger = logging.getLogger("jax")
  logger.addHandler(compiled)
  logger.propagate = False
  is_network = model in SMOKE.changes
  settings = make_settings(model, drop_path=0.1 * is_network)
  trainer = paper.Trainer(settings, make_images())
  results = []
  # A second seed of a method compiles nothing.
  for method, seed in [*((m, 0) for m in paper.METHODS), ("svrg", 1)]:
    counts = []
    compiled.names.clear()
    with jax.log_compiles():
      row = trainer.fit(
        reporting.Run(method, seed),
        lambda point, counts=counts: counts.append(len(compiled.names)),
      )
    results.append(
      {
        "method": method,
        "seed": seed,
        "row": row,
        "compiled_in_first_epoch": compiled.names[: counts[0]],
        "compiled_later": compiled.names[counts[0] :],
      }
    )
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv[1])
