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
"""The curvature of mini-batch losses, from which a step size follows."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import _checks, _mean_gradient


def smoothness(
  grad_fn: Callable[[optax.Params, Any], optax.Updates],
  params: optax.Params,
  batches: Iterable[Any],
  *,
  num_iters: int = 10,
) -> jax.Array:
  r"""The largest curvature of any of these mini-batch losses.

  .. math::

    L = \max_B \lVert \nabla^2 f_B(\theta) \rVert_2

  by the power method on Hessian-vector products, which start from a random
  direction. A step size of :math:`1 / L` is a default for SAGA and SVRG that
  needs no tuning: the theory of both has :math:`1 / (c L)` with a small
  :math:`c`, for the smoothness of what one step sees. As that is a mini-batch,
  its gain is part of it: the larger the batches, the nearer their curvature
  comes to that of the whole loss, and the longer the step may be.

  The curvature is that at ``params``. In logistic regression it falls as
  the training goes on, by an order of magnitude, far below what bounds of it
  promise, so it pays to estimate it anew now and then: at the start and after
  1, 2, 4, 8, … epochs costs next to nothing. A random sample of ten batches
  tells enough for an epoch or ten. A step that is too long for a few sharp
  batches undoes the progress only slowly, so sample the more batches, the
  longer the estimate has to serve: ``python -m benchmarks.convex`` takes as
  many as there have been epochs.

  Args:
    grad_fn: as for :func:`optax_svrg.mean_gradient`: a pure function
      ``grad_fn(params, batch)`` to the mean gradient over that batch, twice
      differentiable; usually ``jax.grad(loss)``. What it closes over is
      compiled in; make it once. For complex parameters it is the gradient that
      an optimizer needs, the conjugate of that of :func:`jax.grad`.
    params: parameters with float or complex leaves.
    batches: an iterable of batches as for :func:`optax_svrg.mean_gradient`,
      all of them or a sample. Of the size that steps will have.
    num_iters: number of Hessian-vector products for each batch, at least 1,
      each of which takes about two gradients. Few are enough for a step size:
      the estimate rises with them, and is never too large.

  Returns:
    A real scalar, float32 or, for parameters of double precision, float64. It
    is not finite if a gradient is not.

  Raises:
    TypeError: if ``grad_fn`` cannot be called, ``num_iters`` is not an integer,
      ``batches`` is a mapping or not iterable, or leaves of ``params`` or of a
      batch have no dtype that is fit for it.
    ValueError: if ``num_iters`` is less than 1, ``batches`` is empty, a batch
      is empty or its leaves disagree in their number of examples, or a gradient
      differs from ``params`` in structure, shape or kind of dtype.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> loss = lambda w, x: 0.5 * jnp.mean((x @ w - 1) ** 2)
    >>> grad = jax.grad(loss)
    >>> batches = jnp.array([[[3., 0.], [0., 1.]], [[2., 0.], [2., 0.]]])
    >>> w = jnp.zeros(2)
    >>> print(f"{optax_svrg.smoothness(grad, w, batches):.3f}")
    4.500
    >>> print(f"{optax_svrg.smoothness(grad, w, [jnp.concat(batches)]):.3f}")
    4.250
    >>> step_size = 1 / optax_svrg.smoothness(grad, w, batches)
    >>> tx = optax.chain(optax_svrg.alpha_saga(1.0, len(batches)),
    ...                  optax.sgd(step_size))

  References:
    Gazagnadou et al., `Optimal Mini-Batch and Step Sizes for SAGA
    <https://arxiv.org/abs/1902.00071>`_, 2019

    Sebbouh et al., `Towards closing the gap between the theory and practice of
    SVRG <https://arxiv.org/abs/1908.02725>`_, 2019
  """
  if not callable(grad_fn):
    raise TypeError(f"grad_fn must be a function, got {grad_fn!r}.")
  _checks.check_inexact(params, "params")
  _checks.check_batches(batches)
  num_iters = _checks.check_count(num_iters, "num_iters")
  leaves, treedef = _mean_gradient.flatten_grad_fn(grad_fn)
  estimate = _power_method(treedef, num_iters)
  largest = None
  for index, batch in enumerate(batches):
    _checks.check_batch(batch, f"batches[{index}]")
    curvature = estimate(leaves, params, batch)
    largest = curvature if largest is None else jnp.maximum(largest, curvature)
  if largest is None:
    raise ValueError("batches must hold at least one batch, got none.")
  return largest


# Bounded, as in mean_gradient: jax.jit would keep each closure for ever.
@functools.lru_cache(maxsize=16)
def _power_method(treedef: Any, num_iters: int) -> Callable[..., jax.Array]:
  """The jitted power method for one ``grad_fn``, given as a tree structure."""

  @jax.jit
  def estimate(leaves: Any, params: optax.Params, batch: Any) -> jax.Array:
    grad_fn = jax.tree.unflatten(treedef, leaves)
    params = jax.tree.map(jnp.asarray, params)

    def gradient(params: optax.Params) -> optax.Updates:
      grads = grad_fn(params, batch)
      _checks.check_same_tree(grads, params, "the result of grad_fn", "params")
      return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

    def iterate(_: Any, carry: Any) -> Any:
      direction, _ = carry
      product = jax.jvp(gradient, (params,), (direction,))[1]
      return _normalised(product)

    start = optax.tree.random_like(jax.random.key(0), params)
    direction, norm = _normalised(start)
    return jax.lax.fori_loop(
      0, num_iters, iterate, (direction, jnp.zeros_like(norm))
    )[1]

  return estimate


def _normalised(tree: Any) -> tuple[Any, jax.Array]:
  """A tree divided by its norm unless that is 0, and the norm."""
  leaves = jax.tree.leaves(tree)
  dtypes = [np.finfo(_checks.wide_dtype(x.dtype)).dtype for x in leaves]
  dtype = max(dtypes, key=lambda d: d.itemsize, default=np.dtype(np.float32))
  total = jnp.zeros([], dtype)
  for x in leaves:
    wide = jnp.abs(x.astype(_checks.wide_dtype(x.dtype)))
    total += jnp.sum(jnp.square(wide)).astype(dtype)
  norm = jnp.sqrt(total)
  divisor = jnp.where(norm == 0, jnp.ones_like(norm), norm)

  def divide(x: jax.Array) -> jax.Array:
    wide = x.astype(_checks.wide_dtype(x.dtype))
    return (wide / divisor.astype(wide.dtype)).astype(x.dtype)

  return jax.tree.map(divide, tree), norm
