"""The model card beside an adapter: what it tells, that it parses, and that it gives nothing of this machine away."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from qlora_ui.config import RunConfig
from qlora_ui.engine import card
from qlora_ui.engine.train import train
from qlora_ui.events import HeldOut, Planned, Step
from qlora_ui.jobs import Jobs
from qlora_ui.runs import Workspace

PLANNED = Planned(total_steps=4, train_rows=1200, held_out_rows=30, tokens=9000, trained_tokens=4000)
EVENTS = [
    PLANNED,
    HeldOut(step=0, loss=3.5),
    Step(step=4, loss=1.25, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=9.0, memory_gib=1.0, epoch=1.0),
    HeldOut(step=4, loss=2.5),
]
HUB = {"model_name": "o/base", "model_origin": "the Hugging Face Hub", "model_commit": "c0ffee", "versions": {"peft": "0.21"}}


def made(facts: dict[str, Any] = HUB, task: str = "CAUSAL_LM", **values: Any) -> str:
    return card.text(facts, RunConfig().with_values({"model": "o/base", "data": "o/set", **values}), EVENTS, {"task_type": task})


def front(text: str) -> dict[str, Any]:
    matter: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return matter


def code(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def test_the_card_tells_where_the_adapter_comes_from_and_how_it_did() -> None:
    text = made(data="timdettmers/openassistant-guanaco", lora_r=7)
    assert front(text) == {
        "library_name": "peft",
        "tags": ["qlora", "lora", "base_model:adapter"],
        "base_model": "o/base",
        "datasets": ["timdettmers/openassistant-guanaco"],
    }
    assert "`timdettmers/openassistant-guanaco`, licence Apache-2.0" in text
    assert "| lora_r | `7` |" in text
    assert "1,200 to train on, 30 held out" in text
    assert "Last training loss: 1.2500 (step 4)" in text
    assert "3.5000 at step 0, 2.5000 at step 4" in text
    assert "- peft 0.21" in text


def test_a_licence_that_nobody_knows_is_said_to_be_unknown() -> None:
    assert "`o/set`, licence not known" in made()
    assert "`guanaco-starter`, licence CC0-1.0" in made(data="bundled:guanaco-starter")
    assert "datasets" not in front(made(data="bundled:guanaco-starter"))


@pytest.mark.parametrize(("task", "kind"), [("CAUSAL_LM", "AutoModelForCausalLM"), ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM")])
def test_its_lines_of_python_name_the_class_that_loads_the_base(task: str, kind: str) -> None:
    lines = code(made({**HUB, "compute_dtype": "bfloat16"}, task, quant_type="fp4"))
    ast.parse(lines)
    assert f"{kind}.from_pretrained('o/base', revision='c0ffee', quantization_config=bits, dtype=torch.bfloat16)" in lines
    assert "load_in_4bit=True, bnb_4bit_quant_type='fp4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16" in lines


@pytest.mark.parametrize(
    ("bits", "told", "line"),
    [
        (4, "Trained with QLoRA: the base is frozen in NF4,", "bits = BitsAndBytesConfig(load_in_4bit=True, "),
        (8, "Trained with LoRA: the base is frozen in 8 bits (LLM.int8),", "bits = BitsAndBytesConfig(load_in_8bit=True)"),
        (16, "Trained with LoRA: the base is frozen and not quantized,", "bits = None"),
    ],
)
def test_it_tells_how_the_base_was_stored(bits: int, told: str, line: str) -> None:
    text = made(quant_bits=bits)
    assert told in text
    assert line in code(text)
    assert ("qlora" in front(text)["tags"]) == (bits == 4)


def test_its_lines_of_python_allow_a_models_own_code_where_the_owner_did() -> None:
    assert "trust_remote_code=True" in code(made(trust_remote_code=True))
    assert "trust_remote_code" not in code(made())


@pytest.mark.parametrize(
    "name", ["o/set", "odd: [name]", "a'b\"c", "---", "# x", "x`y|z", "ü/文", "two\nlines", "{{ x }}", "!!python/object:os.system"]
)
def test_an_odd_name_breaks_neither_the_front_matter_nor_the_code_nor_the_table(name: str) -> None:
    text = made({**HUB, "model_name": name, "model_commit": name}, target_modules=name)
    assert front(text)["base_model"] == name
    ast.parse(code(text))
    (row,) = (line for line in text.splitlines() if line.startswith("| target_modules "))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert row.count("`") == 2


def test_no_folder_of_this_machine_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained from files on this disk, every path of which has the user's name in it."""
    workspace = Workspace.open(tmp_path / "secret-user" / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    data = tiny.tiny_rows(workspace.uploads / "my rows.json")
    config = tiny.tiny_config(data, max_steps=2, columns="instruction=instruction")
    run = Jobs(workspace, train).run_here(config)
    assert run.state() == "finished"
    text = (run.adapter / "README.md").read_text("utf-8")
    for hidden in ("secret-user", str(tmp_path), str(Path.home()), "uploads"):
        assert hidden not in text
    assert "base_model" not in front(text)
    assert "# LoRA adapter for `tiny`" in text
    assert "`my rows.json`, licence not known" in text
    assert re.search(r"Held-out loss: \d+\.\d+ at step 0, \d+\.\d+ at step 2", text)
    assert re.search(r"- transformers \d", text)


@pytest.mark.parametrize("reference", ["~/x/rows.json", "/home/me/rows.csv", "/home/me/folder.d", "private/rows.jsonl"])
def test_a_data_set_from_this_disk_is_known_by_its_last_name_only(reference: str) -> None:
    text = made(data=reference)
    assert f"`{Path(reference).name}`" in text
    assert str(Path(reference).parent) not in text
    assert "datasets" not in front(text)
