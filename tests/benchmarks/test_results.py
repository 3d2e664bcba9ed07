# SPDX-License-Identifier: Apache-2.0
"""Published results: all of them are made of the stored runs."""

import json
from pathlib import Path
import re
import xml.etree.ElementTree

from click.testing import CliRunner
import pytest

from benchmarks import cli
from benchmarks.harness import figures, publishing

FOLDERS = sorted(p.parent for p in publishing.FOLDER.glob("*/runs.json"))
README = publishing.FOLDER.parent / "README.md"
by_folder = pytest.mark.parametrize(
  "folder", FOLDERS, ids=[folder.name for folder in FOLDERS]
)


@by_folder
def test_files_are_made_of_the_runs(folder):
  files = publishing.render(folder)
  assert "table.md" in files
  for name, text in files.items():
    assert (folder / name).read_text("utf-8") == text
  expected = {"runs.json", *files}
  if "figure.json" in files:
    expected.add("figure.svg")
  assert {path.name for path in folder.iterdir()} == expected


@by_folder
def test_figure_is_drawn_from_its_data(folder):
  path = folder / "figure.json"
  if not path.exists():
    pytest.skip("The study has no figure.")
  figure = figures.from_json(json.loads(path.read_text("utf-8")))
  root = xml.etree.ElementTree.parse(folder / "figure.svg").getroot()
  text = " ".join(root.itertext())
  for panel in figure.panels:
    assert len(panel.lines) <= figures.MAX_LINES
    for words in (panel.x, panel.y, *(line.label for line in panel.lines)):
      assert words in text
    for _, words in panel.references:
      assert words in text


@by_folder
def test_origin_is_known(folder):
  document = json.loads((folder / "runs.json").read_text("utf-8"))
  command = document["command"].removeprefix("python -m benchmarks ")
  assert command.split()[0] in cli.COMMANDS
  # Lists where runs are of several commits or machines.
  commits, origins = (
    x if isinstance(x, list) else [x]
    for x in (document["commit"], document["versions"])
  )
  assert commits
  for commit in commits:
    assert re.fullmatch("[0-9a-f]{40}", commit)
  for versions in origins:
    assert {"jax", "optax", "optax_svrg", "python"} <= versions.keys()


class TestReport:
  """On a copy, as the files of the repository are not to be changed."""

  @pytest.fixture
  def folder(self, tmp_path, monkeypatch):
    if not FOLDERS:
      pytest.skip("Nothing is published.")
    copy = tmp_path / FOLDERS[0].name
    copy.mkdir()
    runs = (FOLDERS[0] / "runs.json").read_text("utf-8")
    (copy / "runs.json").write_text(runs, encoding="utf-8")
    monkeypatch.setattr(publishing, "FOLDER", tmp_path)
    return copy

  def test_all(self, folder):
    result = CliRunner().invoke(publishing.main, [])
    assert result.exit_code == 0, result.output
    table = (FOLDERS[0] / "table.md").read_text("utf-8")
    assert (folder / "table.md").read_text("utf-8") == table

  def test_an_unknown_study(self, folder):
    result = CliRunner().invoke(publishing.main, ["nothing"])
    assert result.exit_code == 2
    assert f"'nothing' is not one of {folder.name}." in result.output


class TestReadme:
  TEXT = README.read_text("utf-8")

  def test_is_an_index(self):
    assert len(self.TEXT.splitlines()) <= 150

  def test_links_lead_somewhere(self):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", self.TEXT)
    local = [link for link in links if "://" not in link]
    assert local or not FOLDERS
    for link in local:
      assert (Path(README.parent) / link).exists(), link

  def test_has_every_command_and_every_published_table(self):
    for command in cli.COMMANDS:
      assert re.search(rf"python -m benchmarks {command}\b", self.TEXT), command
    for folder in FOLDERS:
      assert f"results/{folder.name}/table.md" in self.TEXT
