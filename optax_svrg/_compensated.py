# SPDX-License-Identifier: Apache-2.0
"""Means that many small changes leave exact to a few roundings.

A mean is a pair of arrays: its rounded value, and the error that rounding has
made so far, which is carried along (compensated summation).
"""

import jax
import jax.numpy as jnp


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the rounded sum and its error, which is exact (Knuth)."""
  total = a + b
  part = total - a
  return total, (a - (total - part)) + (b - part)


def include(
  mean: jax.Array, error: jax.Array, share: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns a running mean after one more value, and its error.

  Args:
    mean: the mean of the values before.
    error: its error.
    share: weight of the value, divided by that of all values so far.
    value: the value.
  """
  return two_sum(mean, error + share * ((value - mean) - error))


def replace(
  mean: jax.Array,
  error: jax.Array,
  old: jax.Array,
  new: jax.Array,
  count: int | jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns the mean of ``count`` values after one has changed, and its error.

  Without a change, both stay as they are.

  Args:
    mean: the mean before.
    error: its error.
    old: the value that goes.
    new: the value that comes in its place.
    count: the number of values.
  """

  def share(x: jax.Array) -> jax.Array:
    x = x.astype(mean.dtype) / jnp.asarray(count, mean.dtype)
    # Always true: keeps XLA for CPU from fusing the division into the sum,
    # which would round what goes out unlike what came in (TestRunningMean).
    return jnp.where(jnp.isfinite(x), x, 0)

  # The same share comes in as goes out later, so that its rounding does not
  # accumulate.
  change, first = two_sum(share(new), -share(old))
  total, second = two_sum(mean, change)
  rest = error + (first + second)
  mean = total + rest
  return mean, rest - (mean - total)
