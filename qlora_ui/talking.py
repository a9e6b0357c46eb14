"""Answers of any speakers, out of one model in memory. Knows nothing of Gradio; imports the engine only when it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, Phase, PhaseProgress
from qlora_ui.progress import amount
from qlora_ui.runs import Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.stopping import Cancelled
from qlora_ui.turns import Turns, Waiting

if TYPE_CHECKING:
    from qlora_ui.engine.chat import ChatModel
    from qlora_ui.engine.decoding import Answers, Sampling

Side = tuple[Speaker, Sequence[Message]]
"""Who is asked, and the conversation up to the question."""
Tell = Callable[["Answers"], None]
ShouldStop = Callable[[], bool]


class Chat(Protocol):
    """Lets anybody answer, one after the other. `faster`: for more memory, where the machine has something to gain."""

    faster: bool

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]: ...

    def release(self) -> None: ...


class EngineChat:
    """Keeps the model that was talked to last, with its adapters; gives it back when a training needs the room."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._model: ChatModel | None = None
        self._turns = Turns("chat")
        self.faster = False
        self._wanted_back = threading.Event()

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        """Stream the answers of all sides, first come, first served: while others are before you, `before` says how many, and
        `note` what else is waited for. Yields at least five times a second, also the same again, and closing it frees the device.

        Sides of one base come out of one model, together where that can be. The model of another base takes its place after that.
        Raises UserError, or what broke the answer off.
        """
        if not all(conversation[-1].content.strip() for _, conversation in sides):
            raise UserError("The message is empty. Write a question.")
        from qlora_ui.engine import decoding

        so_far = decoding.Answers(texts=("",) * len(sides), tokens=0, seconds=0, context=0, context_limit=0, left_out=0)
        for news in self._turns.ask(partial(self._answer, sides, sampling, so_far)):
            so_far = replace(so_far, before=news.before) if isinstance(news, Waiting) else news
            yield so_far

    def release(self) -> None:
        """End the answer that is being written, at its next token, and let go of the model."""
        self._wanted_back.set()
        for _ in self._turns.ask(self._give_back):
            pass

    def _give_back(self, tell: Tell, should_stop: ShouldStop) -> None:
        self._wanted_back.clear()
        self._let_go()

    def _answer(self, sides: Sequence[Side], sampling: Sampling, so_far: Answers, tell: Tell, should_stop: ShouldStop) -> None:
        """One person's turn. A model that cannot be used after what happened is let go of."""
        from qlora_ui.engine import troubles

        live = self._workspace.live()
        if live is not None:
            raise UserError(f"{live.id} is training and needs the device. Chat when it has ended, or stop it.")
        if self._workspace.is_lent():
            raise UserError("An export needs the device, or a step is measured. Chat when it has ended, or cancel it on its tab.")
        try:
            self._answer_all(sides, sampling, so_far, tell, lambda: should_stop() or self._wanted_back.is_set())
            trouble = None
        except Cancelled:
            trouble = None
        except BaseException as error:  # noqa: BLE001 - whatever it is, who asked is told
            trouble = troubles.told(error, self._spare)
        if trouble is not None:
            raise trouble
        if self._wanted_back.is_set():
            raise UserError("The answer was cut off: something else needs the device. Ask again when it has ended.")

    def _answer_all(self, sides: Sequence[Side], sampling: Sampling, so_far: Answers, tell: Tell, should_stop: ShouldStop) -> None:
        """Those of one base after the other, those of the model in memory first."""
        silent = {row: speaker for row, (speaker, _) in enumerate(sides)}
        while silent and not should_stop():
            news = _News(tell, so_far)
            model, rows = self._made_ready(silent, news.loading, should_stop)
            model.faster.switch(self.faster)
            model.answer([sides[row] for row in rows], sampling, partial(news.answering, rows), should_stop)
            so_far = news.so_far
            silent = {row: speaker for row, speaker in silent.items() if row not in rows}

    def _spare(self) -> None:
        if self._model is not None:
            self._model.prefixes.forget()

    def _made_ready(
        self, silent: Mapping[int, Speaker], emit: Callable[[Event], None], should_stop: ShouldStop
    ) -> tuple[ChatModel, list[int]]:
        """A model, if possible the one that is there, with what it lacked, and whom of the silent sides it answers: all whose answers
        end with the same tokens."""
        from qlora_ui.engine import chat

        first = next((speaker for speaker in silent.values() if self._model and self._model.takes(speaker)), None)
        if first is None:
            self._let_go()
            first = next(iter(silent.values()))
            emit(Phase(name="loading", detail=first.model))
        try:
            self._model = model = self._model or chat.ChatModel(first, self._workspace.models, emit, should_stop)
            rows = [row for row, other in silent.items() if model.takes(other) and model.words(other).end_ids == model.words(first).end_ids]
            for row in rows:
                model.add(silent[row], emit)
        except BaseException:  # an adapter that was half put on the base would stay there
            self._model = None
            raise
        return model, rows

    def _let_go(self) -> None:
        if self._model is not None:
            from qlora_ui.engine import hardware

            self._model = None
            hardware.give_memory_back()


class _News:
    """What is told of the answers of one model: what is waited for before, what there was to warn of, and the answers."""

    def __init__(self, tell: Tell, before: Answers) -> None:
        self._tell, self._before, self.so_far = tell, before, before
        self._model = ""

    def loading(self, event: Event) -> None:
        if isinstance(event, Log) and event.level == "warning":
            self._before = replace(self._before, note=f"{self._before.note} {event.text}".strip())
        elif isinstance(event, Phase):
            self._model = event.detail
            self._tell(replace(self._before, note=f"Loading {self._model}…"))
        elif isinstance(event, PhaseProgress):
            self._tell(replace(self._before, note=f"Loading {self._model}… {amount(event)}"))

    def answering(self, rows: Sequence[int], answers: Answers) -> None:
        self.so_far = _joined(self._before, rows, answers)
        self._tell(self.so_far)


def _joined(before: Answers, rows: Sequence[int], answers: Answers) -> Answers:
    """The answers of these rows among those that were there before."""
    texts = list(before.texts)
    for row, text in zip(rows, answers.texts, strict=True):
        texts[row] = text
    return replace(
        answers,
        texts=tuple(texts),
        tokens=before.tokens + answers.tokens,
        seconds=before.seconds + answers.seconds,
        left_out=max(before.left_out, answers.left_out),
        note=" ".join(filter(None, [before.note, answers.note])),
    )
