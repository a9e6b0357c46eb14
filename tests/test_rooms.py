"""The house plan of DESIGN.md as a test: who may import whom, and that the page never waits for torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "qlora_ui"

# From the ground up. A module imports from rooms before its own, and, inside a room that is a folder, from its own.
ROOMS = (
    "errors",
    "stopping",
    "turns",
    "knobs",
    "config",
    "presets",
    "events",
    "trackers",
    "disk",
    "runs",
    "queueing",
    "command_line",
    "checkpoints",
    "exports",
    "exported",
    "curves",
    "answers",
    "progress",
    "hints",
    "snapshots",
    "labels",
    "speakers",
    "memory",
    "model_configs",
    "licences",
    "data",
    "engine",
    "model_shapes",
    "evaluate",
    "votes",
    "inspection",
    "time_plan",
    "overview",
    "sweeping",
    "resuming",
    "execution",
    "worker",
    "isolation",
    "jobs",
    "queue_runner",
    "probing",
    "exporting",
    "adapters",
    "talking",
    "arena",
    "services",
    "completions",
    "openai_api",
    "export_cli",
    "plan_cli",
    "queue_cli",
    "cli",
    "ui",
    "app",
)
STANDARD_LIBRARY_ONLY = {"errors", "stopping", "turns", "knobs", "config", "events", "curves", "answers", "progress", "hints", "memory"}
TRAINING_STACK = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
FILES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *ROOT.glob("app.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text("utf-8") for path in FILES}


def room(module: str) -> str:
    """The room of a dotted name; the package's own two files belong to nobody."""
    parts = module.removeprefix(f"{PACKAGE}.").split(".")
    return "" if parts[0] in (PACKAGE, "__main__") else parts[0]


def imports(module: str, source: str, *, with_types: bool = True) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a source imports, anywhere in it, also by name in a string."""
    hidden: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        if not with_types and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            hidden.update(child for statement in node.body for child in ast.walk(statement))
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level] if f"{module}." not in MODULES else module.split(".")
                base = ".".join([*package, *filter(None, [base])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names if base.startswith(PACKAGE))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES and "." in node.value:
            yield node.lineno, node.value


def upward(module: str, source: str) -> list[str]:
    """Imports of a room that is not below, one sentence each."""
    own = room(module)
    found = []
    for line, name in imports(module, source):
        other = room(name) if name.split(".")[0] in (PACKAGE, "app") else ""
        if own and other in ROOMS and other != own and ROOMS.index(other) > ROOMS.index(own):
            found.append(f"{module}:{line} imports {name}, which lives above it")
    return found


def test_every_module_has_a_room() -> None:
    assert {room(module) for module in MODULES} - {""} <= set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module: str) -> None:
    assert upward(module, MODULES[module]) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("qlora_ui.config", "from qlora_ui.runs import Run"),
        ("qlora_ui.events", "def f():\n    from qlora_ui import jobs"),
        ("qlora_ui.data.checks", "from ..engine import tokens"),
        ("qlora_ui.jobs", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import qlora_ui.services"),
        ("qlora_ui.runs", "import importlib\nimportlib.import_module('qlora_ui.engine.train')"),
        ("qlora_ui.ui.app", "import app"),
    ],
)
def test_an_upward_import_is_found_wherever_it_hides(module: str, source: str) -> None:
    assert len(set(upward(module, source))) >= 1


def test_a_downward_import_and_one_inside_a_room_pass() -> None:
    assert upward("qlora_ui.jobs", "from qlora_ui.engine.train import train\nfrom qlora_ui import __version__") == []
    assert upward("qlora_ui.data.checks", "from qlora_ui.data import sources") == []


@pytest.mark.parametrize("module", MODULES)
def test_the_first_sentence_of_a_module_says_what_it_is(module: str) -> None:
    words = (ast.get_docstring(ast.parse(MODULES[module])) or "").split("\n\n")[0]
    assert len(words) > 15
    assert words.rstrip().endswith(".")


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_only_in_their_rooms(module: str) -> None:
    roots = {name.split(".")[0] for _, name in imports(module, MODULES[module], with_types=False)}
    if room(module) not in ("engine", "evaluate"):
        assert not roots & TRAINING_STACK
    if room(module) not in ("ui", "app"):
        assert "gradio" not in roots
    if room(module) in STANDARD_LIBRARY_ONLY:
        assert roots <= {*sys.stdlib_module_names, PACKAGE}


@pytest.mark.parametrize("module", MODULES)
def test_the_engine_is_imported_late_as_a_whole(module: str) -> None:
    """`import engine.train` does not wait for another thread that is importing `engine`, whose libraries then break; `from engine` does."""
    whole = re.sub(r"if TYPE_CHECKING:\n(    .*\n)+", "", MODULES[module])
    if room(module) not in ("engine", "evaluate"):
        assert not re.search(r"(from|import) qlora_ui\.engine\.|import_module\(.qlora_ui\.engine\.", whole)


LIGHT = [module for module in MODULES if room(module) not in ("engine", "evaluate") and not module.endswith("__main__")]
BUILD_THE_PAGE = """
import importlib, sys
for module in sys.argv[2:]:
    importlib.import_module(module)
if "qlora_ui.ui.app" in sys.modules:
    from qlora_ui import services
    from qlora_ui.runs import Workspace
    from qlora_ui.ui import planner
    made = services.build(Workspace.open(sys.argv[1]), services.WarmUp())
    sys.modules["qlora_ui.ui.app"].build(made)
    assert "Fits" in planner.look(made, ["lora_r"], False, "T4", "starter", "", 32)[0]
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_the_page_is_built_and_memory_planned_without_importing_torch(home: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUILD_THE_PAGE, str(home), *LIGHT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "qlora_ui" in loaded
    assert not loaded & {*TRAINING_STACK, "datasets"}
