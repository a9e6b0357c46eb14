"""The conversations that a browser keeps: in a list, the newest first, within its room, each with whom it was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_ui import services
from qlora_ui.runs import Workspace
from qlora_ui.ui import chat_tab, chat_turns, conversations
from qlora_ui.ui.conversations import NEW, Kept


def turns(*said: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": words} for role, words in zip(("user", "assistant") * len(said), said, strict=False)]


def kept(*questions: str) -> Kept:
    """After one conversation for each question, with as many speakers."""
    all_of: Kept = {}
    for question in questions:
        all_of = conversations.keep(all_of, NEW, f"to {question}", turns(question, "yes"), [])
    return all_of


def test_the_newest_comes_first_and_each_is_found_with_whom_it_was() -> None:
    all_of = kept("one", "two")
    (new, newest, oldest) = conversations.choices(all_of)
    assert (new, newest[0], oldest[0]) == (("New conversation", NEW), "two", "one")
    assert all_of["open"] == newest[1]
    assert conversations.find(all_of, oldest[1])["speaker"] == "to one"
    assert conversations.find(all_of, "gone") == conversations.find({}, NEW) == {"id": NEW, "speaker": "", "tuned": [], "base": []}


def test_one_that_goes_on_stays_one_and_moves_to_the_front() -> None:
    all_of = kept("one", "two")
    oldest = conversations.choices(all_of)[-1][1]
    again = conversations.keep(all_of, oldest, "to one", turns("one", "yes", "and?"), turns("one", "no"))
    assert [title for title, _ in conversations.choices(again)] == ["New conversation", "one", "two"]
    assert again["open"] == oldest
    assert len(conversations.find(again, oldest)["tuned"]) == 3
    assert conversations.find(again, oldest)["base"] == turns("one", "no")


def test_a_new_one_has_its_id_from_its_beginning_and_is_kept_once_however_often() -> None:
    once = conversations.keep({}, "abc", "x", turns("one"), [])
    assert conversations.keep(once, "abc", "x", turns("one", "yes"), [])["all"] == [
        {"id": "abc", "speaker": "x", "tuned": turns("one", "yes"), "base": []}
    ]


def test_one_that_was_kept_before_the_page_knew_its_id_is_kept_once() -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    early = conversations.keep({}, conversations.NEW, "run-1", said, [])
    late = conversations.keep(early, "0123abcd", "run-1", said, [])
    assert [one["id"] for one in late["all"]] == ["0123abcd"]
    assert len(conversations.keep(late, "4567abcd", "run-2", said, [])["all"]) == 2


def test_an_empty_one_is_not_kept_and_a_deleted_one_is_gone() -> None:
    all_of = kept("one")
    assert conversations.keep(all_of, NEW, "x", [], []) == {**all_of, "open": NEW}
    assert conversations.keep(all_of, all_of["open"], "x", [], []) == {"open": NEW, "all": []}
    assert conversations.without(all_of, all_of["open"]) == {"open": NEW, "all": []}


def test_the_oldest_leave_a_full_list_and_the_newest_stays_however_long() -> None:
    all_of = kept(*(f"{number}" for number in range(conversations.MOST + 5)))
    assert len(conversations.choices(all_of)) == conversations.MOST + 1
    assert conversations.choices(all_of)[-1][0] == "5"
    long = conversations.keep(all_of, NEW, "x", turns("y" * conversations.MOST_CHARACTERS), [])
    assert [conversation["speaker"] for conversation in long["all"]] == ["x"]
    assert len(json.dumps(conversations.keep(long, NEW, "z", turns("short"), []))) < 1000


def test_parts_of_a_turn_are_its_words_and_a_title_is_short() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "are you? " * 20}]}]
    all_of = conversations.keep({}, NEW, "x", parts, [])
    assert all_of["all"][0]["tuned"][0]["content"].startswith("How are you?")
    assert len(conversations.choices(all_of)[1][0]) <= 48


def test_a_conversation_whose_speaker_is_gone_says_so(workspace: Workspace) -> None:
    _, tuned, _, note, *_ = chat_tab.restored(services.build(workspace, services.WarmUp()), kept("one"))
    assert tuned == turns("one", "yes")
    assert "to one, with whom this conversation was, is not here any more." in note


def test_a_page_draws_some_of_an_answers_tokens_and_always_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Any = lambda: iter(["a", "ab", "abc", "abcd"])  # noqa: E731
    monkeypatch.setattr(chat_turns, "DRAWING_SECONDS", 1000)
    monkeypatch.setattr(chat_turns.time, "monotonic", iter([5000, 5001, 5002, 6500, 6501, 6502]).__next__)
    assert list(chat_turns.now_and_then(answers())) == ["a", "abc", "abcd"]
    assert list(chat_turns.now_and_then(iter([]))) == []


def test_the_files_hold_who_said_what() -> None:
    columns = {"tuned": turns("a", "b"), "base": turns("a", "c")}
    assert json.loads(conversations.as_json("me", columns)) == {"speaker": "me", **columns}
    assert "# Base\n\n**User**\n\na\n\n**Assistant**\n\nc" in conversations.as_markdown("me", columns)
