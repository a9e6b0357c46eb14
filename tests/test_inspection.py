"""Looking at a data set before a training: a first answer from a sample, then everything, kept for the next look."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from qlora_ui.config import DataConfig, RunConfig
from qlora_ui.data import checks
from qlora_ui.errors import UserError
from qlora_ui.inspection import SAMPLE_ROWS, Inspector, Look
from qlora_ui.runs import Workspace
from qlora_ui.stopping import Cancelled, watched


def many(path: Path, count: int, **row: str) -> str:
    path.write_text("".join(json.dumps({"prompt": f"Question {n}?", "completion": f"Answer {n}.", **row}) + "\n" for n in range(count)))
    return str(path)


def config(reference: str, **values: Any) -> RunConfig:
    return tiny.tiny_config(reference).with_values(values)


@pytest.fixture
def inspector(tiny_workspace: Workspace) -> Inspector:
    return Inspector(tiny_workspace, within=None)


def last(looks: Iterator[Look]) -> Look:
    *_, seen = looks
    assert not seen.doing
    return seen


def test_a_small_set_is_told_at_once_with_its_tokens(inspector: Inspector, tmp_path: Path) -> None:
    seen = last(inspector.look(config(many(tmp_path / "a.jsonl", 20))))
    assert seen.data is not None
    assert seen.lengths is not None
    assert seen.preview is not None
    assert seen.data.report.kept == 20
    assert seen.lengths.rows == 20
    assert 0 < seen.lengths.tokens_trained < seen.lengths.tokens_total
    views = seen.preview.views([0, 1], 512, "truncate")
    assert "Answer 0." in "".join(piece.text for piece in views[0].pieces if piece.trained)
    assert seen.problem == ""


def test_a_large_set_is_told_from_a_sample_first(inspector: Inspector, tmp_path: Path) -> None:
    looks = list(inspector.look(config(many(tmp_path / "a.jsonl", SAMPLE_ROWS + 500))))
    first, final = next(seen for seen in looks if seen.data), looks[-1]
    assert first.data is not None
    assert final.data is not None
    assert (first.data.report.read, final.data.report.read) == (SAMPLE_ROWS, SAMPLE_ROWS + 500)
    assert first.doing.startswith("These are the first 1,000 rows")
    sampled = next(seen for seen in looks if seen.lengths)
    assert sampled.lengths is not None
    assert final.lengths is not None
    assert (sampled.lengths.rows, final.lengths.rows) == (SAMPLE_ROWS, SAMPLE_ROWS + 500)
    assert sampled.doing != final.doing == ""
    assert sampled.data == first.data  # lengths do not wait until all rows are read
    after = looks[looks.index(sampled) :]
    assert all(seen.lengths and seen.doing.startswith("Lengths of the first 1,000 rows; ") for seen in after[:-1])


def test_rows_that_can_be_used_may_come_after_the_sample(inspector: Inspector, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"foo": 1}\n' * SAMPLE_ROWS + json.dumps({"prompt": "Hi", "completion": "Hello."}) + "\n")
    seen = last(inspector.look(config(str(path))))
    assert seen.data is not None
    assert (seen.data.report.kept, len(seen.data.report.dropped)) == (1, SAMPLE_ROWS)


def test_what_was_looked_at_is_not_read_again_unless_it_has_changed(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = many(tmp_path / "a.jsonl", 5)
    read: list[str] = []
    prepare = checks.prepare
    monkeypatch.setattr(checks, "prepare", lambda data, *args, **kwargs: read.append(data.data) or prepare(data, *args, **kwargs))
    assert inspector.known(config(reference)) is None
    first = last(inspector.look(config(reference)))
    again = last(inspector.look(config(reference, max_seq_len=16)))
    assert inspector.read(config(reference).data) is first.data
    assert again.data is first.data
    assert again.preview is first.preview
    known = inspector.known(config(reference, max_seq_len=16))
    assert known is not None
    assert known.lengths == again.lengths != first.lengths
    assert len(read) == 1
    many(tmp_path / "a.jsonl", 6)
    changed = last(inspector.look(config(reference)))
    assert changed.data is not None
    assert changed.data.report.kept == 6
    assert len(read) == 2


def test_rows_can_be_seen_while_the_others_are_still_read(inspector: Inspector, tmp_path: Path) -> None:
    chosen = config(many(tmp_path / "a.jsonl", SAMPLE_ROWS + 5))
    assert inspector.rows(chosen.data) == ()
    looks = inspector.look(chosen)
    assert next(looks).doing.startswith("These are the first 1,000 rows")
    assert len(inspector.rows(chosen.data)) == SAMPLE_ROWS
    last(looks)
    assert len(inspector.rows(chosen.data)) == SAMPLE_ROWS + 5


def test_a_source_that_keeps_its_first_rows_back_can_be_cancelled(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def slow(reference: str, within: Any, should_stop: Callable[[], bool], on_progress: Any) -> Iterator[Any]:
        while not should_stop():
            stopped.wait(0.01)
        stopped.set()
        yield from ()

    monkeypatch.setattr("qlora_ui.data.sources.read", slow)
    looks = inspector.look(config("somebody/slow"))
    assert next(looks) == Look(data=None, doing="0 rows read …")  # how many there are is not known: no share of them
    looks.close()
    assert stopped.wait(10)


def test_without_its_model_a_set_is_told_without_tokens(inspector: Inspector, tmp_path: Path) -> None:
    seen = last(inspector.look(config(many(tmp_path / "a.jsonl", 5), model="nobody/nothing")))
    assert seen.data is not None
    assert seen.lengths is None
    assert seen.no_tokens == "nobody/nothing is not on this machine yet, so its tokens cannot be counted."


def test_rows_that_the_prompt_format_cannot_write_are_a_problem_and_no_tokenizer_to_be_fetched(
    inspector: Inspector, tmp_path: Path
) -> None:
    seen = last(inspector.look(config(many(tmp_path / "a.jsonl", 5), prompt_format="custom", chat_template="{{ raise_exception('no') }}")))
    assert seen.data is not None
    assert seen.no_tokens == ""
    assert seen.problem.startswith("Row 1: The chat template refuses the conversation: line 1: no.")


def test_nothing_to_train_on_is_a_problem_with_its_remedy(inspector: Inspector, tmp_path: Path) -> None:
    long = many(tmp_path / "a.jsonl", 5, prompt="word " * 200)
    seen = last(inspector.look(config(long, max_seq_len=32)))
    assert seen.problem.startswith("0 % of the tokens would be trained: no row has an answer within max_seq_len 32.")


def test_a_template_that_marks_nothing_is_named_as_the_reason_that_nothing_is_trained(inspector: Inspector, tmp_path: Path) -> None:
    marked = "{% for turn in messages %}{% generation %}{% endgeneration %}{{ turn.content }}{% endfor %}"
    seen = last(inspector.look(config(many(tmp_path / "a.jsonl", 5), prompt_format="custom", chat_template=marked)))
    assert seen.problem.startswith("0 % of the tokens would be trained, at any max length: the prompt format marks nothing")


@pytest.mark.parametrize(
    ("long_rows", "reason"), [("drop", "is longer than max_seq_len 32"), ("truncate", "has no token to train on within max_seq_len 32")]
)
def test_kept_rows_that_are_not_trained_on_are_named_with_the_reason(
    inspector: Inspector, tmp_path: Path, long_rows: str, reason: str
) -> None:
    rows = [{"prompt": "Hi", "completion": "Ho"}, {"prompt": "word " * 99, "completion": "Yes."}, {"prompt": "Hi", "completion": "So"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    seen = last(inspector.look(config(str(tmp_path / "a.json"), max_seq_len=32, long_rows=long_rows)))
    assert seen.left_out == (checks.Dropped(row=2, reason=reason),)


def test_what_cannot_be_read_is_one_sentence(inspector: Inspector, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"foo": 1}\n')
    with pytest.raises(UserError, match="no known format; columns: foo"):
        list(inspector.look(config(str(tmp_path / "a.jsonl"))))
    assert inspector.raw_rows(DataConfig(data=str(tmp_path / "a.jsonl"))) == [{"foo": 1}]


def test_watched_work_tells_its_progress_and_ends_when_nobody_watches() -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(should_stop: Any, on_progress: Any) -> None:
        on_progress(7)
        begun.set()
        try:
            while not should_stop():
                pass
            raise Cancelled
        finally:
            ended.set()

    watching = watched(work)
    assert begun.wait(0) is False
    assert next(watching) in (0, 7)
    assert begun.wait(10)
    assert next(watching) == 7
    watching.close()
    assert ended.wait(10)
