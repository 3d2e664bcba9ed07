# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The models: multi-layer perceptrons of the widths of the alpha-SVRG paper."""

import itertools

from flax import nnx
import jax

NUM_LAYERS = {"logreg": 1, "mlp2": 2, "mlp4": 4}


class MLP(nnx.Module):
  """A perceptron with ReLU; with one layer it is logistic regression.

  Args:
    num_layers: number of linear layers.
    num_inputs: number of inputs.
    num_classes: number of outputs.
    rngs: random streams for the initial weights.
  """

  def __init__(
    self, num_layers: int, num_inputs: int, num_classes: int, *, rngs: nnx.Rngs
  ):
    sizes = itertools.pairwise(widths(num_layers, num_inputs, num_classes))
    self.layers = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])

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
