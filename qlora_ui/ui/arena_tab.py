"""The Arena tab: two answers without names, a vote, and the table that the votes make. Knows nothing of torch."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qlora_ui import arena, votes
from qlora_ui.errors import UserError
from qlora_ui.evaluate.ratings import Outcome
from qlora_ui.runs import encodable
from qlora_ui.services import Services
from qlora_ui.ui import arena_markup, chat_panel, chat_turns, downloads, markup
from qlora_ui.votes import Pair, Side, Vote

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers

SCRIPT = Path(__file__).with_name("arena.js")
BALLOT: dict[Outcome, str] = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "both bad": "Both bad"}
STATES = {"ready": (True, False, False), "writing": (False, True, False), "voting": (False, True, True)}
"""Whether one may ask, skip, vote."""
FIRST_QUESTION = "Who are you?"
PRESS = "(said) => { if (!said) setTimeout(() => document.querySelector('#arena-file').click(), 100); }"
ADDRESS = """(pair) => {
  const address = new URL(location.href), input = document.querySelector("#arena-input textarea");
  if (pair) address.searchParams.set("pair", pair); else address.searchParams.delete("pair");
  history.replaceState(history.state, "", address);
  if (pair) input?.blur(); else input?.focus({ preventScroll: true });  // blurred, so that keys vote and are not typed
}"""
CHANCE = random.SystemRandom()  # nobody can foresee who is drawn
SKIP = gr.skip()


@dataclass(frozen=True, kw_only=True)
class ArenaTab:
    """The components that what happens outside of the tab is wired to."""

    contestants: gr.Dropdown
    table: gr.HTML
    pair: gr.Textbox
    shown: list[Any]
    """What `screen` fills, in its order."""


def build(services: Services, quiet: dict[str, Any]) -> ArenaTab:
    """Components first, in reading order, then the wiring that stays within the tab."""
    contestants = gr.Dropdown(
        [],
        multiselect=True,
        label="Contestants",
        info="Two or more. For each question two of them are drawn, and on which side each answers.",
        elem_id="arena-contestants",
    )
    with gr.Row(elem_id="arena-columns"):
        column: dict[str, Any] = {"height": 400, "buttons": ["copy"], "autoscroll": False}  # answers are read from their beginning
        left = gr.Chatbot(label="Left", elem_id="arena-left", placeholder="Ask something below.", **column)
        right = gr.Chatbot(label="Right", elem_id="arena-right", placeholder="Who answers is said after your vote.", **column)
    with gr.Row(elem_id="arena-ballot"):
        ballot = {outcome: gr.Button(words, interactive=False, min_width=120) for outcome, words in BALLOT.items()}
    note = gr.HTML(markup.note("Two contestants answer without their names. You say which answer is better."), elem_id="arena-note")
    with gr.Row(equal_height=True, elem_id="arena-bar"):
        text = gr.Textbox(
            FIRST_QUESTION,
            label="Question",
            show_label=False,
            placeholder="Write a question",
            container=False,
            elem_id="arena-input",
            scale=6,
        )
        ask = gr.Button("Ask both", variant="primary", elem_id="arena-ask", scale=1, min_width=110)
        skip = gr.Button("Skip", interactive=False, elem_id="arena-skip", scale=1, min_width=90)
    with gr.Accordion("System prompt and sampling", open=False, elem_id="arena-settings"):
        settings = chat_panel.build_settings("arena")
    table = gr.HTML(elem_id="arena-table")
    with gr.Row(elem_id="arena-files"):
        as_jsonl = gr.Button("Save votes as JSONL", size="sm", elem_id="arena-jsonl")
        as_csv = gr.Button("Save votes as CSV", size="sm", elem_id="arena-csv")
        file = gr.DownloadButton("Votes", visible="hidden", elem_id="arena-file")
    said = gr.HTML(elem_id="arena-file-message")
    # Not gr.State: what a page shows must outlive the server. It is in the address too, so that a reload finds the pair again.
    pair = gr.Textbox(visible="hidden", label="Pair")
    gr.HTML("<i></i>", js_on_load=SCRIPT.read_text("utf-8"), elem_id="arena-keys")

    shown = [left, right, note, text, pair, ask, skip, *ballot.values()]
    asked = [contestants, text, pair, *settings]
    at_once: dict[str, Any] = {"concurrency_limit": None, **quiet}  # the chat's line is one
    answers = gr.on([ask.click, text.submit], partial(put, services), asked, shown, **at_once)
    skip.click(partial(pass_over, services), [pair, text], shown, queue=False, cancels=[answers], **quiet)
    for outcome, button in ballot.items():
        button.click(partial(vote, services, outcome), [pair], [table, *shown], **quiet)
    pair.change(None, [pair], None, js=ADDRESS, **quiet)
    for button, form in ((as_jsonl, "jsonl"), (as_csv, "csv")):
        button.click(partial(saved, services, form), None, [said, file], **quiet).then(None, [said], None, js=PRESS)
    return ArenaTab(contestants=contestants, table=table, pair=pair, shown=shown)


def wire(services: Services, tab: ArenaTab, opened: gr.Tab, tabs: gr.Tabs, page: gr.Blocks, kept: gr.BrowserState, quiet: Any) -> None:
    """What comes from outside of the tab: who is there now, whom this browser chose, and the pair that the page's address names."""
    tab.contestants.input(lambda chosen: chosen, [tab.contestants], [kept], queue=False, **quiet)
    gr.on([opened.select, page.load], partial(refreshed, services), [kept], [tab.contestants, tab.table], **quiet)
    page.load(linked_pair(services), None, [tabs, *tab.shown], **quiet).then(None, [tab.pair], None, js=ADDRESS, **quiet)


def put(
    services: Services, contestants: list[str] | None, text: str, pair_id: str, system: str | None, *settings: Any
) -> Iterator[list[Any]]:
    """Put a question to two. Both answers appear at once: how fast one is written would tell which model writes it."""
    if services.votes.waiting(pair_id):
        yield screen("voting", markup.error("These two answers wait for your vote. Vote, or skip them."))
        return
    try:
        drawn = chat_turns.sampling(*settings)
        pair = arena.begin(services.workspace, services.votes, contestants or [], text, system or "", drawn, CHANCE)
        yield [*pair_shown(pair), markup.note("Getting the models ready…"), "", pair.id, *buttons("writing")]
        for answers in arena.answer(services.workspace, services.chat, services.votes, pair):
            yield screen("writing", markup.note(told(answers)))
    except UserError as error:
        yield screen("ready", markup.error(services.told(error)), text=text, pair="")
    except Exception as error:  # noqa: BLE001 - shown in the answers' place; the next question works
        words = f"The answers broke off: {services.told(error)}. Ask again, or choose other contestants."
        yield screen("ready", markup.error(words), text=text, pair="")
        traceback.print_exc()
    else:
        written = services.votes.waiting(pair.id)
        yield to_vote_on(written) if written else screen("ready")


def pass_over(services: Services, pair_id: str, text: str) -> list[Any]:
    """Drop the pair without a vote, also while its answers are being written. Its question can be asked again, if no other was begun."""
    pair = services.votes.waiting(pair_id)
    services.votes.drop(pair_id)
    return screen("ready", markup.note("Skipped without a vote."), text=pair.prompt if pair and not text.strip() else SKIP, pair="")


def vote(services: Services, outcome: Outcome, pair_id: str) -> list[Any]:
    """Take the vote, and say who it was for."""
    try:
        taken, counts = services.votes.cast(pair_id, outcome)
    except UserError as error:
        still = services.votes.waiting(pair_id)  # a full disk: the vote can be cast when there is room
        return [SKIP, *screen("voting" if still else "ready", markup.error(str(error)), pair=pair_id if still else "")]
    return [standings(services), *revealed(taken, "" if counts else "These two had been voted on before, and that vote counts.")]


def refreshed(services: Services, kept: list[str] | None) -> list[Any]:
    """Who may take part now, and how the votes stand. Chosen are those whom this browser chose, else the newest run and its base."""
    there = [(speaker.name, speaker.id) for speaker in arena.contestants(services.workspace)]
    ids = [speaker for _, speaker in there]
    chosen = [speaker for speaker in kept or [] if speaker in ids] or ids[:2]
    return [gr.update(choices=there, value=chosen), standings(services)]


def linked_pair(services: Services) -> Callable[[gr.Request], list[Any]]:
    """Finds the pair of the page's address, `?pair=ID`, again. Gradio gives a request to plain functions only."""

    def opened_by_link(request: gr.Request) -> list[Any]:
        pair_id = str(request.query_params.get("pair", ""))
        if not pair_id:
            return [SKIP, *screen("ready")]
        return [gr.Tabs(selected="arena"), *found_again(services, pair_id)]

    return opened_by_link


def found_again(services: Services, pair_id: str) -> list[Any]:
    """What became of a pair since the page was left."""
    pair = services.votes.waiting(pair_id)
    if pair and pair.answered:
        return to_vote_on(pair)
    if pair:
        services.votes.drop(pair_id)
        words = "The page was left while the answers were being written. Ask again."
        return screen("ready", markup.error(words), text=pair.prompt, pair="")
    taken = next((vote for vote in services.votes.all() if vote.pair.id == pair_id), None)
    if taken:
        return revealed(taken, "These two were voted on.")
    return screen("ready", markup.error("The two answers of this address are not kept any more. Ask again."), pair="")


def saved(services: Services, form: str) -> list[Any]:
    """All votes as a file for the hidden button, or why there is none."""
    taken = services.votes.all()
    if not taken:
        return [markup.error("There is no vote yet to save. Vote first."), SKIP]
    path = downloads.fresh(f"votes.{form}")
    path.write_bytes(encodable(votes.as_jsonl(taken) if form == "jsonl" else votes.as_csv(taken)))
    return ["", gr.update(value=str(path))]


def told(answers: Answers) -> str:
    """What is waited for, or how far the two are together."""
    if not answers.tokens:
        return chat_turns.told(answers, 0)
    return f"{answers.tokens} tokens of both answers are written. They appear together, so that speed tells nothing."


# What the screen shows ----------------------------------------------------------------------------------------------------


def standings(services: Services) -> str:
    return arena_markup.tables(services.votes.all())


def screen(state: str, note: Any = SKIP, *, text: Any = SKIP, pair: Any = SKIP) -> list[Any]:
    """Buttons and words; both columns stay."""
    return [SKIP, SKIP, note, text, pair, *buttons(state)]


def buttons(state: str) -> list[Any]:
    """Of asking, skipping, and each vote."""
    may_ask, may_skip, may_vote = STATES[state]
    return [gr.update(interactive=on) for on in (may_ask, may_skip, *[may_vote] * len(BALLOT))]


def to_vote_on(pair: Pair) -> list[Any]:
    note = arena_markup.announced("Which answer is better? Keys 1 to 4 vote too. Who answered is said after your vote.")
    return [*pair_shown(pair), note, SKIP, pair.id, *buttons("voting")]


def revealed(vote: Vote, before: str) -> list[Any]:
    """A pair with its names, and what was said of it."""
    pair = vote.pair
    words = f"{BALLOT[vote.outcome]}. Left was {pair.left.name}, right was {pair.right.name}. Seed {pair.sampling.get('seed')}."
    note = arena_markup.announced(" ".join(filter(None, [before, words, pair.note])))
    return [*pair_shown(pair, pair.left.name, pair.right.name), note, SKIP, "", *buttons("ready")]


def pair_shown(pair: Pair, left: str = "Left", right: str = "Right") -> list[Any]:
    """Both columns; who speaks stands in neither unless it is given."""
    return [column(pair, pair.left, left), column(pair, pair.right, right)]


def column(pair: Pair, side: Side, label: str) -> Any:
    asked = [{"role": "user", "content": pair.prompt}]
    said = [{"role": "assistant", "content": side.answer or "(an empty answer)"}] if pair.answered else []
    return gr.update(label=label, value=[*asked, *said])
