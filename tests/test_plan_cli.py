"""`plan` on the command line: the same terms for a script and for a person, from a shape that is on disk, shipped, or on the Hub."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_hub_models import CLOSED, Hub, hub, use  # noqa: F401  (hub is a fixture)

from qlora_ui import plan_cli, presets
from qlora_ui.cli import main
from qlora_ui.memory.forecast import Terms, forecast
from qlora_ui.memory.shapes import read_shape
from qlora_ui.model_configs import find_config, shipped
from qlora_ui.runs import Workspace

ROOT = Path(__file__).resolve().parents[1]
TERMS = [field.name for field in dataclasses.fields(Terms)]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "--json", *arguments]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_plan_as_json_names_every_term_in_bytes_and_a_verdict(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "--preset", "guanaco-7b", "--gpu", "24")
    assert list(said["terms"]) == TERMS
    assert said["total"] == sum(said["terms"].values())
    assert said["verdict"] == "fits"
    assert (said["memory"], said["parameters"]) == (24 * 2**30, 6_738_415_616)
    assert all(isinstance(size, int) for size in said["terms"].values())
    assert [name for name, size in said["terms"].items() if size == 0] == ["dequantized_weights"]  # which only a CPU keeps


@pytest.mark.parametrize(("gpu", "verdict"), [("8", "does not fit"), ("A6000", "tight"), ("h100", "fits")])
def test_the_verdict_follows_the_card(gpu: str, verdict: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "--preset", "guanaco-65b", "--gpu", gpu)
    assert said["verdict"] == verdict
    assert said["advice"]


def test_set_and_model_change_the_preset_and_without_one_the_plain_settings_hold(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = plan(capsys, "--model", "Qwen/Qwen3-8B", "--gpu", "24")
    preset = plan(capsys, "--preset", "guanaco-7b", "--model", "Qwen/Qwen3-8B", "--gpu", "24")
    narrow = plan(capsys, "--preset", "guanaco-7b", "--model", "Qwen/Qwen3-8B", "--gpu", "24", "--set", "lora_r=16")
    assert plain["model"] == preset["model"] == "Qwen/Qwen3-8B"
    assert plain["terms"]["adapter"] == narrow["terms"]["adapter"] == preset["terms"]["adapter"] / 4


def test_plan_for_a_person_is_a_table_with_a_bar_and_the_advice(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--preset", "guanaco-33b", "--gpu", "T4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "huggyllama/llama-30b (32.53 billion parameters) on T4, 14.6 GiB"
    rows = [line for line in lines[3:] if " GiB  " in line or line.endswith(" GiB")]
    assert [row[:24].strip().replace(" ", "_") for row in rows[:-1]] == TERMS
    assert rows[-1].startswith("total ")
    assert any(line.startswith("Of the optimizer state 3.") for line in lines)
    assert lines[-1].startswith("Verdict: does not fit. ")


def test_without_a_card_this_machine_is_planned_for(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    said = plan(capsys, "--preset", "starter")
    assert said["memory"] > 2**28
    assert said["compute_dtype"] in ("float32", "bfloat16", "float16")
    assert plan(capsys, "--preset", "starter", "--set", "compute_dtype=float32")["compute_dtype"] == "float32"


def test_a_model_on_disk_counts_before_what_is_shipped(
    tiny_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_name, by_path = (
        plan(capsys, "--model", model, "--gpu", "8")["parameters"] for model in ("tiny", str(tiny_workspace.models / "tiny"))
    )
    assert by_name == by_path < 200_000
    mine = tiny_workspace.models / "huggyllama--llama-7b"
    mine.mkdir()
    (mine / "config.json").write_text((tiny_workspace.models / "tiny" / "config.json").read_text())
    assert plan(capsys, "--model", "huggyllama/llama-7b", "--gpu", "8")["parameters"] == by_name


def test_an_architecture_without_a_reader_is_planned_from_its_config_alone(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    (workspace.models / "gpt2").mkdir()
    (workspace.models / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25}))
    said = plan(capsys, "--model", "gpt2", "--gpu", "T4")
    assert said["parameters"] == 1_557_611_200  # of GPT-2 XL
    assert said["terms"]["quantized_weights"] == 48 * 12 * 1600**2 // 2
    assert said["verdict"] == "fits"


def test_of_a_model_on_the_hub_only_the_config_is_fetched_and_kept(
    workspace: Workspace,
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = plan(capsys, "--model", "o/good", "--gpu", "8")
    assert 0 < said["parameters"] < 200_000
    assert not any(path.endswith((".safetensors", ".py")) for path in hub.asked)
    use(monkeypatch, CLOSED)
    assert plan(capsys, "--model", "o/good", "--gpu", "8") == said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "There is no model 'nowhere' on this machine. Use a Hugging Face id (owner/name)"),
        (["--model", "o/n"], "The Hugging Face Hub could not be asked for the shape of o/n. Check the connection"),
        (["--model", "a" * 300], "There is no model 'aaa"),
        (["--model", "odd"], "The memory of odd cannot be counted: it is of the architecture 'odd', which transformers does not know."),
        (["--model", "broken"], "The config.json of broken cannot be read: "),
        (["--model", "list"], "The config.json of list is no JSON object."),
        (["--preset", "starter", "--gpu", "big"], "--gpu 'big' is no card that is known here."),
        (["--preset", "nope"], "There is no preset 'nope'."),
        (["--set", "lora_r=0"], "lora_r is 0"),
    ],
)
def test_a_mistake_exits_2_with_a_sentence_within_5_seconds(
    workspace: Workspace, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("odd", '{"model_type": "odd"}'), ("broken", "{"), ("list", "[]")):
        (workspace.models / name).mkdir()
        (workspace.models / name / "config.json").write_text(content)
    begun = time.monotonic()
    assert main(["plan", "--gpu", "8", *arguments]) == 2
    assert time.monotonic() - begun < 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("o/gated", "o/gated is gated: accept its licence"),
        ("o/private", "The Hub has no model 'o/private' at revision 'main', or it is private."),
        ("o/busy", "The Hugging Face Hub could not be asked for the shape of o/busy."),
        ("o/hangs", "The Hugging Face Hub could not be asked for the shape of o/hangs."),
    ],
)
def test_a_hub_that_does_not_give_the_config_is_told_in_a_sentence(
    workspace: Workspace,
    hub: Hub,  # noqa: F811
    model: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("qlora_ui.model_configs.HUB_SECONDS", 0.5)
    hub.hang_at = "question" if model == "o/hangs" else ""
    assert main(["plan", "--model", model, "--gpu", "8"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_planning_for_a_card_needs_neither_torch_nor_a_network(workspace: Workspace) -> None:
    """A process of its own: what it imports is what a person waits for."""
    script = "import sys; from qlora_ui.cli import main; main(sys.argv[1:]); print({'torch', 'huggingface_hub'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--preset", "qwen3-8b", "--gpu", "24"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_command_line_says_what_the_planner_says(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    config = presets.load("smollm3-3b").config
    said = plan(capsys, "--preset", "smollm3-3b", "--gpu", "L4")
    shape = read_shape(find_config(config.model.model, "main", workspace.models), "smollm3")
    assert said["terms"] == dict(forecast(shape, config, plan_cli.find_device("L4")).terms)
    assert shipped()[config.model.model] == find_config(config.model.model, "main", workspace.models)
