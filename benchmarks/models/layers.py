# SPDX-License-Identifier: Apache-2.0
"""Layers that the architectures share.

Functions, epsilons, the places where paths are dropped and the distributions of
the initial weights are those of the alpha-SVRG paper's PyTorch code (``models``
of github.com/davidyyd/alpha-SVRG), from timm 0.6.12. Its ``trunc_normal_`` is a
normal distribution here: it is cut a hundred standard deviations away.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import benchmarks

normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros_init()
# With the authors' initial weights.
linear = functools.partial(nnx.Linear, kernel_init=normal)
norm = functools.partial(nnx.LayerNorm, epsilon=1e-6, use_fast_variance=False)


def cut(images: Any, size: int) -> Any:
  """Cuts images into squares that do not overlap."""
  *leading, height, width, channels = images.shape
  grid = (height // size, size, width // size, size)
  return images.reshape(*leading, *grid, channels).swapaxes(-4, -3)


class Network(nnx.Module):
  """Base of the architectures: features, then a linear head.

  Their first arguments, ``shape``, are the size of images, the number of
  channels and that of classes; ``common`` are those of this class.
  """

  def __init__(
    self,
    *shape: int,
    num_features: int,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
    head_init: nnx.Initializer = normal,
  ):
    self.drop_path = drop_path
    self.remat = remat
    self.dtype = jnp.dtype(dtype)
    self.head = linear(
      num_features,
      shape[-1],
      dtype=jnp.float32,
      kernel_init=head_init,
      rngs=rngs,
    )

  def __call__(
    self, images: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the logits."""
    key = rngs.dropout() if rngs is not None and self.drop_path else None
    return self.head(self._features(images.astype(self.dtype), key))

  def _stages(
    self, depths: Sequence[int], make: Callable[[int, int, float], nnx.Module]
  ) -> nnx.List:
    """Makes stages of blocks, by stage, place in it, and rate of dropping."""
    rates = iter(np.linspace(0, self.drop_path, sum(depths)).tolist())
    stages = [
      nnx.List([make(i, j, next(rates)) for j in range(depth)])
      for i, depth in enumerate(depths)
    ]
    return nnx.List(stages)

  def _apply(
    self, blocks: nnx.List, x: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Applies blocks, each with keys of its own."""
    for i, block in enumerate(blocks):
      call = type(block).__call__
      if self.remat:
        call = nnx.remat(call)
      x = call(block, x, fold(key, i))
    return x


class Cut(nnx.Module):
  """A convolution whose stride is its kernel's size: a matrix product."""

  def __init__(
    self, size: int, num_inputs: int, num_outputs: int, **options: Any
  ):
    self.size = size
    fan_in = size**2 * num_inputs
    # PyTorch's own initial weights of a convolution, which the authors keep
    # for ViT and Swin: uniform up to 1 / sqrt(fan_in), the bias, too.
    limit = fan_in**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(
      key, shape, dtype, -limit, limit
    )
    inits = {"kernel_init": uniform, "bias_init": uniform}
    self.linear = nnx.Linear(fan_in, num_outputs, **(inits | options))

  def __call__(self, x: jax.Array) -> jax.Array:
    """From ``[..., height, width, channels]`` to features of each square."""
    x = cut(x, self.size)
    return self.linear(x.reshape(*x.shape[:-3], -1))


class FeedForward(nnx.Module):
  """Two linear layers with GELU between them."""

  def __init__(self, num_features: int, num_hidden: int, **options: Any):
    self.first = linear(num_features, num_hidden, **options)
    self.second = linear(num_hidden, num_features, **options)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies both layers to the last axis."""
    return self.second(nnx.gelu(self.first(x), approximate=False))


class Attention(nnx.Module):
  """Multi-head attention with biases."""

  def __init__(self, width: int, heads: int, **options: Any):
    self.heads = heads
    self.inputs = linear(width, 3 * width, **options)
    self.outputs = linear(width, width, **options)

  def __call__(
    self,
    x: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attention among tokens, ``[batch, tokens, width]``."""
    split = self.inputs(x).reshape(*x.shape[:-1], 3, self.heads, -1)
    query, key, value = jnp.moveaxis(split, -3, 0)
    mixed = nnx.dot_product_attention(query, key, value, bias=bias, mask=mask)
    return self.outputs(mixed.reshape(x.shape))


class AttentionBlock(nnx.Module):
  """Attention and a perceptron, each after its norm, with stochastic depth."""

  def __init__(
    self,
    width: int,
    heads: int,
    rate: float,
    *,
    epsilon: float = 1e-6,
    **options: Any,
  ):
    self.rate = rate
    self.norms = nnx.List(
      [norm(width, epsilon=epsilon, **options) for _ in range(2)]
    )
    self.attention = Attention(width, heads, **options)
    self.mlp = FeedForward(width, 4 * width, **options)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Applies the block; without a key nothing is dropped."""
    x = x + drop(self._attend(self.norms[0](x)), self.rate, fold(key, 0))
    return x + drop(self.mlp(self.norms[1](x)), self.rate, fold(key, 1))

  def _attend(self, x: jax.Array) -> jax.Array:
    return self.attention(x)


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Drops the path of some examples, and scales up that of the others."""
  if key is None or not rate:
    return x
  shape = (len(x), *[1] * (x.ndim - 1))
  keep = jax.random.bernoulli(key, 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0)


def fold(key: jax.Array | None, number: int) -> jax.Array | None:
  """Derives a key; ``None`` where there is none."""
  return None if key is None else jax.random.fold_in(key, number)


def grid(image_size: int, patch_size: int, num_stages: int = 1) -> int:
  """Number of patches along a side, to be halved between stages."""
  size, rest = divmod(image_size, patch_size)
  if rest:
    raise benchmarks.UserError(
      f"image_size must be a multiple of patch_size, {patch_size}, got"
      f" {image_size}."
    )
  if size % 2 ** (num_stages - 1):
    raise benchmarks.UserError(
      f"image_size must give patches that can be halved {num_stages - 1} times"
      f" along each side, got {image_size} with {size} patches."
    )
  return size
