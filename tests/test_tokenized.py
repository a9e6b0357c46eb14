"""All rows as columns of tokens: what one row at a time would give, fitted to a length, kept in a cache that is never wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import FORMATS, talk, tokenizer_in

from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokenized as room
from qlora_ui.engine.tokenized import DamagedFile, Tokenized, cached_tokenized, fit, load, save, tokenize
from qlora_ui.engine.tokens import encode
from qlora_ui.errors import UserError
from qlora_ui.stopping import Cancelled

LONG = 100_000
FEW = settings(max_examples=15)


def never() -> bool:
    return False


def nothing(done: int) -> None:
    pass


def numbered(*rows: Sequence[Message]) -> list[Conversation]:
    """Rows 3, 6, 9 of a source whose others were dropped."""
    return [Conversation(row=3 * number, messages=tuple(row)) for number, row in enumerate(rows, 1)]


def tokenized_in(tokenizer: Any, rows: Sequence[Conversation], train_on: str = "assistant") -> Tokenized:
    return tokenize(tokenizer, rows, train_on, never, nothing)


some_rows = st.lists(test_tokens.conversations(), min_size=1, max_size=4).map(lambda rows: numbered(*rows))
train_ons = st.sampled_from(["assistant", "last", "everything"])


@pytest.mark.parametrize("prompt_format", FORMATS)
@FEW
@given(rows=some_rows, train_on=train_ons, max_seq_len=st.integers(2, 120))
def test_columns_hold_what_one_row_at_a_time_gives(prompt_format: str, rows: list[Conversation], train_on: str, max_seq_len: int) -> None:
    tokenizer = tokenizer_in(prompt_format)
    cut = [(row.row, encode(tokenizer, row.messages, train_on, max_seq_len)) for row in rows]
    fitted = fit(tokenized_in(tokenizer, rows, train_on), max_seq_len, "truncate")
    kept = [(number, row) for number, row in cut if row.trained]
    assert [fitted[index] for index in range(len(fitted))] == [{"input_ids": row.input_ids, "labels": row.labels} for _, row in kept]
    assert [fitted.row(index) for index in range(len(fitted))] == [number for number, _ in kept]
    assert fitted.untrainable == [number for number, row in cut if not row.trained]
    assert fitted.long == [number for number, row in cut if row.truncated]
    assert fitted.tokens == sum(len(row.input_ids) for _, row in kept)
    assert fitted.trained_tokens == sum(row.trained for _, row in kept)


@FEW
@given(rows=some_rows, max_seq_len=st.integers(2, 60))
def test_the_pieces_of_a_split_row_are_together_the_row(rows: list[Conversation], max_seq_len: int) -> None:
    tokenizer = tokenizer_in("chatml")
    fitted = fit(tokenized_in(tokenizer, rows, "everything"), max_seq_len, "split")
    for row in rows:
        whole = encode(tokenizer, row.messages, "everything", LONG)
        pieces = [fitted[index] for index in range(len(fitted)) if fitted.row(index) == row.row]
        alone = int(len(whole.input_ids) % max_seq_len == 1)  # a last token with none before it is not predicted, so it is left out
        end = len(whole.input_ids) - alone
        assert [token for piece in pieces for token in piece["input_ids"]] == whole.input_ids[:end]
        assert [label for piece in pieces for label in piece["labels"]] == whole.labels[:end]
        assert all(len(piece["input_ids"]) == max_seq_len for piece in pieces[:-1])


def test_dropped_and_split_rows_are_told_by_number() -> None:
    tokenizer = tokenizer_in("chatml")
    rows = numbered(talk("Hi", "Hello"), talk("H" * 90, "Hello"), talk("Hi", "H" * 90), talk("Hi", "", "a" * 60, "b"))
    tokenized = tokenized_in(tokenizer, rows)
    dropped = fit(tokenized, 60, "drop")
    assert (len(dropped), dropped.long, dropped.untrainable) == (1, [6, 9, 12], [])
    assert dropped.account(60) == ["3 rows are longer than max_seq_len 60 and were dropped: 6, 9, 12"]
    cut = fit(tokenized, 60, "truncate")
    assert cut.account(60) == [
        "3 rows are longer than max_seq_len 60 and were cut",
        "1 rows were left out, nothing to train on in them after the cut: 6",
    ]
    split = fit(tokenized, 60, "split")
    assert split.account(60) == [
        "3 rows are longer than max_seq_len 60 and were split into pieces",
        "1 pieces of split rows were left out, nothing to train on in them",
    ]
    assert fit(tokenized, 500, "truncate").account(500) == []


def test_rows_are_selected_by_index_in_the_order_asked() -> None:
    tokenized = tokenized_in(tokenizer_in("chatml"), numbered(*(talk("Q" * number, "A" * number) for number in range(1, 8))))
    whole, some = fit(tokenized, LONG, "truncate"), fit(tokenized.select([5, 0, 2]), LONG, "truncate")
    assert [some[index] for index in range(3)] == [whole[5], whole[0], whole[2]]
    assert [some.row(index) for index in range(3)] == [18, 3, 9]
    assert len(fit(tokenized.select([]), LONG, "truncate")) == 0


def test_a_row_that_the_template_refuses_is_named() -> None:
    tokenizer = tokenizer_in("tokenizer", test_tokens.MARKED)
    rows = numbered(talk("Q", "A"), [Message(role="system", content="S"), *talk("Q", "A")])
    with pytest.raises(UserError, match=r"^Row 6: The chat template refuses the conversation: line 1: no system turns\."):
        tokenized_in(tokenizer, rows)


def test_tokenizing_tells_how_far_it_is_and_stops_when_asked() -> None:
    tokenizer, rows, told = tokenizer_in("chatml"), numbered(*[talk("Hi", "Hello")] * 1000), list[int]()
    tokenize(tokenizer, rows, "assistant", never, told.append)
    assert told == [256, 512, 768, 1000]
    told.clear()
    with pytest.raises(Cancelled):
        tokenize(tokenizer, rows, "assistant", lambda: len(told) == 2, told.append)
    assert told == [256, 512]


def test_long_texts_are_fewer_to_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BATCH_CHARACTERS", 1000)
    told: list[int] = []
    tokenize(tokenizer_in("chatml"), numbered(*[talk("Hi", "x " * 300)] * 3), "assistant", never, told.append)
    assert told == [2, 3]


def test_stop_does_not_wait_for_a_template_that_takes_its_time() -> None:
    slow = "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}{{ messages[1].content }}"
    tokenizer, working = tokenizer_in("tokenizer", slow), threading.Event()

    def should_stop() -> bool:
        asked_before, _ = working.is_set(), working.set()
        return asked_before

    started = time.perf_counter()
    with pytest.raises(Cancelled):
        tokenize(tokenizer, numbered(*[talk("Q", "A")] * 4), "everything", should_stop, nothing)
    assert time.perf_counter() - started < 0.5


# The cache ----------------------------------------------------------------------------------------------------------------


def same(one: Tokenized, other: Tokenized) -> bool:
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype and np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("rows", "starts", "ids", "trained")
    )


@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_is_saved_is_loaded(tmp_path: Path, count: int) -> None:
    tokenized = tokenized_in(tokenizer_in("chatml"), numbered(*[talk("Grüße 🦙", "A")] * count))
    save(tokenized, tmp_path / "new" / "a.npz")
    assert same(load(tmp_path / "new" / "a.npz"), tokenized)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.npz"]


class Cache:
    """A cache in a folder, which notes how it was used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.progress, self.troubles = folder, list[int](), list[str]()

    def get(self, tokenizer: Any, rows: Sequence[Conversation], fingerprint: str = "f", train_on: str = "assistant") -> Tokenized:
        return cached_tokenized(self.folder, tokenizer, rows, fingerprint, train_on, never, self.progress.append, self.troubles.append)

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each tokenizing had, of those that were really done."""
    done: list[int] = []
    real = room.tokenize

    def counted(tokenizer: Any, rows: Sequence[Conversation], *rest: Any) -> Tokenized:
        done.append(len(rows))
        return real(tokenizer, rows, *rest)

    monkeypatch.setattr(room, "tokenize", counted)
    return done


def test_the_second_time_nothing_is_tokenized_and_rows_keep_their_own_numbers(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    done, tokenizer, rows = counting(monkeypatch), tokenizer_in("chatml"), numbered(talk("Q", "A"), talk("R", "B"))
    first = cache.get(tokenizer, rows)
    assert same(cache.get(tokenizer, rows), first)
    elsewhere = [Conversation(row=row.row + 100, messages=row.messages) for row in rows]
    assert cache.get(tokenizer, elsewhere).rows.tolist() == [103, 106]
    assert done == [2]
    assert cache.progress == [2, 2, 2]
    assert cache.troubles == []


def test_an_earlier_call_with_padding_is_no_other_tokenizer(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    done, tokenizer, rows = counting(monkeypatch), tokenizer_in("chatml"), numbered(talk("Q", "A"))
    cache.get(tokenizer, rows)
    tokenizer(["a", "the b"], padding=True, truncation=True, max_length=5)
    cache.get(tokenizer, rows)
    assert done == [1]


def test_other_rows_template_tokenizer_or_choice_are_tokenized_anew(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    done, rows = counting(monkeypatch), numbered(talk("Q", "A"))
    larger = tokenizer_in("chatml")
    larger.add_tokens(["Answer"])
    other_end = tokenizer_in("chatml")
    other_end.eos_token = "<|pad|>"
    for _ in range(2):
        cache.get(tokenizer_in("chatml"), rows)
        cache.get(tokenizer_in("chatml"), rows, fingerprint="g")
        cache.get(tokenizer_in("chatml"), rows, train_on="last")
        cache.get(tokenizer_in("guanaco"), rows)
        cache.get(larger, rows)
        cache.get(other_end, rows)
        cache.get(tokenizer_in("chatml"), numbered(talk("Q", "longer")))  # though the fingerprint says they are the same
    assert len(done) == len(cache.files()) == 7


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-300], lambda data: b"", lambda data: data[:900] + b"x" + data[901:], lambda data: b"{}"]
)
def test_a_damaged_file_is_told_and_made_anew(cache: Cache, damage: Any) -> None:
    tokenizer, rows = tokenizer_in("chatml"), numbered(talk("Q", "A" * 500))
    first = cache.get(tokenizer, rows)
    (path,) = cache.folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile):
        load(path)
    assert same(cache.get(tokenizer, rows), first)
    assert len(cache.troubles) == 1
    assert "are damaged" in cache.troubles[0]
    assert same(load(path), first)


def test_a_file_whose_parts_do_not_fit_together_is_damaged(tmp_path: Path) -> None:
    whole = tokenized_in(tokenizer_in("chatml"), numbered(talk("Q", "A"), talk("Q", "A")))
    save(Tokenized(rows=whole.rows, starts=whole.starts, ids=whole.ids[:-1], trained=whole.trained), tmp_path / "a.npz")
    with pytest.raises(DamagedFile, match="do not fit together"):
        load(tmp_path / "a.npz")


def test_a_cache_that_cannot_be_written_is_told_and_the_tokens_are_there(cache: Cache) -> None:
    cache.folder.write_text("a file where the folder should be")
    assert len(cache.get(tokenizer_in("chatml"), numbered(talk("Q", "A")))) == 1
    assert "cannot be kept" in cache.troubles[-1]


def test_the_cache_keeps_the_newest_and_what_was_used_is_new(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CACHE_FILES", 3)
    tokenizer, rows, names = tokenizer_in("chatml"), numbered(talk("Q", "A")), list[str]()
    for number in range(3):
        before = cache.files() if cache.folder.exists() else set()
        cache.get(tokenizer, rows, fingerprint=str(number))
        names += cache.files() - before
        os.utime(cache.folder / names[-1], (number, number))
    cache.get(tokenizer, rows, fingerprint="0")
    (cache.folder / "left.npz.1-1.part").write_bytes(b"half")
    os.utime(cache.folder / "left.npz.1-1.part", (0, 0))
    cache.get(tokenizer, rows, fingerprint="new")
    assert names[0] in cache.files()
    assert names[1] not in cache.files()
    assert len(cache.files()) == 3


def test_the_cache_is_bounded_in_bytes_but_keeps_what_was_just_made(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CACHE_BYTES", 10)
    for number in range(2):
        cache.get(tokenizer_in("chatml"), numbered(talk("Q", "A")), fingerprint=str(number))
        assert len(cache.files()) == 1
