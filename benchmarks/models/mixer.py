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
    *shape: int,
    rngs: nnx.Rngs,
    patch_size: int = 32,
    width: int = 512,
    depth: int = 8,
    **common: Any,
  ):
    super().__init__(
      *shape, num_features=width, rngs=rngs, head_init=layers.zeros, **common
    )
    options = {"dtype": self.dtype, "rngs": rngs}
    num_patches = layers.grid(shape[0], patch_size) ** 2
    self.embed = layers.Cut(
      patch_size,
      shape[1],
      width,
      kernel_init=nnx.initializers.lecun_normal(),
      bias_init=layers.zeros,
      **options,
    )
    [self.blocks] = self._stages(
      [depth],
      lambda i, j, rate: _MixerBlock(num_patches, width, rate, **options),
    )
    self.norm = layers.norm(width, **options)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed(x)
    x = x.reshape(len(x), -1, x.shape[-1])
    return self.norm(self._apply(self.blocks, x, key)).mean(axis=1)


class _MixerBlock(nnx.Module):
  def __init__(self, num_patches: int, width: int, rate: float, **options: Any):
    self.rate = rate
    self.norms = nnx.List([layers.norm(width, **options) for _ in range(2)])
    make_mlp = functools.partial(
      layers.FeedForward,
      kernel_init=nnx.initializers.xavier_uniform(),
      bias_init=nnx.initializers.normal(1e-6),
      **options,
    )
    self.tokens = make_mlp(num_patches, width // 2)
    self.channels = make_mlp(width, 4 * width)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    mixed = self.tokens(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
    x = x + layers.drop(mixed, self.rate, layers.fold(key, 0))
    return x + layers.drop(
      self.channels(self.norms[1](x)), self.rate, layers.fold(key, 1)
    )
