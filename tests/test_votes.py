"""Votes on disk: taken once, by whoever comes first, read as they were written, whatever was torn or comes from another version."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_ui import votes
from qlora_ui.errors import UserError
from qlora_ui.evaluate.ratings import SCORES, Game
from qlora_ui.votes import Pair, Side, Vote, Votes

any_text = st.text(st.characters().filter(lambda character: not 0xD800 <= ord(character) < 0xDC00))
any_side = st.builds(Side, speaker=st.sampled_from(["run-1", "run-2@40"]), name=any_text, answer=any_text)
any_pair = st.builds(
    Pair,
    id=st.uuids().map(lambda drawn: drawn.hex),
    prompt=any_text,
    system=any_text,
    sampling=st.fixed_dictionaries({"temperature": st.floats(0, 2), "seed": st.integers(0, 2**32 - 1)}),
    left=any_side,
    right=any_side,
    answered=st.booleans(),
    note=any_text,
).filter(lambda pair: pair.left.speaker != pair.right.speaker)
any_vote = st.builds(Vote, pair=any_pair, outcome=st.sampled_from(list(SCORES)), time=st.floats(0, 4e9))


def pair(**values: object) -> Pair:
    asked = Pair(
        prompt='Who, "are" you?\nSay.',
        system="",
        sampling={"temperature": 0.7, "seed": 3},
        left=Side(speaker="run-1", name="guanaco"),
        right=Side(speaker="run-2@40", name="other · step 40"),
    )
    return asked.with_answers("=I, am", "I\nam not", "") if not values else replace(asked, **values)


@given(any_vote)
def test_any_vote_comes_back_from_its_line(vote: Vote) -> None:
    line = votes.encode(vote)
    assert "\n" not in line
    assert votes.decode(line) == vote
    assert votes.decode(line.replace('"version": 1', '"version": 2')) is None


@given(any_pair)
def test_any_pair_waits_as_it_is_until_it_is_dropped(tmp_path_factory: pytest.TempPathFactory, asked: Pair) -> None:
    kept = Votes(tmp_path_factory.mktemp("home"))
    kept.hold(asked)
    assert kept.waiting(asked.id) == asked
    kept.drop(asked.id)
    assert kept.waiting(asked.id) is None


def test_a_pair_that_nobody_came_back_to_is_forgotten_after_a_month(tmp_path: Path) -> None:
    kept, old, young = Votes(tmp_path), pair(), pair()
    for asked, days in ((old, 31), (young, 29)):
        kept.hold(asked)
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "arena" / "waiting" / f"{asked.id}.json", (then, then))
    kept.hold(pair())
    assert (kept.waiting(old.id), kept.waiting(young.id)) == (None, young)


def test_a_vote_is_on_disk_and_in_every_other_reader_and_the_pair_waits_no_more(tmp_path: Path) -> None:
    one, other, asked = Votes(tmp_path), Votes(tmp_path), pair()
    assert one.all() == []
    one.hold(asked)
    vote, counts = other.cast(asked.id, "both bad")
    assert counts
    assert (vote.pair, vote.outcome) == (asked, "both bad")
    assert vote.game == Game(left="run-1", right="run-2@40", outcome="both bad")
    assert one.all() == other.all() == Votes(tmp_path).all() == [vote]
    assert one.waiting(asked.id) is None


def test_of_many_who_vote_at_once_one_is_first_and_all_are_told_what_counts(tmp_path: Path) -> None:
    asked, gate, told = pair(), threading.Barrier(8), []
    Votes(tmp_path).hold(asked)

    def vote(outcome: votes.Outcome) -> None:
        gate.wait()
        told.append(Votes(tmp_path).cast(asked.id, outcome))

    threads = [threading.Thread(target=vote, args=[outcome]) for outcome in (*SCORES, *SCORES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first for _, first in told) == [False] * 7 + [True]
    assert [vote for vote, _ in told] == Votes(tmp_path).all() * 8


def test_a_pair_that_was_killed_between_its_vote_and_its_end_is_not_voted_on_twice(tmp_path: Path) -> None:
    kept, asked = Votes(tmp_path), pair()
    kept.hold(asked)
    vote, _ = kept.cast(asked.id, "left")
    kept.hold(asked)
    assert kept.cast(asked.id, "right") == (vote, False)
    assert kept.waiting(asked.id) is None
    assert kept.all() == [vote]


@pytest.mark.parametrize("pair_id", ["0" * 32, "../../../etc/passwd", "", "x" * 32])
def test_a_pair_that_is_not_there_cannot_be_voted_on(tmp_path: Path, pair_id: str) -> None:
    kept = Votes(tmp_path)
    kept.drop(pair_id)
    assert kept.waiting(pair_id) is None
    with pytest.raises(UserError, match="Ask again"):
        kept.cast(pair_id, "left")
    assert kept.all() == []


def test_a_pair_without_its_answers_cannot_be_voted_on(tmp_path: Path) -> None:
    kept, asked = Votes(tmp_path), pair(answered=False)
    kept.hold(asked)
    with pytest.raises(UserError, match="Ask again"):
        kept.cast(asked.id, "tie")
    assert kept.waiting(asked.id) == asked


def test_a_torn_tail_is_not_there_yet_and_swallows_no_vote_and_what_is_unknown_is_skipped(tmp_path: Path) -> None:
    kept, first, second = Votes(tmp_path), pair(), replace(pair(), id="f" * 32)
    for asked in (first, second):
        kept.hold(asked)
    kept.cast(first.id, "left")
    file = tmp_path / "arena" / "votes.jsonl"
    line = file.read_bytes()
    file.write_bytes(line + b'[1]\n{"version": 9}\n\xff\n' + line[:-1].replace(b'"left", "time"', b'"up", "time"') + b"\n" + line[:40])
    assert [vote.pair for vote in kept.all()] == [first]
    kept.cast(second.id, "tie")
    assert [vote.pair for vote in kept.all()] == [vote.pair for vote in Votes(tmp_path).all()] == [first, second]
    file.unlink()
    assert kept.all() == []


def test_a_vote_that_a_full_disk_tore_does_not_count_and_can_be_cast_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, asked, write = Votes(tmp_path), pair(), os.write
    kept.hold(asked)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[: len(line) // 2]))
        with pytest.raises(UserError, match="full"):
            kept.cast(asked.id, "left")
    assert kept.all() == []
    assert kept.cast(asked.id, "right")[1]
    assert [vote.outcome for vote in Votes(tmp_path).all()] == ["right"]


def test_sides_are_even_and_those_who_met_seldom_meet_more_often_but_never_surely() -> None:
    met = [Game(left="a", right="b", outcome="tie")] * 9
    chance = random.Random(4)
    drawn = Counter(votes.draw(["a", "b", "c"], met, chance) for _ in range(3000))
    assert all(650 < drawn[left, right] < 780 for left, right in ("ac", "ca", "bc", "cb"))
    assert all(40 < drawn[left, right] < 110 for left, right in ("ab", "ba"))


def test_votes_are_taken_away_as_lines_and_as_a_table(tmp_path: Path) -> None:
    kept = Votes(tmp_path)
    for asked in (pair(), replace(pair(), id="f" * 32)):
        kept.hold(asked)
        kept.cast(asked.id, "left")
    lines = votes.as_jsonl(kept.all()).splitlines()
    assert [votes.decode(line) for line in lines] == kept.all()
    assert json.loads(lines[0])["pair"]["left"]["name"] == "guanaco"
    first, second = csv.DictReader(io.StringIO(votes.as_csv(kept.all())))
    assert first["prompt"] == 'Who, "are" you?\nSay.'
    assert (first["left_answer"], first["right_speaker"], first["outcome"], first["seed"]) == (
        "'=I, am",
        "run-2@40",
        "left",
        "3",
    )  # text, no formula
    assert second["pair"] == "f" * 32
