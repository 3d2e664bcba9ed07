# SPDX-License-Identifier: Apache-2.0
"""The registry of methods, by name."""

from typing import Any

import optax

from benchmarks.methods import (
  balanced,
  coefficients,
  optimal,
  recursive,
  saga_variants,
  snapshots,
)
from benchmarks.methods.method import Context, Factory, Method
import optax_svrg

__all__ = ["MAIN", "METHODS", "Context", "Factory", "Method", "make"]


_ALWAYS = optax.constant_schedule(1.0)  # Also where it is estimated.


def plain(context: Context) -> Method:
  """No variance reduction."""
  return Method(optax.identity())


def plain_fixed(context: Context, fixed_order: bool = False) -> Method:
  """No variance reduction, on fixed batches, in an order fixed or not."""
  return Method(
    optax.identity(), has_fixed_batches=True, has_fixed_order=fixed_order
  )


def svrg(context: Context) -> Method:
  """SVRG with the coefficient 1."""
  return Method(optax_svrg.alpha_svrg(1.0), _ALWAYS)


def alpha_svrg(context: Context, alpha0: float = 0.75) -> Method:
  """SVRG with a coefficient that decays linearly from ``alpha0``."""
  schedule = optax_svrg.linear_decay(
    alpha0, context.epochs, context.steps_per_epoch
  )
  return Method(optax_svrg.alpha_svrg(schedule), schedule)


def adaptive(context: Context) -> Method:
  """SVRG with a coefficient that is estimated."""
  return Method(optax_svrg.adaptive_svrg(), _ALWAYS)


def saga(context: Context) -> Method:
  """SAGA with the coefficient 1."""
  transform = optax_svrg.alpha_saga(1.0, context.num_fixed_batches)
  return Method(transform, has_fixed_batches=True)


def adaptive_saga(
  context: Context, table_dtype: str | None = None, fixed_order: bool = False
) -> Method:
  """SAGA with a coefficient that is estimated."""
  transform = optax_svrg.adaptive_saga(
    context.num_fixed_batches, table_dtype=table_dtype
  )
  return Method(transform, has_fixed_batches=True, has_fixed_order=fixed_order)


# The methods to compare by default.
MAIN: dict[str, Factory] = {
  "plain": plain,
  "plain-fixed": plain_fixed,
  "svrg": svrg,
  "alpha-svrg": alpha_svrg,
  "adaptive": adaptive,
  "saga": saga,
  "adaptive-saga": adaptive_saga,
}
METHODS: dict[str, Factory] = {
  **MAIN,
  "coefficient": coefficients.method,
  "saga-variant": saga_variants.method,
  "snapshots": snapshots.method,
  "optimal": optimal.method,
  "storm": recursive.storm,
  "mars": recursive.mars,
  "balanced-order": balanced.method,
}


def make(name: str, context: Context, **settings: Any) -> Method:
  """Makes a method."""
  return METHODS[name](context, **settings)
