"""What the README and the notebook say is so."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import yaml

from qlora_ui import cli
from qlora_ui.config import settings_table
from qlora_ui.plan_cli import paper_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def between(marker: str) -> str:
    found = re.search(f"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.DOTALL)
    assert found, marker
    return found[1].strip()


def test_the_settings_table_is_the_declaration() -> None:
    assert between("settings") == settings_table()


def test_the_planners_table_is_what_it_forecasts() -> None:
    assert between("memory") == paper_table()


def test_the_front_matter_makes_a_clone_a_space() -> None:
    front = yaml.safe_load(README.split("---")[1])
    assert front["sdk"] == "gradio"
    assert (ROOT / front["app_file"]).is_file()
    low, high = re.search(r"gradio>=([\d.]+),<([\d.]+)", (ROOT / "requirements.txt").read_text("utf-8")).groups()  # type: ignore[union-attr]
    as_numbers = lambda text: [int(part) for part in text.split(".")]  # noqa: E731
    assert as_numbers(low) <= as_numbers(front["sdk_version"]) < as_numbers(high)


def test_every_command_of_the_readme_parses() -> None:
    commands = re.findall(r"python -m qlora_ui (.+)", README)
    assert len(commands) >= 4
    for command in commands:
        words = [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', command.strip("` "))]
        if "name=value" not in words:
            cli.parser().parse_args(words)


def test_files_that_the_readme_names_exist() -> None:
    for path in re.findall(r"\(((?:assets|tests|qlora_ui)/[^)]+)\)|`((?:assets|tests|qlora_ui|presets)/[\w./]+)`", README):
        assert (ROOT / (path[0] or path[1])).exists(), path


def test_no_file_names_a_package_index_or_a_path_of_some_machine() -> None:
    forbidden = re.compile(r"pypi\.org|files\.pythonhosted|registry\.npmjs|index-url|/work/|/root/")
    for folder in ("qlora_ui", "presets", "assets", "tests/run.sh", "README.md", "requirements.txt", "app.py", ".ci/run"):
        files = [ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*")
        for file in files:
            if file.suffix in (".py", ".sh", ".md", ".txt", ".yaml", ".ipynb", ".css", ".js", ""):
                assert not (file.is_file() and forbidden.search(file.read_text("utf-8"))), file


def test_the_notebook_is_valid_and_keeps_the_torch_that_is_there() -> None:
    notebook = json.loads((ROOT / "assets" / "qlora_ui_colab.ipynb").read_text("utf-8"))
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for source in code:
        ast.parse(source)
    assert any("torch=={importlib.metadata.version('torch')}" in source and '"-c"' in source for source in code)
    assert "app.py" in code[-1]
