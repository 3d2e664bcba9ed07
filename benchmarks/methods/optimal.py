# SPDX-License-Identifier: Apache-2.0
"""SVRG with the best coefficient of each component, found from outside."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_svrg


class OptimalState(NamedTuple):
  """State of :func:`optimal_svrg`.

  Attributes:
    svrg: what all methods of this family have.
    alphas: a coefficient for each component, set from outside.
  """

  svrg: optax_svrg.SVRGState
  alphas: Any


def optimal_svrg() -> optax.GradientTransformationExtraArgs:
  """SVRG with a coefficient for each component, 1 until it is set."""
  svrg = optax_svrg.alpha_svrg(1.0)

  def init_fn(params):
    return OptimalState(svrg.init(params), jax.tree.map(jnp.ones_like, params))

  def update_fn(updates, state, params=None, *, grad_fn, **extra_args):
    s = grad_fn(state.svrg.snapshot_params)
    updates = corrected(updates, s, state.svrg.mean_grads, state.alphas)
    # For the record, as the paper draws it.
    alpha = mean_of_live(state.alphas)
    return updates, state._replace(svrg=state.svrg._replace(alpha=alpha))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def corrected(grads: Any, snapshot_grads: Any, mean: Any, alphas: Any) -> Any:
  """The corrected gradient; coefficients that are NaN count as 0."""
  return jax.tree.map(
    lambda g, s, m, a: g - jnp.nan_to_num(a) * (s - m),
    grads,
    snapshot_grads,
    mean,
    alphas,
  )


def mean_of_live(alphas: Any) -> jax.Array:
  """Mean over all components that have a coefficient, i.e. are not NaN."""
  leaves = [jnp.ravel(a) for a in jax.tree.leaves(alphas)]
  return jnp.nanmean(jnp.concatenate(leaves))
