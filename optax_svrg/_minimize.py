# SPDX-License-Identifier: Apache-2.0
"""Minimises the mean of a loss over a data set by SAGA or SVRG."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import importlib
import math
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_svrg import (
  _checks,
  _programs,
  _saga,
  _smoothness,
  _snapshot,
  _svrg,
)

Prox = Callable[[optax.Params, Any], optax.Params]

_NUM_BATCHES, _MIN_BATCH_SIZE = 100, 8
_NUM_PROBED = 8  # Batches at least that the step size is estimated from.
_MAX_BLOCK = 5  # Epochs of SAGA between two evaluations.
_MAX_FAILURES = 20
_PATIENCE = 50  # Epochs at least without progress.


class HistoryPoint(NamedTuple):
  """State of :func:`optax_svrg.minimize` after a number of epochs.

  Attributes:
    num_epochs: number of epochs so far.
    loss: mean loss over the data set.
    gradient_norm: as in :class:`MinimizeResult`.
    step_size: that of the epochs before.
  """

  num_epochs: int
  loss: float
  gradient_norm: float
  step_size: float


class MinimizeResult(NamedTuple):
  """Result of :func:`optax_svrg.minimize`.

  Attributes:
    params: the parameters of least ``gradient_norm`` that were found.
    num_epochs: number of epochs.
    gradient_norm: Euclidean norm of the gradient of the mean loss or, with
      ``prox``, of the proximal gradient mapping
      ``(params - prox(params - s * gradient, s)) / s`` for the step size ``s``.
    step_size: the last one.
    converged: whether ``gradient_norm`` is at most ``tol``.
    history: a :class:`HistoryPoint` for each evaluation.
  """

  params: optax.Params
  num_epochs: int
  gradient_norm: float
  step_size: float
  converged: bool
  history: list[HistoryPoint]


def minimize(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  params: optax.Params,
  data: Any,
  *,
  method: str | optax.GradientTransformation = "saga",
  batch_size: int | None = None,
  prox: Prox | None = None,
  tol: float = 1e-6,
  max_epochs: int = 1000,
  seed: int = 0,
  progress: bool = False,
) -> MinimizeResult:
  r"""Minimises the mean of a loss over a data set, to high precision.

  .. math::

    \min_\theta \; \frac{1}{n} \sum_{i=1}^n f_i(\theta) + h(\theta)

  by SAGA or SVRG over mini-batches, whose noise vanishes as they converge. The
  step size is one over the largest curvature of some batches
  (:func:`optax_svrg.smoothness`), estimated after 0, 1, 2, 4, 8, … epochs. If
  epochs make things worse, they are undone and the step is shortened, so that
  the result is never worse than ``params`` and always finite. Where ``f`` is
  convex with a positive definite Hessian, and ``h`` convex, the iterates
  converge linearly to the minimum.

  For a non-convex loss expect a stationary point, at which ``gradient_norm``
  is small, and no more: the curvature where the steps begin may say little
  about that elsewhere, so that the guard has to shorten steps, and neural
  networks are better trained with an optimizer of their own after
  :func:`optax_svrg.adaptive_saga`.

  Linear models are solved many times faster by :func:`optax_svrg.fit_linear`.

  Args:
    loss_fn: a pure function ``loss_fn(params, batch)`` to the mean loss over a
      batch, a real scalar, with all regularisation that is not in ``prox``.
      Programs are compiled for each function object: make it once.
    params: where to start: a tree with float or complex leaves.
    data: a tree of arrays whose leading axis is the examples, of which there
      may be any number; a short batch is weighted by its size. Leaves without
      axes are the same for all batches. Leaves that are sharded over the first
      axis stay so; the batch size is rounded up to a multiple of the shards.
    method: ``"saga"`` for :func:`optax_svrg.alpha_saga`; ``"svrg"`` for
      :func:`optax_svrg.alpha_svrg` with a snapshot and a table of gradients for
      each epoch; or a transformation of this package or a chain that begins
      with one. Its updates are multiplied by minus the step size.
    batch_size: number of examples of a batch, ``None`` for about 100 batches of
      at least 8 examples. The table takes the memory of as many copies of the
      parameters as there are batches. Smaller batches need fewer epochs, larger
      ones less time for each.
    prox: the proximal operator ``prox(params, step_size)`` of ``h``, e.g.
      :func:`optax_svrg.prox_l1`; ``None`` if there is no ``h``.
    tol: positive; stops when ``gradient_norm`` is at most this.
    max_epochs: stops after so many epochs. An epoch takes one gradient per
      example, with ``"svrg"`` two; the evaluations between epochs are extra.
    seed: of the division into batches and of their order.
    progress: whether to show a progress bar with the gradient norm, which needs
      ``rich`` or ``tqdm``.

  Returns:
    A :class:`MinimizeResult`.

  Raises:
    ImportError: if ``progress`` is set and neither package is installed.
    TypeError: if an argument has the wrong type, or leaves of ``params`` have
      no dtype that is fit for it.
    ValueError: if an argument is out of range, ``data`` has no examples or
      leaves of different lengths, ``method`` is unknown, or the loss at
      ``params`` is not finite.

  Warns:
    UserWarning: in one line if ``tol`` is not reached, with the reason and what
      to do.

  Examples:
    >>> import jax, jax.numpy as jnp, optax_svrg
    >>> x = jax.random.normal(jax.random.key(0), (203, 3))
    >>> y = x @ jnp.array([1.0, -2.0, 0.0])
    >>> loss = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2) / 2
    >>> result = optax_svrg.minimize(loss, jnp.zeros(3), (x, y), tol=1e-4)
    >>> print(result.converged, jnp.abs(result.params).round(2))
    True [1. 2. 0.]
    >>> lasso = optax_svrg.minimize(loss, jnp.zeros(3), (x, y), tol=1e-4,
    ...                             prox=optax_svrg.prox_l1(0.1))
    >>> print(lasso.params[2])
    0.0

  References:
    Defazio et al., `SAGA: A Fast Incremental Gradient Method With Support for
    Non-Strongly Convex Composite Objectives
    <https://arxiv.org/abs/1407.0202>`_, 2014

    Johnson and Zhang, `Accelerating Stochastic Gradient Descent using
    Predictive Variance Reduction <https://papers.nips.cc/paper/4937>`_, 2013

  .. seealso:: :func:`optax_svrg.fit_linear`, :func:`optax_svrg.smoothness`
  """
  for function, name in ((loss_fn, "loss_fn"), (prox, "prox")):
    if not (callable(function) or (name == "prox" and prox is None)):
      raise TypeError(f"{name} must be a function, got {function!r}.")
  _checks.check_inexact(params, "params")
  num_examples = _checks.check_batch(data, "data")
  _checks.check_positive(tol, "tol")
  max_epochs = _checks.check_count(max_epochs, "max_epochs")
  rng = np.random.default_rng(_checks.check_count(seed, "seed", 0))
  bar = progress_bar(progress, "minimize", max_epochs)
  if batch_size is None:
    batch_size = max(_MIN_BATCH_SIZE, -(-num_examples // _NUM_BATCHES))
  batch_size = min(_checks.check_count(batch_size, "batch_size"), num_examples)
  batches, params = _arrange(data, params, num_examples, batch_size, rng)
  method = _transformation(method)
  programs = _programs.program(
    loss_fn,
    ("minimize", method, prox, batches.number),
    lambda call: _Programs(call, method, prox, batches.number),
  )
  _check_table(programs.tx.init(params), batches.number)
  run = _Run(programs, params, batches, rng, tol, max_epochs)
  with bar as report:
    run.solve(report)
  best = run.best
  if not best.norm <= tol:
    warnings.warn(
      not_converged("minimize", run.count, max_epochs, best.norm, tol),
      stacklevel=2,
    )
  return MinimizeResult(
    best.params,
    run.count,
    best.norm,
    run.step_size,
    best.norm <= tol,
    run.history,
  )


# Cached, so that programs compiled for one of them serve the next one, too.
@functools.lru_cache(maxsize=128)
def prox_l1(l1: float) -> Prox:
  """Proximal operator of ``l1`` times the sum of absolute values.

  Args:
    l1: a number that is not negative.

  Returns:
    A function ``prox(params, step_size)`` that moves every component of every
    leaf towards 0 by ``l1 * step_size``, and no farther.

  Raises:
    TypeError: if ``l1`` is not a real number.
    ValueError: if it is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> print(optax_svrg.prox_l1(2.0)(jnp.array([3.0, -0.5]), 0.5))
    [2. 0.]
  """
  return prox_elastic_net(l1, 0.0)


@functools.lru_cache(maxsize=128)
def prox_elastic_net(l1: float, l2: float) -> Prox:
  r"""Proximal operator of the elastic net: of l1 ‖x‖₁ + l2/2 ‖x‖².

  Args:
    l1: a number that is not negative.
    l2: a number that is not negative.

  Returns:
    A function ``prox(params, step_size)`` that applies it to every leaf.

  Raises:
    TypeError: if ``l1`` or ``l2`` is not a real number.
    ValueError: if one of them is negative or not finite.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> prox = optax_svrg.prox_elastic_net(2.0, 2.0)
    >>> print(prox(jnp.array([3.0, -0.5]), 0.5))
    [1. 0.]
  """
  l1, l2 = check_not_negative(l1, "l1"), check_not_negative(l2, "l2")

  def prox(params: optax.Params, step_size: Any) -> optax.Params:
    def shrunk(x: jax.Array) -> jax.Array:
      step = jnp.asarray(step_size, x.dtype)
      return (x - jnp.clip(x, -l1 * step, l1 * step)) / (1 + l2 * step)

    return jax.tree.map(shrunk, params)

  return prox


@functools.lru_cache(maxsize=1)
def prox_nonnegative() -> Prox:
  """Projection of every component to the numbers that are not negative.

  Returns:
    A function ``prox(params, step_size)``.

  Examples:
    >>> import jax.numpy as jnp, optax_svrg
    >>> print(optax_svrg.prox_nonnegative()(jnp.array([3.0, -0.5]), 0.5))
    [3. 0.]
  """
  return lambda params, step_size: jax.tree.map(
    lambda x: jnp.maximum(x, jnp.zeros([], x.dtype)), params
  )


class _Batches(NamedTuple):
  """The examples in fixed batches.

  Attributes:
    full: leaves ``(num_full, batch_size, ...)``.
    short: leaves ``(rest, ...)``, ``None`` if there is no rest.
    shared: leaves of the data without axes, ``None`` elsewhere.
    weights: ``(number,)``, of mean 1, proportional to the sizes of batches.
  """

  full: Any
  short: Any
  shared: Any
  weights: jax.Array

  @property
  def number(self) -> int:
    return len(self.weights)


def _arrange(
  data: Any, params: optax.Params, n: int, size: int, rng: Any
) -> tuple[_Batches, optax.Params]:
  """Divides examples at random into batches, on the devices they are on."""
  params = jax.tree.map(jnp.asarray, params)
  shared = jax.tree.map(lambda x: None if np.ndim(x) else x, data)
  data = jax.tree.map(lambda x: x if np.ndim(x) else None, data)
  shardings = [_sharding_of(x) for x in jax.tree.leaves(data)]
  meshes = [s.mesh for s in shardings if s is not None]
  if meshes:
    shards = math.lcm(*(s.num_devices for s in shardings if s is not None))
    size = min(-(-size // shards) * shards, n // shards * shards or n)
    replicated = jax.sharding.NamedSharding(
      meshes[0], jax.sharding.PartitionSpec()
    )
    params = jax.device_put(params, replicated)
  order = rng.permutation(n)
  whole = n // size * size

  def split(x: Any) -> tuple[Any, Any]:
    sharding = _sharding_of(x)
    if sharding is None:
      x = np.asarray(x)[order] if not isinstance(x, jax.Array) else x[order]
      full = x[:whole].reshape(-1, size, *x.shape[1:])
      return jax.device_put(full), jax.device_put(x[whole:])
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.jit(
      lambda x, order: (
        x[order[:whole]].reshape(-1, size, *x.shape[1:]),
        x[order[whole:]],
      ),
      out_shardings=(
        jax.sharding.NamedSharding(sharding.mesh, spec),
        replicated,
      ),
    )(x, order)

  leaves, treedef = jax.tree.flatten(data)
  full, short = zip(*map(split, leaves), strict=True)
  sizes = np.full(whole // size, size, np.float64)
  if whole < n:
    sizes = np.append(sizes, n - whole)
  return _Batches(
    jax.tree.unflatten(treedef, full),
    jax.tree.unflatten(treedef, short) if whole < n else None,
    shared,
    (sizes / sizes.mean()).astype(np.float32),
  ), params


def _sharding_of(x: Any) -> Any:
  """The sharding of an array that is spread over its first axis, or None."""
  sharding = getattr(x, "sharding", None)
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  return sharding if sharding.num_devices > 1 else None


def _transformation(method: Any) -> Any:
  """Returns a name or a transformation."""
  if isinstance(method, str) and method not in ("saga", "svrg"):
    raise ValueError(f'method must be "saga" or "svrg", got {method!r}.')
  if not isinstance(method, (str, optax.GradientTransformation)):
    raise TypeError(
      'method must be "saga", "svrg" or a gradient transformation, got'
      f" {method!r}."
    )
  return method


def _check_table(state: Any, number: int) -> None:
  """Raises ValueError if a given SAGA is for another number of batches."""
  for part in filter(_is_saga, jax.tree.leaves(state, is_leaf=_is_saga)):
    if part.is_filled.shape != (number,):
      raise ValueError(
        f"method must have a table of the {number} batches that batch_size"
        f" gives, got one of {part.is_filled.size}."
      )


class _Programs:
  """The compiled functions for one loss and method."""

  def __init__(
    self,
    loss_fn: Callable[..., Any],
    method: Any,
    prox: Prox | None,
    number: int,
  ):
    if method == "saga":
      method = _saga.alpha_saga(1.0, number)
    elif method == "svrg":
      method = _svrg.alpha_svrg(1.0)
    self.tx = optax.with_extra_args_support(method)
    self.loss_fn, self.prox, self.number = loss_fn, prox, number
    self.evaluate, self.epoch = jax.jit(self._evaluate), jax.jit(self._epoch)

  def value_and_grad(self, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    loss, grads = jax.value_and_grad(self.loss_fn)(params, batch)
    return loss, jax.tree.map(jnp.conj, grads)  # Only of complex leaves.

  def gradient(self, params: Any, batch: Any) -> Any:
    return self.value_and_grad(params, batch)[1]

  def weighted(self, params: Any, batches: _Batches, i: Any) -> Any:
    """Loss and gradient of a batch, times its weight."""

    def full() -> Any:
      batch = jax.tree.map(lambda x: x[i], batches.full)
      return self.value_and_grad(params, _joined(batch, batches.shared))

    def short() -> Any:
      batch = _joined(batches.short, batches.shared)
      return self.value_and_grad(params, batch)

    if batches.short is None:
      loss, grads = full()
    else:
      loss, grads = jax.lax.cond(i < self.number - 1, full, short)
    weight = jnp.asarray(batches.weights)[i]
    return jax.tree.map(lambda x: x * weight.astype(x.dtype), (loss, grads))

  def step(self, params: Any, updates: Any, step_size: jax.Array) -> Any:
    params = jax.tree.map(
      lambda p, u: p - step_size.astype(p.real.dtype) * u, params, updates
    )
    return params if self.prox is None else self.prox(params, step_size)

  def mapping_norm(self, params: Any, grads: Any, step_size: jax.Array) -> Any:
    if self.prox is not None:
      new = self.step(params, grads, step_size)
      grads = jax.tree.map(
        lambda p, q: (p - q) / step_size.astype(p.real.dtype), params, new
      )
    return optax.tree.norm(grads)

  def _evaluate(
    self, params: Any, state: Any, batches: _Batches, step_size: jax.Array
  ) -> tuple[jax.Array, jax.Array, Any, Any]:
    """Loss, norm, the state made ready, and for SVRG the table of gradients."""
    uses_snapshot = _holds(state, _snapshot.SVRGState)

    def add(carry: Any, i: jax.Array) -> Any:
      total, mean, state = carry
      loss, grads = self.weighted(params, batches, i)
      if not uses_snapshot:
        # Fills the table of SAGA; the updates are dropped.
        _, state = self.tx.update(grads, state, params, batch_index=i)
      mean = jax.tree.map(lambda m, g: m + g / self.number, mean, grads)
      carry = total + loss / self.number, mean, state
      return carry, grads if uses_snapshot else None

    loss_like = jax.eval_shape(self.weighted, params, batches, 0)[0]
    zeros = jax.tree.map(jnp.zeros_like, (loss_like, params))
    (loss, mean, filled), table = jax.lax.scan(
      add, (*zeros, state), jnp.arange(self.number)
    )
    if uses_snapshot:
      state = _snapshot.take_snapshot(state, params, lambda _: mean)
    else:  # No steps have been made: the rest of a chain has seen nothing.
      state = jax.tree.map(
        lambda old, new: new if _is_saga(old) else old,
        state,
        filled,
        is_leaf=_is_saga,
      )
    return loss, self.mapping_norm(params, mean, step_size), state, table

  def _epoch(
    self,
    params: Any,
    state: Any,
    table: Any,
    batches: _Batches,
    order: jax.Array,
    step_size: jax.Array,
  ) -> tuple[Any, Any]:
    """Steps through all batches."""

    def step(carry: Any, i: jax.Array) -> Any:
      params, state = carry
      _, grads = self.weighted(params, batches, i)
      extra = {"batch_index": i}
      if table is not None:
        extra["snapshot_grads"] = jax.tree.map(lambda t: t[i], table)
      updates, state = self.tx.update(grads, state, params, **extra)
      return (self.step(params, updates, step_size), state), None

    return jax.lax.scan(step, (params, state), order)[0]


# Bounded, as in mean_gradient: jax.jit would keep each closure for ever.
def _joined(batch: Any, shared: Any) -> Any:
  """Data with the leaves that have no axes put back."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    batch,
    shared,
    is_leaf=lambda x: x is None,
  )


def _is_saga(x: Any) -> bool:
  return isinstance(x, _saga.SAGAState)


def _holds(state: Any, kind: type) -> bool:
  """Returns whether an optimizer state holds one of a kind."""
  is_kind = lambda x: isinstance(x, kind)
  return any(map(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))


class _Point(NamedTuple):
  params: Any
  loss: float
  norm: float
  state: Any
  table: Any


class _Run:
  """Blocks of epochs, each of which is undone if it makes things worse."""

  def __init__(
    self,
    programs: _Programs,
    params: optax.Params,
    batches: _Batches,
    rng: Any,
    tol: float,
    max_epochs: int,
  ):
    self.programs, self.batches, self.rng = programs, batches, rng
    self.tol, self.max_epochs = tol, max_epochs
    self.count = self.next_estimate = self.failures = self.last_progress = 0
    self.shortening, self.step_size = 1.0, 1.0
    self.history: list[HistoryPoint] = []
    self.estimate_step_size(params)
    self.point = self.best = self.evaluate(params, programs.tx.init(params))
    if not math.isfinite(self.point.loss + self.point.norm):
      raise ValueError(
        "loss_fn must have a finite value and gradient at params, got"
        f" {self.point.loss} and a gradient of norm {self.point.norm}."
      )

  def full_batch(self, i: int) -> Any:
    index = jnp.asarray(i)  # A number would be compiled in.
    return jax.tree.map(lambda x: x[index], self.batches.full)

  def estimate_step_size(self, params: optax.Params) -> None:
    """One over the largest curvature of a sample of the full batches."""
    full = jax.tree.leaves(self.batches.full)[0].shape[0]
    probed = min(max(_NUM_PROBED, self.count), full)
    sample = (
      _joined(batch, self.batches.shared)
      for batch in map(self.full_batch, self.rng.permutation(full)[:probed])
    )
    curvature = float(
      _smoothness.estimate(self.programs.gradient, params, sample, 5)
    )
    if math.isfinite(curvature) and curvature > 0:
      self.step_size = self.shortening / curvature
    self.next_estimate = max(1, 2 * self.count)

  def evaluate(self, params: optax.Params, state: Any) -> _Point:
    loss, norm, state, table = self.programs.evaluate(
      params, state, self.batches, np.float32(self.step_size)
    )
    # Differences of the loss below this are rounding.
    self.slack = 8 * float(jnp.finfo(loss.dtype).eps) * abs(float(loss))
    point = _Point(params, float(loss), float(norm), state, table)
    self.history.append(
      HistoryPoint(self.count, point.loss, point.norm, self.step_size)
    )
    return point

  def block(self, epochs: int) -> None:
    """Some epochs, with the same step size."""
    old = self.point
    params, state = old.params, old.state
    for _ in range(epochs):
      order = self.rng.permutation(self.batches.number).astype(np.int32)
      params, state = self.programs.epoch(
        params,
        state,
        old.table,
        self.batches,
        order,
        np.float32(self.step_size),
      )
      self.count += 1
    new = self.evaluate(params, state)
    is_worse = new.loss > old.loss + self.slack and new.norm > old.norm
    if is_worse or not math.isfinite(new.loss + new.norm):
      self.failures += 1
      self.shortening /= 2
      self.step_size /= 2
      return
    self.point, self.failures = new, 0
    if new.norm < 0.999 * self.best.norm:
      self.last_progress = self.count
    if new.norm < self.best.norm:
      self.best = new

  def solve(self, report: Callable[..., None]) -> None:
    report(self.count, self.best.norm)
    while self.best.norm > self.tol and self.count < self.max_epochs:
      waited = self.count - self.last_progress
      if self.failures >= _MAX_FAILURES or waited > max(
        _PATIENCE, self.count // 2
      ):
        break
      if self.count >= self.next_estimate:
        self.estimate_step_size(self.point.params)
      uses_snapshot = self.point.table is not None
      length = 1 if uses_snapshot else min(_MAX_BLOCK, 1 + self.count // 4)
      self.block(min(length, self.max_epochs - self.count))
      report(self.count, self.best.norm)


def not_converged(
  name: str,
  count: int,
  max_epochs: int,
  norm: float,
  tol: float,
  advice: str | None = None,
) -> str:
  """The warning: what was reached, and what to do about it."""
  if advice is None:
    advice = (
      "Increase max_epochs, or the regularisation."
      if count >= max_epochs
      else "Steps make it no better: if the loss is smooth, rounding allows no"
      " more, so use double precision, or a larger tol."
    )
  return (
    f"{name} did not converge in {count} epochs: gradient norm {norm:.1e} >"
    f" tol={tol:g}. {advice}"
  )


def check_not_negative(value: Any, name: str) -> float:
  """Returns a number; raises unless it is finite and not negative."""
  _checks.check_coefficient(value, name)
  if value < 0:
    raise ValueError(f"{name} must be at least 0, got {value}.")
  return float(value)


def progress_bar(
  progress: bool, name: str, max_epochs: int
) -> contextlib.AbstractContextManager[Callable[[int, float], None]]:
  """A context whose value is called with the epochs so far and the norm."""
  if not progress:
    return contextlib.nullcontext(lambda count, norm: None)
  for package, bar in (("rich.progress", _rich_bar), ("tqdm", _tqdm_bar)):
    try:
      module = importlib.import_module(package)
    except ImportError:
      continue
    return bar(module, name, max_epochs)
  raise ImportError("progress=True needs rich or tqdm: pip install rich.")


@contextlib.contextmanager
def _rich_bar(module: Any, name: str, max_epochs: int) -> Iterator[Any]:
  with module.Progress() as bar:
    task = bar.add_task(name, total=max_epochs)

    def report(count: int, norm: float) -> None:
      description = f"{name}: gradient norm {norm:.1e}"
      bar.update(task, completed=count, description=description)

    yield report


@contextlib.contextmanager
def _tqdm_bar(module: Any, name: str, max_epochs: int) -> Iterator[Any]:
  with module.tqdm(total=max_epochs, desc=name) as bar:

    def report(count: int, norm: float) -> None:
      bar.set_postfix_str(f"gradient norm {norm:.1e}", refresh=False)
      bar.update(count - bar.n)

    yield report
