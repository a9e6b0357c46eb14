"""Encoder-decoder models: what they read and what they learn, the same in preview, training and chat."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import tiny
import torch
from peft import PeftConfig
from training import chat_model

from qlora_ui import jobs
from qlora_ui.data import checks
from qlora_ui.data.checks import Conversation
from qlora_ui.data.formats import Message
from qlora_ui.engine import seq2seq, tokens
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, load_quantized, load_tokenizer
from qlora_ui.engine.preview import open_preview
from qlora_ui.engine.tokenized import fit, tokenize
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, HeldOut, Log, Planned, Step
from qlora_ui.inspection import Inspector
from qlora_ui.runs import Run, Workspace

TALK = (
    Message(role="user", content="Question one?"),
    Message(role="assistant", content="The first answer."),
    Message(role="user", content="And two?"),
    Message(role="assistant", content="The second."),
)
ASKED = (
    "<|im_start|>user\nQuestion one?<|im_end|>\n<|im_start|>assistant\nThe first answer.<|im_end|>\n<|im_start|>user\nAnd two?<|im_end|>\n"
)


def never() -> bool:
    return False


def silent(event: Event) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("seq2seq")
    workspace = Workspace.open(folder / "home")
    architectures.build(workspace.models / "t5", "t5")
    return workspace, tiny.tiny_rows(folder / "rows.json", 14)


@pytest.fixture
def tokenizer(place: tuple[Workspace, Path]) -> Any:
    found = find_here("t5", "main", place[0].models)
    assert found is not None
    made = load_tokenizer(found)
    tokens.set_prompt_format(made, "chatml")
    return made


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, model="t5", **values)
    jobs.execute(run, train)
    return run


def batch(tokenizer: Any, *rows: tuple[Message, ...], max_seq_len: int = 10_000) -> dict[str, Any]:
    conversations = [Conversation(row=number, messages=row) for number, row in enumerate(rows, 1)]
    fitted = fit(tokenize(tokenizer, conversations, "last", never, lambda done: None), max_seq_len, "truncate")
    collate = seq2seq.Collator(tokenizer.pad_token_id, SimpleNamespace(decoder_start_token_id=0))
    return collate([fitted[index] for index in range(len(fitted))])


def test_the_encoder_reads_up_to_the_last_answer_which_is_the_target(tokenizer: Any) -> None:
    one = batch(tokenizer, TALK)
    assert tokenizer.decode(one["input_ids"][0]) == f"{ASKED}<|im_start|>assistant\n<|im_end|>"
    assert tokenizer.decode(one["labels"][0]) == "The second.<|im_end|>"
    assert one["decoder_input_ids"][0].tolist() == [0, *one["labels"][0, :-1].tolist()]


def test_short_rows_are_padded_on_both_sides_and_padding_is_neither_read_nor_learned(tokenizer: Any) -> None:
    both = batch(tokenizer, TALK, TALK[:2])
    alone = batch(tokenizer, TALK[:2])
    read, learned = int(both["attention_mask"][1].sum()), int((both["labels"][1] != tokens.IGNORED).sum())
    assert (read, learned) == (alone["input_ids"].shape[1], alone["labels"].shape[1])
    assert both["input_ids"][1, :read].equal(alone["input_ids"][0])
    assert both["labels"][1, :learned].equal(alone["labels"][0])
    assert both["decoder_input_ids"].shape == both["labels"].shape
    assert both[tokens.REAL_TOKENS] == sum(batch(tokenizer, row)[tokens.REAL_TOKENS] for row in (TALK, TALK[:2]))


def test_a_cut_shortens_the_answer_and_a_row_without_one_is_left_out(tokenizer: Any) -> None:
    whole = batch(tokenizer, TALK)
    source = whole["input_ids"].shape[1]
    cut = batch(tokenizer, TALK, max_seq_len=source + 3)
    assert cut["input_ids"].equal(whole["input_ids"])
    assert cut["labels"].equal(whole["labels"][:, :3])
    conversations = [Conversation(row=1, messages=TALK)]
    assert len(fit(tokenize(tokenizer, conversations, "last", never, lambda done: None), source, "truncate")) == 0


def test_the_preview_shows_what_is_trained(tokenizer: Any, place: tuple[Workspace, Path], tmp_path: Path) -> None:
    rows = [Conversation(row=1, messages=TALK)]
    data = tiny.tiny_config("rows.json").data
    (view,) = open_preview(tokenizer, rows, "print", data, tmp_path, never, lambda done: None).views([0], 1000, "truncate")
    assert "".join(piece.text for piece in view.pieces if piece.trained) == "The second.<|im_end|>"
    *_, look = Inspector(place[0], within=None).look(tiny.tiny_config(place[1], model="t5"))
    assert look.lengths is not None
    assert 0 < look.lengths.tokens_trained < look.lengths.tokens_total


def test_the_cache_keeps_causal_and_encoder_decoder_rows_apart(tokenizer: Any, tmp_path: Path) -> None:
    rows, data = [Conversation(row=1, messages=TALK)], tiny.tiny_config("rows.json").data
    two_sided = open_preview(tokenizer, rows, "print", data, tmp_path, never, lambda done: None)
    causal = open_preview(tiny.tiny_tokenizer(), rows, "print", data, tmp_path, never, lambda done: None)
    assert causal.tokenized.trained.sum() > two_sided.tokenized.trained.sum()


def test_the_losses_are_those_of_a_plain_loop(place: tuple[Workspace, Path], tokenizer: Any) -> None:
    run = trained(place, max_steps=1, micro_batch_size=3, gradient_accumulation_steps=4, num_train_epochs=1, held_out_share=0.2)
    (step,), (before, _) = tiny.events_of(run, Step), tiny.events_of(run, HeldOut)
    found = find_here("t5", "main", place[0].models)
    assert found is not None
    base = load_quantized(found, run.config().quantization, detect("float32"), silent, never).eval()
    data = checks.load(run.folder / "data")
    for rows, told in zip(checks.split(data, run.config().data, 42), (step.loss, before.loss), strict=True):
        total, count = 0.0, 0
        for row in rows:
            source = tokens.prompt(tokenizer, row.messages[:-1])
            answer = tokenizer(row.messages[-1].content + "<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():  # the library shifts the answer and takes the mean itself
                mean = base(**tokenizer(source, add_special_tokens=False, return_tensors="pt"), labels=answer).loss.item()
            total, count = total + mean * answer.shape[1], count + answer.shape[1]
        assert told == pytest.approx(total / count, abs=1e-4)


def test_the_run_says_what_it_does_and_its_adapter_is_of_that_kind(place: tuple[Workspace, Path]) -> None:
    run = trained(place, max_steps=1)
    said = [event.text for event in tiny.events_of(run, Log)]
    assert "Encoder-decoder model: the encoder reads a row up to its last answer, and that answer is trained" in said
    assert any("does not quantize it: wo (" in line for line in said)
    (planned,) = tiny.events_of(run, Planned)
    assert 0 < planned.trained_tokens < planned.tokens
    assert PeftConfig.from_pretrained(run.adapter).task_type == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"train_on": "everything"}, "train_on is 'everything', but this is an encoder-decoder model"),
        ({"long_rows": "split"}, "long_rows is 'split', but this is an encoder-decoder model"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha is 5, but this is an encoder-decoder model"),
    ],
)
def test_what_only_a_causal_model_can_do_is_refused_before_the_model_is_loaded(
    place: tuple[Workspace, Path], values: dict[str, Any], said: str
) -> None:
    last = tiny.events_of(trained(place, **values))[-1]
    assert isinstance(last, Failed)
    assert last.message.startswith(said)
    assert not last.traceback
    *_, look = Inspector(place[0], within=None).look(tiny.tiny_config(place[1], model="t5", **values))
    assert look.fault.startswith(said) or "neftune_noise_alpha" in values  # which changes no token


def test_plain_text_is_refused_with_its_row(tokenizer: Any) -> None:
    text = [Conversation(row=7, messages=(Message(role=tokens.RAW_TEXT, content="Once"),))]
    with pytest.raises(UserError, match=r"Row 7: is plain text, but an encoder-decoder model learns answers"):
        tokenize(tokenizer, text, "last", never, lambda done: None)


def test_chat_asks_as_training_did(place: tuple[Workspace, Path]) -> None:
    run = trained(place, max_steps=30, micro_batch_size=4, learning_rate=0.02, warmup_ratio=0, eval_steps=100, save_steps=100)
    model = chat_model(run)
    question = TALK[:1]
    assert tokens.prompt(model.tokenizer, question) == "<|im_start|>user\nQuestion one?<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    answers = list(model.reply([(model.speaker, question)], Sampling(temperature=0, max_new_tokens=12)))[-1]
    asked = model.tokenizer(tokens.prompt(model.tokenizer, question), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        plain = model.model.generate(**asked, do_sample=False, max_new_tokens=12, eos_token_id=model.end_ids)[0, 1:]
    assert answers.texts[0] == model.tokenizer.decode(plain, skip_special_tokens=True)
    assert answers.texts[0].startswith("The answer")  # learned far enough that rounding does not decide it
