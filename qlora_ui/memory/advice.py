"""The one change that would make a run fit. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_ui.config import RunConfig
from qlora_ui.memory.devices import CARDS, GIB, Device
from qlora_ui.memory.forecast import forecast
from qlora_ui.memory.shapes import ModelShape

LEAST_SEQ_LEN = 128  # shorter rows lose too much of most data sets to be a remedy
LEAST_RANK = 8  # the least that is usual


def advice(shape: ModelShape, config: RunConfig, memory_bytes: int) -> str:
    """`advice_for` a GPU with so much memory."""
    return advice_for(shape, config, Device(name="this GPU", kind="cuda", memory_bytes=memory_bytes))


def advice_for(shape: ModelShape, config: RunConfig, device: Device) -> str:
    """One or two sentences: the first of the usual remedies that makes the run fit the device, or what to do when none does.

    Each remedy is tried by forecasting the run with it. A change that makes it fit goes before one that makes it just fit.
    """
    before = forecast(shape, config, device)
    have = f"{device.memory_bytes / GIB:.1f} GiB"
    verdict = before.verdict(device.memory_bytes)
    if verdict == "fits":
        return f"It takes about {before.total / GIB:.1f} of {have}."
    just_fits = ""
    for values, meaning in remedies(config, before.gradient_checkpointing):
        after = forecast(shape, config.with_values(values), device)
        said = f"Set {_words(config, values)}{meaning}: about {after.total / GIB:.1f} GiB instead of {before.total / GIB:.1f}"
        if after.verdict(device.memory_bytes) == "fits":
            return f"{said}, which fits {have}."
        if after.verdict(device.memory_bytes) == "tight":
            just_fits = just_fits or f"{said}, which may just fit {have}."
    if verdict == "tight":
        return f"It takes about {before.total / GIB:.1f} of {have}, and no single change takes it far below that. Try it."
    return just_fits or _several(shape, config, device) or _elsewhere(shape, config, before.total)


def _several(shape: ModelShape, config: RunConfig, device: Device) -> str:
    """When no single change is enough: as many of them as it takes, in their order; nothing when all are too little."""
    changed: dict[str, Any] = {}
    for values, _ in remedies(config, forecast(shape, config, device).gradient_checkpointing):
        changed.update(values)
        after = forecast(shape, config.with_values(changed), device)
        if after.verdict(device.memory_bytes) != "does not fit":
            return f"No single change is enough; together these are: {_words(config, changed)} (about {after.total / GIB:.1f} GiB)."
    return ""


def remedies(config: RunConfig, recomputes: bool) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Settings to change, and a word on what that means. First what costs only time, then what costs quality."""
    o = config.optimization
    if not recomputes:
        yield {"gradient_checkpointing": "on"}, " (slower by about a third)"
    rows = o.micro_batch_size
    while rows > 1:
        rows //= 2
        accumulation = -(-config.effective_batch // rows)
        yield {"micro_batch_size": rows, "gradient_accumulation_steps": accumulation}, " (the same rows a step)"
    if config.quantization.quant_bits != "4":
        yield {"quant_bits": "4"}, ""
    elif not config.quantization.double_quant:
        yield {"double_quant": True}, ""
    if o.optimizer != "paged_adamw_8bit":
        yield {"optimizer": "paged_adamw_8bit"}, ""
    tokens = config.data.max_seq_len
    while tokens > LEAST_SEQ_LEN:
        tokens = max(tokens // 2, LEAST_SEQ_LEN)
        yield {"max_seq_len": tokens}, " (longer rows are cut, dropped or split, as long_rows says)"
    rank = config.adapter.lora_r
    while rank > LEAST_RANK:
        rank = max(rank // 2, LEAST_RANK)
        yield {"lora_r": rank}, ""


def _words(config: RunConfig, values: Mapping[str, Any]) -> str:
    before = config.values()
    return " and ".join(f"{name} from {_shown(before[name])} to {_shown(value)}" for name, value in values.items())


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _elsewhere(shape: ModelShape, config: RunConfig, total: int) -> str:
    """The smallest card that would do, or a smaller model."""
    for card in sorted(CARDS, key=lambda card: card.memory_bytes):
        if forecast(shape, config, card).verdict(card.memory_bytes) == "fits":
            return f"It takes about {total / GIB:.1f} GiB. Use a larger GPU ({card.name} is enough), or choose a smaller model."
    return f"It takes about {total / GIB:.1f} GiB, more than any one card that is known here has. Choose a smaller model."
