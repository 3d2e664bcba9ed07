# SPDX-License-Identifier: Apache-2.0
"""Linear models by one call, against scikit-learn and closed forms."""

import warnings

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import linear_model

import optax_svrg
from optax_svrg import _linear, _linear_data

# Losses of Optax, and of users.
pytestmark = pytest.mark.standard_promotion

SOFTMAX = optax.losses.softmax_cross_entropy_with_integer_labels
BINARY = optax.losses.sigmoid_binary_cross_entropy
SQUARED = optax.losses.squared_error
HUBER = optax.losses.huber_loss


def poisson(outputs, targets):
  return jnp.exp(outputs) - targets * outputs


def make(num_examples=203, num_features=9, seed=0):
  """Features of several scales with zeros, and targets for each loss."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(num_examples, num_features))
  x[:, 2] *= 5
  x[rng.random(x.shape) < 0.3] = 0
  z = x @ rng.normal(size=(num_features, 3))
  targets = {
    BINARY: (z[:, 0] + rng.logistic(size=len(x)) > 0).astype(int),
    SOFTMAX: np.argmax(z + rng.gumbel(size=z.shape), axis=1),
    SQUARED: z[:, 0] + 3 + rng.normal(size=len(x)),
    HUBER: z[:, 0] + 3 + rng.standard_t(2, size=len(x)),
    poisson: rng.poisson(np.exp(z[:, 0] / 8 + 0.5)),
  }
  weights = rng.integers(0, 4, size=len(x)).astype(float)
  return x, targets, weights


X, TARGETS, WEIGHTS = make()


def objective(loss, x, y, w, b, l2=0.0, l1=0.0, weights=None):
  w, b = jnp.asarray(w), jnp.asarray(b)
  losses = loss(x @ w + b, jnp.asarray(y))
  return float(
    jnp.average(losses, weights=weights)
    + l2 / 2 * jnp.sum(w**2)
    + l1 * jnp.sum(jnp.abs(w))
  )


def by_scikit_learn(loss, strength, l1_ratio, intercept, weights):
  """Coefficients ``(d, k)`` and intercepts ``(k,)``."""
  size = len(X) if weights is None else weights.sum()
  if loss in (BINARY, SOFTMAX):
    model = linear_model.LogisticRegression(
      C=1 / (strength * size),
      l1_ratio=l1_ratio,
      solver="saga" if l1_ratio else "newton-cholesky",
      tol=1e-12,
      max_iter=20_000,
      fit_intercept=intercept,
    )
  elif loss is poisson:
    model = linear_model.PoissonRegressor(
      alpha=strength,
      solver="newton-cholesky",
      tol=1e-12,
      fit_intercept=intercept,
    )
  elif l1_ratio:
    model = linear_model.ElasticNet(
      alpha=strength / 2,
      l1_ratio=l1_ratio,
      tol=1e-14,
      max_iter=100_000,
      fit_intercept=intercept,
    )
  else:
    model = linear_model.Ridge(
      alpha=strength / 2 * size, solver="cholesky", fit_intercept=intercept
    )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model.fit(X, TARGETS[loss], sample_weight=weights)
  w, b = np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_)
  return w, b - b.mean() if loss is SOFTMAX else b


def check_same_optimum(loss, l1_ratio, intercept, weighted):
  strength, weights = 1e-2, WEIGHTS if weighted else None
  fit = optax_svrg.fit_linear(
    loss,
    X,
    TARGETS[loss],
    l2=strength * (1 - l1_ratio),
    l1=strength * l1_ratio,
    intercept=intercept,
    sample_weight=weights,
    tol=1e-11,
  )
  w, b = by_scikit_learn(loss, strength, l1_ratio, intercept, weights)
  got = np.asarray(fit.weights).reshape(w.shape)
  np.testing.assert_allclose(got, w, rtol=0, atol=1e-8)
  np.testing.assert_allclose(np.atleast_1d(fit.intercept), b, atol=1e-8)
  np.testing.assert_array_equal(got == 0, w == 0)
  assert fit.converged


CASES = [
  (loss, ratio) for loss in (BINARY, SOFTMAX, SQUARED) for ratio in (0, 0.5, 1)
] + [(poisson, 0)]


@pytest.mark.parametrize(
  ("loss", "l1_ratio", "intercept", "weighted"),
  [
    (BINARY, 0, True, True),
    (BINARY, 1, False, False),
    (SOFTMAX, 0, True, False),
    (SOFTMAX, 0.5, True, True),
    (SQUARED, 0, True, True),
    (SQUARED, 1, True, False),
    (poisson, 0, True, False),
  ],
)
def test_same_optimum(loss, l1_ratio, intercept, weighted, x64):
  check_same_optimum(loss, l1_ratio, intercept, weighted)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("loss", "l1_ratio"), CASES)
def test_same_optimum_in_all_cases(loss, l1_ratio, intercept, weighted, x64):
  check_same_optimum(loss, l1_ratio, intercept, weighted)


@pytest.mark.parametrize("loss", [BINARY, SOFTMAX, SQUARED, HUBER, poisson])
def test_weights_are_repetitions(loss, x64):
  repeated = np.repeat(np.arange(len(X)), WEIGHTS.astype(int))
  y = TARGETS[loss]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Rounding does not allow 1e-16.
    weighted = optax_svrg.fit_linear(
      loss, X, y, l2=1.0, sample_weight=WEIGHTS, tol=1e-16
    )
    plain = optax_svrg.fit_linear(
      loss, X[repeated], y[repeated], l2=1.0, tol=1e-16
    )
  for got, want in zip(weighted[:2], plain[:2], strict=True):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=7e-16 * max(1, scale))


@pytest.mark.parametrize("l1", [0, 1e-2])
def test_sparse_features_stay_sparse(l1, x64, monkeypatch):
  x = sparse.BCOO.fromdense(jnp.asarray(X), nse=np.count_nonzero(X) + 5)
  want = optax_svrg.fit_linear(SOFTMAX, X, TARGETS[SOFTMAX], l2=1e-2, l1=l1)

  def refuse(*args):
    raise AssertionError("made dense")

  monkeypatch.setattr(sparse.BCOO, "todense", refuse)
  monkeypatch.setattr(sparse.bcoo, "bcoo_todense", refuse)
  fit = optax_svrg.fit_linear(SOFTMAX, x, TARGETS[SOFTMAX], l2=1e-2, l1=l1)
  np.testing.assert_allclose(fit.weights, want.weights, atol=1e-4)
  assert fit.converged
  assert fit.gap < 1e-10


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("l1", [0, 1e-2])
@pytest.mark.parametrize("loss", [BINARY, SOFTMAX, SQUARED, HUBER, poisson])
def test_the_gap_is_a_bound(loss, l1, intercept, x64):
  y, l2 = TARGETS[loss], 1e-2
  options = {"l2": l2, "l1": l1, "intercept": intercept}
  best = optax_svrg.fit_linear(loss, X, y, tol=1e-10, **options)
  minimum = objective(loss, X, y, *best[:2], l2, l1)
  assert best.gap < 1e-16
  for max_epochs in (1, 4, 10, 15):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      fit = optax_svrg.fit_linear(
        loss, X, y, tol=1e-10, max_epochs=max_epochs, **options
      )
    if fit.converged:
      break
    value = objective(loss, X, y, *fit[:2], l2, l1)
    assert minimum < value <= minimum + fit.gap
    assert fit.gap < 1e5


def test_no_bound_without_l2(x64):
  fit = optax_svrg.fit_linear(SQUARED, X, TARGETS[SQUARED], tol=1e-10)
  assert fit.gap == np.inf
  want = np.linalg.lstsq(np.c_[X, np.ones(len(X))], TARGETS[SQUARED])[0]
  np.testing.assert_allclose(fit.weights, want[:-1], atol=1e-8)
  np.testing.assert_allclose(fit.intercept, want[-1], atol=1e-8)


@pytest.mark.parametrize("method", ["saga", "newton"])
def test_either_method_alone_arrives(method, monkeypatch, x64):
  """SAGA as far as float32 resolves."""
  other = {"saga": "newton", "newton": "saga"}[method]
  monkeypatch.setattr(
    _linear._Solver, other, lambda self: pytest.fail(f"{other} was used")
  )
  rates = {"saga": {}, "newton": {"saga": -1.0, "newton": 1.0}}[method]
  monkeypatch.setattr(_linear, "_NEWTON_RATE", -np.inf)
  init = _linear._Solver.__init__

  def changed(self, *args):
    init(self, *args)
    self.rates |= rates

  monkeypatch.setattr(_linear._Solver, "__init__", changed)
  fit = optax_svrg.fit_linear(
    SOFTMAX,
    X,
    TARGETS[SOFTMAX],
    l2=0.1,
    tol=1e-5 if method == "saga" else 1e-10,
  )
  assert fit.converged


@pytest.mark.parametrize("exponent", [3, 8])
@pytest.mark.parametrize("loss", [BINARY, SQUARED])
def test_wild_scales_converge_or_name_standardisation(loss, exponent, x64):
  rng = np.random.default_rng(0)
  x = X * 10 ** rng.uniform(-exponent / 2, exponent / 2, X.shape[1])
  for l2 in (1e-3, 0.0):
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      fit = optax_svrg.fit_linear(loss, x, TARGETS[loss], l2=l2)
    assert fit.converged == (not caught)
    for warning in caught:
      assert "Standardise the features" in str(warning.message)
      assert "\n" not in str(warning.message)
      assert warning.filename == __file__
    if exponent == 3 and l2:
      assert fit.converged


@pytest.mark.parametrize(
  ("loss", "x", "y"),
  [
    (HUBER, X, 1e4 + 100 * X[:, 0]),  # Starts in the tails.
    (SQUARED, X, 1e6 + X[:, 0]),
    (poisson, X, np.round(1e3 * np.exp(X[:, 0] / 4))),
    (BINARY, np.c_[X, np.ones(len(X)), np.zeros(len(X))], TARGETS[BINARY]),
    (SOFTMAX, X[:7, :].repeat(9, axis=1), np.arange(7) % 3),
    (BINARY, X[:2, :1] + [[0.0], [1.0]], np.array([0, 1])),
  ],
  ids=["tails", "offset", "counts", "constant", "wide", "two examples"],
)
def test_hard_cases(loss, x, y, x64):
  fit = optax_svrg.fit_linear(loss, x, y, l2=1e-3)
  assert fit.converged
  assert fit.gap < 1e-8


@pytest.mark.parametrize("loss", [BINARY, SOFTMAX, SQUARED])
def test_means_of_features_cost_nothing(loss, x64):
  """The intercept is optimised apart, and dense features are centred."""
  fits = [
    optax_svrg.fit_linear(loss, X + shift, TARGETS[loss], l2=1e-2, tol=1e-8)
    for shift in (0.0, 1e3)
  ]
  assert fits[1].num_epochs < 1.5 * fits[0].num_epochs
  np.testing.assert_allclose(fits[0].weights, fits[1].weights, atol=1e-6)
  np.testing.assert_allclose(
    fits[0].intercept,
    fits[1].intercept + 1e3 * fits[1].weights.sum(axis=0),
    atol=1e-3,
  )


def test_separable_classes_without_regularisation(x64):
  fit = optax_svrg.fit_linear(BINARY, X, (X[:, 0] > 0).astype(int))
  assert fit.converged
  assert np.isfinite(fit.weights).all()


def test_dtypes():
  y = TARGETS[SOFTMAX]
  fit = optax_svrg.fit_linear(SOFTMAX, X.astype(np.float32), y, l2=1e-2)
  assert fit.weights.dtype == fit.intercept.dtype == jnp.float32
  assert fit.weights.shape == (9, 3)
  assert fit.intercept.shape == (3,)
  assert fit.converged
  # Without x64, JAX has no double precision.
  assert optax_svrg.fit_linear(SOFTMAX, X, y, l2=1).weights.dtype == jnp.float32
  half = optax_svrg.fit_linear(
    SOFTMAX, jnp.asarray(X, jnp.bfloat16), y, l2=1e-2
  )
  assert half.weights.dtype == jnp.float32
  np.testing.assert_allclose(half.weights, fit.weights, atol=0.1)
  with jax.enable_x64(True):
    double = optax_svrg.fit_linear(SOFTMAX, X, y, l2=1e-2)
    single = optax_svrg.fit_linear(SOFTMAX, X.astype(np.float32), y, l2=1e-2)
  assert double.weights.dtype == jnp.float64
  assert single.weights.dtype == jnp.float32
  np.testing.assert_allclose(single.weights, double.weights, atol=1e-3)


@pytest.mark.parametrize(
  ("loss", "y", "num_outputs", "shape"),
  [
    (BINARY, TARGETS[BINARY], None, (9,)),
    (BINARY, TARGETS[BINARY] > 0, None, (9,)),
    (BINARY, TARGETS[BINARY] / 3, 1, (9,)),
    (BINARY, np.eye(3)[TARGETS[SOFTMAX]], None, (9, 3)),
    (SOFTMAX, TARGETS[SOFTMAX], None, (9, 3)),
    (SOFTMAX, TARGETS[SOFTMAX], 4, (9, 4)),
    (
      optax.losses.softmax_cross_entropy,
      np.eye(3)[TARGETS[SOFTMAX]],
      None,
      (9, 3),
    ),
    (lambda z, y: SOFTMAX(z, y), TARGETS[SOFTMAX], None, (9, 3)),
    (SQUARED, X[:, :2], 2, (9, 2)),
  ],
)
def test_number_of_outputs(loss, y, num_outputs, shape):
  fit = optax_svrg.fit_linear(loss, X, y, num_outputs=num_outputs, l2=0.1)
  assert fit.weights.shape == shape
  assert fit.intercept.shape == shape[1:]
  assert fit.converged


def test_a_loss_by_hand_has_the_same_optimum(x64):
  y = TARGETS[SOFTMAX]
  ours, given = (
    optax_svrg.fit_linear(loss, X, y, l2=1e-2, tol=1e-10)
    for loss in (SOFTMAX, lambda z, y: SOFTMAX(z, y))
  )
  np.testing.assert_allclose(ours.weights, given.weights, atol=1e-8)


def test_seeds(x64):
  y = TARGETS[BINARY]
  fits = [
    optax_svrg.fit_linear(BINARY, X, y, l2=1e-3, tol=1e-4, seed=seed)
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(fits[0].weights, fits[1].weights)
  assert (fits[0].weights != fits[2].weights).any()


def test_programs_serve_again(x64):
  """A fold of about the size, or another l2, is compiled for already."""
  traces = []

  def squares(outputs, targets):
    traces.append(1)
    return (outputs - targets) ** 2

  optax_svrg.fit_linear(squares, X, TARGETS[BINARY], l2=1e-3, tol=1e-4)
  count = len(traces)
  optax_svrg.fit_linear(squares, X[:-2], TARGETS[BINARY][:-2], l2=1e-2, l1=1e-3)
  # The checks of the arguments evaluate it once.
  assert len(traces) <= count + 1


@pytest.mark.parametrize("batch_size", [1, 10, 500])
def test_batch_sizes(batch_size, x64):
  fit = optax_svrg.fit_linear(
    BINARY, X, TARGETS[BINARY], l2=1e-2, batch_size=batch_size, tol=1e-9
  )
  want = optax_svrg.fit_linear(BINARY, X, TARGETS[BINARY], l2=1e-2, tol=1e-9)
  np.testing.assert_allclose(fit.weights, want.weights, atol=1e-6)


def test_warning_and_progress(capsys, x64):
  with pytest.warns(UserWarning) as caught:  # noqa: PT030
    fit = optax_svrg.fit_linear(
      BINARY, X, TARGETS[BINARY], max_epochs=6, progress=True
    )
  assert not fit.converged
  assert str(caught[0].message).startswith(
    f"fit_linear did not converge in {fit.num_epochs} epochs: gradient norm"
  )
  assert "Increase max_epochs" in str(caught[0].message)
  assert "gradient norm" in "".join(capsys.readouterr())


def replaced(index, value):
  x = X.copy()
  x[index] = value
  return x


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    ({"x": replaced((3, 1), np.nan)}, ValueError, r"features .* nan at \[3, 1"),
    ({"x": replaced((0, 0), np.inf)}, ValueError, r"features .* got inf at"),
    (
      {"x": X.astype(int)},
      TypeError,
      "features must have a float dtype, got i",
    ),
    ({"x": X[:, 0]}, ValueError, r"features must have the shape .*\(203,\)"),
    ({"x": X[:0], "y": []}, ValueError, r"features .* at least one of each"),
    ({"x": X[1:]}, ValueError, r"targets must have the shape \(202,\) or"),
    ({"y": np.full(203, 1)}, ValueError, "targets must have two classes"),
    ({"y": np.full(203, 2), "loss": SOFTMAX}, ValueError, "got only 2"),
    (
      {"y": np.arange(203) - 1},
      ValueError,
      r"targets must be in \[0, 1\], got",
    ),
    (
      {"loss": SOFTMAX, "num_outputs": 2, "y": np.arange(203) % 3},
      ValueError,
      r"targets must be in \[0, 1\], got 2",
    ),
    (
      {"loss": SOFTMAX, "y": np.arange(203) - 1},
      ValueError,
      r"targets must be in \[0, 201\], got -1",
    ),
    ({"loss": SOFTMAX, "y": X[:, 0]}, TypeError, "targets must be integer lab"),
    ({"y": np.full(203, np.nan)}, ValueError, r"targets must be finite, got n"),
    ({"y": np.array(["a"] * 203)}, TypeError, "targets must be numbers"),
    ({"l2": -1.0}, ValueError, "l2 must be at least 0, got -1.0"),
    ({"l1": np.nan}, ValueError, "l1 must be finite, got nan"),
    ({"l2": "1"}, TypeError, "l2 must be a real number, got '1'"),
    ({"tol": 0}, ValueError, "tol must be positive, got 0"),
    ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ({"max_epochs": 1.5}, TypeError, "max_epochs must be an integer, got 1.5"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"num_outputs": 0}, ValueError, "num_outputs must be at least 1, got 0"),
    (
      {"y": X[:, :2], "num_outputs": 3},
      ValueError,
      "num_outputs=3 must be the number of columns of targets, 2",
    ),
    ({"loss": 3}, TypeError, "loss must be a function, got 3"),
    (
      {"loss": lambda z, y: jnp.mean(z - y)},
      ValueError,
      r"must return losses of examples, of shape \(203,\)",
    ),
    ({"sample_weight": [1.0]}, ValueError, r"sample_weight .* \(203,\)"),
    (
      {"sample_weight": np.full(203, -1)},
      ValueError,
      "sample_weight must be at least 0, and not all 0, got -1.0 to -1.0",
    ),
  ],
)
def test_bad_input(change, error, message, monkeypatch):
  monkeypatch.setattr(
    _linear_data, "arrange", lambda *args: pytest.fail("something was computed")
  )
  args = {"loss": BINARY, "x": X, "y": TARGETS[BINARY]} | change
  with pytest.raises(error, match=message) as caught:
    optax_svrg.fit_linear(
      args.pop("loss"), args.pop("x"), args.pop("y"), **args
    )
  assert "\n" not in str(caught.value)


def test_a_loss_that_is_not_finite():
  with pytest.raises(ValueError, match="loss must be finite at zero weights"):
    optax_svrg.fit_linear(lambda z, y: -jnp.log(z) * y, X, X[:, 0])


def test_not_batched_sparse_features():
  data, index = np.ones((203, 1)), np.zeros((203, 1, 1), np.int32)
  x = sparse.BCOO((data, index), shape=X.shape)
  with pytest.raises(ValueError, match="n_batch = n_dense = 0"):
    optax_svrg.fit_linear(BINARY, x, TARGETS[BINARY])
  index = np.array([[0, 0], [3, 1]], np.int32)
  bad = sparse.BCOO((np.array([1.0, np.nan]), index), shape=X.shape)
  with pytest.raises(
    ValueError, match=r"features.data must be finite, got nan"
  ):
    optax_svrg.fit_linear(BINARY, bad, TARGETS[BINARY])
