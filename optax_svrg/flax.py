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
"""Variance reduction for Flax NNX models, without split, merge or as_pure.

A training step with the gradient and its correction from one model::

  @nnx.jit
  def train_step(model, optimizer, batch):
    loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss

and a snapshot::

  optax_svrg.flax.take_snapshot(
      optimizer, model, optax_svrg.flax.mean_grad_fn(loss_fn, model, batches))

where ``loss_fn(model, batch)`` is the mean loss over a batch.
"""

from collections.abc import Callable, Iterable
import dataclasses
from typing import Any

from flax import nnx
import jax

from optax_svrg import _alpha_svrg, _checks, _mean_gradient


def grad_fn(
  loss_fn: Callable[..., Any],
  model: nnx.Module,
  batch: Any,
  *,
  wrt: Any = nnx.Param,
  has_aux: bool = False,
) -> Callable[[nnx.State], nnx.State]:
  """The gradient of a model's loss as a pure function of its parameters.

  Everything else in the model is frozen as it is now: batch statistics and the
  counts of its random streams, so that each call of the result draws the
  dropout masks which the next call of the model will draw. Make it before that
  call; :func:`value_and_grad` does both in the right order.

  Args:
    loss_fn: a function ``loss_fn(model, batch)`` to a scalar loss, or to a pair
      of it and anything else with ``has_aux``.
    model: the model, which is neither changed nor referred to afterwards.
    batch: second argument of ``loss_fn``.
    wrt: filter of the variables to differentiate with respect to, that of the
      :class:`flax.nnx.Optimizer`.
    has_aux: whether ``loss_fn`` returns a pair.

  Returns:
    A function from an :class:`flax.nnx.State` of the variables ``wrt`` to a
    state of their gradients, of the same structure, shapes and dtypes: the
    ``grad_fn`` of :func:`optax_svrg.alpha_svrg`.

  Raises:
    TypeError: if the loss is not a real scalar, as :func:`jax.grad`, when the
      result is called.

  Examples:
    >>> from flax import nnx
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> loss_fn = lambda model, x: jnp.mean(model(x))
    >>> grad_fn = optax_svrg.flax.grad_fn(loss_fn, model, jnp.ones((4, 2)))
    >>> params = nnx.state(model, nnx.Param)
    >>> print(grad_fn(params)["kernel"][...].ravel())
    [1. 1.]
  """
  frozen, counts, rest = _freeze(loss_fn, model, wrt, has_aux)
  return lambda params: frozen.grad(counts, rest, params, batch)


def value_and_grad(
  loss_fn: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False
) -> Callable[[nnx.Module, Any], tuple[Any, Any, Callable]]:
  """Like :func:`flax.nnx.value_and_grad`, with the gradient function beside it.

  Batch statistics and random streams of the model move once, as they do with
  :func:`flax.nnx.value_and_grad`; the returned ``grad_fn`` sees both as they
  were before.

  Args:
    loss_fn: a function ``loss_fn(model, batch)`` to a scalar loss, or to a pair
      of it and anything else with ``has_aux``.
    wrt: filter of the variables to differentiate with respect to, that of the
      :class:`flax.nnx.Optimizer`.
    has_aux: whether ``loss_fn`` returns a pair.

  Returns:
    A function from ``model`` and ``batch`` to a triple: the value of
    ``loss_fn``; the gradients; and the function :func:`grad_fn` of this batch.
    The last two are what ``optimizer.update(model, grads, grad_fn=grad_fn)``
    takes.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, batch):
    ...   loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(
    ...       model, batch)
    ...   optimizer.update(model, grads, grad_fn=grad_fn)
    ...   return loss
    >>> losses = [train_step(model, optimizer, jnp.ones((4, 2)))
    ...           for _ in range(20)]
    >>> bool(losses[-1] < 1e-3 * losses[0])
    True
  """
  live = nnx.value_and_grad(
    loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux
  )

  def value_and_grad_fn(model: nnx.Module, batch: Any) -> tuple[Any, Any, Any]:
    # Before the live pass, which moves random counts and batch statistics.
    frozen_grad_fn = grad_fn(loss_fn, model, batch, wrt=wrt, has_aux=has_aux)
    value, grads = live(model, batch)
    return value, grads, frozen_grad_fn

  return value_and_grad_fn


def mean_grad_fn(
  loss_fn: Callable[..., Any],
  model: nnx.Module,
  batches: Iterable[Any],
  *,
  wrt: Any = nnx.Param,
  has_aux: bool = False,
  axis_name: Any = None,
) -> Callable[[nnx.State], nnx.State]:
  """The mean gradient of a model's loss over a data set, for a snapshot.

  Neither batch statistics nor random streams of the model move. Each batch
  draws its own dropout masks: those which a pass of training over the same
  batches would draw, starting from the model as it is now. A model with batch
  normalisation in training mode normalises each batch by itself, as in
  training: let ``batches`` have the size that they have there.

  Args:
    loss_fn: a function ``loss_fn(model, batch)`` to a scalar mean loss, or to a
      pair of it and anything else with ``has_aux``. As in
      :func:`optax_svrg.mean_gradient`, it is compiled once if it is the same
      function object each time.
    model: the model, which is not changed.
    batches: iterable of batches, see :func:`optax_svrg.mean_gradient`. Each
      call of the result iterates over it.
    wrt: filter of the variables to differentiate with respect to, that of the
      :class:`flax.nnx.Optimizer`.
    has_aux: whether ``loss_fn`` returns a pair.
    axis_name: see :func:`optax_svrg.mean_gradient`.

  Returns:
    A function from an :class:`flax.nnx.State` of the variables ``wrt`` to a
    state of the mean gradients, of the same structure and shapes, in float32
    at least: the ``mean_grad_fn`` of :func:`take_snapshot`.

  Raises:
    TypeError: as :func:`optax_svrg.mean_gradient`.
    ValueError: as :func:`optax_svrg.mean_gradient`, when the result is called.
  """
  _checks.check_batches(batches)
  # A Partial, as its arrays are arguments of compiled functions, not constants.
  frozen = jax.tree_util.Partial(*_freeze(loss_fn, model, wrt, has_aux))

  def mean_grad(params: nnx.State) -> nnx.State:
    indexed = ({"index": i, "batch": b} for i, b in enumerate(batches))
    return _mean_gradient.mean_gradient(
      frozen, nnx.as_pure(params), indexed, axis_name=axis_name
    )

  return mean_grad


def take_snapshot(
  optimizer: nnx.Optimizer,
  model: nnx.Module,
  mean_grad_fn: Callable[[nnx.State], nnx.State],
) -> None:
  """Moves the snapshot of an :class:`flax.nnx.Optimizer` to the model.

  The same as :func:`optax_svrg.take_snapshot`, but, like everything in NNX,
  it changes ``optimizer`` in place. Works eagerly and under
  :func:`flax.nnx.jit`.

  Args:
    optimizer: an optimizer with :func:`optax_svrg.alpha_svrg` or
      :func:`optax_svrg.adaptive_svrg` in its chain.
    model: the model that it optimizes, which is not changed.
    mean_grad_fn: a function from an :class:`flax.nnx.State` of the variables
      ``optimizer.wrt`` to the mean gradient over the data set, a state of the
      same structure and shapes; usually :func:`mean_grad_fn`.

  Raises:
    TypeError: as :func:`optax_svrg.take_snapshot`.
    ValueError: as :func:`optax_svrg.take_snapshot`.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, x: jnp.mean(model(x))
    >>> batches = [jnp.ones((4, 2)), 3 * jnp.ones((4, 2))]
    >>> optax_svrg.flax.take_snapshot(
    ...     optimizer, model,
    ...     optax_svrg.flax.mean_grad_fn(loss_fn, model, batches))
    >>> mean = optax.tree.get(optimizer.opt_state, "mean_grads")
    >>> print(mean["kernel"][...].ravel())
    [2. 2.]
  """
  opt_state = _alpha_svrg.take_snapshot(
    nnx.as_pure(optimizer.opt_state),
    nnx.as_pure(nnx.state(model, optimizer.wrt)),
    mean_grad_fn,
  )
  nnx.update(optimizer.opt_state, nnx.state(opt_state))


@dataclasses.dataclass(frozen=True)
class _FrozenGrad:
  """Gradient of ``loss_fn`` with respect to part of a model.

  Compares by value, so that a new one for the same model is not compiled anew.
  """

  loss_fn: Callable[..., Any]
  graphdef: nnx.GraphDef
  has_aux: bool

  def grad(self, counts: Any, rest: Any, params: Any, batch: Any) -> Any:
    """The gradient with the masks which these counts draw."""
    return jax.grad(lambda p: self._loss_and_counts(counts, rest, p, batch)[0])(
      params
    )

  def __call__(
    self, counts: Any, rest: Any, params: Any, indexed_batch: Any
  ) -> Any:
    """The gradient of the batch with this index in a pass over batches."""
    index, batch = indexed_batch["index"], indexed_batch["batch"]
    # How far a batch moves the counts. Of the loss nothing is used, so the
    # compiler drops it.
    after = self._loss_and_counts(counts, rest, params, batch)[1]
    counts = jax.tree.map(
      lambda c, a: c + index.astype(c.dtype) * (a - c), counts, after
    )
    return self.grad(counts, rest, params, batch)

  def _loss_and_counts(
    self, counts: Any, rest: Any, params: Any, batch: Any
  ) -> tuple[Any, Any]:
    model = nnx.merge(self.graphdef, params, counts, rest, copy=True)
    loss = self.loss_fn(model, batch)
    counts = nnx.as_pure(nnx.state(model, nnx.RngCount))
    return loss[0] if self.has_aux else loss, counts


def _freeze(
  loss_fn: Callable[..., Any], model: nnx.Module, wrt: Any, has_aux: bool
) -> tuple[_FrozenGrad, Any, Any]:
  """The gradient, and the model's random counts and what else is in it."""
  graphdef, *states = nnx.split(model, wrt, nnx.RngCount, ...)
  _, counts, rest = states
  frozen = _FrozenGrad(loss_fn, graphdef, has_aux)
  return frozen, nnx.as_pure(counts), nnx.as_pure(rest)
