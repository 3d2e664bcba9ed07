# SPDX-License-Identifier: Apache-2.0
"""Memory of a compiled step."""

import math
from typing import Any, NamedTuple

import jax
import optax

from optax_svrg import _saga, _snapshot

_MIB = 2.0**20


class MemoryReport(NamedTuple):
  """Memory of a compiled step on one device, in MiB.

  ``state`` and ``table`` are sizes of arrays; the others are what the compiler
  reserves, padding included.

  Attributes:
    state: the state of this package's transformations in the memory of the
      device, tables included.
    table: the tables alone, as far as they are in the memory of the device.
    arguments: all arguments of the step in the memory of the device: the
      parameters, the state of the optimizer, and the batch.
    temporary: what the step needs in addition to its arguments and results.
    total: the least that the device must have: arguments, temporary memory, and
      results that do not take the place of a donated argument.
    state_on_host: the state in the memory of the host.
    host: all memory of the host that the step uses.
  """

  state: float
  table: float
  arguments: float
  temporary: float
  total: float
  state_on_host: float
  host: float

  def __str__(self) -> str:
    names = [name.replace("_", " ") for name in self._fields]
    width = max(map(len, names))
    return "\n".join(
      f"{name:<{width}} {value:12,.1f} MiB"
      for name, value in zip(names, self, strict=True)
    )


def memory_report(
  compiled: jax.stages.Compiled, opt_state: optax.OptState
) -> MemoryReport:
  """Returns what a compiled step needs in memory, on each device.

  Nothing is executed: the step can be compiled for devices that are not there,
  from :class:`jax.ShapeDtypeStruct` with shardings, to see whether it fits.

  Args:
    compiled: the step, ``jax.jit(step).lower(...).compile()``.
    opt_state: the state that it was compiled for, alone or within that of an
      optimizer, or :class:`jax.ShapeDtypeStruct` in the place of its arrays.
      Arrays without a sharding count in full, in the memory of the device.

  Returns:
    The report; ``print`` shows it as a table.

  Raises:
    TypeError: if ``compiled`` is no compiled step.
    ValueError: if ``opt_state`` holds no state of this package, or if the
      backend does not analyse the memory of its programs.

  Examples:
    >>> import jax, jax.numpy as jnp, optax, optax_svrg
    >>> tx = optax.chain(optax_svrg.adaptive_saga(10), optax.sgd(0.1))
    >>> params = jnp.zeros((512, 512))
    >>> state = tx.init(params)
    >>> def step(params, state, grads, i):
    ...   updates, state = tx.update(grads, state, params, batch_index=i)
    ...   return optax.apply_updates(params, updates), state
    >>> compiled = jax.jit(step, donate_argnums=(0, 1)).lower(
    ...     params, state, params, 0).compile()
    >>> report = optax_svrg.memory_report(compiled, state)
    >>> print(f"{report.state:.1f} MiB, {report.table:.1f} of them the table")
    12.0 MiB, 10.0 of them the table

  .. seealso:: :func:`optax_svrg.state_shardings`
  """
  analyse = getattr(compiled, "memory_analysis", None)
  if analyse is None:
    raise TypeError(
      "compiled must be a compiled step, jax.jit(step).lower(...).compile(),"
      f" got {type(compiled).__name__}."
    )
  is_ours = lambda x: isinstance(x, _saga.SAGAState | _snapshot.SVRGState)
  states = [
    x for x in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(x)
  ]
  if not states:
    raise ValueError(
      "opt_state holds no state of this package's transformations, got"
      f" {type(opt_state).__name__}."
    )
  analysis = analyse()
  if analysis is None:
    raise ValueError("this backend does not analyse the memory of programs.")
  tables = [x.table for x in states if isinstance(x, _saga.SAGAState)]
  return MemoryReport(
    state=_mebibytes(states, on_host=False),
    table=_mebibytes(tables, on_host=False),
    arguments=analysis.argument_size_in_bytes / _MIB,
    temporary=analysis.temp_size_in_bytes / _MIB,
    total=(
      analysis.argument_size_in_bytes
      + analysis.output_size_in_bytes
      - analysis.alias_size_in_bytes
      + analysis.temp_size_in_bytes
    )
    / _MIB,
    state_on_host=_mebibytes(states, on_host=True),
    host=(
      analysis.host_argument_size_in_bytes
      + analysis.host_output_size_in_bytes
      - analysis.host_alias_size_in_bytes
      + analysis.host_temp_size_in_bytes
    )
    / _MIB,
  )


def _mebibytes(tree: Any, *, on_host: bool) -> float:
  """Size of the arrays of a tree on one device, or in the host's memory."""
  num_bytes = 0
  for x in jax.tree.leaves(tree):
    sharding = getattr(x, "sharding", None)
    kind = getattr(sharding, "memory_kind", None)
    if (kind == "pinned_host") == on_host:
      shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
      num_bytes += math.prod(shape) * x.dtype.itemsize
  return num_bytes / _MIB
