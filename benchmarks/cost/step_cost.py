# SPDX-License-Identifier: Apache-2.0
"""Measures what a step costs, beside the least that it could.

Run ``python -m benchmarks.step_cost --help``.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from pathlib import Path
import statistics
import time
from typing import Any, NamedTuple

import click
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks import grid, reporting, train
from benchmarks.models import small as models
import optax_svrg

IMAGE_SHAPE, NUM_CLASSES = (1, 28, 28), 10
_PEAK_SIZE, _PEAK_PRODUCTS = 4096, 4

MODELS: Mapping[str, Callable[..., nnx.Module]] = {
  **{
    f"mlp-{width}": lambda shape, classes, rngs, width=width: models.MLP(
      [int(np.prod(shape)), width, width, classes], rngs=rngs
    )
    for width in (256, 1024)
  },
  "vit-128": functools.partial(models.ViT, width=128, depth=4),
  "convnet": models.ConvNet,
}


class Case(NamedTuple):
  """A model and a batch size."""

  model: str
  batch_size: int


CASES = {
  f"{case.model}-batch-{case.batch_size}": case
  for case in (
    Case("mlp-256", 128),
    Case("mlp-1024", 128),
    Case("mlp-1024", 1024),
    Case("vit-128", 128),
    Case("convnet", 128),
  )
}
# Gradients of an epoch beside those of the steps, in epochs.
EXTRA_GRADIENTS = {
  "plain": 0,
  "alpha-svrg": 2,
  "alpha-svrg, no branch": 2,
  "adaptive": 2,
  "alpha-svrg, table": 1,
  "alpha-svrg, alpha = 0": 0,
  "adaptive, no snapshot": 0,
  "adaptive-saga": 0,
}
# Arrays like the parameters that a step must read and write: AdamW reads the
# gradient, and reads and writes the parameters and two moments; SVRG reads the
# gradient at the snapshot and the mean gradient.
MOVED = {"plain": 7, "alpha-svrg": 9, "adaptive": 9}


class Program(NamedTuple):
  """Something to be timed.

  Attributes:
    run: takes a state and returns the next one.
    state: the first one.
  """

  run: Callable[[Any], Any]
  state: Any


def seconds(
  programs: Mapping[str, Program], rounds: int
) -> dict[str, list[float]]:
  """Times programs in turn, so that a busy machine slows all of them.

  Args:
    programs: the programs, by their names.
    rounds: how many times to run each, after a first time.

  Returns:
    The seconds of the first time, which includes compilation, and of each
    round.
  """
  states = {name: program.state for name, program in programs.items()}
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(1 + rounds):
    for name, program in programs.items():
      start = time.perf_counter()
      states[name] = jax.block_until_ready(program.run(states[name]))
      times[name].append(time.perf_counter() - start)
  return times


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
  """Median over the rounds of the ratio within a round."""
  return statistics.median(
    a / b for a, b in zip(times[name][1:], times[to][1:], strict=True)
  )


def no_transform() -> optax.GradientTransformationExtraArgs:
  """What plain is."""
  return optax.with_extra_args_support(optax.identity())


class Problem:
  """A model with made-up data, and its epochs with each method.

  Args:
    make_model: see :data:`benchmarks.models.MODELS`.
    batch_size: number of examples in a batch.
    steps: number of batches of an epoch.
    dtype: of the parameters and the images.
    optimizer: what the methods are chained before.

  Attributes:
    params: the initial parameters.
    batches: images and labels, batch by batch.
  """

  def __init__(
    self,
    make_model: Callable[..., nnx.Module],
    batch_size: int,
    steps: int,
    dtype: Any,
    optimizer: optax.GradientTransformation,
  ):
    rng = np.random.default_rng(0)
    pixels = int(np.prod(IMAGE_SHAPE))
    self.batches = [
      (
        jnp.asarray(rng.normal(size=(batch_size, pixels)), dtype),
        jnp.asarray(rng.integers(NUM_CLASSES, size=batch_size), jnp.int32),
      )
      for _ in range(steps)
    ]
    model = make_model(IMAGE_SHAPE, NUM_CLASSES, rngs=nnx.Rngs(0))
    self._graphdef, params = nnx.split(model, nnx.Param)
    self.params = optax.tree.cast(nnx.as_pure(params), dtype)
    self._optimizer = optimizer

  def grad(self, params: optax.Params, batch: Any) -> optax.Updates:
    """The gradient of a batch."""
    return jax.grad(self._loss)(params, batch)

  def _loss(self, params: optax.Params, batch: Any) -> jax.Array:
    images, labels = batch
    logits = nnx.merge(self._graphdef, params)(images).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def lower_gradient(self) -> jax.stages.Lowered:
    """The gradient of one batch."""
    return jax.jit(self.grad).lower(self.params, self.batches[0])

  def lower_step(
    self, transform: optax.GradientTransformationExtraArgs
  ) -> jax.stages.Lowered:
    """One step."""

    def step(params, state, batch):
      return self._step(transform, params, state, batch, {})

    return jax.jit(step, donate_argnums=(0, 1)).lower(
      *self._start(transform), self.batches[0]
    )

  def programs(self, alpha: float = 0.75) -> dict[str, Program]:
    """The epochs with the methods of :data:`EXTRA_GRADIENTS`.

    Args:
      alpha: coefficient of α-SVRG.

    Returns:
      Programs whose states are parameters and the state of the optimizer.
    """
    svrg = optax_svrg.alpha_svrg(alpha)
    off = optax_svrg.alpha_svrg(optax.constant_schedule(0.0))
    saga = optax_svrg.adaptive_saga(len(self.batches))
    return {
      "plain": self._program(no_transform()),
      "alpha-svrg": self._program(svrg, self._take_snapshot),
      "alpha-svrg, no branch": self._program(
        svrg, self._take_snapshot, has_branch=False
      ),
      "adaptive": self._program(
        optax_svrg.adaptive_svrg(), self._take_snapshot
      ),
      "alpha-svrg, table": self._program(svrg, self._make_table),
      "alpha-svrg, alpha = 0": self._program(off),
      "adaptive, no snapshot": self._program(optax_svrg.adaptive_svrg()),
      "adaptive-saga": self._program(saga),
    }

  def _start(self, transform: Any) -> tuple[optax.Params, Any]:
    params = jax.tree.map(jnp.array, self.params)
    return params, optax.chain(transform, self._optimizer).init(params)

  def _step(
    self, transform: Any, params: Any, state: Any, batch: Any, extra: dict
  ) -> tuple[optax.Params, Any]:
    grad_fn = lambda p: self.grad(p, batch)
    if "snapshot_grads" not in extra:
      extra = {"grad_fn": grad_fn, **extra}
    updates, state = optax.chain(transform, self._optimizer).update(
      grad_fn(params), state, params, **extra
    )
    return optax.apply_updates(params, updates), state

  def _program(
    self,
    transform: optax.GradientTransformationExtraArgs,
    prepare: Callable = lambda params, state: (state, None),
    has_branch: bool = True,
  ) -> Program:
    """An epoch: what comes before the steps, and the steps one by one.

    With ``grad_fn`` the gradient at the snapshot is in a branch, as it is not
    always needed. Without a branch it is always computed.

    A scan over them would be one program, but XLA for CPU is many times slower
    at convolutions in a loop.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, i, table):
      extra = {"batch_index": i}
      if table is not None:
        extra["snapshot_grads"] = table[i]
      if not has_branch:
        snapshot = optax.tree.get(state, "snapshot_params")
        extra["snapshot_grads"] = self.grad(snapshot, batch)
      return self._step(transform, params, state, batch, extra)

    def run(carry):
      params, state = carry
      state, table = prepare(params, state)
      for i, batch in enumerate(self.batches):
        params, state = step(params, state, batch, i, table)
      return params, state

    return Program(run, self._start(transform))

  def _take_snapshot(self, params: Any, state: Any) -> tuple[Any, None]:
    """Takes the snapshot, with a pass over the batches."""
    return optax_svrg.take_snapshot(
      state,
      params,
      lambda p: optax_svrg.mean_gradient(self.grad, p, self.batches),
    ), None

  def _make_table(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Takes the snapshot with a table of the gradients of the batches."""
    mean, table = optax_svrg.gradient_table(self.grad, params, self.batches)
    return optax_svrg.take_snapshot(state, params, lambda _: mean), table


def flops(lowered: jax.stages.Lowered) -> float:
  """Operations, counted before the compiler calls libraries for some."""
  return lowered.cost_analysis()["flops"]


def measure_epochs(
  case: Case, dtype: Any, steps: int, rounds: int
) -> list[dict[str, Any]]:
  """Epoch times beside their limit by the gradients that they need.

  Args:
    case: the case.
    dtype: of the parameters.
    steps: number of batches of an epoch.
    rounds: how many times to run each epoch.

  Returns:
    A row for each method: ``time``, that of the epoch, and ``limit``, the
    operations of the plain steps and of the further gradients, both divided
    by those of the plain epoch; ``first``, the time of the first run with
    compilation, likewise; ``flops_per_second``; ``seconds`` of all runs.
  """
  problem = Problem(
    MODELS[case.model], case.batch_size, steps, dtype, optax.adamw(1e-3)
  )
  of_step = flops(problem.lower_step(no_transform()))
  of_gradient = flops(problem.lower_gradient())
  times = seconds(problem.programs(), rounds)
  rows = []
  for name, extra in EXTRA_GRADIENTS.items():
    needed = of_step + extra * of_gradient
    rows.append(
      {
        "method": name,
        "time": ratio(times, name, "plain"),
        "limit": needed / of_step,
        "first": times[name][0] / times["plain"][0],
        "flops_per_second": steps * needed / statistics.median(times[name][1:]),
        "seconds": times[name],
      }
    )
  return rows


def temporary_gradients(case: Case, dtype: Any) -> dict[str, float]:
  """Temporary bytes of a step above plain's, in copies of the gradient."""
  problem = Problem(
    MODELS[case.model], case.batch_size, 1, dtype, optax.adamw(1e-3)
  )
  temporary = {
    name: problem.lower_step(transform)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for name, transform in (
      ("plain", no_transform()),
      ("alpha-svrg", optax_svrg.alpha_svrg(0.75)),
      ("adaptive", optax_svrg.adaptive_svrg()),
    )
  }
  size = sum(x.nbytes for x in jax.tree.leaves(problem.params))
  plain = temporary.pop("plain")
  return {name: (value - plain) / size for name, value in temporary.items()}


def updates_alone(
  size: int, dtype: Any
) -> dict[str, tuple[jax.stages.Compiled, Program]]:
  """The transformation and AdamW, without the gradients.

  Args:
    size: number of parameters.
    dtype: their dtype.

  Returns:
    For each method the compiled update, and the program that calls it.
  """
  params, grads, snapshot_grads, mean = jax.random.normal(
    jax.random.key(0), (4, size)
  ).astype(dtype)
  transforms = {
    "plain": no_transform(),
    "alpha-svrg": optax_svrg.alpha_svrg(0.75),
    "adaptive": optax_svrg.adaptive_svrg(),
  }
  result = {}
  for name, transform in transforms.items():
    tx = optax.chain(transform, optax.adamw(1e-3))
    state = tx.init(params)
    if name != "plain":
      state = optax_svrg.take_snapshot(state, params, lambda _: mean)

    def update(carry, grads, snapshot_grads, tx=tx):
      params, state = carry
      updates, state = tx.update(
        grads, state, params, snapshot_grads=snapshot_grads
      )
      return optax.apply_updates(params, updates), state

    carry = jnp.array(params), state
    compiled = (
      jax.jit(update, donate_argnums=0)
      .lower(carry, grads, snapshot_grads)
      .compile()
    )
    run = functools.partial(_call, compiled, grads, snapshot_grads)
    result[name] = compiled, Program(run, carry)
  return result


def _call(compiled: Any, grads: Any, snapshot_grads: Any, carry: Any) -> Any:
  return compiled(carry, grads, snapshot_grads)


def measure_updates(size: int, dtype: Any, rounds: int) -> list[dict[str, Any]]:
  """The transformation alone beside the bytes that it must move.

  Args:
    size: number of parameters.
    dtype: their dtype.
    rounds: how many times to run each program.

  Returns:
    A row for each method: the arrays that it ``must_move`` and those that it
    ``moves`` as compiled, its ``time`` divided by that of moving the former at
    the bandwidth of adding two arrays, and that bandwidth in bytes per second.
  """
  updates = updates_alone(size, dtype)
  programs = {name: program for name, (_, program) in updates.items()}
  add = jax.jit(jnp.add, donate_argnums=0)
  other = jnp.ones(size, dtype)
  programs["add"] = Program(lambda x: add(x, other), jnp.ones(size, dtype))
  times = seconds(programs, rounds)
  array_bytes = other.nbytes
  # Adding moves three. The best of all rounds, here and of the updates: what
  # others do to the memory meanwhile does not slow all programs alike.
  bandwidth = 3 * array_bytes / min(times["add"][1:])
  return [
    {
      "method": name,
      "must_move": moved,
      "moves": updates[name][0].cost_analysis()["bytes accessed"] / array_bytes,
      "time": min(times[name][1:]) * bandwidth / (moved * array_bytes),
      "bandwidth": bandwidth,
      "seconds": times[name],
    }
    for name, moved in MOVED.items()
  ]


def matmul_peak(size: int, dtype: Any, rounds: int) -> float:
  """Operations per second of products of large matrices.

  Args:
    size: rows and columns.
    dtype: dtype of the matrices.
    rounds: how many times to measure; the best counts.
  """
  x = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  x = x.astype(dtype)

  @jax.jit
  def products(y):
    return jax.lax.fori_loop(0, _PEAK_PRODUCTS, lambda _, y: x @ y, y)

  (times,) = seconds({"": Program(products, x)}, rounds).values()
  return 2 * size**3 * _PEAK_PRODUCTS / min(times[1:])


def state_copies(num_batches: int) -> list[dict[str, Any]]:
  """Bytes of the states, in copies of float32 parameters.

  Args:
    num_batches: of the tables.

  Returns:
    A row for each ``state``: copies ``on_device``, and ``on_host``.
  """
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  params = jax.ShapeDtypeStruct(
    (1_000_000,), jnp.float32, sharding=NamedSharding(mesh, P())
  )
  offloaded = jax.ShapeDtypeStruct(
    params.shape,
    params.dtype,
    sharding=params.sharding.with_memory_kind("pinned_host"),
  )
  svrg = optax_svrg.alpha_svrg(0.75)
  halves = optax_svrg.alpha_svrg(0.75, snapshot_dtype=jnp.bfloat16)
  saga = optax_svrg.adaptive_saga(num_batches)
  half_table = optax_svrg.adaptive_saga(num_batches, table_dtype=jnp.bfloat16)
  rows = []
  for name, transform, stored, table_bytes in (
    ("alpha_svrg", svrg, params, 0),
    ("alpha_svrg, snapshot_dtype=bfloat16", halves, params, 0),
    ("alpha_svrg, in the memory of the host", svrg, offloaded, 0),
    ("adaptive_svrg", optax_svrg.adaptive_svrg(), params, 0),
    (f"alpha_svrg, gradient_table of {num_batches}", svrg, params, 4),
    ("the same, dtype=bfloat16", svrg, params, 2),
    (f"adaptive_saga, {num_batches} batches", saga, params, 0),
    ("the same, table_dtype=bfloat16", half_table, params, 0),
    ("adaptive_saga, in the memory of the host", saga, offloaded, 0),
  ):
    leaves = jax.tree.leaves(jax.eval_shape(transform.init, params))
    shardings = jax.tree.leaves(optax_svrg.state_shardings(transform, stored))
    copies = {True: table_bytes * num_batches / 4, False: 0.0}
    for leaf, sharding in zip(leaves, shardings, strict=True):
      is_on_device = sharding.memory_kind != "pinned_host"
      size = leaf.size * leaf.dtype.itemsize
      copies[is_on_device] += size / (params.size * params.dtype.itemsize)
    rows.append(
      {"state": name, "on_device": copies[True], "on_host": copies[False]}
    )
  return rows


def tables(results: Mapping[str, Any]) -> str:
  """What is published, in Markdown.

  Args:
    results: the contents of the JSON file.
  """
  rows_of = {
    (name, row["method"]): row
    for name, case in results["cases"].items()
    for row in case["epochs"]
  }
  epochs = reporting.markdown_table(
    (
      *("case", "method", "time / plain", "limit", "time / limit"),
      *("share of peak", "first run / plain's"),
    ),
    [
      (
        name,
        method,
        f"{row['time']:.2f}",
        f"{row['limit']:.2f}",
        f"{row['time'] / row['limit']:.3f}",
        f"{row['flops_per_second'] / results['matmul_peak']:.0%}",
        f"{row['first']:.1f}",
      )
      for (name, method), row in rows_of.items()
    ],
  )
  updates = reporting.markdown_table(
    (
      *("method", "arrays it must move", "arrays moved as compiled"),
      *("moved / must", "time / limit", "GB/s measured"),
    ),
    [
      (
        row["method"],
        str(row["must_move"]),
        f"{row['moves']:.1f}",
        f"{row['moves'] / row['must_move']:.2f}",
        f"{row['time']:.2f}",
        f"{row['bandwidth'] / 1e9:.1f}",
      )
      for row in results["updates"]
    ],
  )
  states = reporting.markdown_table(
    ("state", "copies on the device", "in the memory of the host"),
    [
      (row["state"], f"{row['on_device']:.2f}", f"{row['on_host']:.2f}")
      for row in results["states"]
    ],
  )
  temporary = reporting.markdown_table(
    ("case", "alpha-svrg", "adaptive"),
    [
      (name, *(f"{x:.2f}" for x in case["temporary_gradients"].values()))
      for name, case in results["cases"].items()
    ],
  )
  return "\n\n".join((epochs, updates, states, temporary))


steps_option = click.option(
  "--steps",
  type=click.IntRange(min=1),
  default=10,
  show_default=True,
  help="Number of batches of an epoch.",
)


@click.command(cls=train.Command)
@click.option(
  "--dtype",
  type=click.Choice(["float32", "bfloat16"]),
  default="float32",
  show_default=True,
  help="Of parameters and images.",
)
@grid.cell_option(CASES)
@steps_option
@click.option(
  "--rounds",
  type=click.IntRange(min=1),
  default=5,
  show_default=True,
  help="How many times everything is run, after a first time.",
)
@click.option(
  "--size",
  type=click.IntRange(min=1),
  default=10_000_000,
  show_default=True,
  help="Number of parameters of the transformation alone.",
)
@click.option(
  "--out",
  type=click.Path(file_okay=False, path_type=Path),
  default=Path("results", "step_cost"),
  show_default=True,
  help="Folder for results.json.",
)
def main(
  dtype: str,
  cells: Sequence[str],
  steps: int,
  rounds: int,
  size: int,
  out: Path,
) -> None:
  """Measures epochs and steps as ratios to the least that they could take.

  Prints tables of epochs, of the transformation alone, of states, and of the
  temporary bytes of a step above plain's in copies of the gradient; and writes
  a JSON file. Compilation counts in the first run only.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise click.UsageError(f"--out {out}: {e.strerror}.") from e
  results: dict[str, Any] = {
    **train.environment(),
    **{"dtype": dtype, "steps": steps, "rounds": rounds, "size": size},
    "matmul_peak": matmul_peak(_PEAK_SIZE, jnp.dtype(dtype), min(rounds, 3)),
    "updates": measure_updates(size, jnp.dtype(dtype), 3 * rounds),
    "states": state_copies(steps),
    "cases": {},
  }
  for name in cells or CASES:
    results["cases"][name] = {
      "epochs": measure_epochs(CASES[name], jnp.dtype(dtype), steps, rounds),
      "temporary_gradients": temporary_gradients(CASES[name], jnp.dtype(dtype)),
    }
    reporting.write_json(out / "results.json", results)
    click.echo(name, err=True)
  click.echo(tables(results))
  click.echo(f"Written to {out}.")


if __name__ == "__main__":
  main()
