"""A question put to two contestants whose names nobody is told before the vote. Knows nothing of Gradio or torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.talking import Chat
from qlora_ui.votes import Pair, Side, Votes, draw

if TYPE_CHECKING:
    from qlora_ui.engine.decoding import Answers, Sampling


def contestants(workspace: Workspace) -> list[Speaker]:
    """Who may take part: all that can be talked to, and beside each run its base, asked in the run's words."""
    everybody = speakers.all_of(workspace)
    runs = {run.id for run in workspace.all()}
    return [one for speaker in everybody for one in ((speaker, speaker.base) if speaker.id in runs else (speaker,))]


def begin(
    workspace: Workspace, votes: Votes, ids: Sequence[str], prompt: str, system: str, sampling: Sampling, chance: random.Random
) -> Pair:
    """Draw who answers and on which side, and keep the question. Raises UserError."""
    if len(set(ids)) < 2:
        raise UserError("A vote is between two. Choose two contestants or more.")
    if not prompt.strip():
        raise UserError("The message is empty. Write a question.")
    left, right = (
        speakers.find(workspace, speaker) for speaker in draw(list(dict.fromkeys(ids)), [vote.game for vote in votes.all()], chance)
    )
    pair = Pair(
        prompt=prompt.strip(),
        system=system.strip(),
        sampling=asdict(sampling),
        left=Side(speaker=left.id, name=left.name),
        right=Side(speaker=right.id, name=right.name),
    )
    votes.hold(pair)
    return pair


def answer(workspace: Workspace, chat: Chat, votes: Votes, pair: Pair) -> Iterator[Answers]:
    """Have both answers written, and the pair wait with them. Meanwhile yields what tells the two from each other by nothing: who is
    waited for, and how many tokens there are of both together. Whoever drops the pair ends it. Raises what broke it off.

    Closed, it leaves the pair without answers, so that a page that was reloaded can say what became of it.
    """
    from qlora_ui.engine import decoding

    said_first = [Message(role="system", content=pair.system)] if pair.system else []
    asked = [*said_first, Message(role="user", content=pair.prompt)]
    ids = sorted((pair.left.speaker, pair.right.speaker))  # so that who is loaded or answers first has nothing to do with sides
    try:
        sides = [(speakers.find(workspace, speaker), asked) for speaker in ids]
        for answers in chat.reply(sides, decoding.Sampling(**pair.sampling)):
            if votes.waiting(pair.id) is None:
                return
            yield replace(answers, texts=("", ""), seconds=0.0, context=0, context_limit=0, left_out=0, note="")
        said = dict(zip(ids, answers.texts, strict=True))
        votes.hold(pair.with_answers(said[pair.left.speaker], said[pair.right.speaker], answers.note))
    except Exception:
        votes.drop(pair.id)
        raise
