"""Votes between two answers, and the pairs of answers that wait for one, on disk. Knows nothing of models, Gradio or torch."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from filelock import FileLock

from qlora_ui.disk import append_line, lock_file, telling_trouble
from qlora_ui.errors import UserError
from qlora_ui.evaluate.ratings import SCORES, Game, Outcome
from qlora_ui.runs import encodable, write_json

VERSION = 1
PAIR_ID = re.compile(r"[0-9a-f]{32}")
AGAIN = "vote again"
WAITS_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Side:
    """A contestant, what people call it, and its answer, which is empty while it is being written."""

    speaker: str
    name: str
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A question that was put to two. `sampling` is how their answers were drawn, with the seed; `answered`: both are whole.

    `note` is what there is to say of how they came about. It may name one of the two, and is for after the vote.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    prompt: str
    system: str
    sampling: dict[str, Any]
    left: Side
    right: Side
    answered: bool = False
    note: str = ""

    def with_answers(self, left: str, right: str, note: str) -> Pair:
        return replace(self, answered=True, note=note, left=replace(self.left, answer=left), right=replace(self.right, answer=right))


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What a person said of a pair, and when, in seconds since the epoch."""

    pair: Pair
    outcome: Outcome
    time: float = field(default_factory=time.time)

    @property
    def game(self) -> Game:
        return Game(left=self.pair.left.speaker, right=self.pair.right.speaker, outcome=self.outcome)


def encode(vote: Vote) -> str:
    """One line of JSON, without its newline."""
    return json.dumps({"version": VERSION, **asdict(vote)}, ensure_ascii=False)


def decode(line: str) -> Vote | None:
    """The vote of a line, or None for a version or a shape that is not known here."""
    try:
        fields: dict[str, Any] = json.loads(line)
        vote = Vote(pair=_pair(fields["pair"]), outcome=fields["outcome"], time=float(fields["time"]))
        known = fields["version"] == VERSION and vote.outcome in SCORES and vote.pair.left.speaker != vote.pair.right.speaker
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return vote if known else None


def _pair(fields: dict[str, Any]) -> Pair:
    return Pair(**{**fields, "left": Side(**fields["left"]), "right": Side(**fields["right"])})


class Votes:
    """The votes of a workspace, for any number of pages and processes.

    `votes.jsonl` only grows, a line a vote; of several on one pair the first counts. A pair waits in a file of its own, named by an
    id that cannot be guessed and tells nothing: whoever has it may vote, also after a reload or a restart.
    """

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._folder = workspace / "arena"
        self._file = self._folder / "votes.jsonl"
        self._seen: dict[str, Vote] = {}
        self._offset = 0
        self._lock = threading.Lock()

    def hold(self, pair: Pair) -> None:
        """Keep a pair until it is voted on or dropped. Raises UserError when it cannot be written."""
        with telling_trouble(self._workspace, "ask again"):
            self._path(pair.id).parent.mkdir(parents=True, exist_ok=True)
            self._forget_old()
            write_json(self._path(pair.id), asdict(pair))

    def _forget_old(self) -> None:
        """Pairs whose pages were left long ago. Another process may be doing the same."""
        for path in self._path("").parent.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > WAITS_SECONDS:
                    path.unlink()

    def waiting(self, pair_id: str) -> Pair | None:
        """The pair of that id, while it waits."""
        try:
            return _pair(json.loads(self._path(pair_id).read_text("utf-8"))) if PAIR_ID.fullmatch(pair_id) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def drop(self, pair_id: str) -> None:
        """The pair is not going to be voted on."""
        if PAIR_ID.fullmatch(pair_id):
            self._path(pair_id).unlink(missing_ok=True)

    def cast(self, pair_id: str, outcome: Outcome) -> tuple[Vote, bool]:
        """Vote on a pair. It can be done once: a later vote changes nothing, and gets the one that counts, and False.

        Raises UserError when the pair is not known, or the vote cannot be written.
        """
        with telling_trouble(self._workspace, AGAIN):
            self._folder.mkdir(exist_ok=True)
            with self._writing():
                first = next((vote for vote in self.all() if vote.pair.id == pair_id), None)
                if first is None:
                    pair = self.waiting(pair_id)
                    if pair is None or not pair.answered:
                        raise UserError("These two answers are not kept any more, so that they cannot be voted on. Ask again.")
                    vote = Vote(pair=pair, outcome=outcome)
                    self._file.touch()
                    append_line(self._file, encodable(encode(vote) + "\n"), sync=True)
                self.drop(pair_id)  # after the line is on disk: a kill between the two leaves a pair that has been voted on
        return (vote, True) if first is None else (first, False)

    def all(self) -> list[Vote]:
        """All votes, oldest first; only what is new since the last look is read."""
        with self._lock:
            size = self._file.stat().st_size if self._file.exists() else 0
            if size < self._offset:  # somebody put another file there
                self._seen, self._offset = {}, 0
            if size > self._offset:
                with self._file.open("rb") as file:
                    file.seek(self._offset)
                    block = file.read()
                whole = block[: block.rfind(b"\n") + 1]  # a torn last line is not there yet
                for line in whole.splitlines():
                    vote = decode(line.decode("utf-8", "replace"))
                    if vote is not None:
                        self._seen.setdefault(vote.pair.id, vote)
                self._offset += len(whole)
            return list(self._seen.values())

    def _path(self, pair_id: str) -> Path:
        return self._folder / "waiting" / f"{pair_id}.json"

    def _writing(self) -> FileLock:
        return lock_file(self._folder / "votes.lock", AGAIN)


def draw(contestants: Sequence[str], games: Sequence[Game], chance: random.Random) -> tuple[str, str]:
    """Who meets next, and on which side. Two that met seldom are likelier, but never certain: the counts on the page must not tell."""
    met = Counter(frozenset((game.left, game.right)) for game in games)
    pairs = list(combinations(contestants, 2))
    (pair,) = chance.choices(pairs, weights=[1 / (1 + met[frozenset(pair)]) for pair in pairs])
    left, right = chance.sample(pair, 2)
    return left, right


def as_jsonl(votes: Sequence[Vote]) -> str:
    return "".join(encode(vote) + "\n" for vote in votes)


def as_csv(votes: Sequence[Vote]) -> str:
    """A line a vote; the columns of the sampling are those that any vote has."""
    drawn = list(dict.fromkeys(name for vote in votes for name in vote.pair.sampling))
    sides = [f"{side}_{what}" for side in ("left", "right") for what in ("speaker", "name", "answer")]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["time", "outcome", "prompt", *sides, "system", *drawn, "pair"])
    for vote in votes:
        pair = vote.pair
        said = [value for side in (pair.left, pair.right) for value in (side.speaker, side.name, side.answer)]
        how = [pair.sampling.get(name, "") for name in drawn]
        writer.writerow([vote.time, vote.outcome, *map(_no_formula, [pair.prompt, *said, pair.system]), *how, pair.id])
    return text.getvalue()


def _no_formula(words: str) -> str:
    """What a model or a person said must not be carried out by a spreadsheet: a quote before it makes it text there."""
    return f"'{words}" if words.startswith(("=", "+", "-", "@", "\t", "\r")) else words
