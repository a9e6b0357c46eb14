"""The arena: blind before the vote, also in what the server sends; voted on once; found again after a reload; and in a real Chromium."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served
from training import trained

from qlora_ui import arena, services, speakers
from qlora_ui.engine.decoding import Answers, Sampling
from qlora_ui.errors import UserError
from qlora_ui.runs import Workspace
from qlora_ui.services import Services
from qlora_ui.talking import Side
from qlora_ui.ui import arena_markup, arena_tab
from qlora_ui.votes import Pair, Vote, Votes

ATTACK = "<img src=x onerror=\"document.body.dataset.broken='yes'\">"
SAMPLING = Sampling(temperature=0.5, max_new_tokens=20, seed=3)
FORM = ["", "", 0.5, 0.9, 0, 1, 20, 3]  # the pair on the page, the system prompt, the sampling
MINUTE = 60_000
RECORD = """() => {
  window.sent = "";
  const fetched = window.fetch;
  window.fetch = async (...asked) => {
    const answer = await fetched(...asked);
    if (String(asked[0].url ?? asked[0]).includes("queue/data")) {
      const reader = answer.clone().body.pipeThrough(new TextDecoderStream()).getReader();
      const read = async () => { for (let part; !(part = await reader.read()).done; ) window.sent += part.value; };
      read().catch(() => {});
    }
    return answer;
  };
}"""
"""Keeps what the server sends in answer to what was asked for on the page."""


class Talkers:
    """Each says the three words that were put into its mouth, one a token."""

    def __init__(self) -> None:
        self.said, self.asked = dict[str, str](), list[tuple[Sequence[Side], Sampling]]()

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        self.asked.append((sides, sampling))
        words = [self.said.get(speaker.id, "word word word").split() for speaker, _ in sides]
        for count in range(1, 4):
            texts = tuple(" ".join(said[:count]) for said in words)
            note = "".join(f"{speaker.name} was loaded. " for speaker, _ in sides)
            yield Answers(texts=texts, tokens=2 * count, seconds=1.0, context=5, context_limit=512, left_out=0, note=note)

    def release(self) -> None:
        pass


class Broken(Talkers):
    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        yield next(super().reply(sides, sampling))
        raise UserError("The device is full. Choose a smaller model.")


@pytest.fixture
def ready(workspace: Workspace, rows: Path) -> Services:
    """Services over two runs that have an adapter each, as far as folders tell."""
    for _ in range(2):
        tiny.tiny_run(workspace, rows).adapter.mkdir()
    return replace(services.build(workspace, services.WarmUp()), chat=Talkers())


def ids(made: Services) -> list[str]:
    return [run.id for run in made.workspace.all()]


def asked(made: Services) -> Pair:
    pair = arena.begin(made.workspace, made.votes, ids(made), "Who are you?", "", SAMPLING, random.Random(1))
    for _ in arena.answer(made.workspace, made.chat, made.votes, pair):
        pass
    waiting = made.votes.waiting(pair.id)
    assert waiting is not None
    return waiting


def test_both_are_asked_the_same_with_the_same_seed_and_the_vote_keeps_all_of_it(ready: Services) -> None:
    pair = asked(ready)
    ((sides, sampling),) = ready.chat.asked  # type: ignore[attr-defined]
    assert [speaker.id for speaker, _ in sides] == sorted([pair.left.speaker, pair.right.speaker])
    assert sides[0][1] == sides[1][1]
    assert sampling == SAMPLING == Sampling(**pair.sampling)
    vote, _ = ready.votes.cast(pair.id, "left")
    assert vote.pair == pair
    assert (pair.left.answer, pair.right.answer, pair.prompt) == ("word word word", "word word word", "Who are you?")


def test_a_run_meets_its_own_base_asked_in_the_same_words(ready: Services) -> None:
    (run, base), *_ = zip(*[iter(arena.contestants(ready.workspace))] * 2, strict=False)
    assert (base.adapter, base.model, base.vocabulary) == (None, run.model, run.vocabulary)


@pytest.mark.parametrize(
    ("chosen", "prompt", "words"), [([0], "Hi", "two contestants or more"), ([0, 0], "Hi", "two"), ([0, 1], " ", "empty")]
)
def test_what_cannot_be_asked_is_a_sentence_and_leaves_nothing(ready: Services, chosen: list[int], prompt: str, words: str) -> None:
    *_, last = arena_tab.put(ready, [ids(ready)[at] for at in chosen], prompt, *FORM)
    assert words in last[2]
    assert not (ready.workspace.root / "arena").exists()


def test_what_a_page_is_told_before_the_vote_is_the_same_whoever_answers(ready: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for order in (ids(ready), ids(ready)[::-1]):
        monkeypatch.setattr(arena, "draw", lambda *_, order=order: order)
        steps = list(arena_tab.put(ready, ids(ready), "Who are you?", *FORM))
        (pair_id,) = {step[4] for step in steps if isinstance(step[4], str)}
        told.append(json.dumps(steps).replace(pair_id, "ID"))
        assert json.dumps(arena_tab.found_again(ready, pair_id)).replace(pair_id, "ID") == json.dumps(steps[-1]).replace(pair_id, "ID")
    assert told[0] == told[1]
    assert "word word word" in told[0]
    assert "tiny" not in told[0]


def test_each_answer_stands_on_the_side_of_whom_it_is_from(ready: Services) -> None:
    ready.chat.said = {run: f"I am {run}" for run in ids(ready)}  # type: ignore[attr-defined]
    for number in range(4):
        pair = arena.begin(ready.workspace, ready.votes, ids(ready), "Who?", "", SAMPLING, random.Random(number))
        assert list(arena.answer(ready.workspace, ready.chat, ready.votes, pair))[-1].tokens == 6
        written = ready.votes.waiting(pair.id)
        assert written is not None
        assert written.left.answer == f"I am {written.left.speaker}"
        assert written.right.answer == f"I am {written.right.speaker}"


def test_answers_appear_together_when_both_are_whole(ready: Services) -> None:
    *writing, last = arena_tab.put(ready, ids(ready), "Who are you?", *FORM)
    assert "word word" not in json.dumps(writing)
    assert json.dumps(last).count("word word word") == 2


def test_a_vote_names_both_moves_the_table_and_is_taken_once(ready: Services) -> None:
    pair = asked(ready)
    table, left, right, note, *_ = arena_tab.vote(ready, "right", pair.id)
    assert (left["label"], right["label"]) == (pair.left.name, pair.right.name)
    assert "Right is better" in note
    assert "was loaded" in note
    assert "One vote" in table
    again = arena_tab.vote(ready, "left", pair.id)
    assert "had been voted on before" in again[3]
    assert "Right is better" in again[3]
    assert again[0] == table
    assert "not kept any more" in arena_tab.vote(ready, "left", "0" * 32)[3]


def test_a_vote_that_cannot_be_written_says_so_and_the_pair_still_waits_for_it(ready: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = asked(ready)
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda *_: 0)
        shown = arena_tab.vote(ready, "left", pair.id)
    assert "full" in shown[3]
    assert (shown[5], shown[8]["interactive"]) == (pair.id, True)
    assert ready.votes.waiting(pair.id) == pair


def test_a_question_is_not_asked_over_a_pair_that_waits_and_can_be_skipped(ready: Services) -> None:
    pair = asked(ready)
    (only,) = arena_tab.put(ready, ids(ready), "Another?", pair.id, *FORM[1:])
    assert "wait for your vote" in only[2]
    assert arena_tab.pass_over(ready, pair.id, "")[3] == "Who are you?"
    assert ready.votes.waiting(pair.id) is None
    assert ready.votes.all() == []


def test_skipping_ends_answers_that_are_being_written(ready: Services) -> None:
    steps = arena_tab.put(ready, ids(ready), "Who are you?", *FORM)
    arena_tab.pass_over(ready, next(steps)[4], "")
    assert len(list(steps)) == 1
    assert not list((ready.workspace.root / "arena" / "waiting").iterdir())


def test_a_page_that_was_left_while_answers_were_written_says_so_and_gives_the_question_back(ready: Services) -> None:
    steps = arena_tab.put(ready, ids(ready), "Who are you?", *FORM)
    pair_id = next(steps)[4]
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    found = arena_tab.found_again(ready, pair_id)
    assert "was left while the answers were being written" in found[2]
    assert found[3] == "Who are you?"
    assert "not kept any more" in arena_tab.found_again(ready, pair_id)[2]


def test_a_failure_is_said_in_the_answers_place_and_the_next_question_works(ready: Services) -> None:
    *_, last = arena_tab.put(replace(ready, chat=Broken()), ids(ready), "Who are you?", *FORM)
    assert "The device is full" in last[2]
    assert (last[3], last[4]) == ("Who are you?", "")
    assert "word word word" in json.dumps(list(arena_tab.put(ready, ids(ready), "Who are you?", *FORM)))


def test_names_in_the_tables_are_text_and_the_newest_of_each(ready: Services) -> None:
    pair = asked(ready)
    renamed = replace(pair, id="f" * 32, left=replace(pair.left, name=ATTACK))
    html = arena_markup.tables([Vote(pair=pair, outcome="left"), Vote(pair=renamed, outcome="both bad")])
    assert "<img" not in html
    assert "&lt;img" in html
    assert pair.left.name not in html
    assert "75% <small>of 2" in html
    assert arena_markup.tables([]) == arena_markup.NO_VOTES
    assert "has not lost yet" in arena_markup.tables([Vote(pair=pair, outcome="left")])


def stand(page: Page) -> list[str]:
    return page.locator("#arena-table tbody tr").all_inner_texts()


@pytest.mark.browser
def test_three_votes_in_a_browser_that_is_told_no_name_before_each(browser: Browser, tmp_path: Path) -> None:
    workspace = Workspace.open(tmp_path / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    rows = tiny.tiny_rows(tmp_path / "rows.json")
    first, second = (trained(workspace, rows, max_steps=steps, save_steps=50) for steps in (1, 3))
    chosen = [speakers.find(workspace, speaker) for speaker in (first.id, second.id, f"base-of:{second.id}")]
    with served(workspace.root) as app:
        page = open_page(browser, app.url)
        page.add_init_script(f"({RECORD})()")  # before the page asks anything: an answer that is on its way already would be missed
        page.reload()
        go(page, "Arena")
        page.get_by_role("button", name="System prompt and sampling").click()
        page.locator("#arena-max-new-tokens input[type=number]").fill("16")
        page.locator("#arena-max-new-tokens input[type=number]").blur()
        expect(page.locator("#arena-table")).to_contain_text("No vote yet")
        newest_and_its_base = page.locator("#arena-contestants .token")
        expect(newest_and_its_base).to_have_text([second.id, f"{second.id} · base"])
        page.locator("#arena-contestants input").fill(first.id)
        page.get_by_role("option", name=first.id, exact=True).click()
        page.keyboard.press("Escape")

        seen = []
        for number, button in enumerate(("Left is better", "Both bad", None), start=1):
            page.evaluate("window.sent = ''")
            page.locator("#arena-input textarea").fill(f"Question {number}")
            page.locator("#arena-input textarea").press("Enter")
            expect(page.locator("#arena-note")).to_contain_text("Which answer is better?", timeout=MINUTE)
            sent = page.evaluate("window.sent")
            assert "Which answer is better?" in sent
            shown = "".join(page.locator(part).inner_html() for part in ("#arena-columns", "#arena-ballot", "#arena-note", "#arena-bar"))
            assert f"Question {number}" in shown
            assert not [word for speaker in chosen for word in (speaker.id, speaker.name) if word in sent + shown]
            if button is None:
                page.reload()
                expect(page.locator("#arena-left .user")).to_contain_text("Question 3")
                expect(page.locator("#arena-contestants .token")).to_have_count(3)
                page.locator("#arena-columns").click()
                page.keyboard.press("3")
            else:
                page.get_by_role("button", name=button, exact=True).dblclick()
            expect(page.locator("#arena-note")).to_contain_text("Left was ", timeout=MINUTE)
            expect(page.locator("#arena-table .headline")).to_have_text("One vote" if number == 1 else f"{number} votes")
            assert "pair=" not in page.url
            seen.append(stand(page))
        assert len({tuple(rows) for rows in seen}) == 3

        with page.expect_download() as taken:
            page.locator("#arena-csv").click()
        lines = list(csv.DictReader(io.StringIO(Path(taken.value.path()).read_text("utf-8"))))
        assert [line["outcome"] for line in lines] == ["left", "both bad", "tie"]
        assert {line["left_speaker"] for line in lines} <= {speaker.id for speaker in chosen}
        assert page.faults == []  # type: ignore[attr-defined]
    assert len(Votes(workspace.root).all()) == 3
