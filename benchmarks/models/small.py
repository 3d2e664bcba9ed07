# SPDX-License-Identifier: Apache-2.0
"""The models: perceptrons as in the alpha-SVRG paper, and small other ones."""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

NUM_LAYERS = {"logreg": 1, "mlp2": 2, "mlp4": 4}

# Of the small ViT and Mixer, unless others are given.
_PATCH = 7
_WIDTH = 32
_DEPTH = 2
_HEADS = 4


class MLP(nnx.Module):
  """A perceptron with ReLU; with one layer it is logistic regression.

  Args:
    sizes: numbers of units, from the inputs to the outputs.
    rngs: random streams for the initial weights.
    dtype: of the computation; that of inputs and weights unless given.
  """

  def __init__(
    self,
    sizes: Sequence[int],
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike | None = None,
  ):
    self.layers = nnx.List(
      [
        nnx.Linear(*size, dtype=dtype, rngs=rngs)
        for size in itertools.pairwise(sizes)
      ]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits."""
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return self.layers[-1](x)


def widths(num_layers: int, num_inputs: int, num_classes: int) -> list[int]:
  """Interpolates geometrically between the numbers of inputs and of classes.

  Args:
    num_layers: number of linear layers.
    num_inputs: number of inputs.
    num_classes: number of outputs.

  Returns:
    The ``num_layers + 1`` numbers of units, from the inputs to the outputs;
    those in between are rounded down one after the other, as in the authors'
    code.
  """
  ratio = (num_classes / num_inputs) ** (1 / num_layers)
  sizes = [num_inputs]
  for _ in range(num_layers - 1):
    sizes.append(int(ratio * sizes[-1]))
  return [*sizes, num_classes]


def cut(images: Any, size: int) -> Any:
  """Cuts images into squares that do not overlap.

  Args:
    images: a NumPy or JAX array, ``[..., height, width, channels]``.
    size: height and width of a square, in pixels; it divides the images'.

  Returns:
    ``[..., height / size, width / size, size, size, channels]``.
  """
  *leading, height, width, channels = images.shape
  grid = (height // size, size, width // size, size)
  return images.reshape(*leading, *grid, channels).swapaxes(-4, -3)


class ViT(nnx.Module):
  """A small vision transformer on patches of 7 x 7.

  Args:
    image_shape: channels, height and width of the images, which are flattened.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
    width: number of features of a patch.
    depth: number of blocks.

  Raises:
    ValueError: if height or width is not a multiple of the patch's.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    width: int = _WIDTH,
    depth: int = _DEPTH,
  ):
    self.image_shape = image_shape
    num_patches, size = _patches(image_shape)
    self.embed = nnx.Linear(size, width, rngs=rngs)
    self.positions = nnx.Param(
      0.02 * jax.random.normal(rngs.params(), (num_patches, width))
    )
    self.blocks = nnx.List(
      [_AttentionBlock(width, rngs=rngs) for _ in range(depth)]
    )
    self.norm = nnx.LayerNorm(width, rngs=rngs)
    self.head = nnx.Linear(width, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits."""
    x = self.embed(_to_patches(x, self.image_shape)) + self.positions[...]
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x).mean(axis=-2))


class Mixer(nnx.Module):
  """A small MLP-Mixer: two blocks of width 32 on patches of 7 x 7.

  Args:
    image_shape: channels, height and width of the images, which are flattened.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.

  Raises:
    ValueError: if height or width is not a multiple of the patch's.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.image_shape = image_shape
    num_patches, size = _patches(image_shape)
    self.embed = nnx.Linear(size, _WIDTH, rngs=rngs)
    self.blocks = nnx.List(
      [_MixerBlock(num_patches, rngs=rngs) for _ in range(_DEPTH)]
    )
    self.norm = nnx.LayerNorm(_WIDTH, rngs=rngs)
    self.head = nnx.Linear(_WIDTH, num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits."""
    x = self.embed(_to_patches(x, self.image_shape))
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x).mean(axis=-2))


class ConvNet(nnx.Module):
  """A small convolutional net: 16, 32 and 64 channels, halved in size twice.

  Args:
    image_shape: channels, height and width of the images, which are flattened.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.image_shape = image_shape
    channels = (image_shape[0], 16, 32, 64)
    self.convs = nnx.List(
      [
        nnx.Conv(*size, (3, 3), strides=stride, rngs=rngs)
        for size, stride in zip(
          itertools.pairwise(channels), (1, 2, 2), strict=True
        )
      ]
    )
    self.head = nnx.Linear(channels[-1], num_classes, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits."""
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], *self.image_shape), -3, -1)
    for conv in self.convs:
      x = nnx.relu(conv(x))
    return self.head(x.mean(axis=(-3, -2)))


class _TwoLayers(nnx.Module):
  def __init__(self, num_features: int, num_hidden: int, *, rngs: nnx.Rngs):
    self.layers = nnx.List(
      [
        nnx.Linear(num_features, num_hidden, rngs=rngs),
        nnx.Linear(num_hidden, num_features, rngs=rngs),
      ]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    first, second = self.layers
    return second(nnx.gelu(first(x)))


class _AttentionBlock(nnx.Module):
  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
    self.attention = nnx.MultiHeadAttention(
      _HEADS, width, decode=False, rngs=rngs
    )
    self.mlp = _TwoLayers(width, 4 * width, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.norms[0](x))
    return x + self.mlp(self.norms[1](x))


class _MixerBlock(nnx.Module):
  def __init__(self, num_patches: int, *, rngs: nnx.Rngs):
    self.norms = nnx.List([nnx.LayerNorm(_WIDTH, rngs=rngs) for _ in range(2)])
    self.tokens = _TwoLayers(num_patches, _WIDTH // 2, rngs=rngs)
    self.channels = _TwoLayers(_WIDTH, 4 * _WIDTH, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    mixed = self.tokens(self.norms[0](x).swapaxes(-1, -2)).swapaxes(-1, -2)
    x = x + mixed
    return x + self.channels(self.norms[1](x))


def _patches(image_shape: tuple[int, int, int]) -> tuple[int, int]:
  """The number of patches, and of values in each."""
  channels, height, width = image_shape
  if height % _PATCH or width % _PATCH:
    raise ValueError(
      f"image_shape must be in multiples of {_PATCH}, the patch, got"
      f" {image_shape}."
    )
  return (height // _PATCH) * (width // _PATCH), channels * _PATCH**2


def _to_patches(x: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
  """Cuts flattened images of any leading axes."""
  x = jnp.moveaxis(x.reshape(*x.shape[:-1], *image_shape), -3, -1)
  x = jnp.moveaxis(cut(x, _PATCH), -1, -3)
  num_patches, size = _patches(image_shape)
  return x.reshape(*x.shape[:-5], num_patches, size)


def _mlp(
  num_layers: int,
  image_shape: tuple[int, int, int],
  num_classes: int,
  *,
  rngs: nnx.Rngs,
) -> MLP:
  sizes = widths(num_layers, math.prod(image_shape), num_classes)
  return MLP(sizes, rngs=rngs)


# Each makes a model from the shape of images, the number of classes and rngs.
MODELS: dict[str, Callable[..., nnx.Module]] = {
  **{name: functools.partial(_mlp, n) for name, n in NUM_LAYERS.items()},
  "vit": ViT,
  "mixer": Mixer,
  "convnet": ConvNet,
}
