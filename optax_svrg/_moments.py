# SPDX-License-Identifier: Apache-2.0
"""Moments of pairs of gradients that are seen one after the other."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _control_variate, _variance


class RunningMoments(NamedTuple):
  r"""Moments of pairs of gradients that arrive one after the other.

  They give the coefficients of :func:`optax_svrg.optimal_alpha`, and the
  variance that these leave, for gradients that do not fit in memory together.
  Moments are divided by the number of pairs, all pairs of equal weight: leave
  out a short last batch. They are updated by Welford's method, may be as large
  or small as the dtype allows, and take five times the memory of the
  parameters. Shapes and dtypes never change: use them as a carry of
  :func:`jax.lax.scan` or as a donated argument.

  Attributes:
    count: number of pairs seen.
    mean_grads: mean of the gradients at the current parameters.
    mean_snapshot_grads: mean of the gradients at the snapshot.
    var_grads: variance of each component of the gradients, in units of
      ``unit ** 2``.
    var_snapshot_grads: variance of each component of those at the snapshot, in
      the same units.
    cov: real part of the covariance of each component of the two, in the same
      units.
    unit: a power of two: 1 if squares of the gradients are in the range of the
      dtype.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> batches = jnp.arange(12.0).reshape(3, 2, 2) % 5
    >>> grad = jax.grad(lambda w, x: jnp.mean((x @ w) ** 2))
    >>> w, snapshot = jnp.array([1.0, -1.0]), jnp.array([1.5, -1.0])
    >>> def body(moments, batch):
    ...   return moments.update(grad(w, batch), grad(snapshot, batch)), None
    >>> moments = optax_svrg.RunningMoments.create(w)
    >>> moments, _ = jax.lax.scan(body, moments, batches)
    >>> alpha = moments.optimal_alpha(per="tree")
    >>> print(f"{alpha:.3f} leaves {moments.variance_ratio(alpha):.3f}")
    0.751 leaves 0.060
  """

  count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=jnp.int32
  mean_grads: optax.Updates
  mean_snapshot_grads: optax.Updates
  var_grads: Any
  var_snapshot_grads: Any
  cov: Any
  unit: jax.Array

  @classmethod
  def create(cls, params: optax.Params) -> "RunningMoments":
    """Returns the moments of no gradients.

    Args:
      params: parameters with float or complex leaves, or gradients.

    Returns:
      Zeros, in the dtypes of ``params`` promoted with float32.

    Raises:
      TypeError: if a leaf of ``params`` is not of a float or complex dtype.
      ValueError: if ``params`` has no leaves.
    """
    _checks.check_inexact(params, "params")
    _variance.check_leaves(params, "params")
    wide = lambda p: _checks.wide_dtype(_checks.dtype_of(p))
    mean = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
    square = lambda: jax.tree.map(
      lambda p: jnp.zeros_like(p, _variance.real_dtype(wide(p))), params
    )
    return cls(
      count=jnp.zeros([], jnp.int32),
      mean_grads=mean(),
      mean_snapshot_grads=mean(),
      var_grads=square(),
      var_snapshot_grads=square(),
      cov=square(),
      # The least one: it grows with the gradients.
      unit=_control_variate.units(
        min(
          (x.dtype for x in jax.tree.leaves(square())),
          key=lambda dtype: dtype.itemsize,
        )
      )[0],
    )

  def update(
    self, grads: optax.Updates, snapshot_grads: optax.Updates
  ) -> "RunningMoments":
    """Returns the moments with one more pair of gradients.

    Args:
      grads: the gradient of a batch at the current parameters.
      snapshot_grads: the gradient of the same batch at the snapshot.

    Returns:
      The new moments, of the same shapes and dtypes.

    Raises:
      ValueError: if one of the two differs from the parameters in structure,
        shape or kind of dtype.
    """
    for tree, name in ((grads, "grads"), (snapshot_grads, "snapshot_grads")):
      _checks.check_same_tree(
        tree, self.mean_grads, name, "the params given to create"
      )
    count = optax.safe_increment(self.count)
    difference = lambda mean, new: jax.tree.map(
      lambda m, x: jnp.asarray(x, m.dtype) - m, mean, new
    )
    g = difference(self.mean_grads, grads)
    s = difference(self.mean_snapshot_grads, snapshot_grads)

    def mean(old: Any, step: Any) -> Any:
      return jax.tree.map(lambda m, d: m + d / count.astype(m.dtype), old, step)

    tops = [
      _control_variate.largest_part(x).astype(self.unit.dtype)
      for x in jax.tree.leaves((g, s))
    ]
    unit = _control_variate.unit_of(functools.reduce(jnp.maximum, tops))
    unit = jnp.maximum(self.unit, unit)

    def moment(old: Any, left: Any, right: Any) -> Any:
      def leaf(m: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        n = count.astype(m.dtype)
        kept = (n - 1) / n
        a, b = (x * (1 / unit).astype(x.dtype) for x in (a, b))
        rescaled = m * ((self.unit / unit) ** 2).astype(m.dtype)
        # The first difference is weighted by 0 before it may overflow.
        weighted = (kept / n).astype(b.dtype) * b
        return kept * rescaled + _variance.real_product(a, weighted)

      return jax.tree.map(leaf, old, left, right)

    return RunningMoments(
      count=count,
      mean_grads=mean(self.mean_grads, g),
      mean_snapshot_grads=mean(self.mean_snapshot_grads, s),
      var_grads=moment(self.var_grads, g, g),
      var_snapshot_grads=moment(self.var_snapshot_grads, s, s),
      cov=moment(self.cov, s, g),
      unit=unit,
    )

  def optimal_alpha(self, *, per: _variance.Per = "component") -> Any:
    """The coefficients that minimize the variance of corrected gradients.

    Args:
      per: ``"component"``, ``"leaf"`` or ``"tree"``.

    Returns:
      As :func:`optax_svrg.optimal_alpha`: where nothing varies at the snapshot,
      so also before the second pair of gradients, NaN, but 0 for ``"tree"``.

    Raises:
      ValueError: if ``per`` is none of the three.
    """
    _variance.check_per(per)
    cov, treedef = jax.tree.flatten(self.cov)
    ratios = _variance.ratios(
      cov, jax.tree.leaves(self.var_snapshot_grads), per
    )
    return _variance.unflatten(treedef, ratios, per)

  def variance_ratio(self, alpha: Any) -> jax.Array:
    r"""Variance with a coefficient, divided by the variance without.

    .. math::

      \frac{\sum_k \operatorname{Var}(g_k - \alpha_k s_k)}
      {\sum_k \operatorname{Var}(g_k)}

    Args:
      alpha: the coefficient, a real scalar; or a tree of them as from
        :meth:`optimal_alpha`, whose leaves are scalars or arrays of the shapes
        of the parameters. Ignored where the snapshot gradient has zero
        variance.

    Returns:
      A scalar; 1 if nothing varies.

    Raises:
      TypeError: if ``alpha`` is not real.
      ValueError: if ``alpha`` does not have the structure or shapes of the
        parameters.
    """
    var = jax.tree.leaves(self.var_grads)
    dtype = np.result_type(*(v.dtype for v in var))
    left = [
      # Not where it is above 0, which would hide a NaN.
      v + jnp.where(v_s == 0, 0, a * (a * v_s - 2 * cov))
      for v, v_s, cov, a in zip(
        var,
        jax.tree.leaves(self.var_snapshot_grads),
        jax.tree.leaves(self.cov),
        self._coefficients(alpha),
        strict=True,
      )
    ]
    total = lambda xs: sum(jnp.sum(x.astype(dtype)) for x in xs)
    plain, rest = total(var), total(left)
    is_constant = (plain == 0) & (rest == 0)
    # Rounding must not make a variance negative.
    ratio = jnp.maximum(rest, 0) / jnp.where(is_constant, 1, plain)
    return jnp.where(is_constant, 1, ratio)

  def _coefficients(self, alpha: Any) -> list[jax.Array]:
    """A coefficient per leaf, of its shape and dtype."""
    try:
      alphas = jax.tree.leaves(jax.tree.broadcast(alpha, self.cov))
    except ValueError as e:
      raise ValueError(
        "alpha must be a scalar or have the tree structure of the parameters,"
        f" got {jax.tree.structure(alpha)}."
      ) from e
    result = []
    for (path, cov), a in zip(
      jax.tree_util.tree_leaves_with_path(self.cov), alphas, strict=True
    ):
      dtype = _checks.dtype_of(a)
      if not (
        jnp.issubdtype(dtype, jnp.floating)
        or jnp.issubdtype(dtype, jnp.integer)
      ):
        raise TypeError(
          f"alpha must be real, got dtype {dtype} {_checks.path_of(path)}."
        )
      if np.shape(a) not in ((), cov.shape):
        raise ValueError(
          "alpha must have scalars or arrays of the shapes of the parameters,"
          f" got {np.shape(a)} instead of {cov.shape} {_checks.path_of(path)}."
        )
      result.append(jnp.broadcast_to(jnp.asarray(a, cov.dtype), cov.shape))
    return result
