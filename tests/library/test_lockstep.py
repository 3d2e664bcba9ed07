# SPDX-License-Identifier: Apache-2.0
"""Batches kept in step, with a stand-in for the other process.

Real processes are in tests/distributed/test_processes.py.
"""

import ast
import pathlib
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

import optax_svrg
from optax_svrg import _compat


class Coordinator:
  """The service of two processes, of which the other does as this one.

  Attributes:
    values: what it holds.
    most: how many values it held at most.
    is_late: whether the other process does not come.
  """

  def __init__(self) -> None:
    self.values: dict[str, str] = {}
    self.most = 0
    self.is_late = False

  def key_value_set(self, key: str, value: str) -> None:
    assert key not in self.values
    self.values[key] = value
    folder, _, process = key.rpartition("/")
    if process == "0" and "verdict" not in key and not self.is_late:
      self.values[f"{folder}/1"] = value
    self.most = max(self.most, len(self.values))

  def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
    del milliseconds
    if key not in self.values:
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
    return self.values[key]

  def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
    return [x for x in self.values.items() if x[0].startswith(folder)]

  def key_value_delete(self, key: str) -> None:
    for other in list(self.values):
      if other == key or other.startswith(f"{key}/"):
        del self.values[other]


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Coordinator:
  result = Coordinator()
  monkeypatch.setattr(_compat, "coordination_client", lambda: result)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  return result


def test_keys_are_deleted(coordinator):
  """A long training does not make the coordinator grow."""
  for _ in range(20):
    batches = [np.ones(2)] * 50
    assert len(list(optax_svrg.lockstep(batches))) == 50
  # Those of two batches, and of the iterator before.
  assert coordinator.most <= 10
  assert len(coordinator.values) <= 10


def test_an_error_of_the_loader_is_in_the_chain_of_a_timeout(coordinator):
  def batches():
    yield np.ones(2)
    coordinator.is_late = True
    raise OSError("the disk is gone")

  stream = optax_svrg.lockstep(batches(), timeout=1)
  next(stream)
  with pytest.raises(
    TimeoutError, match="process 1 of 2 did not come to it within 1 seconds"
  ) as caught:
    next(stream)
  assert isinstance(caught.value.__cause__, OSError)


def test_a_timeout_without_an_error_of_the_loader(coordinator):
  coordinator.is_late = True
  with pytest.raises(TimeoutError, match="did not come") as caught:
    next(optax_svrg.lockstep([np.ones(2)]))
  assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_an_error_of_the_loader_is_its_own_where_the_other_comes(coordinator):
  def batches():
    raise OSError("the disk is gone")
    yield

  with pytest.raises(OSError, match="the disk is gone"):
    next(optax_svrg.lockstep(batches()))


def test_batches_in_step_are_taken_as_they_are(coordinator):
  """So that mean_gradient takes a longer timeout from lockstep."""
  stream = optax_svrg.lockstep([np.ones(2)], timeout=1000)
  assert optax_svrg.lockstep(stream) is stream


def test_one_process_has_nothing_to_compare():
  batches = [np.ones(2), np.ones(3)]
  assert list(optax_svrg.lockstep(batches)) == batches


@pytest.mark.parametrize(
  "module", [types.ModuleType("distributed"), None], ids=["moved", "gone"]
)
def test_what_is_not_public_in_jax_is_taken_lazily(module, monkeypatch):
  """And where it is missing, an error says what to do."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setitem(sys.modules, "jax._src.distributed", module)
  if module is None:
    monkeypatch.delattr(jax._src, "distributed", raising=False)
  else:
    monkeypatch.setattr(jax._src, "distributed", module)
  with pytest.raises(ImportError, match="or do without lockstep: give every"):
    optax_svrg.lockstep([np.ones(2)])


def test_no_module_imports_what_is_not_public_in_jax():
  for file in pathlib.Path(optax_svrg.__file__).parent.glob("*.py"):
    for node in ast.parse(file.read_text()).body:
      names: list[Any] = []
      if isinstance(node, ast.ImportFrom):
        names = [node.module]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      assert not any("jax._src" in str(name) for name in names), file


class TestOtherVersions:
  """Attributes of arrays that another version of JAX may lack."""

  def test_fallbacks(self, monkeypatch):
    class Bare:
      """A type of an array that tells nothing but shape and dtype."""

    monkeypatch.setattr(jax, "typeof", lambda _: Bare())
    assert _compat.varying_axes(np.ones(2)) == frozenset()
    assert not _compat.on_host(np.ones(2))
    assert _compat.is_committed(Bare())  # type: ignore[arg-type]

  def test_older_name_of_the_varying_axes(self, monkeypatch):
    aval = types.SimpleNamespace(vma=frozenset({"data"}))
    monkeypatch.setattr(jax, "typeof", lambda _: aval)
    assert _compat.varying_axes(np.ones(2)) == {"data"}
