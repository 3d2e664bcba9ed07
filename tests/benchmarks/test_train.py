# SPDX-License-Identifier: Apache-2.0
"""The command ``train``: its table, its files, how it ends."""

import functools
import importlib.metadata
import json

import jax
import numpy as np
import pytest
import rich.console

from benchmarks import methods
from benchmarks.data import arrays
from benchmarks.harness import array_feed, progress, report, trainer
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.program import OPTIMIZERS
import optax_svrg
from tests.benchmarks.conftest import TRAIN

# Flax and optax.adamw rely on implicit promotion.
pytestmark = pytest.mark.standard_promotion

METHODS = tuple(methods.MAIN)
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ARGS = ("--model=mlp2", "--epochs=3", "--seeds=2")


def run_command(call, data_dir, out, *args):
  """Trains on the small data set; returns the result and its JSON."""
  result = call(
    "train",
    "--dataset=fashion-mnist",
    f"--data-dir={data_dir}",
    "--batch-size=16",
    f"--out={out}",
    *args,
  )
  return result, read_json(out / "results.json")


@pytest.fixture
def invoke(call, data_dir, tmp_path):
  return functools.partial(run_command, call, data_dir, tmp_path)


def read_json(path):
  """Reads strict JSON, which has no NaN."""

  def refuse(constant):
    raise AssertionError(constant)

  return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def losses(results, method, seed=0):
  (run,) = (
    run
    for run in results["runs"]
    if (run["experiment"]["method"], run["experiment"]["seed"])
    == (method, seed)
  )
  return [point["train_loss"] for point in run["history"]]


def gradients(results):
  """Gradient evaluations per example by method."""
  return {
    row["method"]: row["gradients_per_example"] for row in results["table"]
  }


@pytest.fixture(scope="module")
def comparison(data_dir, tmp_path_factory):
  """A run of all methods: what it printed, its JSON and its folder."""
  from click.testing import CliRunner

  from benchmarks import cli

  call = lambda *args: CliRunner().invoke(cli.main, list(args))
  out = tmp_path_factory.mktemp("comparison")
  return *run_command(call, data_dir, out, *ARGS), out


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
      method = run["experiment"]["method"]
      start, *history = run["history"]
      assert start["alpha"] is start["variance_ratio"] is None
      alphas = [point["alpha"] for point in history]
      ratios = [point["variance_ratio"] for point in history]
      if method in ("plain", "plain-fixed"):
        assert alphas == [0, 0, 0]
        assert ratios == [None] * 3
      elif method == "saga":
        assert alphas == [0, 1, 1]
        assert ratios[0] is None
        assert all(0 < ratio for ratio in ratios[1:])
      elif method == "adaptive-saga":
        assert alphas[0] == 0
        assert all(0 <= alpha <= 1 for alpha in alphas)
        assert ratios[0] is None
      elif method == "alpha-svrg":
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
    sha256 = arrays.load("fashion-mnist", data_dir).sha256
    assert results["identity"] == {
      "--dataset": "fashion-mnist",
      "--model": "mlp2",
      "--optimizer": "adamw",
      "--methods": list(METHODS),
      "--epochs": 3,
      "--batch-size": 16,
      "--lr": OPTIMIZERS["adamw"].lr,
      "--alpha0": 0.75,
      "--snapshot-every": 1,
      "--label-noise": 0.0,
      "--augment": "none",
      "--seeds": 2,
      "the SHA-256 of the data": sha256,
    }
    assert results["versions"]["jax"] == jax.__version__
    assert results["versions"]["optax_svrg"] == optax_svrg.__version__
    assert results["versions"]["flax"] == importlib.metadata.version("flax")
    assert results["machine"]["backend"] == jax.default_backend()
    assert len(results["runs"]) == 2 * len(METHODS)
    for saved in results["runs"]:
      run = Run.from_json(saved)
      assert run.finished
      assert not run.diverged
      assert run.experiment.data_sha256 == sha256
      assert [point.epoch for point in run.history] == [0, 1, 2, 3]
      for field in ("gradients_per_example", "seconds"):
        values = [getattr(point, field) for point in run.history]
        assert values[0] == 0
        assert values == sorted(values)
    assert (out / "results.png").read_bytes().startswith(PNG_MAGIC)

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
    final = {losses(results, method)[-1] for method in METHODS}
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


class TestEnd:
  def test_divergence_is_shown_and_is_an_error(self, invoke):
    result, results = invoke(
      "--lr=1e30",
      "--optimizer=sgd",
      "--methods=plain",
      "--epochs=10",
      "--seeds=2",
    )
    assert result.stdout.count("diverged (2 of 2)") == 2
    assert [run["diverged"] for run in results["runs"]] == [True, True]
    assert losses(results, "plain")[-1] is None
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last == "Error: All runs diverged; try a lower --lr than 1e+30."

  def test_results_of_other_options_are_kept(self, invoke):
    small = ("--model=logreg", "--methods=plain", "--epochs=1", "--seeds=1")
    _, first = invoke(*small)
    result, kept = invoke(*small, "--lr=0.1")
    assert result.exit_code == 2
    assert "--lr is 0.003 there and 0.1 here" in result.stderr
    assert "--overwrite" in result.stderr
    assert kept == first
    # The same options repeat the same training.
    result, again = invoke(*small)
    assert result.exit_code == 0
    assert losses(again, "plain") == losses(first, "plain")
    result, other = invoke(*small, "--lr=0.1", "--overwrite")
    assert result.exit_code == 0
    assert other["identity"]["--lr"] == 0.1

  def test_a_file_of_another_kind_is_kept(self, call, tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[]")
    result = call("train", f"--out={tmp_path}")
    assert result.exit_code == 2
    assert "holds no training: results.json: " in result.stderr
    assert path.read_text() == "[]"

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
    make_program = array_feed.ArrayFeed.program
    calls = []

    def make_interrupted(*args):
      program = make_program(*args)

      def interrupted(*args):
        if len(calls) == epochs_done:
          raise KeyboardInterrupt
        calls.append(args)
        return program.advance(*args)

      return program._replace(advance=interrupted)

    monkeypatch.setattr(array_feed.ArrayFeed, "program", make_interrupted)
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

  def test_interruption_before_the_first_run(self, invoke, monkeypatch):
    def interrupted(*args):
      raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "__init__", interrupted)
    result, results = invoke()
    assert result.exit_code == 130
    assert "Interrupted before the first run." in result.stdout
    assert results["runs"] == results["table"] == []


def test_a_narrow_terminal_shows_every_number(comparison, capsys):
  _, results, _ = comparison
  console = rich.console.Console(width=40, no_color=True)
  report.print_table(results["table"], console)
  lines = capsys.readouterr().out.splitlines()
  assert max(map(len, lines)) <= 40
  text = "\n".join(lines)
  assert "…" not in text
  for row in results["table"]:
    assert row["method"] in text
    assert f"{row['final_train_loss']['mean']:#.3g}" in text
    assert f"{row['gradients_per_example']:.2f}" in text


def test_lines_where_there_is_no_terminal(capsys):
  experiment = Experiment(
    dataset="mnist-5k",
    model="mlp2",
    method="svrg",
    optimizer="sgd",
    epochs=2,
    batch_size=10,
    lr=0.1,
    seed=3,
  )

  with progress.Progress(4, interval=0.0) as shown:
    assert capsys.readouterr().err == "0/4 epochs: compiling\n"
    shown(Run(experiment), Point(1, 0.25, 0.5, 1.0, 1.0))
  line = "1/4 epochs: mlp2, mnist-5k, svrg, seed 3, epoch 1/2, loss 0.250\n"
  assert capsys.readouterr().err == line
  with progress.Progress(4, interval=1e6) as shown:
    shown(Run(experiment), Point(1, 0.25, 0.5, 1.0, 1.0))
  assert capsys.readouterr().err == "0/4 epochs: compiling\n"
