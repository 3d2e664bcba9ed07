# SPDX-License-Identifier: Apache-2.0
"""Trains in one of several processes; see test_processes.py."""

import itertools
import os
import sys
import time

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import optax_svrg

_NUM_DEVICES, _NUM_BATCHES, _BATCH_SIZE = 8, 5, 64


def _make(method, axis_name):
  return {
    "alpha": lambda: optax_svrg.alpha_svrg(0.75, axis_name=axis_name),
    "adaptive": lambda: optax_svrg.adaptive_svrg(axis_name=axis_name),
    "saga": lambda: optax_svrg.adaptive_saga(_NUM_BATCHES, axis_name=axis_name),
  }[method]()


def _loss(params, batch):
  x, y = batch
  for layer in params[:-1]:
    x = jax.nn.tanh(x @ layer["w"] + layer["b"])
  return jax.numpy.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


def train(method, how, num_processes, process):
  """Three epochs of an MLP on batches of which each process loads its part.

  Args:
    method: of what is put before Adam.
    how: ``"jit"``, or ``"shard_map"`` with an axis name.
    num_processes: how many there are.
    process: which of them this is.

  Returns:
    The parameters and the state of the method at the end.
  """
  mesh = jax.make_mesh((_NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(0)
  sizes = [16, 32, 8]
  params = [
    {"w": rng.normal(size=(m, n)) / m**0.5, "b": np.zeros(n)}
    for m, n in itertools.pairwise(sizes)
  ]
  dtype = jax.numpy.result_type(float)
  replicated = NamedSharding(mesh, P())
  params = jax.device_put(
    jax.tree.map(lambda p: p.astype(dtype), params), replicated
  )
  data = [
    (
      rng.normal(size=(_BATCH_SIZE, sizes[0])).astype(dtype),
      rng.normal(size=(_BATCH_SIZE, sizes[-1])).astype(dtype),
    )
    for _ in range(_NUM_BATCHES)
  ]
  share = _BATCH_SIZE // num_processes
  mine = slice(process * share, (process + 1) * share)

  def load(i):
    """A batch of which this process has seen its own part alone."""
    return tuple(
      jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), part[mine]
      )
      for part in data[i]
    )

  axis_name = "data" if how == "shard_map" else None
  tx = optax.chain(_make(method, axis_name), optax.adam(0.02))
  shardings = optax_svrg.state_shardings(tx, params)
  state = jax.jit(tx.init, out_shardings=shardings)(params)
  grad = jax.grad(_loss)
  if axis_name is not None:
    grad = optax_svrg.device_local(grad, axis_name)

  def step(params, state, batch, batch_index):
    grad_fn = lambda p: grad(p, batch)
    updates, state = tx.update(
      grad_fn(params), state, params, grad_fn=grad_fn, batch_index=batch_index
    )
    return optax.apply_updates(params, updates), state

  def mean(params, batches):
    return optax_svrg.mean_gradient(grad, params, batches, axis_name=axis_name)

  if axis_name is not None:
    step = jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(P(), P(), P("data"), P()),
      out_specs=(P(), P()),
    )
    mean = jax.jit(
      jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    )
  step = jax.jit(step, donate_argnums=(0, 1))
  for epoch in range(3):
    if method != "saga":
      batches = (load(i) for i in range(_NUM_BATCHES))
      # Under shard_map the pass is one program, and takes all batches at once.
      batches = batches if axis_name is None else tuple(batches)
      state = optax_svrg.take_snapshot(
        state, params, lambda p, b=batches: mean(p, b)
      )
      jax.block_until_ready(state)
    for i in np.random.default_rng(epoch).permutation(_NUM_BATCHES):
      # One program at a time: XLA for CPU runs the devices on few threads,
      # which wait in vain where they are not all in the same collective.
      params, state = jax.block_until_ready(
        step(params, state, load(i), np.int32(i))
      )
  return params, state[0]


def pass_with_a_fault(fault, process):
  """A snapshot pass of which process 1 cannot make the second batch.

  Args:
    fault: what happens to it.
    process: which process this is.
  """
  mesh = jax.make_mesh((_NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
  params = jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P()))

  def batches():
    for i in range(5):
      size = 16
      if process == 1 and i == 1:
        if fault == "missing":
          return
        if fault == "failed":
          raise RuntimeError("the disk is gone")
        if fault == "stalled":
          time.sleep(20)
        if fault == "died":
          os._exit(1)
        size = 8
      yield jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), np.ones((size, 4), np.float32)
      )

  in_step = batches()
  if fault == "stalled":
    in_step = optax_svrg.lockstep(in_step, timeout=2)
  grad = jax.grad(lambda p, x: jax.numpy.mean((x @ p) ** 2))
  optax_svrg.mean_gradient(grad, params, in_step)


def main(method, how, num_processes, process, port, precision, out):
  """Trains, and writes all numbers as this process has them."""
  num_processes, process = int(num_processes), int(process)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  jax.config.update("jax_num_cpu_devices", _NUM_DEVICES // num_processes)
  jax.config.update("jax_enable_x64", precision == "float64")
  if num_processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      f"127.0.0.1:{port}",
      num_processes=num_processes,
      process_id=process,
      # How long JAX itself waits for a process that has died.
      heartbeat_timeout_seconds=10,
    )
  assert jax.device_count() == _NUM_DEVICES
  if method == "fault":
    pass_with_a_fault(how, process)
    return
  result = train(method, how, num_processes, process)
  leaves = [
    np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(result)
  ]
  np.savez(out, *leaves)


if __name__ == "__main__":
  main(*sys.argv[1:])
