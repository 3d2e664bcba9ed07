# SPDX-License-Identifier: Apache-2.0
"""The examples of linear models: checks, numbers of outputs, batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import sparse
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse

from optax_svrg import _checks

Loss = Callable[[Any, Any], Any]

_SMALL = 300_000  # Numbers that are not worth another dtype.


# Optax's two logistic losses in half of their operations: JAX does not know how
# simple the second derivatives are.
@jax.custom_jvp
def _softplus(x: jax.Array) -> jax.Array:
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@_softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> Any:
  return _softplus(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]


@jax.custom_jvp
def _logsumexp(x: jax.Array) -> jax.Array:
  largest = jnp.max(x, axis=1)
  return largest + jnp.log(jnp.sum(jnp.exp(x - largest[:, None]), axis=1))


@_logsumexp.defjvp
def _logsumexp_jvp(primals: Any, tangents: Any) -> Any:
  slope = jax.nn.softmax(primals[0], axis=1)
  return _logsumexp(*primals), jnp.sum(slope * tangents[0], axis=1)


def binary_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
  return _softplus(outputs) - targets * outputs


def softmax_loss(outputs: jax.Array, one_hot: jax.Array) -> jax.Array:
  return _logsumexp(outputs) - jnp.sum(one_hot * outputs, axis=1)


class Data(NamedTuple):
  """Examples in a random order, filled up to whole batches with weight 0.

  Attributes:
    features: ``(N, D)``, with a column of ones for the intercept.
    center: ``(d,)``, what has been subtracted from the features.
    low: the features in float32, for what need not be exact; if they are few,
      in their own dtype.
    batches: ``low``, or for sparse features the data and indices of a BCOO of
      shape ``(num_batches, b, D)``.
    targets: leading axis N.
    weights: ``(N,)``, of sum 1.
    penalised: ``(D,)``, 0 for the intercept, otherwise 1.
    num_batches: how many there are.
    is_small: whether compilation takes longer than the work.
    batch_rows: a function from the index of a batch to its features, an array
      of NumPy or SciPy.
  """

  features: Any
  center: np.ndarray
  low: Any
  batches: Any
  targets: jax.Array
  weights: jax.Array
  penalised: np.ndarray
  num_batches: int
  is_small: bool
  batch_rows: Callable[[int], Any]


def arrange(
  x: Any, y: np.ndarray, s: np.ndarray, intercept: bool, size: int, rng: Any
) -> Data:
  """Shuffles the examples, fills up the last batch, adds the intercept."""
  n, d = x.shape
  num_batches = -(-n // size)
  order = np.resize(rng.permutation(n), num_batches * size)
  weights = s[order]
  weights[n:] = 0
  weights /= weights.sum()
  dtype = wide_dtype(x)
  center = np.zeros(d, dtype)
  if isinstance(x, sparse.BCOO):
    parts = _arrange_sparse(x, order, num_batches, intercept)
  else:
    if intercept:
      # The intercept makes up for it, and the curvature is far smaller.
      center = (s / s.sum()).astype(dtype) @ x.astype(dtype, copy=False)
    parts = _arrange_dense(x, order, num_batches, center, intercept)
  features, low, batches, batch_rows = parts
  penalised = np.ones(d + intercept)
  penalised[d:] = 0
  return Data(
    features,
    center,
    low,
    batches,
    jax.device_put(y[order]),
    jax.device_put(weights.astype(features.dtype)),
    penalised,
    num_batches,
    low.dtype == features.dtype,
    batch_rows,
  )


def _arrange_dense(
  x: np.ndarray,
  order: np.ndarray,
  num_batches: int,
  center: np.ndarray,
  intercept: bool,
) -> Any:
  rows = np.ones((len(order), x.shape[1] + intercept), center.dtype)
  rows[:, : x.shape[1]] = x[order]
  rows[:, : x.shape[1]] -= center
  low_dtype = np.float32 if rows.size > _SMALL else rows.dtype
  low = rows.astype(low_dtype, copy=False)
  features = jax.device_put(rows)
  on_device = features if low is rows else jax.device_put(low)
  batches = low.reshape(num_batches, -1, rows.shape[1])
  return features, on_device, on_device, batches.__getitem__


def _arrange_sparse(
  x: sparse.BCOO, order: np.ndarray, num_batches: int, intercept: bool
) -> Any:
  n, d = x.shape
  size = len(order) // num_batches
  position = np.empty(n, np.int32)
  position[order[:n]] = np.arange(n)
  values, indices = np.asarray(x.data), np.asarray(x.indices)
  inside = (indices < x.shape).all(axis=1)  # Others are padding.
  values, rows, columns = values[inside], *indices[inside].T
  rows = position[rows]
  if intercept:
    rows = np.concatenate([rows, np.arange(len(order))])
    columns = np.concatenate([columns, np.full(len(order), d)])
    values = np.concatenate([values, np.ones(len(order), values.dtype)])
  by_row = np.argsort(rows, kind="stable")
  rows, columns = rows[by_row].astype(np.int32), columns[by_row]
  values = values[by_row].astype(wide_dtype(x))
  shape = (len(order), d + intercept)
  where = np.stack([rows, columns.astype(np.int32)], axis=1)
  features, low = (
    sparse.BCOO(jax.device_put((values.astype(dtype), where)), shape=shape)
    for dtype in (values.dtype, np.float32)
  )

  starts = np.searchsorted(rows, np.arange(num_batches + 1) * size)
  most = max(1, int(np.diff(starts).max()))
  batch = rows // size
  slot = np.arange(len(rows)) - starts[batch]
  data = np.zeros((num_batches, most), np.float32)
  data[batch, slot] = values
  index = np.zeros((num_batches, most, 2), np.int32)
  index[batch, slot] = np.stack([rows % size, columns], axis=1)

  def batch_rows(i: int) -> Any:
    part = slice(starts[i], starts[i + 1])
    where = rows[part] % size, columns[part]
    return scipy.sparse.csr_array((values[part], where), (size, shape[1]))

  return features, low, jax.device_put((data, index)), batch_rows


def wide_dtype(x: Any) -> Any:
  """The dtype to compute in, at least float32."""
  return jax.dtypes.canonicalize_dtype(_checks.wide_dtype(x.dtype))


def check_features(features: Any) -> Any:
  """Returns a matrix with an axis of examples and one of features."""
  if not isinstance(features, sparse.BCOO):
    features = np.asarray(features)
  if not jnp.issubdtype(features.dtype, jnp.floating):
    raise TypeError(
      f"features must have a float dtype, got {features.dtype}; write"
      " features.astype(float)."
    )
  if features.ndim != 2 or not min(features.shape):
    raise ValueError(
      "features must have the shape (examples, features), at least one of"
      f" each, got {features.shape}."
    )
  if isinstance(features, sparse.BCOO):
    if features.n_batch or features.n_dense:
      raise ValueError("features must be a BCOO with n_batch = n_dense = 0.")
    _check_finite(features.data, "features.data")
  else:
    _check_finite(features, "features")
  return features


def _check_finite(x: Any, name: str) -> None:
  x = np.asarray(x)
  if x.dtype.kind in "iub" or np.isfinite(np.sum(x, dtype=np.float64)):
    return  # The sum may overflow, but it cannot be finite by accident.
  is_bad = ~np.isfinite(x.astype(np.float64))
  if is_bad.any():
    where = tuple(int(i) for i in np.argwhere(is_bad)[0])
    raise ValueError(f"{name} must be finite, got {x[where]} at {list(where)}.")


def check_targets(targets: Any, num_examples: int) -> np.ndarray:
  targets = np.asarray(targets)
  if targets.ndim not in (1, 2) or len(targets) != num_examples:
    raise ValueError(
      f"targets must have the shape ({num_examples},) or ({num_examples}, k) to"
      f" match features, got {targets.shape}."
    )
  if targets.dtype == bool:
    targets = targets.astype(np.int32)
  if not jnp.issubdtype(targets.dtype, jnp.floating) and not jnp.issubdtype(
    targets.dtype, jnp.integer
  ):
    raise TypeError(f"targets must be numbers, got dtype {targets.dtype}.")
  _check_finite(targets, "targets")
  return targets


def check_weights(sample_weight: Any, num_examples: int) -> np.ndarray:
  if sample_weight is None:
    return np.ones(num_examples)
  weights = np.array(sample_weight, np.float64)
  if weights.shape != (num_examples,):
    raise ValueError(
      f"sample_weight must have the shape ({num_examples},) to match features,"
      f" got {weights.shape}."
    )
  _check_finite(weights, "sample_weight")
  if weights.min() < 0 or not weights.max() > 0:
    raise ValueError(
      "sample_weight must be at least 0, and not all 0, got"
      f" {weights.min()} to {weights.max()}."
    )
  return weights


def scale_advice(x: Any, num_features: int) -> str | None:
  """Returns advice on features whose scales, or means, are far apart."""
  if isinstance(x, sparse.BCOO):
    column = np.asarray(x.indices)[:, 1]
    square = np.bincount(column, np.asarray(x.data, np.float64) ** 2)
    largest, spread = np.sqrt(square), np.sqrt(square)
  else:
    x = np.asarray(x, np.float64)
    largest, spread = np.abs(x).max(axis=0), x.std(axis=0)
  largest, spread = largest[:num_features], spread[:num_features]
  spread = spread[spread > 0]
  if not len(spread) or largest.max() < 100 * spread.min():
    return None
  return (
    f"Standardise the features: their scales are from {spread.min():.0e} to"
    f" {largest.max():.0e}."
  )


class Outputs(NamedTuple):
  """Returns the loss to use, its targets, and the number of outputs ``k``."""

  loss: Loss
  targets: np.ndarray
  number: int
  flat: bool


def match(loss: Loss, y: np.ndarray, number: int | None, dtype: Any) -> Outputs:
  """Infers the number of outputs from the loss and the targets."""
  if not callable(loss):
    raise TypeError(f"loss must be a function, got {loss!r}.")
  if number is not None:
    number = _checks.check_count(number, "num_outputs")
  is_integer = np.issubdtype(y.dtype, np.integer)
  is_labels = loss is optax.losses.softmax_cross_entropy_with_integer_labels
  if y.ndim == 2:
    if number not in (None, y.shape[1]):
      raise ValueError(
        f"num_outputs={number} must be the number of columns of targets,"
        f" {y.shape[1]}."
      )
    return _multiple(loss, y.astype(dtype), y.shape[1])
  if loss is optax.losses.sigmoid_binary_cross_entropy:
    _check_range(y, 0, 1)
    if y.min() == y.max() and y.max() in (0, 1):
      raise ValueError(f"targets must have two classes, got only {y.max()}.")
    loss = binary_loss
  if number in (None, 1) and not is_labels:
    try:
      losses = _eval_shape(loss, y.astype(dtype), (len(y),))
    except Exception:
      if number == 1 or not is_integer:
        raise
    else:
      return _check_loss(losses, Outputs(loss, y.astype(dtype), 1, True))
  if is_integer:
    number = int(y.max()) + 1 if number is None else number
    _check_range(y, 0, number - 1)
    if y.min() == y.max():
      raise ValueError(f"targets must have two classes, got only {y.max()}.")
    if is_labels:
      one_hot = np.zeros((len(y), number), dtype)
      one_hot[np.arange(len(y)), y] = 1
      loss, y = softmax_loss, one_hot
    return _multiple(loss, y, number)
  if is_labels or number is None:
    raise TypeError(f"targets must be integer labels, got dtype {y.dtype}.")
  return _multiple(loss, y.astype(dtype), number)


def _multiple(loss: Loss, targets: np.ndarray, number: int) -> Outputs:
  losses = _eval_shape(loss, targets, (len(targets), number))
  return _check_loss(losses, Outputs(loss, targets, number, False))


def _check_range(y: np.ndarray, low: int, high: int) -> None:
  if y.min() < low or y.max() > high:
    bad = y.min() if y.min() < low else y.max()
    raise ValueError(f"targets must be in [{low}, {high}], got {bad}.")


def _eval_shape(loss: Loss, targets: np.ndarray, shape: Any) -> Any:
  is_float = np.issubdtype(targets.dtype, np.floating)
  return jax.eval_shape(
    loss,
    jax.ShapeDtypeStruct(shape, targets.dtype if is_float else np.float32),
    jax.ShapeDtypeStruct(targets.shape, targets.dtype),
  )


def _check_loss(losses: Any, outputs: Outputs) -> Outputs:
  """Raises unless there is a loss for each example."""
  n = len(outputs.targets)
  shape = (n,) if outputs.flat else (n, outputs.number)
  if getattr(losses, "shape", None) not in ((n,), shape):
    raise ValueError(
      f"loss(outputs, targets) must return losses of examples, of shape ({n},),"
      f" for outputs of shape {shape}, got {losses}."
    )
  return outputs
