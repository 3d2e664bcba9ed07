# SPDX-License-Identifier: Apache-2.0
"""A small convolutional net."""

import itertools

from flax import nnx
import jax
import jax.numpy as jnp


class ConvNet(nnx.Module):
  """A small convolutional net: 16, 32 and 64 channels, halved in size twice."""

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
  ):
    channels = (num_channels, 16, 32, 64)
    self.convs = nnx.List(
      [
        nnx.Conv(*size, (3, 3), strides=stride, dtype=dtype, rngs=rngs)
        for size, stride in zip(
          itertools.pairwise(channels), (1, 2, 2), strict=True
        )
      ]
    )
    self.head = nnx.Linear(channels[-1], num_classes, rngs=rngs)

  def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
    """Returns the logits, float32 ``[batch, num_classes]``."""
    for conv in self.convs:
      x = nnx.relu(conv(x))
    return self.head(x.mean(axis=(1, 2)).astype(jnp.float32))
