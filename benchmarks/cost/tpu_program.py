# SPDX-License-Identifier: Apache-2.0
"""Training steps, compiled for TPUs that are not there.

The compiler of libtpu runs on any Linux machine. Its settings are read when JAX
is imported, so that this module is run in a process of its own:
``python -m benchmarks.cost.tpu_program``, with a case as JSON on its standard
input.
"""

from collections.abc import Callable
import functools
import json
import math
import re
import sys
from typing import Any, NamedTuple
from unittest import mock

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks import models
from benchmarks.cost import hlo
import optax_svrg

METHODS = (
  "plain",
  "alpha-svrg",
  "adaptive-svrg",
  "alpha-saga",
  "adaptive-saga",
)
PLACEMENTS = ("jit", "shard_map", "zero", "fsdp", "host")
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
_AXIS = "data"
_NUM_CLASSES = 1000
_OUT_OF_MEMORY = re.compile(r"Used (?P<used>[\d.]+)(?P<unit>[MG]) of .*? hbm")


class Case(NamedTuple):
  """What is compiled.

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


def make_model(name: str) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
  """Returns the loss of a model, its parameters, and the shape of an input."""
  if name == "mlp-1024":
    shape: tuple[int, ...] = (1024,)
    make = functools.partial(
      models.MLP, (1024, 1024, _NUM_CLASSES), dtype=jnp.bfloat16
    )
  else:
    shape = (224, 224, 3)
    make = models.maker(
      name, (3, 224, 224), _NUM_CLASSES, {"dtype": jnp.bfloat16}
    )
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params: Any, batch: Any) -> jax.Array:
    images, labels = batch
    logits = nnx.merge(graphdef, params, rest)(images).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  return loss, nnx.as_pure(params), shape


def spread(mesh: Mesh, tree: Any) -> Any:
  """Shards the last axis that can be, of each array, as ZeRO and FSDP do."""

  def sharding(x: Any) -> NamedSharding:
    for axis in reversed(range(len(x.shape))):
      if x.shape[axis] and x.shape[axis] % mesh.size == 0:
        return NamedSharding(mesh, P(*[None] * axis, _AXIS))
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
  """Builds the step of a case.

  Args:
    case: the case.
    mesh: one axis of devices, of the type Auto.
    loss: ``loss(params, batch)``.
    params: structures of the parameters.
    shape: of an input.
  """
  local = case.placement == "shard_map"
  transform = make_transform(case, _AXIS if local else None)
  optimizer = optax.adamw(1e-3)
  grad = jax.grad(loss)
  if local:
    grad = optax_svrg.device_local(grad, _AXIS)

  def step(params: Any, state: Any, batch: Any, batch_index: Any) -> Any:
    grads = grad(params, batch)
    if local and case.method == "plain":
      grads = jax.lax.pmean(grads, _AXIS)
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
      step, mesh=mesh, in_specs=(P(), P(), P(_AXIS), P()), out_specs=P()
    )
  divided = NamedSharding(mesh, P(_AXIS))
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
  # Models and transformations choose by the backend, which is the CPU here.
  with mock.patch.object(jax, "default_backend", return_value="tpu"):
    return jitted.lower(*step.args).compile()


def make_mesh(topology: str) -> Mesh:
  """The devices of a topology, in one axis."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def bytes_per_device(tree: Any) -> int:
  """Bytes of structures with shardings in the memory of one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding.memory_kind != "pinned_host"
  )


def measure(case: Case) -> dict[str, Any]:
  """Compiles a case and reads the program.

  Returns:
    Counts per device, in bytes where nothing else is said. A program that does
    not fit has no more than ``needed``, as the compiler reports it.
  """
  mesh = make_mesh(case.topology)
  step = make_step(case, mesh, *make_model(case.model))
  state = step.args[1][0]
  sizes = {
    "devices": mesh.size,
    "params": bytes_per_device(step.args[0]),
    "state": bytes_per_device(state),
    "table": bytes_per_device(getattr(state, "table", ())),
  }
  try:
    compiled = compile_step(step)
  except jax.errors.JaxRuntimeError as e:
    match = _OUT_OF_MEMORY.search(str(e))
    if match is None:
      raise
    unit = 2 ** {"M": 20, "G": 30}[match["unit"]]
    return {**sizes, "fits": False, "needed": float(match["used"]) * unit}
  return {**sizes, "fits": True, **_read(compiled, mesh.size)}


def _read(compiled: jax.stages.Compiled, num_devices: int) -> dict[str, Any]:
  memory, text = compiled.memory_analysis(), compiled.as_text()
  analysis = compiled.cost_analysis()
  traffic = hlo.traffic(text, num_devices)
  return {
    "flops": analysis["flops"],
    "bytes_accessed": analysis["bytes accessed"],
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "needed": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
    "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    "collective_bytes": traffic.num_bytes,
    "collectives": traffic.operations,
    "overlapped": hlo.overlapped(text),
  }


if __name__ == "__main__":
  json.dump(measure(Case(**json.load(sys.stdin))), sys.stdout)
