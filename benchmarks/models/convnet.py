# SPDX-License-Identifier: Apache-2.0
"""A small convolutional net."""

import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks.models import layers


class ConvNet(layers.Network):
  """A small convolutional net: 16, 32 and 64 channels, halved in size twice."""

  def __init__(
    self,
    *shape: int,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike = jnp.float32,
    **common: Any,
  ):
    sizes = itertools.pairwise((shape[1], 16, 32, 64))
    self.convs = nnx.List(
      [
        nnx.Conv(*size, (3, 3), strides=stride, dtype=dtype, rngs=rngs)
        for size, stride in zip(sizes, (1, 2, 2), strict=True)
      ]
    )
    options = {"head_init": nnx.initializers.lecun_normal(), "dtype": dtype}
    super().__init__(*shape, num_features=64, rngs=rngs, **options, **common)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    for conv in self.convs:
      x = nnx.relu(conv(x))
    return x.mean(axis=(1, 2))
