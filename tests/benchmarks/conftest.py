# SPDX-License-Identifier: Apache-2.0
"""A small data set and a way to call the commands."""

from click.testing import CliRunner
import numpy as np
import pytest

from benchmarks import cli
from tests import helpers

TRAIN, VALIDATION, SIDE = 50, 20, 6


def write_dataset(folder):
  """A small data set with something to learn, in the form of Fashion-MNIST."""
  rng = np.random.default_rng(0)
  prototypes = rng.integers(0, 200, (10, SIDE, SIDE))
  arrays = []
  for part, size in (("train", TRAIN), ("t10k", VALIDATION)):
    labels = rng.integers(0, 10, size)
    images = prototypes[labels] + rng.integers(0, 50, (size, SIDE, SIDE))
    helpers.write_gz(
      folder / f"{part}-images-idx3-ubyte.gz", helpers.idx(images)
    )
    helpers.write_gz(
      folder / f"{part}-labels-idx1-ubyte.gz", helpers.idx(labels)
    )
    arrays += [images, labels]
  return arrays


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  """The folder of the small data set."""
  folder = tmp_path_factory.mktemp("idx")
  write_dataset(folder)
  return folder


@pytest.fixture
def call():
  """Runs ``python -m benchmarks`` with arguments, in this process."""
  return lambda *args: CliRunner().invoke(cli.main, [str(a) for a in args])
