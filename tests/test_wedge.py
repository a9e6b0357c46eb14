"""Whatever breaks an answer off, it is told in that reply at once, and the next reply is right."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from training import Watched

from qlora_ui import speakers
from qlora_ui.data.formats import Message
from qlora_ui.engine import chat, decoding, troubles
from qlora_ui.engine.decoding import Sampling
from qlora_ui.errors import UserError
from qlora_ui.speakers import Speaker
from qlora_ui.talking import EngineChat

QUESTION = [Message(role="user", content="Question 3: which word is 3?")]
GREEDY = Sampling(temperature=0, max_new_tokens=24)
SECONDS = 2.0
CUDA_LACK = "CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 15.00 GiB."
ASSERTED = "CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def speaker(finished: Watched) -> Speaker:
    return speakers.of_run(finished.run)


@pytest.fixture(scope="module")
def engine(finished: Watched) -> EngineChat:
    return EngineChat(finished.run.workspace)


def said(engine: EngineChat, *who: Speaker, sampling: Sampling = GREEDY) -> tuple[str, ...]:
    *_, last = engine.reply([(one, QUESTION) for one in who], sampling)
    return last.texts


@pytest.fixture(scope="module")
def expected(engine: EngineChat, speaker: Speaker) -> tuple[str, ...]:
    texts = said(engine, speaker, speaker.base)
    assert all(texts)
    return texts


def failing_at(number: int, error: BaseException) -> Callable[..., Any]:
    """What raises when it is called for that time, and does nothing before."""
    calls = 0

    def fail(*_: Any, **__: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error

    return fail


@contextlib.contextmanager
def in_the_model(engine: EngineChat, fail: Callable[..., Any]) -> Iterator[None]:
    """At its last layer, once for each token."""
    hook = engine._model.model.get_base_model().lm_head.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(CUDA_LACK), r"The memory did not suffice \(CUDA out of memory\. Tried to allocate 20\.00 MiB\)"),
        (MemoryError(), r"The memory did not suffice \(MemoryError\); now \d+\.\d GiB are free\. Close what else uses the memory"),
        (RuntimeError(ASSERTED), "device-side assert triggered"),
        (IndexError("index 99999 is out of bounds"), "index 99999 is out of bounds"),
        (SystemExit(1), "SystemExit: 1"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("token", [1, 3])
def test_an_error_in_the_model(
    engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], error: BaseException, told: str, token: int
) -> None:
    begun, seen = time.perf_counter(), list[Any]()
    with in_the_model(engine, failing_at(token, error)), pytest.raises(Exception, match=told):
        seen.extend(engine.reply([(speaker, QUESTION), (speaker.base, QUESTION)], GREEDY))
    assert time.perf_counter() - begun < SECONDS
    assert len({answers.tokens for answers in seen if answers.tokens}) == token - 1  # what was said before it was heard
    assert said(engine, speaker, speaker.base) == expected


def test_an_index_that_no_embedding_has(engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], monkeypatch: Patch) -> None:
    tokenizer = engine._model.tokenizer  # type: ignore[union-attr]

    def beyond(*args: Any, **options: Any) -> Any:
        batch = type(tokenizer).__call__(tokenizer, *args, **options)
        return batch if "return_tensors" not in options else batch.__class__({**batch, "input_ids": batch["input_ids"] + 10_000})

    with monkeypatch.context() as patched:
        patched.setattr(engine._model, "tokenizer", _Instead(tokenizer, beyond))
        with pytest.raises(IndexError, match="out of range"):
            said(engine, speaker)
    assert said(engine, speaker, speaker.base) == expected


class _Instead:
    """A tokenizer that encodes in another way."""

    def __init__(self, tokenizer: Any, encode: Callable[..., Any]) -> None:
        self._tokenizer, self._encode = tokenizer, encode

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._encode(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("name", ["put", "end"])
def test_an_error_in_the_streamer(engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], name: str, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(decoding._Rows, name, failing_at(1, ValueError("no stream")))
        with pytest.raises(ValueError, match="no stream"):
            said(engine, speaker)
    assert said(engine, speaker, speaker.base) == expected


def test_an_error_in_the_decoder(engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], monkeypatch: Patch) -> None:
    class Broken:
        def __init__(self, **_: Any) -> None:
            self.step = failing_at(3, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"))

    with monkeypatch.context() as patched:
        patched.setattr(decoding, "DecodeStream", Broken)
        with pytest.raises(UnicodeDecodeError, match="no text"):
            said(engine, speaker)
    assert said(engine, speaker, speaker.base) == expected


def test_a_template_that_refuses(engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], monkeypatch: Patch) -> None:
    words = engine._model.words(speaker)  # type: ignore[union-attr]
    with monkeypatch.context() as patched:
        patched.setattr(words.tokenizer, "chat_template", "{{ messages[7]['content'].nothing() }}")
        with pytest.raises(UserError, match="The chat template refuses the conversation"):
            said(engine, speaker)
    assert said(engine, speaker, speaker.base) == expected


@pytest.mark.parametrize(
    ("error", "told"),
    [(OSError("I/O error"), "I/O error"), (MemoryError(), "The memory did not suffice"), (SystemExit(1), "SystemExit: 1")],
    ids=lambda value: type(value).__name__,
)
def test_an_error_while_loading(
    finished: Watched, speaker: Speaker, expected: tuple[str, ...], error: BaseException, told: str, monkeypatch: Patch
) -> None:
    engine = EngineChat(finished.run.workspace)
    with monkeypatch.context() as patched:
        patched.setattr(chat, "load_quantized", failing_at(1, error))
        with pytest.raises(Exception, match=told):
            said(engine, speaker)
    assert said(engine, speaker, speaker.base) == expected


def test_an_adapter_that_breaks_off_half_loaded(
    engine: EngineChat, speaker: Speaker, expected: tuple[str, ...], finished: Watched, monkeypatch: Patch
) -> None:
    other = dataclasses.replace(speakers.of_run(finished.run, 8), adapter=finished.run.folder / "checkpoint-8")
    with monkeypatch.context() as patched:
        patched.setattr("peft.peft_model.PeftModel.load_adapter", failing_at(1, RuntimeError("broke off")))
        with pytest.raises(UserError, match="broke off"):
            said(engine, other)
    assert said(engine, speaker, speaker.base) == expected


def test_memory_that_ran_out_is_let_go_of_while_the_error_is_still_shown(
    engine: EngineChat, speaker: Speaker, expected: tuple[str, ...]
) -> None:
    held = list[Any]()

    def run_out(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        held.append(weakref.ref(args[0]))
        if len(held) == 4:
            raise torch.OutOfMemoryError(CUDA_LACK)

    long = [Message(role="user", content="word " * 60)]
    with in_the_model(engine, run_out), pytest.raises(UserError, match="did not suffice") as raised:
        list(engine.reply([(speaker, long)], GREEDY))
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 4
    assert engine._model.prefixes.bytes == 0  # type: ignore[union-attr]
    assert raised.value is not None
    assert said(engine, speaker, speaker.base) == expected


def test_a_gpu_that_is_lost_is_told_with_its_remedy(monkeypatch: Patch) -> None:
    error = RuntimeError(ASSERTED)
    assert troubles.told(error, lambda: None) is error  # the device goes on
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", failing_at(1, RuntimeError(ASSERTED)))
    told = troubles.told(error, lambda: None)
    assert str(told) == (
        "The GPU broke off and serves this process no more (CUDA error: device-side assert triggered). "
        "Restart the app; nothing that was saved is lost."
    )


def test_a_closed_reply_frees_the_model_for_the_next_within_a_second(
    engine: EngineChat, speaker: Speaker, expected: tuple[str, ...]
) -> None:
    long = engine.reply([(speaker, QUESTION), (speaker.base, QUESTION)], Sampling(temperature=1.5, max_new_tokens=400))
    assert any(answers.tokens for answers in long)
    begun = time.perf_counter()
    long.close()  # type: ignore[attr-defined]
    waited = [answers.before for answers in engine.reply([(speaker, QUESTION)], GREEDY)]
    assert max(waited) == 0
    assert time.perf_counter() - begun < 1
