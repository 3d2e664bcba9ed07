# SPDX-License-Identifier: Apache-2.0
"""Poisson tomography."""

import json

from click.testing import CliRunner
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.studies import tomography

pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def subsets():
  with jax.enable_x64(True):
    return tomography.make_subsets()


def test_projections_keep_the_mass(subsets, x64):
  image = jnp.asarray(tomography.phantom())
  sums = tomography.project(image, subsets["bins"][3], subsets["shares"][3])
  np.testing.assert_allclose(sums.sum(axis=1), image.sum())
  # At an angle of 0, the rays run along the columns of the image.
  first = tomography.project(image, subsets["bins"][0], subsets["shares"][0])[0]
  columns = image.reshape(64, 64).sum(axis=0)
  np.testing.assert_allclose(
    first[15:80], np.r_[columns, 0] / 2 + np.r_[0, columns] / 2, atol=1e-9
  )


def test_subsets_divide_the_angles(subsets):
  assert subsets["counts"].shape == (20, 3, 95)
  assert subsets["counts"].min() == 0
  # Counts of each angle are of the same mass.
  totals = subsets["counts"].sum(axis=2).ravel()
  assert totals.std() < 0.02 * totals.mean()


def test_the_diagonal_is_a_bound(subsets, x64):
  image = jnp.asarray(tomography.phantom()) + 0.1
  rng = np.random.default_rng(0)
  grad = jax.grad(tomography.objective)
  diagonal = tomography.diagonal(image, subsets)
  for _ in range(3):
    v = jnp.asarray(rng.normal(size=image.shape))
    product = jax.jvp(lambda x: grad(x, subsets), (image,), (v,))[1]
    assert 0 < jnp.vdot(v, product) <= jnp.vdot(v, v / diagonal)


@pytest.mark.slow
def test_command(tmp_path):
  args = ["--epochs=6", "--iterations=30", f"--out={tmp_path}"]
  result = CliRunner().invoke(tomography.main, args)
  assert result.exit_code == 0, result.output
  curves = json.loads((tmp_path / "runs.json").read_text())["curves"]
  for name in ("L-BFGS-B", "SVRG, preconditioned"):
    assert curves[name]["error"][-1] < 0.6 * curves[name]["error"][0]
  assert "| SVRG, preconditioned |" in result.stdout


def test_table():
  curve = lambda *errors: {"seconds": [1.0, 2.0], "error": errors}
  files = tomography.render(
    {
      "command": "python -m benchmarks tomography",
      "gradient_norm": 1e-6,
      "curves": {
        "L-BFGS-B": curve(0.05, 0.009),
        "SVRG": curve(0.01, 0.001),
        "subset descent": curve(5e3, 0.02),
      },
    }
  )
  lines = files["table.md"].splitlines()
  assert "| L-BFGS-B | 1.0 | 2.0 | 1.00 | 9.0e-03 | 2.0 |" in lines
  assert "| SVRG | 1.0 | 1.0 | 0.50 | 1.0e-03 | 2.0 |" in lines
  assert "| subset descent | 2.0 | not reached |  | 2.0e-02 | 2.0 |" in lines
