"""What was computed of a conversation is used for its next turn, and changes no answer by a bit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qlora_ui.engine import prefixes
from qlora_ui.engine.prefixes import Prefixes, Row
from qlora_ui.stopping import Cancelled

BLOCK = 64


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model reads no long conversations."""
    monkeypatch.setattr(prefixes, "BLOCK", BLOCK)


def never() -> bool:
    return False


def ids(count: int, first: int = 0) -> list[int]:
    return [3 + (first + at * at) % 250 for at in range(count)]


def row(prompt: list[int], speaker: str = "somebody") -> Row:
    return Row(speaker=speaker, ids=prompt, answering=contextlib.nullcontext)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny.tiny_model(tmp_path_factory.mktemp("llama") / "tiny")).eval()


class Counted:
    """Counts the tokens that a model computes."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        self._hook = model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self.tokens += args[0].numel()

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def recalled(kept: Prefixes, *rows: Row) -> Any:
    with torch.inference_mode():
        return kept.recall(rows, never)


def generated(model: Any, prompts: list[list[int]], cache: Any) -> list[list[int]]:
    longest = max(map(len, prompts))
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        said = model.generate(
            batch, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=12, min_new_tokens=12, pad_token_id=0
        )
    return [line[longest:].tolist() for line in said]


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_says_what_it_says_without(tmp_path: Path, name: str) -> None:
    folder = architectures.build(tmp_path / name, name)
    kind: Any = AutoModelForSeq2SeqLM if name in ("t5", "bart") else AutoModelForCausalLM
    model = kind.from_pretrained(folder).eval()
    for lengths in ((150,), (140, 220), (30, 200)):
        prompts = [ids(length, first=length) for length in lengths]
        cache = recalled(Prefixes(model, most_bytes=10**9), *map(row, prompts))
        if name in ("t5", "bart", "mistral", "gemma3"):  # two sides; windows that slide
            assert cache is None
        else:
            assert cache.get_seq_length() == max(lengths) - max(length - (length - 1) // BLOCK * BLOCK for length in lengths)
            assert generated(model, prompts, cache) == generated(model, prompts, None)


def test_the_next_turn_computes_only_what_is_new_and_the_very_same_numbers(llama: Any) -> None:
    first, second = ids(300), [*ids(300), *ids(90, first=7)]
    kept = Prefixes(llama, most_bytes=10**9)
    recalled(kept, row(first))
    with Counted(llama) as warm:
        cache = recalled(kept, row(second))
    with Counted(llama) as cold:
        alone = recalled(Prefixes(llama, most_bytes=0), row(second))
    assert (warm.tokens, cold.tokens) == (2 * BLOCK, 6 * BLOCK)
    assert all(
        torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
        for one, other in zip(cache.layers, alone.layers, strict=True)
    )


def test_a_changed_question_keeps_what_was_said_before_it_and_another_speaker_shares_nothing(llama: Any) -> None:
    kept = Prefixes(llama, most_bytes=10**9)
    recalled(kept, row(ids(400)))
    changed = [*ids(200), *ids(200, first=9)]
    for prompt, speaker, expected in (
        (changed, "somebody", 3),
        (ids(400), "another", 6),
        (ids(400), "somebody", 0),
        (changed, "somebody", 0),
    ):
        with Counted(llama) as counted:
            recalled(kept, row(prompt, speaker))
        assert counted.tokens == expected * BLOCK


def test_memory_is_bounded_and_the_longest_unused_goes_first(llama: Any) -> None:
    measured = Prefixes(llama, most_bytes=10**9)
    recalled(measured, row(ids(BLOCK + 1)))
    one = measured.bytes
    assert one == 2 * 2 * 2 * 16 * 4 * BLOCK  # layers, keys and values, heads, width, bytes
    kept = Prefixes(llama, most_bytes=2 * one)
    for first in (1, 2, 1, 3):
        recalled(kept, row(ids(BLOCK + 1, first=first)))
        assert kept.bytes <= 2 * one
    for first, expected in ((1, 0), (3, 0), (2, BLOCK)):
        with Counted(llama) as counted:
            recalled(kept, row(ids(BLOCK + 1, first=first)))
        assert counted.tokens == expected
    kept.forget()
    assert kept.bytes == 0


def test_reading_a_long_prompt_ends_between_two_blocks_when_asked(llama: Any) -> None:
    with Counted(llama) as counted, pytest.raises(Cancelled), torch.inference_mode():
        Prefixes(llama, most_bytes=0).recall([row(ids(500))], lambda: counted.tokens >= BLOCK)
    assert counted.tokens == BLOCK
