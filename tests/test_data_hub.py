"""Data sets on the Hub: references, and what is said when one cannot be read. The Hub is a stand-in in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_stand_in import SILENCE, UNREACHABLE, Said, ask, hub_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_ui.data.hub import HubSet, is_reference
from qlora_ui.errors import UserError

HUB_ROW = b'{"prompt": "Hi", "completion": "Hello."}\n'
SUBSETS = b"---\nconfigs:\n- config_name: main\n  data_files: main.jsonl\n- config_name: other\n  data_files: other.jsonl\n---\n"


def parquet(rows: list[dict[str, object]], features: object = None) -> bytes:
    """The rows as a Parquet file; `features` as the Hub's libraries write them into it."""
    table = pyarrow.Table.from_pylist(rows)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


PICTURED = parquet(
    [{"prompt": "What is it?", "picture": {"bytes": b"no picture at all", "path": "a.png"}}],
    {"prompt": {"dtype": "string", "_type": "Value"}, "picture": {"_type": "Image"}},
)
COPY = "refs/convert/parquet"
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "o/good": {"train.jsonl": HUB_ROW * 300, "test.jsonl": HUB_ROW, "more/extra.jsonl": HUB_ROW * 4},
    "o/good@v1.0": {"train.jsonl": HUB_ROW * 7},
    "o/one-split": {"validation.jsonl": HUB_ROW * 2},
    "o/no-train": {"validation.jsonl": HUB_ROW, "test.jsonl": HUB_ROW * 2},
    "o/subsets": {"README.md": SUBSETS, "main.jsonl": HUB_ROW * 3, "other.jsonl": HUB_ROW},
    "o/pictures": {"train.parquet": PICTURED},
    "o/broken": {"train.jsonl": HUB_ROW + b'{"prompt": '},
    "o/broken-parquet": {"train.parquet": b"PAR1 and nothing else PAR1"},
    "o/no-rows": {"train.jsonl": b""},
    "o/no-data": {"README.md": b"# Nothing"},
    "o/only-weights": {"README.md": b"# A model, really", "model.safetensors": b"0"},
    "o/script": {"script.py": b"open('ran', 'w')", "train.jsonl": HUB_ROW},
    f"o/script@{COPY}": {
        "first/train/0000.parquet": parquet([{"prompt": "a"}]),
        "first/train/index.duckdb": b"0",
        "first/partial-test/0000.parquet": parquet([{"prompt": "b"}]),
        "second/train/0000.parquet": parquet([{"prompt": "c"}]),
    },
    "o/gated": {"train.jsonl": HUB_ROW},
    "o/aggregated": {"train.jsonl": b'{"prompt": '},
    "o/overloaded": {},
    "o/refused": {},
    "o/silent": {},
    "o/silent-later": {"train.jsonl": SILENCE},
}
OTHERS = [
    "o/nowhere",
    "o/not--possible",
    "o/good#test",
    "o/good#nope",
    "o/good@v1.0",
    "o/good@nope",
    f"o/good@{COPY}",
    "o/good:more/extra.jsonl",
    "o/good:t*.jsonl",
    "o/good:missing.jsonl",
    "o/no-train#test",
    "o/subsets:main",
    "o/subsets:nope",
    f"o/script@{COPY}",
    f"o/script:nope@{COPY}",
    f"o/script:first@{COPY}",
    f"o/script:first@{COPY}#test",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with hub_of(REPOSITORIES) as address:
        yield address


@pytest.fixture(scope="module")
def hub(address: str, home: Path) -> Said:
    return ask(address, home, *(name for name in REPOSITORIES if "@" not in name), *OTHERS)


def test_the_train_split_of_a_hub_set_is_read(hub: Said) -> None:
    assert hub["o/good"][0] == [json.loads(HUB_ROW)] * 300


@pytest.mark.parametrize(
    ("reference", "count"),
    [
        ("o/one-split", 2),  # the only one there is
        ("o/good#test", 1),
        ("o/no-train#test", 2),
        ("o/good@v1.0", 7),
        ("o/subsets:main", 3),
        ("o/good:more/extra.jsonl", 4),
        ("o/good:t*.jsonl", 301),
    ],
)
def test_a_split_a_revision_a_subset_and_files_can_be_named(hub: Said, reference: str, count: int) -> None:
    assert hub[reference][0] == [json.loads(HUB_ROW)] * count


def test_the_hubs_parquet_copy_has_its_subsets_and_splits_in_folders(hub: Said) -> None:
    assert hub[f"o/script:first@{COPY}"][0] == [{"prompt": "a"}]
    assert hub[f"o/script:first@{COPY}#test"][0] == [{"prompt": "b"}]


def test_the_splits_of_a_set_can_be_asked_for_before_one_is_read(address: str, tmp_path: Path) -> None:
    told = ask(address, tmp_path, "o/no-train", f"o/script:first@{COPY}", "o/nowhere", about="splits")
    assert told["o/no-train"][0] == ["validation", "test"]
    assert told[f"o/script:first@{COPY}"][0] == ["train", "test"]
    assert told["o/nowhere"][0].startswith("There is no data set o/nowhere on the Hugging Face Hub")


def test_a_picture_is_left_as_its_bytes(hub: Said) -> None:
    assert hub["o/pictures"][0] == [{"prompt": "What is it?", "picture": {"bytes": repr(b"no picture at all"), "path": "a.png"}}]


def test_a_script_of_a_set_never_runs(hub: Said, home: Path) -> None:
    said, _ = hub["o/script"]
    assert said == f"o/script is made by a program, which is never run here: try o/script@{COPY}, the Hub's copy."
    assert not (home / "ran").exists()


UNREADABLE = "cannot be read from the Hugging Face Hub ("


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("o/no-train", "o/no-train has no split 'train', only validation, test: name one after a #, as in o/no-train#validation."),
        ("o/good#nope", "o/good#nope has no split 'nope', only train, test: name one after a #, as in o/good#train."),
        ("o/subsets", "o/subsets has several subsets (main, other): name one after a colon, as in o/subsets:main."),
        ("o/subsets:nope", "o/subsets has no subset 'nope', only main, other: name one after the colon, as in o/subsets:main."),
        (f"o/script@{COPY}", f"o/script has several subsets (first, second): name one after a colon, as in o/script:first@{COPY}."),
        (f"o/script:nope@{COPY}", "o/script has no subset 'nope', only first, second: name one after the colon"),
        ("o/good@nope", "o/good has no revision 'nope': leave out what follows the @, or name a branch, a tag or a commit of it."),
        (f"o/good@{COPY}", "The Hugging Face Hub has no Parquet copy of o/good: download its files from"),
        ("o/good:missing.jsonl", "o/good has no file missing.jsonl, only train.jsonl, test.jsonl, more/extra.jsonl: name one"),
        ("o/nowhere", "There is no data set o/nowhere on the Hugging Face Hub, or it is private: check the name, or set HF_TOKEN."),
        ("o/gated", "o/gated is gated: accept its terms at https://huggingface.co/datasets/o/gated, and start the app with HF_TOKEN set."),
        ("o/refused", "The Hugging Face Hub refuses o/refused ("),
        ("o/overloaded", "The Hugging Face Hub cannot answer for o/overloaded now ("),
        ("o/silent", "The Hugging Face Hub cannot be reached for o/silent (no answer within 4 seconds): check the connection"),
        ("o/silent-later", "The Hugging Face Hub cannot be reached for o/silent-later (no answer within 1 seconds): check the connection"),
        ("o/no-rows", "o/no-rows has no rows: choose another set, or another split."),
        ("o/no-data", "o/no-data holds no file of a kind that can be read: choose another set"),
        ("o/only-weights", "o/only-weights holds no file of a kind that can be read: choose another set"),
        ("o/broken", f"o/broken {UNREADABLE}"),
        ("o/broken-parquet", f"o/broken-parquet {UNREADABLE}"),
        ("o/aggregated", f"o/aggregated {UNREADABLE}"),
        ("o/not--possible", f"o/not--possible {UNREADABLE}"),
    ],
)
def test_a_hub_set_that_cannot_be_read_is_one_sentence_with_a_remedy(hub: Said, reference: str, said: str) -> None:
    assert hub[reference][0].startswith(said)
    assert "\n" not in hub[reference][0]


def test_a_hub_that_says_nothing_is_given_up_within_five_seconds(hub: Said) -> None:
    assert hub["o/silent"][1] < 5


def test_offline_mode_is_told_as_such(tmp_path: Path) -> None:
    said, _ = ask(UNREACHABLE, tmp_path, "o/good", HF_HUB_OFFLINE="1")["o/good"]
    assert "offline mode is enabled" in said


WORD = st.from_regex(r"[A-Za-z0-9_][\w.-]{0,8}", fullmatch=True).filter(str.isascii)
PATH = st.lists(WORD, min_size=1, max_size=3).map("/".join)
NAME = st.builds(
    "{}/{}".format, st.from_regex(r"[a-z0-9]{1,8}", fullmatch=True), st.from_regex(r"[a-z0-9_][a-z0-9_-]{0,7}", fullmatch=True)
)


@settings(max_examples=50)
@given(name=NAME, subset=st.just("") | PATH, revision=st.just("") | PATH, split=st.sampled_from(["", "train", "test_sft", "ja.held_out"]))
def test_a_reference_is_read_as_it_is_written(name: str, subset: str, revision: str, split: str) -> None:
    wanted = HubSet(name=name, subset=subset, revision=revision, split=split)
    assert HubSet.parse(str(wanted)) == wanted


def test_the_parts_of_a_reference() -> None:
    assert HubSet.parse("a/b:c/d.jsonl@refs/pr/1#test") == HubSet(name="a/b", subset="c/d.jsonl", revision="refs/pr/1", split="test")


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "a/b/c", "a/b:", "a/b@", "a/b#", "a b/c", "a/b ", "a/b\n", "a/b#x y", "a/b#train[:10]", "a/b#t@v"),
        *("/a/b", "./a/b", "../b", "a/..", "a/../b", "a/.b", "a/b:../c", "a/b:/c", "a/b:c/..", "a/b@../c", "C:\\a", "https://x.y/a"),
        *("rows/a.json", "rows/a.JSONL", "rows/a.csv.gz"),  # paths of files, which a name with that ending would hide
    ],
)
def test_what_is_no_reference(text: str) -> None:
    assert not is_reference(text)
    with pytest.raises(UserError, match="does not name a data set on the Hugging Face Hub: write owner/name"):
        HubSet.parse(text)
