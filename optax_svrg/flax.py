# SPDX-License-Identifier: Apache-2.0
"""Variance reduction for Flax: NNX functions, and a linen ``TrainState``.

With ``loss_fn(model, batch)``, the mean loss over a batch, a training step is::

  @nnx.jit
  def train_step(model, optimizer, batch):
    loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return loss

and a snapshot::

  optax_svrg.flax.take_snapshot(
      optimizer, model, optax_svrg.flax.mean_grad_fn(loss_fn, model, batches))
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flax import nnx
from flax.training import train_state
import jax
import optax

from optax_svrg import _checks, _mean_gradient, _programs, _snapshot


def grad_fn(
  loss_fn: Callable[..., Any],
  model: nnx.Module,
  *args: Any,
  wrt: Any = nnx.Param,
  has_aux: bool = False,
  **kwargs: Any,
) -> Callable[[nnx.State], nnx.State]:
  """Gradient of a model's loss as a pure function of its parameters.

  All other variables are frozen, including batch statistics and the counts of
  random streams: each call of the result draws the dropout masks which the next
  call of the model will draw. So make it before that call;
  :func:`value_and_grad` does both in the right order.

  Args:
    loss_fn: a function ``loss_fn(model, *args, **kwargs)`` to a scalar loss, or
      to a pair of it and anything else with ``has_aux``.
    model: the model, which is neither changed nor referred to afterwards.
    *args: further arguments of ``loss_fn``, usually the batch.
    wrt: filter of the variables to differentiate with respect to, that of the
      :class:`flax.nnx.Optimizer`.
    has_aux: whether ``loss_fn`` returns a pair.
    **kwargs: further keyword arguments of ``loss_fn``.

  Returns:
    A function from an :class:`flax.nnx.State` of the variables ``wrt`` to a
    state of their gradients: the ``grad_fn`` of :func:`optax_svrg.alpha_svrg`.

  Raises:
    TypeError: if the loss is not a real scalar, when the result is called.
    ValueError: if the result is called with other variables than ``wrt``.

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
  frozen = _freeze(loss_fn, model, wrt, has_aux)
  return lambda params: _grad(
    frozen, loss_fn, frozen.counts, params, *args, **kwargs
  )


def value_and_grad(
  loss_fn: Callable[..., Any], *, wrt: Any = nnx.Param, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Callable]]:
  """Like :func:`flax.nnx.value_and_grad`, but also returns ``grad_fn``.

  Batch statistics and random streams of the model are updated once, as by
  :func:`flax.nnx.value_and_grad`; the returned ``grad_fn`` uses both as they
  were before.

  Args:
    loss_fn: see :func:`grad_fn`.
    wrt: see :func:`grad_fn`.
    has_aux: see :func:`grad_fn`.

  Returns:
    A function from the arguments of ``loss_fn`` to a triple: the value of
    ``loss_fn``; the gradients; and the function :func:`grad_fn` of this batch.
    The last two are what ``optimizer.update(model, grads, grad_fn=grad_fn)``
    takes.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp, optax, optax_svrg
    >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...   loss, grads, grad_fn = optax_svrg.flax.value_and_grad(loss_fn)(
    ...       model, x, y)
    ...   optimizer.update(model, grads, grad_fn=grad_fn)
    ...   return loss
    >>> losses = [train_step(model, optimizer, jnp.ones((4, 2)), 1.0)
    ...           for _ in range(20)]
    >>> bool(losses[-1] < 1e-3 * losses[0])
    True
  """
  live = nnx.value_and_grad(
    loss_fn, argnums=nnx.DiffState(0, wrt), has_aux=has_aux
  )

  def value_and_grad_fn(
    model: nnx.Module, *args: Any, **kwargs: Any
  ) -> tuple[Any, Any, Any]:
    # Before the live pass, which moves random counts and batch statistics.
    frozen_grad_fn = grad_fn(
      loss_fn, model, *args, wrt=wrt, has_aux=has_aux, **kwargs
    )
    value, grads = live(model, *args, **kwargs)
    return value, grads, frozen_grad_fn

  return value_and_grad_fn


def mean_grad_fn(
  loss_fn: Callable[..., Any],
  model: nnx.Module,
  batches: Iterable[Any],
  *,
  wrt: Any = nnx.Param,
  has_aux: bool = False,
  weights: Callable[[Any], Any] | None = None,
  axis_name: Any = None,
) -> Callable[[nnx.State], nnx.State]:
  """Mean gradient of a model's loss over a data set, for a snapshot.

  Batch statistics and random streams of the model do not change. Each batch
  draws the dropout masks which a training pass over the same batches would draw
  next. Batch normalisation in training mode normalises each batch by itself:
  let ``batches`` have the size that they have in training.

  Args:
    loss_fn: a function ``loss_fn(model, batch)`` to a scalar mean loss, or to a
      pair of it and anything else with ``has_aux``. Make it once, see
      :func:`optax_svrg.mean_gradient`.
    model: the model, which is not changed.
    batches: iterable of batches, see :func:`optax_svrg.mean_gradient`. Each
      call of the result iterates over it.
    wrt: see :func:`grad_fn`.
    has_aux: see :func:`grad_fn`.
    weights: see :func:`optax_svrg.mean_gradient`.
    axis_name: see :func:`optax_svrg.mean_gradient`.

  Returns:
    A function from an :class:`flax.nnx.State` of the variables ``wrt`` to a
    state of the mean gradients, in float32 at least: the ``mean_grad_fn`` of
    :func:`take_snapshot`.

  Raises:
    TypeError: as :func:`optax_svrg.mean_gradient`.
    ValueError: as :func:`optax_svrg.mean_gradient`, or if there are other
      variables than ``wrt``, when the result is called.
  """
  _checks.check_batches(batches)
  frozen = _freeze(loss_fn, model, wrt, has_aux)

  def mean_grad(params: nnx.State) -> nnx.State:
    _check_params(params, frozen.static)
    # Its arrays are arguments of compiled functions, not constants.
    pass_grad = jax.tree_util.Partial(
      _pass_grad(loss_fn, frozen.static), frozen.counts, frozen.rest
    )
    indexed = ({"index": i, "batch": b} for i, b in enumerate(batches))
    return _mean_gradient.mean_gradient(
      pass_grad,
      nnx.as_pure(params),
      indexed,
      weights=weights and (lambda x: weights(x["batch"])),
      axis_name=axis_name,
    )

  return mean_grad


def take_snapshot(
  optimizer: nnx.Optimizer,
  model: nnx.Module,
  mean_grad_fn: Callable[[nnx.State], nnx.State],
) -> None:
  """Moves the snapshot of an :class:`flax.nnx.Optimizer` to the model.

  Same as :func:`optax_svrg.take_snapshot`, but changes ``optimizer`` in place.
  Works eagerly and under :func:`flax.nnx.jit`.

  Args:
    optimizer: an optimizer with :func:`optax_svrg.alpha_svrg` or
      :func:`optax_svrg.adaptive_svrg` in its chain.
    model: the model that it optimizes, which is not changed.
    mean_grad_fn: a function from an :class:`flax.nnx.State` of the variables
      ``optimizer.wrt`` to the mean gradient over the data set, a state of the
      same structure and shapes; usually :func:`mean_grad_fn`.

  Raises:
    TypeError: as :func:`optax_svrg.take_snapshot`, or if ``optimizer`` is no
      :class:`flax.nnx.Optimizer`.
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
  if not isinstance(optimizer, nnx.Optimizer):
    raise TypeError(
      "optimizer must be an nnx.Optimizer, got a"
      f" {type(optimizer).__name__}. The order of arguments is take_snapshot("
      "optimizer, model, mean_grad_fn); for a linen TrainState use"
      " optax_svrg.take_snapshot(state, state.params, mean_grad_fn)."
    )
  opt_state = _snapshot.take_snapshot(
    nnx.as_pure(optimizer.opt_state),
    nnx.as_pure(nnx.state(model, optimizer.wrt)),
    mean_grad_fn,
  )
  nnx.update(optimizer.opt_state, nnx.state(opt_state))


class TrainState(train_state.TrainState):
  """Linen's :class:`flax.training.train_state.TrainState` with extra arguments.

  ``apply_gradients`` passes keyword arguments on to the optimizer, such as
  ``grad_fn`` of :func:`optax_svrg.alpha_svrg` and ``batch_index`` of
  :func:`optax_svrg.adaptive_saga`. :func:`optax_svrg.take_snapshot` takes and
  returns it as it is.

  Examples:
    >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_svrg
    >>> model = nn.Dense(1)
    >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 1))
    >>> loss = lambda p, batch: jnp.mean((model.apply(p, batch) - y) ** 2)
    >>> grad = jax.grad(loss)
    >>> tx = optax.chain(optax_svrg.alpha_svrg(0.5), optax.sgd(0.1))
    >>> state = optax_svrg.flax.TrainState.create(
    ...     apply_fn=model.apply, params=model.init(jax.random.key(0), x),
    ...     tx=tx)
    >>> state = optax_svrg.take_snapshot(
    ...     state, state.params,
    ...     lambda p: optax_svrg.mean_gradient(grad, p, [x]))
    >>> @jax.jit
    ... def train_step(state, batch):
    ...   grad_fn = lambda p: grad(p, batch)
    ...   return state.apply_gradients(
    ...       grads=grad_fn(state.params), grad_fn=grad_fn)
    >>> for _ in range(20):
    ...   state = train_step(state, x)
    >>> bool(loss(state.params, x) < 1e-3)
    True
  """

  def apply_gradients(self, *, grads: Any, **kwargs: Any) -> "TrainState":
    """Updates the parameters.

    Args:
      grads: the gradients, a tree like ``params``.
      **kwargs: fields to replace, such as ``batch_stats`` of a subclass; all
        others are extra arguments of the optimizer's update.

    Returns:
      The state with ``step`` increased by one, new ``params`` and
        ``opt_state``.
    """
    fields = {
      key: value
      for key, value in kwargs.items()
      if key in self.__dataclass_fields__
    }
    extra_args = {k: v for k, v in kwargs.items() if k not in fields}
    tx = optax.with_extra_args_support(self.tx)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
      return tx.update(updates, state, params, **extra_args)

    bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
    new = train_state.TrainState.apply_gradients(bound, grads=grads, **fields)
    return new.replace(tx=fields.get("tx", self.tx))


class _Static(NamedTuple):
  """Static part of programs, compared by value.

  Attributes:
    graphdef: the model without its arrays.
    params: tree structure of the variables to differentiate.
    has_aux: whether the loss returns a pair.
    wrt: the filter, for messages.
  """

  graphdef: nnx.GraphDef
  params: Any
  has_aux: bool
  wrt: str


class _Frozen(NamedTuple):
  """A model without the variables to differentiate.

  Attributes:
    static: everything that is not an array.
    counts: counts of the random streams.
    rest: all other variables.
  """

  static: _Static
  counts: Any
  rest: Any


def _freeze(
  loss_fn: Callable[..., Any], model: nnx.Module, wrt: Any, has_aux: bool
) -> _Frozen:
  if not isinstance(model, nnx.Module):
    raise TypeError(
      f"model must be an nnx.Module, got a {type(model).__name__}. The order of"
      " arguments is (loss_fn, model, ...)."
    )
  if not callable(loss_fn):
    raise TypeError(f"loss_fn must be a function, got {loss_fn!r}.")
  graphdef, *states = nnx.split(model, wrt, nnx.RngCount, ...)
  params, counts, rest = map(nnx.as_pure, states)
  name = getattr(wrt, "__name__", repr(wrt))
  static = _Static(graphdef, jax.tree.structure(params), has_aux, name)
  return _Frozen(static, counts, rest)


def _check_params(params: Any, static: _Static) -> None:
  """Raises unless these are the variables ``wrt``."""
  got = jax.tree.structure(nnx.as_pure(params))
  if got != static.params:
    raise ValueError(
      f"wrt={static.wrt} names other variables than those given, which are the"
      f" optimizer's: {got} instead of {static.params}. Give the nnx.Optimizer"
      " and value_and_grad, grad_fn or mean_grad_fn the same wrt."
    )


def _loss_and_counts(
  frozen: _Frozen,
  loss_fn: Any,
  counts: Any,
  params: Any,
  *args: Any,
  **kwargs: Any,
) -> tuple[Any, Any]:
  """Returns the loss, and the counts of the random streams after it."""
  model = nnx.merge(
    frozen.static.graphdef, params, counts, frozen.rest, copy=True
  )
  loss = loss_fn(model, *args, **kwargs)
  counts = nnx.as_pure(nnx.state(model, nnx.RngCount))
  return loss[0] if frozen.static.has_aux else loss, counts


def _grad(
  frozen: _Frozen,
  loss_fn: Any,
  counts: Any,
  params: Any,
  *args: Any,
  **kwargs: Any,
) -> Any:
  """Returns the gradient with the masks which these counts draw."""
  _check_params(params, frozen.static)

  def loss(params: Any) -> Any:
    return _loss_and_counts(frozen, loss_fn, counts, params, *args, **kwargs)[0]

  return jax.grad(loss)(params)


def _pass_grad(loss_fn: Callable[..., Any], static: _Static) -> Any:
  """Makes the gradient of a batch with its index; one object per model."""

  def make(call_loss: Callable[..., Any]) -> Callable[..., Any]:
    def pass_grad(counts: Any, rest: Any, params: Any, indexed: Any) -> Any:
      index, batch = indexed["index"], indexed["batch"]
      frozen = _Frozen(static, counts, rest)
      # How far a batch moves the counts. Of the loss nothing is used, so the
      # compiler drops it.
      after = _loss_and_counts(frozen, call_loss, counts, params, batch)[1]
      moved = jax.tree.map(
        lambda c, a: c + index.astype(c.dtype) * (a - c), counts, after
      )
      return _grad(frozen, call_loss, moved, params, batch)

    return pass_grad

  return _programs.program(loss_fn, ("flax", static), make)
