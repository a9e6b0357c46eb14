"""The one change that would make a run fit. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from qlora_ui.config import RunConfig
from qlora_ui.memory.devices import CARDS, GIB, Device
from qlora_ui.memory.forecast import Plan, forecast
from qlora_ui.memory.shapes import ModelShape

NOTICEABLY_LESS = 0.9  # of what a run was forecast to take, when memory ran out all the same
LEAST_SEQ_LEN, LEAST_RANK = 128, 8  # below these is no remedy, and neither is less than a quarter of what was wished


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Settings to change and a word on what that means. `harmless`: what is learned stays the same, or nearly so."""

    values: Mapping[str, Any]
    meaning: str = ""
    harmless: bool = True


def advice(shape: ModelShape, config: RunConfig, memory_bytes: int) -> str:
    """`advice_for` a GPU with so much memory."""
    return advice_for(partial(forecast, shape), config, Device(name="this GPU", kind="cuda", memory_bytes=memory_bytes))


def advice_for(plan: Plan, config: RunConfig, device: Device) -> str:
    """One or two sentences: the first of the usual remedies that makes the run fit the device, or what to do when none does.

    Each remedy is tried by planning the run with it. A change that makes it fit goes before one that makes it just fit.
    """
    before = plan(config, device)
    verdict, have = before.verdict(device.memory_bytes), f"{device.memory_bytes / GIB:.1f} GiB"
    takes = f"It takes about {before.total / GIB:.1f} of {have}"
    if verdict == "fits":
        return f"{takes}."
    just_fits = ""
    for remedy in remedies(config, before.gradient_checkpointing):
        if verdict == "tight" and not remedy.harmless:
            continue
        after = plan(config.with_values(remedy.values), device)
        said = _said(config, remedy, before.total, after.total)
        if after.verdict(device.memory_bytes) == "fits":
            return f"Set {said}, which fits {have}."
        if after.verdict(device.memory_bytes) == "tight":
            just_fits = just_fits or f"Set {said}, which may just fit {have}."
    if verdict == "tight" and before.total > device.memory_bytes:
        return f"{takes}, but {before.paged_bytes / GIB:.1f} GiB are the optimizer's pages, which can move to the CPU's memory."
    if verdict == "tight":
        return f"{takes}, which is nearer than the forecast is exact. Try it."
    return just_fits or _several(plan, config, device) or _elsewhere(plan, config, before.total)


def dtype_caution(config: RunConfig, device: Device) -> str:
    """A sentence where the wished compute dtype does not suit the device, else nothing."""
    wish = config.quantization.compute_dtype
    if device.kind == "cpu" and wish == "float16":
        return "compute_dtype is float16, which needs a GPU: set it to auto, float32 or bfloat16."
    if device.kind == "cuda" and wish == "bfloat16" and device.compute_dtype == "float16":
        return f"{device.name} has no bfloat16 units, so that steps are slow: set compute_dtype to auto, which is float16 there."
    return ""


def advice_after_lack(shape: ModelShape, config: RunConfig, device: Device, *, loading: bool) -> str:
    """What to do when memory ran out on a device that now has so much free: `loading` the base, or training.

    The forecast may well say that the run fits, as it cannot know what else takes memory. Then the first remedy counts that
    saves noticeably.
    """

    def needed(values: Mapping[str, Any]) -> int:
        planned = forecast(shape, config.with_values(values), device)
        return planned.terms.base if loading else planned.total

    before, have = forecast(shape, config, device), device.memory_bytes / GIB
    if before.verdict(device.memory_bytes) == "does not fit" and not loading:
        return advice_for(partial(forecast, shape), config, device)
    takes = needed({})
    counted = f"By the forecast {'its weights take' if loading else 'the run takes'} {takes / GIB:.1f} GiB, and {have:.1f} GiB are free now"
    for remedy in remedies(config, before.gradient_checkpointing):
        less = needed(remedy.values)
        if less <= NOTICEABLY_LESS * takes:
            return f"{counted}. Close what else uses the memory, or set {_said(config, remedy, takes, less)}."
    return f"{counted}. Close what else uses the memory, or choose a smaller model."


def remedies(config: RunConfig, recomputes: bool) -> Iterator[Remedy]:
    """First what costs only time, then what costs quality."""
    o = config.optimization
    if not recomputes:
        yield Remedy(values={"gradient_checkpointing": "on"}, meaning=" (slower by about a third)")
    rows = o.micro_batch_size
    while rows > 1:
        rows //= 2
        accumulation = -(-config.effective_batch // rows)
        yield Remedy(
            values={"micro_batch_size": rows, "gradient_accumulation_steps": accumulation}, meaning=" (as many rows a step as before)"
        )
    if config.quantization.quant_bits != "4":
        yield Remedy(values={"quant_bits": "4"})
    elif not config.quantization.double_quant:
        yield Remedy(values={"double_quant": True})
    if o.optimizer != "paged_adamw_8bit":
        yield Remedy(values={"optimizer": "paged_adamw_8bit"})
    for rank in (config.adapter.lora_r // 2, config.adapter.lora_r // 4):
        if rank >= LEAST_RANK:
            yield Remedy(values={"lora_r": rank}, harmless=False)
    for tokens in (config.data.max_seq_len // 2, config.data.max_seq_len // 4):
        if tokens >= LEAST_SEQ_LEN:
            meaning = f" (longer rows: {config.data.long_rows})"
            yield Remedy(values={"max_seq_len": tokens}, meaning=meaning, harmless=False)


def _several(plan: Plan, config: RunConfig, device: Device) -> str:
    """When no single change is enough: as many of them as it takes, in their order; nothing when all are too little."""
    changed: dict[str, Any] = {}
    for remedy in remedies(config, plan(config, device).gradient_checkpointing):
        changed.update(remedy.values)
        after = plan(config.with_values(changed), device)
        if after.verdict(device.memory_bytes) != "does not fit":
            return f"No single change is enough. Set {_words(config, changed)}: together about {after.total / GIB:.1f} GiB."
    return ""


def _said(config: RunConfig, remedy: Remedy, before: int, after: int) -> str:
    return f"{_words(config, remedy.values)}{remedy.meaning}: about {after / GIB:.1f} GiB instead of {before / GIB:.1f}"


def _words(config: RunConfig, values: Mapping[str, Any]) -> str:
    before = config.values()
    *others, last = (f"{name} from {_shown(before[name])} to {_shown(value)}" for name, value in values.items())
    return f"{', '.join(others)} and {last}" if others else last


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _elsewhere(plan: Plan, config: RunConfig, total: int) -> str:
    """The smallest card that would do, or a smaller model."""
    for card in sorted(CARDS, key=lambda card: card.memory_bytes):
        if plan(config, card).verdict(card.memory_bytes) == "fits":
            return f"It takes about {total / GIB:.1f} GiB. Use a larger GPU ({card.name} is enough), or choose a smaller model."
    return f"It takes about {total / GIB:.1f} GiB, more than any one card that is known here has. Choose a smaller model."
