# SPDX-License-Identifier: Apache-2.0
"""The harness of the paper's experiments."""

import json

import chex
from click.testing import CliRunner
import jax
import numpy as np
import optax
import pytest

from benchmarks import paper, reporting
from benchmarks.data import sources
from benchmarks.models import architectures
import optax_svrg
from tests import helpers
from tests.paper_worker import make_images, make_settings

pytestmark = pytest.mark.standard_promotion


def final(trainer, method, seed=0):
  return trainer.fit(reporting.Run(method, seed))


@pytest.mark.parametrize("model", architectures.ARCHITECTURES)
def test_every_architecture_trains_with_each_method(model):
  # Compilation is what takes time, and its results need not be fast.
  flags = "--xla_backend_optimization_level=0"
  ((status, output),) = helpers.in_processes(
    lambda *_: ["-m", "tests.paper_worker", model], 1, XLA_FLAGS=flags
  )
  assert status == 0, output
  results = json.loads(output.splitlines()[-1])
  assert [r["method"] for r in results] == [*paper.METHODS, "svrg"]
  for result in results:
    row, first_epoch = result["row"], result["compiled_in_first_epoch"]
    assert np.isfinite(row["train_loss"])
    assert np.isfinite(row["clean_train_loss"])
    expected = {"svrg": 6, "adaptive": 6, "alpha-svrg": 5}
    assert row["gradients_per_example"] == expected.get(result["method"], 3)
    # All in the first step, and nothing after the first epoch.
    is_new = result["seed"] == 0
    assert first_epoch.count("jit(update)") == is_new
    assert first_epoch.count("jit(loss)") == (result["method"] == "plain")
    assert not result["compiled_later"]
  # Nothing at all for another seed, which is drawn anew.
  assert not results[-1]["compiled_in_first_epoch"]
  assert results[-1]["row"]["train_loss"] != results[1]["row"]["train_loss"]


def data_of(batches):
  """With the keys as numbers."""
  return [
    batch._replace(drop_key=jax.random.key_data(batch.drop_key))
    for batch in batches
  ]


def test_the_two_gradients_of_a_batch_are_equal_at_the_snapshot():
  settings = make_settings("vit-tiny", drop_path=0.2)
  trainer = paper.Trainer(settings, make_images())
  params = trainer.init(jax.random.key(0))
  batches = trainer.batches(trainer.visits("svrg", 0), jax.random.key(1), 1)
  # The very draws of crops, colours, erasing, mixing and dropped paths.
  first, again = list(batches), list(batches)
  chex.assert_trees_all_equal(data_of(first), data_of(again))
  grad = jax.jit(trainer.grad)
  mean, table = optax_svrg.gradient_table(trainer.grad, params, batches)
  for index, batch in enumerate(again):
    grads = grad(params, batch)
    jax.tree.map(np.testing.assert_array_equal, grads, table[index])
    assert optax.tree.norm(grads) > 0
  # So that the corrected gradient is the mean.
  tx = optax_svrg.alpha_svrg(1.0)
  state = optax_svrg.take_snapshot(tx.init(params), params, lambda _: mean)
  corrected, _ = tx.update(grads, state, params, snapshot_grads=table[index])
  jax.tree.map(np.testing.assert_array_equal, corrected, mean)
  computed, _ = jax.jit(
    lambda batch: tx.update(
      trainer.grad(params, batch),
      state,
      params,
      grad_fn=lambda p: trainer.grad(p, batch),
    )
  )(batch)
  jax.tree.map(np.testing.assert_array_equal, computed, mean)


@pytest.mark.parametrize("method", ["svrg", "alpha-svrg", "adaptive"])
def test_gradients_kept_and_computed_again_train_the_same(method):
  kept, again = (
    final(
      paper.Trainer(make_settings("logreg", is_table_kept=kept), make_images()),
      method,
    )
    for kept in (True, False)
  )
  assert again["train_loss"] == pytest.approx(kept["train_loss"], rel=1e-5)
  assert again["clean_train_loss"] == pytest.approx(
    kept["clean_train_loss"], rel=1e-5
  )
  # A second gradient in each step that has a snapshot.
  extra = again["gradients_per_example"] - kept["gradients_per_example"]
  assert extra == (2 if method == "alpha-svrg" else 3)


def test_methods_differ_but_plain_is_the_optimizer():
  settings = make_settings("logreg")
  trainer = paper.Trainer(settings, make_images())
  losses = {m: final(trainer, m)["clean_train_loss"] for m in paper.METHODS}
  assert len(set(losses.values())) == len(losses)

  # The plain training, written out.
  params = trainer.init(jax.random.split(jax.random.key(0))[0])
  draw_key = jax.random.split(jax.random.key(0))[1]
  schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, 3, 9, 1e-6)
  kernel = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
  tx = optax.adamw(schedule, weight_decay=0.05, mask=kernel)
  state = tx.init(params)
  visits = trainer.visits("plain", 0)
  total = 0.0
  for epoch in range(3):
    for batch in trainer.batches(visits, draw_key, epoch):
      loss, grads = jax.value_and_grad(trainer.loss)(params, batch)
      total += float(loss) * (epoch == 2) / 3
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
  assert total == pytest.approx(final(trainer, "plain")["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
  ("model", "not_decayed"),
  [
    ("vit-tiny", {"class_token", "positions"}),
    ("swin-femto", set()),
    ("convnext-femto", {"layer_scale"}),
    ("mixer-s16", set()),
  ],
)
def test_weight_decay_is_of_matrices(model, not_decayed):
  trainer = paper.Trainer(make_settings(model), make_images())
  params = trainer.init(jax.random.key(0))
  decayed, spared = set(), set()
  marks = jax.tree_util.tree_leaves_with_path(paper._is_decayed(params))
  for path, is_decayed in marks:
    (decayed if is_decayed else spared).add(path[-1].key)
  assert decayed == {"kernel"}
  assert spared == {"bias", "scale"} | not_decayed


def test_batches_that_are_not_full_count_by_their_examples():
  settings = make_settings("logreg", train_examples=50, batch_size=20)
  trainer = paper.Trainer(settings, make_images())
  params = trainer.init(jax.random.key(0))
  batches = trainer.batches(
    trainer.visits("adaptive-saga", 0), jax.random.key(1), 0
  )
  assert len(batches) == 3
  (short,) = (b for b in batches if float(b.weights.sum()) == 16)
  real = jax.tree.map(lambda x: x[:16] if x.ndim else x, short)
  np.testing.assert_allclose(
    trainer.loss(params, short), trainer.loss(params, real), rtol=1e-6
  )


def run_cell(path, methods=("plain", "svrg"), seeds=1, on_epoch=None, **kwargs):
  return paper.run_cell(
    make_settings("logreg"),
    make_images(),
    methods,
    seeds,
    path,
    on_epoch or (lambda run, point: None),
    **kwargs,
  )


def test_runs_that_are_there_are_not_repeated(tmp_path, monkeypatch):
  path = tmp_path / "cell.json"
  rows = run_cell(path)
  assert [(r["method"], r["seed"]) for r in rows] == [("plain", 0), ("svrg", 0)]
  saved = json.loads(path.read_text())
  assert saved["runs"] == rows
  assert saved["settings"]["model"] == "logreg"
  assert saved["num_params"] == 16 * 16 * 3 * 4 + 4
  seen = []
  more = run_cell(
    path, seeds=2, on_epoch=lambda run, _: seen.append((run.method, run.seed))
  )
  assert more[:2] == rows
  assert set(seen) == {("plain", 1), ("svrg", 1)}
  monkeypatch.setattr(paper, "Trainer", None)
  assert run_cell(path, seeds=2) == more


def test_results_of_other_settings_are_refused(tmp_path):
  path = tmp_path / "cell.json"
  run_cell(path)
  saved = json.loads(path.read_text())
  saved["settings"]["lr"] = 0.1
  path.write_text(json.dumps(saved))
  with pytest.raises(
    paper.click.UsageError, match=r"lr is 0.1 there and 0.004"
  ):
    run_cell(path)


@pytest.mark.parametrize("method", ["adaptive", "adaptive-saga"])
def test_a_run_that_was_stopped_goes_on(tmp_path, method):
  expected = run_cell(tmp_path / "whole.json", (method,))

  def stop(run, point):
    if point.epoch == 2:
      raise KeyboardInterrupt

  folder = tmp_path / "checkpoints"
  path = tmp_path / "cell.json"
  with pytest.raises(KeyboardInterrupt):
    run_cell(path, (method,), on_epoch=stop, checkpoint_dir=folder)
  assert not path.exists()
  epochs = []
  resumed = run_cell(
    path,
    (method,),
    on_epoch=lambda run, point: epochs.append(point.epoch),
    checkpoint_dir=folder,
  )
  assert epochs == [1, 2, 3]
  for row in (*expected, *resumed):
    del row["seconds"]
  assert resumed == expected


@pytest.mark.parametrize(
  ("size", "batch_size", "steps"),
  # STL-10, ImageNet; CIFAR-10 in the paper's study of perceptrons.
  [(5_000, 128, 39), (1_281_167, 4_096, 312), (50_000, 1_024, 48), (3, 1, 3)],
)
def test_the_batch_size_agrees_with_what_is_known(size, batch_size, steps):
  assert paper.default_batch_size(size) == batch_size
  assert size // batch_size == steps


def row(method, seed, loss):
  return {
    "method": method,
    "seed": seed,
    "train_loss": loss,
    "clean_train_loss": None if loss is None else loss / 2,
    "validation_accuracy": 0.5,
  }


def test_report():
  losses = {
    "plain": (2.0, 2.2),
    "svrg": (1.0, None),
    "alpha-svrg": (1.5, 1.72),
  }
  rows = [
    row(method, seed, loss)
    for method, values in losses.items()
    for seed, loss in enumerate(values)
  ]
  cell = "stl10", "convnext-femto"
  text = paper.report({cell: rows}, tuple(losses), paper.TABLES["small"])
  assert (
    "| convnext-femto, stl10 | 2.100 ± 0.141 | diverged (1 of 2) | 1.610 ±"
    " 0.156 | 1.64 / 1.9 / 1.57 |"
  ) in text
  assert "| 50.000 ± 0.000 | 50.000 ± 0.000 | 82.3 / 65.1 / 84 |" in text
  assert "| convnext-femto, stl10 | win -23.3% (-34.6) | win +nan" in text
  won = "win 1, tie 0, loss 0; lower in"
  assert text.count(f"| alpha-svrg | {won} 1 of 1 | {won} 0 of 1 |") == 2


def test_published_figures_are_whole():
  for table in paper.TABLES.values():
    cells = {(d, m) for d in table.datasets for m in table.models}
    assert set(table.published) == cells
    for losses, accuracies in table.published.values():
      assert len(losses) == len(accuracies) == 3
  assert paper.TABLES["imagenet"].published["imagenet2012", "vit-base"] == (
    (2.817, 3.309, 2.806),
    (81.6, 78.0, 81.6),
  )


@pytest.fixture
def tiny_images(monkeypatch):
  """In the place of any data set, if its folder is given where needed."""
  load = sources.load

  def load_or_make(name, data_dir):
    return make_images() if name == "mnist-5k" else load(name, data_dir)

  monkeypatch.setattr(sources, "load", load_or_make)


def command(*args):
  return CliRunner().invoke(paper.main, list(map(str, args)))


def test_command(tmp_path, tiny_images):
  args = ("--scale", "smoke", "--dataset", "mnist-5k", "--model", "logreg")
  args += (
    "--seeds",
    2,
    "--methods",
    "plain,svrg,alpha-svrg",
    "--out",
    tmp_path,
  )
  result = command(*args)
  assert result.exit_code == 0, result.output
  assert "Scale smoke, not the paper's:" in result.output
  assert (
    "logreg, mnist-5k: 2 of 300 epochs, 60 images of 16 instead of 224"
    in (result.output)
  )
  assert "Train loss of alpha-svrg, images as they are" in result.output
  saved = json.loads((tmp_path / "mnist-5k-logreg.json").read_text())
  assert len(saved["runs"]) == 6


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--dataset", "stl10"), "--data-dir"),
    (
      ("--dataset", "mnist-5k", "--epochs", 2, "--warmup-epochs", 2),
      "--warmup-epochs must be less than --epochs, 2, got 2.",
    ),
    (
      ("--dataset", "mnist-5k", "--scale", "smoke", "--batch-size", 61),
      "--batch-size must be at most the number of training examples of"
      " mnist-5k, 60, got 61.",
    ),
    (
      ("--dataset", "mnist-5k", "--model", "mlp2", "--drop-path", 0.1),
      "--drop-path must be 0 for mlp2, which has no paths to drop, got 0.1.",
    ),
    (("--methods", "plain,adam"), "'adam' is not one of"),
    (("--lr", "nan"), "nan is not a finite number"),
    (("--process-id", 1), "--process-id needs --distributed."),
  ],
)
def test_bad_options(args, message, tmp_path, tiny_images):
  result = command(*args, "--out", tmp_path)
  assert result.exit_code == 2
  assert message in result.output
  assert result.output.count("\n") == 1


def test_devices_of_processes_share_the_work(tmp_path):
  """Two processes of two devices have the results of one device."""
  rows = []
  for num_processes, num_devices in ((1, 1), (2, 2)):
    out = tmp_path / str(num_processes)
    args = ("--scale", "smoke", "--dataset", "mnist-5k", "--model", "logreg")
    args += ("--methods", "svrg,adaptive-saga", "--seeds", 1, "--out", out)
    args += ("--batch-size", 16)

    def command(process, port, args=args, num_processes=num_processes):
      if num_processes > 1:
        args += ("--distributed", "--coordinator", f"127.0.0.1:{port}")
        args += ("--num-processes", num_processes, "--process-id", process)
      return ["-m", "benchmarks.paper", *args]

    results = helpers.in_processes(
      command, num_processes, JAX_NUM_CPU_DEVICES=str(num_devices)
    )
    for process, (status, output) in enumerate(results):
      assert status == 0, output
      assert ("Scale smoke" in output) == (process == 0)
    saved = json.loads((out / "mnist-5k-logreg.json").read_text())
    assert saved["machine"]["devices"] == num_processes * num_devices
    rows.append(saved["runs"])
  for one, four in zip(*rows, strict=True):
    for field in ("train_loss", "clean_train_loss"):
      assert four[field] == pytest.approx(one[field], rel=1e-5)


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((7, 48, 10), (None, "data", None)),
    ((8, 16), (None, "data")),
    ((16, 3), ("data", None)),
    ((7, 3), (None, None)),
    ((), ()),
  ],
)
def test_states_are_divided_among_devices(shape, spec):
  mesh = jax.sharding.AbstractMesh((8,), ("data",))
  leaf = jax.ShapeDtypeStruct(shape, np.float32)
  assert tuple(paper.divided(mesh, leaf).spec) == spec
