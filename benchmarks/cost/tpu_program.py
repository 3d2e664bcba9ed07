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
import re
import sys
from typing import Any
from unittest import mock

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import optax

from benchmarks import models
from benchmarks.cost import hlo, steps

ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}
_NUM_CLASSES = 1000
_OUT_OF_MEMORY = re.compile(
  r"(?:Used |HLO temporaries \()(?P<used>[\d.]+)(?P<unit>[MG])"
)


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


def make_mesh(topology: str) -> Mesh:
  """The devices of a topology, in one axis."""
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  axis_types = (AxisType.Auto,)
  return Mesh(np.array(devices), (steps.AXIS,), axis_types=axis_types)


def compile_step(step: steps.Step) -> jax.stages.Compiled:
  """Compiles a step for TPUs."""
  # Models and transformations choose by the backend, which is the CPU here.
  with mock.patch.object(jax, "default_backend", return_value="tpu"):
    return steps.compile_step(step)


def measure(case: steps.Case) -> dict[str, Any]:
  """Compiles a case and reads the program."""
  mesh = make_mesh(case.topology)
  step = steps.make_step(case, mesh, *make_model(case.model))
  state = step.args[1][0]
  sizes = {
    "devices": mesh.size,
    "params": steps.bytes_per_device(step.args[0]),
    "state": steps.bytes_per_device(state),
    "table": steps.bytes_per_device(getattr(state, "table", ())),
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
  json.dump(measure(steps.Case(**json.load(sys.stdin))), sys.stdout)
