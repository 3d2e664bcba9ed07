# SPDX-License-Identifier: Apache-2.0
"""Curvature of mini-batch losses, from which a step size follows."""

from collections.abc import Callable, Iterable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import (
  _checks,
  _compat,
  _control_variate,
  _mean_gradient,
  _programs,
  _sharding,
)


def smoothness(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  num_iters: int = 10,
) -> jax.Array:
  r"""Largest curvature of any of these mini-batch losses.

  .. math::

    L = \max_B \lVert \nabla^2 f_B(\theta) \rVert_2

  by the Lanczos method on Hessian-vector products, from a random direction.
  :math:`1 / L` is a step size for SAGA and SVRG that needs no tuning.

  The curvature is that at ``params``; in logistic regression it decreases
  during training, so re-estimate it, e.g. after 1, 2, 4, 8, ... epochs. A
  random sample of ten batches is enough for one to ten epochs.

  The estimate increases with ``num_iters`` and, up to rounding, never exceeds
  :math:`L`. It is exact once ``num_iters`` reaches the number of distinct
  eigenvalues; a largest eigenvalue apart from the rest is found to 1 % in five
  to ten iterations.

  Args:
    grad_fn: a pure, twice differentiable function ``grad_fn(params, batch)`` to
      the mean gradient over that batch; usually ``jax.grad(loss)``. Make it
      once, see :func:`optax_svrg.mean_gradient`. For complex parameters it is
      the gradient that an optimizer needs, the conjugate of that of
      :func:`jax.grad`.
    params: parameters with float or complex leaves.
    batches: an iterable of batches as for :func:`optax_svrg.mean_gradient`, all
      of them or a sample, of the size that steps will have.
    num_iters: number of Hessian-vector products for each batch, at least 1,
      each of which takes about two gradients.

  Returns:
    A real scalar, float32 or, for parameters of double precision, float64. It
    is not finite if a gradient is not.

  Raises:
    TypeError: if ``grad_fn`` cannot be called, ``num_iters`` is not an integer,
      ``batches`` is a mapping or not iterable, or a leaf has an unsuitable
      dtype.
    ValueError: if the curvature of all batches is 0, as for hinge and absolute
      losses (inside :func:`jax.jit` the result is NaN instead); if
      ``num_iters`` is less than 1, ``batches`` or a batch is empty, leaves of a
      batch differ in length, or a gradient does not match ``params``.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> grad = jax.grad(lambda w, x: 0.5 * jnp.mean((x @ w - 1) ** 2))
    >>> batches = jnp.array([[[3., 0.], [0., 1.]], [[2., 0.], [2., 0.]]])
    >>> curvature = optax_svrg.smoothness(grad, jnp.zeros(2), batches)
    >>> print(f"{curvature:.3f}")
    4.500
    >>> tx = optax.chain(optax_svrg.alpha_saga(1.0, len(batches)),
    ...                  optax.sgd(1 / curvature))

  References:
    Gazagnadou et al., `Optimal Mini-Batch and Step Sizes for SAGA
    <https://arxiv.org/abs/1902.00071>`_, 2019; Kuczyński and Woźniakowski,
    `Estimating the Largest Eigenvalue by the Power and Lanczos Algorithms with
    a Random Start <https://doi.org/10.1137/0613066>`_, 1992 (error bounds)
  """
  largest = estimate(grad_fn, params, batches, num_iters)
  if not isinstance(largest, jax.core.Tracer) and largest == 0:
    raise ValueError(
      "the losses of all batches have no curvature at params, as hinge and"
      " absolute losses have none: no step size follows from it. Choose one by"
      " hand."
    )
  return jnp.where(largest == 0, jnp.nan, largest)


def estimate(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  num_iters: int,
) -> jax.Array:
  """Same as :func:`smoothness`, but 0 without curvature."""
  if not callable(grad_fn):
    raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
  _checks.check_inexact(params, "params")
  _checks.check_batches(batches)
  num_iters = _checks.check_count(num_iters, "num_iters")
  fn, args, kwargs = _mean_gradient.split_partial(grad_fn)
  of_batch = _programs.program(
    fn,
    ("smoothness", num_iters),
    lambda call: jax.jit(
      functools.partial(_largest_curvature, call, num_iters)
    ),
    warn_level=3,
  )
  largest = None
  for index, batch in enumerate(batches):
    _checks.check_batch(batch, f"batches[{index}]", is_first=not index)
    curvature = of_batch(args, kwargs, params, _sharding.owned(batch))
    largest = curvature if largest is None else jnp.maximum(largest, curvature)
  if largest is None:
    raise ValueError("batches must hold at least one batch, got none.")
  return largest


def _largest_curvature(
  grad_fn: Callable[..., Any],
  num_iters: int,
  args: Any,
  kwargs: Any,
  params: optax.Params,
  batch: Any,
) -> jax.Array:
  """Returns the spectral norm of the Hessian of one batch."""
  params = _checks.as_arrays(params)

  def gradient(params: optax.Params) -> optax.Updates:
    grads = grad_fn(*args, params, batch, **kwargs)
    _checks.check_same_tree(grads, params, "the result of grad_fn", "params")
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

  def product(direction: Any) -> Any:
    """The Hessian times a direction, in at least float32."""
    rounded = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, params)
    return _widened(jax.jvp(gradient, (params,), (rounded,))[1])

  start = _widened(optax.tree.random_like(jax.random.key(0), params))
  start = _compat.vary_like(start, jax.eval_shape(product, start))
  start = _scaled(start, 1 / jnp.maximum(_norm(start), 1))
  scales = _find_scales(product, start, params)

  def scaled_product(direction: Any) -> Any:
    return _scaled(product(_scaled(direction, scales.before)), scales.after)

  norm = _lanczos(scaled_product, start, num_iters)
  return norm / scales.after / scales.before


class _Scales(NamedTuple):
  """Powers of two that keep a Hessian-vector product within range.

  Attributes:
    before: factor of the direction, which keeps small products from vanishing.
    after: factor of the product, which makes it about 1.
  """

  before: jax.Array
  after: jax.Array


def _find_scales(
  product: Callable[[Any], Any], start: Any, params: optax.Params
) -> _Scales:
  dtype = _scalar_dtype(start)
  max_exponent = min(
    (jnp.finfo(p.dtype).maxexp for p in jax.tree.leaves(params)), default=128
  )
  longer = 2.0 ** (max_exponent // 2)

  def size(scale: float) -> jax.Array:
    parts = map(
      _control_variate.largest_part,
      jax.tree.leaves(product(_scaled(start, jnp.asarray(scale, dtype)))),
    )
    zero = jnp.zeros([], dtype)
    return functools.reduce(jnp.maximum, (x.astype(dtype) for x in parts), zero)

  first = size(1.0)
  is_small = first < 1 / longer
  found = jax.lax.cond(is_small, lambda: size(longer), lambda: first)
  info = jnp.finfo(dtype)
  power = jax.lax.reduce_precision(found, info.nexp, 0)
  most = 2.0 ** (info.maxexp - 2)
  return _Scales(
    before=jnp.where(is_small, jnp.asarray(longer, dtype), 1),
    after=1 / jnp.clip(jnp.where(found > 0, power, 1), 1 / most, most),
  )


def _lanczos(
  product: Callable[[Any], Any], start: Any, num_iters: int
) -> jax.Array:
  """Norm of a symmetric operator on the Krylov space of a unit vector.

  Only two vectors are kept, so orthogonality is lost after dozens of
  iterations; the largest eigenvalue is found before that. Solvers of libraries
  take flat vectors, for which sharded parameters would be gathered.
  """
  eps = float(jnp.finfo(_scalar_dtype(start)).eps)

  def iterate(carry: Any, _: None) -> Any:
    before, vector, beta = carry
    image = product(vector)
    size = _norm(image)
    rest = optax.tree.sub(image, _scaled(before, beta))
    alpha = _dot(rest, vector)
    rest = optax.tree.sub(rest, _scaled(vector, alpha))
    beta = _norm(rest)
    # A rest of rounding alone: the space holds all that the start has.
    beta = jnp.where(beta > 8 * eps * size, beta, 0)
    inverse = jnp.where(beta > 0, 1 / jnp.where(beta > 0, beta, 1), 0)
    return (vector, _scaled(rest, inverse), beta), (alpha, beta)

  zero = _dot(start, start) * 0
  carry = (optax.tree.zeros_like(start), start, zero)
  _, (alphas, betas) = jax.lax.scan(iterate, carry, length=num_iters)
  # The operator on the space, which it may leave in the last step.
  matrix = jnp.zeros((num_iters + 1, num_iters), alphas.dtype)
  steps = jnp.arange(num_iters)
  matrix = matrix.at[steps, steps].set(alphas)
  matrix = matrix.at[steps + 1, steps].set(betas)
  matrix = matrix.at[steps[:-1], steps[1:]].set(betas[:-1])
  return jnp.linalg.svd(matrix, compute_uv=False)[0]


def _widened(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(_checks.wide_dtype(x.dtype)), tree)


def _scalar_dtype(tree: Any) -> Any:
  dtypes = [np.finfo(x.dtype).dtype for x in jax.tree.leaves(tree)]
  return max(dtypes, key=lambda d: d.itemsize, default=np.dtype(np.float32))


def _scaled(tree: Any, factor: jax.Array) -> Any:
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def _dot(a: Any, b: Any) -> jax.Array:
  """The real inner product of two trees."""
  dtype = _scalar_dtype(a)
  products = [
    jnp.sum((x.conj() * y).real).astype(dtype)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  ]
  return sum(products, jnp.zeros([], dtype))


def _norm(tree: Any) -> jax.Array:
  return jnp.sqrt(_dot(tree, tree))
