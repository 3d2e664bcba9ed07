# SPDX-License-Identifier: Apache-2.0
"""The documentation is complete, and its code runs."""

import importlib
import os
import pathlib
import pydoc
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_svrg

DOCS = pathlib.Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
# Pages of libraries that are not needed otherwise.
OPTIONAL = {"data": "grain", "equinox": "equinox", "haiku": "haiku"}


def documented():
  """Names that have an entry in the API reference, by module."""
  names = {}
  for page in (DOCS / "api").glob("*.md"):
    text = page.read_text()
    for module in re.findall(r"currentmodule:: (\S+)", text):
      entries = re.findall(r"auto(?:function|class):: (\w+)", text)
      names.setdefault(module, []).extend(entries)
  return names


class TestAPI:
  """Every public name is listed, described and documented."""

  def test_reference_is_complete(self):
    assert sorted(documented()["optax_svrg"]) == sorted(optax_svrg.__all__)

  @pytest.mark.parametrize("name", ["flax", "sklearn"])
  def test_reference_of_a_module_is_complete(self, name):
    pytest.importorskip(name)
    module = importlib.import_module(f"optax_svrg.{name}")
    public = [
      key
      for key, value in vars(module).items()
      if getattr(value, "__module__", None) == module.__name__
      and not key.startswith("_")
    ]
    assert sorted(documented()[module.__name__]) == sorted(public)

  def test_dir_has_the_public_names(self):
    private = {"__version__", "flax", "sklearn"}
    assert set(dir(optax_svrg)) - private == set(optax_svrg.__all__)

  def test_nothing_private_leaks(self):
    names = {name for name in vars(optax_svrg) if not name.startswith("_")}
    assert names - {"flax", "sklearn"} == set(optax_svrg.__all__)

  def test_help_shows_every_name(self):
    text = pydoc.plain(pydoc.render_doc(optax_svrg))
    summary = text.partition("PACKAGE CONTENTS")[0]
    for name in [*optax_svrg.__all__, "flax", "sklearn"]:
      # A line of its own, or together with others of its kind.
      assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: \S", summary, re.M), name
    for name in optax_svrg.__all__:
      assert re.search(rf"^    (class )?{name}\b", text, re.M), name


def test_versions_agree():
  root = DOCS.parent
  version = re.escape(optax_svrg.__version__)
  citation = (root / "CITATION.cff").read_text()
  assert re.search(rf"^version: {version}$", citation, re.M)
  changelog = (root / "CHANGELOG.md").read_text()
  assert re.search(rf"^## \[{version}\]", changelog, re.M)


def run(page):
  """Runs the code blocks of a page one after the other."""
  namespace = {"__name__": "docs"}
  text = page.read_text()
  for match in BLOCK.finditer(text):
    line = text[: match.start()].count("\n") + 1
    code = "\n" * line + match.group(1)
    exec(compile(code, str(page), "exec"), namespace)
  return namespace


def trains(n):
  summary = optax_svrg.summary(n["opt_state"])
  assert 0 < summary["alpha"] <= 1


def fits(n):
  data = (n["x"], n["y"])
  zeros = jax.tree.map(jnp.zeros_like, n["params"])
  assert n["loss"](n["params"], data) < 0.5 * n["loss"](zeros, data)


def composes(n):
  data = (n["x"].reshape(-1, 4), n["y"].ravel())
  before = n["loss"](jnp.zeros(4), data)
  for w in (n["w"], n["pair"].fast, n["pair"].slow):
    assert n["loss"](w, data) < before


def converges(n):
  assert n["fit"].converged
  assert n["result"].converged
  assert 0 < jnp.sum(n["sparse"].params == 0) < 32
  assert n["gap"] < 1e-9


def is_storm(n):
  assert jnp.linalg.norm(n["w1"]) > 0.01
  np.testing.assert_allclose(n["w1"], n["w2"], rtol=1e-5)


def agrees(n):
  assert n["moments"].variance_ratio(n["alpha"]) < 1
  np.testing.assert_allclose(
    n["grads"][0], n["grad"](n["w"], n["x"]), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(n["w1"], n["w2"][0], rtol=1e-5)
  # At the snapshot the correction changes nothing.
  plain = n["w"] - 0.1 * n["grad"](n["w"], n["x"])
  np.testing.assert_allclose(n["w1"], plain, rtol=1e-5)


def restores(n):
  want = (jnp.ones((8, 4)), n["tx"].init(jnp.ones((8, 4))))
  got = (n["params"], n["opt_state"])
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def counts_batches(n):
  indices = [int(i) for i, _ in n["dataset"]]
  assert sorted(indices) == sorted(2 * list(range(20)))
  by_index = {}
  for i, batch in n["dataset"]:
    by_index.setdefault(int(i), []).append(batch)
  for first, second in by_index.values():
    np.testing.assert_array_equal(first, second)


def of_optimizer(n):
  assert 0 < optax_svrg.summary(n["optimizer"])["alpha"] <= 1


def of_train_state(n):
  summary = optax_svrg.summary(n["state"])
  assert summary["num_filled"] == summary["num_batches"]


def is_momentum(n):
  """The published update of approximate MARS, from the page's momentum."""
  gamma, beta, grads = 0.3, 0.9, np.random.default_rng(0).normal(size=(20, 3))
  tx = n["quasi_hyperbolic"](gamma, beta)
  state = tx.init(jnp.zeros(3))
  m = last = np.zeros(3)
  for g in grads:
    c = g + gamma * beta / (1 - beta) * (g - last)
    m, last = beta * m + (1 - beta) * c, g
    got, state = tx.update(jnp.asarray(g, jnp.float32), state)
    np.testing.assert_allclose(got, m, rtol=0, atol=1e-6)


CHECKS = {
  "getting_started": fits,
  "guides/composition": composes,
  "guides/convex": converges,
  "guides/data": counts_batches,
  "guides/equinox": trains,
  "guides/extending": is_storm,
  "guides/flax_linen": of_train_state,
  "guides/flax_nnx": of_optimizer,
  "guides/haiku": trains,
  "guides/mars": is_momentum,
  "guides/measuring": agrees,
  "guides/parallel": trains,
  "guides/resume": restores,
  "guides/snapshots": trains,
}
# The fast tier has other tests of what these show.
SLOW = {"convex", "equinox", "flax_linen", "haiku", "measuring"}


def check(name):
  """Runs a page and checks what it has computed."""
  CHECKS[name](run(DOCS / f"{name}.md"))


@pytest.mark.standard_promotion
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(
      name,
      id=name,
      marks=pytest.mark.slow if pathlib.Path(name).name in SLOW else (),
    )
    for name in CHECKS
  ],
)
def test_pages(name):
  package = OPTIONAL.get(pathlib.Path(name).name)
  if package:
    pytest.importorskip(package)
  check(name)


def test_every_page_with_code_is_run():
  pages = {
    str(page.relative_to(DOCS).with_suffix(""))
    for page in DOCS.rglob("*.md")
    if BLOCK.search(page.read_text())
  }
  assert pages == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["measuring", "parallel", "resume"])
def test_pages_on_several_devices(name):
  code = (
    f"from tests import test_docs; test_docs.check('guides/{name}');"
    " assert test_docs.jax.device_count() == 4"
  )
  run_python("-c", code, XLA_FLAGS="--xla_force_host_platform_device_count=4")


@pytest.mark.slow
@pytest.mark.parametrize(
  "script", sorted((DOCS / "examples").glob("*.py")), ids=lambda p: p.stem
)
def test_examples(script):
  output = run_python(str(script), MPLBACKEND="agg")
  assert re.search(r"\d", output)


def run_python(*args, **env):
  """Runs Python in a process of its own, and returns its output."""
  process = subprocess.run(
    [sys.executable, *args],
    cwd=DOCS.parent,
    env=os.environ | env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  return process.stdout
