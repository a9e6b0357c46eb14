"""Rows, models and settings that cannot be trained on: what is left out is told, and a failure is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from training import built, logged, never, silent, trained

from qlora_ui.data import checks, sources
from qlora_ui.engine import tokens
from qlora_ui.engine.train import encode, read_rows
from qlora_ui.events import Failed, HeldOut, Log, Phase, Planned
from qlora_ui.runs import Run, Workspace


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(json.dumps([{"instruction": question, "output": answer} for question, answer in rows]))
    return path


def failure(run: Run) -> str:
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Failed)
    assert last.traceback == ""
    assert "\n" not in last.message
    return last.message


def test_what_is_dropped_and_cut_is_told(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    rows = [("Q", "A" * number) for number in range(1, 9)] + [("Q", ""), ("Q" * 300, "A"), ("Q", "A" * 300)]
    run = trained(place[0], write_rows(tmp_path / "rows.json", rows), held_out_share=0, max_steps=1, max_seq_len=64)
    told = logged(run)
    assert "11 rows: 10 kept, 1 dropped, 0 duplicates" in told
    assert "Row 9 was dropped: has no answer: 'output' is empty" in told
    assert "2 rows are longer than max_seq_len 64 and were cut" in told
    assert "1 rows were left out, nothing to train on in them after the cut: 10" in told
    assert tiny.events_of(run, Planned)[0].train_rows == 9


def test_rows_without_a_token_to_train_on_are_one_sentence(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", [("Q" * 90 + str(number), "A") for number in range(6)])
    said = failure(trained(place[0], data, max_seq_len=16))
    assert said.startswith("None of the 5 rows has a token to train on within max_seq_len 16. Raise max_seq_len")


def test_rows_longer_than_the_model_reads_are_one_sentence(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", [(f"Q{number}", "A" * 200 * number) for number in range(1, 5)])
    run = trained(place[0], data, held_out_share=0, max_seq_len=4096, max_steps=1)
    said = failure(run)
    assert said.startswith("The longest row has 8")
    assert said.endswith("tiny reads 512 at most. Set max_seq_len to 512.")
    assert "quantizing" not in [event.name for event in tiny.events_of(run, Phase)]
    assert trained(place[0], data, held_out_share=0, max_seq_len=512, max_steps=1).state() == "finished"


def test_held_out_rows_without_a_token_to_measure_are_told_and_the_run_goes_on(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json", [("Q" * 500, "A"), *((f"Q{number}", "A" * number) for number in range(1, 9))])
    config = tiny.tiny_config(data, held_out_share=0.1).data
    prepared = checks.prepare(config)
    seed = next(seed for seed in range(100) if checks.split(prepared, config, seed)[1][0].row == 1)
    run = trained(place[0], data, held_out_share=0.1, seed=seed, max_steps=2)
    assert "No held-out row has a token to measure within max_seq_len, so there is no held-out loss" in logged(run)
    assert not [line for line in logged(run) if "not finite" in line]
    assert tiny.events_of(run, HeldOut) == []
    assert run.state() == "finished"


def test_conversations_of_one_row_are_held_out_one_by_one(place: tuple[Workspace, Path], tmp_path: Path) -> None:
    instances = [{"input": f"Input {number}", "output": "A" * (number + 1)} for number in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "Answer.", "instances": instances}]))
    run = tiny.tiny_run(place[0], tmp_path / "rows.json", held_out_share=0.3)
    data = read_rows(run, run.config(), silent, never)
    train_rows, held_out_rows = encode(run, built(run).tokenizer, data, silent, never)
    assert (len(train_rows), len(held_out_rows)) == (7, 3)
    trained = [len(rows[i]["input_ids"]) for rows in (train_rows, held_out_rows) for i in range(len(rows))]
    alone = [len(tokens.encode(built(run).tokenizer, row.messages, "assistant", 512).input_ids) for row in data.conversations]
    assert sorted(trained) == sorted(alone)
    assert len(set(trained)) > 3


def test_a_split_of_the_sources_own_is_what_is_measured(place: tuple[Workspace, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def row(number: int) -> dict[str, str]:
        return {"prompt": f"Question {number}?", "completion": f"Answer {number}."}

    splits = {"o/set": [row(number) for number in range(8)], "o/set#test": [row(number) for number in range(7, 10)]}
    monkeypatch.setattr(
        sources, "read", lambda reference, *_: (sources.RawRow(number=n, values=v) for n, v in enumerate(splits[reference], 1))
    )
    run = trained(place[0], Path("o/set"), held_out_split="test", max_steps=2)
    (planned,) = tiny.events_of(run, Planned)
    assert (planned.train_rows, planned.held_out_rows) == (7, 3)
    assert "Held out: 3 rows of the split test" in [event.text for event in tiny.events_of(run, Log)]
    assert "Row 8 was dropped: is also in the split 'test', which is held out" in logged(run)
    assert run.state() == "finished"


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_special_tokens(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")}))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def in_few_bits(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq", "bits": 4}}))


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "is not a valid JSON file. Fetch or copy the model again"),
        (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "The tokenizer of "),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "The tokenizer of "),
        (without_special_tokens, "has neither a pad nor an end token"),
        (without_template, "has no chat template. Set prompt_format to chatml, guanaco or alpaca"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (cut_weights, "cannot be loaded"),
        (in_few_bits, "damaged is stored in few bits already: The model is quantized with GPTQConfig"),
        (drop_a_weight, "lacks 1 of its weights (the first is model.norm.weight)"),
    ],
)
def test_a_damaged_model_is_one_sentence_with_its_folder(workspace: Workspace, rows: Path, damage: Damage, said: str) -> None:
    damage(tiny.tiny_model(workspace.models / "damaged"))
    message = failure(trained(workspace, rows, model="damaged", prompt_format="tokenizer", max_steps=1))
    assert said in message
    assert "damaged" in message or "prompt_format" in message


@pytest.mark.parametrize("model", ["nowhere", "..", "~", "~nobody-here/x", "a\0b", "x" * 300, "a/" + "x" * 300, "a b/c", "a/b/c"])
def test_a_model_that_is_nowhere_is_one_sentence_with_its_name(workspace: Workspace, rows: Path, model: str) -> None:
    message = failure(trained(workspace, rows, model=model))
    assert "no model" in message
    assert repr(model)[:40] in message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_modules": "q_proj, nowhere"}, "target_modules has 'nowhere', but this model has no such module. Its own are down_proj, "),
        (
            {"target_modules": "self_attn"},
            "target_modules has 'self_attn', a LlamaAttention, which takes no adapter. Name the layers",
        ),
        ({"target_modules": ","}, "target_modules is ',': give all-linear, attention, or names from down_proj, "),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16', but there is no GPU here: use auto, float32 or bfloat16."),
    ],
)
def test_a_setting_that_this_model_or_machine_cannot_serve_is_one_sentence(
    place: tuple[Workspace, Path], values: dict[str, Any], said: str
) -> None:
    if "compute_dtype" in values and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    run = trained(*place, **values)
    assert failure(run).startswith(said)
    assert "quantizing" not in [event.name for event in tiny.events_of(run, Phase)]  # the weights were not loaded yet
