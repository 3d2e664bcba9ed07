# SPDX-License-Identifier: Apache-2.0
"""Compiles steps for four TPUs: ``python -m tests.workers.tpu``.

In a process of its own, as the settings of the TPU compiler are read when JAX
is imported.
"""

import json
import math
import sys

import jax
import jax.numpy as jnp

from benchmarks.cost import hlo, tpu_program
from benchmarks.cost.tpu_program import Case

SHAPE = (14, 14, 192)
PARAMS = {
  "positions": jax.ShapeDtypeStruct((197, 192), jnp.float32),
  "norm": jax.ShapeDtypeStruct((192,), jnp.float32),
  "conv": jax.ShapeDtypeStruct((7, 7, 192), jnp.float32),
  "temperature": jax.ShapeDtypeStruct((), jnp.float32),
  "w": jax.ShapeDtypeStruct((192, 768), jnp.float32),
}
PLACEMENTS = ("jit", "shard_map", "fsdp", "host")
TABLES = ((7, "float32"), (312, "bfloat16"))


def loss(params, batch):
  images, labels = batch
  images = images.astype(jnp.float32)
  x = jax.lax.conv_general_dilated(
    images,
    params["conv"][:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=SHAPE[-1],
  )
  x = x.reshape(len(x), 196, 192) + params["positions"][1:]
  x = (x * params["norm"]).mean(1) @ params["w"]
  x = x * params["temperature"] + params["positions"][0].mean()
  return jax.nn.logsumexp(x, axis=1).mean() - x[:, labels % 768].mean()


def cases():
  """Every transformation in every placement, SAGA with every table."""
  for placement in PLACEMENTS:
    make = lambda method, *table, p=placement: Case(
      "small", method, p, "v5e:2x2", 64, *table
    )
    for method in ("plain", "alpha-svrg", "adaptive-svrg"):
      yield make(method)
    for method in ("alpha-saga", "adaptive-saga"):
      for table in TABLES:
        yield make(method, *table)


def shapes_of(table):
  """The arrays of a table on one device, as HLO writes them.

  Those of no more than one tile are moved whole, whatever is updated.
  """
  names = {"float32": "f32", "bfloat16": "bf16"}
  for x in jax.tree.leaves(table):
    shape = x.sharding.shard_shape(x.shape)
    if math.prod(shape) > 8 * 128:
      yield f"{names[x.dtype.name]}[{','.join(map(str, shape))}]"


def copies(text, shapes):
  """Operations that write an array of one of some shapes, but not in place."""
  computations = hlo.parse(text)
  return [
    operation
    for operation, _ in hlo.executed(computations)
    if operation.kind not in hlo._FREE
    and any(x.group() in shapes for x in hlo._ARRAY.finditer(operation.shape))
    and not updates_in_place(computations, operation)
  ]


def updates_in_place(computations, operation):
  """Whether it is, or is a fusion with, a ``dynamic-update-slice``."""
  called = operation.called if operation.kind == "fusion" else []
  return any(
    x.kind == "dynamic-update-slice"
    and x.shape.split("{")[0] in operation.shape
    for x in (operation, *(x for name in called for x in computations[name]))
  )


def measure(case):
  mesh = tpu_program.make_mesh(case.topology)
  fn, args = tpu_program.make_step(case, mesh, loss, PARAMS, SHAPE)
  try:
    compiled = tpu_program.compile_step(fn, args)
  except jax.errors.JaxRuntimeError as e:
    return {"error": str(e)}
  text, memory = compiled.as_text(), compiled.memory_analysis()
  params, (own, _), *_ = args
  table = getattr(own, "table", ())
  return {
    "copies": [x.line for x in copies(text, set(shapes_of(table)))],
    "reduced": hlo.traffic(text, mesh.size).num_bytes,
    "params": tpu_program.bytes_per_device(params),
    "batch": tpu_program.bytes_per_device(args[2]),
    "table": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(table)),
    "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(own)),
    "arguments": memory.argument_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
    "host_arguments": memory.host_argument_size_in_bytes,
    "host_temporary": memory.host_temp_size_in_bytes,
  }


if __name__ == "__main__":
  json.dump([[case, measure(case)] for case in cases()], sys.stdout)
