"""Sample answers while a model trains: who is asked what and when, and that the training does not notice."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import chat_model

from qlora_ui import jobs
from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.engine import samples, tokens
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.train import train
from qlora_ui.events import Event, HeldOut, Sample, Step, Stopped
from qlora_ui.progress import Progress
from qlora_ui.runs import Run, Workspace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("samples")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json")


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{"max_steps": 5, "lora_dropout": 0.1, **values})
    jobs.execute(run, train)
    return run


@pytest.fixture(scope="module")
def sampled(place: tuple[Workspace, Path]) -> Run:
    return trained(place, sample_every=2)


def test_samples_come_before_the_first_step_every_so_many_and_at_the_end(sampled: Run) -> None:
    told = [event.step for event in tiny.events_of(sampled, Sample)]
    assert [step for step, _ in itertools.groupby(told)] == [0, 2, 4, 5]
    order = [type(event) for event in tiny.events_of(sampled, Sample, Step, HeldOut) if event.step == 2]
    assert [kind for kind, _ in itertools.groupby(order)] == [Step, Sample, HeldOut]


def test_the_prompts_are_held_out_questions_and_stay_the_same(sampled: Run) -> None:
    by_step: dict[int, list[str]] = {}
    for event in tiny.events_of(sampled, Sample):
        by_step.setdefault(event.step, []).append(event.prompt)
    assert len(by_step[0]) == 2  # as many as rows are held out
    assert all(prompt.startswith("Question ") for prompt in by_step[0])
    assert by_step[0] == by_step[2] == by_step[4] == by_step[5]


def test_the_base_answers_the_same_at_every_step_and_the_untrained_adapter_as_it_does(sampled: Run) -> None:
    answers = tiny.events_of(sampled, Sample)
    for prompt in {event.prompt for event in answers}:
        assert len({event.base for event in answers if event.prompt == prompt}) == 1
    assert [event.adapter for event in answers if event.step == 0] == [event.base for event in answers if event.step == 0]
    assert [event.adapter for event in answers if event.step == 5] != [event.base for event in answers if event.step == 5]


def test_the_last_samples_are_what_the_chat_answers(sampled: Run) -> None:
    model = chat_model(sampled)
    for event in (event for event in tiny.events_of(sampled, Sample) if event.step == 5):
        asked = [Message(role="user", content=event.prompt)]
        sides = [(model.speaker.base, asked), (model.speaker, asked)]
        *_, last = model.reply(sides, Sampling(temperature=0, max_new_tokens=samples.ANSWER_TOKENS))
        for text, sampled_text in zip(last.texts, (event.base, event.adapter), strict=True):
            assert sampled_text.startswith(text.strip().rstrip("\ufffd"))  # the chat waits for the other bytes of a torn character
            assert len(text) > 10


def test_the_training_is_bit_for_bit_the_same_without_samples(sampled: Run, place: tuple[Workspace, Path]) -> None:
    plain = trained(place)
    assert tiny.events_of(plain, Sample) == []
    for kind in (Step, HeldOut):
        assert [event.loss for event in tiny.events_of(plain, kind)] == [event.loss for event in tiny.events_of(sampled, kind)]
    weights, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (plain, sampled))
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_the_owners_prompts_are_asked_instead(place: tuple[Workspace, Path]) -> None:
    run = trained(place, sample_every=100, sample_prompts=" Who are you? \n\nWhat is 1?", held_out_share=0, max_steps=1)
    assert [(event.step, event.prompt) for event in tiny.events_of(run, Sample)] == [
        (step, prompt) for step in (0, 1) for prompt in ("Who are you?", "What is 1?")
    ]


def test_without_held_out_rows_the_first_training_rows_are_asked(place: tuple[Workspace, Path]) -> None:
    run = trained(place, sample_every=100, held_out_share=0, max_steps=1)
    assert len(tiny.events_of(run, Sample)) == 2 * samples.PROMPTS
    assert tiny.events_of(run, Sample)[0].prompt.startswith("Question 0")


def conversation(*turns: tuple[Any, str]) -> Conversation:
    return Conversation(row=1, messages=tuple(Message(role=role, content=content) for role, content in turns))


def test_only_short_questions_of_conversations_are_taken_from_rows() -> None:
    tokenizer = tiny.tiny_tokenizer()
    rows = [
        conversation((tokens.RAW_TEXT, "A text.")),
        conversation(("user", "Q" * 5000), ("assistant", "A")),
        conversation(("system", "S"), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")),
    ]
    (only,) = samples.prompts("", rows, tokenizer)
    assert [message.content for message in only] == ["S", "One?"]


def test_a_prompt_format_that_cannot_be_asked_in_is_told_and_the_run_goes_on(place: tuple[Workspace, Path]) -> None:
    template = (
        "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if messages[-1]['role'] != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
    )
    run = trained(place, sample_every=1, prompt_format="custom", chat_template=template, train_on="everything", max_steps=1)
    assert run.state() == "finished"
    assert tiny.events_of(run, Sample) == []
    assert [line for line in progress_of(run).log if "There are no sample answers" in line]


def progress_of(run: Run) -> Progress:
    progress = Progress("run")
    for event in tiny.events_of(run):
        progress.add(event)
    return progress


def test_samples_are_lines_of_the_log(sampled: Run) -> None:
    line = next(line for line in progress_of(sampled).log if "step 5  asked: Question" in line)
    assert "  ·  base: " in line
    assert "  ·  adapter: " in line


@pytest.mark.parametrize("step", [0, 2])
def test_stop_while_an_answer_is_written_takes_effect_at_the_next_token(
    place: tuple[Workspace, Path], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny.tiny_run(*place, max_steps=5, sample_every=2)
    lengths: list[int] = []
    asked = samples._Stopped.__call__

    def counted(criterion: Any, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        if len(tiny.events_of(run, Step)) == step and len(lengths) >= 3:
            run.ask("stop")
        told: torch.Tensor = asked(criterion, input_ids, scores, **kwargs)
        if told.any():
            lengths.append(-1)
        return told

    monkeypatch.setattr(samples._Stopped, "__call__", counted)
    jobs.execute(run, train)
    assert lengths.index(-1) == len(lengths) - 1  # nothing was written after the stop
    (end,) = tiny.events_of(run, Stopped)
    assert (end.step, end.adapter_saved) == (step, step > 0)
    assert [event.step for event in tiny.events_of(run, Sample) if event.step == step] == []


def test_an_answer_is_cut_at_its_end_token_and_bounded(place: tuple[Workspace, Path]) -> None:
    class Model:
        training, device = True, torch.device("cpu")

        def eval(self) -> None: ...

        def train(self, mode: bool) -> None: ...

        def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
            said = tokenizer("yes<|im_end|>no")["input_ids"]
            return torch.cat([input_ids, torch.tensor([said] * len(input_ids))], dim=1)

    tokenizer = tiny.tiny_tokenizer()
    said: list[Event] = []
    sampler = samples.Sampler(1, [(Message(role="user", content="a"),)], tokenizer, said.append, lambda: False)
    assert sampler._answers(Model()) == ["yes"]
