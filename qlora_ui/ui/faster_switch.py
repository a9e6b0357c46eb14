"""The switch for faster answers, where this machine has something to gain. Knows nothing of conversations."""

from __future__ import annotations

from typing import Any

import gradio as gr

from qlora_ui import speakers
from qlora_ui.errors import UserError
from qlora_ui.model_shapes import find_shape_within
from qlora_ui.services import Services


def build() -> gr.Checkbox:
    return gr.Checkbox(
        label="Faster",
        info="The same words, sooner; how much depends on the machine. For all who chat here.",
        visible=False,
        elem_id="chat-faster",
    )


def wire(services: Services, switch: gr.Checkbox, *events: Any, speaker: Any, **quiet: Any) -> None:
    """Offer it when one of these happens, for the speaker that the component holds."""
    for event in events:
        event(lambda chosen: offer(services, chosen), [speaker], [switch], queue=False, trigger_mode="multiple", **quiet)
    switch.input(lambda on: choose(services, on), [switch], None, queue=False, **quiet)


def offer(services: Services, speaker_id: str | None) -> Any:
    """What it takes, once the machine is known; nothing where there is nothing to gain."""
    label = gain(services, speaker_id or "")
    return gr.update(visible=bool(label), label=label or "Faster", value=services.chat.faster)


def gain(services: Services, speaker_id: str) -> str:
    """What the switch says; empty where it would not help."""
    hardware = services.hardware()
    if hardware is None or services.is_public:  # the engine may not be imported yet; what all share is no stranger's to switch
        return ""
    if hardware.kind == "cuda":
        return "Faster, once it is compiled"
    from qlora_ui.engine import faster

    try:
        speaker = speakers.find(services.workspace, speaker_id)
        shape = find_shape_within(speaker.model, speaker.revision, services.workspace.models)
    except UserError:  # it was deleted since; its shape is not known here
        return ""
    gib = faster.offered_gib(shape, speaker.quantization, hardware)
    return f"Faster, takes {gib:.1f} GiB" if gib else ""


def choose(services: Services, on: bool) -> None:
    services.chat.faster = on
