# SPDX-License-Identifier: Apache-2.0
"""The study of gradient variance, and the observer that measures it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import methods
from benchmarks.data import arrays
from benchmarks.harness import observers
from benchmarks.harness.array_feed import ArrayFeed
from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.trainer import Trainer
from benchmarks.methods import coefficients
from benchmarks.studies import variance
import optax_svrg

pytestmark = pytest.mark.standard_promotion

EXPERIMENT = Experiment(
  dataset="mnist-5k",
  model="logreg",
  method="plain",
  optimizer="sgd",
  epochs=3,
  batch_size=1000,
  lr=0.1,
  train_examples=4000,
  validation_examples=100,
  schedule="constant",
  measure={"variance": {"points": 4}},
)


@pytest.fixture(scope="module")
def dataset():
  return arrays.load("mnist-5k", None)


@pytest.fixture(scope="module")
def measured(dataset):
  """Makes the measurements of a training of logistic regression."""
  trainer = Trainer(EXPERIMENT, dataset)
  cache = {}

  def make(method):
    if method not in cache:
      run = Run(EXPERIMENT.replace(method=method))
      trainer.fit(run)
      cache[method] = run.measured["variance"]
    return cache[method]

  return make


@pytest.fixture(scope="module")
def frozen(dataset):
  """Measures at weights near those of a snapshot; with all it depends on."""
  feed = ArrayFeed(EXPERIMENT, dataset)

  def measure(name):
    method = methods.make(name, feed.context(EXPERIMENT))
    program = feed.program(EXPERIMENT, method)
    params = feed.init(jax.random.key(0))
    state, epoch = program.begin(program.init(params), 0, 0, True)
    batches = program.batches(epoch)
    shifted = jax.tree.map(lambda p: p + 0.01, params)
    values, _ = jax.jit(
      lambda params, state: observers._variance(
        feed.loss, method, params, state, batches
      )
    )(shifted, state.opt_state[0])
    return values, params, shifted, batches

  return measure


def test_at_the_snapshot(measured):
  """Both gradients are the same there: nothing is left to vary."""
  points = measured("adaptive")
  starts = [i for i, epoch in enumerate(points["epoch"]) if epoch % 1 == 0]
  assert len(starts) == 3
  assert len(points["epoch"]) == 12
  for i in starts:
    assert points["alpha"][i] == 1
    assert points["optimal_component"][i] == pytest.approx(1, abs=1e-5)
    assert points["optimal_tree"][i] == pytest.approx(1, abs=1e-5)
    assert points["variance_ratio"][i] < 1e-9
  later = set(range(12)) - set(starts)
  assert all(0 < points["optimal_tree"][i] < 1 for i in later)
  assert all(0 <= points["alpha"][i] <= 1 for i in later)


@pytest.mark.slow
def test_the_best_coefficient_leaves_the_least_variance(measured, frozen):
  """SVRG and the best coefficients at the same weights."""
  ratios = {
    name: frozen(name)[0]["variance_ratio"] for name in ("svrg", "optimal")
  }
  assert 0 < ratios["optimal"] < ratios["svrg"] < 1
  # In training, the coefficients are set.
  alphas = measured("optimal")["alpha"]
  assert alphas[0] == pytest.approx(1, abs=1e-5)
  assert all(0 < alpha < 1 for alpha in alphas[1:4])
  ratios = measured("optimal")["variance_ratio"]
  assert all(0 < ratio < 1 for ratio in ratios[1:4])


@pytest.mark.slow
def test_against_numpy(frozen):
  """Gradients of all batches by hand."""
  got, params, shifted, batches = frozen("svrg")

  def gradients(params):
    grads = []
    kernel, bias = (
      np.asarray(params["mlp"]["layers"][0][name], float)
      for name in ("kernel", "bias")
    )
    for x, y in zip(batches.images, batches.labels, strict=True):
      x, y = np.asarray(x, float), np.asarray(y)
      logits = x @ kernel + bias
      p = np.exp(logits - logits.max(axis=1, keepdims=True))
      p /= p.sum(axis=1, keepdims=True)
      error = (p - np.eye(10)[y]) / len(y)
      grads.append(np.concatenate([error.sum(axis=0), (x.T @ error).ravel()]))
    return np.stack(grads)

  g, s = gradients(shifted), gradients(params)
  left = g - (s - s.mean(axis=0))
  want = left.var(axis=0).sum()
  assert got["total_variance"] == pytest.approx(want, rel=1e-3)
  assert got["variance_ratio"] == pytest.approx(
    want / g.var(axis=0).sum(), rel=1e-3
  )
  covariance = np.mean((g - g.mean(axis=0)) * (s - s.mean(axis=0)), axis=0)
  best = covariance.sum() / s.var(axis=0).sum()
  assert got["optimal_tree"] == pytest.approx(best, rel=1e-3)
  singular = np.linalg.svd(left - left.mean(axis=0), compute_uv=False)
  assert got["spectral_norm"] == pytest.approx(
    singular[0] ** 2 / len(left), rel=1e-3
  )


def test_plain(measured):
  points = measured("plain")
  assert set(points["alpha"]) == {0}
  assert set(points["variance_ratio"]) == {1}
  assert np.isnan(points["optimal_tree"]).all()
  assert np.isnan(points["estimated_ratio"]).all()
  assert points["train_loss"][-1] < points["train_loss"][0]


def test_measuring_changes_nothing(dataset):
  runs = [
    Run(EXPERIMENT.replace(method="adaptive", measure=measure))
    for measure in ({}, EXPERIMENT.measure)
  ]
  for run in runs:
    Trainer(run.experiment, dataset).fit(run)
  plain, observed = (
    [point._replace(seconds=0.0) for point in run.history] for run in runs
  )
  assert plain == observed


def test_coefficients_that_are_set_from_outside():
  tx = coefficients.optimal_svrg()
  params = {"w": jnp.array([1.0, 2.0, 3.0])}
  state = tx.init(params)
  state = optax_svrg.take_snapshot(state, params, lambda p: {"w": p["w"] / 2})
  state = state._replace(alphas={"w": jnp.array([1.0, 0.5, jnp.nan])})
  grads = {"w": jnp.array([5.0, 5.0, 5.0])}
  updates, state = tx.update(grads, state, params, grad_fn=lambda p: p)
  np.testing.assert_allclose(updates["w"], [4.5, 4.5, 5.0])
  # Without the component that has none.
  assert optax.tree.get(state, "alpha") == 0.75


def test_means_by_epoch():
  points = {
    "epoch": np.array([0.0, 0.5, 0.9, 1.0, 1.5, 1.9]),
    "alpha": np.array([1.0, 0.8, 0.4, 1.0, 0.5, 0.3]),
  }
  got = variance.by_epoch(points, "alpha")
  assert got == [pytest.approx((0.6, 0.4)), pytest.approx((0.4, 0.3))]


def test_command(call, tmp_path, monkeypatch):
  # Each of them compiles measurements of its own.
  monkeypatch.setattr(variance, "METHODS", ("plain", "adaptive"))
  result = call(
    *("variance", "--dataset=mnist-5k", "--train-examples=96"),
    *("--batch-size=32", "--epochs=3", "--points=3", "--model=logreg"),
    *("--optimizer=adamw", f"--out={tmp_path}"),
  )
  assert result.exit_code == 0, result.output
  assert "| epoch | logreg adamw | paper |" in result.stdout
  (row,) = (
    line for line in result.stdout.splitlines() if "total variance" in line
  )
  assert len(row.split("|")) == 2 + 2 + len(variance.METHODS)
  saved = [json.loads(p.read_text()) for p in tmp_path.glob("*.json")]
  assert {s["experiment"]["method"] for s in saved} == set(variance.METHODS)
  found = variance.results(map(Run.from_json, saved))
  panels = variance.figure(found).panels
  assert [panel.title for panel in panels] == ["logreg, adamw"]
