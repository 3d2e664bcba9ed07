# SPDX-License-Identifier: Apache-2.0
"""The same epochs in plain PyTorch and with this package."""

import importlib.util
import json
import re
import sys

from click.testing import CliRunner
import pytest

from benchmarks import cli
from benchmarks.cost import problem, torch_peer

pytestmark = pytest.mark.standard_promotion

needs_torch = pytest.mark.skipif(
  importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)
# As those that are published, but small.
PEERS = {
  "mlp": torch_peer._mlp_peer((16, 12), 8),
  "convnet": torch_peer.PEERS["convnet-batch-128"]._replace(batch_size=8),
}


@needs_torch
@pytest.mark.parametrize("variant", torch_peer.VARIANTS)
@pytest.mark.parametrize("name", PEERS)
def test_the_same_weights(name, variant):
  row = torch_peer.compare(PEERS[name], variant, steps=4, rounds=1)
  assert row["difference"] <= 1e-4
  assert row["change"] >= 100 * row["difference"]
  assert row["ratio"] > 0


@needs_torch
def test_all_published_models_take_our_weights():
  """The modules have no weight that ours lack, and the other way round."""
  import jax
  import numpy as np
  import torch

  for peer in torch_peer.PEERS.values():
    task = problem.Problem(peer.ours, 2, 1, np.float32, None)
    weights = peer.weights(jax.tree.map(np.asarray, task.params))
    peer.theirs().load_state_dict(
      {name: torch.from_numpy(np.array(w)) for name, w in weights.items()}
    )


@needs_torch
def test_command(tmp_path, monkeypatch):
  monkeypatch.setitem(torch_peer.PEERS, "mlp-88-batch-128", PEERS["mlp"])
  result = CliRunner().invoke(
    torch_peer.main,
    [
      *("--cell", "mlp-88-batch-128", "--steps", "2", "--rounds", "1"),
      *("--out", str(tmp_path)),
    ],
  )
  assert result.exit_code == 0, result.output
  for variant in torch_peer.VARIANTS:
    line = rf"\| mlp-88-batch-128 \| {variant} \|( \S+ \|){{4}}"
    assert re.search(line, result.output)
  results = json.loads((tmp_path / "results.json").read_text())
  assert len(results["rows"]) == len(torch_peer.VARIANTS)
  assert results["torch"]["threads"] >= 1


def test_without_torch(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  result = CliRunner().invoke(cli.main, ["torch"])
  assert result.exit_code == 2
  assert re.fullmatch(
    r"Error: torch needs the package 'torch': .*\[torch\]\"\.\n", result.output
  )
