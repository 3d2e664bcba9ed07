# SPDX-License-Identifier: Apache-2.0
"""The trainer and its two feeds: batches, snapshots, gradients, resumption."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import benchmarks
from benchmarks import methods
from benchmarks.data import arrays, sources
from benchmarks.harness import array_feed, stream_feed
from benchmarks.harness import trainer as trainer_lib
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.program import Feed, is_decayed, optimizer
from benchmarks.harness.store import Store
from benchmarks.harness.trainer import Trainer
import optax_svrg
from tests import helpers
from tests.benchmarks.conftest import TRAIN

# Flax and optax.adamw rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

ARRAYS = Experiment(
  dataset="fashion-mnist",
  model="mlp2",
  method="plain",
  optimizer="sgd",
  epochs=2,
  batch_size=16,
  lr=0.1,
)
STREAMS = Experiment(
  dataset="random",
  model="logreg",
  method="plain",
  optimizer="adamw",
  epochs=3,
  batch_size=20,
  lr=4e-3,
  feed="streams",
  image_size=16,
  warmup_epochs=1,
  final_lr_share=1e-6 / 4e-3,
)
SMALL = {
  "vit-tiny": {"patch_size": 8, "width": 8, "depth": 1, "heads": 2},
  "swin-femto": {
    "patch_size": 4,
    "window": 4,
    "depths": [1],
    "width": 8,
    "heads": [1],
  },
  "convnext-femto": {"patch_size": 4, "depths": [1], "widths": [8]},
  "mixer-s16": {"patch_size": 4, "width": 12, "depth": 1},
}


@pytest.fixture(scope="module")
def dataset(data_dir):
  return arrays.load("fashion-mnist", data_dir)


@pytest.fixture(scope="module")
def images():
  """60 images of noise for training, 20 for validation."""
  rng = np.random.default_rng(0)

  def source(size):
    pixels = rng.integers(0, 256, (size, 16, 16, 3), np.uint8)
    return sources.in_memory(pixels, rng.integers(0, 4, size))

  return sources.ImageData(source(60), source(20), 4, 3, "random")


def fit(trainer, experiment, **kwargs):
  run = Run(experiment)
  trainer.fit(run, **kwargs)
  return run


def without_seconds(run):
  return [point._replace(seconds=0.0) for point in run.history]


class TestArrays:
  @pytest.mark.parametrize(
    "batch_size",
    [16, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, TRAIN))],
  )
  def test_snapshot_is_over_all_examples(self, dataset, batch_size):
    experiment = ARRAYS.replace(batch_size=batch_size)
    feed = array_feed.ArrayFeed(experiment, dataset)
    method = methods.make("svrg", feed.context(experiment))
    program = feed.program(experiment, method)
    params = feed.init(jax.random.key(0))
    state, _ = program.begin(program.init(params), 0, 0, True)
    batch = array_feed.Batch(dataset.train_images, dataset.train_labels)
    want = jax.grad(feed.loss)(params, batch)
    got = optax.tree.get(state.opt_state, "mean_grads")
    helpers.assert_close(got, want, rtol=1e-4, atol=1e-6)

  @pytest.mark.parametrize("batch_size", [16, 25])
  def test_fixed_batches(self, dataset, batch_size):
    """They hold every example once, and are the same in all epochs."""
    experiment = ARRAYS.replace(batch_size=batch_size)
    feed = array_feed.ArrayFeed(experiment, dataset)
    context = feed.context(experiment)
    method = methods.make("plain-fixed", context)
    num_steps = method.num_steps(context)
    partitions, orders, fixed = [], set(), set()
    for epoch in range(2):
      keys = (jax.random.key(epoch), jax.random.key(7))
      in_order = method._replace(has_fixed_order=True)
      _, drawn = feed._draw(in_order, num_steps, (), *keys)
      fixed.add(tuple(drawn.batch_index.tolist()))
      _, drawn = feed._draw(method, num_steps, (), *keys)
      indices, is_real, order, _ = drawn
      mask = np.ones(indices.shape, bool) if is_real is None else is_real
      indices, mask, order = map(np.asarray, (indices, mask, order))
      orders.add(tuple(order.tolist()))
      assert sorted(indices[mask]) == list(range(TRAIN))
      sizes = mask.sum(axis=1)
      assert sizes.max() - sizes.min() <= 1
      assert sizes.max() <= batch_size
      partitions.append(
        {
          int(number): set(members[real].tolist())
          for number, members, real in zip(order, indices, mask, strict=True)
        }
      )
    assert partitions[0] == partitions[1]
    assert len(fixed) == 1

  def test_gradient_of_a_padded_batch(self, dataset):
    feed = array_feed.ArrayFeed(ARRAYS, dataset)
    params = feed.init(jax.random.key(0))
    part = dataset.train_images[:5], dataset.train_labels[:5]
    padded = [np.concatenate([x, x[:2]]) for x in part]
    is_real = jnp.arange(7) < 5
    want = jax.grad(feed.loss)(params, array_feed.Batch(*part))
    got = jax.grad(feed.loss)(params, array_feed.Batch(*padded, is_real))
    helpers.assert_close(got, want, rtol=1e-5)

  @pytest.mark.parametrize(
    "optimizer", ["sgd", pytest.param("momentum", marks=pytest.mark.slow)]
  )
  def test_a_batch_of_all_data_needs_no_correction(self, dataset, optimizer):
    experiment = ARRAYS.replace(
      model="logreg",
      optimizer=optimizer,
      batch_size=TRAIN,
      epochs=10,
    )
    trainer = Trainer(experiment, dataset)
    plain, svrg = (
      [p.train_loss for p in fit(trainer, e).history]
      for e in (experiment, experiment.replace(method="svrg"))
    )
    np.testing.assert_allclose(svrg, plain, rtol=1e-4)
    assert plain[-1] < 0.9 * plain[0]

  def test_noise_and_augmentation_reach_the_training(self, dataset):
    experiment = ARRAYS.replace(model="logreg")
    changes = ({}, {"label_noise": 0.9}, {"augment": "shift-flip"})
    final = {
      fit(Trainer(e, dataset), e).last.train_loss
      for e in (experiment.replace(**c) for c in changes)
    }
    assert len(final) == len(changes)

  def test_the_plain_training_written_out(self, dataset):
    experiment = ARRAYS.replace(schedule="constant", epochs=1)
    trainer = Trainer(experiment, dataset)
    feed = trainer.feed
    init_key, key = jax.random.split(jax.random.key(0))
    params = feed.init(init_key)
    order = jax.random.permutation(jax.random.fold_in(key, 0), TRAIN)
    for batch in order[:48].reshape(3, 16):
      examples = dataset.train_images[batch], dataset.train_labels[batch]
      grads = jax.grad(feed.loss)(params, array_feed.Batch(*examples))
      params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    whole = array_feed.Batch(dataset.train_images, dataset.train_labels)
    run = fit(trainer, experiment)
    assert run.last.train_loss == pytest.approx(
      float(feed.loss(params, whole)), rel=1e-5
    )


@pytest.mark.parametrize(
  ("changes", "steps", "want"),
  [
    # A tenth of 20 steps is warm-up.
    ({}, (0, 1, 2, 20), (0.0, 0.05, 0.1, 0.0)),
    ({"warmup_epochs": 1}, (0, 5, 10), (0.0, 0.05, 0.1)),
    ({"final_lr_share": 0.5}, (2, 20), (0.1, 0.05)),
    ({"schedule": "constant"}, (0, 20), (0.1, 0.1)),
  ],
)
def test_learning_rate(changes, steps, want):
  tx = optimizer(ARRAYS.replace(**changes), 10, 0.1)
  state, params = tx.init(jnp.ones(())), jnp.ones(())
  used = []
  for _ in range(21):
    updates, state = tx.update(jnp.ones(()), state, params)
    used.append(-float(updates))
  np.testing.assert_allclose([used[i] for i in steps], want, atol=1e-7)


def data_of(batches):
  """With the keys as numbers."""
  return [
    batch._replace(drop_key=jax.random.key_data(batch.drop_key))
    for batch in batches
  ]


def batches_of(feed, experiment, seed=0, epoch=0):
  method = methods.make(experiment.method, feed.context(experiment))
  return list(feed.batches(experiment, method, seed, epoch))


class TestStreams:
  @pytest.mark.slow
  def test_the_two_gradients_of_a_batch_are_equal_at_the_snapshot(self, images):
    experiment = STREAMS.replace(
      model="mixer-s16",
      model_settings={
        "patch_size": 8,
        "width": 8,
        "depth": 1,
        "drop_path": 0.2,
      },
      method="svrg",
    )
    feed = stream_feed.StreamFeed(experiment, images)
    params = feed.init(jax.random.key(0))
    # The very draws of crops, colours, erasing, mixing and dropped paths.
    first, again = (batches_of(feed, experiment, epoch=1) for _ in range(2))
    chex.assert_trees_all_equal(data_of(first), data_of(again))
    mean, table = optax_svrg.gradient_table(feed.grad, params, first)
    for index, batch in enumerate(again):
      grads = feed.grad(params, batch)
      jax.tree.map(np.testing.assert_array_equal, grads, table[index])
      assert optax.tree.norm(grads) > 0
    # So that the corrected gradient is the mean.
    tx = optax_svrg.alpha_svrg(1.0)
    state = optax_svrg.take_snapshot(tx.init(params), params, lambda _: mean)
    corrected, _ = tx.update(grads, state, params, snapshot_grads=table[index])
    jax.tree.map(np.testing.assert_array_equal, corrected, mean)

  @pytest.mark.parametrize(
    "method",
    [
      "alpha-svrg",
      pytest.param("svrg", marks=pytest.mark.slow),
      pytest.param("adaptive", marks=pytest.mark.slow),
    ],
  )
  @pytest.mark.slow
  def test_gradients_kept_and_computed_again_train_the_same(
    self, images, method
  ):
    kept, again = (
      fit(Trainer(e, images), e)
      for e in (
        STREAMS.replace(method=method, keeps_table=kept)
        for kept in (True, False)
      )
    )
    assert again.last.train_loss == pytest.approx(
      kept.last.train_loss, rel=1e-5
    )
    assert again.measured["clean_train_loss"] == pytest.approx(
      kept.measured["clean_train_loss"], rel=1e-5
    )
    # A second gradient in each step that has a snapshot.
    extra = again.last.gradients_per_example - kept.last.gradients_per_example
    assert extra == (2 if method == "alpha-svrg" else 3)

  def test_a_pass_is_over_the_batches_of_the_epoch(self, images):
    experiment = STREAMS.replace(method="svrg", train_examples=50)
    run = fit(Trainer(experiment, images), experiment)
    # Two batches of 20 in each epoch, in the steps and in the pass.
    assert run.last.gradients_per_example == 3 * (40 + 40) / 50

  @pytest.mark.slow
  def test_methods_differ_but_plain_is_the_optimizer(self, images):
    trainer = Trainer(STREAMS, images)
    runs = {
      name: fit(trainer, STREAMS.replace(method=name)) for name in methods.MAIN
    }
    final = {run.measured["clean_train_loss"] for run in runs.values()}
    assert len(final) == len(runs)
    counts = {k: r.last.gradients_per_example for k, r in runs.items()}
    assert counts == dict.fromkeys(methods.MAIN, 3) | {
      "svrg": 6,
      "adaptive": 6,
      "alpha-svrg": 5,  # Its coefficient is 0 in the last epoch.
    }

    # The plain training, written out.
    feed = trainer.feed
    init_key, _ = jax.random.split(jax.random.key(0))
    params = feed.init(init_key)
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, 3, 9, 1e-6)
    kernel = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    tx = optax.adamw(schedule, weight_decay=0.05, mask=kernel)
    state = tx.init(params)
    total = 0.0
    for epoch in range(3):
      for batch in batches_of(feed, STREAMS, epoch=epoch):
        loss, grads = jax.value_and_grad(feed.loss)(params, batch)
        total += float(loss) * (epoch == 2) / 3
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert runs["plain"].last.train_loss == pytest.approx(total, rel=1e-5)

  @pytest.mark.parametrize(
    ("model", "not_decayed"),
    [
      ("vit-tiny", {"class_token", "positions"}),
      ("swin-femto", set()),
      ("convnext-femto", {"layer_scale"}),
      ("mixer-s16", set()),
    ],
  )
  def test_weight_decay_is_of_matrices(self, images, model, not_decayed):
    experiment = STREAMS.replace(model=model, model_settings=SMALL[model])
    feed = stream_feed.StreamFeed(experiment, images)
    params = jax.eval_shape(feed.init, jax.random.key(0))
    decayed, spared = set(), set()
    marks = jax.tree_util.tree_leaves_with_path(is_decayed(params))
    for path, is_marked in marks:
      (decayed if is_marked else spared).add(path[-1].key)
    assert decayed == {"kernel"}
    assert spared == {"bias", "scale"} | not_decayed

  def test_batches_that_are_not_full_count_by_their_examples(self, images):
    experiment = STREAMS.replace(method="adaptive-saga", train_examples=50)
    feed = stream_feed.StreamFeed(experiment, images)
    params = feed.init(jax.random.key(0))
    batches = batches_of(feed, experiment)
    assert len(batches) == 3
    (short,) = (b for b in batches if float(b.weights.sum()) == 16)
    real = jax.tree.map(lambda x: x[:16] if x.ndim else x, short)
    np.testing.assert_allclose(
      feed.loss(params, short), feed.loss(params, real), rtol=1e-6
    )

  @pytest.mark.parametrize(
    ("shape", "spec"),
    [((6, 8), (None, "data")), ((8, 6), ("data", None)), ((3,), (None,))],
  )
  def test_states_are_divided_among_devices(self, shape, spec):
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert tuple(stream_feed.divided(mesh, leaf).spec) == spec


class StoppedError(Exception):
  """Ends a training."""


class Stop:
  """Checkpoints that end a training after some of them are written."""

  def __init__(self, checkpoints, number):
    self._checkpoints, self._left = checkpoints, number

  def __getattr__(self, name):
    return getattr(self._checkpoints, name)

  def save(self, *args):
    self._checkpoints.save(*args)
    self._left -= 1
    if not self._left:
      raise StoppedError


@pytest.mark.parametrize(
  ("feed", "method", "number"),
  [
    ("arrays", "adaptive-saga", 1),
    ("streams", "adaptive", 2),
    pytest.param("arrays", "adaptive", 1, marks=pytest.mark.slow),
    pytest.param("streams", "adaptive-saga", 1, marks=pytest.mark.slow),
  ],
)
def test_a_run_that_was_stopped_goes_on(
  feed, method, number, dataset, images, tmp_path
):
  """To the last bit, also of what is measured at the end."""
  common, data = (ARRAYS, dataset) if feed == "arrays" else (STREAMS, images)
  experiment = common.replace(method=method)
  trainer = Trainer(experiment, data)
  whole = fit(trainer, experiment)
  identity = experiment.identity()
  saved = Checkpoints(tmp_path / "saved", identity, False)
  with pytest.raises(StoppedError):
    fit(trainer, experiment, checkpoints=Stop(saved, number))
  saved.close()
  resumed = Checkpoints(tmp_path / "saved", identity, True)
  saved_run = Run(experiment)
  resumed.load(saved_run)
  assert saved_run.last.epoch == number
  epochs = []
  run = fit(
    trainer,
    experiment,
    checkpoints=resumed,
    on_epoch=lambda run, point: epochs.append(point.epoch),
  )
  resumed.close()
  assert epochs == list(range(1, experiment.epochs + 1))
  assert without_seconds(run) == without_seconds(whole)
  assert run.measured == whole.measured


def test_images_must_be_square():
  with pytest.raises(benchmarks.UserError, match="square, got 28 x 30"):
    Feed(ARRAYS, 10, (1, 28, 30), 10)


class TestRunAll:
  def test_what_is_stored_is_not_repeated(
    self, data_dir, tmp_path, monkeypatch
  ):
    seen = []
    monkeypatch.setattr(
      trainer_lib.Progress,
      "__call__",
      lambda self, run, point: seen.append(run.experiment),
    )
    store = Store(tmp_path)
    wanted = [
      ARRAYS.replace(model="logreg", method=method, seed=seed)
      for seed in range(2)
      for method in ("plain", "svrg")
    ]
    first = trainer_lib.run_all(wanted[:2], store, data_dir=data_dir)
    assert [run.experiment for run in first] == wanted[:2]
    assert all(run.finished for run in first)
    more = trainer_lib.run_all(wanted, store, data_dir=data_dir)
    assert [run.experiment for run in more] == wanted
    assert set(seen[4:]) == set(wanted[2:])
    assert more[0].history == first[0].history
    monkeypatch.setattr(trainer_lib, "Trainer", None)
    again = trainer_lib.run_all(wanted, store)
    assert [r.history for r in again] == [r.history for r in more]

  def test_seeds_and_learning_rates_share_a_program(
    self, data_dir, tmp_path, monkeypatch
  ):
    made = []
    program = array_feed.ArrayFeed.program

    def count(self, experiment, method):
      made.append(experiment.method)
      return program(self, experiment, method)

    monkeypatch.setattr(array_feed.ArrayFeed, "program", count)
    wanted = [
      ARRAYS.replace(model="logreg", method=method, seed=seed, lr=lr)
      for method in ("plain", "adaptive")
      for seed in range(2)
      for lr in (0.1, 0.2)
    ]
    runs = trainer_lib.run_all(wanted, Store(tmp_path), data_dir=data_dir)
    assert made == ["plain", "adaptive"]
    assert len({run.last.train_loss for run in runs}) == len(wanted)

  def test_a_run_that_was_stopped_goes_on(self, data_dir, tmp_path):
    def stop(*args):
      raise KeyboardInterrupt

    experiment = ARRAYS.replace(model="logreg")
    store = Store(tmp_path / "runs")
    where = {"data_dir": data_dir, "checkpoint_dir": tmp_path / "saved"}
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(trainer_lib.Progress, "__call__", stop)
      with pytest.raises(KeyboardInterrupt):
        trainer_lib.run_all([experiment], store, **where)
    assert store.get(experiment) is None
    (run,) = trainer_lib.run_all([experiment], store, **where)
    (whole,) = trainer_lib.run_all(
      [experiment], Store(tmp_path / "whole"), data_dir=data_dir
    )
    assert without_seconds(run) == without_seconds(whole)
