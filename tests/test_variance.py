# SPDX-License-Identifier: Apache-2.0
"""The study of gradient variance."""

import json

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import variance
from benchmarks.data import arrays as data
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


def start_of(made):
  """What a training starts from."""
  params = made._params
  return params, made._transform.init(params), made._optimizer.init(params)


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

  def test_the_best_coefficient_leaves_the_least_variance(
    self, training, dataset
  ):
    """SVRG and the best coefficients at the same weights."""
    made, points, _ = training("adaptive")
    later = [p for p in points if p.epoch % 1 > 0]
    assert len(later) == 9
    assert all(0 < p.optimal_tree < 1 for p in later)
    # Online it may be far from that: these four batches per epoch are large,
    # and the mean gradient moves by more than they vary.
    assert all(0 <= p.alpha <= 1 for p in later)
    carry = start_of(made)
    batches, s, carry = made._begin(0, carry, made._train)
    shifted = jax.tree.map(lambda p: p + 0.01, made._params)
    ratios = {}
    for method in ("svrg", "optimal"):
      other = variance.Training(SETTINGS, dataset, "logreg", "sgd", method)
      state = other._transform.init(made._params)
      mean = jax.tree.map(lambda x: x.mean(axis=0), s)
      state = optax_svrg.take_snapshot(state, made._params, lambda _, m=mean: m)
      measured, _ = other._measure(batches, s, (shifted, state, carry[2]))
      ratios[method] = measured["variance_ratio"]
    assert 0 < ratios["optimal"] < ratios["svrg"] < 1

  def test_the_estimate_at_weights_that_stay(self, dataset):
    """Nothing to lag behind: what is left is the noise of 80 batches."""
    settings = variance.Settings(
      epochs=1, batch_size=50, points=3, sparse_points=2
    )
    made = variance.Training(settings, dataset, "logreg", "sgd", "adaptive")
    made._optimizer = optax.sgd(0.0)
    batches, s, carry = made._begin(0, start_of(made), made._train)
    noise = optax.tree.random_like(jax.random.key(0), made._params)
    shifted = optax.tree.add(made._params, optax.tree.scale(0.1, noise))
    carry = (shifted, *carry[1:])
    carry, used = made._advance(batches, carry, jnp.zeros(80), 0, 80)
    measured, _ = made._measure(batches, s, carry)
    assert measured["optimal_tree"] < 0.95, "else there is nothing to estimate"
    # Over seeds of the noise the error was up to 0.015.
    assert measured["optimal_tree"] == pytest.approx(float(used[-1]), abs=0.03)

  def test_against_numpy(self, training, dataset):
    """Gradients of all batches by hand, at the start of the second epoch."""
    made, points, _ = training("svrg")
    batches, snapshot_grads, carry = made._begin(0, start_of(made), made._train)
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
    singular = np.linalg.svd(left - left.mean(axis=0), compute_uv=False)
    assert measured["spectral_norm"] == pytest.approx(
      singular[0] ** 2 / len(left), rel=1e-3
    )
    assert points[0].epoch == 0

  def test_plain(self, training):
    _, points, alphas = training("plain")
    assert not alphas.any()
    assert all(p.variance_ratio == 1 for p in points)
    for point in points:
      assert np.isnan([point.optimal_tree, point.estimated_ratio]).all()
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
  assert got == [pytest.approx((0.6, 0.4, 1)), pytest.approx((0.4, 0.3, 1))]


def test_methods_are_compared_at_the_same_moments():
  """Whoever is measured earlier in the epoch would look better."""
  late = [p for p in points_of([(0.0, 0.0)] * 2) if p.epoch % 1 != 0.5]
  dense = [
    p._replace(total_variance=p.epoch % 1) for p in points_of([(0.0, 0.0)] * 2)
  ]
  late = [p._replace(total_variance=p.epoch % 1) for p in late]
  rows = variance.variance_table(
    {("logreg", "sgd"): {"plain": (late, None), "adaptive": (dense, None)}}
  ).splitlines()
  (total,) = [row for row in rows if "total variance" in row]
  assert total.endswith("| 0.9 | 0.9 |")


def epochs_of(*pairs, start=1.0):
  return [variance.EpochMeans(mean, end, start) for mean, end in pairs]


class TestObservations:
  HIGH = epochs_of(*((0.9, 0.9),) * 3)
  FALLING = epochs_of((0.1, 0.1), (0.6, 0.5), (0.5, 0.4))
  RISING = epochs_of((0.5, 0.4), (0.6, 0.5), (0.7, 1.1))

  def verdicts(self, coefficients):
    found = variance.observations(coefficients)
    return {(o.claim, o.case): o.holds for o in found}

  def test_all_hold(self):
    verdicts = self.verdicts(
      {
        ("logreg", "sgd"): self.HIGH,
        ("mlp4", "sgd"): epochs_of((0.8, 0.8), (0.8, 0.8), (0.7, 0.7)),
        ("logreg", "adamw"): epochs_of(*((0.8, 0.8),) * 3),
        ("mlp4", "adamw"): self.FALLING,
      }
    )
    assert len(verdicts) == 11
    assert all(verdicts.values())

  def test_none_holds(self):
    verdicts = self.verdicts(
      {
        ("logreg", "sgd"): epochs_of(*((0.2, 1.2),) * 3),
        ("mlp4", "sgd"): self.RISING,
        ("logreg", "adamw"): epochs_of(*((0.3, 1.3),) * 3),
        ("mlp4", "adamw"): [
          e._replace(mean=e.mean + 0.1, end=e.end + 0.1) for e in self.RISING
        ],
      }
    )
    assert len(verdicts) == 11
    assert not any(verdicts.values())

  @pytest.mark.parametrize("reverse", [False, True])
  def test_depth_goes_by_the_model(self, reverse):
    """Not by the order in which models are given."""
    items = [(("logreg", "sgd"), self.HIGH), (("mlp4", "sgd"), self.FALLING)]
    verdicts = self.verdicts(dict(items[::-1] if reverse else items))
    assert verdicts["deeper is smaller", "sgd"]

  @pytest.mark.parametrize(
    ("epochs", "holds"),
    [
      (epochs_of(*((0.8, 0.7),) * 3), True),
      (epochs_of((0.8, 0.7), (0.8, 0.95), (0.8, 0.6)), False),
      (epochs_of(*((1.0, 1.0),) * 3), False),
      (epochs_of(*((0.8, 0.7),) * 3, start=0.5), False),
    ],
  )
  def test_saw_tooth(self, epochs, holds):
    (observation,) = variance.observations({("logreg", "sgd"): epochs})
    assert observation.holds is holds

  def test_no_verdict_without_numbers(self):
    nan = epochs_of(*((np.nan, np.nan),) * 3)
    assert set(self.verdicts({("mlp4", "sgd"): nan}).values()) == {None}


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


def test_divergence_is_recorded(tmp_path, monkeypatch):
  monkeypatch.setitem(variance.LEARNING_RATES, "sgd", 1e30)
  monkeypatch.setattr(variance, "METHODS", ("adaptive",))
  args = [
    "--dataset=mnist-5k", "--batch-size=100", "--train-examples=300",
    "--model=mlp2", "--optimizer=sgd", "--epochs=3", "--points=3",
    f"--out={tmp_path}",
  ]  # fmt: skip
  result = CliRunner().invoke(variance.main, args)
  assert result.exit_code == 0, result.output
  text = (tmp_path / "results.json").read_text()
  results = json.loads(text)
  assert results["runs"][0]["points"][-1]["train_loss"] is None
  assert {o["holds"] for o in results["observations"]} == {None}
  assert not (tmp_path / "adamw.png").exists()


def test_out_that_cannot_be_made(tmp_path):
  (tmp_path / "file").touch()
  result = CliRunner().invoke(
    variance.main, ["--dataset=mnist-5k", f"--out={tmp_path}/file/x"]
  )
  assert result.exit_code == 2
  assert result.stderr.count("\n") == 1


def test_too_few_batches():
  result = CliRunner().invoke(
    variance.main, ["--dataset=mnist-5k", "--batch-size=2000"]
  )
  assert result.exit_code == 2
  assert "at least three batches of 4000" in result.stderr
