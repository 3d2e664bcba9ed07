# SPDX-License-Identifier: Apache-2.0
"""The vision transformer."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks.models import layers


class ViT(layers.Network):
  """Vision transformer (Dosovitskiy et al., 2021), tiny as in DeiT.

  As ``models/vision_transformer.py`` of the authors: a class token and learned
  positions, blocks with the norms first, biases of queries, keys and values,
  and a last norm.
  """

  def __init__(
    self,
    *shape: int,
    rngs: nnx.Rngs,
    patch_size: int = 16,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    **common: Any,
  ):
    super().__init__(*shape, num_features=width, rngs=rngs, **common)
    options = {"dtype": self.dtype, "rngs": rngs}
    size = layers.grid(shape[0], patch_size)
    self.embed = layers.Cut(patch_size, shape[1], width, **options)
    self.class_token = nnx.Param(layers.normal(rngs.params(), (1, width)))
    self.positions = nnx.Param(
      layers.normal(rngs.params(), (size**2 + 1, width))
    )
    [self.blocks] = self._stages(
      [depth],
      lambda i, j, rate: layers.AttentionBlock(width, heads, rate, **options),
    )
    self.norm = layers.norm(width, **options)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    token = self.class_token[...].astype(x.dtype)
    token = jnp.broadcast_to(token, (len(x), *token.shape))
    x = jnp.concatenate([token, x], axis=1)
    x = x + self.positions[...].astype(x.dtype)[None]
    x = self._apply(self.blocks, x, key)
    # Of the class token only: LayerNorm is by token.
    return self.norm(x[:, 0])
