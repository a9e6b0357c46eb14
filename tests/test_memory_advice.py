"""The memory planner as a whole: what settings do to its terms, its verdict, and that its advice would help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from qlora_ui import presets
from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.errors import UserError
from qlora_ui.memory.advice import advice, advice_after_lack, advice_for
from qlora_ui.memory.devices import CARDS, GIB, Device, find_device
from qlora_ui.memory.forecast import OVERHEAD_BYTES, activation_room, forecast
from qlora_ui.memory.shapes import read_shape
from qlora_ui.model_configs import shipped
from qlora_ui.model_shapes import find_shape


def planned(preset: str, device: Device, **values: Any) -> Any:
    config = presets.load(preset).config.with_values(values)
    return forecast(read_shape(shipped()[config.model.model], preset), config, device)


A100 = find_device("A100-80")


def test_the_papers_65b_fits_48_gb_because_adams_pages_can_leave() -> None:
    card = find_device("A6000")
    paged, unpaged = (planned("guanaco-65b", card, optimizer=name) for name in ("paged_adamw_32bit", "adamw_torch"))
    assert paged.verdict(card.memory_bytes) == "tight"
    assert unpaged.verdict(card.memory_bytes) == "does not fit"
    assert paged.paged_bytes == paged.terms.optimizer_state > 6e9


FIGURES = {
    name: re.search(r"([\d.]+) GB before activations", (presets.FOLDER / f"{name}.yaml").read_text("utf-8")) for name in presets.names()
}


@pytest.mark.parametrize("name", [name for name, said in FIGURES.items() if said])
def test_a_preset_takes_what_its_file_says_before_activations(name: str) -> None:
    before = sum(size for term, size in planned(name, A100).terms if term not in ("activations", "logits", "overhead"))
    assert before / 1e9 == pytest.approx(float(FIGURES[name][1]), abs=0.11)  # type: ignore[index]


def test_each_setting_moves_the_terms_that_it_should() -> None:
    before = planned("guanaco-7b", A100, gradient_checkpointing="on").terms
    moved = {
        "quant_bits": (16, {"quantized_weights", "quantization_constants", "unquantized_parts"}),
        "double_quant": (False, {"quantization_constants"}),
        "lora_r": (8, {"adapter", "gradients", "optimizer_state", "activations"}),
        "optimizer": ("adamw_8bit", {"optimizer_state"}),
        "gradient_checkpointing": ("off", {"activations"}),
        "micro_batch_size": (1, {"activations", "logits"}),
        "max_seq_len": (2048, {"activations", "logits"}),
        "lora_dropout": (0, {"activations"}),
    }
    for name, (value, terms) in moved.items():
        after = dict(planned("guanaco-7b", A100, **{"gradient_checkpointing": "on", name: value}).terms)
        assert {term for term, size in before if after[term] != size} == terms, name


def test_auto_recomputes_where_the_activations_have_no_room_as_the_engine_does() -> None:
    small, large = (planned("guanaco-7b", find_device(gib)) for gib in ("16", "80"))
    assert (small.gradient_checkpointing, large.gradient_checkpointing) == (True, False)
    assert small.terms.activations < large.terms.activations / 5
    assert activation_room(100.0, 5) == 0.5 * (100 - 12 * 5)
    assert planned("flan-t5-base", A100).gradient_checkpointing


def test_a_correction_of_a_term_is_a_factor() -> None:
    config = RunConfig()
    shape = read_shape(shipped()[config.model.model], "starter")
    plain, corrected = forecast(shape, config, A100), forecast(shape, config, A100, {"activations": 1.5})
    assert corrected.terms.activations == round(1.5 * plain.terms.activations)
    assert corrected.total - plain.total == corrected.terms.activations - plain.terms.activations


def test_float16_on_a_t4_and_the_overhead_of_the_device() -> None:
    config = presets.load("colab-t4-7b").config
    shape = read_shape(shipped()[config.model.model], "7b")
    t4 = forecast(shape, config, find_device("t4"))
    assert t4.compute_dtype == "float16"
    assert t4.terms.overhead == OVERHEAD_BYTES["cuda"]
    assert forecast(shape, config, Device(name="CPU", kind="cpu", memory_bytes=GIB, compute_dtype="float32")).paged_bytes == 0


@pytest.mark.parametrize("wish", ["RTX", "", "-3", "nan", "inf", "0"])
def test_a_card_that_is_not_known_is_refused_with_those_that_are(wish: str) -> None:
    with pytest.raises(UserError, match="as 24, or one of T4, 3090, "):
        find_device(wish)


# Advice -------------------------------------------------------------------------------------------------------------------


def changes(said: str) -> dict[str, str]:
    """The settings that an advice names."""
    return {name: value for name, value in re.findall(r"(\w+) from \S+ to ([\w.]+)", said) if name in KNOBS}


def situations() -> Iterator[tuple[str, float, dict[str, Any]]]:
    for name in presets.names():
        for gib in (0.9, 2, 4, 6, 8, 12, 16, 24, 40, 48, 80):
            yield name, gib, {}
    yield "guanaco-7b", 10, {"quant_bits": 16}
    yield "olmo2-1b", 3, {"max_seq_len": 8192, "micro_batch_size": 1, "gradient_checkpointing": "on"}
    yield "guanaco-33b", 23, {"micro_batch_size": 1}


def test_what_is_advised_would_fit() -> None:
    heard = set()
    for name, gib, values in situations():
        config = presets.load(name).config.with_values(values)
        shape = read_shape(shipped()[config.model.model], name)
        device = Device(name="", kind="cuda", memory_bytes=int(gib * GIB))
        verdict = forecast(shape, config, device).verdict(device.memory_bytes)
        said = advice(shape, config, device.memory_bytes)
        change = changes(said)
        after = forecast(shape, config.with_values(change), device).verdict(device.memory_bytes)
        if change:
            assert verdict != "fits"
            assert after in (["fits"] if ", which fits" in said else ["tight"] if "just fit" in said else ["fits", "tight"])
            heard.add("together" if "together about" in said else next(iter(change)))
        elif verdict == "does not fit":
            assert said.endswith("hoose a smaller model.")
        if "is enough)" in said:
            card = next(card for card in CARDS if f"({card.name} is enough)" in said)
            assert forecast(shape, config, card).verdict(card.memory_bytes) == "fits"
    assert {"micro_batch_size", "lora_r", "max_seq_len", "quant_bits", "together"} <= heard


def test_what_changes_nothing_that_is_learned_is_advised_first() -> None:
    config = presets.load("qwen3-8b").config.with_values({"gradient_checkpointing": "off", "micro_batch_size": 4})
    shape = read_shape(shipped()[config.model.model], "8b")
    assert advice(shape, config, 16 * GIB).startswith("Set gradient_checkpointing from off to on (slower by about a third): about ")
    recomputed = config.with_values({"gradient_checkpointing": "on"})
    said = advice(shape, recomputed, 11 * GIB)
    assert config.effective_batch == 32
    assert changes(said) == {"micro_batch_size": "1", "gradient_accumulation_steps": "32"}
    assert "(as many rows a step as before)" in said


def test_on_a_cpu_advice_is_of_the_same_kind() -> None:
    config = presets.load("starter").config
    shape = read_shape(shipped()[config.model.model], "starter")
    device = Device(name="CPU", kind="cpu", memory_bytes=24 * GIB, compute_dtype="float32")
    assert re.fullmatch(r"It takes about \d\.\d of 24\.0 GiB\.", advice_for(partial(forecast, shape), config, device))


@pytest.mark.parametrize(
    ("gib", "loading", "values", "said"),
    [
        (6, False, {}, "No single change is enough. Set micro_batch_size from 4 to 1, "),  # as was forecast
        (80, False, {}, "By the forecast the run takes 7.9 GiB, and 80.0 GiB are free now. Close what else uses the memory, or set opt"),
        (4, True, {"quant_bits": 16}, "By the forecast its weights take 12.6 GiB, and 4.0 GiB are free now. Close what else"),
        (4, True, {}, "By the forecast its weights take 3.6 GiB, and 4.0 GiB are free now. Close what else uses the memory, or choose"),
    ],
)
def test_memory_that_ran_out_all_the_same_is_advised_on(gib: float, loading: bool, values: dict[str, Any], said: str) -> None:
    config = presets.load("guanaco-7b").config.with_values({"gradient_checkpointing": "on", **values})
    shape = read_shape(shipped()[config.model.model], "7b")
    told = advice_after_lack(shape, config, find_device(str(gib)), loading=loading)
    assert told.startswith(said)
    if loading:
        assert ("or set quant_bits from 16 to 4" in told) == bool(values)


def test_rows_too_long_for_plain_products_keep_no_attention_scores_on_a_cpu() -> None:
    config = RunConfig().with_values({"micro_batch_size": 1, "lora_dropout": 0, "gradient_checkpointing": "off"})
    shape = find_shape(config.model.model, "main", presets.FOLDER)
    cpu = Device(name="CPU", kind="cpu", memory_bytes=24 * GIB)

    def activations(tokens: int) -> int:
        return forecast(shape, config.with_values({"max_seq_len": tokens}), cpu).terms.activations

    assert activations(1024) < 1.9 * activations(512)
