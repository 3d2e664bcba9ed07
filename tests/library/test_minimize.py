# SPDX-License-Identifier: Apache-2.0
"""Minimising any loss by one call."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import optax_svrg
from optax_svrg import _minimize

RNG = np.random.default_rng(0)
X = RNG.normal(size=(203, 5))
Y = X @ RNG.normal(size=5) + RNG.normal(size=203) + 1
START = {"w": np.zeros(5), "b": np.zeros(())}


def loss(params, batch):
  x, y = batch
  return jnp.mean((x @ params["w"] + params["b"] - y) ** 2) / 2


def logistic(w, batch):
  z = batch["x"] @ w
  return jnp.mean(jnp.logaddexp(0.0, z) - batch["y"] * z) + 5e-3 * jnp.vdot(
    w, w
  )


LOGISTIC = {"x": X, "y": (Y > 0).astype(float)}


def least_squares():
  return np.linalg.lstsq(np.c_[X, np.ones(len(X))], Y)[0]


@pytest.mark.parametrize(
  "method",
  [
    "saga",
    "svrg",
    optax_svrg.alpha_svrg(1.0),
    optax_svrg.adaptive_saga(21),
    optax.chain(optax_svrg.alpha_saga(1.0, 21), optax.trace(0.3)),
  ],
  ids=["saga", "svrg", "alpha_svrg", "adaptive_saga", "momentum"],
)
def test_least_squares(method, x64):
  """203 examples are no multiple of 10: a short batch counts by its size."""
  result = optax_svrg.minimize(
    loss, START, (X, Y), method=method, batch_size=10, tol=1e-9
  )
  want = least_squares()
  np.testing.assert_allclose(result.params["w"], want[:-1], atol=1e-8)
  np.testing.assert_allclose(result.params["b"], want[-1], atol=1e-8)
  assert result.converged
  assert result.gradient_norm <= 1e-9
  points = result.history
  assert [p.num_epochs for p in points] == sorted(p.num_epochs for p in points)
  assert points[-1].num_epochs == result.num_epochs
  assert points[-1].gradient_norm == result.gradient_norm
  exact = jax.grad(loss)(result.params, (jnp.asarray(X), jnp.asarray(Y)))
  norm = optax.tree.norm(exact)
  np.testing.assert_allclose(norm, result.gradient_norm, atol=1e-14)


@pytest.mark.parametrize("num_examples", [1, 7, 8, 203])
@pytest.mark.parametrize("method", ["saga", "svrg"])
def test_any_number_of_examples(num_examples, method, x64):
  data = jax.tree.map(lambda x: x[:num_examples], LOGISTIC)
  result = optax_svrg.minimize(
    logistic, jnp.zeros(5), data, method=method, tol=1e-8, max_epochs=3000
  )
  assert result.converged
  assert jnp.linalg.norm(jax.grad(logistic)(result.params, data)) < 1.1e-8


def test_dtype_and_leaves_without_axes():
  def scaled(w, batch):
    return logistic(w, batch) + batch["shift"] * jnp.sum(w)

  data = {
    "x": X.astype(np.float32),
    "y": LOGISTIC["y"].astype(np.float32),
    "shift": 0.125,
  }
  result = optax_svrg.minimize(scaled, jnp.zeros(5), data, tol=1e-4)
  assert result.converged
  assert result.params.dtype == jnp.float32


class TestProx:
  def test_l1_as_fit_linear(self, x64):
    found = optax_svrg.minimize(
      logistic,
      jnp.zeros(5),
      LOGISTIC,
      prox=optax_svrg.prox_l1(0.05),
      tol=1e-10,
    )
    want = optax_svrg.fit_linear(
      lambda z, y: jnp.logaddexp(0.0, z) - y * z,
      X,
      LOGISTIC["y"],
      l2=1e-2,
      l1=0.05,
      intercept=False,
      tol=1e-10,
    )
    np.testing.assert_allclose(found.params, want.weights, atol=1e-8)
    np.testing.assert_array_equal(found.params == 0, want.weights == 0)
    assert (found.params == 0).any()

  def test_l2_may_be_in_either(self, x64):
    def plain(w, batch):
      return logistic(w, batch) - 5e-3 * jnp.vdot(w, w)

    want = optax_svrg.minimize(logistic, jnp.zeros(5), LOGISTIC, tol=1e-10)
    prox = optax_svrg.prox_elastic_net(0.0, 1e-2)
    found = optax_svrg.minimize(
      plain, jnp.zeros(5), LOGISTIC, prox=prox, tol=1e-10, method="svrg"
    )
    np.testing.assert_allclose(found.params, want.params, atol=1e-8)

  def test_nonnegative_as_scipy(self, x64):
    def residual(w, batch):
      return jnp.mean((batch[0] @ w - batch[1]) ** 2)

    result = optax_svrg.minimize(
      residual,
      jnp.ones(5),
      (X, Y),
      prox=optax_svrg.prox_nonnegative(),
      tol=1e-10,
    )
    want, _ = scipy.optimize.nnls(X, Y)
    np.testing.assert_allclose(result.params, want, atol=1e-9)
    assert (want == 0).any()

  def test_values(self):
    tree = {"a": jnp.array([3.0, -0.5]), "b": jnp.array(-2.0)}
    got = optax_svrg.prox_elastic_net(1.0, 2.0)(tree, 0.5)
    np.testing.assert_allclose(got["a"], [1.25, 0.0])
    np.testing.assert_allclose(got["b"], -0.75)
    assert optax_svrg.prox_l1(0.5) is optax_svrg.prox_l1(0.5)
    with pytest.raises(ValueError, match="l1 must be at least 0, got -1"):
      optax_svrg.prox_l1(-1)
    with pytest.raises(TypeError, match="l2 must be a real number"):
      optax_svrg.prox_elastic_net(0.0, "1")


@pytest.mark.parametrize("factor", [1e-1, 1e-3, 0.0, np.nan])
def test_steps_that_are_too_long_are_undone(factor, monkeypatch, x64):
  estimate = _minimize._smoothness.estimate
  monkeypatch.setattr(
    _minimize._smoothness, "estimate", lambda *args: factor * estimate(*args)
  )

  def exponential(w, batch):  # Overflows after a step that is too long.
    z = batch["x"] @ w
    return jnp.mean(jnp.exp(z) - batch["y"] * z) + 0.05 * jnp.vdot(w, w)

  result = optax_svrg.minimize(
    exponential, jnp.zeros(5), LOGISTIC, tol=1e-8, max_epochs=400
  )
  assert result.converged
  losses = [p.loss for p in result.history]
  if 0 < factor < 0.1:
    assert not losses[1] <= losses[0]


@pytest.mark.slow
def test_never_worse_and_never_nan(x64):
  def wild(w, batch):
    return jnp.mean(jnp.sin(30 * batch["x"] @ w)) + jnp.log1p(jnp.vdot(w, w))

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    result = optax_svrg.minimize(
      wild, jnp.full(5, 0.1), LOGISTIC, max_epochs=12
    )
  assert np.isfinite(result.params).all()
  assert result.gradient_norm <= result.history[0].gradient_norm


@pytest.mark.standard_promotion
@pytest.mark.slow
def test_a_net(x64):
  def net(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)

  rng = np.random.default_rng(1)
  params = {"in": rng.normal(size=(5, 8)), "out": rng.normal(size=8)}
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    result = optax_svrg.minimize(net, params, LOGISTIC, max_epochs=60)
  assert min(p.loss for p in result.history) < 0.2 * result.history[0].loss


@pytest.mark.standard_promotion
def test_complex_parameters():
  rng = np.random.default_rng(0)
  x = (rng.normal(size=(60, 3)) + 1j * rng.normal(size=(60, 3))).astype(
    np.complex64
  )
  want = np.array([1 + 1j, -2.0, 0.5j], np.complex64)
  result = optax_svrg.minimize(
    lambda w, x: jnp.mean(jnp.abs(x @ (w - want)) ** 2),
    jnp.zeros(3, jnp.complex64),
    x,
    tol=1e-4,
  )
  np.testing.assert_allclose(result.params, want, atol=1e-4)


def test_warning_in_one_line(x64):
  with pytest.warns(
    UserWarning, match="did not converge in 2 epochs"
  ) as caught:
    result = optax_svrg.minimize(logistic, jnp.zeros(5), LOGISTIC, max_epochs=2)
  assert not result.converged
  assert result.num_epochs == 2
  assert "\n" not in str(caught[0].message)
  assert "Increase max_epochs" in str(caught[0].message)
  assert caught[0].filename == __file__


def test_rounding_ends_it():
  data = jax.tree.map(lambda x: x.astype(np.float32), LOGISTIC)
  with pytest.warns(UserWarning, match="use double precision"):
    result = optax_svrg.minimize(logistic, jnp.zeros(5), data, tol=1e-12)
  assert result.gradient_norm < 1e-6
  assert result.num_epochs < 500


@pytest.mark.parametrize("package", ["rich", "tqdm"])
def test_progress(package, monkeypatch, capsys, x64):
  pytest.importorskip(package)
  import_module = _minimize.importlib.import_module

  def only(name):
    if not name.startswith(package):
      raise ImportError(name)
    return import_module(name)

  monkeypatch.setattr(_minimize.importlib, "import_module", only)
  optax_svrg.minimize(logistic, jnp.zeros(5), LOGISTIC, progress=True)
  assert "gradient norm" in "".join(capsys.readouterr())


def test_progress_without_either(monkeypatch):
  def refuse(name):
    raise ImportError(name)

  monkeypatch.setattr(_minimize.importlib, "import_module", refuse)
  with pytest.raises(ImportError, match="needs rich or tqdm: pip install rich"):
    optax_svrg.minimize(logistic, jnp.zeros(5), LOGISTIC, progress=True)


def test_programs_serve_again(x64):
  traces = []

  def counted(w, batch):
    traces.append(1)
    return logistic(w, batch)

  counts = []
  for seed in range(2):
    optax_svrg.minimize(
      counted, jnp.zeros(5), LOGISTIC, prox=optax_svrg.prox_l1(0.1), seed=seed
    )
    counts.append(len(traces))
  assert counts[0] == counts[1]


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"loss_fn": 3}, TypeError, "loss_fn must be a function, got 3"),
    ({"prox": 3}, TypeError, "prox must be a function, got 3"),
    ({"params": np.arange(5)}, TypeError, "params must have float or complex"),
    ({"data": {}}, ValueError, "data must have leaves whose leading axis"),
    ({"data": {"x": X, "y": Y[1:]}}, ValueError, "data must have the same num"),
    ({"data": {"x": X[:0], "y": Y[:0]}}, ValueError, "data has no examples"),
    ({"method": "sag"}, ValueError, 'method must be "saga" or "svrg", got \'s'),
    (
      {"method": 1},
      TypeError,
      "method must be .* or a gradient transformation",
    ),
    (
      {"method": optax_svrg.alpha_saga(1.0, 7)},
      ValueError,
      "method must have a table of the 26 batches .* got one of 7",
    ),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"tol": 0}, ValueError, "tol must be positive, got 0"),
    ({"max_epochs": 0}, ValueError, "max_epochs must be at least 1, got 0"),
    ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
    (
      {"params": np.full(5, np.nan)},
      ValueError,
      "loss_fn must have a finite value and gradient at params, got nan",
    ),
  ],
)
def test_bad_input(change, error, message, x64):
  args = {"loss_fn": logistic, "params": jnp.zeros(5), "data": LOGISTIC}
  args |= change
  with pytest.raises(error, match=message) as caught:
    optax_svrg.minimize(
      args.pop("loss_fn"), args.pop("params"), args.pop("data"), **args
    )
  assert "\n" not in str(caught.value)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax_svrg
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
rng = np.random.default_rng(0)
x = rng.normal(size=(200, 5)).astype(np.float32)
y = (x[:, 0] > 0).astype(np.float32)
def loss(w, batch):
  z = batch[0] @ w
  return jnp.mean(jnp.logaddexp(0.0, z) - batch[1] * z) + 0.05 * jnp.vdot(w, w)
want = optax_svrg.minimize(loss, jnp.zeros(5), (x, y), tol=1e-5)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
data = jax.device_put((x, y), NamedSharding(mesh, P("data")))
for method in ("saga", "svrg"):
  got = optax_svrg.minimize(
    loss, jnp.zeros(5), data, tol=1e-5, method=method, batch_size=30)
  assert got.converged
  np.testing.assert_allclose(got.params, want.params, atol=1e-3)
  assert len(got.params.sharding.device_set) == 4
"""


@pytest.mark.slow
def test_sharded_data():
  subprocess.run(
    [sys.executable, "-c", SHARDED],
    check=True,
    timeout=300,
    env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
  )
