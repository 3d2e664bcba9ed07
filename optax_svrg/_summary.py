# SPDX-License-Identifier: Apache-2.0
"""Summary of the states of this package as Python numbers."""

import sys
from typing import Any
import warnings

import jax
import numpy as np

from optax_svrg import _saga, _snapshot

_STATES = (_snapshot.SVRGState, _saga.SAGAState)


def summary(opt_state: Any) -> dict[str, Any]:
  """Method, coefficient and progress of variance reduction, for logging.

  It waits for the step that made ``opt_state``: do not call it in every step.

  Args:
    opt_state: any nesting of Optax states with a state of this package inside;
      also a :class:`flax.nnx.Optimizer` or a linen ``TrainState``.

  Returns:
    A dictionary of Python numbers and strings.

    * ``method``: ``"alpha_svrg"``, ``"adaptive_svrg"``, ``"alpha_saga"`` or
      ``"adaptive_saga"``;
    * ``steps``: number of updates made;
    * ``alpha``: coefficient applied by the last update, 0 if its gradient
      passed unchanged;
    * ``variance_ratio`` (adaptive methods): estimate of the variance of the
      corrected gradient divided by that of the plain one;
    * ``num_snapshots`` and ``is_finite`` (SVRG): number of snapshots, and
      whether the mean gradient is usable;
    * ``num_filled`` and ``num_batches`` (SAGA): number of table entries that
      hold a gradient, and of all entries.

    With several states inside ``opt_state``, each key begins with the path of
    its state and a slash. Values that differ between the members of a stacked
    state (:func:`jax.vmap`) are lists.

  Raises:
    TypeError: inside :func:`jax.jit`, where the numbers are unknown.
    ValueError: if there is no state of this package in ``opt_state``.

  Warns:
    UserWarning: if updates were made before any snapshot was taken.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> params = jnp.array([1.0, 2.0])
    >>> tx = optax.chain(optax_svrg.adaptive_saga(2), optax.adam(1e-3))
    >>> state = tx.init(params)
    >>> _, state = tx.update(params, state, params, batch_index=0)
    >>> for key, value in optax_svrg.summary(state).items():
    ...   print(f"{key}: {value}")
    method: adaptive_saga
    steps: 1
    alpha: 0.0
    variance_ratio: 1.0
    num_filled: 1
    num_batches: 2
  """
  optimizer = getattr(sys.modules.get("flax.nnx"), "Optimizer", ())
  if isinstance(opt_state, optimizer):
    opt_state = opt_state.opt_state
  is_state = lambda node: isinstance(node, _STATES)
  states = [
    (path, node)
    for path, node in jax.tree_util.tree_leaves_with_path(
      _snapshot.as_pure(opt_state), is_leaf=is_state
    )
    if is_state(node)
  ]
  if not states:
    raise ValueError(
      "opt_state holds no state of optax_svrg, got"
      f" {jax.tree.structure(opt_state)}."
    )
  if len(states) == 1:
    return _describe(states[0][1])
  return {
    f"{jax.tree_util.keystr(path)}/{key}": value
    for path, state in states
    for key, value in _describe(state).items()
  }


def _describe(state: Any) -> dict[str, Any]:
  is_svrg = isinstance(state, _snapshot.SVRGState)
  rule = "alpha" if state.estimate is None else "adaptive"
  result = {
    "method": f"{rule}_{'svrg' if is_svrg else 'saga'}",
    "steps": _number(state.count),
    "alpha": _number(state.alpha),
  }
  if state.estimate is not None:
    result["variance_ratio"] = _number(state.estimate.variance_ratio)
  if is_svrg:
    result["num_snapshots"] = _number(state.num_snapshots)
    result["is_finite"] = _number(state.is_finite)
    _warn_without_snapshot(result)
  else:
    is_filled = _concrete(state.is_filled)
    result["num_filled"] = _number(is_filled.sum(axis=-1))
    result["num_batches"] = is_filled.shape[-1]
  return result


def _concrete(x: Any) -> np.ndarray:
  if isinstance(x, jax.core.Tracer):
    raise TypeError(
      "opt_state must be known, but is traced: call summary outside of jax.jit."
    )
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    # Alike on all devices.
    x = x.addressable_data(0)
  return np.asarray(x)


def _number(x: Any) -> Any:
  """Converts to a Python number, or to a list if members of a stack differ."""
  values = _concrete(x)
  if values.ndim and np.all(values == values.flat[0]):
    return values.flat[0].item()
  return values.tolist()


def _warn_without_snapshot(result: dict[str, Any]) -> None:
  if not np.all(result["steps"]) or np.any(result["num_snapshots"]):
    return
  warnings.warn(
    f"{result['method']} has made {result['steps']} updates without a snapshot,"
    " so nothing was corrected: call optax_svrg.take_snapshot.",
    stacklevel=4,
  )
