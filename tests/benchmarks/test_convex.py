# SPDX-License-Identifier: Apache-2.0
"""The convex problems, their solvers, and what is made of the results."""

import json
import math

from click.testing import CliRunner
import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
from sklearn.linear_model import LogisticRegression

from benchmarks.studies.convex import problems, solvers, study

pytestmark = pytest.mark.standard_promotion


def small(penalty="l2", num_classes=10, num_examples=203):
  """Digits; the number of them is no multiple of anything."""
  problem = problems.make(f"digits-{penalty}", None)
  strengths = {"l2": 0.0, "l1": 0.0} | {penalty: 1e-2}
  return problem._replace(
    features=problem.features[:num_examples],
    labels=problem.labels[:num_examples] % num_classes,
    **strengths,
  )


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("penalty", ["l2", "l1"])
def test_evaluate(penalty, num_classes):
  """scikit-learn minimises the same, and the bound holds at other points."""
  problem = small(penalty, num_classes)
  model = LogisticRegression(
    C=1 / (1e-2 * len(problem.labels)),
    l1_ratio=float(penalty == "l1"),
    fit_intercept=False,
    solver="saga",
    max_iter=20_000,
    tol=1e-10,
  ).fit(problem.features, problem.labels)
  minimum = problems.evaluate(problem, model.coef_.T)
  assert 0 <= minimum.bound < 1e-5
  for scale in (0.0, 0.9, 1.1):
    at = problems.evaluate(problem, scale * model.coef_.T)
    assert minimum.value < at.value <= minimum.value + at.bound
  start = problems.evaluate(problem, np.zeros(problem.shape)).value
  assert start == pytest.approx(math.log(num_classes))


KEYS = [("l1", 2), ("l2", 2), ("l2", 10)]


@pytest.fixture(scope="module")
def minima():
  """Minima of the small problems, by penalty and number of classes."""
  with jax.enable_x64(True):
    return {key: study.reference(small(*key)) for key in KEYS}


# What compiles much, or is compared with only, is in the slow tier.
@pytest.mark.parametrize(
  ("name", "key"),
  [
    pytest.param(
      name,
      key,
      marks=()
      if key == KEYS[0] and name in ("fit_linear", solvers.BASELINE)
      else pytest.mark.slow,
    )
    for name in solvers.SOLVERS
    for key in KEYS
  ],
)
def test_solvers_minimise_the_same(name, key, minima, x64):
  solver, problem = solvers.SOLVERS[name], small(*key)
  if not solver.accepts(problem):
    pytest.skip(f"{name} does not solve it")
  minimum, bound = minima[key]
  assert bound < 1e-9
  gaps = []
  for effort in (solver.efforts[0], solver.efforts[:4][-1]):
    found = solver.solve(problem, effort)
    gaps.append(problems.evaluate(problem, found.weights).value - minimum)
    assert found.passes is None or found.passes > 0
  assert min(gaps) > -1e-13 - bound
  assert gaps[1] < max(0.2 * gaps[0], 1e-9)


def record(gaps, seconds, passes=None, compiling=0.0):
  return {
    "compiling": compiling,
    "passes": passes or [10 * s for s in seconds],
    "seconds": seconds,
    "gap": gaps,
  }


def test_reach():
  trace = record([1e-4, 1e-8], [1.0, 2.0])
  assert study.reach(trace, 1e-6, "seconds") == pytest.approx(1.5)
  assert study.reach(trace, 1e-6, "passes") == pytest.approx(15)
  assert study.reach(trace, 1e-2, "seconds") == 1.0
  assert study.reach(trace, 1e-9, "seconds") == math.inf
  assert math.isnan(study.reach(record([1e-9], [1], [None]), 1e-6, "passes"))


def test_trace_goes_on_until_the_gap_is_reached(monkeypatch):
  problem = small()
  efforts = []

  def solve(problem, effort):
    efforts.append(effort)
    return solvers.Found(np.full(problem.shape, 10.0**-effort), effort)

  solver = solvers.Solver(solve, [1, 2, 5, 9, 12])
  monkeypatch.setattr(
    problems,
    "evaluate",
    lambda problem, w: problems.Value(float(w[0, 0]), 0.0),
  )
  found = study.trace(problem, solver, 0.0)
  # Calls this short are repeated.
  assert efforts == [1, 1, 2, 2, 5, 5, 9, 9]
  np.testing.assert_allclose(found["gap"], [0.1, 1e-2, 1e-5, 1e-9])
  assert found["passes"] == [1, 2, 5, 9]
  assert min(found["seconds"]) >= 0


def document():
  saga = record([1e-5, 1e-9], [8.0, 16.0])
  return {
    "command": "python -m benchmarks convex",
    "cells": {
      "mnist-5k-l2": {
        "shape": [5000, 784, 10],
        "minimum": 0.25,
        "bound": 1e-12,
        "solvers": {
          "fit_linear": record([1e-5, 1e-9], [1.0, 2.0], compiling=1.5),
          solvers.BASELINE: saga,
          "nemos SVRG": record([1e-2, 1e-5], [1.0, 2.0]),
        },
      }
    },
  }


def test_tables():
  files = study.render(document())
  table = files["table.md"]
  assert "| fit_linear | 12 | 1.2 [2.8] | 8.0x | 18 | 1.8 [3.2] |" in table
  assert "| nemos SVRG |  | not reached (1e-05) |" in table
  (panel,) = json.loads(files["figure.json"])["panels"]
  assert [line["label"] for line in panel["lines"]] == [
    "fit_linear",
    solvers.BASELINE,
    "nemos SVRG",
  ]


def run(*args):
  return CliRunner().invoke(study.main, [*map(str, args)])


def test_command(tmp_path, monkeypatch):
  chosen = {
    name: solvers.SOLVERS[name] for name in ("fit_linear", solvers.BASELINE)
  }
  monkeypatch.setattr(solvers, "SOLVERS", chosen)
  problem = small()
  monkeypatch.setattr(problems, "make", lambda cell, data_dir: problem)
  result = run("--cell=digits-l2", f"--out={tmp_path}")
  assert result.exit_code == 0, result.output
  assert "| fit_linear |" in result.stdout
  stored = json.loads((tmp_path / "runs.json").read_text())
  cell = stored["cells"]["digits-l2"]
  assert list(cell["solvers"]) == list(chosen)
  for trace in cell["solvers"].values():
    assert trace["gap"][-1] <= 1e-8
  # What is there is not repeated.
  monkeypatch.setattr(study, "trace", lambda *args: pytest.fail("repeated"))
  assert run("--cell=digits-l2", f"--out={tmp_path}").stdout == result.stdout


def test_features_of_a_net_need_data(tmp_path):
  result = run("--cell=fashion-mnist-features-l2", f"--out={tmp_path}")
  assert result.exit_code == 2
  assert "fashion-mnist-features needs --data-dir." in result.stderr


class TestBenchopt:
  """The file is for other repositories; here is what these call."""

  def solve(self, objective, tolerance):
    pytest.importorskip("benchopt")
    from benchmarks.studies.convex import benchopt_solver

    solver = benchopt_solver.Solver.get_instance()
    skip, reason = solver._set_objective(objective)
    assert not skip, reason
    solver.run_once(stop_val=tolerance)
    return objective(solver.get_result())[0]["objective_value"]

  @pytest.mark.parametrize("is_sparse", [False, True])
  def test_logreg_l2(self, is_sparse):
    benchopt = pytest.importorskip("benchopt")
    rng = np.random.default_rng(0)
    x, lmbd = rng.normal(size=(60, 4)), 0.3
    y = np.sign(x[:, 0] + rng.normal(size=60))

    def loss(beta):
      return np.log1p(np.exp(-y * (x @ beta))).sum() + lmbd / 2 * beta @ beta

    class Objective(benchopt.BaseObjective):
      name = "L2 Logistic Regression"

      def set_data(self):
        pass

      def get_one_result(self):
        return {"beta": np.zeros(4)}

      def get_objective(self):
        data = scipy.sparse.csr_array(x) if is_sparse else x
        return {"X": data, "y": y, "lmbd": lmbd}

      def evaluate_result(self, beta):
        return {"value": loss(beta)}

    want = scipy.optimize.minimize(loss, np.zeros(4), tol=1e-12).fun
    objective = Objective.get_instance()
    assert self.solve(objective, 1) > want + 1e-3
    got = self.solve(objective, 1e-9)
    assert got == pytest.approx(want, rel=1e-10)

  @pytest.mark.parametrize("intercept", [False, True])
  def test_ridge(self, intercept):
    benchopt = pytest.importorskip("benchopt")
    rng = np.random.default_rng(0)
    x, lmbd = rng.normal(size=(60, 4)), 0.3
    y = x[:, 0] + 2 + rng.normal(size=60)
    wide = np.c_[x, np.ones(60)] if intercept else x
    ridge = np.diag([lmbd] * 4 + [0] * intercept)

    def loss(beta):
      return np.sum((wide @ beta - y) ** 2) / 2 + beta @ ridge @ beta / 2

    class Objective(benchopt.BaseObjective):
      name = "Ridge Regression"

      def set_data(self):
        pass

      def get_one_result(self):
        return {"beta": np.zeros(wide.shape[1])}

      def get_objective(self):
        return {"X": x, "y": y, "lmbd": lmbd, "fit_intercept": intercept}

      def evaluate_result(self, beta):
        return {"value": loss(beta)}

    want = loss(np.linalg.solve(wide.T @ wide + ridge, wide.T @ y))
    got = self.solve(Objective.get_instance(), 1e-9)
    assert got == pytest.approx(want, rel=1e-10)
