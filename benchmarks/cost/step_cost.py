# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a step on made-up data, and its lower limit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from pathlib import Path
import statistics
import time
from typing import Any

import click
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cli, models
from benchmarks.cost import hlo
from benchmarks.harness import publishing, report, store
import optax_svrg

_NUM_CLASSES = 10
TRANSFORMS: dict[str, Any] = {
  "plain": optax.with_extra_args_support(optax.identity()),
  "alpha-svrg": optax_svrg.alpha_svrg(0.75),
  "adaptive": optax_svrg.adaptive_svrg(),
}
# Makes a model from ``rngs``, and the shape of an input.
Model = tuple[Callable[..., nnx.Module], tuple[int, ...]]


def mlp(*sizes: int, **settings: Any) -> Model:
  """A perceptron with some numbers of units, inputs and classes included."""
  return functools.partial(models.MLP, sizes, **settings), sizes[:1]


def image_model(name: str, size: int, *rest: int, **settings: Any) -> Model:
  """A model of :data:`benchmarks.models.MODELS`."""
  make = functools.partial(models.MODELS[name], size, *rest, **settings)
  return make, (size, size, rest[0])


def split(model: nnx.Module) -> tuple[optax.Params, Callable[..., jax.Array]]:
  """The parameters of a model, and its loss of parameters and a batch."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params: optax.Params, batch: Any) -> jax.Array:
    images, labels = batch
    logits = nnx.merge(graphdef, params, rest)(images).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  return nnx.as_pure(params), loss


def advance(
  tx: Any, params: Any, state: Any, grads: Any, **extra: Any
) -> tuple[Any, Any]:
  """Makes one step; returns the next parameters and state."""
  updates, state = tx.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def seconds(
  programs: Mapping[str, Iterator[Any]], rounds: int
) -> dict[str, list[float]]:
  """Times programs in turn, so that a busy machine slows all of them."""
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(1 + rounds):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(next(program))
      times[name].append(time.perf_counter() - start)
  return times


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
  """Median over the rounds of the ratio within a round."""
  return statistics.median(
    a / b for a, b in zip(times[name][1:], times[to][1:], strict=True)
  )


class Problem:
  """A model with made-up data, and its epochs with each method and AdamW.

  The data are the ``batches`` of an epoch, ``steps`` of them, with images and
  parameters of ``dtype``.
  """

  def __init__(self, model: Model, batch_size: int, steps: int, dtype: Any):
    make, shape = model
    rng = np.random.default_rng(0)
    self.batches = [
      (
        jnp.asarray(rng.normal(size=(batch_size, *shape)), dtype),
        jnp.asarray(rng.integers(_NUM_CLASSES, size=batch_size), jnp.int32),
      )
      for _ in range(steps)
    ]
    params, loss = split(make(rngs=nnx.Rngs(0)))
    self.params = optax.tree.cast(params, dtype)
    self.grad = jax.grad(loss)

  def lower_gradient(self) -> jax.stages.Lowered:
    """The gradient of one batch."""
    return jax.jit(self.grad).lower(self.params, self.batches[0])

  def lower_step(self, transform: Any) -> jax.stages.Lowered:
    """One step."""
    step, params, state = self._compile(transform)
    return step.lower(params, state, self.batches[0], 0)

  def programs(self) -> dict[str, Iterator[Any]]:
    """Methods' parameters and states, computed epoch by epoch when iterated."""
    plain, svrg, adaptive = TRANSFORMS.values()
    off = optax_svrg.alpha_svrg(optax.constant_schedule(0.0))
    mean = lambda *args: (optax_svrg.mean_gradient(*args), None)
    methods: dict[str, tuple[Any, Callable | None]] = {
      "plain": (plain, None),
      "alpha-svrg": (svrg, mean),
      "adaptive": (adaptive, mean),
      "alpha-svrg, table": (svrg, optax_svrg.gradient_table),
      "alpha-svrg, alpha = 0": (off, None),
      "adaptive-saga": (optax_svrg.adaptive_saga(len(self.batches)), None),
    }
    return {
      name: self._epochs(mean_and_table, *self._compile(transform))
      for name, (transform, mean_and_table) in methods.items()
    }

  def _compile(self, transform: Any) -> tuple[Any, Any, Any]:
    """A step, and the first parameters and state."""
    tx = optax.chain(transform, optax.adamw(1e-3))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, i: Any, table: Any = None):
      grad_fn = lambda p: self.grad(p, batch)
      extra: dict[str, Any] = {"grad_fn": grad_fn}
      if table is not None:
        extra = {"snapshot_grads": table[i]}
      return advance(tx, params, state, grad_fn(params), batch_index=i, **extra)

    params = jax.tree.map(jnp.array, self.params)
    return step, params, tx.init(params)

  def _epochs(
    self, mean_and_table: Callable | None, step: Any, params: Any, state: Any
  ) -> Iterator[Any]:
    """Epochs: a snapshot with its pass, if any, and the steps one by one.

    A scan over them would be one program, but XLA for CPU is many times slower
    at convolutions in a loop.
    """
    table = None
    while True:
      if mean_and_table is not None:
        mean, table = mean_and_table(self.grad, params, self.batches)
        state = optax_svrg.take_snapshot(state, params, lambda _: mean)  # noqa: B023
      for i, batch in enumerate(self.batches):
        params, state = step(params, state, batch, i, table)
      yield params, state


_SIZE, _WIDTH = 1_000_000, 1_000
# Models and batch sizes.
CASES = {
  "mlp-256-batch-128": (mlp(784, 256, 256, 10), 128),
  "mlp-1024-batch-128": (mlp(784, 1024, 1024, 10), 128),
  "mlp-1024-batch-1024": (mlp(784, 1024, 1024, 10), 1024),
  "vit-128-batch-128": (image_model("vit", 28, 1, 10, width=128, depth=4), 128),
  "convnet-batch-128": (image_model("convnet", 28, 1, 10), 128),
}
# Gradients of an epoch in addition to those of the steps, in epochs.
EXTRA_GRADIENTS = {
  "plain": 0,
  "alpha-svrg": 2,
  "adaptive": 2,
  "alpha-svrg, table": 1,
  "alpha-svrg, alpha = 0": 0,
  "adaptive-saga": 0,
}
# Arrays like the parameters that a step must read and write: AdamW reads the
# gradient, and reads and writes the parameters and two moments; SVRG reads the
# gradient at the snapshot and the mean gradient.
MUST_MOVE = {"plain": 7, "alpha-svrg": 9, "adaptive": 9}
NOTES = """\
Times are medians over the rounds of the ratio to plain's epoch in the same
round. The limit counts the operations of the gradients alone. Methods with
snapshots take one in each epoch, `table` keeps its gradients. The first run
includes compilation. The second table is of the transformation and AdamW
without gradients, in arrays of the parameters' size; the third of a whole step,
above plain's, in copies of the gradient."""


def flops(lowered: jax.stages.Lowered) -> float:
  """Operations, counted before the compiler calls libraries for some."""
  return lowered.cost_analysis()["flops"]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes in addition to those of the arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes


def measure_epochs(task: Problem, rounds: int) -> list[dict[str, Any]]:
  """Epoch times and their limit by the gradients that they need."""
  of_step = flops(task.lower_step(TRANSFORMS["plain"]))
  of_gradient = flops(task.lower_gradient())
  times = seconds(task.programs(), rounds)
  return [
    {
      "method": name,
      "time": ratio(times, name, "plain"),
      "limit": 1 + extra * of_gradient / of_step,
      "first": times[name][0] / times["plain"][0],
      "seconds": times[name],
    }
    for name, extra in EXTRA_GRADIENTS.items()
  ]


def temporary_gradients(task: Problem) -> dict[str, float]:
  """Temporary bytes of a step above plain's, in copies of the gradient."""
  transforms = {**TRANSFORMS, "adaptive-saga": optax_svrg.adaptive_saga(10)}
  temporary = {
    name: temporary_bytes(task.lower_step(transform).compile())
    for name, transform in transforms.items()
  }
  plain = temporary.pop("plain")
  size = sum(x.nbytes for x in jax.tree.leaves(task.params))
  return {name: (value - plain) / size for name, value in temporary.items()}


def updates_alone(size: int, dtype: Any) -> dict[str, jax.stages.Compiled]:
  """Compiles the transformation and AdamW, without the gradients."""
  grads = params = jnp.zeros((size // _WIDTH, _WIDTH), dtype)
  result = {}
  for name, transform in TRANSFORMS.items():
    tx = optax.chain(transform, optax.adamw(1e-3))
    update = functools.partial(advance, tx)
    jitted = jax.jit(update, donate_argnums=(0, 1))
    lowered = jitted.lower(params, tx.init(params), grads, snapshot_grads=grads)
    result[name] = lowered.compile()
  return result


def measure_updates(size: int, dtype: Any) -> list[dict[str, Any]]:
  """Returns the arrays that updates ``must_move``, and ``moves`` as compiled.

  What is in a branch that is not taken as a rule is left out.
  """
  array_bytes = size * jnp.dtype(dtype).itemsize
  return [
    {
      "method": name,
      "must_move": MUST_MOVE[name],
      "moves": hlo.moved_bytes(compiled.as_text()) / array_bytes,
      "temporary": temporary_bytes(compiled) / array_bytes,
    }
    for name, compiled in updates_alone(size, dtype).items()
  ]


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """Makes the published table from the stored measurements."""
  epochs = [
    (
      *(name, row["method"], f"{row['time']:.2f}", f"{row['limit']:.2f}"),
      *(f"{row['time'] / row['limit']:.3f}", f"{row['first']:.1f}"),
    )
    for name, case in document["cases"].items()
    for row in case["epochs"]
  ]
  updates = [
    (
      *(row["method"], str(row["must_move"])),
      *(f"{row['moves']:.1f}", f"{row['temporary']:.2f}"),
    )
    for row in document["updates"]
  ]
  temporary = [
    (name, *(f"{x:.2f}" for x in case["temporary_gradients"].values()))
    for name, case in document["cases"].items()
  ]
  tables = {
    "case|method|time / plain|limit|time / limit|first run / plain's": epochs,
    "method|arrays it must move|as compiled|temporary arrays": updates,
    "temporary gradients|alpha-svrg|adaptive|adaptive-saga": temporary,
  }
  machine = document["machine"]
  parts = (
    *("# Cost of a step", f"    {document['command']}"),
    f"On {machine['cpus']} cores of {machine['device']}, {document['dtype']}."
    f" {NOTES}",
    *(report.markdown_table(k.split("|"), v) for k, v in tables.items()),
  )
  return publishing.files(parts)


@click.command()
@cli.options(
  ("--dtype", ("float32", "bfloat16"), "float32", "Of weights and images."),
  ("--steps", cli.positive, 10, "Number of batches of an epoch."),
  ("--rounds", cli.positive, 7, "Runs of each epoch, after a first one."),
)
@cli.cell_option(CASES)
@cli.out_option("step-cost")
@cli.publish_option
def main(
  dtype: str,
  cells: Sequence[str],
  steps: int,
  rounds: int,
  out: Path,
  publish: bool,
) -> None:
  """Measures epochs and steps as ratios to the least that they could take."""
  document: dict[str, Any] = {
    "module": __name__,
    "command": "python -m benchmarks step-cost",
    **store.environment(),
    **{"dtype": dtype, "steps": steps, "rounds": rounds},
    "updates": measure_updates(_SIZE, jnp.dtype(dtype)),
    "cases": {},
  }
  for name in cells or CASES:
    task = Problem(*CASES[name], steps, jnp.dtype(dtype))
    document["cases"][name] = {
      "epochs": measure_epochs(task, rounds),
      "temporary_gradients": temporary_gradients(task),
    }
    store.write_json(out / "runs.json", document)
    click.echo(name, err=True)
  publishing.show("step_cost", document, publish)
