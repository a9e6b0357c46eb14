"""Answers of any speakers, out of one model in memory. Knows nothing of Gradio; imports the engine only when it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.progress import amount
from qlora_ui.runs import Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.stopping import watched

if TYPE_CHECKING:
    from qlora_ui.engine.chat import ChatModel
    from qlora_ui.engine.decoding import Answers, Sampling

Side = tuple[Speaker, Sequence[Message]]
"""Who is asked, and the conversation up to the question."""


class Chat(Protocol):
    """Lets anybody answer, one after the other."""

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]: ...

    def release(self) -> None: ...


class EngineChat:
    """Keeps the model that was talked to last, with its adapters; gives it back when a training needs the room."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._model: ChatModel | None = None
        self._lock = threading.Lock()
        self._wanted_back = threading.Event()

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        """Stream the answers of all sides, after what is not in memory was loaded: meanwhile `note` says what is waited for.

        Sides of one base come out of one model, together where that can be. The model of another base takes its place after that.
        Raises UserError.
        """
        if not all(conversation[-1].content.strip() for _, conversation in sides):
            raise UserError("The message is empty. Write a question.")
        with self._lock:
            live = self._workspace.live()
            if live is not None:
                raise UserError(f"{live.id} is training and needs the device. Chat when it has ended, or stop it.")
            if self._workspace.is_lent():
                raise UserError("An export needs the device. Chat when it has ended, or cancel it on the Export tab.")
            from qlora_ui.engine import decoding

            so_far = decoding.Answers(texts=("",) * len(sides), tokens=0, seconds=0, context=0, context_limit=0, left_out=0)
            silent = {row: speaker for row, (speaker, _) in enumerate(sides)}
            while silent:
                before, rows = yield from self._load(silent, so_far)
                assert self._model is not None
                for answers in self._model.reply([sides[row] for row in rows], sampling):
                    so_far = _joined(before, rows, answers)
                    yield so_far
                    if self._wanted_back.is_set():
                        raise UserError("The answer was cut off: something else needs the device. Ask again when it has ended.")
                silent = {row: speaker for row, speaker in silent.items() if row not in rows}

    def release(self) -> None:
        """End the answer that is being written, at its next token, and let go of the model."""
        self._wanted_back.set()
        with self._lock:
            self._wanted_back.clear()
            self._let_go()

    def _load(self, silent: Mapping[int, Speaker], so_far: Answers) -> Generator[Answers, None, tuple[Answers, list[int]]]:
        """Have a model in memory, if possible the one that is there, and return whom of the silent sides it answers.

        Meanwhile `note` says how far it is; what there was to warn of stays. Closed, it waits for the end of what it began.
        """
        first = next((speaker for speaker in silent.values() if self._model and self._model.takes(speaker)), None)
        if first is None:
            self._let_go()
            first = next(iter(silent.values()))
            yield replace(so_far, note=f"Loading {first.model}…")
        doing, warnings, rows, ended = [""], [so_far.note], list[int](), threading.Event()

        def tell(event: Event) -> None:
            if isinstance(event, PhaseProgress):
                doing[0] = amount(event)
            elif isinstance(event, Log) and event.level == "warning":
                warnings.append(event.text)

        def work(should_stop: Callable[[], bool], _: Callable[[int], None]) -> None:
            try:
                rows.extend(self._made_ready(first, silent, tell, should_stop))
            finally:
                ended.set()

        try:
            with closing(watched(work)) as steps:
                for _ in steps:
                    yield replace(so_far, note=f"Loading {first.model}… {doing[0]}")
        finally:
            ended.wait()
        return replace(so_far, note=" ".join(filter(None, warnings))), rows

    def _made_ready(
        self, first: Speaker, silent: Mapping[int, Speaker], tell: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> list[int]:
        """Load what the first speaker lacks, and those who can answer with it: out of one model, ending with the same tokens."""
        from qlora_ui.engine import chat

        try:
            self._model = model = self._model or chat.ChatModel(first, self._workspace.models, tell, should_stop)
            rows = [row for row, other in silent.items() if model.takes(other) and model.words(other).end_ids == model.words(first).end_ids]
            for row in rows:
                model.add(silent[row])
        except BaseException:  # an adapter that was half put on the base would stay there
            self._model = None
            raise
        return rows

    def _let_go(self) -> None:
        if self._model is not None:
            from qlora_ui.engine import hardware

            self._model = None
            hardware.give_memory_back()


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
