# SPDX-License-Identifier: Apache-2.0
"""Images with labels, decoded when they are asked for.

The sources have what ``grain.MapDataset.source`` asks for: ``len`` and access
by an index. An element is a dictionary of ``"image"``, uint8 of the shape
(height, width, channels) with one channel or three and read-only, and
``"label"``, an ``int``. Sources can be pickled for Grain's worker processes.

The nine data sets of the alpha-SVRG paper's tables are those of TensorFlow
Datasets, divided as in the authors' ``datasets.py``, but for EuroSAT, of which
they draw other 70 % for training. Reading them needs no TensorFlow. Preparing
them does, once, with the packages ``tensorflow``, ``tensorflow-datasets``,
``importlib_resources`` and, for some, ``scipy``. The error for a missing data
set gives the command; its ``MANUAL_DIR`` is the folder of
``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar``.
"""

import dataclasses
import hashlib
import io
import json
from pathlib import Path
import shlex
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np
import PIL.Image

import benchmarks
from benchmarks.data import arrays

# Names of the parts for training and for validation.
_SPLITS = {
  "cifar100": ("train", "test"),
  "oxford_iiit_pet": ("train", "test"),
  "oxford_flowers102": ("train+validation", "test"),
  "stl10": ("train", "test"),
  "food101": ("train", "validation"),
  "dtd": ("train+validation", "test"),
  "svhn_cropped": ("train", "test"),
  # The only split, which TensorFlow Datasets has shuffled when it was written.
  "eurosat": ("train[:70%]", "train[70%:]"),
  "imagenet2012": ("train", "validation"),
}

DATASETS = (*_SPLITS, *arrays.DATASETS)

Source = grain.sources.RandomAccessDataSource


class ImageData(NamedTuple):
  """A data set of images for classification."""

  train: Source
  validation: Source
  num_classes: int  # Labels are from 0 to `num_classes - 1`.
  num_channels: int  # Of each image: 1, or 3 for RGB.
  # Of arrays, SHA-256 of all bytes; of TensorFlow Datasets, name and version,
  # and SHA-256 of the sizes of all splits and shards.
  fingerprint: str


def load(name: str, data_dir: Path | None) -> ImageData:
  """Opens a data set."""
  if name in arrays.DATASETS:
    return _load_arrays(name, data_dir)
  if data_dir is None:
    raise arrays.DataError(f"--dataset {name} needs --data-dir.")
  return _load_tfds(name, data_dir)


def in_memory(images: np.ndarray, labels: np.ndarray) -> Source:
  """Makes a source of images of the shape (n, height, width, channels)."""
  images.setflags(write=False)  # The source gives views of it.
  pairs = zip(images, labels.tolist(), strict=True)
  return [{"image": image, "label": label} for image, label in pairs]


@dataclasses.dataclass
class RecordSource:
  """Images of TensorFlow Datasets, decoded at each access.

  As in torchvision, which the authors use, transparency is dropped, and the
  orientation that a camera has noted is ignored.
  """

  name: str  # For messages.
  records: Any  # A data source of TensorFlow Datasets that decodes no image.
  num_channels: int

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
    index = index.__index__()
    if not 0 <= index < len(self):
      raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}.")
    try:
      record = self.records[index]
      with PIL.Image.open(io.BytesIO(record["image"])) as image:
        mode = "L" if self.num_channels == 1 else "RGB"
        pixels = np.asarray(image.convert(mode))
    # What reads, parses and decodes damaged records may raise anything.
    except Exception as e:
      reason = benchmarks.one_line(e)
      raise arrays.DataError(f"{self.name}, record {index}: {reason}.") from e
    pixels = pixels.reshape(*pixels.shape[:2], self.num_channels)
    return {"image": pixels, "label": int(record["label"])}


def _load_arrays(name: str, data_dir: Path | None) -> ImageData:
  found = arrays.load_arrays(name, data_dir)
  _, *size = found.image_shape  # All are grey.
  train, validation = (
    in_memory(images.reshape(-1, *size, 1), labels)
    for images, labels in (found[:2], found[2:4])
  )
  return ImageData(train, validation, found.num_classes, 1, found.sha256)


def _load_tfds(name: str, data_dir: Path) -> ImageData:
  import tensorflow_datasets as tfds  # Only these data sets need it.

  full_name = "eurosat/rgb" if name == "eurosat" else name
  arguments = ["--file_format=array_record", f"--data_dir={data_dir}"]
  if name == "imagenet2012":
    arguments.append("--manual_dir=MANUAL_DIR")
  command = shlex.join(["tfds", "build", full_name, *arguments])
  folder = data_dir / full_name
  if not any(folder.glob("*/dataset_info.json")):
    raise arrays.DataError(
      f"{folder}: has no data. With TensorFlow, prepare them by {command}"
    )
  try:
    # With a version given, files come before the code that makes them, of which
    # TensorFlow Datasets may have a newer version.
    builder = tfds.builder(f"{full_name}:*.*.*", data_dir=data_dir)
    info = builder.info
    decoders = {key: tfds.decode.SkipDecoding() for key in info.features}
    num_channels = info.features["image"].shape[-1]
    train, validation = (
      RecordSource(
        f"{info.full_name} {split}",
        builder.as_data_source(split, decoders=decoders),
        num_channels,
      )
      for split in _SPLITS[name]
    )
  except NotImplementedError as e:
    raise arrays.DataError(
      f"{folder}: has files without random access. With TensorFlow, prepare"
      f" others in another folder by {command}"
    ) from e
  # Damaged descriptions of the data may raise anything.
  except Exception as e:
    raise arrays.DataError(f"{folder}: {benchmarks.one_line(e)}.") from e
  splits = info.splits.values()
  for path in (path for split in splits for path in split.filepaths):
    if not path.exists():
      raise arrays.DataError(f"{path}: No such file or directory.")
  sizes = {x.name: [x.num_bytes, x.shard_lengths] for x in splits}
  digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
  return ImageData(
    train,
    validation,
    info.features["label"].num_classes,
    num_channels,
    f"{info.full_name} {digest.hexdigest()}",
  )
