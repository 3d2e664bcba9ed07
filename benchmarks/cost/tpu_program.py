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

from benchmarks import models
from benchmarks.cost import hlo, problem
from benchmarks.harness.stream_feed import divided
import optax_svrg

METHODS = (
  *("plain", "alpha-svrg", "adaptive-svrg"),
  *("alpha-saga", "adaptive-saga"),
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
_AXIS, _NUM_CLASSES = "data", 1000
_OUT_OF_MEMORY = re.compile(
  r"(?:Used |HLO temporaries \()(?P<used>[\d.]+)(?P<unit>[MG])"
)


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


def make_model(name: str) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
  """Returns the loss of a model, its parameters, and the shape of an input."""
  settings = {"dtype": jnp.bfloat16}
  if name == "mlp-1024":
    shape: tuple[int, ...] = (1024,)
    sizes = (1024, 1024, _NUM_CLASSES)
    make = lambda rngs: models.MLP(sizes, rngs=rngs, **settings)
  else:
    shape = (224, 224, 3)
    make = models.maker(name, (3, 224, 224), _NUM_CLASSES, settings)
  params, loss = problem.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
  return loss, params, shape


def make_mesh(topology: str) -> Mesh:
  """The devices of a topology, in one axis."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  return Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))


def make_transform(
  case: Case, axis_name: str | None
) -> optax.GradientTransformationExtraArgs:
  """The transformation of a method."""
  if case.method == "plain":
    return problem.TRANSFORMS["plain"]
  settings: dict[str, Any] = {"axis_name": axis_name}
  if case.method.endswith("saga"):
    settings["num_batches"] = case.num_batches
    settings["table_dtype"] = jnp.dtype(case.table_dtype)
  coefficient = [0.75] if case.method.startswith("alpha") else []
  make = getattr(optax_svrg, case.method.replace("-", "_"))
  return make(*coefficient, **settings)


def make_step(
  case: Case, mesh: Mesh, loss: Callable[..., Any], params: Any, shape: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """Builds the step of a case, and its arguments, without values.

  These are the parameters, a pair of the states of the method and of AdamW, the
  batch, and its index.
  """
  is_local = case.placement == "shard_map"
  transform = make_transform(case, _AXIS if is_local else None)
  tx = optax.chain(transform, optax.adamw(1e-3))
  own_grad = grad = jax.grad(loss)
  if is_local:
    own_grad = grad = optax_svrg.device_local(grad, _AXIS)
    if case.method == "plain":
      grad = lambda p, batch: jax.lax.pmean(own_grad(p, batch), _AXIS)

  def step(params: Any, state: Any, batch: Any, batch_index: Any) -> Any:
    extra = {"grad_fn": lambda p: grad(p, batch), "batch_index": batch_index}
    updates, state = tx.update(grad(params, batch), state, params, **extra)
    return optax.apply_updates(params, updates), state

  fn: Callable[..., Any] = step
  if is_local:
    specs = (P(), P(), P(_AXIS), P())
    fn = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
  batch = (
    jax.ShapeDtypeStruct((case.batch_size, *shape), jnp.bfloat16),
    jax.ShapeDtypeStruct((case.batch_size,), jnp.int32),
  )
  batch = _place(batch, (NamedSharding(mesh, P(_AXIS)),) * 2)
  index = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
  transforms = (transform, optax.adamw(1e-3))
  return fn, (*_placed(case, mesh, params, transforms), batch, index)


def _place(tree: Any, shardings: Any) -> Any:
  """Gives structures their shardings."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def _placed(
  case: Case, mesh: Mesh, params: Any, transforms: tuple[Any, Any]
) -> tuple[Any, Any]:
  """Parameters, and states of the method and of AdamW, with shardings."""
  whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), params)
  of_params = of_state = whole
  if case.placement in ("zero", "fsdp"):
    of_state = jax.tree.map(functools.partial(divided, mesh), params)
  if case.placement == "fsdp":
    of_params = of_state
  of_method = of_state
  if case.placement == "host":
    to_host = lambda sharding: sharding.with_memory_kind("pinned_host")
    of_method = jax.tree.map(to_host, of_state)

  def state(tx: Any, shardings: Any) -> Any:
    like = _place(params, shardings)
    shapes = jax.eval_shape(tx.init, params)
    return _place(shapes, optax_svrg.state_shardings(tx, like))

  states = tuple(map(state, transforms, (of_method, of_state)))
  return _place(params, of_params), states


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
