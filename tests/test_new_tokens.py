"""New tokens: rows of their own, trained and saved with the adapter, and not one other row touched."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from training import chat_model

from qlora_ui import jobs
from qlora_ui.config import QuantizationConfig
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import load_adapter
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, load_quantized, make_room
from qlora_ui.engine.shape import token_layers
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Failed, HeldOut, Log, Sample
from qlora_ui.runs import Run, Workspace

NEW = "pad=<|fill|>, <|think|>, eos=<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ '<|think|>' + message['content'] + '<|end|>' }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ASKED = "Question 1: which word is 1?"


@dataclass
class Trained:
    """A run with new tokens, on a model whose head shares the embedding's rows or has its own."""

    run: Run
    tied: bool
    old: int


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Trained]:
    return {tied: trained(tmp_path_factory.mktemp("new-tokens"), tied) for tied in (True, False)}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def finished(request: pytest.FixtureRequest, both: dict[bool, Trained]) -> Trained:
    return both[request.param]


def trained(folder: Path, tied: bool, **more: Any) -> Trained:
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME, tied=tied)
    data = tiny.tiny_rows(folder / "rows.json")
    values: dict[str, Any] = {"prompt_format": "custom", "chat_template": TEMPLATE, "new_tokens": NEW, "max_steps": 6, "sample_every": 3}
    values |= more
    run = tiny.tiny_run(workspace, data, **values)
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run, Failed)
    return Trained(run=run, tied=tied, old=len(tiny.tiny_tokenizer()))


def base_of(run: Run) -> Any:
    found = find_here(tiny.NAME, "main", run.workspace.models)
    assert found is not None
    return load_quantized(found, QuantizationConfig(), detect("float32"), lambda event: None, lambda: False)


def test_the_tokens_are_in_the_saved_tokenizer_each_as_one_id(finished: Trained) -> None:
    tokenizer = chat_model(finished.run).tokenizer
    assert tokenizer("<|fill|><|think|><|end|>")["input_ids"] == [finished.old, finished.old + 1, finished.old + 2]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|fill|>", "<|end|>")
    assert tokenizer.decode(tokenizer("<|think|>yes<|end|>")["input_ids"], skip_special_tokens=True) == "yes"


def test_the_run_learns_and_says_which_tokens_it_adds(finished: Trained) -> None:
    losses = [event.loss for event in tiny.events_of(finished.run, HeldOut)]
    assert losses[-1] < losses[0] - 0.5
    said = [event.text for event in tiny.events_of(finished.run, Log)]
    assert "New tokens, trained beside the adapter: <|fill|>, <|think|>, <|end|>" in said
    assert {event.step for event in tiny.events_of(finished.run, Sample)} == {0, 3, 6}


def test_no_other_row_is_saved_or_changed(finished: Trained) -> None:
    for folder in (finished.run.adapter, *finished.run.checkpoints()):
        saved = load_file(folder / "adapter_model.safetensors")
        rows = {name: tensor for name, tensor in saved.items() if "lora_" not in name}
        assert len(rows) == (1 if finished.tied else 2)
        assert all(tensor.shape[0] == 3 for tensor in rows.values())

    before = base_of(finished.run)
    after = base_of(finished.run)
    make_room(after, finished.old + 3)
    model = load_adapter(after, finished.run.adapter)
    for layer, untouched in (
        (model.get_input_embeddings(), before.get_input_embeddings()),
        (model.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert layer.weight.shape[0] == finished.old + 3
        assert torch.equal(layer.weight[: finished.old], untouched.weight)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(head[finished.old :], embedding[finished.old :]) == finished.tied


def test_the_rows_of_trained_tokens_moved_away_from_where_they_began(finished: Trained) -> None:
    base = base_of(finished.run)
    make_room(base, finished.old + 3)
    began = [layer.weight.detach().clone() for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    for rows in began:
        assert torch.allclose(rows[finished.old :], rows[: finished.old].mean(dim=0).expand(3, -1), atol=1e-6)
    model = load_adapter(base, finished.run.adapter)
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    heard, said = ((layer.weight - rows)[finished.old :].abs().amax(dim=1) for layer, rows in zip(layers, began, strict=True))
    assert (said > 1e-3).all()  # a token learns also by not being said
    # Read by nothing that is trained are the padding and the end of the last turn.
    assert (heard > 1e-3).tolist() == ([True, True, True] if finished.tied else [False, True, False])


ELSEWHERE = """
import json, os, pathlib, sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)
settings = {"dtype": torch.float32, "device_map": {"": "cpu"}}
settings["quantization_config"] = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)

def by_hand(adapter, tokenizer):
    name = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(name, **settings)
    base.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(base, adapter)

def at_once(adapter, tokenizer):
    return AutoPeftModelForCausalLM.from_pretrained(adapter, **settings)

def as_its_card_says(adapter, tokenizer):
    os.chdir(pathlib.Path(adapter).parents[2] / "models")
    code = (pathlib.Path(adapter) / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code.replace('adapter = "."', f"adapter = {adapter!r}"), scope := {})
    return scope["model"]

told = []
for adapter, text in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for load in (by_hand, at_once, as_its_card_says):
        model = load(adapter, tokenizer).eval()
        for module in model.modules():
            module.support_avx512bf16_for_cpu = False  # a kernel that rounds otherwise, on those CPUs that have it
        with torch.no_grad():
            told.append({"ids": ids[0].tolist(), "logits": model(ids).logits[0].tolist()})
print(json.dumps({"told": told, "ours": [name for name in sys.modules if name.startswith("qlora_ui")]}))
"""


def test_plain_peft_in_a_fresh_process_computes_the_same(both: dict[bool, Trained], tmp_path: Path) -> None:
    asked, expected = [], []
    for finished in both.values():
        chat = chat_model(finished.run)
        text = tokens.prompt(chat.tokenizer, [Message(role="user", content=ASKED)]) + "<|think|>The answer is<|end|>"
        ids = chat.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected += [(ids[0].tolist(), chat.model(ids).logits[0])] * 3
        asked.append((str(finished.run.adapter), text))
    command = [sys.executable, "-c", ELSEWHERE, json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["ours"] == []
    for told, (ids, logits) in zip(answer["told"], expected, strict=True):
        assert told["ids"] == ids
        assert torch.equal(torch.tensor(told["logits"]), logits)


def test_the_lines_of_python_on_the_card_compute_the_same(finished: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (finished.run.adapter / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    base = str(finished.run.workspace.models / tiny.NAME)
    monkeypatch.chdir(finished.run.adapter)
    made: dict[str, Any] = {}
    exec(lines.replace(repr(tiny.NAME), repr(base)), made)
    chat = chat_model(finished.run)
    ids = chat.tokenizer("<|think|>The answer is<|end|>", return_tensors="pt")["input_ids"]
    assert made["tokenizer"]("<|think|>The answer is<|end|>", return_tensors="pt")["input_ids"].equal(ids)
    for module in made["model"].modules():
        module.support_avx512bf16_for_cpu = False  # a kernel that rounds otherwise, on those CPUs that have it
    with torch.no_grad():
        assert torch.allclose(made["model"].eval()(ids).logits, chat.model(ids).logits, atol=1e-4)


def test_the_chat_stops_at_the_new_end_token_and_answers_from_both_sides(finished: Trained) -> None:
    chat = chat_model(finished.run)
    assert chat.end_ids == [finished.old + 2]
    asked = [Message(role="user", content=ASKED)]
    *_, last = chat.reply([(chat.speaker.base, asked), (chat.speaker, asked)], Sampling(temperature=0, max_new_tokens=48))
    base, adapter = last.texts
    assert base != adapter
    for event in (event for event in tiny.events_of(finished.run, Sample) if event.step == 6):
        asked = [Message(role="user", content=event.prompt)]
        *_, last = chat.reply([(chat.speaker.base, asked), (chat.speaker, asked)], Sampling(temperature=0, max_new_tokens=48))
        for text, sampled in zip(last.texts, (event.base, event.adapter), strict=True):
            assert sampled.startswith(text.strip().rstrip("\ufffd"))  # the chat waits for the other bytes of a torn character
            assert len(text) > 10


def test_a_run_that_goes_on_with_such_an_adapter_has_its_tokens(finished: Trained) -> None:
    values = {"prompt_format": "tokenizer", "init_adapter": finished.run.id, "max_steps": 1}
    run = tiny.tiny_run(finished.run.workspace, finished.run.config().data.data, **values)
    jobs.execute(run, train)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    ended, began = tiny.events_of(finished.run, HeldOut)[-1].loss, tiny.events_of(run, HeldOut)[0].loss
    assert began == pytest.approx(ended, abs=1e-5)
    one, other = (load_file(which.adapter / "adapter_model.safetensors") for which in (finished.run, run))
    assert one.keys() == other.keys()


@pytest.mark.parametrize(("tied", "whole"), [(True, "lm_head"), (False, "lm_head"), (False, "embed_tokens")])
def test_a_layer_that_is_trained_as_a_whole_has_the_new_rows_in_it(tmp_path: Path, tied: bool, whole: str) -> None:
    run = trained(tmp_path, tied, modules_to_save=whole)
    saved = load_file(run.run.adapter / "adapter_model.safetensors")
    assert {len(saved[name]) for name in saved if "lora_" not in name} == ({run.old + 3} if tied else {run.old + 3, 3})
    told = tiny.events_of(run.run, Sample)[-1]
    chat = chat_model(run.run)
    *_, last = chat.reply([(chat.speaker, [Message(role="user", content=told.prompt)])], Sampling(temperature=0, max_new_tokens=48))
    assert told.adapter.startswith(last.texts[0].strip().rstrip("\ufffd"))


# The setting --------------------------------------------------------------------------------------------------------------


def test_a_token_that_is_there_already_is_used_as_it_is() -> None:
    tokenizer = tiny.tiny_tokenizer()
    size = len(tokenizer)
    assert tokens.add_new(tokenizer, "<|im_start|>, pad=<|im_start|>") == []
    assert len(tokenizer) == size
    assert tokenizer.pad_token == "<|im_start|>"


def test_the_same_tokens_added_again_add_nothing() -> None:
    tokenizer = tiny.tiny_tokenizer()
    assert len(tokens.add_new(tokenizer, "<a>, <b>,, <a>")) == 2
    assert tokens.add_new(tokenizer, "<a>, <b>") == []


def test_what_stands_before_an_equals_sign_is_part_of_the_token_unless_it_is_a_role() -> None:
    tokenizer = tiny.tiny_tokenizer()
    (added,) = tokens.add_new(tokenizer, "<a=b>")
    assert tokenizer.convert_ids_to_tokens(added) == "<a=b>"


def test_a_role_without_a_token_is_one_sentence() -> None:
    with pytest.raises(UserError, match="'pad=' names no token") as refused:
        tokens.add_new(tiny.tiny_tokenizer(), "<a>, pad=")
    assert refused.value.field == "new_tokens"


def test_a_model_with_rows_to_spare_is_not_resized(tiny_workspace: Workspace) -> None:
    found = find_here(tiny.NAME, "main", tiny_workspace.models)
    assert found is not None
    base = load_quantized(found, QuantizationConfig(), detect("float32"), lambda event: None, lambda: False)
    rows = base.get_input_embeddings().weight.shape[0]
    before = base.get_input_embeddings().weight.clone()
    assert make_room(base, rows - 5) == []
    assert make_room(base, rows - 5, [rows - 6]) == [rows - 6]
    after = base.get_input_embeddings().weight
    assert after.shape[0] == rows
    assert [index for index in range(rows) if not torch.equal(after[index], before[index])] == [rows - 6]


def test_a_head_with_a_bias_is_refused_because_its_rows_cannot_be_trained_alone(tiny_workspace: Workspace) -> None:
    found = find_here(tiny.NAME, "main", tiny_workspace.models)
    assert found is not None
    base = load_quantized(found, QuantizationConfig(), detect("float32"), lambda event: None, lambda: False)
    base.lm_head.bias = torch.nn.Parameter(torch.zeros(base.lm_head.out_features))
    with pytest.raises(UserError, match="head has a bias or is quantized") as refused:
        token_layers(base, [5], ())
    assert refused.value.field == "new_tokens"
