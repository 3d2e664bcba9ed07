# SPDX-License-Identifier: Apache-2.0
"""Configuration of the documentation, built by Sphinx."""

import os
import pathlib
import shutil
import urllib.request

import optax_svrg

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent

project = "optax_svrg"
author = "The optax_svrg authors"
copyright = f"2026, {author}"
version = release = optax_svrg.__version__

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.intersphinx",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
  "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # Tables have headings of their own.
exclude_patterns = ["_build", "examples", "sg_execution_times.rst"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

INVENTORIES = {
  "flax": "https://flax.readthedocs.io/en/latest",
  "jax": "https://docs.jax.dev/en/latest",
  "optax": "https://optax.readthedocs.io/en/latest",
}


def _is_reachable(url: str) -> bool:
  """Returns whether the documentation of another project can be read."""
  if "DOCS_OFFLINE" in os.environ:
    return False
  try:
    urllib.request.urlopen(f"{url}/objects.inv", timeout=5)
  except OSError:
    return False
  return True


intersphinx_mapping = {
  name: (url, None) for name, url in INVENTORIES.items() if _is_reachable(url)
}

# A reference within this project must exist. Those to other projects are plain
# text where their inventory lacks them or is out of reach.
nitpicky = True
nitpick_ignore_regex = [
  ("py:.*", rf"({'|'.join(INVENTORIES)}|numpy)\..*"),
  ("py:class", r"ArrayTree|optax_svrg\._control_variate\.CoefficientEstimate"),
]

sphinx_gallery_conf = {
  "examples_dirs": "examples",
  "gallery_dirs": "gallery",
  "filename_pattern": r"\.py$",
  "image_srcset": ["2x"],
  "show_memory": False,
  "show_signature": False,
  "min_reported_time": 600,
  "write_computation_times": False,
  "download_all_examples": False,
}

html_theme = "furo"
html_title = "optax_svrg"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
  "source_repository": "https://github.com/optax-svrg/optax_svrg/",
  "source_branch": "main",
  "source_directory": "docs/",
}


def _write_benchmarks(app: object) -> None:
  """Writes a page for the stored results of each benchmark."""
  del app
  pages = DOCS / "benchmarks"
  shutil.rmtree(pages, ignore_errors=True)
  pages.mkdir()
  names = []
  for table in sorted((ROOT / "benchmarks" / "results").glob("*/table.md")):
    names.append(table.parent.name)
    text = table.read_text()
    if not text.startswith("# "):
      text = f"# {names[-1].replace('-', ' ').capitalize()}\n\n{text}"
    for figure in sorted(table.parent.glob("*.svg")):
      path = os.path.relpath(figure, pages)
      text += f"\n![Figure of the results]({path})\n"
    (pages / f"{names[-1]}.md").write_text(text)
  index = (DOCS / "benchmarks.md.in").read_text()
  if names:
    toctree = ["```{toctree}", ":maxdepth: 1", "", *names, "```", ""]
    index += "\n" + "\n".join(toctree)
  (pages / "index.md").write_text(index)


def setup(app: object) -> None:
  """Connects the page of benchmarks."""
  app.connect("builder-inited", _write_benchmarks)  # type: ignore[attr-defined]
