# SPDX-License-Identifier: Apache-2.0
"""Variance reduction for Optax: SVRG with a coefficient, given or estimated."""

import importlib
import types

from optax_svrg._linear import fit_linear as fit_linear
from optax_svrg._linear import LinearFit as LinearFit
from optax_svrg._lockstep import lockstep as lockstep
from optax_svrg._mean_gradient import gradient_table as gradient_table
from optax_svrg._mean_gradient import GradientTable as GradientTable
from optax_svrg._mean_gradient import mean_gradient as mean_gradient
from optax_svrg._minimize import HistoryPoint as HistoryPoint
from optax_svrg._minimize import minimize as minimize
from optax_svrg._minimize import MinimizeResult as MinimizeResult
from optax_svrg._minimize import prox_elastic_net as prox_elastic_net
from optax_svrg._minimize import prox_l1 as prox_l1
from optax_svrg._minimize import prox_nonnegative as prox_nonnegative
from optax_svrg._moments import Payoff as Payoff
from optax_svrg._moments import RunningMoments as RunningMoments
from optax_svrg._saga import adaptive_saga as adaptive_saga
from optax_svrg._saga import alpha_saga as alpha_saga
from optax_svrg._saga import SAGAState as SAGAState
from optax_svrg._schedules import linear_decay as linear_decay
from optax_svrg._sharding import device_local as device_local
from optax_svrg._sharding import state_shardings as state_shardings
from optax_svrg._smoothness import smoothness as smoothness
from optax_svrg._snapshot import SVRGState as SVRGState
from optax_svrg._snapshot import take_snapshot as take_snapshot
from optax_svrg._summary import summary as summary
from optax_svrg._svrg import adaptive_svrg as adaptive_svrg
from optax_svrg._svrg import alpha_svrg as alpha_svrg
from optax_svrg._variance import gradient_variance as gradient_variance
from optax_svrg._variance import GradientVariance as GradientVariance
from optax_svrg._variance import optimal_alpha as optimal_alpha
from optax_svrg._variance import per_example_grads as per_example_grads

__version__ = "0.1.0"


def __getattr__(name: str) -> types.ModuleType:
  # Flax and scikit-learn are optional: they are imported when first used.
  if name in ("flax", "sklearn"):
    return importlib.import_module(f"optax_svrg.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
