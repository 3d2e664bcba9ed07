# SPDX-License-Identifier: Apache-2.0
"""Measures of gradient noise and of the best coefficient."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, get_args, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _compat

Per = Literal["component", "leaf", "tree"]


def per_example_grads(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  *,
  chunk_size: int | None = None,
) -> Callable[[optax.Params, Any], optax.Updates]:
  """Makes a function to the gradient of each example of a batch.

  The result is not compiled: use it inside :func:`jax.jit`.

  Args:
    loss_fn: a pure function ``loss_fn(params, batch)`` to the mean loss over a
      batch, a real scalar. It is given each example as a batch of one.
    chunk_size: number of examples whose gradients are computed at a time, which
      bounds the memory for intermediate values. ``None`` for all at once.

  Returns:
    A function ``fn(params, batch)``. ``params`` is a tree with float or complex
    leaves. ``batch`` is a tree of arrays with a leading axis of examples, of
    the same length in all leaves; scalar leaves are given to all examples as
    they are. It returns a tree like ``params``, each leaf with a leading axis
    of examples. Inside :func:`jax.shard_map`, examples and gradients are those
    of the device: nothing is summed over the axis.

  Raises:
    TypeError: if ``loss_fn`` cannot be called or ``chunk_size`` is not an
      integer; from the function returned, if a leaf of ``params`` or ``batch``
      has an unsuitable type, or the loss is not a real scalar.
    ValueError: if ``chunk_size`` is less than 1; from the function returned, if
      ``batch`` is empty or its leaves differ in their number of examples.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> x = jnp.array([[1., 2.], [3., 1.], [2., 2.]])
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> w = jnp.array([1.0, -1.0])
    >>> print(jax.jit(optax_svrg.per_example_grads(loss))(w, x))
    [[-2. -4.]
     [12.  4.]
     [ 0.  0.]]
  """
  if not callable(loss_fn):
    raise TypeError(f"loss_fn must be a function, got {loss_fn!r}.")
  if chunk_size is not None:
    chunk_size = _checks.check_count(chunk_size, "chunk_size")
  grad_fn = jax.grad(loss_fn)

  def grads_of(params: optax.Params, batch: Any) -> optax.Updates:
    _checks.check_inexact(params, "params")
    num_examples = _checks.check_batch(batch, "batch")
    leaves, treedef = jax.tree.flatten(batch, is_leaf=_checks.is_sparse)
    if any(map(_checks.is_sparse, leaves)):
      raise TypeError(
        "batch must hold dense arrays, as single rows of sparse ones cannot be"
        " mapped over: give their todense()."
      )
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
  """Makes parameters vary over the axes over which the losses do.

  Otherwise their gradient would be summed over devices, which mixes examples.
  """
  varying = frozenset[Any]().union(
    *(_compat.varying_axes(x) for x in jax.tree.leaves(losses))
  )

  def cast(p: Any) -> Any:
    missing = varying - _compat.varying_axes(p)
    return jax.lax.pcast(p, tuple(missing), to="varying") if missing else p

  return jax.tree.map(cast, params)


class GradientVariance(NamedTuple):
  """Three measures of how much gradients vary, all real scalars.

  Attributes:
    cosine_distance: mean over all pairs of gradients of (1 - cosine) / 2, from
      0 (same direction) through 1/2 (orthogonal) to 1 (opposite). Pairs with a
      zero gradient are left out; it is 0 if no pair is left.
    total_variance: sum of the variances of all coordinates, in units of the
      gradient squared.
    spectral_norm: largest eigenvalue of the covariance matrix, in the same
      units.
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
  :math:`N \times N` matrix. Gradients may be as large or small as their dtype
  allows, if the variances themselves are in its range. The real part of inner
  products of complex gradients is taken. A gradient that is not finite makes
  all three NaN.

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
  leaves, _ = wide_leaves(grads, grads)
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
  per: Per = "component",
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
  or of the whole tree. Coefficients are real: of complex gradients the real
  part of the covariance is taken.

  A component without variance at the snapshot has no coefficient: it is NaN
  with ``per="component"`` (average with :func:`jax.numpy.nanmean`), and ignored
  in the other two. If nothing varies at all, the coefficient of a leaf is NaN,
  and that of the tree 0. Use :class:`optax_svrg.RunningMoments` if the
  gradients do not fit in memory together.

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
      fewer than two gradients, or ``snapshot_grads`` does not match ``grads``.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> grads = jnp.array([[1., 1., 1.], [5., 3., 2.]])
    >>> snapshot_grads = jnp.array([[2., 1., 7.], [4., 5., 7.]])
    >>> print(optax_svrg.optimal_alpha(grads, snapshot_grads))
    [2.  0.5 nan]
    >>> alpha = optax_svrg.optimal_alpha(grads, snapshot_grads, per="tree")
    >>> print(f"{alpha:.3f}")
    0.800
  """
  check_per(per)
  num_grads = _check_stack(grads, "grads")
  _checks.check_inexact(snapshot_grads, "snapshot_grads")
  _checks.check_same_tree(snapshot_grads, grads, "snapshot_grads", "grads")
  g, s = wide_leaves(grads, snapshot_grads)
  g, g_scales = _centred(g, per)
  s, s_scales = _centred(s, per)
  mean = lambda x: jnp.sum(x, axis=0) / num_grads
  slopes = ratios(
    [mean(real_product(a, b)) for a, b in zip(s, g, strict=True)],
    [mean(real_product(a, a)) for a in s],
    per,
  )
  alphas = [
    ratio * (g_scale / s_scale).reshape(ratio.shape)
    for ratio, g_scale, s_scale in zip(slopes, g_scales, s_scales, strict=True)
  ]
  return unflatten(jax.tree.structure(grads), alphas, per)


def check_per(per: Any) -> None:
  if per not in get_args(Per):
    raise ValueError(f"per must be 'component', 'leaf' or 'tree', got {per!r}.")


def check_leaves(tree: Any, name: str) -> None:
  if not jax.tree.leaves(tree):
    raise ValueError(
      f"{name} must have at least one leaf, got {jax.tree.structure(tree)}."
    )


def _check_stack(grads: Any, name: str) -> int:
  """Returns the number of gradients in a tree of stacked gradients."""
  _checks.check_inexact(grads, name)
  check_leaves(grads, name)
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


def real_dtype(dtype: Any) -> Any:
  return np.zeros([], dtype).real.dtype


def wide_leaves(*trees: Any) -> list[list[jax.Array]]:
  """Returns the leaves of each tree in the widest dtype, float32 at least."""
  leaves = [list(map(jnp.asarray, jax.tree.leaves(tree))) for tree in trees]
  dtype = functools.reduce(
    np.promote_types,
    [real_dtype(_checks.wide_dtype(x.dtype)) for xs in leaves for x in xs],
  )
  return [
    [x.astype(np.promote_types(x.dtype, dtype)) for x in xs] for xs in leaves
  ]


def _same_dtype(leaves: Sequence[jax.Array]) -> list[jax.Array]:
  dtype = np.result_type(*(x.dtype for x in leaves))
  return [x.astype(dtype) for x in leaves]


def real_product(a: jax.Array, b: jax.Array) -> jax.Array:
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
  leaves: Sequence[jax.Array], per: Per
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Centres gradients and divides them by their scale.

  Args:
    leaves: arrays with a leading axis of gradients.
    per: part that has a scale of its own.

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

  For unit vectors, (1 - cosine) / 2 is a quarter of the squared distance, and
  the sum of the squared distances of n vectors is n times that to the mean. So
  no pair is formed, and nearly parallel gradients do not cancel.
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
  squares = sum(jnp.sum(real_product(x, x), axis=axes(x)) for x in scaled)
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
    distance += jnp.sum(real_product(rest, rest))
  return distance / (2 * jnp.maximum(num_live - 1, 1))


def ratios(
  covs: Sequence[jax.Array], variances: Sequence[jax.Array], per: Per
) -> list[jax.Array]:
  """Cov / Var for each leaf, in its shape or as a scalar.

  Without variance it is NaN, but 0 for ``"tree"``.
  """

  def pooled(xs: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if per == "component":
      return xs
    sums = [jnp.sum(x) for x in xs]
    if per == "leaf":
      return sums
    return [functools.reduce(jnp.add, _same_dtype(sums))] * len(sums)

  pairs = zip(pooled(covs), pooled(variances), strict=True)
  if per == "tree":
    # Not where it is above 0, which would hide a NaN.
    return [
      jnp.where(var == 0, 0, cov / jnp.where(var == 0, 1, var))
      for cov, var in pairs
    ]
  return [cov / var for cov, var in pairs]


def unflatten(treedef: Any, alphas: Sequence[jax.Array], per: Per) -> Any:
  """Returns the coefficients as a tree, or the only one."""
  return alphas[0] if per == "tree" else jax.tree.unflatten(treedef, alphas)
