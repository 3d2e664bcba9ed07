# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Batches of several processes, kept in step."""

from collections.abc import Iterable, Iterator
import itertools
from typing import Any

import jax

# The client of jax.distributed has no public name; Orbax and Flax take it from
# here, too.
from jax._src import distributed
import numpy as np

from optax_svrg import _checks

_END = "no further batch"
_ALIKE = "alike"

# Of this process. Programs of all processes are alike, so their calls are, too.
_calls = itertools.count()


def lockstep(
  batches: Iterable[Any], *, timeout: float = 300.0
) -> Iterator[Any]:
  """Batches that every process has, or an error in all of them.

  Where several processes compute as one (:func:`jax.distributed.initialize`),
  each loads its part of a batch. If one of them has fewer batches than others,
  or a short one, these wait for it in a reduction, for ever. With this, all
  processes tell one another of a batch before they use it: its structure,
  shapes and dtypes, or that there is none. Nothing is sent between devices and
  nothing waits for them; the hosts exchange a line over the network, while the
  devices are still busy with the batches before.

  :func:`optax_svrg.mean_gradient` does this by itself when its parameters are
  spread over several processes. Use it for the batches of the training steps,
  where they are not known to be equally many: ``for batch in
  lockstep(batches)``. All processes must come to its calls in the same order.
  In a single process it changes nothing.

  Args:
    batches: any iterable of batches, which are trees of arrays, of the part of
      this process or of global arrays.
    timeout: for how many seconds to wait for the other processes. It must be
      longer than any of them may take for a batch.

  Returns:
    An iterator over ``batches``.

  Raises:
    TypeError: if ``batches`` is a mapping or not iterable.
    ValueError: if ``timeout`` is not positive; while iterating, if another
      process has fewer or more batches, one of another structure, shape or
      dtype, or failed to make it.
    TimeoutError: while iterating, if another process has not come to the batch
      in time, or has died.

  Examples:
    >>> import numpy as np, optax_svrg
    >>> batches = (np.full(2, i) for i in range(3))
    >>> [int(batch.sum()) for batch in optax_svrg.lockstep(batches)]
    [0, 2, 4]

  .. seealso:: :func:`jax.experimental.multihost_utils.assert_equal`, which is
    enough where the number of batches is known beforehand.
  """
  _checks.check_batches(batches)
  _checks.check_positive(timeout, "timeout")
  client = distributed.global_state.client
  if client is None or jax.process_count() == 1:
    return iter(batches)
  return _lockstep(batches, timeout, client, next(_calls))


def spans_processes(tree: Any) -> bool:
  """Whether any array is in part on devices of other processes."""
  return any(
    not leaf.is_fully_addressable
    for leaf in jax.tree.leaves(tree)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
  )


def _lockstep(
  batches: Iterable[Any], timeout: float, client: Any, call: int
) -> Iterator[Any]:
  iterator = iter(batches)
  for index in itertools.count():
    batch = error = None
    try:
      batch = next(iterator)
      mine = _description(batch)
    except StopIteration:
      mine = _END
    # Whatever it is, the others must know.
    except Exception as e:
      error = e
      mine = f"{type(e).__name__}: {e}"
    verdict = _verdict(client, f"optax_svrg/{call}", index, mine, timeout)
    if verdict != _ALIKE or error is not None:
      # All have come this far, so what they have begun will end. A process that
      # exits while its first reduction connects it to the others hangs.
      jax.block_until_ready(jax.live_arrays())
    if error is not None:
      raise error
    if verdict != _ALIKE:
      raise ValueError(
        f"batches[{index}] must be alike in all processes, got {verdict}."
      )
    if mine == _END:
      return
    yield batch


def _verdict(
  client: Any, name: str, index: int, mine: str, timeout: float
) -> str:
  """Whether all processes have the same, and if not, which have what."""
  num_processes = jax.process_count()
  milliseconds = int(1000 * timeout)
  prefix = f"{name}/{index}"
  client.key_value_set(f"{prefix}/{jax.process_index()}", mine)
  try:
    client.wait_at_barrier(f"{prefix}/barrier", milliseconds)
    # One reads and tells the others, which is less than if each read all.
    if jax.process_index() == 0:
      got = _entries(client, prefix)
      differing = next((p for p in got if got[p] != got[0]), None)
      client.key_value_set(
        f"{name}/verdict/{index}",
        _ALIKE
        if differing is None
        else f"{got[0]} in process 0 and {got[differing]} in process"
        f" {differing}",
      )
      # The barrier was passed, so that the verdict before has been read.
      client.key_value_delete(f"{name}/{index - 1}")
      client.key_value_delete(f"{name}/verdict/{index - 1}")
    return client.blocking_key_value_get(
      f"{name}/verdict/{index}", milliseconds
    )
  except jax.errors.JaxRuntimeError as e:
    reason = str(e).partition("\n")[0]
    missing = sorted(set(range(num_processes)) - set(_entries(client, prefix)))
    if missing:
      which = ", ".join(map(str, missing))
      reason = f"process {which} of {num_processes} did not come to it"
    raise TimeoutError(
      f"batches[{index}]: {reason} within {timeout:g} seconds, or is lost."
    ) from e


def _entries(client: Any, prefix: str) -> dict[int, str]:
  """What is known of each process."""
  return {
    int(key.rpartition("/")[2]): value
    for key, value in client.key_value_dir_get(prefix)
  }


def _description(batch: Any) -> str:
  """Structure, shapes and dtypes of a batch in one line."""
  leaves, treedef = jax.tree.flatten(batch)
  arrays = ", ".join(
    f"{_checks.dtype_of(leaf)}{list(np.shape(leaf))}" for leaf in leaves
  )
  return f"{treedef} of {arrays}"
