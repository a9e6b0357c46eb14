"""Any speakers in one reply: those of one base out of one model in memory, those of another after it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from training import Watched, trained

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.engine import chat
from qlora_ui.engine.decoding import Answers, Sampling
from qlora_ui.errors import UserError
from qlora_ui.runs import Run, Workspace
from qlora_ui.speakers import Speaker
from qlora_ui.talking import EngineChat

QUESTION = [Message(role="user", content="Question 3: which word is 3?")]
GREEDY = Sampling(temperature=0, max_new_tokens=16)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, finished: Watched) -> Workspace:
    """A finished run of 8 steps with its checkpoints, and a second base."""
    workspace = Workspace.open(tmp_path_factory.mktemp("talking") / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    tiny.tiny_model(workspace.models / "untied", tied=False)
    shutil.copytree(finished.run.folder, workspace.runs / finished.run.id)
    return workspace


@pytest.fixture(scope="module")
def first(home: Workspace) -> Run:
    return next(run for run in home.all() if run.config().data.prompt_format == "chatml")


@pytest.fixture(scope="module")
def second(home: Workspace, finished: Watched) -> Run:
    """Another run on the same base, asked in another format."""
    data = Path(finished.run.config().data.data)
    return trained(home, data, prompt_format="guanaco", max_steps=6, eval_steps=100, save_steps=100, warmup_ratio=0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that are loaded, one after the other."""
    names: list[str] = []
    load = chat.load_quantized

    def counted(found: Any, *others: Any) -> Any:
        names.append(found.folder.name)
        return load(found, *others)

    monkeypatch.setattr(chat, "load_quantized", counted)
    return names


def said(talk: EngineChat, *who: Speaker) -> tuple[str, ...]:
    return list(talk.reply([(speaker, QUESTION) for speaker in who], GREEDY))[-1].texts


def test_speakers_of_one_base_answer_together_as_they_do_alone_and_it_is_loaded_once(
    home: Workspace, first: Run, second: Run, loaded: list[str]
) -> None:
    one, other, early = speakers.of_run(first), speakers.of_run(second), speakers.of_run(first, 6)
    bare = dataclasses.replace(speakers.of_model(home, tiny.NAME), quantization=one.quantization)
    alone = [said(EngineChat(home), speaker)[0] for speaker in (one, other, one.base, early, bare)]
    assert len({*alone[:3]}) == 3
    loaded.clear()
    talk = EngineChat(home)
    assert said(talk, one, other) == (alone[0], alone[1])
    assert said(talk, one.base, early, one, bare, other) == (alone[2], alone[3], alone[0], alone[4], alone[1])
    assert loaded == [tiny.NAME]


def test_a_speaker_of_another_base_answers_after_the_first_and_what_is_waited_for_is_said(
    home: Workspace, first: Run, loaded: list[str]
) -> None:
    one, other = speakers.of_run(first), speakers.of_model(home, "untied")
    talk = EngineChat(home)
    seen = list(talk.reply([(other, QUESTION), (one, QUESTION), (one.base, QUESTION)], GREEDY))
    assert loaded == ["untied", tiny.NAME]
    assert list(dict.fromkeys(answers.note for answers in seen if answers.note.endswith("…"))) == ["Loading untied…", "Loading tiny…"]
    half = next(answers for answers in seen if answers.texts[1])
    assert half.texts[0] == seen[-1].texts[0] == said(talk, other)[0]  # it stays while the others answer
    assert seen[-1].texts[1:] == said(talk, one, one.base)
    for before, after in itertools.pairwise(seen):
        assert after.tokens >= before.tokens
        assert after.seconds >= before.seconds


def test_the_model_in_memory_answers_first_whatever_the_order(home: Workspace, first: Run, loaded: list[str]) -> None:
    one, other = speakers.of_run(first), speakers.of_model(home, "untied")
    talk = EngineChat(home)
    expected = said(talk, one)
    assert said(talk, other, one)[1] == expected[0]
    assert said(talk, one, other)[0] == expected[0]
    assert loaded == [tiny.NAME, "untied", tiny.NAME]


def test_other_bits_are_another_model_and_an_adapter_that_was_trained_on_is_loaded_anew(
    home: Workspace, first: Run, loaded: list[str]
) -> None:
    one = speakers.of_run(first)
    talk = EngineChat(home)
    said(talk, one, one.base)
    whole = dataclasses.replace(one.base, quantization=dataclasses.replace(one.quantization, quant_bits="16"))
    said(talk, whole)
    assert loaded == [tiny.NAME, tiny.NAME]
    before = said(talk, one)
    shutil.copyfile(first.folder / "checkpoint-6" / "adapter_model.safetensors", first.adapter / "adapter_model.safetensors")
    assert said(talk, one) == said(talk, speakers.of_run(first, 6)) != before
    shutil.copyfile(first.folder / "checkpoint-8" / "adapter_model.safetensors", first.adapter / "adapter_model.safetensors")
    assert said(talk, one) == before
    assert loaded == [tiny.NAME] * 3


def test_an_adapter_of_another_model_is_refused_and_the_next_answer_is_right(home: Workspace, first: Run, loaded: list[str]) -> None:
    one = speakers.of_run(first)
    talk = EngineChat(home)
    expected = said(talk, one)
    weights = first.folder / "checkpoint-6" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-9] + b"something")
        with pytest.raises(UserError, match=r"step 6 cannot be used: adapter_model.safetensors is not what was written"):
            said(talk, one, speakers.of_run(first, 6))
    finally:
        weights.write_bytes(kept)
    misfit = shutil.copytree(first.adapter, home.root / "adapters" / "misfit")
    config = misfit / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    with pytest.raises(UserError, match="The adapter misfit does not fit this base model"):
        said(talk, dataclasses.replace(one, id="adapter:misfit", adapter=misfit))
    assert said(talk, one) == expected


def test_a_base_without_a_chat_template_is_asked_in_guanacos_format_aloud(home: Workspace) -> None:
    shutil.copytree(home.models / tiny.NAME, home.models / "plain")
    (home.models / "plain" / "chat_template.jinja").unlink()
    bare = speakers.of_model(home, "plain")
    *_, answers = EngineChat(home).reply([(bare, QUESTION)], GREEDY)
    assert answers.note == "plain · base has no chat template: it is asked in Guanaco's format."
    guanaco = dataclasses.replace(bare, prompt_format="guanaco")
    *_, expected = EngineChat(home).reply([(guanaco, QUESTION)], GREEDY)
    assert (expected.texts, expected.note) == (answers.texts, "")


def test_a_page_that_goes_away_while_the_model_loads_ends_the_loading(home: Workspace, first: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_to_stop: list[bool] = []
    begun = threading.Event()

    def endless(found: Any, quantization: Any, hardware: Any, emit: Any, should_stop: Any) -> Any:
        begun.set()
        while not should_stop():
            pass
        asked_to_stop.append(True)
        raise RuntimeError("stopped on the way")

    monkeypatch.setattr(chat, "load_quantized", endless)
    talk = EngineChat(home)
    answers: Iterator[Answers] = talk.reply([(speakers.of_run(first), QUESTION)], GREEDY)
    assert any(news.note == "Loading tiny…" for news in answers)
    assert begun.wait(timeout=10)
    answers.close()  # type: ignore[attr-defined]
    monkeypatch.undo()
    assert said(talk, speakers.of_run(first))[0]
    assert asked_to_stop == [True]
