# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt."""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import layers

# Of the map of features, in pixels: up to this size a matrix product is four
# times faster than XLA's convolution and its gradients on the CPU.
_MATRIX_PIXELS = 256


class ConvNeXt(layers.Network):
  """ConvNeXt (Liu et al., 2022, "A ConvNet for the 2020s").

  As ``models/convnext.py`` of the authors: stages of blocks (a depthwise 7 x 7
  convolution, LayerNorm, a perceptron, layer scale from 1e-6), halved in size
  by LayerNorm and a 2 x 2 convolution between stages; the mean over pixels,
  LayerNorm and the head at the end.
  """

  def __init__(
    self,
    *shape: int,
    rngs: nnx.Rngs,
    patch_size: int = 4,
    depths: Sequence[int] = (2, 2, 6, 2),
    widths: Sequence[int] = (48, 96, 192, 384),
    **common: Any,
  ):
    super().__init__(*shape, num_features=widths[-1], rngs=rngs, **common)
    layers.grid(shape[0], patch_size, len(depths))
    options = {"dtype": self.dtype, "rngs": rngs}
    make_cut = functools.partial(
      layers.Cut, kernel_init=layers.normal, bias_init=layers.zeros, **options
    )
    self.stem = make_cut(patch_size, shape[1], widths[0])
    self.stem_norm = layers.norm(widths[0], **options)
    self.downsample_norms = nnx.List(
      [layers.norm(width, **options) for width in widths[:-1]]
    )
    self.downsamples = nnx.List(
      [make_cut(2, *pair) for pair in itertools.pairwise(widths)]
    )
    self.stages = self._stages(
      depths, lambda i, j, rate: _ConvNeXtBlock(widths[i], rate, **options)
    )
    self.norm = layers.norm(widths[-1], **options)

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.stem_norm(self.stem(x))
    for i, blocks in enumerate(self.stages):
      if i:
        x = self.downsamples[i - 1](self.downsample_norms[i - 1](x))
      x = self._apply(blocks, x, layers.fold(key, i))
    return self.norm(x.mean(axis=(1, 2)))


class _ConvNeXtBlock(nnx.Module):
  def __init__(
    self, width: int, rate: float, *, rngs: nnx.Rngs, **options: Any
  ):
    self.rate = rate
    self.kernel = nnx.Param(layers.normal(rngs.params(), (7, 7, width)))
    self.bias = nnx.Param(jnp.zeros(width))
    self.norm = layers.norm(width, rngs=rngs, **options)
    self.mlp = layers.FeedForward(width, 4 * width, rngs=rngs, **options)
    self.layer_scale = nnx.Param(jnp.full(width, 1e-6, jnp.float32))

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    kernel, bias, scale = (
      param[...].astype(x.dtype)
      for param in (self.kernel, self.bias, self.layer_scale)
    )
    y = depthwise(x, kernel) + bias[None, None, None]
    y = self.mlp(self.norm(y)) * scale[None, None, None]
    return x + layers.drop(y, self.rate, key)


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves each channel with a kernel of its own."""
  _, height, width, channels = x.shape
  if jax.default_backend() == "cpu" and height * width <= _MATRIX_PIXELS:
    return _depthwise_by_matrix(x, kernel)
  return jax.lax.conv_general_dilated(
    x,
    kernel[:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=channels,
  )


def _depthwise_by_matrix(x: jax.Array, kernel: jax.Array) -> jax.Array:
  _, height, width, _ = x.shape

  def taps(length: int) -> jax.Array:
    """1 where a tap of the kernel takes an input to an output."""
    size = len(kernel)
    tap, source, target = np.ogrid[:size, :length, :length]
    return jnp.asarray(source - target + size // 2 == tap, kernel.dtype)

  # Rows y and columns x of the input; v and u of the output.
  matrix = jnp.einsum("ijc,jxu->icxu", kernel, taps(width))
  matrix = jnp.einsum("icxu,iyv->cyxvu", matrix, taps(height))
  return jnp.einsum("byxc,cyxvu->bvuc", x, matrix)
