# SPDX-License-Identifier: Apache-2.0
"""Solver for benchopt's ``benchmark_ridge`` and ``benchmark_logreg_l2``.

Copy it to the ``solvers`` of either of them.
"""

import warnings

from benchopt import BaseSolver
import jax
from jax.experimental import sparse
import numpy as np
import optax
import scipy.sparse

import optax_svrg


class Solver(BaseSolver):
  """``fit_linear``, whose loss is a mean where that of benchopt is a sum."""

  name = "optax_svrg"
  requirements = ("pip::optax-svrg",)
  sampling_strategy = "tolerance"

  def set_objective(self, X, y, lmbd, fit_intercept=False):  # noqa: N803
    """Takes over the data, in logistic regression with labels -1 and 1."""
    self.features, self.targets = X, np.asarray(y, np.float64)
    self.l2, self.fit_intercept = lmbd / len(y), fit_intercept
    self.loss = optax.losses.l2_loss
    if "Logistic" in self._objective.name:
      self.loss = optax.losses.sigmoid_binary_cross_entropy
      self.targets = (y > 0).astype(np.int32)

  def warm_up(self):
    """Compiles."""
    self.run_once(1e-6)

  def run(self, tolerance):
    """Solves up to a norm of the gradient."""
    with jax.enable_x64(True), warnings.catch_warnings():
      warnings.simplefilter("ignore")  # The tolerance may be below rounding.
      x, is_sparse = self.features, scipy.sparse.issparse(self.features)
      self.fit = optax_svrg.fit_linear(
        self.loss,
        sparse.BCOO.from_scipy_sparse(x) if is_sparse else x,
        self.targets,
        l2=self.l2,
        intercept=self.fit_intercept,
        tol=tolerance,
      )

  def get_result(self):
    """Returns the weights, with the intercept after them."""
    weights, intercept = self.fit.weights, self.fit.intercept
    beta = np.append(weights, intercept) if self.fit_intercept else weights
    return {"beta": np.asarray(beta)}
