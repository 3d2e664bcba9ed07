# SPDX-License-Identifier: Apache-2.0
"""Image sources, on data sets that the tests write; nothing is downloaded."""

import io
import json
import os
from pathlib import Path
import pickle
import re
import subprocess
import sys

import absl.flags
from array_record.python import array_record_module
import grain
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from benchmarks.data import arrays as data
from benchmarks.data import sources
from tests import helpers

# Published numbers of classes, the height and width of images where they are
# all the same, their file format, the parts for training, for validation and
# for neither.
TFDS = {
  "cifar100": (100, 32, "png", ["train"], ["test"], []),
  "oxford_iiit_pet": (37, None, "jpeg", ["train"], ["test"], []),
  "oxford_flowers102": (
    102,
    None,
    "jpeg",
    ["train", "validation"],
    ["test"],
    [],
  ),
  "stl10": (10, 96, "png", ["train"], ["test"], ["unlabelled"]),
  "food101": (101, None, "jpeg", ["train"], ["validation"], []),
  "dtd": (47, None, "jpeg", ["train", "validation"], ["test"], []),
  "svhn_cropped": (10, 32, "png", ["train"], ["test"], ["extra"]),
  "imagenet2012": (1000, None, "jpeg", ["train"], ["validation"], ["test"]),
}
# How many examples are written.
SIZES = {"train": 7, "validation": 5, "test": 4, "extra": 3, "unlabelled": 2}


def pixels(rng, *shape):
  """An image that JPEG does not leave as it is."""
  return rng.integers(0, 256, shape, dtype=np.uint8)


def encode(image, file_format):
  """The bytes of a file with an array or a Pillow image."""
  if isinstance(image, np.ndarray):
    image = PIL.Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, file_format)
  return file.getvalue()


def random_examples(rng, size, num_classes, side, file_format):
  """Pixels, bytes of the file, and label. Pixels of JPEG are Pillow's."""
  examples = []
  for _ in range(size):
    height, width = (side, side) if side else rng.integers(8, 40, 2)
    image = pixels(rng, height, width, 3)
    encoded = encode(image, file_format)
    if file_format == "jpeg":
      with PIL.Image.open(io.BytesIO(encoded)) as decoded:
        image = np.asarray(decoded)
    examples.append((image, encoded, int(rng.integers(num_classes))))
  return examples


def prepare(name, data_dir, splits, file_format="array_record"):
  """Writes examples as TensorFlow Datasets does, three to a shard.

  Features, names of files and descriptions come from its own code.

  Returns:
    The folder of the files.
  """
  builder = tfds.builder(name, data_dir=data_dir, file_format=file_format)
  info = builder.info
  others = {
    tfds.features.ClassLabel: 0,
    tfds.features.BBoxFeature: tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
    tfds.features.Text: "text",
    tfds.features.Image: encode(np.ones((8, 8), np.uint8), "png"),
  }
  rest = {key: others[type(feature)] for key, feature in info.features.items()}
  os.makedirs(builder.data_dir)
  split_infos = []
  for split, examples in splits.items():
    shards = [examples[i : i + 3] for i in range(0, len(examples), 3)]
    template = tfds.core.naming.ShardedFileTemplate(
      data_dir=builder.data_path,
      dataset_name=builder.name,
      split=split,
      filetype_suffix=file_format,
    )
    num_bytes = 0
    for index, shard in enumerate(shards):
      path = template.sharded_filepath(
        shard_index=index, num_shards=len(shards)
      )
      writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
      for _, encoded, label in shard:
        contents = rest | {"image": encoded, "label": label}
        record = info.features.serialize_example(contents)
        num_bytes += len(record)
        writer.write(record)
      writer.close()
    split_infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(shard) for shard in shards],
        num_bytes=num_bytes,
        filename_template=template,
      )
    )
  info.set_splits(tfds.core.SplitDict(split_infos))
  info.write_to_directory(builder.data_dir)
  return Path(builder.data_dir)


def cifar100(rng, size):
  return random_examples(rng, size, 100, 32, "png")


def assert_examples(source, want):
  """These examples, in this order, before and after a trip to a process."""
  for got in (source, pickle.loads(pickle.dumps(source))):
    assert len(got) == len(want)
    for index, (image, _, label) in enumerate(want):
      example = got[index]
      assert example.keys() == {"image", "label"}
      assert example["image"].dtype == np.uint8
      assert not example["image"].flags.writeable
      np.testing.assert_array_equal(example["image"], image)
      assert example["label"] == label
      assert type(example["label"]) is int
    with pytest.raises(IndexError):
      got[len(want)]


def assert_data_error(message, function, *args):
  with pytest.raises(data.DataError, match=message) as error:
    function(*args)
  assert "\n" not in str(error.value)


def test_names():
  assert set(sources._SPLITS) == {*TFDS, "eurosat"}
  assert set(sources.DATASETS) == {
    *sources._SPLITS,
    *data.DATASETS,
  }


@pytest.mark.parametrize("name", sources.DATASETS)
def test_data_dir_missing_or_without_need(name, tmp_path):
  if name == "mnist-5k":
    message = f"mnist-5k takes no --data-dir, got {re.escape(str(tmp_path))}"
    assert_data_error(message, sources.load, name, tmp_path)
  else:
    message = f"--dataset {name} needs --data-dir"
    assert_data_error(message, sources.load, name, None)


class TestTFDS:
  @pytest.mark.parametrize("name", TFDS)
  def test_examples(self, name, tmp_path):
    num_classes, side, file_format, train, validation, others = TFDS[name]
    rng = np.random.default_rng(0)
    written = {
      split: random_examples(rng, SIZES[split], num_classes, side, file_format)
      for split in (*train, *validation, *others)
    }
    prepare(name, tmp_path, written)
    got = sources.load(name, tmp_path)
    for source, splits in ((got.train, train), (got.validation, validation)):
      assert_examples(source, [x for split in splits for x in written[split]])
    assert got.num_classes == num_classes
    assert got.num_channels == 3
    assert re.fullmatch(rf"{name}/[0-9.]+ [0-9a-f]{{64}}", got.fingerprint)

  def test_eurosat(self, tmp_path):
    """70 % of the only part and the rest of it."""
    rng = np.random.default_rng(0)
    written = random_examples(rng, 20, 10, 64, "jpeg")
    prepare("eurosat/rgb", tmp_path, {"train": written})
    got = sources.load("eurosat", tmp_path)
    assert_examples(got.train, written[:14])
    assert_examples(got.validation, written[14:])
    assert got.num_classes == 10
    assert got.fingerprint.startswith("eurosat/rgb/")

  def test_grey_and_cmyk(self, tmp_path):
    rng = np.random.default_rng(0)
    grey = pixels(rng, 9, 12)
    red = PIL.Image.new("CMYK", (12, 9), (0, 255, 255, 0))
    grey_rgb = np.repeat(grey[..., np.newaxis], 3, axis=-1)
    red_rgb = np.broadcast_to(np.uint8([255, 0, 0]), (9, 12, 3))
    train = [
      (grey_rgb, encode(grey, "png"), 1),
      (red_rgb, encode(red, "jpeg"), 2),
    ]
    prepare("imagenet2012", tmp_path, {"train": train, "validation": train})
    assert_examples(sources.load("imagenet2012", tmp_path).train, train)

  def test_fingerprint(self, tmp_path):
    """Other data have another one."""
    rng = np.random.default_rng(0)
    train, test = cifar100(rng, 7), cifar100(rng, 4)
    fingerprints = []
    for index, size in enumerate((7, 7, 6)):
      folder = tmp_path / str(index)
      prepare("cifar100", folder, {"train": train[:size], "test": test})
      fingerprints.append(sources.load("cifar100", folder).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]

  @pytest.mark.parametrize("version", ["3.0.1", "3.1.0"])
  def test_version_other_than_that_of_the_code(self, version, tmp_path):
    rng = np.random.default_rng(0)
    examples = cifar100(rng, 2)
    folder = prepare(
      "cifar100", tmp_path, {"train": examples, "test": examples}
    )
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text()) | {"version": version}
    path.write_text(json.dumps(info))
    folder.rename(folder.parent / version)
    got = sources.load("cifar100", tmp_path)
    assert_examples(got.train, examples)
    assert got.fingerprint.startswith(f"cifar100/{version} ")

  @pytest.mark.parametrize("name", [*TFDS, "eurosat"])
  @pytest.mark.parametrize("exists", [True, False])
  def test_missing(self, name, exists, tmp_path):
    data_dir = tmp_path / "my data"
    if exists:
      data_dir.mkdir()
    full_name = "eurosat/rgb" if name == "eurosat" else name
    manual_dir = " --manual_dir=MANUAL_DIR" if name == "imagenet2012" else ""
    message = (
      f"^{data_dir}/{full_name}: has no data.*tfds build {full_name}"
      f" --file_format=array_record '--data_dir={data_dir}'{manual_dir}$"
    )
    assert_data_error(message, sources.load, name, data_dir)

  def test_no_random_access(self, tmp_path):
    examples = {"train": [], "test": []}
    prepare("cifar100", tmp_path, examples, "tfrecord")
    message = "cifar100: has files without random access.*tfds build cifar100"
    assert_data_error(message, sources.load, "cifar100", tmp_path)

  @pytest.mark.parametrize(
    ("file", "message"),
    [
      ("cifar100-test.array_record-00001-of-00002", "No such file"),
      ("dataset_info.json", "has no data"),
    ],
  )
  def test_missing_file(self, file, message, tmp_path):
    rng = np.random.default_rng(0)
    splits = {"train": cifar100(rng, 7), "test": cifar100(rng, 4)}
    (prepare("cifar100", tmp_path, splits) / file).unlink()
    message = f"^{tmp_path}/cifar100.*: .*{message}"
    assert_data_error(message, sources.load, "cifar100", tmp_path)

  @pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
  @pytest.mark.parametrize("content", ["", "{", "[1]"])
  def test_damaged_description(self, file, content, tmp_path):
    examples = cifar100(np.random.default_rng(0), 1)
    splits = {"train": examples, "test": examples}
    (prepare("cifar100", tmp_path, splits) / file).write_text(content)
    message = f"^{tmp_path}/cifar100: "
    assert_data_error(message, sources.load, "cifar100", tmp_path)

  def test_missing_split(self, tmp_path):
    examples = cifar100(np.random.default_rng(0), 1)
    prepare("cifar100", tmp_path, {"train": examples})
    message = f"^{tmp_path}/cifar100: .*test"
    assert_data_error(message, sources.load, "cifar100", tmp_path)

  def test_damaged_shard(self, tmp_path):
    examples = cifar100(np.random.default_rng(0), 4)
    splits = {"train": examples, "test": examples}
    folder = prepare("cifar100", tmp_path, splits)
    shard = folder / "cifar100-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:1000])
    train = sources.load("cifar100", tmp_path).train
    np.testing.assert_array_equal(train[2]["image"], examples[2][0])
    assert_data_error(r"^cifar100/.* train, record 3: ", train.__getitem__, 3)

  @pytest.mark.parametrize("kept", [0, 20, 2000])
  def test_damaged_image(self, kept, tmp_path):
    examples = cifar100(np.random.default_rng(0), 2)
    image, encoded, label = examples[1]
    examples[1] = (image, encoded[:kept], label)
    prepare("cifar100", tmp_path, {"train": examples, "test": examples})
    train = sources.load("cifar100", tmp_path).train
    assert_data_error(r"^cifar100/.* train, record 1: ", train.__getitem__, 1)

  def test_without_tensorflow(self, tmp_path):
    """It is not imported, nor TFDS before it is needed."""
    examples = cifar100(np.random.default_rng(0), 2)
    prepare("cifar100", tmp_path, {"train": examples, "test": examples})
    fake = tmp_path / "packages" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise AssertionError('imported')")
    code = f"""
from pathlib import Path
import sys

from benchmarks.data import sources

assert "tensorflow_datasets" not in sys.modules
loaded = sources.load("cifar100", Path({str(tmp_path)!r}))
assert loaded.train[1]["image"].shape == (32, 32, 3)
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
try:
  import tensorflow
except AssertionError:
  print("The fake can be found.")
"""
    result = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      check=False,
      cwd=Path(__file__).parents[2],
      env=os.environ | {"PYTHONPATH": str(fake.parent)},
      text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "The fake can be found.\n"


def write_fashion_mnist(folder):
  rng = np.random.default_rng(0)
  for part, size in (("train", 9), ("t10k", 4)):
    helpers.write_gz(
      folder / f"{part}-images-idx3-ubyte.gz",
      helpers.idx(pixels(rng, size, 5, 7)),
    )
    helpers.write_gz(
      folder / f"{part}-labels-idx1-ubyte.gz",
      helpers.idx(rng.integers(0, 10, size)),
    )


class TestArrays:
  @pytest.mark.parametrize(
    ("name", "write", "shape"),
    [
      ("mnist-5k", None, (28, 28, 1)),
      ("fashion-mnist", write_fashion_mnist, (5, 7, 1)),
    ],
  )
  def test_against_load(self, name, write, shape, tmp_path):
    data_dir = tmp_path if write else None
    if write:
      write(tmp_path)
    want = data.load(name, data_dir)
    got = sources.load(name, data_dir)
    assert got.num_classes == want.num_classes
    assert got.num_channels == shape[-1] == want.image_shape[0]
    assert got.fingerprint == want.sha256
    images = np.stack([got.train[i]["image"] for i in range(len(got.train))])
    mean, std = np.float32(images.mean()), np.float32(images.std())
    for source, images, labels in (
      (got.train, want.train_images, want.train_labels),
      (got.validation, want.validation_images, want.validation_labels),
    ):
      assert len(source) == len(images)
      for index in range(len(source)):
        example = source[index]
        assert example["image"].shape == shape
        assert example["image"].dtype == np.uint8
        assert not example["image"].flags.writeable
        flat = example["image"].transpose(2, 0, 1).ravel()
        scaled = (flat.astype(np.float32) - mean) / std
        np.testing.assert_array_equal(scaled, images[index])
        assert example["label"] == labels[index]
        assert type(example["label"]) is int


def test_in_worker_processes(tmp_path):
  """Grain reads all kinds of sources in processes of its own."""
  rng = np.random.default_rng(0)
  examples = cifar100(rng, 4)
  prepare("cifar100", tmp_path, {"train": examples, "test": examples})
  write_fashion_mnist(tmp_path)
  names = ("cifar100", "fashion-mnist")
  train = [sources.load(name, tmp_path).train for name in names]
  dataset = grain.MapDataset.concatenate(
    [grain.MapDataset.source(source) for source in train]
  )
  absl.flags.FLAGS.mark_as_parsed()  # Grain asks for its own flags.
  options = grain.MultiprocessingOptions(num_workers=1)
  got = list(dataset.to_iter_dataset().mp_prefetch(options))
  want = [source[i] for source in train for i in range(len(source))]
  assert len(got) == len(want)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_array_equal(one["image"], other["image"])
    assert one["label"] == other["label"]
