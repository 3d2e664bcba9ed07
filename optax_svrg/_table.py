# SPDX-License-Identifier: Apache-2.0
"""A table of gradients that every backend updates in place.

The axis of the batches is split into several short ones. The compiler for TPU
lays an array out as compactly as it can, with any axis as the fastest one: with
a long axis of batches it may choose that one, and would then copy the whole
table to read or write an entry. Short axes would be padded to 128, so that the
axes of the parameters are chosen, whose shapes and shardings stay as they are.
"""

from collections.abc import Callable
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_svrg import _checks, _compat

# Such an axis is a twelfth of the 128 lanes of a TPU.
_LONGEST = 10


@functools.lru_cache
def axes_of(num_batches: int) -> tuple[int, ...]:
  """Lengths of the axes of batches: as few as there can be, and as tight."""
  count = 1
  while _LONGEST**count < num_batches:
    count += 1
  lengths = range(1, _LONGEST + 1)
  return min(
    (
      axes
      for axes in itertools.combinations_with_replacement(lengths, count)
      if math.prod(axes) >= num_batches
    ),
    key=lambda axes: (math.prod(axes), axes[-1]),
  )


def read(table: Any, num_batches: int, index: Any) -> Any:
  """The entry of a batch, in all arrays of the table."""
  position = _position(num_batches, index)

  def entry(t: jax.Array, position: list[jax.Array]) -> jax.Array:
    rest = t.shape[len(position) :]
    sizes = (1,) * len(position) + rest
    x = jax.lax.dynamic_slice(t, _start(position, len(rest)), sizes)
    return jax.lax.squeeze(x, range(len(position)))

  return jax.tree.map(lambda t: _where_it_is(entry, t, position), table)


def write(table: Any, entry: Any, num_batches: int, index: Any) -> Any:
  """The table with another entry for a batch."""
  position = _position(num_batches, index)

  def put(t: jax.Array, position: list[jax.Array], x: jax.Array) -> jax.Array:
    start = _start(position, x.ndim)
    x = jax.lax.expand_dims(x, range(len(position)))
    return jax.lax.dynamic_update_slice(t, x, start)

  return jax.tree.map(
    lambda t, x: _where_it_is(put, t, position, x), table, entry
  )


def _where_it_is(
  fn: Callable[..., jax.Array],
  t: jax.Array,
  position: list[jax.Array],
  *entry: jax.Array,
) -> jax.Array:
  """Calls a function with an array and a position, where the array lies.

  XLA for TPU slices arrays in the memory of the host along one axis only (JAX
  0.10), unless the processor of the host does it.
  """
  if not _compat.on_host(t):
    return fn(t, position, *entry)

  def by_host(
    t: jax.Array, position: list[jax.Array], *entry: jax.Array
  ) -> jax.Array:
    position = [jax.device_put(p, jax.memory.Space.Host) for p in position]
    return _compat.on_host_processor(fn)(t, position, *entry)

  return jax.lax.platform_dependent(
    t, position, *entry, tpu=by_host, default=fn
  )


def _position(num_batches: int, index: Any) -> list[jax.Array]:
  """The index of a batch along each of the axes."""
  digits = []
  index = _checks.wide_index(index)
  for length in reversed(axes_of(num_batches)[1:]):
    index, digit = jnp.divmod(index, length)
    digits.append(digit)
  return [index, *reversed(digits)]


def _start(position: list[jax.Array], num_axes: int) -> list[jax.Array]:
  return position + [jnp.zeros_like(position[0])] * num_axes
