# SPDX-License-Identifier: Apache-2.0
"""Logistic regression and perceptrons as in the alpha-SVRG paper."""

from collections.abc import Sequence
import itertools

from flax import nnx
import jax
import jax.numpy as jnp

NUM_LAYERS = {"logreg": 1, "mlp2": 2, "mlp4": 4}


class MLP(nnx.Module):
  """A perceptron with ReLU; with one layer it is logistic regression."""

  def __init__(
    self,
    sizes: Sequence[int],
    *,
    rngs: nnx.Rngs,
    dtype: jax.typing.DTypeLike | None = None,
  ):
    pairs = itertools.pairwise(sizes)
    self.layers = nnx.List(
      [nnx.Linear(*pair, dtype=dtype, rngs=rngs) for pair in pairs]
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns the logits."""
    for layer in self.layers[:-1]:
      x = nnx.relu(layer(x))
    return self.layers[-1](x)


def widths(num_layers: int, num_inputs: int, num_classes: int) -> list[int]:
  """Interpolates geometrically between the numbers of inputs and of classes."""
  ratio = (num_classes / num_inputs) ** (1 / num_layers)
  sizes = [num_inputs]
  for _ in range(num_layers - 1):
    sizes.append(int(ratio * sizes[-1]))
  return [*sizes, num_classes]


class Perceptron(nnx.Module):
  """Logistic regression or a perceptron of the paper."""

  def __init__(
    self,
    image_size: int,
    num_channels: int,
    num_classes: int,
    *,
    rngs: nnx.Rngs,
    num_layers: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
  ):
    sizes = widths(num_layers, image_size**2 * num_channels, num_classes)
    self.mlp = MLP(sizes, rngs=rngs, dtype=dtype)

  def __call__(
    self, images: jax.Array, rngs: nnx.Rngs | None = None
  ) -> jax.Array:
    """Returns the logits, in float32."""
    return self.mlp(images.reshape(len(images), -1)).astype(jnp.float32)
