# SPDX-License-Identifier: Apache-2.0
"""Balanced order: the order of the next epoch follows from the gradients.

GraB keeps the signed sum of per-example gradients small, centred by the mean
over the epoch before: an example goes to the front of the next epoch if its
sign is +, else to the end. Per-example gradients of dense layers are products
of input and derivative by the output, so that the signs of a batch follow from
one loop over a B x B matrix of inner products.

References:
  Lu et al., `GraB: Finding Provably Better Data Permutations than Random
  Reshuffling <https://arxiv.org/abs/2205.10733>`_, 2022, algorithm 4
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import benchmarks
from benchmarks.methods.method import Context, Method

# Of each layer, inputs with a 1 for the bias, ``[B, in + 1]``, and derivatives
# by the outputs, ``[B, out]``.
Factors = Sequence[tuple[jax.Array, jax.Array]]


class BalancedState(NamedTuple):
  """State of a balanced order."""

  order: jax.Array  # The examples of the epoch, int32 of the shape (n,).
  signs: jax.Array  # Their signs, int8; 0 for those not seen so far.
  step: jax.Array  # Number of batches of the epoch seen so far.
  # Signed sum of the centred gradients of the epoch, by layer.
  signed: list[jax.Array]
  mean: list[jax.Array]  # Mean of the gradients of the epoch before, by layer.
  total: list[jax.Array]  # Sum of the gradients of the epoch, by layer.


def factors(
  model: Any, images: jax.Array, labels: jax.Array, whole: bool
) -> Factors:
  """Per-example gradients of the last layer of a perceptron, or of all."""
  if not hasattr(model, "mlp"):
    raise benchmarks.UserError(
      "A balanced order needs a model of dense layers."
    )
  layers = list(model.mlp.layers)

  def forward(shifts: Sequence[Any]) -> tuple[jax.Array, Any]:
    inputs, x = [], images.reshape(len(images), -1)
    for layer, shift in zip(layers, shifts, strict=True):
      inputs.append(jax.nn.relu(x) if inputs else x)
      x = layer(inputs[-1]) + shift
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(x, labels)
    return losses.sum(), (inputs, x)

  if whole:
    shifts = [jnp.zeros((len(images), x.out_features)) for x in layers]
    derivatives, (inputs, _) = jax.grad(forward, has_aux=True)(shifts)
  else:
    _, (inputs, logits) = forward([0.0] * len(layers))
    one_hot = jax.nn.one_hot(labels, logits.shape[1])
    inputs, derivatives = inputs[-1:], [jax.nn.softmax(logits) - one_hot]
  ones = jnp.ones((len(images), 1))
  return [
    (jnp.concatenate([x, ones], axis=1), d)
    for x, d in zip(inputs, derivatives, strict=True)
  ]


def signs_of(
  factors: Factors, signed: Sequence[jax.Array], mean: Sequence[jax.Array]
) -> jax.Array:
  """The signs of a batch, -1 or 1, one example after the other."""
  products = lambda of: sum(
    ((x @ y) * d).sum(1) for (x, d), y in zip(factors, of, strict=True)
  )
  gram = sum((x @ x.T) * (d @ d.T) for x, d in factors)
  by_mean = products(mean)
  square = optax.tree.vdot(mean, mean)
  gram += square - by_mean[:, None] - by_mean[None, :]
  start = products(signed) - optax.tree.vdot(signed, mean)

  def step(i, state):
    signs, product = state
    sign = jnp.where(product[i] > 0, -1.0, 1.0)
    return signs.at[i].set(sign), product + sign * gram[i]

  signs, _ = jax.lax.fori_loop(
    0, len(start), step, (jnp.zeros_like(start), start)
  )
  return signs


def method(context: Context, form: str = "last") -> Method:
  """A balanced order by last layer or whole gradient, or by random signs.

  Leaves the gradient as it is, and finds the signs of its examples.
  """

  def init_fn(params):
    layers = params.get("mlp", {}).get("layers", {})
    kept = list(layers.values()) if form == "whole" else [*layers.values()][-1:]
    shapes = [(len(x["kernel"]) + 1, x["kernel"].shape[1]) for x in kept]
    return BalancedState(
      jnp.arange(context.num_examples, dtype=jnp.int32),
      jnp.zeros(context.num_examples, jnp.int8),
      jnp.zeros([], jnp.int32),
      *([jnp.zeros(shape) for shape in shapes] for _ in range(3)),
    )

  def update_fn(updates, state, params, *, factors_fn, **extra_args):
    found = factors_fn(params, form == "whole")
    size = len(found[0][0])
    if form == "random":
      key = jax.random.fold_in(jax.random.key(0), state.order[0])
      key = jax.random.fold_in(key, state.step)
      signs = jax.random.rademacher(key, (size,), jnp.float32)
    else:
      signs = signs_of(found, state.signed, state.mean)
    signed = [
      s + (x * signs[:, None]).T @ d - signs.sum() * m
      for s, m, (x, d) in zip(state.signed, state.mean, found, strict=True)
    ]
    total = [t + x.T @ d for t, (x, d) in zip(state.total, found, strict=True)]
    seen = jax.lax.dynamic_update_slice(
      state.signs, signs.astype(jnp.int8), (state.step * size,)
    )
    return updates, state._replace(
      signs=seen, step=state.step + 1, signed=signed, total=total
    )

  transform = optax.GradientTransformationExtraArgs(init_fn, update_fn)
  return Method(transform, next_order=next_order)


def next_order(
  state: BalancedState, drawn: jax.Array, num_steps: int
) -> BalancedState:
  """Returns the state with the order of the epoch that begins.

  Or of the one under way, which stays as it is. Examples that the last epoch
  has left out come first.

  Args:
    state: the state.
    drawn: a random order for the first epoch.
    num_steps: number of steps of an epoch.
  """
  n = len(drawn)
  position = jnp.arange(n)
  place = jnp.where(state.signs > 0, n + position, 3 * n - position)
  place = jnp.where(state.signs == 0, position, place)
  balanced = state.order[jnp.argsort(place)]
  is_first, is_over = state.step == 0, state.step == num_steps
  seen = jnp.maximum((state.signs != 0).sum(), 1)
  begun = BalancedState(
    jnp.where(is_first, drawn, balanced).astype(jnp.int32),
    jnp.zeros_like(state.signs),
    jnp.zeros_like(state.step),
    optax.tree.zeros_like(state.signed),
    optax.tree.scale(1 / seen, state.total),
    optax.tree.zeros_like(state.total),
  )
  return optax.tree.where(is_first | is_over, begun, state)
