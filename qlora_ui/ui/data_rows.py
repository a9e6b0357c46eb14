"""The rows of the Data tab, a few a page: as a chat, or token by token as training reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from qlora_ui.data.checks import Conversation
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.ui import data_markup, form, markup

if TYPE_CHECKING:
    from qlora_ui.engine.preview import Order

ROWS_A_PAGE = 4
AS_CHAT, AS_READ = "As a chat", "As tokens"
IN_ORDER, LONGEST, SHORTEST, CUT = "In order", "Longest first", "Shortest first", "Longer than max length"
ORDERS: dict[str, Order] = {IN_ORDER: "source", LONGEST: "longest", SHORTEST: "shortest", CUT: "cut"}
NO_ROWS = [markup.note("The rows show here."), '<p class="note single-page">No rows</p>']
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The components; `show` fills `preview` and `pager` from the others."""

    page: gr.State
    view: gr.Radio
    order: gr.Dropdown
    search: gr.Textbox
    pager: gr.HTML
    preview: gr.HTML

    @property
    def wanted(self) -> list[gr.components.Component]:
        """Which rows a person wants to see, in the order in which `show` takes it."""
        return [self.page, self.view, self.order, self.search]


def build() -> Rows:
    """Every choice but the next page begins at the first."""
    with gr.Row(elem_classes=["toolbar"]):
        view = gr.Radio(
            [AS_CHAT, AS_READ], value=AS_CHAT, show_label=False, container=False, elem_id="data-view", label="View", min_width=320
        )
        order = gr.Dropdown(
            list(ORDERS), value=IN_ORDER, label="Order", show_label=False, container=False, elem_id="data-order", min_width=150
        )
        search = gr.Textbox(
            label="Search", show_label=False, container=False, placeholder="Search the rows", elem_id="data-search", min_width=120
        )
    with gr.Row(elem_classes=["toolbar"]):
        pager = gr.HTML(elem_id="data-pager")
        back = gr.Button("Previous", size="sm", elem_id="data-back")
        onward = gr.Button("Next", size="sm", elem_id="data-next")
    preview = gr.HTML(elem_id="data-preview")
    page = gr.State(0)

    # In one line: a click on Next leaves the search too, and must not be overtaken by the return to the first page.
    turning: dict[str, Any] = {"outputs": [page], "concurrency_id": "rows-page", **QUIET}
    gr.on([back.click], lambda page: page - 1, [page], **turning)
    gr.on([onward.click], lambda page: page + 1, [page], **turning)
    gr.on([order.input, search.submit, search.blur, view.input], lambda: 0, None, **turning)
    return Rows(page=page, view=view, order=order, search=search, pager=pager, preview=preview)


def show(
    services: Services, names: list[str], page: int, view: str, order: str, search: str, preset: str, chosen: str, *values: Any
) -> list[str]:
    """The page's rows as chat, or token by token as training reads them; and which rows these are."""
    try:
        config = form.read(preset, chosen, names, values)
        rows = services.inspector.rows(config.data) if chosen else ()
    except UserError:  # said beside the field that is wrong
        rows = ()
    if not rows:
        return NO_ROWS
    seen = services.inspector.known(config)
    preview = seen.preview if seen else None
    if order != IN_ORDER and preview is None:
        return [markup.note("Rows can be ordered by length once their tokens are counted."), NO_ROWS[1]]
    indices = range(len(rows)) if preview is None else preview.order(ORDERS[order], config.data.max_seq_len)
    if search.strip():
        indices = [index for index in indices if says(rows[index], search.strip().casefold())]
    pages = max(1, -(-len(indices) // ROWS_A_PAGE))
    first = page % pages * ROWS_A_PAGE
    here = list(indices[first : first + ROWS_A_PAGE])
    pager = data_markup.pager(first, len(here), len(indices), len(rows))
    if view == AS_CHAT:
        return [data_markup.bubbles([rows[index] for index in here]), pager]
    if preview is None:
        return [markup.note("The tokens show once they are counted.") + data_markup.bubbles([rows[index] for index in here]), pager]
    return [data_markup.token_view(preview.views(here, config.data.max_seq_len, config.data.long_rows)), pager]


def says(row: Conversation, words: str) -> bool:
    return any(words in message.content.casefold() for message in row.messages)
