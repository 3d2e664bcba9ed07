# SPDX-License-Identifier: Apache-2.0
"""Estimators for scikit-learn, solved by :func:`optax_svrg.fit_linear`.

Imported only when ``optax_svrg.sklearn`` is first used; needs scikit-learn.
"""

from collections.abc import Callable
from typing import Any
import warnings

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import d2_tweedie_score
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.extmath import safe_sparse_dot, softmax
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
  _check_sample_weight,
  check_is_fitted,
  validate_data,
)

from optax_svrg import _linear


class _LinearModel(BaseEstimator):  # type: ignore[misc]
  """Base of the estimators."""

  def _fit(
    self, loss: Callable[..., Any], x: Any, y: Any, weights: Any, **options: Any
  ) -> _linear.LinearFit:
    """Calls ``fit_linear``, in double precision."""
    rng = check_random_state(self.random_state)
    with jax.enable_x64(True), warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter("always")
      if scipy.sparse.issparse(x):
        x = sparse.BCOO.from_scipy_sparse(x)
      fit = _linear.fit_linear(
        loss,
        x,
        y,
        intercept=self.fit_intercept,
        sample_weight=weights,
        tol=self.tol,
        max_epochs=self.max_iter,
        seed=int(rng.randint(2**31 - 1)),
        progress=bool(self.verbose),
        **options,
      )
    for warning in caught:
      warnings.warn(str(warning.message), ConvergenceWarning, stacklevel=3)
    self.n_iter_ = fit.num_epochs
    return fit

  def _outputs(self, x: Any) -> np.ndarray:
    check_is_fitted(self)
    x = validate_data(self, x, accept_sparse="csr", reset=False)
    return safe_sparse_dot(x, self.coef_.T, dense_output=True) + self.intercept_

  def __sklearn_tags__(self) -> Any:
    tags = super().__sklearn_tags__()
    tags.input_tags.sparse = True
    return tags


class LogisticRegression(ClassifierMixin, _LinearModel):  # type: ignore[misc]
  r"""Logistic regression, binomial or multinomial, as scikit-learn's.

  .. math::

    \min_{w, b} \; C \sum_i s_i \, \ell(x_i w + b, y_i) + (1 - \rho)
    \frac{\lVert w\rVert^2}{2} + \rho \lVert w\rVert_1

  where :math:`\rho` is ``l1_ratio`` and :math:`\ell` the cross-entropy, which
  for two classes has a single output. The intercept is not penalised.

  Args:
    C: inverse of the strength of the regularisation; ``numpy.inf`` for none.
    l1_ratio: share of the l1 penalty, from 0 to 1.
    fit_intercept: whether there is an intercept.
    tol: the solver stops when the norm of the gradient of the mean loss is at
      most this.
    max_iter: largest number of passes over the data.
    class_weight: factors of the weights of classes, as a dictionary, or
      ``"balanced"``.
    random_state: for the order of the examples.
    verbose: whether to show a progress bar.

  Attributes:
    classes_: the labels.
    coef_: ``(n_classes, n_features)``, of two classes ``(1, n_features)``.
    intercept_: ``(1,)`` or ``(n_classes,)``.
    n_iter_: number of passes over the data.
    n_features_in_: number of features.

  Examples:
    >>> from sklearn.datasets import load_iris
    >>> import optax_svrg
    >>> x, y = load_iris(return_X_y=True)
    >>> model = optax_svrg.sklearn.LogisticRegression(C=10.0).fit(x, y)
    >>> print(f"{model.score(x, y):.2f}")
    0.98
  """

  def __init__(
    self,
    C: float = 1.0,  # noqa: N803
    *,
    l1_ratio: float = 0.0,
    fit_intercept: bool = True,
    tol: float = 1e-10,
    max_iter: int = 1000,
    class_weight: Any = None,
    random_state: Any = None,
    verbose: int = 0,
  ):
    self.C = C
    self.l1_ratio = l1_ratio
    self.fit_intercept = fit_intercept
    self.tol = tol
    self.max_iter = max_iter
    self.class_weight = class_weight
    self.random_state = random_state
    self.verbose = verbose

  def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
    """Fits the model to an array or a sparse matrix; returns the estimator."""
    if not self.C > 0:
      raise ValueError(f"C must be positive, got {self.C}.")
    if not 0 <= self.l1_ratio <= 1:
      raise ValueError(f"l1_ratio must be in [0, 1], got {self.l1_ratio}.")
    x, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
    check_classification_targets(y)
    self.classes_, labels = np.unique(y, return_inverse=True)
    if len(self.classes_) < 2:
      raise ValueError(
        "y must have at least two classes, got only one class,"
        f" {self.classes_[0]!r}."
      )
    weights = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if self.class_weight is not None:
      weights = (
        weights
        * compute_class_weight(
          self.class_weight, classes=self.classes_, y=y, sample_weight=weights
        )[labels]
      )
    is_binary = len(self.classes_) == 2
    strength = 1 / (self.C * weights.sum())
    fit = self._fit(
      optax.losses.sigmoid_binary_cross_entropy
      if is_binary
      else optax.losses.softmax_cross_entropy_with_integer_labels,
      x,
      labels,
      weights,
      num_outputs=None if is_binary else len(self.classes_),
      l2=strength * (1 - self.l1_ratio),
      l1=strength * self.l1_ratio,
    )
    self.coef_ = np.atleast_2d(np.asarray(fit.weights).T)
    self.intercept_ = np.atleast_1d(np.asarray(fit.intercept))
    return self

  def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
    """Outputs of the model, ``(n_samples,)`` for two classes."""
    outputs = self._outputs(X)
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs

  def predict(self, X: Any) -> np.ndarray:  # noqa: N803
    """The most probable classes."""
    outputs = self.decision_function(X)
    is_binary = outputs.ndim == 1
    index = (outputs > 0).astype(int) if is_binary else outputs.argmax(axis=1)
    return self.classes_[index]

  def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
    """Probabilities of the classes, ``(n_samples, n_classes)``."""
    outputs = self._outputs(X)
    if outputs.shape[1] == 1:
      outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    return softmax(outputs)

  def predict_log_proba(self, X: Any) -> np.ndarray:  # noqa: N803
    """Logarithms of the probabilities."""
    return np.log(self.predict_proba(X))


class PoissonRegressor(RegressorMixin, _LinearModel):  # type: ignore[misc]
  r"""Poisson regression with a logarithmic link, as scikit-learn's.

  .. math::

    \min_{w, b} \; \frac{1}{\sum_i s_i} \sum_i s_i
    \left(e^{x_i w + b} - y_i (x_i w + b)\right)
    + \frac{\alpha}{2} \lVert w\rVert^2

  Args:
    alpha: strength of the regularisation.
    fit_intercept: whether there is an intercept.
    tol: the solver stops when the norm of the gradient is at most this.
    max_iter: largest number of passes over the data.
    random_state: for the order of the examples.
    verbose: whether to show a progress bar.

  Attributes:
    coef_: ``(n_features,)``.
    intercept_: a number.
    n_iter_: number of passes over the data.
    n_features_in_: number of features.

  Examples:
    >>> import optax_svrg
    >>> model = optax_svrg.sklearn.PoissonRegressor()
    >>> x = [[1.0, 2.0], [2.0, 3.0], [3.0, 4.0], [4.0, 3.0]]
    >>> y = [12, 17, 22, 21]
    >>> print(f"{model.fit(x, y).score(x, y):.2f}")
    0.99
  """

  def __init__(
    self,
    *,
    alpha: float = 1.0,
    fit_intercept: bool = True,
    tol: float = 1e-10,
    max_iter: int = 1000,
    random_state: Any = None,
    verbose: int = 0,
  ):
    self.alpha = alpha
    self.fit_intercept = fit_intercept
    self.tol = tol
    self.max_iter = max_iter
    self.random_state = random_state
    self.verbose = verbose

  def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:  # noqa: N803
    """Fits the model to counts or rates ``y``; returns the estimator."""
    options = {"accept_sparse": "csr", "dtype": np.float64, "y_numeric": True}
    x, y = validate_data(self, X, y, **options)
    y = y.astype(x.dtype)
    if y.min() < 0 or not y.max() > 0:
      raise ValueError(
        f"y must be at least 0, and not all 0, got {y.min()} to {y.max()}."
      )
    weights = _check_sample_weight(sample_weight, x, dtype=np.float64)
    fit = self._fit(_poisson_loss, x, y, weights, l2=self.alpha)
    self.coef_ = np.asarray(fit.weights)
    self.intercept_ = float(fit.intercept)
    return self

  def predict(self, X: Any) -> np.ndarray:  # noqa: N803
    """Expected counts."""
    return np.exp(self._outputs(X))

  def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:  # noqa: N803
    """Share of the deviance that is explained, 1 at best."""
    return d2_tweedie_score(
      y, self.predict(X), sample_weight=sample_weight, power=1
    )

  def __sklearn_tags__(self) -> Any:
    tags = super().__sklearn_tags__()
    tags.target_tags.positive_only = True
    return tags


def _poisson_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  return jnp.exp(outputs) - targets * outputs
