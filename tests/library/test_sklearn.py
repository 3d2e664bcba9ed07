# SPDX-License-Identifier: Apache-2.0
"""Estimators for scikit-learn, against its own."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
from sklearn import linear_model
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator

import optax_svrg

pytestmark = pytest.mark.standard_promotion

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4))
BINARY = np.where(X[:, 0] + RNG.logistic(size=120) > 0, "yes", "no")
MULTI = np.array([3, 7, 9])[np.argmax(X[:, :3] + RNG.gumbel(size=(120, 3)), 1)]
COUNTS = RNG.poisson(np.exp(X[:, 0] / 2))
WEIGHTS = RNG.integers(0, 3, size=120)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("y", [BINARY, MULTI])
def test_logistic_regression(y, class_weight, weights):
  options = {"C": 0.3, "class_weight": class_weight}
  ours = optax_svrg.sklearn.LogisticRegression(**options)
  ours.fit(X, y, sample_weight=weights)
  theirs = linear_model.LogisticRegression(
    **options, tol=1e-12, solver="newton-cholesky"
  ).fit(X, y, sample_weight=weights)
  np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
  np.testing.assert_array_equal(ours.classes_, theirs.classes_)
  np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
  for name in ("predict_proba", "predict_log_proba", "score"):
    args = (X, y) if name == "score" else (X,)
    np.testing.assert_allclose(
      getattr(ours, name)(*args), getattr(theirs, name)(*args), atol=1e-7
    )
  assert ours.decision_function(X).shape == theirs.decision_function(X).shape
  assert ours.intercept_.shape == theirs.intercept_.shape


def test_l1_and_sparse():
  x = scipy.sparse.csr_array(np.where(np.abs(X) > 1, X, 0))
  options = {"C": 0.2, "l1_ratio": 1.0, "fit_intercept": False}
  ours = optax_svrg.sklearn.LogisticRegression(**options).fit(x, BINARY)
  theirs = linear_model.LogisticRegression(
    **options, tol=1e-12, solver="saga", max_iter=10_000
  ).fit(x, BINARY)
  np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-8)
  np.testing.assert_array_equal(ours.coef_ == 0, theirs.coef_ == 0)
  assert (ours.coef_ == 0).any()
  np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x))


def test_poisson_regressor():
  ours = optax_svrg.sklearn.PoissonRegressor(alpha=0.1)
  ours.fit(X, COUNTS, sample_weight=WEIGHTS)
  theirs = linear_model.PoissonRegressor(alpha=0.1, tol=1e-12)
  theirs.fit(X, COUNTS, sample_weight=WEIGHTS)
  np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
  np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-5)
  np.testing.assert_allclose(
    ours.score(X, COUNTS), theirs.score(X, COUNTS), rtol=1e-6
  )


@pytest.mark.parametrize(
  ("model", "y", "message"),
  [
    (optax_svrg.sklearn.LogisticRegression(C=0), BINARY, "C must be positive"),
    (
      optax_svrg.sklearn.LogisticRegression(l1_ratio=2),
      BINARY,
      r"l1_ratio must be in \[0, 1\], got 2",
    ),
    (
      optax_svrg.sklearn.LogisticRegression(),
      np.ones(120, int),
      "at least two classes, got only one class",
    ),
    (optax_svrg.sklearn.PoissonRegressor(alpha=-1), COUNTS, "l2 must be at le"),
    (optax_svrg.sklearn.PoissonRegressor(), COUNTS - 1, "y must be at least 0"),
  ],
)
def test_bad_input(model, y, message):
  with pytest.raises(ValueError, match=message):
    model.fit(X, y)


def test_convergence_warning():
  model = optax_svrg.sklearn.LogisticRegression(max_iter=2)
  with pytest.warns(ConvergenceWarning, match="did not converge in"):
    model.fit(X, BINARY)


def test_imported_only_when_used():
  code = (
    "import sys, optax_svrg; assert 'sklearn' not in sys.modules;"
    " optax_svrg.sklearn; assert 'sklearn' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
  "estimator",
  [
    optax_svrg.sklearn.LogisticRegression(),
    optax_svrg.sklearn.PoissonRegressor(),
  ],
)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks(estimator):
  check_estimator(estimator, on_skip=None)
