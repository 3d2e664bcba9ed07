# SPDX-License-Identifier: Apache-2.0
"""Data sets in memory: their files, augmentation, wrong labels."""

import gzip
import hashlib
import os
from pathlib import Path
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data import arrays
from tests import helpers
from tests.benchmarks.conftest import SIDE, TRAIN, VALIDATION, write_dataset


class TestData:
  def test_small_data_set(self, tmp_path):
    images, labels, val_images, val_labels = write_dataset(tmp_path)
    dataset = arrays.load("fashion-mnist", tmp_path)
    want = (images - images.mean()) / images.std()
    np.testing.assert_allclose(
      dataset.train_images, want.reshape(TRAIN, -1), rtol=1e-4, atol=1e-6
    )
    # By the statistics of the training images, not by their own.
    want = (val_images - images.mean()) / images.std()
    np.testing.assert_allclose(
      dataset.validation_images,
      want.reshape(VALIDATION, -1),
      rtol=1e-4,
      atol=1e-6,
    )
    np.testing.assert_array_equal(dataset.train_labels, labels)
    np.testing.assert_array_equal(dataset.validation_labels, val_labels)
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.dtype == np.int32
    assert dataset.num_classes == 10
    raw = b"".join(
      x.astype(np.uint8).tobytes()
      for x in (images, labels, val_images, val_labels)
    )
    assert dataset.sha256 == hashlib.sha256(raw).hexdigest()

  @pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
      ("train-images-idx3", lambda p: p.unlink(), "No such file"),
      (
        "train-labels-idx1",
        lambda p: p.write_bytes(p.read_bytes()[:-10]),
        "ended before",
      ),
      (
        "t10k-images-idx3",
        lambda p: p.write_bytes(b"no archive at all"),
        "Not a gzipped file",
      ),
      (
        "t10k-labels-idx1",
        lambda p: p.write_bytes(p.read_bytes()[:12] + b"\xff" * 40),
        r"\.gz: .+\.",  # The words are zlib's.
      ),
      (
        "train-images-idx3",
        lambda p: helpers.write_gz(p, helpers.idx(np.zeros(TRAIN))),
        "must start with 00000803 .*, got 00000801",
      ),
      (
        "train-labels-idx1",
        lambda p: helpers.write_gz(p, b"\0\0\x0d\x01" + bytes(4)),
        "must start with 00000801 .*, got 00000d01",
      ),
      (
        "t10k-labels-idx1",
        lambda p: helpers.write_gz(p, b""),
        "got an empty file",
      ),
      (
        "t10k-images-idx3",
        lambda p: helpers.write_gz(p, b"\0\0\x08\x03" + bytes(11)),
        "ends inside its header",
      ),
      (
        "t10k-images-idx3",
        lambda p: helpers.write_gz(p, gzip.decompress(p.read_bytes())[:-1]),
        r"must hold 720 bytes of data for its shape \[20, 6, 6\], got 719",
      ),
      (
        "t10k-images-idx3",
        lambda p: helpers.write_gz(p, gzip.decompress(p.read_bytes()) + b"\0"),
        "must hold 720 bytes .* got 721",
      ),
      (
        "train-labels-idx1",
        lambda p: helpers.write_gz(p, helpers.idx(np.zeros(TRAIN - 1))),
        "a label for each of the 50 images, got 49",
      ),
      (
        "t10k-labels-idx1",
        lambda p: helpers.write_gz(p, helpers.idx(np.full(VALIDATION, 10))),
        "labels must be from 0 to 9, got 10",
      ),
    ],
  )
  def test_damaged_file(self, tmp_path, name, damage, message):
    write_dataset(tmp_path)
    path = tmp_path / f"{name}-ubyte.gz"
    damage(path)
    with pytest.raises(arrays.DataError, match=message) as info:
      arrays.load("fashion-mnist", tmp_path)
    assert str(info.value).startswith(f"{path}: ")
    assert "\n" not in str(info.value)

  def test_images_all_alike(self, tmp_path):
    write_dataset(tmp_path)
    alike = np.full((TRAIN, SIDE, SIDE), 7)
    helpers.write_gz(
      tmp_path / "train-images-idx3-ubyte.gz", helpers.idx(alike)
    )
    with pytest.raises(arrays.DataError, match="are alike, namely 7"):
      arrays.load("fashion-mnist", tmp_path)

  def test_mnist_5k(self):
    dataset = arrays.load("mnist-5k", None)
    assert dataset.train_images.shape == (4000, 784)
    assert dataset.validation_images.shape == (1000, 784)
    np.testing.assert_array_equal(
      np.bincount(dataset.train_labels), np.full(10, 400)
    )
    np.testing.assert_array_equal(
      np.bincount(dataset.validation_labels), np.full(10, 100)
    )
    # Sums of float32: more digits would test NumPy.
    assert dataset.train_images.mean() == pytest.approx(0, abs=1e-3)
    assert dataset.train_images.std() == pytest.approx(1, abs=1e-3)

  def test_real_fashion_mnist(self):
    folder = fashion_mnist_dir()
    if folder is None:
      pytest.skip("needs FASHION_MNIST_DIR or the package of Debian")
    dataset = arrays.load("fashion-mnist", folder)
    assert dataset.train_images.shape == (60_000, 784)
    assert dataset.validation_images.shape == (10_000, 784)
    assert set(np.bincount(dataset.train_labels)) == {6000}
    assert set(np.bincount(dataset.validation_labels)) == {1000}


def fashion_mnist_dir():
  if "FASHION_MNIST_DIR" in os.environ:
    return Path(os.environ["FASHION_MNIST_DIR"])
  try:
    listing = subprocess.run(
      ["dpkg", "-L", "dataset-fashion-mnist"], capture_output=True, text=True
    ).stdout
  except OSError:  # Not Debian.
    return None
  for line in listing.splitlines():
    if line.endswith("/train-images-idx3-ubyte.gz"):
      return Path(line).parent
  return None


class TestAugmentation:
  SHAPE = (1, 6, 8)
  IMAGES = np.arange(5 * 48, dtype=np.float32).reshape(5, 48)

  def augmented(self, name, key, indices):
    return np.asarray(
      arrays.augment(
        name,
        jax.random.key(key),
        jnp.asarray(indices),
        jnp.asarray(self.IMAGES[indices]),
        self.SHAPE,
      )
    )

  def test_draw_follows_from_key_and_image(self):
    name = "shift-flip"
    every = self.augmented(name, 0, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(
      self.augmented(name, 0, [3, 1]), every[[3, 1]]
    )
    assert not np.array_equal(self.augmented(name, 1, [3, 1]), every[[3, 1]])

  def test_none(self):
    got = self.augmented("none", 0, [2, 0])
    np.testing.assert_array_equal(got, self.IMAGES[[2, 0]])

  def test_shift_and_flip(self):
    image = self.IMAGES[0].reshape(6, 8)
    padded = [np.pad(x, 2, mode="edge") for x in (image, image[:, ::-1])]
    possible = {
      p[i : i + 6, j : j + 8].tobytes()
      for p in padded
      for i in range(5)
      for j in range(5)
    }
    got = {
      self.augmented("shift-flip", key, [0]).tobytes() for key in range(200)
    }
    assert got <= possible
    assert len(got) > 30

  def test_wrong_labels(self, data_dir):
    dataset = arrays.load("fashion-mnist", data_dir)
    labels = dataset.train_labels
    assert np.array_equal(
      arrays.with_wrong_labels(dataset, 0.0).train_labels, labels
    )
    # A tenth of the labels that are drawn is right.
    many = dataset._replace(train_labels=np.resize(labels, 10_000))
    got = arrays.with_wrong_labels(many, 0.3)
    share = (got.train_labels != many.train_labels).mean()
    assert share == pytest.approx(0.27, abs=0.02)
    assert got.train_labels.dtype == labels.dtype
    assert got.validation_labels is dataset.validation_labels
