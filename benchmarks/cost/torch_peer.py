# SPDX-License-Identifier: Apache-2.0
"""Compares an epoch with the authors' algorithm in plain PyTorch.

Run ``python -m benchmarks.torch_peer --help``. It needs PyTorch, which is in
the extra ``torch``.
"""

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

from benchmarks import grid, reporting, step_cost, train
from benchmarks.models import small as models

ALPHA, LR = 0.75, 0.05
# Of the authors' code, and what each is called in benchmarks.step_cost.
VARIANTS = {
  "plain": "plain",
  "recompute": "alpha-svrg",
  "cached": "alpha-svrg, table",
}


class Peer(NamedTuple):
  """A model in both libraries.

  Attributes:
    ours: makes it, see :data:`benchmarks.models.MODELS`.
    theirs: makes the module.
    weights: makes the state of the module from our parameters, as arrays.
    batch_size: number of examples in a batch.
  """

  ours: Callable[..., Any]
  theirs: Callable[[], Any]
  weights: Callable[[Any], dict[str, Any]]
  batch_size: int


def _linear(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {f"{name}.weight": params["kernel"].T, f"{name}.bias": params["bias"]}


def _norm(params: Mapping[str, Any], name: str) -> dict[str, Any]:
  return {f"{name}.weight": params["scale"], f"{name}.bias": params["bias"]}


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


def _vit(width: int, depth: int, num_heads: int) -> Any:
  import torch
  from torch import nn

  channels, height, _ = step_cost.IMAGE_SHAPE
  size = 7
  side = height // size

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1 = nn.LayerNorm(width, eps=1e-6)
      self.qkv = nn.Linear(width, 3 * width)
      self.out = nn.Linear(width, width)
      self.norm2 = nn.LayerNorm(width, eps=1e-6)
      self.mlp = nn.Sequential(
        nn.Linear(width, 4 * width),
        nn.GELU(approximate="tanh"),
        nn.Linear(4 * width, width),
      )

    def forward(self, x):
      qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, num_heads, -1))
      q, k, v = qkv.permute(2, 0, 3, 1, 4)
      y = nn.functional.scaled_dot_product_attention(q, k, v)
      x = x + self.out(y.transpose(1, 2).flatten(-2))
      return x + self.mlp(self.norm2(x))

  class ViT(nn.Module):
    def __init__(self):
      super().__init__()
      self.embed = nn.Linear(channels * size**2, width)
      self.positions = nn.Parameter(torch.zeros(side**2, width))
      self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
      self.norm = nn.LayerNorm(width, eps=1e-6)
      self.head = nn.Linear(width, step_cost.NUM_CLASSES)

    def forward(self, x):
      x = x.view(-1, channels, side, size, side, size)
      x = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), side**2, -1)
      x = self.blocks(self.embed(x) + self.positions)
      return self.head(self.norm(x).mean(1))

  return ViT()


def _vit_weights(params: Any) -> dict[str, Any]:
  weights = {"positions": params["positions"]}
  weights |= _linear(params["embed"], "embed")
  weights |= _norm(params["norm"], "norm")
  weights |= _linear(params["head"], "head")
  for i, block in params["blocks"].items():
    name = f"blocks.{i}"
    parts = [block["attention"][part] for part in ("query", "key", "value")]
    qkv = {
      # Heads and their features are one axis here.
      "kernel": np.concatenate(
        [p["kernel"].reshape(len(p["kernel"]), -1) for p in parts], axis=1
      ),
      "bias": np.concatenate([p["bias"].ravel() for p in parts]),
    }
    out = block["attention"]["out"]
    kernel = out["kernel"].reshape(-1, out["kernel"].shape[-1])
    weights |= _linear(qkv, f"{name}.qkv")
    weights |= _linear({**out, "kernel": kernel}, f"{name}.out")
    weights |= _norm(block["norms"][0], f"{name}.norm1")
    weights |= _norm(block["norms"][1], f"{name}.norm2")
    weights |= _linear(block["mlp"]["layers"][0], f"{name}.mlp.0")
    weights |= _linear(block["mlp"]["layers"][1], f"{name}.mlp.2")
  return weights


def _convnet() -> Any:
  from torch import nn

  first, second, third = 16, 32, 64
  # With stride 2, "SAME" of our convolutions pads below and to the right only.
  pad = nn.ZeroPad2d((0, 1, 0, 1))
  return nn.Sequential(
    nn.Unflatten(1, step_cost.IMAGE_SHAPE),
    nn.Conv2d(step_cost.IMAGE_SHAPE[0], first, 3, padding=1),
    nn.ReLU(),
    pad,
    nn.Conv2d(first, second, 3, stride=2),
    nn.ReLU(),
    pad,
    nn.Conv2d(second, third, 3, stride=2),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(third, step_cost.NUM_CLASSES),
  )


def _convnet_weights(params: Any) -> dict[str, Any]:
  weights = _linear(params["head"], "11")
  for i, name in enumerate(("1", "4", "7")):
    conv = params["convs"][i]
    weights[f"{name}.weight"] = conv["kernel"].transpose(3, 2, 0, 1)
    weights[f"{name}.bias"] = conv["bias"]
  return weights


def _mlp_peer(hidden: Sequence[int], batch_size: int) -> Peer:
  sizes = (
    math.prod(step_cost.IMAGE_SHAPE),
    *hidden,
    step_cost.NUM_CLASSES,
  )
  return Peer(
    lambda shape, classes, rngs: models.MLP(sizes, rngs=rngs),
    functools.partial(_mlp, sizes),
    _mlp_weights,
    batch_size,
  )


PEERS = {
  "mlp-88-batch-128": _mlp_peer((88,), 128),
  "mlp-263-88-29-batch-128": _mlp_peer((263, 88, 29), 128),
  "mlp-1024-1024-batch-128": _mlp_peer((1024, 1024), 128),
  "mlp-1024-1024-batch-1000": _mlp_peer((1024, 1024), 1000),
  "vit-128-batch-128": Peer(
    step_cost.MODELS["vit-128"],
    functools.partial(_vit, width=128, depth=4, num_heads=4),
    _vit_weights,
    128,
  ),
  "convnet-batch-128": Peer(models.ConvNet, _convnet, _convnet_weights, 128),
}


def torch_epoch(
  model: Any, batches: Sequence[Any], variant: str
) -> Callable[[], None]:
  """An epoch of α-SVRG, as one writes it in PyTorch.

  Args:
    model: the module, which is trained.
    batches: images and labels, as tensors.
    variant: ``"plain"`` SGD; ``"recompute"``, the gradient at the snapshot once
      more in each step; or ``"cached"``, from a list that the pass has made.

  Returns:
    A function that trains for an epoch.
  """
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
  """Trains with both, and times them in turn.

  Args:
    peer: the model.
    variant: see :func:`torch_epoch`.
    steps: number of batches of an epoch.
    rounds: how many epochs to time, after a first one.

  Returns:
    ``difference``, the largest of a weight after the first epoch, and
    ``change``, the largest of a weight in it; ``ratio`` of their time to ours;
    ``seconds`` of both.
  """
  import torch

  problem = step_cost.Problem(
    peer.ours, peer.batch_size, steps, jnp.float32, optax.sgd(LR)
  )
  device = "cuda" if jax.default_backend() == "gpu" else "cpu"
  as_tensor = lambda x: torch.from_numpy(np.array(x)).to(device)

  def as_theirs(params):
    weights = peer.weights(jax.tree.map(np.asarray, params))
    return {name: as_tensor(w) for name, w in weights.items()}

  model = peer.theirs().to(device)
  start = as_theirs(problem.params)
  model.load_state_dict(start)
  batches = [
    (as_tensor(images), as_tensor(labels).long())
    for images, labels in problem.batches
  ]
  epoch = torch_epoch(model, batches, variant)
  ours = problem.programs(ALPHA)[VARIANTS[variant]]
  epoch()
  carry = ours.run(ours.state)
  theirs_after, ours_after = model.state_dict(), as_theirs(carry[0])

  def largest(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in start)

  result = {
    "difference": largest(theirs_after, ours_after),
    "change": largest(ours_after, start),
  }
  times = step_cost.seconds(
    {
      "theirs": step_cost.Program(lambda _: epoch(), None),
      "ours": step_cost.Program(ours.run, carry),
    },
    rounds,
  )
  return {
    **result,
    "ratio": step_cost.ratio(times, "theirs", "ours"),
    "seconds": times,
  }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """What is published, in Markdown.

  Args:
    rows: results of :func:`compare`, with the names of the ``model`` and of
      the ``variant``.
  """
  return reporting.markdown_table(
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


@click.command(cls=train.Command)
@grid.cell_option(PEERS)
@step_cost.steps_option
@click.option(
  "--rounds",
  type=click.IntRange(min=1),
  default=7,
  show_default=True,
  help="How many epochs are timed.",
)
@click.option(
  "--out",
  type=click.Path(file_okay=False, path_type=Path),
  default=Path("results", "torch_peer"),
  show_default=True,
  help="Folder for results.json.",
)
def main(cells: Sequence[str], steps: int, rounds: int, out: Path) -> None:
  """Trains the same epochs with PyTorch and with this package.

  In float32, from the same weights. Prints a table, and writes a JSON file.
  Compilation is not measured.
  """
  try:
    import torch
  except ImportError as e:
    raise click.UsageError(
      'PyTorch is missing: python -m pip install -e ".[benchmarks,torch]"'
    ) from e
  if jax.default_backend() == "gpu" and not torch.cuda.is_available():
    raise click.UsageError(
      "JAX has a GPU, this PyTorch none; JAX_PLATFORMS=cpu compares on the CPU."
    )
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise click.UsageError(f"--out {out}: {e.strerror}.") from e
  # As PyTorch multiplies by default, on GPUs too.
  jax.config.update("jax_default_matmul_precision", "float32")
  record: dict[str, Any] = {
    **train.environment(),
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
    reporting.write_json(out / "results.json", record)
    click.echo(name, err=True)
  click.echo(table(record["rows"]))
  click.echo(f"Written to {out}.")


if __name__ == "__main__":
  main()
