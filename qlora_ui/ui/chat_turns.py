"""What happens between a question and its answer on a page: ask, retry, change, take back, stop. Knows nothing of the page's layout."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.services import Services
from qlora_ui.talking import Side
from qlora_ui.ui import markup
from qlora_ui.ui.conversations import Turn, plain

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers, Sampling

BUSY = [gr.update(interactive=False), gr.update(interactive=True)]  # of Send and Stop
DRAWING_SECONDS = 0.1
EMPTY = "(an empty answer)"
SKIP = gr.skip()
STILL_ENDING = "The answer before is still ending. Send again in a moment."
READY = [gr.update(interactive=True), gr.update(interactive=False)]


@dataclass
class Wish:
    """What one page's person wants of the answer being written; Gradio keeps one for each page.

    `instead` is what the two columns show once it has ended, where another conversation was opened meanwhile. `conversation` is the
    id of the one that the page was told last to show: a page that still names another has not heard of it, and may have some of each.
    """

    stop: bool = False
    is_answered: bool = True
    instead: tuple[list[Turn], list[Turn]] | None = None
    speaker: str = ""
    conversation: str = ""


def ask_to_stop(wish: Wish) -> None:
    wish.stop = True


def show_instead(wish: Wish, tuned: list[Turn], base: list[Turn]) -> None:
    """End the answer that is being written; its last word to the page is then this conversation."""
    wish.stop, wish.instead = True, (tuned, base)


def answer(
    services: Services, wish: Wish, speaker_id: str | None, text: str, compare: bool, tuned: list[Turn], base: list[Turn], *settings: Any
) -> Iterator[list[Any]]:
    """Stream the answer, or both answers, of one turn. A page that goes away closes this generator and with it the answer."""
    yield from respond(services, wish, speaker_id, text, compare, tuned, base, settings, [tuned, base, text], typed="")


def retry(
    services: Services, wish: Wish, speaker_id: str | None, text: str, compare: bool, tuned: list[Turn], base: list[Turn], *settings: Any
) -> Iterator[list[Any]]:
    """Ask the last question again, with the next seed, which the field then shows."""
    question, before = last_question(tuned)
    *others, seed = settings
    seed = int(seed or 0) + 1
    as_it_was = [tuned, base, gr.skip()]
    for shown in respond(services, wish, speaker_id, question, compare, before, base[: len(before)], (*others, seed), as_it_was):
        yield [*shown, seed]


def ask_instead(
    services: Services,
    change: gr.EditData,
    wish: Wish,
    speaker_id: str | None,
    text: str,
    compare: bool,
    tuned: list[Turn],
    base: list[Turn],
    *settings: Any,
) -> Iterator[list[Any]]:
    """A question was changed: what was said before it stays, and it is asked instead."""
    at = change.index if isinstance(change.index, int) else change.index[0]
    question, old = plain(change.value), plain(change.previous_value)
    as_it_was = [[*tuned[:at], {**tuned[at], "content": old}, *tuned[at + 1 :]], base, gr.skip() if text.strip() else question]
    return respond(services, wish, speaker_id, question, compare, tuned[:at], base[:at], settings, as_it_was)


def undo(tuned: list[Turn], base: list[Turn]) -> list[Any]:
    """Take back the last question and its answer; the question can be changed and sent again."""
    question, before = last_question(tuned)
    return [before, base[: len(before)], question, ""]


def last_question(history: Sequence[Turn]) -> tuple[str, list[Turn]]:
    """The last thing that was asked, and the conversation before it."""
    at = max(number for number, turn in enumerate(history) if turn["role"] == "user")
    return plain(history[at]["content"]), list(history[:at])


def respond(
    services: Services,
    wish: Wish,
    speaker_id: str | None,
    text: str,
    compare: bool,
    tuned: list[Turn],
    base: list[Turn],
    settings: Sequence[Any],
    as_it_was: list[Any],
    typed: Any = SKIP,
) -> Iterator[list[Any]]:
    """The columns, the note, the text field and the buttons while a question is answered.

    `settings` are the system prompt and those of the sampling, as they stand on the page. `as_it_was` are both columns and the text
    field where there is no answer: nothing that stood there is lost then. `typed` is what the text field holds meanwhile.
    """
    *before, typed_before = as_it_was
    if not wish.is_answered:  # pressed twice, or asked in a conversation that was opened while an answer was written in another
        said = markup.note(STILL_ENDING) if wish.stop else gr.skip()
        yield [gr.skip(), gr.skip(), said, gr.skip(), gr.skip(), gr.skip()]
        return
    wish.stop, wish.instead, wish.speaker = False, None, speaker_id or ""
    if compare and questions(base) != questions(tuned):
        base = tuned  # it joins late, and continues from the same conversation
    if not text.strip() or not speaker_id:
        why = "The message is empty. Write a question." if speaker_id else "There is nobody to talk to yet. Train a run first."
        yield [*before, markup.error(why), gr.skip(), *READY]
        return
    question = {"role": "user", "content": text.strip()}
    histories = [[*history, question] for history in ([tuned, base] if compare else [tuned])]
    answers, last_words, wish.is_answered = None, [gr.skip()] * 4, False
    try:
        yield [*columns(histories), markup.note("Getting the model ready…"), typed, *BUSY]
        system, *values = settings
        drawn = sampling(*values)
        for answers in now_and_then(services.chat.reply(sides(services, speaker_id, system, histories), drawn)):
            said = [[*h, {"role": "assistant", "content": words}] for h, words in zip(histories, answers.texts, strict=True)]
            yield [*columns(said if answers.tokens else histories), markup.note(told(answers, drawn.seed)), gr.skip(), *BUSY]
            if wish.stop:
                break
        if answers and wish.stop and not answers.tokens:  # as if it had not been asked
            last_words = [*before, "", typed_before]
        elif answers and not all(answers.texts) and not wish.stop:  # an answer that ended at once has its turn too
            said = [[*h, {"role": "assistant", "content": words or EMPTY}] for h, words in zip(histories, answers.texts, strict=True)]
            last_words = [*columns(said), markup.note(figures(answers, drawn.seed)), gr.skip()]
    except UserError as error:
        last_words = [*before, markup.error(services.told(error)), typed_before]
    except Exception as error:  # noqa: BLE001 - shown in the answer's place; the next answer works
        why = f"The answer broke off: {services.told(error)}. Send again, or choose another."
        last_words = [*before, markup.error(why), typed_before]
        traceback.print_exc()
    finally:
        wish.is_answered = True
    yield [*wish.instead, "", gr.skip(), *READY] if wish.instead else [*last_words, *READY]


def now_and_then(answers: Iterator[Answers]) -> Iterator[Answers]:
    """Some of them, and the last. A page that draws every token of a fast model falls behind, and then answers to no click."""
    shown_at, last = 0.0, None
    for last in answers:
        if time.monotonic() - shown_at >= DRAWING_SECONDS:
            shown_at = time.monotonic()
            yield last
            last = None
    if last is not None:
        yield last


def sides(services: Services, speaker_id: str, system: str | None, histories: Sequence[list[Turn]]) -> list[Side]:
    """Who is asked what: the speaker, and where there are two conversations its base too. Raises UserError."""
    speaker = speakers.find(services.workspace, speaker_id)
    first = [Message(role="system", content=system.strip())] if system and system.strip() else []  # None for an untouched field
    said = [[Message(role=turn["role"], content=words(turn)) for turn in history] for history in histories]
    return [(who, [*first, *conversation]) for who, conversation in zip((speaker, speaker.base), said, strict=False)]


def words(turn: Turn) -> str:
    """What was said; of an empty answer nothing."""
    said = plain(turn["content"])
    return "" if turn["role"] == "assistant" and said == EMPTY else said


def questions(history: Sequence[Turn]) -> list[str]:
    return [plain(turn["content"]) for turn in history if turn["role"] == "user"]


def sampling(
    temperature: float, top_p: float, top_k: float, repetition_penalty: float, max_new_tokens: float, seed: float | None
) -> Sampling:
    """How the answer is drawn, as it stands on the page. Raises UserError."""
    from qlora_ui.engine import decoding

    return decoding.Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=int(top_k),
        repetition_penalty=repetition_penalty,
        max_new_tokens=int(max_new_tokens),
        seed=int(seed or 0),
    )


def told(answers: Answers, seed: int) -> str:
    """One line beside the answers: what is waited for, what they took, what there is to warn of."""
    waiting = f"{answers.before} people are before you." if answers.before > 1 else "1 person is before you." if answers.before else ""
    parts = filter(None, [waiting, figures(answers, seed) if answers.tokens else "", answers.note])
    return " · ".join(parts) or "Getting the model ready…"


def figures(answers: Answers, seed: int) -> str:
    """What an answer took, and what no longer fitted."""
    speed = answers.tokens / max(answers.seconds, 1e-6)
    known = answers.context_limit < 1 << 30
    context = f"context {answers.context + answers.tokens:,}" + (f" of {answers.context_limit:,}" if known else "")
    parts = [f"{answers.tokens} tokens", f"{speed:.1f} tokens/s", f"seed {seed}", context]
    if answers.left_out:
        parts.append(f"the oldest {answers.left_out} turns no longer fit and were left out")
    return " · ".join(parts)


def columns(histories: Sequence[list[Turn]]) -> list[Any]:
    """Both chat columns; without comparison the base's stays as it is."""
    return [histories[0], histories[1] if len(histories) > 1 else gr.skip()]
