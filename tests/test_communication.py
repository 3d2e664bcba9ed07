# SPDX-License-Identifier: Apache-2.0
"""Bytes on the wire, from compiled programs."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import communication

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (arg: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %x = bf16[4,2]{1,0} get-tuple-element(%arg), index=1
  %g = bf16[32,2]{1,0} all-gather(%x), channel_id=2, dimensions={0}
  ROOT %t = (s32[], bf16[4,2]{1,0}) tuple(%i, %y)
}

%cond (arg: (s32[], bf16[4,2])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%branch (arg: (f32[8])) -> f32[1] {
  ROOT %rs = f32[1]{0} reduce-scatter(%z), dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[3], q: bf16[4,2]) -> f32[] {
  %r = (f32[3]{0}, f32[]) all-reduce(%p, %s), channel_id=1, to_apply=%add, metadata={op_name="x"}
  %w = (s32[], bf16[4,2]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"},"x":1}
  %c = f32[1]{0} conditional(%k, %a, %b), branch_computations={%branch, %branch}
  %s1 = ((f32[2]{0}), f32[2]{0}) collective-permute-start(%v), channel_id=3
  ROOT %o = f32[] constant(0)
}
"""  # noqa: E501


def test_traffic():
  num_bytes, operations = communication.traffic(HLO, 8)
  assert num_bytes == {
    "all-reduce": 16,
    "all-gather": 5 * 128,
    "reduce-scatter": 2 * 8 * 4,
    "other": 8,
  }
  assert operations == {
    "all-reduce": 1,
    "all-gather": 5,
    "reduce-scatter": 2,
    "other": 1,
  }


def test_a_loop_of_unknown_length():
  text = HLO.replace('"known_trip_count":{"n":"5"},', "")
  with pytest.raises(ValueError, match="unknown number of trips"):
    communication.traffic(text, 8)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """What the command counts, in a process that has eight devices."""
  out = tmp_path_factory.mktemp("communication")
  subprocess.run(
    [
      *(sys.executable, "-m", "benchmarks.communication"),
      *("--model", "mlp2", "--out", str(out)),
    ],
    env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    check=True,
    capture_output=True,
    timeout=600,
  )
  results = json.loads((out / "communication.json").read_text())
  return {(row["how"], row["method"]): row for row in results["rows"]}


def test_one_reduction_per_step(rows):
  how = "shard_map, step"
  plain = rows[how, "plain"]["total"]
  assert plain > 0
  assert rows[how, "alpha-svrg"]["total"] == plain
  assert rows[how, "adaptive-saga"]["total"] == plain
  assert rows[how, "adaptive"]["total"] == plain + 2 * 4
  assert rows[how, "alpha-svrg, naive"]["total"] == 2 * plain
  for method in ("alpha-svrg", "adaptive", "adaptive-saga"):
    assert sum(rows[how, method]["operations"].values()) == 1


def test_one_reduction_per_pass(rows):
  step = rows["shard_map, step", "plain"]["total"]
  ours, naive = (
    rows["shard_map, pass", method] for method in ("mean_gradient", "naive")
  )
  assert ours["total"] == step
  assert ours["operations"]["all-reduce"] == 1
  assert naive["total"] == 4 * step


@pytest.mark.parametrize(
  "how",
  [
    "jit, replicated, step",
    "jit, state sharded (ZeRO), step",
    "jit, parameters sharded too (FSDP), step",
  ],
)
def test_under_jit_there_is_nothing_but_the_gradients(rows, how):
  """And scalars: of the estimate, and whether all is finite."""
  plain = rows[how, "plain"]["total"]
  scalars = 256
  assert plain <= rows[how, "adaptive-saga"]["total"] <= plain + scalars
  for method in ("alpha-svrg", "adaptive"):
    assert rows[how, method]["total"] <= 2 * plain + scalars
