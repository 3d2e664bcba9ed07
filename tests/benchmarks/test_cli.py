# SPDX-License-Identifier: Apache-2.0
"""The command line: what it lists, what it refuses, and how it ends."""

import math
from pathlib import Path
import subprocess
import sys

import click
import pytest

from benchmarks import cli
from benchmarks.data import arrays

# Their optional packages are not those of the benchmarks.
OPTIONAL = {name for name, e in cli.COMMANDS.items() if e.extra != "benchmarks"}


def load(name):
  """The command, if its optional packages are installed."""
  try:
    return cli.main.get_command(None, name)
  except ModuleNotFoundError as error:
    if name not in OPTIONAL:
      raise
    pytest.skip(f"{error.name} is not installed")


def run(*args):
  """The module in a process of its own."""
  return subprocess.run(
    [sys.executable, "-m", "benchmarks", *args],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )


def test_help_lists_each_command_in_one_line(call):
  result = call("--help")
  assert result.exit_code == 0
  lines = [line.split() for line in result.stdout.splitlines()]
  for name, entry in cli.COMMANDS.items():
    assert [name, *entry.help.split()] in lines


def test_help_imports_no_command():
  code = (
    "import sys; sys.argv = ['benchmarks', '--help']\n"
    "from benchmarks import cli\n"
    "try: cli.main()\n"
    "except SystemExit: pass\n"
    "assert 'jax' not in sys.modules and 'flax' not in sys.modules"
  )
  subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[2],
    check=True,
    capture_output=True,
  )


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help(name, call):
  load(name)
  result = call(name, "--help")
  assert result.exit_code == 0
  assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_numbers_must_be_finite(name, call):
  """Whatever the option: a new one that is a plain float fails here."""
  for option in load(name).params:
    if isinstance(option.type, click.types.FloatParamType):
      assert isinstance(option.type, cli.Number), option.name
      for value in ("nan", "inf", "-inf"):
        result = call(name, option.opts[-1], value)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ")
        assert value in line


def test_number():
  number = cli.Number(min=0, max=1)
  assert number.convert("0.5", None, None) == 0.5
  for value in (math.nan, "nan", "inf", "2"):
    with pytest.raises(click.BadParameter):
      number.convert(value, None, None)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ("nope", "No such command 'nope'"),
    ("train --colour=red", "No such option '--colour'"),
    ("train --dataset=cifar", "'--dataset': 'cifar' is not one of"),
    ("train --model=cnn", "'--model': 'cnn' is not one of"),
    ("train --methods=plain,sarah", "'sarah' is not one of 'plain'"),
    ("train --methods=svrg,svrg", "'svrg,svrg' has a name twice"),
    ("train --methods=", "'--methods': '' is not one of"),
    ("train --epochs=0", "'--epochs': 0 is not in the range"),
    ("train --lr=0", "'--lr': 0.0 is not in the range"),
    ("train --label-noise=nan", "'--label-noise': nan is not a finite number"),
    (
      "train --alpha0=0.5 --methods=plain,svrg",
      "--alpha0 needs the method alpha-svrg, got --methods plain,svrg.",
    ),
    (
      "train --snapshot-every=1 --methods=plain",
      "--snapshot-every needs a method with snapshots, got --methods plain.",
    ),
    ("train --data-dir=.", "--dataset mnist-5k takes no --data-dir, got ."),
    ("train --dataset=fashion-mnist", "fashion-mnist needs --data-dir."),
    (
      "train --dataset=fashion-mnist --data-dir=.",
      "train-images-idx3-ubyte.gz: No such file or directory.",
    ),
    ("train --batch-size=51 {small}", "training examples, 50, got 51."),
    ("train --resume", "--resume needs --checkpoint-dir."),
    ("paper --process-id=0", "--process-id needs --distributed."),
    (
      "paper --distributed --num-processes=2",
      "go together, --coordinator, --process-id is missing.",
    ),
    (
      "paper --distributed --coordinator=x:1 --num-processes=2 --process-id=2",
      "--process-id must be less than --num-processes, 2, got 2.",
    ),
    (
      "train --checkpoint-dir={file}/below {small} --batch-size=16",
      "--checkpoint-dir {file}/below: Not a directory.",
    ),
    ("train --out={file}", "'--out': Directory '{file}' is a file"),
    (
      "train --out={file}/below --batch-size=16 {small}",
      "{file}/below: Not a directory.",
    ),
    ("paper --scale=tiny", "'--scale': 'tiny' is not one of"),
    (
      "paper --scale=smoke --dataset=mnist-5k --warmup-epochs=2",
      "--warmup-epochs must be less than --epochs, 2, got 2.",
    ),
    (
      "paper --scale=smoke --dataset=mnist-5k --batch-size=61",
      "training examples, 60, got 61.",
    ),
    (
      "paper --scale=smoke --dataset=mnist-5k --model=mlp2 --drop-path=0.1",
      "--drop-path must be 0 for mlp2",
    ),
    ("paper", "cifar100"),
    ("variance --train-examples=20 --batch-size=8", "at least three batches"),
  ],
)
def test_errors_are_one_line(
  args, message, call, data_dir, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  file = tmp_path / "file"
  file.touch()
  values = {
    "file": file,
    "small": f"--dataset=fashion-mnist --data-dir={data_dir}",
  }
  result = call(*args.format(**values).split())
  assert result.exit_code == 2
  (line,) = result.stderr.splitlines()
  assert line.startswith("Error: ")
  assert message.format(**values) in line
  assert not result.stdout
  assert list(tmp_path.iterdir()) == [file]


def test_exit_status_of_the_module():
  result = run("train", "--methods=nag")
  assert result.returncode == 2
  assert not result.stdout
  assert result.stderr == (
    "Error: Invalid value for '--methods': 'nag' is not one of 'plain',"
    " 'plain-fixed', 'svrg', 'alpha-svrg', 'adaptive', 'saga',"
    " 'adaptive-saga'.\n"
  )


def test_a_missing_package_names_its_extra(call, monkeypatch):
  entry = cli.Entry("Fails.", "no_such_package.module", "tfds")
  monkeypatch.setitem(cli.COMMANDS, "fails", entry)
  result = call("fails")
  assert result.exit_code == 2
  assert result.stderr == (
    "Error: fails needs the package 'no_such_package':"
    ' pip install "optax-svrg[tfds]".\n'
  )


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package(
  call, monkeypatch
):
  entry = cli.Entry("Fails.", "benchmarks.no_such_module")
  monkeypatch.setitem(cli.COMMANDS, "fails", entry)
  result = call("fails")
  assert isinstance(result.exception, ModuleNotFoundError)


def test_without_click():
  code = (
    "import sys, runpy; sys.modules['click'] = None\n"
    "runpy.run_module('benchmarks', run_name='__main__')"
  )
  result = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert result.stderr == (
    "Error: the package 'click' is missing:"
    ' pip install "optax-svrg[benchmarks]".\n'
  )


def test_interruption_while_loading(call, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(arrays, "load", interrupted)
  result = call("train")
  assert result.exit_code == cli.INTERRUPTED
  assert result.stderr.strip() == "Interrupted."
