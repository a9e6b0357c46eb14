"""Faster answers are the same answers; what they take is told before, and given back after."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.functional import has_avx512bf16
from training import Watched
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompileConfig

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.engine import faster, tokens
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.faster import Faster, Unpacked, offered_gib
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.logits import as_it_is
from qlora_ui.errors import UserError
from qlora_ui.memory.devices import GIB
from qlora_ui.model_shapes import find_shape
from qlora_ui.talking import EngineChat

ASKED = [Message(role="user", content="Question 3: which word is 3?")]
GREEDY = Sampling(temperature=0, max_new_tokens=24)


def test_the_words_and_every_bit_of_the_logits_are_the_same(finished: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, speaker = EngineChat(finished.run.workspace), speakers.of_run(finished.run)

    def said() -> tuple[tuple[str, ...], torch.Tensor]:
        *_, last = engine.reply([(speaker, ASKED), (speaker.base, ASKED)], GREEDY)
        return last.texts, as_it_is(engine._model.model, list(range(5, 60)))  # type: ignore[union-attr]

    def unpacked() -> int:
        return sum(isinstance(vars(layer).get("forward"), Unpacked) for layer in faster.four_bit(engine._model.model))  # type: ignore[union-attr]

    expected = said()
    engine.faster = True
    quick = said()
    assert (quick[0], torch.equal(quick[1], expected[1]), unpacked()) == (expected[0], True, 14)
    engine.faster = False
    assert (said()[0], unpacked()) == (expected[0], 0)

    engine.faster = True
    monkeypatch.setattr(faster, "free_memory_gib", lambda: 0.00001)
    with pytest.raises(UserError, match=r"Faster answers take 0\.0 GiB, but 0\.0 GiB are free\. Close what else"):
        said()
    engine.faster = False
    assert said()[0] == expected[0]


def test_what_it_will_take_is_what_it_takes(finished: Watched) -> None:
    config, models = finished.run.config(), finished.run.workspace.models
    shape, hardware = find_shape(tiny.NAME, "main", models), detect("float32")
    engine = EngineChat(finished.run.workspace)
    list(engine.reply([(speakers.of_run(finished.run), ASKED)], Sampling(max_new_tokens=1)))
    measured = engine._model.faster.gib  # type: ignore[union-attr]
    assert offered_gib(shape, config.quantization, hardware) == measured == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128) * 4 / GIB
    for other in (
        offered_gib(shape, dataclasses.replace(config.quantization, quant_bits="8"), hardware),
        offered_gib(shape, config.quantization, dataclasses.replace(hardware, kind="cuda")),
    ):
        assert other == 0


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no products for 4 bits")
def test_in_bfloat16_a_cpus_own_products_answer_as_those_of_plain_transformers(finished: Watched) -> None:
    run = finished.run
    speaker = speakers.of_run(run)
    speaker = dataclasses.replace(speaker, quantization=dataclasses.replace(speaker.quantization, compute_dtype="bfloat16"))
    engine = EngineChat(run.workspace)
    *_, answers = engine.reply([(speaker.base, ASKED)], GREEDY)
    model = engine._model
    assert model is not None
    assert model.faster.gib == 0
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in faster.four_bit(model.model))
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    plain: Any = AutoModelForCausalLM.from_pretrained(run.workspace.models / tiny.NAME, quantization_config=bits, dtype=torch.bfloat16)
    asked = model.tokenizer(tokens.prompt(model.tokenizer, ASKED), add_special_tokens=False, return_tensors="pt")
    said = plain.eval().generate(**asked, do_sample=False, max_new_tokens=24, eos_token_id=model.end_ids)
    text = model.tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(answers.texts[0]) > 20
    assert text.startswith(answers.texts[0])  # which ends before half a letter
    assert torch.equal(as_it_is(model.model, list(range(5, 60))), as_it_is(plain, list(range(5, 60))))


def test_compiled_layers_answer_as_they_do_uncompiled_tuned_and_base(finished: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on a CPU: captured as there, and run without a compiler."""
    captured = CompileConfig(backend="eager", mode=None)
    captured._compile_all_devices = True
    monkeypatch.setattr(faster, "CompileConfig", lambda mode: captured)
    engine, speaker = EngineChat(finished.run.workspace), speakers.of_run(finished.run)

    def said() -> tuple[str, ...]:
        *_, last = engine.reply([(speaker, ASKED), (speaker.base, ASKED)], Sampling(temperature=0, max_new_tokens=8))
        return last.texts

    expected = said()
    model = engine._model
    assert model is not None
    model.faster = Faster(model.model.get_base_model(), compiles=True)
    engine.faster = True
    assert said() == said() == expected
    assert hasattr(model.model.get_base_model(), "_compiled_call")
    engine.faster = False
    assert said() == expected
