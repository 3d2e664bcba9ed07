# SPDX-License-Identifier: Apache-2.0
"""Variance reduction for Optax: SAGA, SVRG and alpha-SVRG.

With ``batches``, a list of fixed mini-batches, training takes one more argument
than with a plain optimizer::

  tx = optax.chain(optax_svrg.adaptive_saga(len(batches)), optax.adamw(1e-3))
  opt_state = tx.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(params, opt_state, batch, i):
    grads = jax.grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, batch_index=i)
    return optax.apply_updates(params, updates), opt_state

  for i in rng.permutation(len(batches)):  # A new order each epoch.
    params, opt_state = train_step(params, opt_state, batches[i], i)

Gradient transformations:
  adaptive_saga: SAGA with an estimated coefficient, for neural networks.
  alpha_saga: SAGA with a given coefficient, for convex problems.
  adaptive_svrg: SVRG with an estimated coefficient.
  alpha_svrg: SVRG with a given coefficient, a number or a schedule.
  linear_decay: the schedule of the alpha-SVRG paper.
  SAGAState, SVRGState: the states of the transformations.
  summary: method, coefficient and progress of a state, for logging.

Snapshots of SVRG:
  take_snapshot: moves the snapshot inside an optimizer state.
  mean_gradient: mean gradient over batches that are streamed.
  gradient_table: mean gradient, and the gradient of each batch.
  GradientTable: the gradients of all batches.

Solvers:
  minimize: minimizes a mean loss by SAGA or SVRG, to high precision.
  MinimizeResult, HistoryPoint: what it returns.
  fit_linear: fits linear models many times faster.
  LinearFit: what it returns.
  prox_l1, prox_elastic_net, prox_nonnegative: proximal operators.
  smoothness: largest curvature of batches, for a step size.

Measurements:
  per_example_grads: the gradient of each example of a batch.
  gradient_variance: three measures of the variance of gradients.
  GradientVariance: these measures.
  optimal_alpha: the coefficient of least variance.
  RunningMoments: the same from gradients seen one after the other.

Several devices:
  device_local: gradients of one device, for ``axis_name``.
  state_shardings: shardings of an optimizer's state.
  memory_report: what a compiled step needs in memory, on each device.
  MemoryReport: these numbers.
  lockstep: batches that every process has, or an error in all.

Modules:
  flax: functions for Flax NNX, and a linen ``TrainState``.
  sklearn: estimators for scikit-learn.
"""

import importlib as _importlib
import importlib.util as _util
import types as _types

from optax_svrg._linear import fit_linear as fit_linear
from optax_svrg._linear import LinearFit as LinearFit
from optax_svrg._lockstep import lockstep as lockstep
from optax_svrg._mean_gradient import gradient_table as gradient_table
from optax_svrg._mean_gradient import GradientTable as GradientTable
from optax_svrg._mean_gradient import mean_gradient as mean_gradient
from optax_svrg._memory import memory_report as memory_report
from optax_svrg._memory import MemoryReport as MemoryReport
from optax_svrg._minimize import HistoryPoint as HistoryPoint
from optax_svrg._minimize import minimize as minimize
from optax_svrg._minimize import MinimizeResult as MinimizeResult
from optax_svrg._minimize import prox_elastic_net as prox_elastic_net
from optax_svrg._minimize import prox_l1 as prox_l1
from optax_svrg._minimize import prox_nonnegative as prox_nonnegative
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

__version__ = "0.2.0"

__all__ = [
  "GradientTable",
  "GradientVariance",
  "HistoryPoint",
  "LinearFit",
  "MemoryReport",
  "MinimizeResult",
  "RunningMoments",
  "SAGAState",
  "SVRGState",
  "adaptive_saga",
  "adaptive_svrg",
  "alpha_saga",
  "alpha_svrg",
  "device_local",
  "fit_linear",
  "gradient_table",
  "gradient_variance",
  "linear_decay",
  "lockstep",
  "mean_gradient",
  "memory_report",
  "minimize",
  "optimal_alpha",
  "per_example_grads",
  "prox_elastic_net",
  "prox_l1",
  "prox_nonnegative",
  "smoothness",
  "state_shardings",
  "summary",
  "take_snapshot",
]

# Optional packages: these modules are imported when first used.
_OPTIONAL = ("flax", "sklearn")


def __getattr__(name: str) -> _types.ModuleType:
  if name in _OPTIONAL:
    return _importlib.import_module(f"optax_svrg.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return [*__all__, *filter(_util.find_spec, _OPTIONAL), "__version__"]
