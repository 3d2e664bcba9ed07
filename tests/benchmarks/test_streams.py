# SPDX-License-Identifier: Apache-2.0
"""Streams of batches: which examples, in which order, and how they look."""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks.data import recipe as recipe_lib
from benchmarks.data import streams
from benchmarks.data.arrays import DataError
from tests import helpers
from tests.workers.stream_worker import BATCH_SIZE, RECIPE, Source, visits

# On one device.
_MESH = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
train_batches, validation_batches = (
  functools.partial(make, sharding=NamedSharding(_MESH, P("data")))
  for make in (streams.train_batches, streams.validation_batches)
)


class Broken(Source):
  """A source of which an example cannot be read."""

  def __getitem__(self, index):
    if index == 20:
      raise DataError("part.array_record: ends early.")
    return super().__getitem__(index)


def assert_equal(got, want):
  """Bit for bit, for lists of batches."""
  assert len(got) == len(want)
  for a, b in zip(got, want, strict=True):
    for x, y in zip(a, b, strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


def train(source, *args, has_fixed_batches=False, **kwargs):
  return list(
    train_batches(
      source,
      RECIPE,
      visits(source, has_fixed_batches=has_fixed_batches),
      *args,
      **kwargs,
    )
  )


fixed = pytest.mark.parametrize("fixed", [False, True])


def test_visits_anew():
  each = streams.Visits(27, 8, 3)
  assert each.steps_per_epoch == 3
  epochs = []
  for epoch in range(4):
    indices, is_real, numbers = zip(
      *(each.batch(3 * epoch + i) for i in range(3)), strict=True
    )
    assert numbers == (0, 1, 2)
    assert np.all(is_real)
    assert np.shape(indices) == (3, 8)
    # Each example at most once, three of them dropped.
    assert len(np.unique(indices)) == 24
    assert np.max(indices) < 27
    epochs.append(np.ravel(indices).tolist())
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert len({tuple(sorted(epoch)) for epoch in epochs}) > 1
  # Of an order that is not that of the source.
  assert all(epoch != sorted(epoch) for epoch in epochs)


@pytest.mark.parametrize("num_examples", [5, 24, 25, 27, 31])
def test_visits_of_fixed_batches(num_examples):
  each = streams.Visits(num_examples, 8, 3, has_fixed_batches=True)
  num_batches = each.steps_per_epoch
  assert num_batches == -(-num_examples // 8)
  members, orders = {}, []
  for epoch in range(4):
    numbers, seen = [], []
    for i in range(num_batches):
      indices, is_real, number = each.batch(num_batches * epoch + i)
      assert len(indices) == len(is_real) == 8
      # Always the same, in the same order, and filled up with their own.
      assert members.setdefault(number, indices.tolist()) == indices.tolist()
      assert set(indices) == set(indices[is_real])
      assert is_real.sum() in (
        num_examples // num_batches,
        -(-num_examples // num_batches),
      )
      seen += indices[is_real].tolist()
      numbers.append(number)
    assert sorted(seen) == list(range(num_examples))
    assert sorted(numbers) == list(range(num_batches))
    orders.append(tuple(numbers))
  assert num_batches == 1 or len(set(orders)) > 1


@fixed
def test_visits_follow_from_the_seed_and_the_step(fixed):
  def batches(seed, steps):
    each = streams.Visits(100, 7, seed, has_fixed_batches=fixed)
    return {step: each.batch(step)[0].tolist() for step in steps}

  first = batches(0, range(40))
  assert batches(0, reversed(range(40))) == first
  assert batches(0, [31]) == {31: first[31]}
  assert batches(1, range(40)) != first


@fixed
def test_batches(fixed):
  source = Source()
  each = visits(source, has_fixed_batches=fixed)
  got = train(source, 0, 9, has_fixed_batches=fixed)
  assert len(got) == 9
  for step, batch in enumerate(got):
    assert isinstance(batch, streams.Batch)
    assert all(isinstance(x, jax.Array) for x in batch)
    assert batch.images.shape == (BATCH_SIZE, 12, 12, 3)
    assert [x.dtype for x in batch] == [
      "uint8",
      "int32",
      "float32",
      *["int32"] * 2,
    ]
    indices, is_real, number = each.batch(step)
    np.testing.assert_array_equal(batch.labels, indices % 5)
    np.testing.assert_array_equal(batch.weights, is_real)
    assert (batch.index, batch.step) == (number, step)


def test_augmentation():
  """An example looks the same all over an epoch, and otherwise in the next."""
  source = Source(8)
  recipe = recipe_lib.Recipe(12, 3, 5)

  def looks(batch_size, epoch, **kwargs):
    each = streams.Visits(8, batch_size, 3, **kwargs)
    start = epoch * each.steps_per_epoch
    images = {}
    for batch in train_batches(
      source, recipe, each, start, start + each.steps_per_epoch
    ):
      indices, _, _ = each.batch(int(batch.step))
      for index, image in zip(indices.tolist(), batch.images, strict=True):
        images[index] = np.asarray(image).tobytes()
    return images

  first = looks(8, 0)
  assert len(set(first.values())) == 8
  assert looks(4, 0) == looks(3, 0, has_fixed_batches=True) == first
  assert not set(looks(8, 1).values()) & set(first.values())


@fixed
def test_resumption(fixed):
  """From any step on, in the middle of an epoch or not."""
  full = train(Source(), 0, 9, has_fixed_batches=fixed)
  for start, stop in ((0, 9), (4, 9), (3, 6), (8, 9)):
    got = train(Source(), start, stop, has_fixed_batches=fixed)
    assert_equal(got, full[start:stop])
  assert train(Source(), 9, 9) == []


def test_workers():
  """Processes that read make the same batches, and hand errors on."""
  want = train(Source(), 2, 7)
  assert_equal(train(Source(), 2, 7, num_workers=2), want)
  (got, *_) = validation_batches(Source(), RECIPE, 8, num_workers=1)
  (want, *_) = validation_batches(Source(), RECIPE, 8)
  assert_equal([got], [want])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_of_a_source(num_workers):
  with pytest.raises(DataError, match=r"part\.array_record: ends"):
    list(validation_batches(Broken(), RECIPE, 8, num_workers=num_workers))


@pytest.mark.parametrize(("size", "channels"), [(12, 1), (12, 3), (40, 3)])
def test_validation(size, channels):
  source = Source(num_channels=channels)
  recipe = recipe_lib.Recipe(size, channels, 5)
  got = list(validation_batches(source, recipe, 8))
  assert len(got) == 4
  labels = np.concatenate([batch.labels for batch in got])
  weights = np.concatenate([batch.weights for batch in got])
  images = np.concatenate([batch.images for batch in got])
  np.testing.assert_array_equal(labels[:27], np.arange(27) % 5)
  np.testing.assert_array_equal(weights, [1] * 27 + [0] * 5)
  for i in range(27):
    np.testing.assert_array_equal(
      images[i], recipe_lib.resize(recipe, source[i]["image"])
    )
  assert [int(batch.step) for batch in got] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_pass_and_the_steps_see_the_same():
  """Gradients at the snapshot are bit-equal, with all of the recipe on."""
  source = Source()
  each = visits(source)
  model = nnx.Linear(12 * 12 * 3, 5, rngs=nnx.Rngs(0))
  graph, snapshot = nnx.split(model)

  @jax.jit
  def grad(params, batch):
    key = jax.random.fold_in(jax.random.key(0), batch.step)
    images, targets = recipe_lib.mix(RECIPE, key, batch.images, batch.labels)

    def loss(params):
      logits = nnx.merge(graph, params)(images.reshape(len(images), -1))
      return jnp.mean(optax.softmax_cross_entropy(logits, targets))

    return jax.grad(loss)(params)

  def grads(batches):
    return [jax.tree.leaves(grad(snapshot, batch)) for batch in batches]

  # The pass over an epoch from the snapshot on, and two times its steps, the
  # second after a stop.
  in_pass = grads(train_batches(source, RECIPE, each, 4, 7))
  steps = grads(train_batches(source, RECIPE, each, 0, 7))[4:]
  resumed = grads(train_batches(source, RECIPE, each, 6, 7))
  assert_equal(steps, in_pass)
  assert_equal(resumed, in_pass[2:])
  assert all(np.any(x) for grad in in_pass for x in grad)
  assert np.any(in_pass[0][1] != in_pass[1][1])


def spread(num_processes, out):
  """What processes have of the batches, and which examples they have read."""
  out.mkdir()
  for status, output in helpers.in_processes(
    lambda process, port: [
      *("-m", "tests.workers.stream_worker", num_processes, process, port),
      out / str(process),
    ],
    num_processes,
  ):
    assert status == 0, output
  results = []
  for i in range(num_processes):
    with np.load(out / f"{i}.npz") as arrays:
      visited = json.loads((out / f"{i}.json").read_text())
      results.append(({name: arrays[name] for name in arrays.files}, visited))
  return results


@pytest.mark.slow
def test_processes_and_devices(tmp_path):
  """Eight devices of one process or of two have the batches of one device."""
  ((one, one_visited),) = spread(1, tmp_path / "one")
  (first, first_visited), (second, second_visited) = spread(2, tmp_path / "two")
  for name, array in one.items():
    if name.startswith("local"):
      np.testing.assert_array_equal(
        np.concatenate([first[name], second[name]]), array
      )
    else:
      np.testing.assert_array_equal(first[name], second[name])
      np.testing.assert_allclose(first[name], array, rtol=0, atol=1e-5)
  # Each has read its own examples alone.
  assert sorted(first_visited + second_visited) == sorted(one_visited)
  assert len(first_visited) == len(second_visited)

  source = Source()
  for fixed in (False, True):
    for batch in train(source, 0, 5, has_fixed_batches=fixed):
      for name in ("images", "labels", "weights"):
        np.testing.assert_array_equal(
          one[f"local_{name}_{int(fixed)}_{batch.step}"], getattr(batch, name)
        )
      key = jax.random.fold_in(jax.random.key(0), batch.step)
      mixed = jax.jit(recipe_lib.mix, static_argnums=0)(
        RECIPE, key, batch.images, batch.labels
      )
      for i, want in enumerate(mixed):
        got = one[f"mixed_{i}_{int(fixed)}_{batch.step}"]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  for batch in validation_batches(source, RECIPE, 8):
    np.testing.assert_array_equal(
      one[f"local_validation_{batch.step}"], batch.images
    )


def test_no_tensorflow():
  """Neither module needs it, nor do their imports."""
  code = (
    "import sys; sys.modules['tensorflow'] = None;"
    " import benchmarks.data.recipe, benchmarks.data.streams"
  )
  ((status, output),) = helpers.in_processes(lambda *_: ["-c", code], 1)
  assert status == 0, output
