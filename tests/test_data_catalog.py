"""The paper's data sets: each is loaded by its reference from a stand-in that has the layout of the real one, and fails fast without it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hub_stand_in import UNREACHABLE, Said, ask, hub_of
from test_data_hub import parquet

from qlora_ui.data.catalog import CATALOG
from qlora_ui.data.hub import CONVERTED, HubSet

AVAILABLE = {name: entry for name, entry in CATALOG.items() if entry.reference}

# Invented rows with the columns of the real sets.
CATALOG_ROWS: dict[str, list[dict[str, Any]]] = {
    "oasst1": [
        {"text": "### Human: What is a fjord?### Assistant: A narrow arm of the sea.### Human: Where?### Assistant: In Norway, for one."},
        {"text": "### Human: ¿Qué es un fiordo?### Assistant: Un brazo de mar estrecho."},
    ],
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Green.", "text": "Below is ... ### Response:\nGreen."},
        {"instruction": "Put it in capitals.", "input": "moss", "output": "MOSS", "text": "Below is ... ### Response:\nMOSS"},
    ],
    "alpaca-cleaned": [
        {"output": "A pair of shoes.", "input": "", "instruction": "Name something that comes in twos."},
        {"output": "7", "input": "3 + 4", "instruction": "Work it out."},
    ],
    "self-instruct": [{"prompt": "Task: write a title for a poem about rain.\nOutput:", "completion": " On the Tin Roof"}],
    "unnatural-instructions": [
        {
            "instruction": "You are given a word. Spell it backwards.",
            "instances": [
                {
                    "instruction_with_input": "You are given a word. Spell it backwards.\n\nWord: reed",
                    "input": "Word: reed",
                    "constraints": "The output should be one word.",
                    "output": "deer",
                }
            ],
        }
    ],
    "chip2": [{"text": "<human>: How do I boil an egg?\n<bot>: Eight minutes in boiling water.", "metadata": {"source": "unified_chip2"}}],
    "longform": [{"input": "Write about a walk.", "output": "We left at dawn. " * 20, "source": "Wikipedia", "subset": "raw"}],
    "hh-rlhf": [
        {
            "chosen": "\n\nHuman: Is it late?\n\nAssistant: That depends.\n\nHuman: Here.\n\nAssistant: Then I cannot tell.",
            "rejected": "\n\nHuman: Is it late?\n\nAssistant: That depends.\n\nHuman: Here.\n\nAssistant: Yes.",
        }
    ],
    "flan-v2": [
        {
            "prompt": "Does the second sentence follow from the first?\nIt rains. The street is dry.",
            "completion": "no",
            "task_source": "Flan2021",
            "task_name": "invented:1.0.0",
            "template_type": "zs_noopt",
        }
    ],
}


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


OTHER = [{"prompt": "a row of another file, subset or split", "completion": "it must not be read"}]
ROWS = CATALOG_ROWS
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "timdettmers/openassistant-guanaco": {
        "README.md": b"# Guanaco",
        "openassistant_best_replies_eval.jsonl": _lines(OTHER),
        "openassistant_best_replies_train.jsonl": _lines(ROWS["oasst1"]),
    },
    "tatsu-lab/alpaca": {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(ROWS["alpaca"])},
    "yahma/alpaca-cleaned": {"alpaca_data_cleaned.json": json.dumps(ROWS["alpaca-cleaned"]).encode()},
    "yizhongw/self_instruct": {"self_instruct.py": b"raise SystemExit('a script was run')", "data/finetuning.jsonl": _lines(OTHER)},
    f"yizhongw/self_instruct@{CONVERTED}": {
        "human_eval/train/0000.parquet": parquet(OTHER),
        "p3/train/0000.parquet": parquet(OTHER),
        "prompt_source/train/0000.parquet": parquet(OTHER),
        "self_instruct/train/0000.parquet": parquet(ROWS["self-instruct"]),
        "super_natural_instructions/test/0000.parquet": parquet(OTHER),
        "super_natural_instructions/train/0000.parquet": parquet(OTHER),
    },
    "mrm8488/unnatural-instructions-core": {"data/train-00000-of-00001-67e9a728f5042377.parquet": parquet(ROWS["unnatural-instructions"])},
    "laion/OIG": {
        "unified_abstract_infill.jsonl": _lines(OTHER),
        "unified_chip2.jsonl": _lines(ROWS["chip2"]),
        "unified_sqlv2.jsonl": _lines(OTHER),
    },
    "akoksal/LongForm": {
        "data/test-00000-of-00001-101b768c69bbf7f7.parquet": parquet(OTHER),
        "data/train-00000-of-00001-367270308b568067.parquet": parquet(ROWS["longform"]),
        "data/validation-00000-of-00001-efbdb37789b1862d.parquet": parquet(OTHER),
    },
    "Anthropic/hh-rlhf": {
        f"{folder}/{split}.jsonl.gz": gzip.compress(_lines(ROWS["hh-rlhf"] if split == "train" else OTHER))
        for folder in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
        for split in ("train", "test")
    }
    | {"red-team-attempts/red_team_attempts.jsonl.gz": gzip.compress(json.dumps(OTHER).encode())},
    "itay1itzhak/flan_2022_350k": {
        "README.md": b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n",
        "data/train-00000-of-00002.parquet": parquet(ROWS["flan-v2"]),
        "data/train-00001-of-00002.parquet": parquet(ROWS["flan-v2"]),
    },
}
FILES_OF_TRAIN = {"hh-rlhf": 4, "flan-v2": 2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Said]:
    with hub_of(REPOSITORIES) as address:
        yield ask(address, tmp_path_factory.mktemp("hub"), *(entry.reference for entry in AVAILABLE.values()))


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Said:
    return ask(UNREACHABLE, tmp_path_factory.mktemp("no-hub"), *(entry.reference for entry in AVAILABLE.values()))


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_set_of_the_paper_is_loaded_by_its_name(loaded: Said, name: str) -> None:
    assert loaded[CATALOG[name].reference][0] == CATALOG_ROWS[name] * FILES_OF_TRAIN.get(name, 1)


@pytest.mark.parametrize("name", AVAILABLE)
def test_without_the_hub_a_set_of_the_paper_fails_in_a_sentence_within_five_seconds(unreachable: Said, name: str) -> None:
    said, seconds = unreachable[CATALOG[name].reference]
    assert said.startswith(f"The Hugging Face Hub cannot be reached for {HubSet.parse(CATALOG[name].reference).name} (")
    assert said.endswith("check the connection, or upload a file.")
    assert seconds < 5


def test_the_sets_of_the_paper_are_all_listed_and_only_vicuna_was_never_released() -> None:
    assert list(CATALOG) == [*CATALOG_ROWS, "vicuna"]
    assert set(CATALOG) - set(AVAILABLE) == {"vicuna"}
    assert "Never released" in CATALOG["vicuna"].note


@pytest.mark.parametrize("name", CATALOG)
def test_every_entry_says_what_it_is_and_what_the_paper_used_it_for(name: str) -> None:
    entry = CATALOG[name]
    assert entry.name == name
    assert entry.title
    assert entry.format
    assert entry.used_for.endswith(".")
    assert not entry.note or entry.note.endswith(".")
    assert bool(entry.rows) == bool(entry.reference)
