"""Packed rows: the same losses as alone, no token lost, the same steps; padded where a model would mix rows up."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui import jobs
from qlora_ui.config import RunConfig
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import add_adapter
from qlora_ui.engine.batches import MICRO_BATCHES, ROWS, StepCollator, packed
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, load_quantized
from qlora_ui.engine.step_plan import cannot_pack, choose_packing, forward
from qlora_ui.engine.tokens import IGNORED, REAL_TOKENS, Collator
from qlora_ui.engine.train import train
from qlora_ui.events import Event, HeldOut, Log, Step, Stopped
from qlora_ui.runs import Run, Workspace

Row = dict[str, list[int]]


def row(length: int, seed: int) -> Row:
    """Of ids that the tiny model knows; the first third is a prompt."""
    ids = torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return {"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]}


def nf4(workspace: Workspace, name: str = tiny.NAME) -> Any:
    """The tiny model in 4 bits, with an adapter that changes something."""
    config = tiny.tiny_config("none")
    found = find_here(name, "main", workspace.models)
    assert found is not None
    base = load_quantized(found, config.quantization, detect("float32"), lambda event: None, lambda: False)
    model: Any = add_adapter(base, config.adapter, 0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def trained(workspace: Workspace, data: Path, **values: Any) -> Run:
    run = tiny.tiny_run(workspace, data, **values)
    jobs.execute(run, train)
    return run


def logged(run: Run) -> str:
    return "\n".join(event.text for event in tiny.events_of(run, Log))


def losses_of(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """Of each predicted token of a row that lies alone in (tokens, words)."""
    return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:]), reduction="none", ignore_index=IGNORED)


# The batch ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 60), min_size=1, max_size=24), st.integers(16, 120))
@settings(max_examples=60)
def test_packing_loses_no_row_and_no_token(lengths: list[int], budget: int) -> None:
    rows = [row(length, seed) for seed, length in enumerate(lengths)]
    step = StepCollator(token_budget=budget, pad_rows=1, pad=Collator(0))(rows)
    found: list[tuple[list[int], list[int]]] = []
    for batch in step[MICRO_BATCHES]:
        ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        starts = [index for index, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            assert positions[start:end] == list(range(end - start))
            found.append((ids[start:end], labels[start + 1 : end]))
            assert labels[start] == IGNORED
        assert len(ids) <= budget or len(starts) == 1
        assert batch[REAL_TOKENS] == len(ids)
    assert sorted(found) == sorted((r["input_ids"], r["labels"][1:]) for r in rows)
    assert step[ROWS] == len(rows)


def test_the_first_token_of_a_packed_row_is_not_learned_from_the_row_before_it() -> None:
    everything = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert packed([everything, everything])["labels"].tolist() == [[IGNORED, 6, 7, IGNORED, 6, 7]]


def test_without_packing_a_step_is_padded_micro_batches_in_order() -> None:
    rows = [row(length, length) for length in (9, 3, 5, 7, 4)]
    step = StepCollator(token_budget=0, pad_rows=2, pad=Collator(1))(rows)
    assert [tuple(batch["input_ids"].shape) for batch in step[MICRO_BATCHES]] == [(2, 9), (2, 7), (1, 4)]
    assert [batch[REAL_TOKENS] for batch in step[MICRO_BATCHES]] == [12, 12, 4]


# The model ----------------------------------------------------------------------------------------------------------------


def test_each_packed_row_has_the_losses_that_it_has_alone(tiny_workspace: Workspace) -> None:
    model = nf4(tiny_workspace)
    rows = [row(length, seed) for seed, length in enumerate((31, 4, 57, 12, 2, 44))]
    together = forward(model, packed(rows))[0].split([len(r["input_ids"]) for r in rows])
    for logits, one in zip(together, rows, strict=True):
        alone = forward(model, {"input_ids": torch.tensor([one["input_ids"]])})[0]
        assert losses_of(logits, one) == pytest.approx(losses_of(alone, one), abs=1e-4)


def test_a_model_that_keeps_rows_apart_is_found_out(tiny_workspace: Workspace) -> None:
    assert cannot_pack(nf4(tiny_workspace), [row(30, 1), row(40, 2)]) == ""


def test_a_model_that_does_not_look_at_positions_is_found_out(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nf4(tiny_workspace)
    inner = model.get_base_model().model
    original = inner.forward
    monkeypatch.setattr(inner, "forward", lambda *args, position_ids=None, **kwargs: original(*args, **kwargs))
    assert (
        cannot_pack(model, [row(30, 1), row(40, 2)]) == "LlamaForCausalLM lets a row see the one before it in a pack (tried on this model)"
    )


def test_an_architecture_without_positions_is_padded_and_the_log_says_why(
    tiny_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bloom(tiny_workspace.models / "bloom")
    data = tiny.tiny_rows(tmp_path / "rows.json")
    run = trained(tiny_workspace, data, model="bloom", packing="on", max_steps=2)
    assert run.state() == "finished"
    warnings = [event.text for event in tiny.events_of(run, Log) if event.level == "warning"]
    assert warnings == ["Rows are padded, not packed: BloomForCausalLM takes no positions"]
    padded = trained(tiny_workspace, data, model="bloom", packing="off", max_steps=2)
    assert [event.loss for event in tiny.events_of(run, Step)] == [event.loss for event in tiny.events_of(padded, Step)]


def bloom(folder: Path) -> None:
    """A tiny model whose attention knows distances, not positions."""
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = tiny.tiny_tokenizer()
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# The run ------------------------------------------------------------------------------------------------------------------


def followed(run: Run, kind: type[Event]) -> list[float]:
    return [event.loss for event in tiny.events_of(run, kind)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_rows(tmp_path_factory.mktemp("packing") / "rows.json", 40)


def test_packed_and_padded_runs_learn_the_same_step_by_step(tiny_workspace: Workspace, data: Path) -> None:
    ways = {
        "at once, padded": {"packing": "off", "micro_batch_size": 8, "gradient_accumulation_steps": 1},
        "at once, packed": {"packing": "on", "micro_batch_size": 8, "gradient_accumulation_steps": 1},
        "accumulated, packed": {"packing": "auto", "micro_batch_size": 1, "gradient_accumulation_steps": 8},
    }
    runs = {name: trained(tiny_workspace, data, **values) for name, values in ways.items()}
    expected = runs.pop("at once, padded")
    assert "Packing is off: 8 rows a micro-batch" in logged(expected)
    assert (len(followed(expected, Step)), len(followed(expected, HeldOut))) == (4, 3)
    for run in runs.values():
        assert "Rows are packed without padding" in logged(run)
        for kind in (Step, HeldOut):
            assert followed(run, kind) == pytest.approx(followed(expected, kind), abs=1e-4)


def test_the_last_step_of_an_epoch_with_fewer_rows_is_an_average_over_its_own_tokens(tiny_workspace: Workspace, tmp_path: Path) -> None:
    data = tiny.tiny_rows(tmp_path / "rows.json", 14)
    values = {"held_out_share": 0, "max_steps": 0, "num_train_epochs": 1, "micro_batch_size": 4, "save_steps": 100}
    one, other = (trained(tiny_workspace, data, packing=packing, **values) for packing in ("on", "off"))
    assert len(followed(one, Step)) == math.ceil(14 / 4)
    assert followed(one, Step) == pytest.approx(followed(other, Step), abs=1e-4)


def test_stop_between_two_packs_of_a_step_takes_effect_there(tiny_workspace: Workspace, data: Path) -> None:
    run = tiny.tiny_run(
        tiny_workspace, data, max_seq_len=32, micro_batch_size=1, gradient_accumulation_steps=8, max_steps=50, eval_steps=50
    )
    asked_in_step_3 = 0
    steps = 0

    def emit(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, Step)
        run.append(event)

    def should_stop() -> bool:
        nonlocal asked_in_step_3
        asked_in_step_3 += steps == 2
        return asked_in_step_3 > 3  # once at the end of step 2, then between the packs

    train(run, emit, should_stop)
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Stopped)
    assert last.step == steps == 2


@pytest.mark.parametrize(("kind", "budget"), [("cpu", 512), ("cuda", 4096)])
def test_the_token_budget_is_what_padding_would_have_taken_but_less_on_a_cpu(tiny_workspace: Workspace, kind: str, budget: int) -> None:
    config = RunConfig().with_values({"micro_batch_size": 4, "max_seq_len": 1024})
    hardware = dataclasses.replace(detect("float32"), kind=kind)
    said: list[Any] = []
    assert choose_packing(nf4(tiny_workspace), config, hardware, [row(30, 1), row(40, 2)], said.append) == budget
    assert f"up to {budget:,} tokens" in said[-1].text


def test_padding_is_still_the_collator_of_tokens() -> None:
    rows = [row(4, 1), row(2, 2)]
    ours = StepCollator(token_budget=0, pad_rows=2, pad=Collator(7))(rows)[MICRO_BATCHES][0]
    plain = tokens.Collator(7)(rows)
    assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(plain[name])) for name in plain)
