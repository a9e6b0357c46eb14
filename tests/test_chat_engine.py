"""Answers out of one model in memory: the adapter's and the base's, streamed, stopped, and after an error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from training import chat_model

from qlora_ui import jobs
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.decoding import Answers, Sampling
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, load_quantized
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.runs import Run, Workspace

QUESTION = [Message(role="user", content="Question 3: which word is 3?")]
OTHER = [
    Message(role="user", content="Hi"),
    Message(role="assistant", content="The answer is"),
    Message(role="user", content="which word?"),
]
GREEDY = Sampling(temperature=0, max_new_tokens=40)


def never() -> bool:
    return False


def silent(event: Event) -> None:
    pass


def learned(workspace: Workspace, data: Path, **values: Any) -> Run:
    run = tiny.tiny_run(workspace, data, **values)
    jobs.execute(run, train)
    assert run.state() == "finished"
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run long enough for the adapter to answer in another way than the base."""
    folder = tmp_path_factory.mktemp("chat")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return learned(workspace, tiny.tiny_rows(folder / "rows.json"), max_steps=30, eval_steps=100, save_steps=100)


@pytest.fixture(scope="module")
def model(run: Run) -> ChatModel:
    return chat_model(run)


def last(answers: Iterator[Answers]) -> Answers:
    return list(answers)[-1]


def said(model: ChatModel, side: str, messages: list[Message] = QUESTION, sampling: Sampling = GREEDY) -> str:
    speaker = {"adapter": model.speaker, "base": model.speaker.base}[side]
    return last(model.reply([(speaker, messages)], sampling)).texts[0]


def plainly(run: Run, model: ChatModel, messages: list[Message]) -> str:
    """What transformers alone generates from the quantized base, which never saw an adapter."""
    config = run.config()
    found = find_here(config.model.model, "main", run.workspace.models)
    assert found is not None
    base = load_quantized(found, config.quantization, detect("float32"), silent, never).eval()
    asked = model.tokenizer(tokens.prompt(model.tokenizer, messages), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        answer = base.generate(**asked, do_sample=False, max_new_tokens=40, eos_token_id=model.end_ids)[0, asked["input_ids"].shape[1] :]
    return str(model.tokenizer.decode(answer, skip_special_tokens=True))


def wait_for_its_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "answer":
            thread.join(timeout=5)
            assert not thread.is_alive()


@pytest.mark.parametrize("messages", [QUESTION, OTHER])
def test_the_base_side_of_a_pair_is_the_plain_model(run: Run, model: ChatModel, messages: list[Message]) -> None:
    both = last(model.reply([(model.speaker, messages), (model.speaker.base, messages)], GREEDY)).texts
    assert both[1] == plainly(run, model, messages)
    assert both[0] != both[1]


def test_each_side_of_a_pair_answers_as_it_does_alone_also_in_the_other_order(model: ChatModel) -> None:
    alone = (said(model, "adapter"), said(model, "base"))
    assert alone[0].startswith("The answer is")
    assert last(model.reply([(model.speaker, QUESTION), (model.speaker.base, QUESTION)], GREEDY)).texts == alone
    assert last(model.reply([(model.speaker.base, QUESTION), (model.speaker, QUESTION)], GREEDY)).texts == (alone[1], alone[0])
    assert (said(model, "adapter"), said(model, "base")) == alone


def test_conversations_of_different_length_share_a_batch(model: ChatModel) -> None:
    assert last(model.reply([(model.speaker, OTHER), (model.speaker, QUESTION)], GREEDY)).texts == (
        said(model, "adapter", OTHER),
        said(model, "adapter", QUESTION),
    )


def test_an_answer_only_grows_and_counts_its_tokens(model: ChatModel) -> None:
    seen = list(model.reply([(model.speaker, QUESTION)], GREEDY))
    assert len(seen) > 5
    for before, after in itertools.pairwise(seen):
        assert after.texts[0].startswith(before.texts[0])
        assert after.tokens >= before.tokens
        assert after.seconds > before.seconds
    whole = model.tokenizer(seen[-1].texts[0], add_special_tokens=False)["input_ids"]
    assert seen[-1].tokens >= len(whole)
    assert "<|im_end|>" not in seen[-1].texts[0]


def test_an_answer_ends_with_its_turn_in_the_runs_own_prompt_format(tiny_workspace: Workspace, rows: Path) -> None:
    run = learned(tiny_workspace, rows, prompt_format="guanaco", max_steps=30, eval_steps=100, save_steps=100)
    model = chat_model(run)
    assert tokens.prompt(model.tokenizer, QUESTION) == "### Human: Question 3: which word is 3?\n### Assistant:"
    answers = last(model.reply([(model.speaker, QUESTION)], Sampling(temperature=0, max_new_tokens=400)))
    assert answers.texts[0].startswith("The answer is")  # without the format's blank, which the next turn would double
    assert "#" not in answers.texts[0]
    assert answers.tokens < 400


def test_the_same_seed_draws_the_same_answer_and_another_does_not(model: ChatModel) -> None:
    drawn = [said(model, "base", sampling=Sampling(temperature=1.5, max_new_tokens=20, seed=seed)) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_closing_the_answer_ends_the_generation(model: ChatModel) -> None:
    drawn = 0

    def count(*_: Any) -> None:
        nonlocal drawn
        drawn += 1

    hook = model.model.get_base_model().lm_head.register_forward_pre_hook(count)
    answers = model.reply([(model.speaker.base, QUESTION), (model.speaker.base, OTHER)], Sampling(temperature=1, max_new_tokens=400))
    next(answers)
    begun = drawn
    answers.close()  # type: ignore[attr-defined]
    wait_for_its_end()
    hook.remove()
    assert drawn - begun <= 2
    assert said(model, "adapter").startswith("The answer is")


def test_an_error_while_generating_is_raised_and_the_next_answer_is_right(model: ChatModel) -> None:
    expected = said(model, "adapter")
    calls = 0

    def break_at_the_third_token(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("the device fell over")

    hook = model.model.get_base_model().lm_head.register_forward_pre_hook(break_at_the_third_token)
    seen = []
    with pytest.raises(RuntimeError, match="the device fell over"):
        seen.extend(model.reply([(model.speaker, QUESTION), (model.speaker.base, QUESTION)], GREEDY))
    hook.remove()
    assert len(seen) == 2
    wait_for_its_end()
    assert said(model, "adapter") == expected


def test_answers_asked_for_at_once_do_not_mix(model: ChatModel) -> None:
    expected = {side: said(model, side) for side in ("adapter", "base")}
    heard: list[tuple[str, str]] = []
    asking = [threading.Thread(target=lambda side=side: heard.append((side, said(model, side)))) for side in ("adapter", "base") * 3]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(heard) == 6
    assert [(side, text) for side, text in heard if text != expected[side]] == []


def test_a_conversation_longer_than_the_model_reads_is_refused_and_a_long_one_gets_the_room_left(model: ChatModel) -> None:
    with pytest.raises(UserError, match="longer than the model can read"):
        said(model, "adapter", [Message(role="user", content="x" * 600)])
    asked = [Message(role="user", content="x" * 470)]
    room = 512 - len(model.tokenizer(tokens.prompt(model.tokenizer, asked))["input_ids"])
    assert 0 < room < 40
    assert last(model.reply([(model.speaker.base, asked)], Sampling(temperature=1, max_new_tokens=400))).tokens <= room


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", 1e9),
        ("top_p", 1.1),
        ("top_p", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", -5),
        ("seed", -1),
        ("seed", 2**70),
    ],
)
def test_a_sampling_value_out_of_bounds_is_refused_with_its_name(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{name} is {value}: it must be from \d+ to \d+\.$") as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.field == name


def test_a_run_without_an_adapter_cannot_be_talked_to(tiny_workspace: Workspace) -> None:
    run = tiny.tiny_run(tiny_workspace, "rows.json")
    with pytest.raises(UserError, match=f"{run.id} has no adapter yet") as caught:
        chat_model(run)
    assert caught.value.field == "run"


def test_only_safetensors_are_read(run: Run, tmp_path: Path, tiny_workspace: Workspace) -> None:
    other = tiny.tiny_run(tiny_workspace, "rows.json")
    for name in ("adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (other.adapter).mkdir(exist_ok=True)
        (other.adapter / name).write_bytes((run.adapter / name).read_bytes())
    torch.save({}, other.adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        chat_model(other)
