# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Measures of gradient noise, and of what a snapshot can take away from it."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, get_args, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks

_Per = Literal["component", "leaf", "tree"]


def per_example_grads(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  *,
  chunk_size: int | None = None,
) -> Callable[[optax.Params, Any], optax.Updates]:
  """Makes a function to the gradient of each example of a batch.

  The result is not compiled: wrap it, or what uses it, in :func:`jax.jit`.

  Args:
    loss_fn: a pure function ``loss_fn(params, batch)`` to the mean loss over a
      batch, a real scalar. It is given each example as a batch of one.
    chunk_size: number of examples whose gradients are computed at a time,
      which bounds the memory for intermediate values; the last chunk may be
      short. ``None`` for all at once.

  Returns:
    A function ``fn(params, batch)``. ``params`` is a tree with float or complex
    leaves. ``batch`` is a tree of arrays whose leading axis is the examples, of
    the same length in all leaves; leaves without axes (a number, a PRNG key)
    are given to all examples as they are. It returns a tree with the structure
    and dtypes of ``params``, each leaf with a leading axis of the number of
    examples in front. If the loss is a mean over examples, the mean over that
    axis is the gradient of the batch.

    Inside :func:`jax.shard_map` the examples are those of the device, and so
    are their gradients: unlike with :func:`jax.grad` of replicated parameters,
    nothing is summed over axes over which the loss varies.

  Raises:
    TypeError: if ``loss_fn`` cannot be called or ``chunk_size`` is not an
      integer, and by the function returned: if ``params`` or ``batch`` have a
      leaf of a type that is not fit for it, or the loss is not a real scalar.
    ValueError: if ``chunk_size`` is less than 1, and by the function returned:
      if ``batch`` is empty or its leaves disagree in their number of examples.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> x = jnp.array([[1., 2.], [3., 1.], [2., 2.]])
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w = jnp.array([1.0, -1.0])
    >>> print(jax.jit(optax_svrg.per_example_grads(loss))(w, x))
    [[-2. -4.]
     [12.  4.]
     [ 0.  0.]]

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025
  """
  if not callable(loss_fn):
    raise TypeError(f"loss_fn must be a function, got {loss_fn!r}.")
  if chunk_size is not None:
    chunk_size = _checks.check_count(chunk_size, "chunk_size")
  grad_fn = jax.grad(loss_fn)

  def grads_of(params: optax.Params, batch: Any) -> optax.Updates:
    _checks.check_inexact(params, "params")
    num_examples = _checks.check_batch(batch, "batch")
    leaves, treedef = jax.tree.flatten(batch)
    has_axes = [np.ndim(leaf) > 0 for leaf in leaves]

    def batch_of_one(example: Sequence[Any]) -> Any:
      parts = iter(example)
      return jax.tree.unflatten(
        treedef,
        [
          next(parts)[None] if axes else leaf
          for leaf, axes in zip(leaves, has_axes, strict=True)
        ],
      )

    examples = [
      leaf for leaf, axes in zip(leaves, has_axes, strict=True) if axes
    ]
    losses = lambda p: jax.vmap(lambda e: loss_fn(p, batch_of_one(e)))(examples)
    local = _varying_as(jax.eval_shape(losses, params), params)
    grad_of_one = lambda example: grad_fn(local, batch_of_one(example))
    if chunk_size is None or chunk_size >= num_examples:
      return jax.vmap(grad_of_one)(examples)
    return jax.lax.map(grad_of_one, examples, batch_size=chunk_size)

  return grads_of


def _varying_as(losses: Any, params: optax.Params) -> optax.Params:
  """Parameters that differ from device to device wherever the losses do.

  The gradient of parameters that are the same on all devices would be summed
  over them, and mix their examples.
  """
  varying = frozenset[Any]().union(
    *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(losses))
  )

  def cast(p: Any) -> Any:
    missing = varying - jax.typeof(p).manual_axis_type.varying
    return jax.lax.pcast(p, tuple(missing), to="varying") if missing else p

  return jax.tree.map(cast, params)


class GradientVariance(NamedTuple):
  """Three measures of how much gradients vary, all real scalars.

  Attributes:
    cosine_distance: mean over all pairs of gradients of (1 - cosine) / 2, from
      0 (all point the same way) through 1/2 (orthogonal) to 1 (opposite).
      Pairs with a zero gradient, which has no direction, are left out; it is 0
      if no pair is left.
    total_variance: sum of the variances of all coordinates, in units of the
      gradient squared.
    spectral_norm: largest eigenvalue of the covariance matrix, in the same
      units: the variance along the direction in which it is largest.
  """

  cosine_distance: jax.Array
  total_variance: jax.Array
  spectral_norm: jax.Array


def gradient_variance(grads: optax.Updates) -> GradientVariance:
  r"""The paper's three measures of the variance of gradients.

  .. math::

    \frac{2}{N(N-1)} \sum_{i<j} \frac{1}{2}
    \left(1 - \frac{\langle g_i, g_j \rangle}{\|g_i\| \|g_j\|}\right), \qquad
    \operatorname{tr} C, \qquad \lambda_{\max}(C), \qquad
    C = \frac{1}{N} \sum_i (g_i - \bar{g}) (g_i - \bar{g})^*

  The covariance :math:`C` is never formed: its largest eigenvalue is that of an
  :math:`N \times N` matrix, summed over leaves. Memory beyond ``grads`` is that
  matrix and copies of a leaf at a time. The cosine distance does not depend on
  the lengths of gradients, which may be as large or small as their dtype
  allows; variances must lie in the range of the dtype themselves. The real part
  of inner products of complex gradients is taken. A NaN or infinite gradient
  makes all three NaN.

  Args:
    grads: tree of :math:`N \geq 2` gradients, e.g. of the batches of an epoch
      at the same parameters, or from :func:`optax_svrg.per_example_grads`. Each
      leaf has a leading axis of length :math:`N` and a float or complex dtype.

  Returns:
    A :class:`GradientVariance`, in float32 or in float64 if a leaf is.

  Raises:
    TypeError: if a leaf of ``grads`` is not of a float or complex dtype.
    ValueError: if ``grads`` has no leaves, a leaf has no leading axis or one of
      another length than the first, or there are fewer than two gradients.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> grads = {"w": jnp.array([[3., 0.], [-3., 0.], [0., 0.]])}
    >>> variance = optax_svrg.gradient_variance(grads)
    >>> for name, value in variance._asdict().items():
    ...   print(f"{name} {value:.3f}")
    cosine_distance 1.000
    total_variance 6.000
    spectral_norm 6.000

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025, Table 1
  """
  num_grads = _check_stack(grads, "grads")
  leaves, _ = _wide_leaves(grads, grads)
  centred, (scale, *_) = _centred(leaves, "tree")
  gram = functools.reduce(jnp.add, map(_gram, _same_dtype(centred)))
  total = jnp.trace(gram).real / num_grads
  largest = jnp.linalg.eigvalsh(gram)[-1] / num_grads
  return GradientVariance(
    cosine_distance=_cosine_distance(leaves),
    # Not times the square of the scale, which may not be in range.
    total_variance=total * scale * scale,
    spectral_norm=largest * scale * scale,
  )


def optimal_alpha(
  grads: optax.Updates,
  snapshot_grads: optax.Updates,
  *,
  per: _Per = "component",
) -> Any:
  r"""The coefficients that minimize the variance of corrected gradients.

  .. math::

    \alpha_k = \frac{\operatorname{Cov}(g_k, s_k)}{\operatorname{Var}(s_k)},
    \qquad
    \alpha = \frac{\sum_k \operatorname{Cov}(g_k, s_k)}
    {\sum_k \operatorname{Var}(s_k)}
    = \frac{\sum_k \operatorname{Var}(s_k) \, \alpha_k}
    {\sum_k \operatorname{Var}(s_k)}

  for gradients :math:`g` at the current parameters and :math:`s` of the same
  examples at the snapshot, where :math:`k` runs over the components of a leaf
  or of the whole tree. Both sides are centred first and then scaled, so the
  result does not depend on how large or small the gradients are. Coefficients
  are real: for complex gradients the real part of the covariance is taken.

  A component that never varies at the snapshot, such as a weight of a ReLU that
  is off for all examples, has no coefficient. It is NaN ``per="component"``, so
  that it cannot pass for a coefficient of 0: average with :func:`jax.numpy
  .nanmean`. The other two are averages weighted by variance, in which such
  components have no part; they are NaN only if nothing varies at all.

  Use :class:`optax_svrg.RunningMoments` if the gradients do not fit in memory
  together.

  Args:
    grads: tree of :math:`N \geq 2` gradients at the current parameters, e.g. of
      the batches of an epoch. Each leaf has a leading axis of length :math:`N`
      and a float or complex dtype.
    snapshot_grads: gradients of the same examples at the snapshot, a tree of
      the same structure and shapes.
    per: ``"component"`` for a coefficient per number, as in the paper;
      ``"leaf"`` for one per array; ``"tree"`` for a single one.

  Returns:
    A tree like one gradient; a tree of scalars; or a scalar. Its dtypes are
    real, and float32 or wider.

  Raises:
    TypeError: if a leaf is not of a float or complex dtype.
    ValueError: if ``per`` is none of the three, ``grads`` has no leaves, a leaf
      has no leading axis or one of another length than the first, there are
      fewer than two gradients, or ``snapshot_grads`` differs from ``grads`` in
      structure, shape or kind of dtype.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> grads = jnp.array([[1., 1., 1.], [5., 3., 2.]])
    >>> snapshot_grads = jnp.array([[2., 1., 7.], [4., 5., 7.]])
    >>> print(optax_svrg.optimal_alpha(grads, snapshot_grads))
    [2.  0.5 nan]
    >>> alpha = optax_svrg.optimal_alpha(grads, snapshot_grads, per="tree")
    >>> print(f"{alpha:.3f}")
    0.800

  References:
    Yin et al., `A Coefficient Makes SVRG Effective
    <https://arxiv.org/abs/2311.05589>`_, 2025
  """
  _check_per(per)
  num_grads = _check_stack(grads, "grads")
  _checks.check_inexact(snapshot_grads, "snapshot_grads")
  _checks.check_same_tree(snapshot_grads, grads, "snapshot_grads", "grads")
  g, s = _wide_leaves(grads, snapshot_grads)
  g, g_scales = _centred(g, per)
  s, s_scales = _centred(s, per)
  mean = lambda x: jnp.sum(x, axis=0) / num_grads
  ratios = _ratios(
    [mean(_real_product(a, b)) for a, b in zip(s, g, strict=True)],
    [mean(_real_product(a, a)) for a in s],
    per,
  )
  alphas = [
    ratio * (g_scale / s_scale).reshape(ratio.shape)
    for ratio, g_scale, s_scale in zip(ratios, g_scales, s_scales, strict=True)
  ]
  return _unflatten(jax.tree.structure(grads), alphas, per)


class Payoff(NamedTuple):
  """What noise has cost in an interval of training; real scalars.

  Attributes:
    progress: by how much the loss has fallen, in its units.
    gain: by how much more, at most, it would have fallen with a control
      variate, likewise.
    variance_ratio: the variance that the control variate leaves, as part of
      that without it.
  """

  progress: jax.Array
  gain: jax.Array
  variance_ratio: jax.Array

  def pays(self, cost: Any) -> jax.Array:
    r"""Whether variance reduction is worth its gradients.

    Less noise pays under two conditions. It must lower the loss by more than
    as many gradients would with plain steps, ``gain > (cost - 1) * progress``:
    otherwise steps are what is missing, or they are so small already that noise
    does not matter. And, as smaller steps lessen noise too, for nothing but
    slower progress, the variance must fall by more than the cost,
    ``variance_ratio < 1 / cost``.

    Args:
      cost: gradients per step with variance reduction in those of a plain step:
        3 with a full pass, 2 with :func:`optax_svrg.gradient_table`.

    Returns:
      A boolean scalar; false where the numbers are NaN.
    """
    return (self.gain > (cost - 1) * self.progress) & (
      self.variance_ratio * cost < 1
    )


class RunningMoments(NamedTuple):
  r"""Moments of pairs of gradients that are seen one after the other.

  For :func:`optax_svrg.optimal_alpha` and the variance that a coefficient
  leaves, over a whole pass of batches of which no two gradients need to be held
  at a time. The moments are population moments (divided by the number of
  pairs), in which each pair counts the same; leave out a short last batch,
  whose gradient is noisier. They are updated in a numerically stable way
  (Welford), from differences to the running mean. Memory is five times the
  parameters'. Squares of differences must lie in the range of the dtype, so in
  float32 differences from 1e-19 to 1e19; a variance below that counts as none.

  It is a tree of arrays, whose shapes and dtypes do not change: a carry of
  :func:`jax.lax.scan`, and an argument that can be donated to :func:`jax.jit`.

  Attributes:
    count: number of pairs seen.
    mean_grads: mean of the gradients at the current parameters.
    mean_snapshot_grads: mean of the gradients at the snapshot.
    var_grads: variance of each component of the gradients.
    var_snapshot_grads: variance of each component of those at the snapshot.
    cov: covariance of each component of the two, its real part.

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

  @classmethod
  def create(cls, params: optax.Params) -> "RunningMoments":
    """The moments of no gradients yet.

    Args:
      params: parameters with float or complex leaves, or gradients like those
        to come.

    Returns:
      Zeros, in the dtypes of ``params`` promoted with float32 for the means,
      and real ones of that width for the second moments.

    Raises:
      TypeError: if a leaf of ``params`` is not of a float or complex dtype.
      ValueError: if ``params`` has no leaves.
    """
    _checks.check_inexact(params, "params")
    _check_leaves(params, "params")
    wide = lambda p: _checks.wide_dtype(_checks.dtype_of(p))
    mean = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, wide(p)), params)
    square = lambda: jax.tree.map(
      lambda p: jnp.zeros_like(p, _real_dtype(wide(p))), params
    )
    return cls(
      count=jnp.zeros([], jnp.int32),
      mean_grads=mean(),
      mean_snapshot_grads=mean(),
      var_grads=square(),
      var_snapshot_grads=square(),
      cov=square(),
    )

  def update(
    self, grads: optax.Updates, snapshot_grads: optax.Updates
  ) -> "RunningMoments":
    """The moments with one more pair of gradients.

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

    def moment(old: Any, left: Any, right: Any) -> Any:
      def leaf(m: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        n = count.astype(m.dtype)
        kept = (n - 1) / n
        # The first difference is weighted by 0 before it may overflow.
        weighted = (kept / n).astype(b.dtype) * b
        return kept * m + _real_product(a, weighted)

      return jax.tree.map(leaf, old, left, right)

    return RunningMoments(
      count=count,
      mean_grads=mean(self.mean_grads, g),
      mean_snapshot_grads=mean(self.mean_snapshot_grads, s),
      var_grads=moment(self.var_grads, g, g),
      var_snapshot_grads=moment(self.var_snapshot_grads, s, s),
      cov=moment(self.cov, s, g),
    )

  def optimal_alpha(self, *, per: _Per = "component") -> Any:
    """The coefficients that minimize the variance of corrected gradients.

    Args:
      per: ``"component"``, ``"leaf"`` or ``"tree"``.

    Returns:
      As :func:`optax_svrg.optimal_alpha`: NaN where nothing varies at the
      snapshot, so also before the second pair of gradients.

    Raises:
      ValueError: if ``per`` is none of the three.
    """
    _check_per(per)
    cov, treedef = jax.tree.flatten(self.cov)
    ratios = _ratios(cov, jax.tree.leaves(self.var_snapshot_grads), per)
    return _unflatten(treedef, ratios, per)

  def variance_ratio(self, alpha: Any) -> jax.Array:
    r"""The variance that a coefficient leaves, as part of that without it.

    .. math::

      \frac{\sum_k \operatorname{Var}(g_k - \alpha_k s_k)}
      {\sum_k \operatorname{Var}(g_k)}

    A reduction of the variance pays, roughly, if it is larger than what it
    costs: with one snapshot per epoch the correction takes three gradients per
    example in place of one (its own, that at the snapshot, and that of the pass
    for the mean gradient), as much as batches three times as large, which would
    leave 1/3.

    Args:
      alpha: the coefficient, a real scalar; or a tree of them as
        :meth:`optimal_alpha` gives, whose leaves are scalars or arrays of the
        shapes of the parameters. It is of no account, and may be NaN, where
        nothing varies at the snapshot.

    Returns:
      A scalar, correct to rounding of 1, not of itself; NaN or infinite if the
      gradients do not vary.

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
    # Rounding must not make a variance negative.
    return jnp.maximum(total(left), 0) / total(var)

  def payoff(self, displacement: optax.Updates) -> Payoff:
    r"""What noise has cost since the snapshot, seen from plain steps.

    For an interval of plain steps, e.g. an epoch, that have moved the
    parameters by :math:`d` from those of the snapshot, the loss has changed, up
    to third order, by

    .. math::

      \langle \bar s, d \rangle
      + \tfrac{1}{2} \langle \bar g - \bar s, d \rangle

    The second term, the curvature along the path, holds all that noise has
    cost: its effect of first order averages out. A control variate that leaves
    the share :math:`r` of the variance saves at most :math:`(1 - r)` of it.
    Unlike the variance, this knows the size of the steps and the optimizer that
    made them.

    A few pairs, of batches drawn at random, are enough for a rough answer. Here
    :math:`r` is that of the end of the interval, the worst of it. What it
    cannot see is that noise of today is averaged out tomorrow, when the
    learning rate has decayed.

    Args:
      displacement: the current parameters less those of the snapshot, a tree
        like the parameters. If they are complex, gradients are expected as
        Optax's optimizers take them, i.e. conjugates of those of
        :func:`jax.grad`.

    Returns:
      A :class:`Payoff`. Its gain and variance ratio are NaN if the gradients do
      not vary, so before the second pair.

    Raises:
      ValueError: if ``displacement`` differs from the parameters in structure,
        shape or kind of dtype.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_svrg
      >>> x = jnp.array([3.0, -3.0, 1.0, -1.0])
      >>> grad = jax.grad(lambda w, x: 0.5 * (w - x) ** 2)
      >>> w, snapshot = jnp.array(0.5), jnp.array(-0.5)
      >>> moments = optax_svrg.RunningMoments.create(w)
      >>> for i in range(4):
      ...   moments = moments.update(grad(w, x[i]), grad(snapshot, x[i]))
      >>> payoff = moments.payoff(w - snapshot)
      >>> print(*(f"{x:.1f}" for x in payoff), payoff.pays(cost=3))
      0.0 0.5 0.0 True

    References:
      The trade between noise, curvature and batch size is that of McCandlish et
      al., `An Empirical Model of Large-Batch Training
      <https://arxiv.org/abs/1812.06162>`_, 2018, taken along the path of the
      optimizer instead of along the gradient.
    """
    _checks.check_same_tree(
      displacement,
      self.mean_grads,
      "displacement",
      "the params given to create",
    )

    def along(grads: optax.Updates) -> jax.Array:
      g, d = _wide_leaves(grads, displacement)
      products = map(_real_product, g, d)
      return sum(map(jnp.sum, products), jnp.zeros([], g[0].real.dtype))

    change = optax.tree.sub(self.mean_grads, self.mean_snapshot_grads)
    curvature = along(change) / 2
    ratio = self.variance_ratio(self.optimal_alpha(per="tree"))
    return Payoff(
      progress=-along(self.mean_snapshot_grads) - curvature,
      gain=(1 - ratio).astype(curvature.dtype) * curvature,
      variance_ratio=ratio,
    )

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


def _check_per(per: Any) -> None:
  if per not in get_args(_Per):
    raise ValueError(f"per must be 'component', 'leaf' or 'tree', got {per!r}.")


def _check_leaves(tree: Any, name: str) -> None:
  if not jax.tree.leaves(tree):
    raise ValueError(
      f"{name} must have at least one leaf, got {jax.tree.structure(tree)}."
    )


def _check_stack(grads: Any, name: str) -> int:
  """Returns the number of gradients in a tree with a leading axis of them."""
  _checks.check_inexact(grads, name)
  _check_leaves(grads, name)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    if not np.ndim(leaf):
      raise ValueError(
        f"{name} must have a leading axis of gradients in all leaves, got a"
        f" scalar {_checks.path_of(path)}."
      )
  sizes = _checks.leading_axes(grads)
  num_grads = _checks.check_same_size(sizes, name, "gradients")
  if num_grads < 2:
    raise ValueError(
      f"{name} must hold at least two gradients, got {num_grads}."
    )
  return num_grads


def _real_dtype(dtype: Any) -> Any:
  return np.zeros([], dtype).real.dtype


def _wide_leaves(*trees: Any) -> list[list[jax.Array]]:
  """Leaves of each tree, all in the width of the widest or float32."""
  leaves = [list(map(jnp.asarray, jax.tree.leaves(tree))) for tree in trees]
  dtype = functools.reduce(
    np.promote_types,
    [_real_dtype(_checks.wide_dtype(x.dtype)) for xs in leaves for x in xs],
  )
  return [
    [x.astype(np.promote_types(x.dtype, dtype)) for x in xs] for xs in leaves
  ]


def _same_dtype(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  dtype = np.result_type(*(x.dtype for x in leaves))
  return [x.astype(dtype) for x in leaves]


def _real_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """Real part of the product with a conjugate."""
  if jnp.iscomplexobj(a):
    return a.real * b.real + a.imag * b.imag
  return a * b


def _top(x: jax.Array) -> jax.Array:
  """Largest real and largest imaginary part of each component."""
  if jnp.iscomplexobj(x):
    return jax.lax.complex(_top(x.real), _top(x.imag))
  return jnp.max(x, axis=0, keepdims=True)


def _magnitude(x: jax.Array) -> jax.Array:
  """Largest real or imaginary part, which does not overflow."""
  if jnp.iscomplexobj(x):
    return jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
  return jnp.abs(x)


def _or_one(scale: jax.Array) -> jax.Array:
  """A scale to divide by: 1 where nothing is above what flushes to zero."""
  # Not where it is large enough, which would hide a NaN.
  tiny = scale < jnp.finfo(scale.dtype).tiny
  return jnp.where(tiny, jnp.ones_like(scale), scale)


def _centred(
  leaves: Sequence[jax.Array], per: _Per
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Gradients less their mean, divided by their scale, and the scales.

  Args:
    leaves: arrays with a leading axis of gradients.
    per: what has a scale of its own.

  Returns:
    Arrays of the same shapes, and a scale for each that broadcasts to it; for
    ``"tree"`` all scales are equal scalars.
  """
  # Relative to one of its values a component that is constant is exactly 0, and
  # one with a large mean loses no digits in forming it.
  shifted = [x - _top(x) for x in leaves]
  largest = [_magnitude(x) for x in shifted]
  if per == "component":
    scales = [jnp.max(x, axis=0, keepdims=True) for x in largest]
  else:
    scales = [jnp.max(x, initial=0) for x in largest]
  if per == "tree":
    scales = [functools.reduce(jnp.maximum, scales)] * len(scales)
  scales = [_or_one(scale) for scale in scales]
  scaled = [
    x / scale.astype(x.dtype) for x, scale in zip(shifted, scales, strict=True)
  ]
  return [x - jnp.mean(x, axis=0, keepdims=True) for x in scaled], scales


def _gram(x: jax.Array) -> jax.Array:
  """Inner products of gradients, the first one conjugated."""
  axes = tuple(range(1, x.ndim))
  return jnp.tensordot(
    x.conj(), x, axes=(axes, axes), precision=jax.lax.Precision.HIGHEST
  )


def _cosine_distance(leaves: Sequence[jax.Array]) -> jax.Array:
  """Mean over pairs of gradients of (1 - cosine) / 2.

  With unit vectors u, (1 - cosine) / 2 is a quarter of the squared distance,
  and the sum of squared distances of n pairs is n times that to the mean. So no
  pair is formed, and nearly parallel gradients do not cancel.
  """
  rows = lambda values, x: values.astype(x.dtype).reshape(
    -1, *[1] * (x.ndim - 1)
  )
  axes = lambda x: tuple(range(1, x.ndim))

  # Each gradient has a scale of its own, so that no square leaves the range.
  largest = functools.reduce(
    jnp.maximum,
    [jnp.max(_magnitude(x), axis=axes(x), initial=0) for x in leaves],
  )
  scale = _or_one(largest)
  scaled = [x / rows(scale, x) for x in leaves]
  squares = sum(jnp.sum(_real_product(x, x), axis=axes(x)) for x in scaled)
  is_zero = largest < jnp.finfo(largest.dtype).tiny
  norm = jnp.where(is_zero, 1, jnp.sqrt(squares))
  live = jnp.where(is_zero, jnp.zeros_like(norm), jnp.ones_like(norm))
  num_live = jnp.sum(live)
  distance = jnp.zeros_like(num_live)
  for x in scaled:
    units = rows(live, x) * (x / rows(norm, x))
    mean = jnp.sum(units, axis=0, keepdims=True) / jnp.maximum(
      num_live, 1
    ).astype(x.dtype)
    rest = rows(live, x) * (units - mean)
    distance += jnp.sum(_real_product(rest, rest))
  return distance / (2 * jnp.maximum(num_live - 1, 1))


def _ratios(
  covs: Sequence[jax.Array], variances: Sequence[jax.Array], per: _Per
) -> list[jax.Array]:
  """Cov / Var for each leaf, of its shape or a scalar; NaN without variance."""

  def pooled(xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if per == "component":
      return xs
    sums = [jnp.sum(x) for x in xs]
    if per == "leaf":
      return sums
    return [functools.reduce(jnp.add, _same_dtype(sums))] * len(sums)

  pairs = zip(pooled(covs), pooled(variances), strict=True)
  return [cov / var for cov, var in pairs]


def _unflatten(treedef: Any, ratios: Sequence[jax.Array], per: _Per) -> Any:
  """The coefficients as a tree, or the only one."""
  return ratios[0] if per == "tree" else jax.tree.unflatten(treedef, ratios)
