"""One engine for all architectures: each is quantized, trained, saved, loaded by plain PEFT and talked to, with no code of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM
from safetensors.torch import load_file
from training import chat_model
from transformers.models.falcon import modeling_falcon

from qlora_ui import jobs
from qlora_ui.data.formats import Message
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.layers import plain_linears
from qlora_ui.engine.train import train
from qlora_ui.events import Event, HeldOut, Log, Step
from qlora_ui.runs import Run, Workspace

QUESTION = [Message(role="user", content="Question 3: which word is 3?")]
HARD = {
    "max_steps": 12,
    "learning_rate": 0.03,
    "max_seq_len": 64,
    "warmup_ratio": 0,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": "off",
}
DENSE = [name for name in architectures.ARCHITECTURES if name != "experts"]
GREEDY = Sampling(temperature=0, max_new_tokens=8)
TWO_SIDED = ("t5", "bart")


def never() -> bool:
    return False


def silent(event: Event) -> None:
    pass


def trained(workspace: Workspace, data: Path, name: str, **values: Any) -> Run:
    """A run on the tiny model of that architecture, trained to its end."""
    if not (workspace.models / name).exists():
        architectures.build(workspace.models / name, name)
    run = tiny.tiny_run(workspace, data, model=name, **{"save_steps": 100, "eval_steps": 100, **values})
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    return run


def losses(run: Run, kind: type[Event] = Step) -> list[float]:
    return [event.loss for event in tiny.events_of(run, kind)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    return Workspace.open(folder / "home"), tiny.tiny_rows(folder / "rows.json", 14)


@pytest.fixture(scope="module", params=DENSE)
def run(request: pytest.FixtureRequest, place: tuple[Workspace, Path]) -> Run:
    """A finished run of 12 steps of each architecture."""
    return trained(*place, request.param, **HARD)


def test_it_learns(run: Run) -> None:
    steps, held_out = losses(run), losses(run, HeldOut)
    assert len(steps) == 12
    assert all(0 < loss < 100 for loss in [*steps, *held_out])
    assert sum(steps[-2:]) < 0.9 * sum(steps[:2])
    assert held_out[-1] < held_out[0]


def test_its_base_is_in_four_bits_and_its_answers_come_from_both_sides(run: Run) -> None:
    model = chat_model(run)
    layers = [module for module in model.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) >= 2 * 4
    (tuned,), (base,) = (list(model.reply([(side, QUESTION)], GREEDY))[-1].texts for side in (model.speaker, model.speaker.base))
    assert tuned != base
    both = list(model.reply([(model.speaker, QUESTION), (model.speaker.base, QUESTION)], GREEDY))[-1]
    assert both.texts == (tuned, base)
    assert both.tokens > 0


def test_plain_peft_loads_its_adapter(run: Run) -> None:
    kind = AutoPeftModelForSeq2SeqLM if run.config().model.model in TWO_SIDED else AutoPeftModelForCausalLM
    model = kind.from_pretrained(run.adapter, dtype=torch.float32).eval()
    saved = load_file(run.adapter / "adapter_model.safetensors")
    there = dict(model.named_parameters())
    assert saved
    for name, weight in saved.items():
        assert torch.equal(there[name.replace(".weight", ".default.weight")], weight)
    asked = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": asked, **({"decoder_input_ids": asked} if run.config().model.model in TWO_SIDED else {})}
    with torch.no_grad():
        tuned = model(**inputs).logits
        with model.disable_adapter():
            untuned = model(**inputs).logits
    assert (tuned - untuned).abs().max() > 1e-3


def test_rows_at_once_learn_the_same_as_rows_accumulated(run: Run, place: tuple[Workspace, Path]) -> None:
    at_once = trained(*place, run.config().model.model, **{**HARD, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 2})
    assert losses(at_once) == pytest.approx(losses(run)[:2], abs=1e-4)
    assert losses(at_once, HeldOut)[0] == pytest.approx(losses(run, HeldOut)[0], abs=1e-4)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_a_mixture_of_experts_learns_and_what_it_cannot_do_is_told(place: tuple[Workspace, Path]) -> None:
    run = trained(*place, "experts", **HARD)
    assert losses(run)[-1] < losses(run)[0]
    (said,) = (event.text for event in tiny.events_of(run, Log) if "Not in 4 bits" in event.text)
    assert "gate_up_proj" in said  # transformers keeps all experts of a layer in one tensor, which it does not quantize
    model = chat_model(run)
    (tuned,), (base,) = (list(model.reply([(side, QUESTION)], GREEDY))[-1].texts for side in (model.speaker, model.speaker.base))
    assert tuned != base
    both = list(model.reply([(model.speaker, QUESTION), (model.speaker.base, QUESTION)], GREEDY))[-1].texts  # one after the other
    assert both == (tuned, base)


class Doubled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_only_what_computes_a_linear_layer_is_taken_for_one_and_only_while_the_model_is_built() -> None:
    own = modeling_falcon.FalconLinear
    with plain_linears(modeling_falcon.FalconForCausalLM):
        assert modeling_falcon.FalconLinear is torch.nn.Linear
    assert modeling_falcon.FalconLinear is own
    here = sys.modules[__name__]
    with plain_linears(type("Model", (), {"__module__": __name__})):
        assert here.Doubled is not torch.nn.Linear
