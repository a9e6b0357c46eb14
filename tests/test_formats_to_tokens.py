"""From a row of any format to trained tokens in any template: what is trained is what the row's assistant says, and its end token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import LONG, tokenizer_in, trained_texts

from qlora_ui.data.formats import FORMATS, detect, to_conversations
from qlora_ui.engine.tokens import TEMPLATES, encode

# Blanks at the ends are the business of each format, and marks would be markers of turns.
said = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="#<>:|"), min_size=1, max_size=20)


def row_of(format: str, question: str, answer: str) -> dict[str, Any]:
    """A row that says this in the format."""
    turns = [("user", question), ("assistant", answer)]
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [{"role": role, "content": content} for role, content in turns]},
        "sharegpt": {"conversations": [{"from": {"user": "human"}.get(role, "gpt"), "value": content} for role, content in turns]},
        "instances": {"instruction": question, "instances": [{"instruction_with_input": question, "output": answer}]},
        "alpaca": {"instruction": question, "input": "", "output": answer},
        "prompt-completion": {"prompt": question, "completion": answer},
        "question-answer": {"question": question, "answer": answer},
        "guanaco": {"text": f"### Human: {question}\n### Assistant: {answer}"},
        "chip2": {"text": f"<human>: {question}\n<bot>: {answer}\n"},
        "hh-rlhf": {"chosen": f"\n\nHuman: {question}\n\nAssistant: {answer}", "rejected": ""},
        "text": {"text": answer},
    }
    return rows[format]


@pytest.mark.parametrize("prompt_format", ["tokenizer", *TEMPLATES])
@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=30)
@given(question=said, answer=said)
def test_what_is_trained_is_what_the_row_answers(format: str, prompt_format: str, question: str, answer: str) -> None:
    tokenizer = tokenizer_in(prompt_format)
    row = row_of(format, question, answer)
    assert detect(row) == format
    (messages,) = to_conversations(row, format)
    (trained,) = trained_texts(tokenizer, encode(tokenizer, messages, "assistant", LONG))
    assert trained.removeprefix(" ") == f"{answer}{tokenizer.eos_token}"
