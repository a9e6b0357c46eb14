"""The fields that bring an adapter or a model that is not on this machine yet. Knows nothing of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from qlora_ui import adapters, speakers
from qlora_ui.errors import UserError
from qlora_ui.events import Event, PhaseProgress
from qlora_ui.exports import size_words
from qlora_ui.services import Services
from qlora_ui.speakers import Speaker
from qlora_ui.stopping import watched
from qlora_ui.ui import markup
from qlora_ui.ui.chat_panel import QUIET

HUB, ZIP, MODEL = "Adapter on the Hub", "Adapter in a zip", "Base model"


def build(services: Services) -> gr.State:
    """The fields and what they do. Returns what holds the id of whom was brought last."""
    brought = gr.State("")
    with gr.Accordion("Bring an adapter or a model", open=False, elem_id="chat-bring"):
        with gr.Row(equal_height=True):
            kind = gr.Radio([HUB, ZIP, MODEL], value=HUB, label="What", elem_id="bring-kind")
            name = gr.Textbox(label="Name on the Hub", placeholder="timdettmers/guanaco-7b", info=HINTS[HUB], elem_id="bring-name", scale=2)
            file = gr.File(label="Zip", file_types=[".zip"], visible=False, height=96, elem_id="bring-file", scale=2)
            base = gr.Textbox(
                label="Its base, if it names none", placeholder="owner/name", info="Else read from its config.", elem_id="bring-base"
            )
            press = gr.Button("Bring", elem_id="bring-press", scale=0, min_width=100)
        note = gr.HTML(elem_id="bring-note")
    kind.input(fields_of, [kind], [name, file, base], queue=False, **QUIET)
    gr.on(
        [press.click, name.submit], partial(bring, services), [kind, name, file, base], [note, brought, press], concurrency_limit=4, **QUIET
    )
    return brought


HINTS = {HUB: "owner/name, or owner/name@revision. Only safetensors are read.", MODEL: "owner/name, or a folder of the workspace's models."}


def fields_of(kind: str) -> list[Any]:
    """The fields that this kind needs."""
    return [
        gr.update(visible=kind != ZIP, info=HINTS.get(kind)),
        gr.update(visible=kind == ZIP),
        gr.update(visible=kind != MODEL),
    ]


def bring(services: Services, kind: str, name: str, file: str | None, base: str | None) -> Iterator[list[Any]]:
    """Fetch or unpack it, telling the way. A page that goes away ends the fetching."""
    ways: dict[str, Callable[..., Speaker]] = {
        HUB: partial(adapters.from_hub, name, services.workspace, base=base or ""),
        ZIP: lambda *_: adapters.from_zip(Path(file or ""), services.workspace, base or ""),
        MODEL: lambda *_: speakers.of_model(services.workspace, name.strip()),
    }
    found: list[Speaker] = []

    def work(should_stop: Callable[[], bool], on_progress: Callable[[int], None]) -> None:
        def tell(event: Event) -> None:
            if isinstance(event, PhaseProgress):
                on_progress(event.done)

        found.append(ways[kind](tell, should_stop))

    if not (file if kind == ZIP else name and name.strip()):
        yield [markup.error("Choose a zip file first." if kind == ZIP else "Write its name first, as owner/name."), gr.skip(), gr.skip()]
        return
    try:
        for done in watched(work):
            yield [markup.note(f"Bringing it… {size_words(done) if done else ''}"), gr.skip(), gr.update(interactive=False)]
    except UserError as error:
        yield [markup.error(str(error)), gr.skip(), gr.update(interactive=True)]
    else:
        yield [markup.note(f"{found[0].name} is chosen above."), found[0].id, gr.update(interactive=True)]
