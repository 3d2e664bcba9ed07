# SPDX-License-Identifier: Apache-2.0
"""The Swin transformer."""

from collections.abc import Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
from benchmarks.models import layers

# Of its norms, PyTorch's own; the other architectures have 1e-6.
_SWIN_EPSILON = 1e-5


class Swin(layers.Network):
  """Swin transformer (Liu et al., 2021): attention in shifted windows.

  As ``models/swin_transformer.py`` of the authors: windows in every second
  block are shifted by half a window, with a bias by relative position and a
  mask where the shift has joined what does not touch; 2 x 2 patches are merged
  between stages, with twice the features. A window is at most as large as the
  stage's map, and then is not shifted.
  """

  def __init__(
    self,
    *shape: int,
    rngs: nnx.Rngs,
    patch_size: int = 4,
    width: int = 40,
    depths: Sequence[int] = (2, 2, 6, 2),
    heads: Sequence[int] = (2, 4, 8, 16),
    window: int = 7,
    **common: Any,
  ):
    widths = [width * 2**i for i in range(len(depths))]
    super().__init__(*shape, num_features=widths[-1], rngs=rngs, **common)
    size = layers.grid(shape[0], patch_size, len(depths))
    options = {"dtype": self.dtype, "rngs": rngs}
    make_norm = functools.partial(layers.norm, epsilon=_SWIN_EPSILON, **options)
    self.embed = layers.Cut(patch_size, shape[1], width, **options)
    self.embed_norm = make_norm(width)

    def make_block(i: int, j: int, rate: float) -> _SwinBlock:
      return _SwinBlock(
        widths[i], heads[i], rate, size // 2**i, window, j % 2 == 1, **options
      )

    self.stages = self._stages(depths, make_block)
    self.merge_norms = nnx.List([make_norm(4 * w) for w in widths[:-1]])
    self.merges = nnx.List(
      [
        layers.linear(4 * w, 2 * w, use_bias=False, **options)
        for w in widths[:-1]
      ]
    )
    self.norm = make_norm(widths[-1])

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    x = self.embed_norm(self.embed(x))
    for i, blocks in enumerate(self.stages):
      if i:
        # The authors' order of the four: by column first.
        x = layers.cut(x, 2).swapaxes(-3, -2)
        x = x.reshape(*x.shape[:3], -1)
        x = self.merges[i - 1](self.merge_norms[i - 1](x))
      x = self._apply(blocks, x, layers.fold(key, i))
    return self.norm(x).mean(axis=(1, 2))


class _SwinBlock(layers.AttentionBlock):
  def __init__(
    self,
    width: int,
    heads: int,
    rate: float,
    size: int,
    window: int,
    shifted: bool,
    *,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    super().__init__(
      width, heads, rate, epsilon=_SWIN_EPSILON, rngs=rngs, **options
    )
    self.window = min(window, size)
    if size % self.window:
      raise benchmarks.UserError(
        f"window must divide the {size} x {size} patches of a stage, got"
        f" {window}."
      )
    self.shift = window // 2 if shifted and size > window else 0
    self.bias = nnx.Param(
      layers.normal(rngs.params(), ((2 * self.window - 1) ** 2, heads))
    )

  def _attend(self, x: jax.Array) -> jax.Array:
    size = x.shape[1]
    x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
    x = layers.cut(x, self.window)
    # All windows of all examples are a batch, with the same masks by example.
    tokens = x.reshape(-1, self.window**2, x.shape[-1])
    bias = self.bias[...].astype(x.dtype)[_relative(self.window)]
    bias = jnp.moveaxis(bias, -1, 0)[None]
    mask = None
    if self.shift:
      mask = _shift_mask(size, self.window, self.shift)[:, None]
      mask = jnp.tile(mask, (len(x), 1, 1, 1))
    x = self.attention(tokens, bias, mask).reshape(x.shape)
    x = x.swapaxes(2, 3).reshape(len(x), size, size, -1)
    return jnp.roll(x, (self.shift, self.shift), axis=(1, 2))


def _relative(window: int) -> np.ndarray:
  """Numbers of the relative positions of two tokens of a window."""
  rows, columns = np.divmod(np.arange(window**2), window)
  rows = rows[:, None] - rows + window - 1
  columns = columns[:, None] - columns + window - 1
  return rows * (2 * window - 1) + columns


def _shift_mask(size: int, window: int, shift: int) -> np.ndarray:
  """Which tokens of each window touched before the shift."""
  part = np.searchsorted(
    [size - window, size - shift], np.arange(size), "right"
  )
  region = layers.cut((3 * part[:, None] + part)[..., None], window)
  region = region.reshape(-1, window**2)
  return region[:, :, None] == region[:, None]
