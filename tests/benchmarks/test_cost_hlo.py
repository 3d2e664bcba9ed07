# SPDX-License-Identifier: Apache-2.0
"""Counts that are read from compiled programs."""

import pytest

from benchmarks.cost import hlo
from tests.workers import tpu

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
  num_bytes, operations = hlo.traffic(HLO, 8)
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


TPU = """\
HloModule jit_step, is_scheduled=true

%update (p0: f32[9,8,128], p1: f32[8,128], p2: s32[]) -> f32[9,8,128] {
  %p0 = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%p1)
  ROOT %u = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %b, %p2)
}

%copied (p0: f32[9,8,128]) -> f32[9,8,128] {
  ROOT %n = f32[9,8,128]{2,1,0:T(8,128)} negate(%p0)
}

%taken (arg: (f32[8,128])) -> f32[8,128] {
  ROOT %d = f32[8,128]{1,0:T(8,128)S(1)} add(%x, %x)
}

ENTRY %main (t: f32[9,8,128], g: f32[8,128]) -> f32[9,8,128] {
  %t = f32[9,8,128]{2,1,0:T(8,128)} parameter(0)
  %g = f32[8,128]{1,0:T(8,128)} parameter(1)
  %c = (f32[8,128]{1,0:T(8,128)}) tuple(%g)
  %s = f32[8,128]{1,0:T(8,128)} conditional(%k, %c, %c), branch_computations={%taken, %taken}
  %a = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0}, u32[]{:S(2)}) all-reduce-start(%g), to_apply=%add
  %f = f32[9,8,128]{2,1,0:T(8,128)} fusion(%t, %g, %k), kind=kLoop, calls=%update
  %b = f32[8,128]{1,0:T(8,128)} all-reduce-done(%a)
  %e = f32[9,8,128]{2,1,0:T(8,128)} fusion(%f), kind=kLoop, calls=%copied
  ROOT %r = f32[9,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%e, %b, %k)
}
"""  # noqa: E501


def test_copies_are_not_updates_in_place():
  assert [x.name for x in tpu.copies(TPU, {"f32[9,8,128]"})] == ["e"]
  assert [x.name for x in tpu.copies(TPU, {"f32[8,128]"})] == [
    *("a", "b"),
    *("d", "d"),
  ]


def test_work_during_a_reduction():
  assert hlo.overlapped(TPU) == [1]
  assert hlo.overlapped(HLO) == []


def test_moved_bytes_leave_branches_out():
  entry, table = 8 * 128 * 4, 9 * 8 * 128 * 4
  reduction = (2 * entry + 4) + entry  # The start; then the end.
  update, copy = 2 * table + entry, 2 * table
  want = reduction + update + reduction + copy + update
  assert hlo.moved_bytes(TPU) == want


def test_a_loop_that_counts_to_a_constant():
  text = HLO.replace('"known_trip_count":{"n":"5"},', "").replace(
    "  ROOT %lt", "  %n = s32[] constant(7)\n  ROOT %lt"
  )
  assert hlo.traffic(text, 8).operations["all-gather"] == 7


def test_a_loop_of_unknown_length():
  text = HLO.replace('"known_trip_count":{"n":"5"},', "")
  with pytest.raises(ValueError, match="unknown number of trips"):
    hlo.traffic(text, 8)
