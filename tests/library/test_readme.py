# SPDX-License-Identifier: Apache-2.0
"""The README's code blocks run, and its commands are those of CI."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?:^|\n)(#+ [^\n]+)|```python\n(.*?)```", README, re.S)


def blocks():
  title = ""
  for heading, code in BLOCKS:
    title = heading or title
    if code:
      yield pytest.param(code, id=title.strip("# "))


@pytest.mark.standard_promotion
@pytest.mark.parametrize("code", list(blocks()))
def test_code_blocks_run(code):
  namespace = {"__name__": "readme"}
  exec(compile(code, "README.md", "exec"), namespace)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("code", list(blocks())[:2])
def test_the_examples_train(code):
  """They fit what a linear model can fit."""
  namespace = {"__name__": "readme"}
  exec(compile(code, "README.md", "exec"), namespace)
  x, y, loss = (namespace[name] for name in ("x", "y", "loss"))
  untrained = loss({"w": x[0] * 0, "b": y[0] * 0}, (x, y))
  assert loss(namespace["params"], (x, y)) < 0.5 * untrained


@pytest.mark.standard_promotion
def test_the_linear_probe_comes_to_the_minimum():
  (code,) = (code for _, code in BLOCKS if "smoothness" in code)
  namespace = {"__name__": "readme"}
  exec(compile(code, "README.md", "exec"), namespace)
  assert namespace["gap"] < 1e-12


@pytest.mark.standard_promotion
def test_the_gate_opens():
  """The recipe ends far below where plain steps stall."""
  (code,) = (code for _, code in BLOCKS if "is_open" in code)
  norms = []
  for recipe in (code, code.replace("epoch % 4 == 0", "False")):
    namespace = {"__name__": "readme"}
    exec(compile(recipe, "README.md", "exec"), namespace)
    grad, params, batches = (
      namespace[name] for name in ("grad", "params", "batches")
    )
    full = sum(grad(params, batch) for batch in batches) / len(batches)
    norms.append(float(abs(full).max()))
    assert namespace["is_open"] == (recipe == code)
  assert norms[0] < 1e-3 * norms[1]


def test_set_up_is_two_commands():
  commands = re.findall(r"```sh\n(.*?)```", README, re.S)
  assert [command.count("\n") for command in commands] == [1, 1]
  assert commands[0].endswith("&& python -m benchmarks.train\n")
  assert commands[1].endswith("&& python -m pytest\n")
