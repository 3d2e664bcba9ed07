# SPDX-License-Identifier: Apache-2.0
"""The paper's tables: presets, reports, the command."""

import json
import math

import numpy as np
import pytest

from benchmarks.data import sources
from benchmarks.harness import publishing
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.trainer import Trainer
from benchmarks.studies import paper
from tests import helpers

pytestmark = pytest.mark.standard_promotion

SMOKE = paper.SCALES["smoke"]


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)

  def source(size):
    pixels = rng.integers(0, 256, (size, 16, 16, 3), np.uint8)
    return sources.in_memory(pixels, rng.integers(0, 4, size))

  return sources.ImageData(source(60), source(20), 4, 3, "random")


ARCHITECTURES = paper.TABLES["imagenet"].models


@pytest.mark.parametrize(
  ("model", "names"),
  [
    ("mlp2", ("alpha-svrg",)),
    *(
      pytest.param(model, paper.METHODS, marks=pytest.mark.slow)
      for model in ("logreg", "mlp2", "mlp4", *ARCHITECTURES)
    ),
  ],
)
def test_architectures_train_with_each_method(model, names, images):
  drop_path = 0.1 if model in ARCHITECTURES else 0.0
  cell = paper.template(
    "random", images, model, SMOKE, lr=4e-3, drop_path=drop_path
  )
  trainer = Trainer(cell, images)
  study = paper.make_study([cell], names, 1, 0.75)
  for name in names:
    run = Run(study.arms[name](cell))
    trainer.fit(run)
    assert run.finished
    assert math.isfinite(run.last.train_loss)
    assert math.isfinite(run.measured["clean_train_loss"])
    expected = {"svrg": 4, "adaptive": 4, "alpha-svrg": 3}
    want = expected.get(run.experiment.method, 2)
    assert run.last.gradients_per_example == want


def test_presets(images):
  full = paper.SCALES["full"]
  cell = paper.template("stl10", images, "vit-base", full, lr=4e-3)
  assert (cell.image_size, cell.epochs, cell.warmup_epochs) == (224, 300, 50)
  assert cell.lr * cell.final_lr_share == pytest.approx(1e-6)
  # A table of its gradients does not fit, nor one of float32 for SAGA.
  assert not cell.keeps_table
  study = paper.make_study([cell], ("alpha-svrg", "adaptive-saga"), 2, 0.5)
  wanted = [arm(cell) for arm in study.arms.values()]
  assert wanted[0].method_settings == {"alpha0": 0.5}
  assert wanted[1].method_settings == {"table_dtype": "bfloat16"}
  assert paper.template("stl10", images, "vit-tiny", full, lr=1.0).keeps_table
  small = paper.template("stl10", images, "vit-tiny", SMOKE, lr=4e-3)
  assert (small.image_size, small.batch_size, small.train_examples) == (
    *(16, 20, 60),
  )
  assert small.model_settings["width"] == 8


@pytest.mark.parametrize(
  ("size", "batch_size", "steps"),
  # STL-10, ImageNet; CIFAR-10 in the paper's study of perceptrons.
  [(5_000, 128, 39), (1_281_167, 4_096, 312), (50_000, 1_024, 48), (3, 1, 3)],
)
def test_the_batch_size_agrees_with_what_is_known(size, batch_size, steps):
  assert paper.default_batch_size(size) == batch_size
  assert size // batch_size == steps


def run_of(method, seed, loss):
  experiment = Experiment(
    dataset="stl10",
    model="convnext-femto",
    method=method,
    method_settings={"alpha0": 0.75} if method == "alpha-svrg" else {},
    optimizer="adamw",
    epochs=2,
    batch_size=20,
    lr=0.004,
    seed=seed,
    feed="streams",
    image_size=32,
    train_examples=60,
  )
  measured = {"clean_train_loss": None if loss is None else loss / 2}
  last = Point(2, math.nan if loss is None else loss, 0.5, 2.0, 1.0)
  return Run(experiment, [last], True, measured)


@pytest.fixture
def runs():
  losses = {"plain": (2.0, 2.2), "svrg": (1.0, None), "alpha-svrg": (1.5, 1.72)}
  return [
    run_of(method, seed, loss)
    for method, values in losses.items()
    for seed, loss in enumerate(values)
  ]


def rendered(runs):
  document = publishing.pack("paper", runs, lambda experiment: True)
  return paper.render(json.loads(json.dumps(document)))


def test_tables(runs):
  files = rendered(runs)
  text = files["table.md"]
  assert (
    "| convnext-femto, stl10 | 2.10 ± 0.14 | diverged (1 of 2) | 1.61 ± 0.16 |"
    " 1.64 / 1.90 / 1.57 |"
  ) in text
  assert "| 82.3 / 65.1 / 84.0 |" in text
  # Two seeds allow no verdict; a loss that is not finite is one.
  verdicts = (
    "| convnext-femto, stl10 | alpha-svrg | -23.3 %, 2 seeds, no verdict |"
    " rival diverged (1 of 2) |"
  )
  assert text.count(verdicts) == 2
  assert "2 of 300 epochs, 60 images of 32 instead of 224 pixels" in text
  assert json.loads(files["figure.json"])["panels"]


def test_crossings():
  losses = {
    "plain": [4.0, 3.0, 3.0],
    "svrg": [5.0, 1.0, math.nan],
    "alpha-svrg": [6.0, 2.0, 1.5],
  }
  runs = []
  for method, values in losses.items():
    run = run_of(method, 0, 1.0)
    run.history = [Point(i, x, 0.5, 1.0, 1.0) for i, x in enumerate(values, 1)]
    runs.append(run)
  text = rendered(runs)["table.md"]
  assert (
    "| convnext-femto, stl10 | plain | 2 of 3 | 1 | 1.5000 | 0.6667 | 0.5000 |"
  ) in text
  # A rival without a finite loss is not one that is beaten.
  assert (
    "| convnext-femto, stl10 | svrg | 0 of 3 | 3 | 1.2000 | 2.0000 |" in text
  )


def test_published_figures_are_whole():
  for table in paper.TABLES.values():
    for text in (table.losses, table.accuracies):
      published = table.published(text)
      assert len(published) == len(table.datasets) * len(table.models)
      assert all(len(column) == 3 for column in published.values())
  losses = paper.TABLES["imagenet"].published(paper.TABLES["imagenet"].losses)
  assert losses["imagenet2012", "vit-base"] == ("2.817", "3.309", "2.806")


def test_command(call, tmp_path):
  args = ("--scale=smoke", "--dataset=mnist-5k", "--model=logreg")
  args += ("--seeds=1", "--methods=plain,svrg", f"--out={tmp_path}")
  result = call("paper", *args)
  assert result.exit_code == 0, result.output
  assert "Not the paper's scale:" in result.stdout
  assert (
    "logreg, mnist-5k: 2 of 300 epochs, 60 images of 16 instead of 224"
  ) in result.stdout
  assert "Validation accuracy (%)" in result.stdout
  assert len(list(tmp_path.glob("*.json"))) == 2
  # What is stored is not run again.
  again = call("paper", *args)
  assert again.stdout == result.stdout


@pytest.mark.slow
def test_devices_of_processes_share_the_work(tmp_path):
  """Two processes of two devices have the results of one device."""
  found = []
  for num_processes, num_devices in ((1, 1), (2, 2)):
    out = tmp_path / str(num_processes)
    args = ("--scale=smoke", "--dataset=mnist-5k", "--model=logreg")
    args += ("--methods=svrg,adaptive-saga", "--seeds=1", f"--out={out}")
    args += ("--batch-size=16",)

    def command(process, port, args=args, num_processes=num_processes):
      if num_processes > 1:
        args += ("--distributed", "--coordinator", f"127.0.0.1:{port}")
        args += ("--num-processes", num_processes, "--process-id", process)
      return ["-m", "benchmarks", "paper", *args]

    results = helpers.in_processes(
      command, num_processes, JAX_NUM_CPU_DEVICES=str(num_devices)
    )
    for process, (status, output) in enumerate(results):
      assert status == 0, output
      assert ("Not the paper's scale" in output) == (process == 0)
    saved = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    assert [run["machine"]["devices"] for run in saved] == (
      2 * [num_processes * num_devices]
    )
    found.append([Run.from_json(run) for run in saved])
  for one, four in zip(*found, strict=True):
    assert one.experiment == four.experiment
    assert four.last.train_loss == pytest.approx(one.last.train_loss, rel=1e-5)
    assert four.measured["clean_train_loss"] == pytest.approx(
      one.measured["clean_train_loss"], rel=1e-5
    )
