"""A run taken away as a script: the same losses, in a process that does not know this project."""

from __future__ import annotations

import ast
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import trained

from qlora_ui.cli import main, read_config
from qlora_ui.cli import parser as command_line
from qlora_ui.engine import script
from qlora_ui.errors import UserError
from qlora_ui.events import HeldOut, Step
from qlora_ui.runs import Run, Workspace


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("script")
    workspace = Workspace.open(home / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    settings = {"max_steps": 6, "lora_dropout": 0.0, "micro_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}
    return trained(workspace, tiny.tiny_rows(home / "rows.json"), **settings)


def test_the_script_trains_the_same_losses_without_this_project(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "taken away"
    assert main(["--home", str(run.workspace.root), "script", "--run", run.id, "--to", str(folder)]) == 0
    told = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); assert not any('qlora_ui' in name for name in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", told, str(folder / "train.py")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = [entry["loss"] for entry in json.loads((folder / "losses.json").read_text()) if "loss" in entry]
    assert theirs == pytest.approx([event.loss for event in tiny.events_of(run, Step)], abs=1e-3)  # Trainer rounds to four digits
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "adapter" / "chat_template.jinja").is_file()


def test_the_notebook_is_the_script_in_cells_and_the_command_starts_the_same_run(run: Run, tmp_path: Path) -> None:
    script.write(run, tmp_path / "made")
    cells = json.loads((tmp_path / "made" / "train.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse(cell["source"])
    code = "".join(cell["source"] for cell in cells)
    assert all(
        line.strip() in code for line in (tmp_path / "made" / "train.py").read_text().splitlines() if not line.startswith(("# %%", '"""'))
    )
    said = (tmp_path / "made" / "README.md").read_text().splitlines()
    (flags,) = [shlex.split(line) for line in said if line.startswith("    python -m qlora_ui")]
    again = read_config(command_line().parse_args(flags[3:]))
    assert {**again.values(), "preset": ""} == {**run.config().values(), "preset": ""}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"new_tokens": "<|x|>"}, "no script for a run with new_tokens"),
        ({"loraplus_lr_ratio": 16.0}, "no script for a run with loraplus_lr_ratio"),
    ],
)
def test_what_a_plain_script_cannot_say_is_a_sentence(values: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        script.check(tiny.tiny_config("rows.json", **values), Path("home"))


def test_the_script_ends_early_and_keeps_the_best_weights_as_the_run_did(tiny_workspace: Workspace, rows: Path, tmp_path: Path) -> None:
    """At this learning rate the held-out loss rises after step 6, and two measurements later it is over."""
    wished = {"keep": "best", "early_stopping_patience": 2, "eval_steps": 1, "save_steps": 5, "max_steps": 12}
    run = trained(tiny_workspace, rows, **wished, learning_rate=0.03, warmup_ratio=0.0)
    script.write(run, tmp_path / "made")
    subprocess.run([sys.executable, "-I", "train.py"], cwd=tmp_path / "made", capture_output=True, check=True)
    log = json.loads((tmp_path / "made" / "losses.json").read_text())
    theirs = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    ours = {event.step: event.loss for event in tiny.events_of(run, HeldOut)}
    best = min(ours, key=lambda step: ours[step])
    assert theirs.keys() == ours.keys()
    assert best == min(theirs, key=lambda step: theirs[step]) < max(ours) < 12
    folders = tmp_path / "made" / "adapter", tmp_path / "made" / "checkpoints" / f"checkpoint-{best}"
    kept, saved = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)


def test_a_folder_that_is_there_is_left_alone_and_a_run_without_an_adapter_has_no_script(
    run: Run, workspace: Workspace, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="exists already"):
        script.write(run, tmp_path)
    with pytest.raises(UserError, match="no adapter and no checkpoint yet"):
        script.write(tiny.tiny_run(workspace, rows), tmp_path / "none")
    assert list(tmp_path.glob("*partial")) == []
