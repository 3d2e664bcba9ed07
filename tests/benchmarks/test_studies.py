# SPDX-License-Identifier: Apache-2.0
"""The studies: what they run, and what they make of it."""

import importlib
import json
import math
import random

from click.testing import CliRunner
import pytest

from benchmarks import methods
from benchmarks.harness import comparison, figures, publishing, study, trainer
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.program import OPTIMIZERS
from benchmarks.models import MODELS

STUDIES = (
  "balanced_order",
  "coefficient",
  "equal_compute",
  "optimizers",
  "saga",
  "saga_variants",
  "snapshots",
  "stability",
  "staleness",
)


def load(name):
  return importlib.import_module(f"benchmarks.studies.{name}").STUDY


def trained(experiment):
  """A run as if it had been trained, the same for the same experiment."""
  rng = random.Random(experiment.key)
  losses = [2.3 / (1 + i) + 0.1 * rng.random() for i in range(3)]
  history = [
    Point(
      i, loss, 0.5 + 0.1 * rng.random(), i * experiment.epochs / 2, 1.0, 0.5
    )
    for i, loss in enumerate(losses)
  ]
  return Run(experiment, history, finished=True)


@pytest.fixture
def untrained(monkeypatch):
  """Nothing is trained; collects the experiments that are asked for."""
  asked = []

  def run_all(experiments, store, *, data_dir):
    experiments = list(experiments)
    asked.extend(experiments)
    return [trained(experiment) for experiment in experiments]

  monkeypatch.setattr(trainer, "run_all", run_all)
  return asked


@pytest.mark.parametrize("name", STUDIES)
class TestStudies:
  def test_experiments_can_be_run(self, name, untrained, tmp_path):
    """Their names are known, and their methods can be made."""
    load(name).train(tmp_path, None)
    for experiment in untrained:
      assert experiment.optimizer in OPTIMIZERS
      assert experiment.model in MODELS
      context = methods.Context(
        experiment.train_examples, experiment.batch_size, experiment.epochs
      )
      methods.make(experiment.method, context, **experiment.method_settings)
      assert Experiment(**experiment.identity()) == experiment

  def test_report(self, name, untrained, tmp_path):
    """Each method is in the table; the file of the runs says it all."""
    own = load(name)
    runs = own.train(tmp_path, None)
    document = publishing.pack(own.name, runs, own.has_curve)
    saved = json.loads(json.dumps(document, allow_nan=False))
    files = own.render(saved)
    table = files["table.md"]
    for words in (own.title, document["command"], *own.arms):
      assert words in table
    assert "nan" not in table
    if "figure.json" in files:
      figure = figures.from_json(json.loads(files["figure.json"]))
      assert figures.draw(figure).startswith(b"<?xml")
      for panel in figure.panels:
        assert all(any(line.y) for line in panel.lines)
    # Rounding apart, the same as before publication.
    assert publishing.importlib.import_module(document["module"]).STUDY is own
    assert own.render(saved) == files

  def test_a_part_of_it(self, name, untrained, tmp_path):
    """Of one problem; too few seeds for a verdict."""
    own = load(name)
    cell = next(iter(own.cells))
    args = ["--cell", cell, "--seeds", "2", "--epochs", "3", "--examples"]
    result = CliRunner().invoke(
      own.command(), [*args, "512", "--out", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert {e.train_examples for e in untrained} == {512}
    assert "lower," not in result.stdout
    if name != "stability":
      assert "2 seeds, no verdict" in result.stdout

  def test_seeds_of_the_verdict(self, name):
    for cell in load(name).cells.values():
      assert cell.num_seeds >= comparison.MIN_SEEDS
      assert not set(range(cell.num_seeds)) & set(comparison.TUNING_SEEDS)


ARMS = {"plain": study.arm("plain"), "SAGA": study.arm("saga")}
CELL = study.Cell(
  study.cell("mnist-5k", "logreg", "sgd", lr=0.1, epochs=2).template,
  (0.1, 0.3, 1.0),
)


TUNED = {
  ("plain", lr, seed): loss
  for lr, loss in ((0.1, 3.0), (0.3, 1.0), (1.0, 2.0))
  for seed in comparison.TUNING_SEEDS
}


class TestTuning:
  def results(self, losses):
    """From losses by method, learning rate and seed."""
    runs = []
    for (name, lr, seed), loss in losses.items():
      experiment = ARMS[name](CELL.template).replace(lr=lr, seed=seed)
      runs.append(Run(experiment, [Point(2, loss, 0.5, 2.0, 1.0)], True))
    return study.Results({"x": CELL}, ARMS, runs)

  def test_first_all_rates_on_the_tuning_seeds(self):
    results = self.results({})
    wanted = results.experiments("x", "SAGA")
    assert {(e.lr, e.seed) for e in wanted} == {
      (lr, seed) for lr in (0.1, 0.3, 1.0) for seed in comparison.TUNING_SEEDS
    }
    assert {e.method for e in wanted} == {"saga"}
    assert results.lr("x", "SAGA") is None
    assert results.cells == []

  def test_then_the_best_rate_on_those_of_the_verdict(self):
    results = self.results(TUNED)
    wanted = results.experiments("x", "plain")
    assert [(e.lr, e.seed) for e in wanted] == [
      (0.3, seed) for seed in comparison.VERDICT_SEEDS
    ]

  def test_tuning_takes_no_part_in_the_verdict(self):
    verdict = {("plain", 0.3, seed): 7.0 + seed for seed in range(5)}
    results = self.results(TUNED | verdict)
    assert results.losses("x", "plain") == {i: 7.0 + i for i in range(5)}
    assert results.mean("x", "plain") == 9.0
    assert results.lr_text("x", "plain") == "0.3"

  def test_the_end_of_a_grid_is_marked(self):
    tuned = TUNED | {
      ("plain", 1.0, seed): 0.5 for seed in comparison.TUNING_SEEDS
    }
    assert self.results(tuned).lr_text("x", "plain") == "1*"

  def test_divergence(self):
    verdict = {("plain", 0.3, seed): 7.0 for seed in range(4)}
    lost = verdict | {("plain", 0.3, 4): math.nan}
    results = self.results(TUNED | lost)
    assert results.losses("x", "plain")[4] == math.inf
    assert results.mean("x", "plain") == math.inf
    assert results.loss_text("x", "plain") == "diverged (1 of 5) (0.3)"


def test_publishing_takes_the_sizes_of_the_study(untrained, tmp_path):
  args = ["--publish", "--epochs", "1", "--out", str(tmp_path)]
  result = CliRunner().invoke(load("saga").command(), args)
  assert result.exit_code == 2
  assert "--publish takes the sizes of the study" in result.output
  assert not untrained


def test_one_problem_with_augmentation(untrained, tmp_path):
  """There is no mean over the problems without it."""
  args = ["--cell", "fashion-mnist-mlp2-adamw-shift-flip"]
  args += ["--out", str(tmp_path)]
  result = CliRunner().invoke(load("balanced_order").command(), args)
  assert result.exit_code == 0, result.output


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_a_command_trains_and_reports(tmp_path):
  """Once without stubs; a second time nothing is trained."""
  args = ["--cell", "mnist-5k-logreg-adamw", "--seeds", "1", "--epochs", "1"]
  args += ["--examples", "192", "--out", str(tmp_path)]
  command = load("coefficient").command()
  first = CliRunner().invoke(command, args)
  assert first.exit_code == 0, first.output
  stored = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  # Two tuning seeds at three rates, and one seed of the verdict; of them all.
  assert len(stored) == 5 * (2 * 3 + 1)
  second = CliRunner().invoke(command, args)
  assert second.stdout == first.stdout
  after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
  assert after == stored
