# SPDX-License-Identifier: Apache-2.0
"""Estimates from the step before: STORM and MARS, without clipping.

References:
  Cutkosky and Orabona, `Momentum-Based Variance Reduction in Non-Convex SGD
  <https://arxiv.org/abs/1905.10018>`_, 2019; Yuan et al., `MARS
  <https://arxiv.org/abs/2411.10438>`_, 2024
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.methods.method import Context, Method


class RecursiveState(NamedTuple):
  """State of the estimators."""

  # Number of gradients of a batch computed in addition to those of the steps.
  extra_gradients: jax.Array
  params: optax.Params  # Parameters of the step before.
  # Estimate of the step before or, where no second gradient is computed, its
  # plain gradient.
  last: optax.Updates


def _estimator(
  estimate: Callable[..., optax.Updates], is_exact: bool
) -> optax.GradientTransformationExtraArgs:
  """Makes an estimator.

  ``estimate`` is a function of the gradient of a batch, its gradient at the
  parameters of the step before, and what was kept. Where it is not exact, the
  second is the gradient of the step before.
  """

  def init_fn(params):
    return RecursiveState(
      jnp.zeros([], jnp.int32),
      jax.tree.map(jnp.copy, params),
      optax.tree.zeros_like(params),
    )

  def update_fn(updates, state, params, *, grad_fn, **extra_args):
    count, copied = state.extra_gradients, jax.tree.map(jnp.copy, params)
    if not is_exact:
      made = jax.tree.map(estimate, updates, state.last, state.last)
      return made, RecursiveState(count, copied, updates)
    before = grad_fn(state.params)
    made = jax.tree.map(estimate, updates, before, state.last)
    made = optax.tree.where(count == 0, updates, made)
    return made, RecursiveState(count + 1, copied, made)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def storm(context: Context, a: float = 0.1) -> Method:
  """STORM, the gradient plus ``1 - a`` times the change of the last error."""
  return Method(_estimator(lambda g, s, d: g + (1 - a) * (d - s), True))


def mars(
  context: Context, gamma: float = 0.025, is_exact: bool = True
) -> Method:
  """MARS, exact or approximate, before an optimizer with ``b1=0.9``."""
  beta = 0.9
  scale = gamma * beta / (1 - beta)
  return Method(_estimator(lambda g, s, _: g + scale * (g - s), is_exact))
