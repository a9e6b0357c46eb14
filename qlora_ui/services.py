"""What the screens and the command line are handed. Knows nothing of Gradio; imports the engine only when it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from qlora_ui.config import RunConfig
from qlora_ui.data import checks, sources
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.jobs import Jobs
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, Workspace

if TYPE_CHECKING:
    from qlora_ui.engine.chat import Answers, ChatModel, Sampling
    from qlora_ui.engine.hardware import Hardware

Side = tuple[Literal["adapter", "base"], Sequence[Message]]
"""Who is asked, and the conversation up to the question."""


class Chat(Protocol):
    """Talks to one run at a time."""

    def reply(self, run: Run, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]: ...

    def release(self) -> None: ...


class EngineChat:
    """Keeps the model of the run that was talked to last; gives it back when a training needs the room."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._model: ChatModel | None = None
        self._lock = threading.Lock()
        self._wanted_back = threading.Event()

    def reply(self, run: Run, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        """Stream the answers of all sides, loading the run's model first when it is another. Raises UserError."""
        if not all(conversation[-1].content.strip() for _, conversation in sides):
            raise UserError("The message is empty. Write a question.")
        with self._lock:
            live = self._workspace.live()
            if live is not None:
                raise UserError(f"{live.id} is training and needs the device. Chat when it has ended, or stop it.")
            if self._model is None or self._model.run_id != run.id:
                from qlora_ui.engine.chat import ChatModel

                self._model = None
                self._model = ChatModel(run, emit=_ignore, should_stop=lambda: False)
            for answers in self._model.reply(sides, sampling):
                yield answers
                if self._wanted_back.is_set():
                    raise UserError("The answer was cut off: a training was started and needs the device. Ask again when it has ended.")

    def release(self) -> None:
        """End the answer that is being written, at its next token, and let go of the model."""
        self._wanted_back.set()
        with self._lock:
            self._wanted_back.clear()
            if self._model is not None:
                from qlora_ui.engine.hardware import give_memory_back

                self._model = None
                give_memory_back()


class Shelf:
    """The data sets that pages looked at last, so that turning a page or typing a number does not read them again."""

    def __init__(self, root: Path, kept: int = 4) -> None:
        self._root, self._kept = root, kept
        self._sets: dict[tuple[str, float], checks.DataSet] = {}
        self._lock = threading.Lock()

    def read(self, reference: str) -> checks.DataSet:
        """The data set as it is now; a file that has changed is read again. Raises UserError."""
        path = Path(reference)
        key = (reference, path.stat().st_mtime if path.is_file() else 0.0)
        with self._lock:
            found = self._sets.pop(key, None)
        found = found or checks.prepare(reference, self._root)  # without the lock: a slow Hub must not hold up other pages
        with self._lock:
            self._sets[key] = found
            if len(self._sets) > self._kept:
                self._sets.pop(next(iter(self._sets)))
            return found


class Watch:
    """Every run's progress, read on from where the last look ended. Any number of pages share it."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, Progress]] = {}
        self._lock = threading.Lock()

    def progress(self, run: Run) -> Progress:
        """The run's progress as of now."""
        with self._lock:
            offset, progress = self._seen.pop(run.id, (0, Progress(run.name)))
            if run.size() > offset:
                events, offset = run.read(offset)
                for event in events:
                    progress.add(event)
            self._seen[run.id] = (offset, progress)
            if len(self._seen) > 50:
                self._seen.pop(next(iter(self._seen)))
            return progress


@dataclass(frozen=True, kw_only=True)
class Services:
    """All that a screen may use."""

    workspace: Workspace
    jobs: Jobs
    chat: Chat
    watch: Watch
    shelf: Shelf
    hardware: Callable[[], Hardware | None]

    def start(self, config: RunConfig) -> Run:
        """Start a training asked for by a page: every path in it must lie inside the workspace. Raises UserError."""
        sources.check(config.data.data, self.workspace.root)
        if self._is_elsewhere(config.model.model):
            raise UserError(
                f"The model {config.model.model} is outside the workspace. Put its folder into {self.workspace.models} and give its name.",
                field="model",
            )
        return self.jobs.start(config)

    def _is_elsewhere(self, model: str) -> bool:
        """Whether the name is a path that exists outside the workspace."""
        try:
            path = Path(model).expanduser()
            return path.exists() and not path.resolve().is_relative_to(self.workspace.root)
        except (OSError, RuntimeError, ValueError):  # no path at all: a name too long, a NUL, the home of nobody
            return False

    def trained_pieces(self, config: RunConfig, rows: Sequence[checks.Conversation]) -> list[list[tuple[str, bool]]]:
        """The rows as the model will read them: text in order, each piece with whether it is trained. Raises UserError."""
        from qlora_ui.engine import tokens
        from qlora_ui.engine.model import find_here, load_tokenizer

        found = find_here(config.model.model, config.model.revision, self.workspace.models)
        if found is None:
            raise UserError(f"The exact tokens show once {config.model.model} is on this machine: the first run fetches it.", field="model")
        tokenizer = load_tokenizer(found)
        tokens.set_prompt_format(tokenizer, config.data.prompt_format)
        encoded = (tokens.encode(tokenizer, row.messages, config.data.train_on, config.data.max_seq_len) for row in rows)
        return [tokens.pieces(tokenizer, row) for row in encoded]


class WarmUp:
    """Imports the training stack in the background after the page is up, and then knows the hardware."""

    def __init__(self) -> None:
        self._hardware: Hardware | None = None
        self._thread = threading.Thread(target=self._run, name="warm-up", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hardware(self) -> Hardware | None:
        """The device, or None while it is not known yet."""
        return self._hardware

    def _run(self) -> None:
        from qlora_ui.engine.hardware import detect

        self._hardware = detect()
        import qlora_ui.engine.chat
        import qlora_ui.engine.train  # noqa: F401


def build(workspace: Workspace, warm_up: WarmUp) -> Services:
    """The real services over a workspace."""
    chat = EngineChat(workspace)
    jobs = Jobs(workspace, make_room=chat.release)
    shelf = Shelf(workspace.root)
    return Services(workspace=workspace, jobs=jobs, chat=chat, watch=Watch(), shelf=shelf, hardware=warm_up.hardware)


def _ignore(event: Event) -> None:
    """Loading for a chat tells nobody."""
