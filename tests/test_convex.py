# SPDX-License-Identifier: Apache-2.0
"""The convex problems."""

import json
import math

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from benchmarks import convex
from tests import helpers

pytestmark = pytest.mark.standard_promotion

DIGITS = convex.MAKERS["digits"]


def small(num_examples=203, l2=1e-2):
  """Digits; the number of them is no multiple of anything."""
  problem = DIGITS()
  return convex.Problem(
    problem.features[:num_examples], problem.labels[:num_examples], l2
  )


def parity():
  problem = small()
  return problem._replace(labels=problem.labels % 2)


@pytest.fixture(scope="module", params=[small, parity])
def solved(request):
  problem = request.param()
  with jax.enable_x64(True):
    return problem, convex.solve_reference(problem)


def value(problem, weights):
  """The objective, by NumPy."""
  logits = problem.features @ weights
  if logits.shape[1] == 1:
    logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
  rows = np.arange(len(logits))
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[rows, problem.labels]
  return losses.mean() + problem.l2 / 2 * np.sum(weights**2)


def test_reference_and_what_scikit_learn_minimises(solved):
  problem, reference = solved
  assert reference.bound < 1e-15
  model = LogisticRegression(
    C=1 / (problem.l2 * len(problem.labels)), fit_intercept=False, tol=1e-12
  ).fit(problem.features, problem.labels)
  weights = model.coef_.T
  assert weights.shape == problem.shape
  with jax.enable_x64(True):
    ours = convex.objective(
      jnp.asarray(weights), *map(jnp.asarray, problem[:2]), problem.l2
    )
  np.testing.assert_allclose(ours, value(problem, weights), rtol=1e-14)
  np.testing.assert_allclose(ours, reference.value, rtol=0, atol=1e-13)
  assert convex.reach(reference.lbfgs, 1e-12)


@pytest.mark.parametrize(
  "name",
  ["adaptive SAGA", "adaptive SVRG", "SVRG, table, 100 batches, momentum"],
)
def test_the_default_step_size_leads_to_the_minimum(name, x64):
  problem = small()
  minimum = convex.solve_reference(problem).value
  trace = convex.solve(problem, convex.METHODS[name], minimum, 250)
  assert trace.points[-1].suboptimality < 1e-10


def test_two_classes(x64):
  problem = parity()
  minimum = convex.solve_reference(problem).value
  trace = convex.solve(problem, convex.METHODS["SAGA"], minimum, 250)
  assert trace.points[-1].suboptimality < 1e-10


def test_sgd_does_not_arrive(x64):
  problem = small()
  minimum = convex.solve_reference(problem).value
  trace = convex.solve(problem, convex.METHODS["SGD with decay"], minimum, 60)
  assert 1e-8 < trace.points[-1].suboptimality < 1e-2


@pytest.mark.parametrize(
  ("name", "num_batches", "per_epoch"),
  [
    ("SAGA", 26, 1),
    ("SVRG", 26, 3),
    ("SVRG, table, 100 batches, momentum", 12, 2),
  ],
)
def test_passes(name, num_batches, per_epoch, x64):
  """An epoch's, and two per Hessian-vector product of the estimate."""
  problem = small()
  trace = convex.solve(problem, convex.METHODS[name], 0.0, 5 * per_epoch)
  probe = 8 * 5 * 2 / num_batches
  # Before the first, second, third and fifth epoch.
  passes = np.cumsum([probe + per_epoch] * 3 + [per_epoch, probe + per_epoch])
  got = [point.passes for point in trace.points]
  np.testing.assert_allclose(got, [0, *passes][: len(got)])
  assert got[-1] >= 5 * per_epoch > got[-2]


def test_split():
  index = convex.split(np.random.default_rng(0), 10, 4)
  assert index.shape == (4, 3)
  assert sorted(index.ravel()) == [*range(10), 10, 10]
  sizes = (index < 10).sum(axis=1)
  assert sizes.max() - sizes.min() == 1


def trace_of(*points):
  return convex.Trace([convex.Point(*point) for point in points])


class TestTable:
  OURS = trace_of((0, 0, 1.0), (4, 1, 1e-4), (8, 2, 1e-8), (9, 3, -1e-17))
  THEIRS = trace_of((0, 0, 1.0), (6, 6, 1e-6), (12, 12, 1e-7))

  def test_reach(self):
    point = convex.reach(self.OURS, 1e-6)
    assert point.passes == pytest.approx(6)
    assert point.seconds == pytest.approx(1.5)
    assert convex.reach(self.OURS, 1e-8).passes == pytest.approx(8)
    assert convex.reach(self.THEIRS, 1e-8) is None

  def test_lines(self):
    text = convex.table({"SAGA": self.OURS, convex.BASELINE: self.THEIRS})
    ours, theirs = (
      [cell.strip() for cell in line.split("|")[1:-1]]
      for line in text.splitlines()[2:]
    )
    assert ours[:3] == ["SAGA", "6 in 1.5 s (4.0x)", "8 in 2.0 s"]
    assert ours[4:6] == ["< 1e-13", "9"]
    assert theirs[1:5] == ["6 in 6.0 s", *["not reached"] * 2, "1e-07"]


def test_features_of_a_frozen_net(tmp_path):
  rng = np.random.default_rng(0)
  for part in ("train", "t10k"):
    for kind, array in (
      ("images-idx3", rng.integers(0, 256, (30, 4, 4))),
      ("labels-idx1", np.arange(30) % 10),
    ):
      helpers.write_gz(tmp_path / f"{part}-{kind}-ubyte.gz", helpers.idx(array))
  problem = convex.fashion_mnist_features(tmp_path, 20)
  assert problem.features.shape == (20, 256)
  assert problem.features.dtype == np.float64
  assert np.isfinite(problem.features).all()
  assert (problem.features >= 0).all()
  assert problem.shape == (256, 10)


def run(*args):
  return CliRunner().invoke(convex.main, [*map(str, args)])


class TestCommand:
  def test_small(self, tmp_path, monkeypatch):
    monkeypatch.setitem(convex.MAKERS, "digits", small)
    monkeypatch.setattr(convex, "METHODS", {"SAGA": convex.METHODS["SAGA"]})
    monkeypatch.setattr(
      convex,
      "versions",
      lambda: {"scikit-learn": "1", "copt": None, "nemos": None},
    )
    result = run("--problem=digits", "--passes=8", f"--out={tmp_path}")
    assert result.exit_code == 0, result.output
    assert "digits: 203 examples, 64 features, 10 classes" in result.stdout
    assert "nemos SVRG is left out: nemos is not installed" in result.stderr
    record = json.loads((tmp_path / "convex.json").read_text())
    assert record["passes"] == 8
    traces = record["problems"]["digits"]
    assert list(traces)[:2] == ["SAGA", convex.BASELINE]
    for trace in traces.values():
      losses = [point["suboptimality"] for point in trace["points"]]
      assert losses[0] == pytest.approx(math.log(10), rel=0.5)
      assert losses[-1] < losses[0]
      assert trace["points"][0]["seconds"] == 0
    # The baseline is run anew for each number of passes.
    passes = [point["passes"] for point in traces[convex.BASELINE]["points"]]
    assert passes == [0, 1, 2, 3, 4, 8]
    assert (tmp_path / "convex.png").stat().st_size > 0

  @pytest.mark.parametrize(
    ("args", "message"),
    [
      (["--passes=0"], "Invalid value for '--passes': 0 "),
      (["--problem=mnist"], "Invalid value for '--problem': 'mnist'"),
      (["--data-dir=/none"], "Invalid value for '--data-dir'"),
      (
        ["--problem=fashion-mnist-features"],
        "--problem fashion-mnist-features needs --data-dir.",
      ),
    ],
  )
  def test_bad_options(self, args, message, tmp_path):
    result = run(*args, f"--out={tmp_path}")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1

  def test_missing_data(self, tmp_path):
    result = run(
      "--problem=fashion-mnist-features",
      f"--data-dir={tmp_path}",
      f"--out={tmp_path / 'out'}",
    )
    assert result.exit_code == 2
    assert "train-images-idx3-ubyte.gz" in result.stderr
    assert len(result.stderr.splitlines()) == 1


class TestPeers:
  """Those that are installed, and that all minimise the same."""

  @pytest.mark.parametrize("name", list(convex.PEERS))
  def test_they_come_near(self, name, x64):
    peer = convex.PEERS[name]
    if convex.versions()[peer.package] is None:
      pytest.skip(f"{peer.package} is not installed")
    problem = parity()
    minimum = convex.solve_reference(problem).value
    trace = peer.solve(problem, minimum, 60)
    losses = [point.suboptimality for point in trace.points]
    assert min(losses) > -1e-14
    assert losses[-1] < 1e-2 * losses[0]
    assert [p.passes for p in trace.points] == sorted(
      p.passes for p in trace.points
    )
