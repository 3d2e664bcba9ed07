# SPDX-License-Identifier: Apache-2.0
"""What a compiled step needs in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_svrg

pytestmark = pytest.mark.standard_promotion

MIB = 2**20
PARAMS = jax.ShapeDtypeStruct((1024, 512), jnp.float32)  # 2 MiB


def compile_step(tx, params=PARAMS, donate=True, sharding=None):
  state = jax.eval_shape(tx.init, params)
  if sharding is not None:
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      state,
      sharding,
    )

  def step(params, state, i):
    grads = jnp.cos(params)
    updates, state = tx.update(
      grads, state, params, batch_index=i, grad_fn=jnp.cos
    )
    return optax.apply_updates(params, updates), state

  jitted = jax.jit(step, donate_argnums=(0, 1) if donate else ())
  index = jax.ShapeDtypeStruct((), jnp.int32)
  return jitted.lower(params, state, index).compile(), state


def test_saga():
  tx = optax.chain(optax_svrg.adaptive_saga(10), optax.adam(1e-3))
  compiled, state = compile_step(tx)
  report = optax_svrg.memory_report(compiled, state)
  analysis = compiled.memory_analysis()
  assert report.table == 20
  assert 24 <= report.state < 24.01  # And the mean with its error.
  assert report.state + 2 + 4 <= report.arguments < report.state + 6.01
  assert report.temporary == analysis.temp_size_in_bytes / MIB
  assert report.total - report.arguments - report.temporary < 0.01
  assert (report.state_on_host, report.host) == (0, 0)


def test_results_that_are_not_donated_count():
  tx = optax_svrg.alpha_saga(0.5, 10)
  donated, whole = (
    optax_svrg.memory_report(*compile_step(tx, donate=donate))
    for donate in (True, False)
  )
  assert donated.state == whole.state
  # Parameters, table, mean and its error once more.
  assert whole.total - donated.total >= 26 - donated.temporary


def test_arrays_and_structures_agree():
  tx = optax.chain(optax_svrg.adaptive_svrg(), optax.sgd(0.1))
  compiled, state = compile_step(tx)
  arrays = tx.init(jnp.zeros(PARAMS.shape))
  want = optax_svrg.memory_report(compiled, state)
  assert optax_svrg.memory_report(compiled, arrays) == want


def test_host_memory():
  mesh = jax.make_mesh(
    (1,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:1],
  )
  spec = jax.sharding.PartitionSpec()
  on_host = jax.sharding.NamedSharding(mesh, spec, memory_kind="pinned_host")
  tx = optax_svrg.adaptive_saga(10)
  like = jax.ShapeDtypeStruct(PARAMS.shape, PARAMS.dtype, sharding=on_host)
  shardings = optax_svrg.state_shardings(tx, like)
  compiled, _ = compile_step(tx)
  _, state = compile_step(tx, sharding=shardings)
  report = optax_svrg.memory_report(compiled, state)
  assert report.table == 0
  assert report.state < 0.01
  assert 24 <= report.state_on_host < 24.01


def test_text():
  report = optax_svrg.MemoryReport(24, 20, 30.25, 2, 32.25, 0, 0)
  lines = str(report).splitlines()
  assert lines[0].split() == ["state", "24.0", "MiB"]
  assert lines[4].split() == ["total", "32.2", "MiB"]
  assert len({len(line) for line in lines}) == 1
  assert [line.rpartition("  ")[0].split() for line in lines] == [
    name.split("_") for name in report._fields
  ]


class TestErrors:
  def test_no_compiled_step(self):
    with pytest.raises(TypeError, match=r"compiled step.*got function"):
      optax_svrg.memory_report(compile_step, ())

  def test_no_state(self):
    tx = optax_svrg.alpha_svrg(0.5)
    compiled, _ = compile_step(tx)
    with pytest.raises(
      ValueError, match=r"no state of this package.*got tuple"
    ):
      optax_svrg.memory_report(compiled, optax.adam(1e-3).init(np.zeros(3)))

  def test_no_analysis(self):
    class Compiled:
      def memory_analysis(self):
        return None

    state = optax_svrg.alpha_svrg(0.5).init(jnp.zeros(2))
    with pytest.raises(ValueError, match="does not analyse the memory"):
      optax_svrg.memory_report(Compiled(), state)
