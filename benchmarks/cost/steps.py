# SPDX-License-Identifier: Apache-2.0
"""Training steps on many devices, as structures without values."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import optax_svrg

METHODS = (
  "plain",
  "alpha-svrg",
  "adaptive-svrg",
  "alpha-saga",
  "adaptive-saga",
)
PLACEMENTS = ("jit", "shard_map", "zero", "fsdp", "host")
AXIS = "data"


class Case(NamedTuple):
  """A step to compile.

  Attributes:
    model: a key of :data:`benchmarks.models.MODELS`, or ``mlp-1024``.
    method: one of :data:`METHODS`.
    placement: one of :data:`PLACEMENTS`.
    topology: as ``v5e:4x4``.
    batch_size: of all devices.
    num_batches: number of batches of SAGA's table.
    table_dtype: dtype of the table.
  """

  model: str
  method: str
  placement: str
  topology: str
  batch_size: int = 1024
  num_batches: int = 312
  table_dtype: str = "float32"

  @property
  def name(self) -> str:
    """Name of its file."""
    return "_".join(map(str, self)).replace(":", "-")


class Step(NamedTuple):
  """A training step and its arguments, without values.

  Attributes:
    fn: ``fn(params, state, batch, batch_index)``, where ``state`` is a pair of
      those of the method and of AdamW.
    args: structures with shardings.
  """

  fn: Callable[..., Any]
  args: tuple[Any, ...]


def make_transform(
  case: Case, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a method."""
  saga = {
    "num_batches": case.num_batches,
    "table_dtype": jnp.dtype(case.table_dtype),
    "axis_name": axis_name,
  }
  make = {
    "plain": lambda: optax.with_extra_args_support(optax.identity()),
    "alpha-svrg": lambda: optax_svrg.alpha_svrg(0.75, axis_name=axis_name),
    "adaptive-svrg": lambda: optax_svrg.adaptive_svrg(axis_name=axis_name),
    "alpha-saga": lambda: optax_svrg.alpha_saga(0.75, **saga),
    "adaptive-saga": lambda: optax_svrg.adaptive_saga(**saga),
  }
  return make[case.method]()


def spread(mesh: Mesh, tree: Any) -> Any:
  """Shards the last axis that can be, of each array, as ZeRO and FSDP do."""

  def sharding(x: Any) -> NamedSharding:
    for axis in reversed(range(len(x.shape))):
      if x.shape[axis] and x.shape[axis] % mesh.size == 0:
        return NamedSharding(mesh, P(*[None] * axis, AXIS))
    return NamedSharding(mesh, P())

  return jax.tree.map(sharding, tree)


def place(tree: Any, shardings: Any) -> Any:
  """Gives structures their shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def make_step(
  case: Case, mesh: Mesh, loss: Callable[..., Any], params: Any, shape: Any
) -> Step:
  """Builds the step of a case."""
  local = case.placement == "shard_map"
  transform = make_transform(case, AXIS if local else None)
  optimizer = optax.adamw(1e-3)
  local_grad = grad = jax.grad(loss)
  if local:
    local_grad = grad = optax_svrg.device_local(grad, AXIS)
  if local and case.method == "plain":
    grad = lambda p, batch: jax.lax.pmean(local_grad(p, batch), AXIS)

  def step(params: Any, state: Any, batch: Any, batch_index: Any) -> Any:
    grads = grad(params, batch)
    updates, own = transform.update(
      grads,
      state[0],
      params,
      grad_fn=lambda p: grad(p, batch),
      batch_index=batch_index,
    )
    updates, rest = optimizer.update(updates, state[1], params)
    return optax.apply_updates(params, updates), (own, rest)

  fn: Callable[..., Any] = step
  if local:
    fn = jax.shard_map(
      step, mesh=mesh, in_specs=(P(), P(), P(AXIS), P()), out_specs=P()
    )
  divided = NamedSharding(mesh, P(AXIS))
  batch = (
    jax.ShapeDtypeStruct((case.batch_size, *shape), jnp.bfloat16),
    jax.ShapeDtypeStruct((case.batch_size,), jnp.int32),
  )
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
  placed, state = _placed(case, mesh, params, (transform, optimizer))
  return Step(fn, (placed, state, place(batch, (divided, divided)), index))


def _placed(
  case: Case, mesh: Mesh, params: Any, transforms: tuple[Any, Any]
) -> tuple[Any, Any]:
  """Parameters, and states of the method and of AdamW, with shardings."""
  replicated = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
  sharded = spread(mesh, params)
  of_params = sharded if case.placement == "fsdp" else replicated
  of_state = sharded if case.placement in ("zero", "fsdp") else replicated
  of_method = of_state
  if case.placement == "host":
    of_method = jax.tree.map(
      lambda s: s.with_memory_kind("pinned_host"), of_state
    )

  def state(tx: Any, shardings: Any) -> Any:
    like = place(params, shardings)
    shapes = jax.eval_shape(tx.init, params)
    return place(shapes, optax_svrg.state_shardings(tx, like))

  method, optimizer = transforms
  return place(params, of_params), (
    state(method, of_method),
    state(optimizer, of_state),
  )


def compile_step(step: Step) -> jax.stages.Compiled:
  """Compiles a step, whose parameters and state are updated in place."""
  shardings = jax.tree.map(lambda x: x.sharding, step.args[:2])
  jitted = jax.jit(step.fn, donate_argnums=(0, 1), out_shardings=shardings)
  return jitted.lower(*step.args).compile()


def bytes_per_device(tree: Any) -> int:
  """Bytes of structures with shardings in the memory of one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding.memory_kind != "pinned_host"
  )
