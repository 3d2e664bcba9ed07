# SPDX-License-Identifier: Apache-2.0
"""State of SVRG, and the function that moves its snapshot."""

from collections.abc import Callable
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _compat, _control_variate, _sharding

FLAT_HINT = (
  " The stored snapshot is a single vector. If optax.flatten made it so,"
  " write optax.chain(alpha_svrg(...), optax.flatten(...)) instead of"
  " optax.flatten(alpha_svrg(...))."
)


class SVRGState(NamedTuple):
  """State of :func:`optax_svrg.alpha_svrg` and :func:`adaptive_svrg`.

  Attributes:
    count: number of updates made, the argument of a schedule.
    num_snapshots: number of snapshots taken; while it is 0, gradients pass
      unchanged.
    alpha: coefficient applied by the last update, for logging: 0 where the
      gradient passed unchanged.
    snapshot_params: copy of the parameters at the last snapshot, in their
      dtypes or in ``snapshot_dtype``.
    mean_grads: mean gradient over the data set at ``snapshot_params``, in the
      parameters' dtypes promoted with float32.
    is_finite: whether ``mean_grads`` are finite; while they are not, gradients
      pass unchanged.
    estimate: averages of :func:`optax_svrg.adaptive_svrg` since the last
      snapshot, otherwise ``None``.
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
  num_snapshots: jax.Array  # shape=(), dtype=jnp.int32
  alpha: jax.Array  # shape=(), JAX's default float dtype
  snapshot_params: optax.Params
  mean_grads: optax.Updates
  is_finite: jax.Array  # shape=(), dtype=jnp.bool_
  estimate: _control_variate.CoefficientEstimate | None = None


def init(
  params: optax.Params, snapshot_dtype: Any, rule: _control_variate.Rule
) -> SVRGState:
  """Returns the state before the first snapshot."""
  _checks.check_inexact(params, "params")
  _checks.check_dtype_fits(params, snapshot_dtype, "snapshot_dtype")
  return SVRGState(
    count=jnp.zeros([], jnp.int32),
    num_snapshots=jnp.zeros([], jnp.int32),
    alpha=jnp.zeros([], float),
    snapshot_params=jax.tree.map(
      lambda p: _copy(p, snapshot_dtype or _checks.dtype_of(p)), params
    ),
    mean_grads=jax.tree.map(
      lambda p: jnp.zeros_like(p, _checks.wide_dtype(_checks.dtype_of(p))),
      params,
    ),
    is_finite=jnp.ones([], bool),
    estimate=rule.init(params),
  )


def take_snapshot(
  opt_state: optax.OptState,
  params: optax.Params,
  mean_grad_fn: Callable[[optax.Params], optax.Updates],
) -> optax.OptState:
  """Moves the snapshot of every SVRG state inside ``opt_state`` to ``params``.

  Call it every epoch (the paper), every so many steps, or at random (loopless
  SVRG). It is a pure function that works eagerly and inside JAX's
  transformations, and keeps the structure, shapes, dtypes and shardings of
  ``opt_state``. The snapshot is a copy, so that parameters and optimizer state
  can be donated together.

  Args:
    opt_state: any nesting of Optax states with one or more
      :class:`optax_svrg.SVRGState` inside; also a
      :class:`optax_svrg.flax.TrainState`. It may be stacked by
      ``jax.vmap(tx.init)``, or replicated for :func:`jax.pmap`.
    params: the parameters, a tree as given to ``init``, stacked as
      ``opt_state`` is.
    mean_grad_fn: a function from parameters to the mean gradient over the data
      set, a tree of the same structure and shapes; usually
      :func:`optax_svrg.mean_gradient`, inside :func:`jax.vmap` or
      :func:`jax.pmap` for stacked parameters. It is called with the snapshot
      rounded to ``snapshot_dtype``, in the parameters' dtypes, once for each
      ``snapshot_dtype`` in use.

  Returns:
    ``opt_state`` with new ``snapshot_params``, ``mean_grads`` and
    ``is_finite``, ``num_snapshots`` increased by one, and the averages of
    :func:`optax_svrg.adaptive_svrg` reset.

  Raises:
    TypeError: if ``mean_grad_fn`` cannot be called.
    ValueError: if there is no :class:`optax_svrg.SVRGState` in ``opt_state``,
      or if ``params`` or the mean gradient do not match it in structure, shape
      or kind of dtype.

  Examples:
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> params = jnp.array([1.0, 2.0])
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.adam(1e-3))
    >>> state = optax_svrg.take_snapshot(tx.init(params), params, jnp.square)
    >>> print(optax.tree.get(state, "mean_grads"))
    [1. 4.]

  References:
    Kovalev et al., `Don't Jump Through Hoops and Remove Those Loops
    <https://arxiv.org/abs/1901.08689>`_, 2019 (loopless SVRG)
  """
  if not callable(mean_grad_fn):
    raise TypeError(f"mean_grad_fn must be a function, got {mean_grad_fn!r}.")
  # An nnx.Optimizer's state has a Variable around each leaf.
  pure_state, pure_params = as_pure(opt_state), as_pure(params)
  nodes = jax.tree.leaves(pure_state, is_leaf=_is_state)
  states = [node for node in nodes if _is_state(node)]
  if not states:
    hint = ""
    if "snapshot_params" in repr(jax.tree.structure(pure_state)):
      hint = _checks.RESTORE_HINT
    raise ValueError(
      "opt_state holds no SVRGState: there is neither alpha_svrg nor"
      f" adaptive_svrg in this optimizer.{hint} Got"
      f" {jax.tree.structure(opt_state)}."
    )
  for state in states:
    _check_params(pure_params, state.snapshot_params)

  leaves, treedef = jax.tree.flatten(params)
  dtypes = [_checks.dtype_of(leaf) for leaf in leaves]

  def like_params(snapshot: list[Any]) -> optax.Params:
    return jax.tree.unflatten(
      treedef, map(jnp.asarray, _sharding.to_device(snapshot), dtypes)
    )

  means: dict[Any, optax.Updates] = {}

  def refresh(node: Any) -> Any:
    if not _is_state(node):
      return node
    stored = _map_unmasked(_copy_into, node.snapshot_params, pure_params)
    # Leaves that a wrapper has masked are not stored: they enter as they are.
    snapshot = jax.tree.leaves(_unmask(stored, pure_params))
    rounding = tuple(map(_checks.dtype_of, snapshot))
    if rounding not in means:
      mean = as_pure(mean_grad_fn(like_params(snapshot)))
      _checks.check_same_tree(
        mean, pure_params, "the result of mean_grad_fn", "params"
      )
      means[rounding] = mean
    mean_grads = _map_unmasked(_copy_into, node.mean_grads, means[rounding])
    return node._replace(
      num_snapshots=optax.safe_increment(jnp.asarray(node.num_snapshots)),
      snapshot_params=stored,
      mean_grads=mean_grads,
      is_finite=_copy_into(node.is_finite, _is_finite(mean_grads, node)),
      estimate=node.estimate and _control_variate.reset(node.estimate),
    )

  new_state = jax.tree.map(refresh, pure_state, is_leaf=_is_state)
  return jax.tree.unflatten(
    jax.tree.structure(opt_state), jax.tree.leaves(new_state)
  )


def has_mean(state: SVRGState) -> jax.Array:
  """Returns whether ``mean_grads`` is set and finite."""
  return (jnp.asarray(state.num_snapshots) > 0) & state.is_finite


def has_masked(tree: Any) -> bool:
  """Returns whether a wrapper has masked part of a tree."""
  return any(
    map(_checks.is_masked, jax.tree.leaves(tree, is_leaf=_checks.is_masked))
  )


def is_flat(tree: Any) -> bool:
  """Returns whether a tree is one vector, as ``optax.flatten`` makes it."""
  return jax.tree_util.all_leaves([tree]) and np.ndim(tree) == 1


def _is_state(node: Any) -> bool:
  return isinstance(node, SVRGState)


def _is_finite(mean_grads: optax.Updates, state: SVRGState) -> jax.Array:
  """Checks a mean gradient for each member of a stacked state."""
  check = _control_variate.all_finite
  for _ in range(np.ndim(state.is_finite)):
    check = jax.vmap(check)
  result = check(_sharding.to_device(mean_grads))
  # Of shards, on all devices: the state must not vary where it did not before.
  axes = _compat.varying_axes(result) - _compat.varying_axes(state.is_finite)
  if not axes:
    return result
  return _control_variate.everywhere([result], tuple(axes))


def as_pure(tree: Any) -> Any:
  """Removes nnx.Variable; there is none before Flax is imported."""
  as_pure = getattr(sys.modules.get("flax.nnx"), "as_pure", None)
  return tree if as_pure is None else as_pure(tree)


def _copy(x: Any, dtype: Any) -> Any:
  """A copy in a buffer of its own, so that params and state can be donated."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
  return jnp.array(_sharding.owned(x), dtype)


def _copy_into(old: Any, new: Any) -> jax.Array:
  """A copy of ``new`` with the dtype and the placement of ``old``."""
  copy = _copy(new, old.dtype)
  concrete = isinstance(old, jax.Array) and not any(
    isinstance(x, jax.core.Tracer) for x in (old, copy)
  )
  # An array that is not committed to its devices follows the others.
  if (
    concrete
    and _compat.is_committed(old)
    and not old.sharding.is_equivalent_to(copy.sharding, copy.ndim)
  ):
    copy = jax.device_put(copy, old.sharding)
  return _sharding.to_memory_of(old, copy)


def _map_unmasked(fn: Callable, masked: Any, full: Any) -> Any:
  """Maps over two trees; masked nodes of the first one stay masked."""
  return jax.tree.map(
    lambda m, x: m if _checks.is_masked(m) else fn(m, x),
    masked,
    full,
    is_leaf=_checks.is_masked,
  )


def _unmask(masked: Any, full: Any) -> Any:
  """Fills the masked places of the first tree from the second."""
  return jax.tree.map(
    lambda m, x: x if _checks.is_masked(m) else m,
    masked,
    full,
    is_leaf=_checks.is_masked,
  )


def _check_params(params: optax.Params, snapshot: optax.Params) -> None:
  """Raises unless ``params`` have the form of a (perhaps masked) snapshot."""
  hint = ""
  if has_masked(snapshot):
    try:
      snapshot = _unmask(snapshot, params)
    except (ValueError, TypeError) as e:
      raise ValueError(
        f"params must have the tree structure given to init: {e}"
      ) from e
  elif is_flat(snapshot):
    hint = FLAT_HINT
  try:
    _checks.check_same_tree(params, snapshot, "params", "the stored snapshot")
  except ValueError as e:
    raise ValueError(f"{e}{hint}") from e
