# SPDX-License-Identifier: Apache-2.0
"""The registry of methods, by name."""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks.methods import (
  balanced,
  coefficients,
  recursive,
  saga_variants,
  snapshots,
)
from benchmarks.methods.method import Context, Method
import optax_svrg

__all__ = ["MAIN", "METHODS", "Context", "Method", "make"]

_ALWAYS = optax.constant_schedule(1.0)  # Also where it is estimated.


def _alpha_svrg(context: Context, alpha0: float = 0.75) -> Method:
  """SVRG with a coefficient that decays linearly from ``alpha0``."""
  schedule = optax_svrg.linear_decay(
    alpha0, context.epochs, context.steps_per_epoch
  )
  return Method(optax_svrg.alpha_svrg(schedule), schedule)


def _fixed(
  transform: optax.GradientTransformation, fixed_order: bool = False
) -> Method:
  """A method on fixed batches, in an order fixed or not."""
  return Method(transform, has_fixed_batches=True, has_fixed_order=fixed_order)


def _adaptive_saga(
  context: Context, fixed_order: bool = False, **settings: Any
) -> Method:
  transform = optax_svrg.adaptive_saga(context.num_fixed_batches, **settings)
  return _fixed(transform, fixed_order)


# Each makes a method for a training; further arguments are its settings.
# These are compared by default.
MAIN: dict[str, Callable[..., Method]] = {
  "plain": lambda context: Method(optax.identity()),
  "plain-fixed": lambda context, **order: _fixed(optax.identity(), **order),
  "svrg": lambda context: Method(optax_svrg.alpha_svrg(1.0), _ALWAYS),
  "alpha-svrg": _alpha_svrg,
  "adaptive": lambda context: Method(optax_svrg.adaptive_svrg(), _ALWAYS),
  "saga": lambda context: _fixed(
    optax_svrg.alpha_saga(1.0, context.num_fixed_batches)
  ),
  "adaptive-saga": _adaptive_saga,
}
METHODS: dict[str, Callable[..., Method]] = {
  **MAIN,
  "coefficient": lambda context, **settings: Method(
    coefficients.transform(**settings), _ALWAYS
  ),
  "saga-variant": lambda context, **settings: _fixed(
    saga_variants.transform(context.num_fixed_batches, **settings)
  ),
  "snapshots": snapshots.method,
  # The coefficients are set by an observer.
  "optimal": lambda context: Method(coefficients.optimal_svrg(), _ALWAYS),
  "storm": recursive.storm,
  "mars": recursive.mars,
  "balanced-order": balanced.method,
}


def make(name: str, context: Context, **settings: Any) -> Method:
  """Makes a method."""
  return METHODS[name](context, **settings)
