# SPDX-License-Identifier: Apache-2.0
"""What the command prints of counts; those are made in test_tpu."""

import json
import subprocess

from click.testing import CliRunner
import pytest

import benchmarks
from benchmarks import cli
from benchmarks.cost import tpu
from benchmarks.cost.tpu_program import Case
from benchmarks.harness import publishing

GIB = 2**30
COUNTS = {
  "devices": 16,
  "params": 1000,
  "state": 0,
  "table": 0,
  "fits": True,
  "flops": 1e6,
  "bytes_accessed": 50_000,
  "arguments": 5000,
  "temporary": 2000,
  "needed": 7000,
  "host": 0,
  "collective_bytes": {"all-reduce": 1000, "other": 0},
  "collectives": {"all-reduce": 1, "other": 0},
  "overlapped": [3, 0],
}
SAGA = Case("vit-tiny", "adaptive-saga", "jit", "v5e:4x4")


def count(case):
  """Made-up counts: of SAGA 20 P more bytes, and half a P more temporary."""
  if case.method == "plain":
    return COUNTS
  return {
    **COUNTS,
    "state": 20 * GIB,
    "table": 16 * GIB,
    "bytes_accessed": 70_000,
    "temporary": 2500,
    "needed": 21 * GIB,
    "fits": case.placement == "fsdp",
  }


@pytest.fixture
def compiled(monkeypatch):
  """The cases that are compiled."""
  cases = []

  def compile_case(case):
    cases.append(case)
    return count(case)

  monkeypatch.setattr(tpu, "compile_case", compile_case)
  return cases


def run(folder, *args):
  return CliRunner().invoke(cli.main, ["tpu", "--out", str(folder), *args])


def test_command(tmp_path, compiled):
  args = ("--method", "adaptive-saga", "--placement", "fsdp,jit")
  result = run(tmp_path, *args)
  assert result.exit_code == 0, result.output
  assert {case[1:3] for case in compiled} == {
    (method, placement)
    for method in ("plain", "adaptive-saga")
    for placement in ("fsdp", "jit")
  }
  table = (tmp_path / "table.md").read_text()
  assert table in result.output
  row = "| vit-tiny | v5e:4x4 | fsdp | adaptive-saga, 312 batches | 1.000 |"
  assert f"{row} 1.400 | 20.0 | 0.50 | 16384 | 21504 | 0 | 1.000 |" in table
  assert "1, 2 asynchronous, 1 overlapped" in table
  row = "| vit-tiny | v5e:4x4 | jit | adaptive-saga, 312 batches |"
  assert f"{row} does not fit |  |  |  | 16384 | 21504 |  |  |  |" in table
  record = json.loads((tmp_path / f"{SAGA.name}.json").read_text())
  assert Case(**record["case"]) == SAGA
  assert record["versions"]["jax"]
  # What is stored is not compiled again.
  compiled.clear()
  assert run(tmp_path, *args).output == result.output
  assert compiled == []


def test_the_published_table_is_made_of_stored_cases():
  folder = publishing.FOLDER / "tpu"
  table = (folder / "table.md").read_text("utf-8")
  assert table == tpu.table(tpu.stored(folder)) + "\n"
  assert "| 1.000 | 1.000 | 0.0 | 0.00 |" in table


class TestFit:
  def test_what_makes_it_fit(self):
    first, *rest = tpu.fit(SAGA, count(SAGA)).splitlines()
    assert "needs 21.00 of the 16 GiB" in first
    assert rest == [
      "  with table_dtype=bfloat16: about 13.00 GiB, fits",
      "  with ZeRO: about 2.25 GiB, fits",
      "  with ZeRO and table_dtype=bfloat16: about 1.75 GiB, fits",
      "  with the state in the host's memory: about 1.00 GiB, fits",
    ]

  def test_what_does_not(self):
    case = SAGA._replace(placement="fsdp", table_dtype="bfloat16")
    counts = {**count(case), "needed": 37 * GIB}
    assert tpu.fit(case, counts).splitlines()[1:] == [
      "  with the state in the host's memory: about 17.00 GiB, does not fit"
    ]

  def test_it_fits(self):
    case = SAGA._replace(topology="v5p:4x4x4")
    counts = {**count(case), "fits": True}
    (line,) = tpu.fit(case, counts).splitlines()
    assert "needs 21.00 of the 95 GiB" in line


def test_plain_has_no_state_on_the_host():
  host = SAGA._replace(placement="host", table_dtype="bfloat16")
  assert tpu.baseline(host) == Case("vit-tiny", "plain", "jit", "v5e:4x4")


@pytest.mark.parametrize(
  "message", ["OSError: no libtpu", "RuntimeError: TPU support not installed."]
)
def test_the_compiler_is_missing(monkeypatch, message):
  def fail(*args, **kwargs):
    return subprocess.CompletedProcess(args, 1, "", f"x\n{message}\n")

  monkeypatch.setattr(subprocess, "run", fail)
  match = rf"{message.rstrip('.')}\. .*jax\[tpu\]"
  with pytest.raises(benchmarks.UserError, match=match):
    tpu.compile_case(SAGA)


def test_a_batch_is_divided_among_the_devices(tmp_path, compiled):
  args = ("--topology", "v5e:4x4,v5p:4x4x4", "--batch-size", "16")
  result = run(tmp_path, *args)
  assert result.exit_code == 2
  assert "--batch-size must be a multiple of the number of devices, 64" in (
    result.output
  )
  assert compiled == []
