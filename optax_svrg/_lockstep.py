# SPDX-License-Identifier: Apache-2.0
"""Batches of several processes, kept in step."""

from collections.abc import Iterable, Iterator
import itertools
import time
from typing import Any

import jax
import numpy as np

from optax_svrg import _checks, _compat

_END = "no further batch"
_ALIKE = "alike"

# Of this process. Programs of all processes are alike, so their calls are, too.
_calls = itertools.count()
# Keys of iterators that have ended, which process 0 deletes once all processes
# have come to a later one.
_ended: list[str] = []


def lockstep(
  batches: Iterable[Any], *, timeout: float = 300.0
) -> Iterator[Any]:
  """Yields batches that every process has, or raises an error in all of them.

  Where several processes compute as one (:func:`jax.distributed.initialize`)
  and one of them runs out of batches or has a short one, the others would wait
  for it in a reduction forever. With this, the hosts compare structure, shapes
  and dtypes of each batch before it is used, over the network and while the
  devices are busy; nothing is sent between devices.

  :func:`optax_svrg.mean_gradient` does this by itself when its parameters span
  several processes. Use it for the batches of the training steps: ``for batch
  in lockstep(batches)``. All processes must make its calls in the same order.
  In a single process it changes nothing.

  Args:
    batches: any iterable of batches, which are trees of arrays, of the part of
      this process or of global arrays.
    timeout: number of seconds to wait for the other processes, more than any of
      them may take for a batch.

  Returns:
    An iterator over ``batches``.

  Raises:
    TypeError: if ``batches`` is a mapping or not iterable.
    ValueError: if ``timeout`` is not positive; while iterating, if another
      process has fewer or more batches, one of another structure, shape or
      dtype, or failed to make it.
    TimeoutError: while iterating, if another process does not reach the batch
      in time, or has died.

  Examples:
    >>> import numpy as np, optax_svrg
    >>> batches = (np.full(2, i) for i in range(3))
    >>> [int(batch.sum()) for batch in optax_svrg.lockstep(batches)]
    [0, 2, 4]
  """
  _checks.check_batches(batches)
  _checks.check_positive(timeout, "timeout")
  if isinstance(batches, _Lockstep):
    return batches  # They are in step already.
  client = _compat.coordination_client()
  if client is None:
    return iter(batches)
  return _Lockstep(batches, timeout, client)


def spans_processes(tree: Any) -> bool:
  """Returns whether any array is partly on devices of other processes."""
  return any(
    not leaf.is_fully_addressable
    for leaf in jax.tree.leaves(tree)
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
  )


class _Lockstep:
  """Iterates over batches that are alike in all processes."""

  def __init__(self, batches: Iterable[Any], timeout: float, client: Any):
    self._batches = iter(batches)
    self._timeout = timeout
    self._client = client
    self._name = f"optax_svrg/{next(_calls)}"
    self._index = itertools.count()

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    batch = error = None
    try:
      batch = next(self._batches)
      mine = _description(batch)
    except StopIteration:
      mine = _END
    # Whatever it is, the others must know.
    except Exception as e:
      error = e
      mine = f"{type(e).__name__}: {e}"
    index = next(self._index)
    try:
      verdict = self._compare(index, mine)
    except TimeoutError as e:
      raise e from (error or e.__cause__)
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
      _ended.extend(self._keys(index))
      raise StopIteration
    return batch

  def _keys(self, index: int) -> tuple[str, str]:
    """Returns the folder of the processes' batches, and the verdict's key."""
    return f"{self._name}/{index}", f"{self._name}/verdict/{index}"

  def _compare(self, index: int, mine: str) -> str:
    """Returns whether all processes have the same, or which have what."""
    is_first = jax.process_index() == 0
    deadline = time.monotonic() + self._timeout
    folder, verdict = self._keys(index)
    self._client.key_value_set(f"{folder}/{jax.process_index()}", mine)
    try:
      if is_first:
        # One reads and tells the others, which is less than if each read all.
        self._client.key_value_set(verdict, self._judge(folder, deadline))
      result = self._get(verdict, deadline)
    except jax.errors.JaxRuntimeError as e:
      raise TimeoutError(
        f"batches[{index}]: {self._reason(folder, e)} within"
        f" {self._timeout:g} seconds, or is lost."
      ) from e
    if is_first:
      # All have come here, so that the verdict before has been read.
      for key in (*_ended, *(self._keys(index - 1) if index else ())):
        self._client.key_value_delete(key)
      _ended.clear()
    return result

  def _judge(self, folder: str, deadline: float) -> str:
    """Waits for all processes, and compares their batches."""
    got = [
      self._get(f"{folder}/{process}", deadline)
      for process in range(jax.process_count())
    ]
    for process, other in enumerate(got):
      if other != got[0]:
        return f"{got[0]} in process 0 and {other} in process {process}"
    return _ALIKE

  def _get(self, key: str, deadline: float) -> str:
    milliseconds = int(1000 * (deadline - time.monotonic()))
    return self._client.blocking_key_value_get(key, max(milliseconds, 1))

  def _reason(self, folder: str, error: Exception) -> str:
    """Names the processes that did not arrive."""
    known = {
      int(key.rpartition("/")[2])
      for key, _ in self._client.key_value_dir_get(folder)
    }
    missing = sorted(set(range(jax.process_count())) - known)
    if not missing:
      return str(error).partition("\n")[0]
    which = ", ".join(map(str, missing))
    return f"process {which} of {jax.process_count()} did not come to it"


def _description(batch: Any) -> str:
  """Structure, shapes and dtypes of a batch in one line."""
  leaves, treedef = jax.tree.flatten(batch)
  arrays = ", ".join(
    f"{_checks.dtype_of(leaf)}{list(np.shape(leaf))}" for leaf in leaves
  )
  return f"{treedef} of {arrays}"
