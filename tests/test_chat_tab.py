"""The Chat tab in a real Chromium over a tiny model: ask, retry, edit, undo, reload, compare, take away; and its engine's part."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import tiny
from playwright.sync_api import Browser, Page, expect
from serving import go, open_page, served
from training import chat_model, trained

from qlora_ui import services
from qlora_ui.data.formats import Message
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.decoding import Answers, Sampling
from qlora_ui.errors import UserError
from qlora_ui.runs import Run, Workspace
from qlora_ui.talking import Side
from qlora_ui.ui import chat_tab, chat_turns, conversations

MINUTE = 60_000
KEPT = "localStorage.getItem('qlora-ui-chat')"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("chat")
    workspace = Workspace.open(home / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return trained(workspace, tiny.tiny_rows(home / "rows.json"), max_steps=2)


@pytest.fixture(scope="module")
def model(run: Run) -> ChatModel:
    return chat_model(run)


def turns(*said: str) -> list[Message]:
    return [Message(role=role, content=words) for role, words in zip(("user", "assistant") * len(said), said, strict=False)]


def test_the_oldest_turns_leave_a_full_context_aloud_and_the_system_prompt_stays(model: ChatModel) -> None:
    long = [Message(role="system", content="Be brief."), *turns("a" * 200, "b" * 200, "c" * 100, "d" * 100, "last question")]
    *_, answers = model.reply([(model.speaker, long)], Sampling(temperature=0, max_new_tokens=20))
    assert (answers.left_out, answers.context_limit) == (2, 512)
    assert answers.context <= 512 - 20
    short = [long[0], *long[3:]]
    *_, expected = model.reply([(model.speaker, short)], Sampling(temperature=0, max_new_tokens=20))
    assert (answers.texts, expected.left_out) == (expected.texts, 0)


def test_top_k_of_one_is_greedy_and_a_repetition_penalty_changes_the_answer(model: ChatModel) -> None:
    def said(**values: float) -> str:
        *_, last = model.reply([(model.speaker, turns("Question 3"))], Sampling(max_new_tokens=24, **values))  # type: ignore[arg-type]
        return last.texts[0]

    greedy = said(temperature=0)
    assert said(temperature=2, top_p=1, top_k=1) == greedy
    assert said(temperature=0, repetition_penalty=0.1) != greedy  # it repeats now
    with pytest.raises(UserError, match="repetition_penalty is 0"):
        Sampling(repetition_penalty=0)


class Says:
    """A chat whose answers are these words, and nothing of how they came to be."""

    faster = False

    def __init__(self, *words: str) -> None:
        self.words, self.asked = words, list[list[list[str]]]()

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        self.asked.append([[message.content for message in conversation] for _, conversation in sides])
        texts = self.words[: len(sides)]
        yield Answers(texts=texts, tokens=sum(map(bool, texts)), seconds=0.1, context=9, context_limit=512, left_out=0)

    def release(self) -> None:
        pass


SETTINGS = ("", 0, 1, 0, 1, 20, 0)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_an_answer_that_ends_at_once_has_its_turn_and_is_nothing_to_the_next(run: Run) -> None:
    chat = Says("", "")
    page = replace(services.build(run.workspace, services.WarmUp()), chat=chat)
    *_, (tuned, _base, note, *_) = chat_turns.answer(page, chat_turns.Wish(), run.id, "One", False, [], [], *SETTINGS)
    assert tuned == [turn("user", "One"), turn("assistant", chat_turns.EMPTY)]
    assert "0 tokens" in note
    list(chat_turns.answer(page, chat_turns.Wish(), run.id, "Two", False, tuned, [], *SETTINGS))
    assert chat.asked[1] == [["One", "", "Two"]]


def test_the_base_is_asked_what_the_tuned_side_is_asked_however_late_it_joins(run: Run) -> None:
    chat, wish = Says("Tuned.", "Base."), chat_turns.Wish()
    page = replace(services.build(run.workspace, services.WarmUp()), chat=chat)
    changed, old = [turn("user", "Changed"), turn("assistant", "A")], [turn("user", "First"), turn("assistant", "B")]
    assert chat_tab.switch_compare(True, wish, changed, old)["value"] == changed
    assert "value" not in chat_tab.switch_compare(True, wish, changed, changed)
    wish.is_answered = False
    assert "value" not in chat_tab.switch_compare(True, wish, changed, old)
    wish.is_answered = True
    list(chat_turns.answer(page, wish, run.id, "Two", True, changed, old, *SETTINGS))
    assert chat.asked == [[["Changed", "A", "Two"]] * 2]
    assert wish.is_answered


def test_a_question_is_asked_once_however_often_it_is_pressed_and_one_to_another_conversation_waits_aloud(run: Run) -> None:
    chat, wish = Says("Yes."), chat_turns.Wish()
    page = replace(services.build(run.workspace, services.WarmUp()), chat=chat)
    first = chat_turns.answer(page, wish, run.id, "One", False, [], [], *SETTINGS)
    next(first)
    assert list(chat_turns.answer(page, wish, run.id, "One", False, [], [], *SETTINGS)) == [[gr.skip()] * 6]
    chat_turns.show_instead(wish, [turn("user", "Other")], [])
    [(_, _, note, *_)] = chat_turns.answer(page, wish, run.id, "Two", False, [], [], *SETTINGS)
    assert chat_turns.STILL_ENDING in note
    *_, last = first
    assert (last[0], last[-2:]) == ([turn("user", "Other")], chat_turns.READY)
    list(chat_turns.answer(page, wish, run.id, "Two", False, [turn("user", "Other")], [], *SETTINGS))
    assert chat.asked == [[["One"]], [["Other", "Two"]]]


class BreaksOff(Says):
    """A chat whose answer breaks off before its first word."""

    def reply(self, sides: Sequence[Side], sampling: Sampling) -> Iterator[Answers]:
        raise RuntimeError
        yield


@pytest.mark.parametrize("ends", ["error", "stop"])
def test_a_retry_or_a_change_without_an_answer_leaves_what_was_there(run: Run, ends: str) -> None:
    page = replace(services.build(run.workspace, services.WarmUp()), chat=BreaksOff() if ends == "error" else Says(""))
    tuned = [turn("user", "One"), turn("assistant", "A"), turn("user", "Two"), turn("assistant", "B")]
    base = [turn("user", "One"), turn("assistant", "C"), turn("user", "Two"), turn("assistant", "D")]
    change = gr.EditData(None, {"index": 0, "value": "Changed", "previous_value": "One"})
    for again in (
        lambda wish: chat_turns.retry(page, wish, run.id, "", True, tuned, base, *SETTINGS),
        lambda wish: chat_turns.ask_instead(page, change, wish, run.id, "", True, [turn("user", "Changed"), *tuned[1:]], base, *SETTINGS),
    ):
        wish, shown = chat_turns.Wish(), list[list[Any]]()
        for shown_now in again(wish):
            shown.append(shown_now)
            wish.stop = ends == "stop"
        assert shown[-1][:2] == [tuned, base]
        assert ("The answer broke off: RuntimeError." in shown[-1][2]) is (ends == "error")
    assert shown[-1][3] == "Changed"


def test_the_last_word_of_an_answer_loses_nothing_though_it_comes_before_the_conversation_that_was_opened(run: Run) -> None:
    page, wish = services.build(run.workspace, services.WarmUp()), chat_turns.Wish()
    said = [turn("user", "One"), turn("assistant", "Half an ans")]
    (*_, kept, new, _) = chat_tab.begin(page, run.id, wish, {}, "old", said, [])
    assert wish.instead == ([], [])
    for late in (
        chat_tab.kept_now(run.id, wish, {}, "old", [], []),
        chat_tab.begin(page, run.id, wish, {}, "old", [], []),  # a double click
        chat_tab.choose(page, "old", wish, kept, "older", [], []),
    ):
        assert late == [gr.skip()] * len(late)
    kept, *_ = chat_tab.kept_now(run.id, wish, kept, new, [turn("user", "Two")], [])
    assert [conversation["tuned"] for conversation in kept["all"]] == [[turn("user", "Two")], said]


def test_to_leave_the_list_without_choosing_ends_no_answer(run: Run) -> None:
    page, wish = services.build(run.workspace, services.WarmUp()), chat_turns.Wish(is_answered=False)
    said = [turn("user", "One")]
    kept = conversations.keep({}, "open", run.id, said, [])
    for wanted, current, there in ((conversations.NEW, "new", {}), ("open", "open", kept)):
        assert chat_tab.choose(page, wanted, wish, there, current, said, []) == chat_tab.UNCHANGED
        assert not wish.stop


def test_a_question_whose_page_was_left_before_its_answer_is_there_again_to_be_sent(run: Run) -> None:
    page, wish = services.build(run.workspace, services.WarmUp()), chat_turns.Wish()
    said = [turn("user", "One"), turn("assistant", "A")]
    kept, current, _ = chat_tab.kept_asking(" Two ", run.id, wish, {}, "", said, [])
    assert current == kept["open"]
    assert chat_tab.open_speaker(kept) == run.id
    who, tuned, _, note, text, *_ = chat_tab.restored(page, kept)
    assert (who["value"], tuned, text) == (run.id, said, "Two")
    assert chat_tab.LEFT in note
    wish.is_answered = False
    assert chat_tab.kept_asking("Two", run.id, wish, kept, current, said, []) == [gr.skip()] * 3  # pressed twice
    assert chat_tab.kept_asking(" ", run.id, chat_turns.Wish(), kept, current, said, []) == [gr.skip()] * 3


def spoken(page: Page, column: str = "#chat-tuned") -> list[str]:
    return page.locator(f"{column} .message").all_inner_texts()


def ask(page: Page, words: str) -> None:
    page.locator("#chat-input textarea").fill(words)
    page.locator("#chat-send").click()
    answered(page)


def answered(page: Page) -> None:
    expect(page.locator("#chat-note")).to_contain_text("tokens/s", timeout=MINUTE)
    expect(page.locator("#chat-send")).to_be_enabled(timeout=MINUTE)


@pytest.mark.browser
def test_a_conversation_is_retried_changed_taken_back_kept_over_a_reload_and_taken_away(browser: Browser, run: Run, tmp_path: Path) -> None:
    with served(run.workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Chat")
        ask(page, "Question 1")
        expect(page.locator("#chat-note")).to_contain_text("of 512")
        expect(page.locator("#chat-note")).to_contain_text("seed 0")
        column = page.locator("#chat-tuned")

        column.get_by_label("Retry").last.click()
        expect(page.locator("#chat-note")).to_contain_text("seed 1", timeout=MINUTE)
        expect(page.locator("#chat-seed input")).to_have_value("1")
        expect(page.locator("#chat-send")).to_be_enabled(timeout=MINUTE)
        expect(column.locator(".user")).to_have_count(1)

        page.locator("#chat-seed input").fill("7")
        page.locator("#chat-seed input").blur()
        column.get_by_label("Edit").first.click()
        column.locator("textarea").fill("Question 2")
        kept = page.evaluate(KEPT)  # the retried answer's: it was written long ago
        column.get_by_label("Submit").click()
        expect(column.locator(".user").first).to_contain_text("Question 2")
        expect(page.locator("#chat-note")).to_contain_text("seed 7", timeout=MINUTE)
        expect(page.locator("#chat-send")).to_be_enabled(timeout=MINUTE)
        page.wait_for_function(f"kept => ({KEPT}) !== kept", arg=kept)
        expect(column.locator(".user")).to_have_count(1)

        page.reload()
        go(page, "Chat")
        expect(column.locator(".user").first).to_contain_text("Question 2")
        with page.expect_download() as taken:
            page.locator("#chat-json").click()
        written = json.loads(Path(taken.value.path()).read_text("utf-8"))
        assert written["speaker"] == run.id
        assert [turn["role"] for turn in written["tuned"]] == ["user", "assistant"]

        column.get_by_label("Undo").last.click()
        expect(page.locator("#chat-input textarea")).to_have_value("Question 2")
        expect(column.locator(".user")).to_have_count(0)
        assert page.faults == []  # type: ignore[attr-defined]


@pytest.mark.browser
def test_examples_conversations_and_speakers_are_chosen_and_an_adapter_is_brought_in_a_zip(
    browser: Browser, run: Run, tmp_path: Path
) -> None:
    archive = shutil.make_archive(str(tmp_path / "mine"), "zip", run.adapter)
    with served(run.workspace.root) as app:
        page = open_page(browser, app.url)
        go(page, "Chat")
        column, kept, who = page.locator("#chat-tuned"), page.locator("#chat-kept input"), page.locator("#run-select input")
        expect(column.locator(".example")).to_have_count(9)
        column.locator(".example").filter(has_text="Fermi").click()
        expect(column.locator(".user").first).to_contain_text("piano keys")
        answered(page)
        expect(kept).to_have_value(re.compile("About how many piano keys"))

        choose(page, "#run-select", f"{run.id} · step 2")  # a conversation of its own
        expect(column.locator(".user")).to_have_count(0)
        expect(kept).to_have_value("New conversation")
        expect(page.locator("#chat-about")).to_contain_text("An adapter on tiny in 4 bits (NF4)")
        ask(page, "Who are you?")
        expect(kept).to_have_value("Who are you?")

        page.get_by_role("button", name="Bring an adapter or a model").click()
        page.locator("#bring-kind").get_by_text("Adapter in a zip").click()
        page.locator("#bring-file input[type=file]").set_input_files(archive)
        expect(page.locator("#bring-file")).to_contain_text(re.compile(r"mine\s*\.zip"))
        page.locator("#bring-press").click()
        expect(who).to_have_value(re.compile("^mine-"))
        expect(column.locator(".user")).to_have_count(0)
        ask(page, "And you?")
        expect(kept).to_have_value("And you?")

        page.reload()
        go(page, "Chat")
        expect(who).to_have_value(re.compile("^mine-"))
        expect(column.locator(".user").first).to_contain_text("And you?")
        expect(kept).to_have_value("And you?")
        expect(page.locator("#chat-about")).to_contain_text("An adapter on tiny in 4 bits (NF4)")
        kept.click()
        expect(page.get_by_role("option")).to_have_text([re.compile(words) for words in ("New", "And you", "Who are", "About how")])
        page.get_by_role("option", name="Who are you?").click()
        expect(who).to_have_value(f"{run.id} · step 2")
        expect(kept).to_have_value("Who are you?")
        expect(column.locator(".user").first).to_contain_text("Who are you?")
        page.locator("#chat-delete").click()
        expect(column.locator(".user")).to_have_count(0)
        kept.click()
        expect(page.get_by_role("option")).to_have_count(3)
        assert page.faults == []  # type: ignore[attr-defined]


def choose(page: Page, select: str, option: str) -> None:
    page.locator(f"{select} input").click()
    page.get_by_role("option", name=option).click()
