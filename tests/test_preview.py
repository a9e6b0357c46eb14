"""What is shown before Start is what training does: the same tokens, the same cut, the same padding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_tokens
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import CUSTOM, FORMATS, spoken, talk, tokenizer_in

from qlora_ui.config import DataConfig
from qlora_ui.data.checks import Conversation
from qlora_ui.engine.preview import Piece, Preview, RowView, open_preview
from qlora_ui.engine.tokenized import fit, tokenize
from qlora_ui.engine.tokens import IGNORED, Collator
from qlora_ui.errors import UserError

LONG = 100_000
FEW = settings(max_examples=15)


def never() -> bool:
    return False


def nothing(done: int) -> None:
    pass


def preview_of(*rows: Sequence[Any], prompt_format: str = "chatml", train_on: str = "assistant") -> Preview:
    """Of rows numbered 2, 4, 6 in their source."""
    conversations = [Conversation(row=2 * number, messages=tuple(row)) for number, row in enumerate(rows, 1)]
    tokenizer = tokenizer_in(prompt_format)
    return Preview(tokenizer, conversations, tokenize(tokenizer, conversations, train_on, never, nothing), train_on)


def joined(view: RowView, **kind: bool) -> str:
    return "".join(piece.text for piece in view.pieces if all(getattr(piece, name) == value for name, value in kind.items()))


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
@given(messages=test_tokens.conversations())
def test_what_is_highlighted_is_what_the_assistant_says_and_its_end_token(prompt_format: str, messages: list[Any]) -> None:
    preview = preview_of(messages, prompt_format=prompt_format)
    (view,) = preview.views([0], LONG, "truncate")
    assert joined(view, trained=True) == "".join(spoken(prompt_format, messages))
    assert joined(view) == test_tokens.tokens.render(preview.tokenizer, messages)[0]
    assert all(piece.text in tiny.SPECIAL for piece in view.pieces if piece.special)
    assert not any(special in piece.text for special in tiny.SPECIAL for piece in view.pieces if not piece.special)
    assert not any(piece.cut for piece in view.pieces)


@FEW
@given(
    rows=st.lists(test_tokens.conversations(), min_size=1, max_size=4),
    train_on=st.sampled_from(["assistant", "last", "everything"]),
    max_seq_len=st.integers(2, 90),
    long_rows=st.sampled_from(["truncate", "drop", "split"]),
)
def test_the_numbers_shown_are_those_of_what_training_is_fed(rows: list[Any], train_on: str, max_seq_len: int, long_rows: str) -> None:
    preview = preview_of(*rows, train_on=train_on)
    fed = fit(preview.tokenized, max_seq_len, long_rows)
    batch: dict[str, Any] = Collator(pad_token_id=0)([fed[index] for index in range(len(fed))]) if len(fed) else {}
    for index, view in enumerate(preview.views(range(len(rows)), max_seq_len, long_rows)):
        mine = [place for place in range(len(fed)) if fed.row(place) == view.row]
        assert (view.row, view.index) == (2 * (index + 1), index)
        assert view.tokens == preview.tokenized.counts.lengths[index]
        assert view.kept_tokens == sum(len(fed[place]["input_ids"]) for place in mine)
        assert view.trained == sum(label != IGNORED for place in mine for label in fed[place]["labels"][1:])
        assert view.padding == sum(int((batch["attention_mask"][place] == 0).sum()) for place in mine)
        assert joined(view) == joined(preview.views([index], LONG, "truncate")[0])
    report = preview.report(max_seq_len, long_rows, 2, 0)
    assert (report.rows, report.tokens_total, report.tokens_trained) == (len(fed), fed.tokens, fed.trained_tokens)
    assert list(report.untrainable) == fed.untrainable


def test_a_view_is_text_cut_where_the_kind_of_token_changes() -> None:
    preview = preview_of(talk("Q", "Hello"))
    (view,) = preview.views([0], LONG, "truncate")
    assert view.pieces == (
        Piece(text="<|im_start|>", trained=False, special=True, cut=False),
        Piece(text="user\nQ", trained=False, special=False, cut=False),
        Piece(text="<|im_end|>", trained=False, special=True, cut=False),
        Piece(text="\n", trained=False, special=False, cut=False),
        Piece(text="<|im_start|>", trained=False, special=True, cut=False),
        Piece(text="assistant\n", trained=False, special=False, cut=False),
        Piece(text="Hello", trained=True, special=False, cut=False),
        Piece(text="<|im_end|>", trained=True, special=True, cut=False),
        Piece(text="\n", trained=False, special=False, cut=False),
    )
    two_letters = len(preview.tokenizer(test_tokens.tokens.prompt(preview.tokenizer, talk("Q")))["input_ids"]) + 2
    (short,) = preview.views([0], two_letters, "truncate")
    assert (joined(short, trained=True), joined(short, cut=True)) == ("He", "llo<|im_end|>\n")
    (dropped,) = preview.views([0], two_letters, "drop")
    assert (joined(dropped, trained=True), joined(dropped, cut=False), dropped.kept_tokens) == ("", "", 0)
    (split,) = preview.views([0], two_letters, "split")
    assert (joined(split, trained=True), joined(split, cut=True)) == ("He" + "lo<|im_end|>", "")  # the second piece begins with an l


def test_a_character_of_several_tokens_is_shown_whole_wherever_it_is_cut() -> None:
    preview = preview_of(talk("Q", "a🦙b"))
    for max_seq_len in range(2, 20):
        (view,) = preview.views([0], max_seq_len, "truncate")
        assert "\ufffd" not in joined(view)
        assert joined(view).count("🦙") == 1
    letter = len(preview.tokenizer(test_tokens.tokens.prompt(preview.tokenizer, talk("Q")) + "a")["input_ids"])
    (view,) = preview.views([0], letter + 2, "truncate")
    assert (joined(view, trained=True), view.trained) == ("a", 3)
    assert joined(view, cut=True).startswith("🦙b")  # two of its four tokens are read, but that is no llama


def test_the_end_token_of_raw_text_is_seen() -> None:
    (view,) = preview_of([test_tokens.Message(role="text", content="the user")]).views([0], LONG, "truncate")
    assert view.pieces[-1] == Piece(text="<|im_end|>", trained=True, special=True, cut=False)
    assert joined(view, trained=False) == "the"  # the first token is read, but nothing comes before it to predict it from


def test_rows_are_found_by_length() -> None:
    preview = preview_of(*(talk("Q", "A" * number) for number in (5, 50, 1, 20, 50)))
    assert preview.order("source", 40) == [0, 1, 2, 3, 4]
    assert preview.order("longest", 40) == [1, 4, 3, 0, 2]
    assert preview.order("shortest", 40) == [2, 0, 3, 1, 4]
    assert preview.order("cut", 40) == [1, 4]
    assert [view.row for view in preview.views([4, 0], 40, "truncate")] == [10, 2]
    assert preview.views([], 40, "truncate") == []


def test_a_preview_is_opened_with_the_runs_settings_and_again_from_the_cache(tmp_path: Path) -> None:
    conversations = [Conversation(row=1, messages=tuple(talk("Q", "A", "R", "B")))]
    config = DataConfig(data="rows.json", prompt_format="custom", chat_template=CUSTOM["custom, marked"], train_on="last")
    told: list[int] = []
    for _ in range(2):
        preview = open_preview(tiny.tiny_tokenizer(), conversations, "f", config, tmp_path, never, told.append)
        (view,) = preview.views([0], LONG, "truncate")
        assert joined(view, trained=True) == "B<|im_end|>"
        assert preview.troubles == ()
    assert told == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1
    next(tmp_path.iterdir()).write_bytes(b"")
    assert "are damaged" in open_preview(tiny.tiny_tokenizer(), conversations, "f", config, tmp_path, never, nothing).troubles[0]


def test_a_template_that_is_none_is_told_before_anything_is_tokenized(tmp_path: Path) -> None:
    config = DataConfig(data="rows.json", prompt_format="custom", chat_template="{% if %}")
    with pytest.raises(UserError, match="line 1") as caught:
        open_preview(tiny.tiny_tokenizer(), [], "f", config, tmp_path, never, nothing)
    assert caught.value.field == "chat_template"


def test_nothing_that_is_handed_out_is_numpys() -> None:
    preview = preview_of(talk("Q", "Hello"))
    for value in (*vars(preview.views([0], 20, "split")[0]).values(), *vars(preview.report(20, "split", 2, 0)).values()):
        assert not isinstance(value, np.generic | np.ndarray)
    assert type(preview.order("longest", 20)[0]) is int


def test_where_a_split_row_goes_on_is_marked() -> None:
    (view,) = preview_of(test_tokens.talk("the question", "the answer " * 20)).views([0], 32, "split")
    assert sum(piece.begins for piece in view.pieces) == -(-view.tokens // 32) - 1
    assert "".join(piece.text for piece in view.pieces).count("the answer") == 20


def test_rows_that_spell_special_tokens_are_told() -> None:
    assert preview_of(test_tokens.talk("Hi", "Hello.")).troubles == ()
    (said,) = preview_of(test_tokens.talk("Ignore <|im_end|>", "Hello.")).troubles
    assert said == "1 turn holds the text of special tokens (<|im_end|>), which the model reads as the tokens themselves."


def test_sequences_are_counted_as_training_makes_them() -> None:
    preview = preview_of(test_tokens.talk("the question", "the answer " * 20))
    (view,) = preview.views([0], 32, "split")
    assert len(preview.fitted(32, "split").row) == -(-view.tokens // 32)
    assert len(preview.fitted(32, "drop").row) == 0
    assert len(preview.fitted(512, "drop").row) == 1
