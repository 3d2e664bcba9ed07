# SPDX-License-Identifier: Apache-2.0
"""Layers that the architectures share.

Functions, epsilons, the places where paths are dropped and the distributions of
the initial weights are those of the alpha-SVRG paper's PyTorch code (the
directory ``models`` of github.com/davidyyd/alpha-SVRG), which takes them from
timm 0.6.12. Where that initialises by timm's ``trunc_normal_`` with standard
deviation 0.02, a plain normal distribution stands here: it is cut at -2 and 2,
a hundred standard deviations away.
"""

from collections.abc import Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros_init()


def cut(images: Any, size: int) -> Any:
  """Cuts images into squares that do not overlap."""
  *leading, height, width, channels = images.shape
  grid = (height // size, size, width // size, size)
  return images.reshape(*leading, *grid, channels).swapaxes(-4, -3)


class Network(nnx.Module):
  """Base of the architectures: features, then a linear head."""

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    num_features: int,
    *,
    rngs: nnx.Rngs,
    drop_path: float = 0.0,
    remat: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
    head_init: nnx.Initializer = normal,
  ):
    if not 0 <= drop_path < 1:
      raise ValueError(f"drop_path must be in [0, 1), got {drop_path}.")
    self.image_shape = (image_size, image_size, num_channels)
    self.drop_path = drop_path
    self.remat = remat
    self.dtype = jnp.dtype(dtype)
    self.head = linear(
      num_features,
      num_classes,
      jnp.float32,
      kernel_init=head_init,
      rngs=rngs,
    )

  def __call__(
    self, images: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the logits."""
    check_images(images, self.image_shape)
    key = rngs.dropout() if rngs is not None and self.drop_path else None
    return self.head(self._features(images.astype(self.dtype), key))

  def _features(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    raise NotImplementedError

  def _apply(
    self, blocks: nnx.List, x: jax.Array, key: jax.Array | None
  ) -> jax.Array:
    """Applies blocks, each with keys of its own."""
    for i, block in enumerate(blocks):
      call = type(block).__call__
      if self.remat:
        call = nnx.remat(call)
      x = call(block, x, None if key is None else jax.random.fold_in(key, i))
    return x


class Cut(nnx.Module):
  """A convolution whose stride is its kernel's size: a matrix product."""

  def __init__(
    self,
    size: int,
    num_inputs: int,
    num_outputs: int,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer | None = None,
  ):
    self.size = size
    fan_in = size**2 * num_inputs
    # PyTorch's own initial weights of a convolution, which the authors keep
    # for ViT and Swin: uniform up to 1 / sqrt(fan_in), the bias, too.
    limit = fan_in**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(
      key, shape, dtype, -limit, limit
    )
    self.linear = linear(
      fan_in,
      num_outputs,
      dtype,
      rngs=rngs,
      kernel_init=kernel_init or uniform,
      bias_init=bias_init or uniform,
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """From ``[..., height, width, channels]`` to features of each square."""
    x = cut(x, self.size)
    return self.linear(x.reshape(*x.shape[:-3], -1))


class FeedForward(nnx.Module):
  """Two linear layers with GELU between them."""

  def __init__(
    self,
    num_features: int,
    num_hidden: int,
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    **inits: nnx.Initializer,
  ):
    self.first = linear(num_features, num_hidden, dtype, rngs=rngs, **inits)
    self.second = linear(num_hidden, num_features, dtype, rngs=rngs, **inits)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies both layers to the last axis."""
    return self.second(nnx.gelu(self.first(x), approximate=False))


class Attention(nnx.Module):
  """Multi-head attention with biases."""

  def __init__(self, width: int, heads: int, dtype: Any, *, rngs: nnx.Rngs):
    if heads < 1 or width % heads:
      raise ValueError(
        f"heads must divide the width of {width} features, got {heads}."
      )
    self.heads = heads
    self.inputs = linear(width, 3 * width, dtype, rngs=rngs)
    self.outputs = linear(width, width, dtype, rngs=rngs)

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
    dtype: Any,
    *,
    rngs: nnx.Rngs,
    epsilon: float = 1e-6,
  ):
    self.rate = rate
    self.norms = nnx.List(
      [norm(width, dtype, rngs=rngs, epsilon=epsilon) for _ in range(2)]
    )
    self.attention = Attention(width, heads, dtype, rngs=rngs)
    self.mlp = FeedForward(width, 4 * width, dtype, rngs=rngs)

  def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
    """Applies the block; without a key nothing is dropped."""
    x = x + drop(self._attend(self.norms[0](x)), self.rate, fold(key, 0))
    return x + drop(self.mlp(self.norms[1](x)), self.rate, fold(key, 1))

  def _attend(self, x: jax.Array) -> jax.Array:
    return self.attention(x)


def norm(
  num_features: int, dtype: Any, *, rngs: nnx.Rngs, epsilon: float = 1e-6
) -> nnx.LayerNorm:
  """Makes a LayerNorm whose variance is computed in two passes."""
  return nnx.LayerNorm(
    num_features,
    epsilon=epsilon,
    dtype=dtype,
    use_fast_variance=False,
    rngs=rngs,
  )


def linear(
  num_inputs: int,
  num_outputs: int,
  dtype: Any,
  *,
  rngs: nnx.Rngs,
  kernel_init: nnx.Initializer = normal,
  **options: Any,
) -> nnx.Linear:
  """Makes a linear layer with the authors' initial weights."""
  return nnx.Linear(
    num_inputs,
    num_outputs,
    dtype=dtype,
    kernel_init=kernel_init,
    rngs=rngs,
    **options,
  )


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


def rates(drop_path: float, depths: Sequence[int]) -> list[list[float]]:
  """The rate of each block of each stage."""
  if not depths or min(depths) < 1:
    raise ValueError(f"depths must be positive, got {depths}.")
  rates = np.linspace(0, drop_path, sum(depths))
  ends = np.cumsum(depths)[:-1]
  return [stage.tolist() for stage in np.split(rates, ends)]


def grid(image_size: int, patch_size: int) -> int:
  """Number of patches along a side."""
  if patch_size < 1 or image_size < 1 or image_size % patch_size:
    raise ValueError(
      f"image_size must be a positive multiple of patch_size, {patch_size}, got"
      f" {image_size}."
    )
  return image_size // patch_size


def check_halving(image_size: int, size: int, depths: Sequence[int]) -> None:
  """Raises unless the patches can be halved between all stages."""
  if size % 2 ** (len(depths) - 1):
    raise ValueError(
      f"image_size must give patches that can be halved {len(depths) - 1} times"
      f" along each side, got {image_size} with {size} patches."
    )


def check_images(images: jax.Array, shape: tuple[int, int, int]) -> None:
  """Raises unless images are a batch of this shape."""
  if images.ndim != 4 or images.shape[1:] != shape:
    raise ValueError(f"images must be [batch, *{shape}], got {images.shape}.")
