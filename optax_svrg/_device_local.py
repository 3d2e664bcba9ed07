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
"""Gradients that are not reduced over the devices yet."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import optax

from optax_svrg import _checks


def device_local(fn: Callable[..., Any], axis_name: Any) -> Callable[..., Any]:
  """Keeps ``jax.grad`` from summing a gradient over the devices.

  Under the type checking of :func:`jax.shard_map` the gradient of replicated
  parameters is summed over the axis by :func:`jax.grad` itself. With
  ``axis_name``, the transformations of this package and
  :func:`optax_svrg.mean_gradient` take gradients that are not, in order to
  reduce once what would be reduced twice or for each batch. This makes such a
  function of any gradient: it is differentiated with respect to parameters that
  vary over the axis, although they are equal on all devices.

  Under :func:`jax.pmap`, :func:`jax.vmap` and ``check_vma=False`` nothing is
  summed implicitly, and ``fn`` is called as it is.

  Args:
    fn: ``fn(params, *args, **kwargs)`` that differentiates with respect to
      ``params``, usually ``jax.grad(loss)`` or ``jax.value_and_grad(loss)``.
    axis_name: name of the axis (or tuple of names) of the enclosing
      :func:`jax.shard_map`, :func:`jax.pmap` or :func:`jax.vmap`.

  Returns:
    A function with the arguments and results of ``fn``. What it returns is of
    this device alone, values of the loss, too: average them by
    :func:`jax.lax.pmean`.

  Raises:
    TypeError: if ``fn`` cannot be called.
    ValueError: if ``axis_name`` is no enclosing axis, when the function is
      called.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",),
    ...                      axis_types=(jax.sharding.AxisType.Auto,))
    >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
    >>> grad = optax_svrg.device_local(jax.grad(loss), "data")
    >>> mean_grad = jax.shard_map(
    ...     lambda w, x: jax.lax.pmean(grad(w, x), "data"),
    ...     mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    >>> print(jax.jit(mean_grad)(jnp.ones(2), jnp.ones((8, 2))))
    [4. 4.]

  .. seealso:: :func:`jax.lax.pcast`, :func:`optax_svrg.alpha_svrg`
  """
  if not callable(fn):
    raise TypeError(f"fn must be a function, got {fn!r}.")

  @functools.wraps(fn)
  def local(params: optax.Params, *args: Any, **kwargs: Any) -> Any:
    axes = _checks.tracked_axes(axis_name)

    def vary(p: Any) -> Any:
      fixed = axes - jax.typeof(p).manual_axis_type.varying
      return jax.lax.pcast(p, tuple(fixed), to="varying") if fixed else p

    return fn(jax.tree.map(vary, params), *args, **kwargs)

  return local
