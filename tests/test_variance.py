# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The study of gradient variance."""

import json

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import data, variance
import optax_svrg

pytestmark = pytest.mark.standard_promotion

SETTINGS = variance.Settings(
  epochs=3, batch_size=1000, points=4, sparse_points=2
)


@pytest.fixture(scope="module")
def dataset():
  return data.load("mnist-5k", None)


@pytest.fixture(scope="module")
def training(dataset):
  """Makes a training of logistic regression, and its results."""
  cache = {}

  def make(method):
    if method not in cache:
      made = variance.Training(SETTINGS, dataset, "logreg", "sgd", method)
      cache[method] = made, *made.run()
    return cache[method]

  return make


class TestMeasurements:
  def test_at_the_snapshot(self, training):
    """Both gradients are the same there: nothing is left to vary."""
    _, points, alphas = training("adaptive")
    starts = [p for p in points if p.epoch % 1 == 0]
    assert len(starts) == 3
    for point in starts:
      assert point.alpha == 1
      assert point.optimal_component == pytest.approx(1, abs=1e-5)
      assert point.optimal_tree == pytest.approx(1, abs=1e-5)
      assert point.variance_ratio < 1e-9
    np.testing.assert_array_equal(alphas[:, 0], 1)

  def test_the_best_coefficient_leaves_the_least_variance(self, training):
    _, points, _ = training("adaptive")
    later = [p for p in points if p.epoch % 1 > 0]
    assert len(later) == 9
    for point in later:
      assert 0 < point.optimal_tree < 1
      assert 0 < point.variance_ratio < 1
      assert 0 <= point.estimated_ratio < 1.5

  def test_against_numpy(self, training, dataset):
    """Gradients of all batches by hand, at the start of the second epoch."""
    made, points, _ = training("svrg")
    state = made._transform.init(made._params)
    opt_state = made._optimizer.init(made._params)
    batches, snapshot_grads, carry = made._begin(
      0, (made._params, state, opt_state)
    )
    shifted = jax.tree.map(lambda p: p + 0.01, made._params)
    measured, _ = made._measure(batches, snapshot_grads, (shifted, *carry[1:]))

    def gradients(params):
      result = []
      kernel = np.asarray(params["layers"][0]["kernel"], float)
      bias = np.asarray(params["layers"][0]["bias"], float)
      for x, y in zip(*(np.asarray(b) for b in batches), strict=True):
        x = x.astype(float)
        logits = x @ kernel + bias
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        error = (p - np.eye(10)[y]) / len(y)
        result.append(
          np.concatenate([error.sum(axis=0), (x.T @ error).ravel()])
        )
      return np.stack(result)

    g, s = gradients(shifted), gradients(made._params)
    left = g - (s - s.mean(axis=0))
    want = left.var(axis=0).sum()
    assert measured["total_variance"] == pytest.approx(want, rel=1e-3)
    assert measured["variance_ratio"] == pytest.approx(
      want / g.var(axis=0).sum(), rel=1e-3
    )
    covariance = np.mean((g - g.mean(axis=0)) * (s - s.mean(axis=0)), axis=0)
    optimal = covariance.sum() / s.var(axis=0).sum()
    assert measured["optimal_tree"] == pytest.approx(optimal, rel=1e-3)
    covariance_matrix = np.cov(left.T, bias=True)
    assert measured["spectral_norm"] == pytest.approx(
      np.linalg.eigvalsh(covariance_matrix)[-1], rel=1e-3
    )
    assert points[0].epoch == 0

  def test_plain(self, training):
    _, points, alphas = training("plain")
    assert not alphas.any()
    assert all(p.variance_ratio == 1 for p in points)
    assert all(p.optimal_tree is p.estimated_ratio is None for p in points)
    assert points[-1].train_loss < points[0].train_loss

  def test_coefficients_that_are_set_from_outside(self):
    tx = variance.optimal_svrg()
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    state = tx.init(params)
    state = optax_svrg.take_snapshot(state, params, lambda p: {"w": p["w"] / 2})
    state = state._replace(alphas={"w": jnp.array([1.0, 0.5, jnp.nan])})
    grads = {"w": jnp.array([5.0, 5.0, 5.0])}
    updates, state = tx.update(grads, state, params, grad_fn=lambda p: p)
    np.testing.assert_allclose(updates["w"], [4.5, 4.5, 5.0])
    assert state.svrg.alpha == 0.75, "without the component that has none"


def points_of(values):
  """Measurements at the start, the middle and the end of epochs."""
  return [
    variance.Point(
      epoch + x, *[0.0] * 5, optimal_component=y, optimal_tree=y,
      variance_ratio=0.0, estimated_ratio=0.0,
    )
    for epoch, pair in enumerate(values)
    for x, y in zip((0.0, 0.5, 0.9), (1.0, *pair), strict=True)
  ]  # fmt: skip


def test_means_by_epoch():
  points = points_of([(0.8, 0.4), (0.5, 0.3)])
  got = variance.by_epoch(points, "optimal_component")
  assert got == [pytest.approx((0.6, 0.4)), pytest.approx((0.4, 0.3))]


class TestObservations:
  HIGH = ((0.9, 0.9),) * 3
  FALLING = ((0.1, 0.1), (0.6, 0.5), (0.5, 0.4))
  RISING = ((0.5, 0.4), (0.6, 0.5), (0.7, 1.1))

  def verdicts(self, coefficients):
    found = variance.observations(coefficients)
    return {(o.claim, o.case): o.holds for o in found}

  def test_all_hold(self):
    assert all(
      self.verdicts(
        {
          ("logreg", "sgd"): self.HIGH,
          ("mlp4", "sgd"): [(0.8, 0.8), (0.8, 0.8), (0.7, 0.7)],
          ("logreg", "adamw"): ((0.8, 0.8),) * 3,
          ("mlp4", "adamw"): self.FALLING,
        }
      ).values()
    )

  def test_none_holds(self):
    verdicts = self.verdicts(
      {
        ("logreg", "sgd"): ((0.2, 1.2),) * 3,
        ("mlp4", "sgd"): self.RISING,
        ("logreg", "adamw"): ((0.3, 1.3),) * 3,
        ("mlp4", "adamw"): [(x + 0.1, y + 0.1) for x, y in self.RISING],
      }
    )
    assert len(verdicts) == 11
    assert not any(verdicts.values())


def test_command(tmp_path):
  args = [
    "--dataset=mnist-5k", "--batch-size=1300", "--model=logreg", "--epochs=3",
    "--points=3", f"--out={tmp_path}",
  ]  # fmt: skip
  result = CliRunner().invoke(variance.main, args)
  assert result.exit_code == 0, result.output
  for name in ("coefficient.png", "sgd.png", "adamw.png"):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
  results = json.loads((tmp_path / "results.json").read_text())
  assert len(results["runs"]) == 2 * len(variance.METHODS)
  for run in results["runs"]:
    assert np.shape(run["alphas"]) == (3, 3)
    losses = [point["train_loss"] for point in run["points"]]
    assert losses[-1] < losses[0]
  for o in results["observations"]:
    assert o["claim"] in result.stdout
  assert "0.81 / 0.79" in result.stdout, "the paper's value"


def test_too_few_batches():
  result = CliRunner().invoke(
    variance.main, ["--dataset=mnist-5k", "--batch-size=2000"]
  )
  assert result.exit_code == 2
  assert "at least three batches of 4000" in result.stderr
