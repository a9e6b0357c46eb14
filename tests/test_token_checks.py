"""Mistakes with the tokens that begin, end and fill rows: each is found, told with its remedy, and nothing is told without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from qlora_ui import jobs
from qlora_ui.config import RunConfig
from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.preview import open_preview
from qlora_ui.engine.token_checks import padding, troubles
from qlora_ui.engine.train import train
from qlora_ui.events import Log
from qlora_ui.runs import Workspace

ROLES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
NEXT = "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


def conversation(*turns: str) -> Conversation:
    roles = ("user", "assistant") * len(turns)
    return Conversation(row=1, messages=tuple(Message(role=role, content=turn) for role, turn in zip(roles, turns, strict=False)))  # type: ignore[arg-type]


ROWS = [conversation("Question?", "Answer.", "And?", "More."), conversation("Q", "A")]


def tokenizer(template: str = "tokenizer", bos: str | None = None, adds_bos: bool = False) -> Any:
    found = tiny.tiny_tokenizer()
    tokens.set_prompt_format(found, template if template in (*tokens.TEMPLATES, "tokenizer") else "custom", template)
    if bos:
        found.bos_token = bos
    if adds_bos:
        id = found.convert_tokens_to_ids(found.bos_token)
        found.backend_tokenizer.post_processor = TemplateProcessing(single=f"{found.bos_token} $A", special_tokens=[(found.bos_token, id)])
        assert found("a")["input_ids"][0] == id
    return found


@pytest.mark.parametrize("template", ["tokenizer", "chatml", "guanaco", "alpaca"])
@pytest.mark.parametrize("train_on", ["assistant", "last", "everything"])
def test_nothing_is_wrong_with_the_formats_of_this_app(template: str, train_on: str) -> None:
    assert troubles(tokenizer(template), ROWS, train_on, [2]) == []


def test_a_system_prompt_that_the_template_adds_is_told_where_rows_have_none() -> None:
    own = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe nice.<|im_end|>\\n' }}{% endif %}"
    (said,) = troubles(tokenizer(own + tiny.CHAT_TEMPLATE), ROWS, "assistant")
    assert said.startswith("The prompt format puts a system prompt of its own before rows that have none ('<|im_start|>system\\nBe nice.")
    with_system = Conversation(row=1, messages=(Message(role="system", content="S"), *ROWS[0].messages))
    assert troubles(tokenizer(own + tiny.CHAT_TEMPLATE), [with_system], "assistant") == []


def test_turns_that_end_with_no_token_are_told() -> None:
    (said,) = troubles(tokenizer(ROLES + "\n" + NEXT), ROWS, "assistant")
    assert said.startswith("The assistant's turns end in ordinary text (… 'ant: Answer.')")
    assert "never taught a token to stop at" in said
    assert "{{ eos_token }}" in said


def test_an_end_that_this_tokenizer_writes_as_ordinary_text_is_told_with_its_remedy() -> None:
    template = ROLES + "{{ '<|eot|>' }}" + NEXT
    (said,) = troubles(tokenizer(template), ROWS, "assistant")
    assert "<|eot|>')" in said
    assert "add it to new_tokens" in said
    mended = tokenizer(template)
    tokens.add_new(mended, "<|eot|>")
    assert troubles(mended, ROWS, "assistant") == []


def test_only_turns_before_the_last_without_an_end_are_told_too() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + (eos_token if loop.last else '') }}"
        "{% endgeneration %}{% else %}{{ 'user: ' + m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    assert troubles(tokenizer(template), ROWS[1:], "assistant") == []
    assert len(troubles(tokenizer(template), ROWS, "assistant")) == 1


def test_rows_that_begin_twice_are_told() -> None:
    twice = "{{ bos_token }}" + ROLES + "{{ eos_token }}" + NEXT
    rows = [Conversation(row=1, messages=(Message(role="user", content="Q"), Message(role="assistant", content="A")))]
    assert troubles(tokenizer(twice, bos="<|im_start|>"), rows, "assistant") == []
    (said,) = troubles(tokenizer("{{ bos_token }}" + twice, bos="<|im_start|>"), rows, "assistant")
    assert said.startswith("Rows begin with <|im_start|> twice")
    text = [Conversation(row=1, messages=(Message(role="text", content="<|im_start|>A text."),))]
    assert troubles(tokenizer("chatml", bos="<|im_start|>"), text, "everything") == []
    assert len(troubles(tokenizer("chatml", bos="<|im_start|>", adds_bos=True), text, "everything")) == 1


def test_a_beginning_that_the_model_knows_and_the_template_does_not_write_is_told() -> None:
    (said,) = troubles(tokenizer(ROLES + "{{ eos_token }}" + NEXT, bos="<|im_start|>", adds_bos=True), ROWS, "assistant")
    assert said.startswith("This model knows texts that begin with <|im_start|>")
    assert "{{ bos_token }}" in said
    assert troubles(tokenizer("guanaco", bos="<|im_start|>", adds_bos=True), ROWS, "assistant") == []


def test_an_end_at_which_other_tools_would_not_stop_is_told() -> None:
    (said,) = troubles(tokenizer("chatml"), ROWS, "assistant", [0])
    assert "Turns end with <|im_end|> in this prompt format, but the model's generation settings stop at <|pad|> only" in said
    (said,) = troubles(tokenizer("chatml"), ROWS, "assistant", [50_256])
    assert "settings stop at token 50256, which the tokenizer does not have, only" in said
    assert "eos_token_id=2" in said
    assert troubles(tokenizer("chatml"), ROWS, "assistant", [0, 2]) == []


def test_a_template_that_hides_whose_text_it_is_is_no_trouble_when_everything_is_trained_on() -> None:
    rewriting = "{% for message in messages %}{{ messages | length ~ message['content'] }}{% endfor %}"
    assert troubles(tokenizer(rewriting), ROWS, "everything") == []


def test_raw_texts_have_no_turns_that_could_end_wrongly() -> None:
    text = Conversation(row=1, messages=(Message(role="text", content="A text."),))
    assert troubles(tokenizer("chatml"), [text], "assistant", [2]) == []


def test_what_rows_are_padded_with_is_told_and_why_an_end_may_serve() -> None:
    own = tokenizer()
    assert padding(own) == "Rows are padded with <|pad|>"
    own.pad_token = own.eos_token
    assert "masked by its place" in padding(own)
    assert "new_tokens pad=<|pad|>" in padding(own)


def test_the_preview_tells_what_the_run_will(tmp_path: Path) -> None:
    data = RunConfig().with_values({"prompt_format": "custom", "chat_template": ROLES + NEXT}).data
    preview = open_preview(tiny.tiny_tokenizer(), ROWS, "", data, tmp_path, lambda: False, lambda done: None)
    assert list(preview.troubles) == troubles(preview.tokenizer, ROWS, "assistant")
    assert len(preview.troubles) == 1


def test_a_run_tells_it_in_its_log_and_goes_on(tiny_workspace: Workspace, rows: Path) -> None:
    run = tiny.tiny_run(tiny_workspace, rows, prompt_format="custom", chat_template=ROLES + NEXT, max_steps=1)
    jobs.execute(run, train)
    assert run.state() == "finished"
    logged = {event.text: event.level for event in tiny.events_of(run, Log)}
    (said,) = (text for text in logged if "never taught a token to stop at" in text)
    assert logged[said] == "warning"
    assert logged["Rows are padded with <|pad|>"] == "info"
