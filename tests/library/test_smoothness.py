# SPDX-License-Identifier: Apache-2.0
"""The curvature of mini-batch losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_svrg
from tests import helpers


def make_batches(num_batches=3, size=6, num_features=4, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(num_batches, size, num_features)), dtype)


def loss(params, x):
  z = x[:, :3] @ params["w"] + x[:, 3] * params["b"]
  return jnp.mean(jnp.logaddexp(0.0, z))


GRAD = jax.grad(loss)


def make_params(dtype=jnp.float32):
  return {"w": jnp.array([0.3, -0.2, 0.5], dtype), "b": jnp.array(0.1, dtype)}


@jax.jit
def hessian(params, x):
  flat, unravel = jax.flatten_util.ravel_pytree(params)
  return jax.hessian(lambda f: loss(unravel(f), x))(flat)


def eigenvalue(params, x):
  """By all second derivatives."""
  return np.abs(np.linalg.eigvalsh(hessian(params, x))).max()


def test_largest_eigenvalue_of_any_batch():
  """Few iterations are nearly enough, and none are too many."""
  batches, params = make_batches(), make_params()
  want = max(eigenvalue(params, x) for x in batches)
  estimates = [
    optax_svrg.smoothness(GRAD, params, batches, num_iters=n)
    for n in (1, 10, 30)
  ]
  assert estimates == sorted(estimates)
  assert estimates[2].dtype == jnp.float32
  np.testing.assert_allclose(estimates[2], want, rtol=1e-5)
  assert 0.9 * want < estimates[1] <= estimates[2] < (1 + 1e-6) * want


@pytest.mark.slow
def test_larger_batches_are_smoother():
  params = make_params()
  small = make_batches(12, 1)
  large = small.reshape(2, 6, 4)
  assert optax_svrg.smoothness(GRAD, params, small) > optax_svrg.smoothness(
    GRAD, params, large
  )


def test_under_jit_and_from_a_stream():
  batches, params = make_batches(), make_params()
  want = optax_svrg.smoothness(GRAD, params, batches)
  jitted = jax.jit(lambda p, b: optax_svrg.smoothness(GRAD, p, b))
  np.testing.assert_allclose(jitted(params, tuple(batches)), want, rtol=1e-6)
  streamed = optax_svrg.smoothness(GRAD, params, (x for x in batches))
  assert streamed == want


def test_what_a_partial_holds_is_an_argument():
  def scaled(scale, params, x):
    return jax.tree.map(lambda g: scale * g, GRAD(params, x))

  batches, params = make_batches(), make_params()
  want = optax_svrg.smoothness(GRAD, params, batches)
  for scale in (2.0, 3.0):
    fn = jax.tree_util.Partial(scaled, jnp.float32(scale))
    got = optax_svrg.smoothness(fn, params, batches)
    np.testing.assert_allclose(got, scale * want, rtol=1e-5)


def test_double_and_half_precision(x64):
  batches = make_batches(dtype=jnp.float64)
  params = make_params(jnp.float64)
  got = optax_svrg.smoothness(GRAD, params, batches, num_iters=200)
  assert got.dtype == jnp.float64
  want = max(eigenvalue(params, x) for x in batches)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  half = optax_svrg.smoothness(
    jax.grad(lambda p, x: jnp.sum(p**2) * jnp.mean(x)),
    jnp.ones(3, jnp.bfloat16),
    jnp.ones((1, 4), jnp.bfloat16),
  )
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, 2.0, rtol=2e-2)


def test_complex_parameters():
  """An optimizer needs the conjugate of what jax.grad returns."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(
    rng.normal(size=(1, 8, 3)) + 1j * rng.normal(size=(1, 8, 3)), jnp.complex64
  )

  def grad_fn(w, x):
    return jax.grad(lambda w: 0.5 * jnp.mean(jnp.abs(x @ w - 1) ** 2))(w).conj()

  w = jnp.ones(3, jnp.complex64)
  got = optax_svrg.smoothness(grad_fn, w, x, num_iters=200)
  assert got.dtype == jnp.float32
  want = np.linalg.eigvalsh(x[0].conj().T @ x[0] / 8).max()
  np.testing.assert_allclose(got, want, rtol=1e-5)


def quadratic(eigenvalues):
  """The gradient of a quadratic function, whatever the batch is."""

  def grad_fn(params, batch):
    return jnp.asarray(eigenvalues, params.dtype) * params

  return grad_fn


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_as_many_iterations_as_distinct_eigenvalues_are_exact(distinct):
  """And one fewer are not."""
  values = np.repeat(2.0 ** -np.arange(distinct), 4)
  measure = lambda num_iters: optax_svrg.smoothness(
    quadratic(values), jnp.ones(values.size), [jnp.ones(1)], num_iters=num_iters
  )
  np.testing.assert_allclose(measure(distinct), 1, rtol=1e-5)
  if distinct > 1:
    assert measure(distinct - 1) < 1 - 1e-3


def test_one_large_eigenvalue_among_a_million():
  """Power iterations take 1.03 for it, a step three times too long."""
  grad_fn = lambda w, batch: w.at[0].multiply(3.0)
  got = optax_svrg.smoothness(
    grad_fn, jnp.ones(10**6), [jnp.ones(1)], num_iters=10
  )
  np.testing.assert_allclose(got, 3, rtol=1e-2)


@pytest.mark.parametrize(
  ("dtype", "exponents"),
  [
    (jnp.float32, [-37, -20, 20, 37]),
    (jnp.bfloat16, [-30, 30]),
    (jnp.float64, [-300, 300]),
    helpers.slow(jnp.float32, [-30, 30]),
    helpers.slow(jnp.complex64, [-30, 30]),
    helpers.slow(jnp.float16, [-4, 3]),
    helpers.slow(jnp.float64, [-160, 160]),
  ],
)
def test_over_the_whole_range_of_the_dtype(dtype, exponents):
  values = np.array([1.0, 0.5, 0.25])
  rtol = 2e-2 if jnp.finfo(dtype).bits == 16 else 1e-5
  with jax.enable_x64(dtype == jnp.float64):
    scaled = lambda scale, params, batch: scale * params
    for exponent in exponents:
      # An argument of one program.
      scale = jnp.asarray(values * 10.0**exponent, dtype)
      grad_fn = jax.tree_util.Partial(scaled, scale)
      got = optax_svrg.smoothness(grad_fn, jnp.ones(3, dtype), [jnp.ones(1)])
      assert jnp.isrealobj(got)
      np.testing.assert_allclose(got, 10.0**exponent, rtol=rtol)


def test_a_feature_of_unix_milliseconds():
  rng = np.random.default_rng(0)
  x = jnp.asarray(
    np.stack([1.7e12 + 1e9 * rng.normal(size=20), rng.normal(size=20)], 1),
    jnp.float32,
  )
  grad = jax.grad(lambda w, x: 0.5 * jnp.mean((x @ w - 1) ** 2))
  got = optax_svrg.smoothness(grad, jnp.zeros(2), [x])
  wide = np.asarray(x, float)
  want = np.linalg.eigvalsh(wide.T @ wide / 20).max()
  np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
  "loss",
  [
    lambda w, x: jnp.mean(jnp.maximum(0, 1 - x @ w)),
    lambda w, x: jnp.mean(jnp.abs(x @ w - 1)),
    lambda w, x: jnp.mean(jax.nn.relu(x @ w - 1e6)),
  ],
)
def test_losses_without_curvature(loss):
  """No step size follows, least of all an infinite one."""
  x, w = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
  with pytest.raises(ValueError, match="no curvature at params"):
    optax_svrg.smoothness(jax.grad(loss), w, [x])


def test_no_curvature_and_not_finite():
  x, w = jnp.ones((2, 3)), jnp.ones(3)
  linear = jax.grad(lambda w, x: jnp.vdot(w, x))
  with pytest.raises(ValueError, match="no curvature at params"):
    optax_svrg.smoothness(linear, w, x)
  assert jnp.isnan(jax.jit(lambda x: optax_svrg.smoothness(linear, w, x))(x))
  bad = jax.grad(lambda w, x: jnp.sum(w**2) * jnp.mean(x))
  got = optax_svrg.smoothness(bad, w, x.at[0].set(jnp.nan))
  assert not jnp.isfinite(got)


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"grad_fn": 3}, TypeError, "grad_fn must be a function, got 3"),
    ({"params": jnp.arange(3)}, TypeError, "params must have float or complex"),
    ({"batches": {"x": 1}}, TypeError, "batches"),
    ({"batches": []}, ValueError, "batches must hold at least one batch"),
    ({"batches": [jnp.ones((0, 3))]}, ValueError, r"batches\[0\]"),
    ({"num_iters": 0}, ValueError, "num_iters must be at least 1, got 0"),
    ({"num_iters": 2.5}, TypeError, "num_iters must be an integer, got 2.5"),
    (
      {"grad_fn": lambda w, x: w[:2]},
      ValueError,
      "the result of grad_fn",
    ),
  ],
)
def test_bad_arguments(change, error, message):
  args = {
    "grad_fn": jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)),
    "params": jnp.ones(3),
    "batches": [jnp.ones((2, 3))],
    "num_iters": 5,
  } | change
  with pytest.raises(error, match=message):
    optax_svrg.smoothness(
      args["grad_fn"],
      args["params"],
      args["batches"],
      num_iters=args["num_iters"],
    )
