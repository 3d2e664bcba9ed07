# SPDX-License-Identifier: Apache-2.0
"""Trains in a process that kills itself; see test_resume.py."""

import os
import signal
import sys
import threading
import time

import jax
import orbax.checkpoint as ocp

from benchmarks import cli
from benchmarks.harness.array_feed import ArrayFeed


def _kill(after=0.0):
  time.sleep(after)
  os.kill(os.getpid(), signal.SIGKILL)


def main(args, kill):
  """Trains.

  Args:
    args: of the command line.
    kill: ``None``, or what is to be interrupted (``"steps"``, ``"pass"`` or
      ``"write"``), the how-manieth of these, and for how many seconds to let
      it run. After as many intervals of steps it is killed in any case.
  """
  sys.stdout = sys.stderr = open(os.devnull, "w")
  jax.config.update("jax_platforms", "cpu")
  if kill is not None:
    _arm(*kill)
  cli.main(["train", *map(str, args)])


def _arm(what, number, delay):
  counts = dict.fromkeys(("steps", "pass", "write"), 0)

  def count(kind):
    """Whether it is this one."""
    counts[kind] += 1
    is_late = kind == "steps" and counts[kind] > number + 4
    return is_late or (kind == what and counts[kind] == number)

  def while_it_runs(kind, fn, is_meant=lambda args: True):
    def interrupted(*args):
      if is_meant(args) and count(kind):
        threading.Thread(target=_kill, args=(delay,), daemon=True).start()
      return fn(*args)

    return interrupted

  make_program = ArrayFeed.program

  def make_interrupted(*args):
    program = make_program(*args)
    return program._replace(
      advance=while_it_runs("steps", program.advance),
      begin=while_it_runs(
        "pass", program.begin, is_meant=lambda args: args[-1]
      ),
    )

  ArrayFeed.program = make_interrupted
  save = ocp.CheckpointManager.save

  def interrupted_save(*args, **kwargs):
    saved = save(*args, **kwargs)
    # It is being written in the background.
    if count("write"):
      _kill(delay)
    return saved

  ocp.CheckpointManager.save = interrupted_save
