# SPDX-License-Identifier: Apache-2.0
"""MLP-Mixer."""

import functools
from typing import Any

from flax import nnx
import jax

from benchmarks.models import layers


class Mixer(layers.Network):
  """MLP-Mixer (Tolstikhin et al., 2021).

  As ``models/mlp_mixer.py`` of the authors, with timm's initial weights: the
  head is zero. The perceptron of tokens has half as many hidden units as there
  are features, that of channels four times as many.
  """

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    patch_size: int = 32,
    width: int = 512,
    depth: int = 8,
    **common: Any,
  ):
    size = layers.grid(image_size, patch_size)
    super().__init__(
      image_size,
      num_channels,
      num_classes,
      width,
      rngs=rngs,
      **common,
      head_init=layers.zeros,
    )
    dtype = self.dtype
    self.embed = layers.Cut(
      patch_size,
      num_channels,
      width,
      dtype,
      rngs=rngs,
      kernel_init=nnx.initializers.lecun_normal(),
      bias_init=layers.zeros,
    )
    [rates] = layers.rates(self.drop_path, [depth])
    self.blocks = nnx.List(
      [_MixerBlock(size**2, width, rate, dtype, rngs=rngs) for rate in rates]
    )
    self.norm = layers.norm(width, dtype, rngs=rngs)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    return self.norm(self._apply(self.blocks, x, key)).mean(axis=1)


class _MixerBlock(nnx.Module):
  def __init__(
    self,
    num_patches: int,
    width: int,
    rate: float,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
  ):
    self.rate = rate
    self.norms = nnx.List(
      [layers.norm(width, dtype, rngs=rngs) for _ in range(2)]
    )
    make_mlp = functools.partial(
      layers.FeedForward,
      dtype=dtype,
      rngs=rngs,
      kernel_init=nnx.initializers.xavier_uniform(),
      bias_init=nnx.initializers.normal(1e-6),
    )
    self.tokens = make_mlp(num_patches, width // 2)
    self.channels = make_mlp(width, 4 * width)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    mixed = self.tokens(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
    x = x + layers.drop(mixed, self.rate, layers.fold(key, 0))
    return x + layers.drop(
      self.channels(self.norms[1](x)), self.rate, layers.fold(key, 1)
    )
