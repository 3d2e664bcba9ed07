# SPDX-License-Identifier: Apache-2.0
"""Compares an epoch with the authors' algorithm in plain PyTorch."""

from collections.abc import Callable, Mapping, Sequence
import copy
import functools
import itertools
import math
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax

import benchmarks
from benchmarks import cli
from benchmarks.cost import problem, step_cost
from benchmarks.harness import report, store

ALPHA, LR = 0.75, 0.05
# Of the authors' code, and what each is called in benchmarks.cost.problem.
VARIANTS = {
  "plain": "plain",
  "recompute": "alpha-svrg",
  "cached": "alpha-svrg, table",
}


class Peer(NamedTuple):
  """A model in both libraries.

  Attributes:
    ours: the model in Flax.
    theirs: makes the module.
    weights: makes the state of the module from our parameters, as arrays.
    batch_size: number of examples in a batch.
  """

  ours: problem.Model
  theirs: Callable[[], Any]
  weights: Callable[[Any], dict[str, Any]]
  batch_size: int


def _linear(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {f"{name}.weight": params["kernel"].T, f"{name}.bias": params["bias"]}


def _mlp(sizes: Sequence[int]) -> Any:
  from torch import nn

  layers: list[nn.Module] = []
  for inputs, outputs in itertools.pairwise(sizes):
    layers += [nn.Linear(inputs, outputs), nn.ReLU()]
  return nn.Sequential(*layers[:-1])


def _mlp_weights(params: Any) -> dict[str, Any]:
  weights = {}
  for i, layer in sorted(params["layers"].items()):
    weights |= _linear(layer, f"{2 * i}")
  return weights


def _convnet() -> Any:
  from torch import nn

  first, second, third = 16, 32, 64
  # With stride 2, "SAME" of our convolutions pads below and to the right only.
  pad = nn.ZeroPad2d((0, 1, 0, 1))
  return nn.Sequential(
    nn.Unflatten(1, (1, *problem.IMAGE_SHAPE[:2])),
    nn.Conv2d(1, first, 3, padding=1),
    nn.ReLU(),
    pad,
    nn.Conv2d(first, second, 3, stride=2),
    nn.ReLU(),
    pad,
    nn.Conv2d(second, third, 3, stride=2),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(third, problem.NUM_CLASSES),
  )


def _convnet_weights(params: Any) -> dict[str, Any]:
  weights = _linear(params["head"], "11")
  for i, name in enumerate(("1", "4", "7")):
    conv = params["convs"][i]
    weights[f"{name}.weight"] = conv["kernel"].transpose(3, 2, 0, 1)
    weights[f"{name}.bias"] = conv["bias"]
  return weights


def _mlp_peer(hidden: Sequence[int], batch_size: int) -> Peer:
  sizes = (math.prod(problem.IMAGE_SHAPE), *hidden, problem.NUM_CLASSES)
  return Peer(
    problem.mlp(*hidden),
    functools.partial(_mlp, sizes),
    _mlp_weights,
    batch_size,
  )


PEERS = {
  "mlp-88-batch-128": _mlp_peer((88,), 128),
  "mlp-263-88-29-batch-128": _mlp_peer((263, 88, 29), 128),
  "mlp-1024-1024-batch-128": _mlp_peer((1024, 1024), 128),
  "mlp-1024-1024-batch-1000": _mlp_peer((1024, 1024), 1000),
  "convnet-batch-128": Peer(
    step_cost.MODELS["convnet"], _convnet, _convnet_weights, 128
  ),
}


def torch_epoch(
  model: Any, batches: Sequence[Any], variant: str
) -> Callable[[], None]:
  """An epoch of α-SVRG, as one writes it in PyTorch."""
  import torch

  snapshot = copy.deepcopy(model)
  optimizer = torch.optim.SGD(model.parameters(), lr=LR)
  loss_fn = torch.nn.CrossEntropyLoss()

  def gradients(of, batch):
    images, labels = batch
    of.zero_grad(set_to_none=True)
    loss_fn(of(images), labels).backward()
    return [p.grad for p in of.parameters()]

  def epoch():
    stored = []
    if variant != "plain":
      snapshot.load_state_dict(model.state_dict())
      mean = [torch.zeros_like(p) for p in model.parameters()]
      for batch in batches:
        grads = gradients(snapshot, batch)
        torch._foreach_add_(mean, grads, alpha=1 / len(batches))
        if variant == "cached":
          stored.append(grads)
    for i, batch in enumerate(batches):
      grads = gradients(model, batch)
      if variant != "plain":
        other = stored[i] if variant == "cached" else gradients(snapshot, batch)
        torch._foreach_add_(grads, other, alpha=-ALPHA)
        torch._foreach_add_(grads, mean, alpha=ALPHA)
      optimizer.step()
    if batches[0][0].is_cuda:
      torch.cuda.synchronize()

  return epoch


def compare(
  peer: Peer, variant: str, steps: int, rounds: int
) -> dict[str, Any]:
  """Trains with both, and times them in turn."""
  import torch

  task = problem.Problem(
    peer.ours, peer.batch_size, steps, jnp.float32, optax.sgd(LR)
  )
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  as_tensor = lambda x: torch.from_numpy(np.array(x)).to(device)

  def as_theirs(params):
    weights = peer.weights(jax.tree.map(np.asarray, params))
    return {name: as_tensor(w) for name, w in weights.items()}

  model = peer.theirs().to(device)
  start = as_theirs(task.params)
  model.load_state_dict(start)
  batches = [
    (as_tensor(images).flatten(1), as_tensor(labels).long())
    for images, labels in task.batches
  ]
  epoch = torch_epoch(model, batches, variant)
  ours = task.programs(ALPHA)[VARIANTS[variant]]
  epoch()
  carry = ours.run(ours.state)
  theirs_after, ours_after = model.state_dict(), as_theirs(carry[0])

  def largest(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in start)

  result = {
    "difference": largest(theirs_after, ours_after),
    "change": largest(ours_after, start),
  }
  times = problem.seconds(
    {
      "theirs": problem.Program(lambda _: epoch(), None),
      "ours": problem.Program(ours.run, carry),
    },
    rounds,
  )
  return {
    **result,
    "ratio": problem.ratio(times, "theirs", "ours"),
    "seconds": times,
  }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the published table in Markdown."""
  return report.markdown_table(
    (
      *("model", "variant", "time of PyTorch / ours", "our seconds"),
      *("largest difference of a weight", "largest change of a weight"),
    ),
    [
      (
        row["model"],
        row["variant"],
        f"{row['ratio']:.2f}",
        f"{statistics.median(row['seconds']['ours'][1:]):.3f}",
        f"{row['difference']:.1e}",
        f"{row['change']:.1e}",
      )
      for row in rows
    ],
  )


@click.command()
@cli.cell_option(PEERS)
@step_cost.steps_option
@step_cost.rounds_option
@cli.out_option("torch")
def main(cells: Sequence[str], steps: int, rounds: int, out: Path) -> None:
  """Trains the same epochs with PyTorch and with this package.

  In float32, from the same weights. Prints a table, and writes a JSON file.
  Compilation is not measured.
  """
  import torch

  if jax.default_backend() == "gpu" and not torch.cuda.is_available():
    raise benchmarks.UserError(
      "JAX has a GPU, this PyTorch none; JAX_PLATFORMS=cpu compares on the CPU."
    )
  # As PyTorch multiplies by default, on GPUs too.
  jax.config.update("jax_default_matmul_precision", "float32")
  record: dict[str, Any] = {
    **store.environment(),
    **{"steps": steps, "rounds": rounds, "rows": []},
    "torch": {
      "version": torch.__version__,
      "threads": torch.get_num_threads(),
    },
  }
  for name in cells or PEERS:
    for variant in VARIANTS:
      row = {"model": name, "variant": variant}
      row |= compare(PEERS[name], variant, steps, rounds)
      record["rows"].append(row)
    store.write_json(out / "results.json", record)
    click.echo(name, err=True)
  text = table(record["rows"])
  (out / "table.md").write_text(text + "\n", encoding="utf-8")
  click.echo(text)
