# SPDX-License-Identifier: Apache-2.0
"""Compiles training steps for TPUs that are not there.

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

from benchmarks.cost import hlo, step_cost
from benchmarks.harness.stream_feed import divided
import optax_svrg

METHODS = {
  "plain": lambda axis_name: step_cost.TRANSFORMS["plain"],
  "alpha-svrg": functools.partial(optax_svrg.alpha_svrg, 0.75),
  "adaptive-svrg": optax_svrg.adaptive_svrg,
  "alpha-saga": functools.partial(optax_svrg.alpha_saga, 0.75),
  "adaptive-saga": optax_svrg.adaptive_saga,
}
PLACEMENTS = ("jit", "shard_map", "zero", "fsdp", "host")
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_TRACEBACK_FILTERING": "off",  # So that the last line is the error.
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
_AXIS = "data"
_OUT_OF_MEMORY = re.compile(
  r"(?:Used |HLO temporaries \()(?P<used>[\d.]+)(?P<unit>[MG])"
)


class Case(NamedTuple):
  """A step to compile."""

  model: str  # A key of :data:`benchmarks.models.MODELS`, or ``mlp-1024``.
  method: str  # One of :data:`METHODS`.
  placement: str  # One of :data:`PLACEMENTS`.
  topology: str  # As ``v5e:4x4``.
  batch_size: int = 1024  # Of all devices.
  num_batches: int = 312  # Number of batches of SAGA's table.
  table_dtype: str = "float32"

  @property
  def name(self) -> str:
    """Name of its file."""
    return "_".join(map(str, self)).replace(":", "-")


def make_model(name: str) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
  """Returns the loss of a model, its parameters, and the shape of an input."""
  if name == "mlp-1024":
    make, shape = step_cost.mlp(1024, 1024, 1000, dtype=jnp.bfloat16)
  else:
    make, shape = step_cost.image_model(name, 224, 3, 1000, dtype=jnp.bfloat16)
  model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
  params, loss = step_cost.split(model)
  return loss, params, shape


def make_mesh(topology: str) -> Mesh:
  """The devices of a topology, in one axis."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def make_step(
  case: Case, mesh: Mesh, loss: Callable[..., Any], params: Any, shape: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Builds the step of a case, and its arguments, without values.

  These are the parameters, a pair of the states of the method and of AdamW, the
  batch, and its index.
  """
  is_local = case.placement == "shard_map"
  settings: dict[str, Any] = {"axis_name": _AXIS if is_local else None}
  if case.method.endswith("saga"):
    settings["num_batches"] = case.num_batches
    settings["table_dtype"] = jnp.dtype(case.table_dtype)
  tx = optax.chain(METHODS[case.method](**settings), optax.adamw(1e-3))
  grad = jax.grad(loss)
  if is_local:
    grad = optax_svrg.device_local(grad, _AXIS)

  def step(params: Any, state: Any, batch: Any, batch_index: Any) -> Any:
    grads = grad(params, batch)
    if is_local and case.method == "plain":
      grads = jax.lax.pmean(grads, _AXIS)  # Which the other methods do.
    extra = {"grad_fn": lambda p: grad(p, batch), "batch_index": batch_index}
    return step_cost.advance(tx, params, state, grads, **extra)

  fn: Callable[..., Any] = step
  if is_local:
    specs = (P(), P(), P(_AXIS), P())
    fn = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
  array = lambda spec, *args: jax.ShapeDtypeStruct(
    *args, sharding=NamedSharding(mesh, spec)
  )
  images = array(P(_AXIS), (case.batch_size, *shape), jnp.bfloat16)
  labels = array(P(_AXIS), (case.batch_size,), jnp.int32)
  index = array(P(), (), jnp.int32)
  placed = _placed(case.placement, mesh, params, tx)
  return fn, (*placed, (images, labels), index)


def _placed(
  placement: str, mesh: Mesh, params: Any, tx: Any
) -> tuple[Any, Any]:
  """Parameters, and states of the method and of AdamW, with shardings."""

  def place(sharding_of: Callable[[Any], NamedSharding]) -> Any:
    return jax.tree.map(lambda p: p.update(sharding=sharding_of(p)), params)

  replicated = NamedSharding(mesh, P())
  whole = place(lambda _: replicated)
  shards = place(functools.partial(divided, mesh))
  on_host = place(lambda _: replicated.with_memory_kind("pinned_host"))
  # The parameters, and like which the states of the method and of AdamW are.
  placed, like, like_adamw = {
    "zero": (whole, shards, shards),
    "fsdp": (shards, shards, shards),
    "host": (whole, on_host, whole),
  }.get(placement, (whole, whole, whole))
  own, _ = optax_svrg.state_shardings(tx, like)
  _, adamw = optax_svrg.state_shardings(tx, like_adamw)
  init = jax.jit(tx.init, out_shardings=(own, adamw))
  return placed, init.eval_shape(params)


def compile_step(fn: Callable[..., Any], args: Any) -> jax.stages.Compiled:
  """Compiles a step, whose parameters and state are updated in place."""
  shardings = jax.tree.map(lambda x: x.sharding, args[:2])
  jitted = jax.jit(fn, donate_argnums=(0, 1), out_shardings=shardings)
  # Models and transformations choose by the backend, which is the CPU here.
  with mock.patch.object(jax, "default_backend", return_value="tpu"):
    return jitted.lower(*args).compile()


def bytes_per_device(tree: Any) -> int:
  """Bytes of structures with shardings in the memory of one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if x.sharding.memory_kind != "pinned_host"
  )


def measure(case: Case) -> dict[str, Any]:
  """Compiles a case and reads the program."""
  mesh = make_mesh(case.topology)
  fn, args = make_step(case, mesh, *make_model(case.model))
  params, (state, _), *_ = args
  sizes = {
    "devices": mesh.size,
    "params": bytes_per_device(params),
    "state": bytes_per_device(state),
    "table": bytes_per_device(getattr(state, "table", ())),
  }
  try:
    compiled = compile_step(fn, args)
  except jax.errors.JaxRuntimeError as e:
    match = _OUT_OF_MEMORY.search(str(e))
    if match is None:
      raise
    unit = 2 ** {"M": 20, "G": 30}[match["unit"]]
    return {**sizes, "fits": False, "needed": float(match["used"]) * unit}
  memory, text = compiled.memory_analysis(), compiled.as_text()
  analysis = compiled.cost_analysis()
  traffic = hlo.traffic(text, mesh.size)
  return {
    **sizes,
    "fits": True,
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
