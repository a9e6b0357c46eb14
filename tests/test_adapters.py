"""The adapter's shape: what each knob makes of it, what is refused in words, and going on with one that is there."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training import chat_model

from qlora_ui import jobs
from qlora_ui.config import RunConfig
from qlora_ui.data.formats import Message
from qlora_ui.engine import tokens
from qlora_ui.engine.adapter import add_adapter, check_start, continue_adapter, find_adapter, load_adapter
from qlora_ui.engine.chat import ChatModel
from qlora_ui.engine.decoding import Sampling
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import Found, load_quantized
from qlora_ui.engine.shape import layers_pattern
from qlora_ui.engine.train import train
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Failed, HeldOut, Log, Phase, Step
from qlora_ui.runs import Run, Workspace

IDS = torch.tensor([[10, 20, 30, 40, 50, 60]])
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
ALL = ATTENTION | {"gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    return workspace, tiny.tiny_rows(folder / "rows.json")


def config_of(**values: Any) -> RunConfig:
    return tiny.tiny_config("rows.json", **values)


def base_of(place: tuple[Workspace, Path], **values: Any) -> Any:
    found = Found(folder=place[0].models / values.pop("model", tiny.NAME), public_name="tiny", origin="here")
    config = config_of(**values)
    hardware = detect(config.quantization.compute_dtype)
    return load_quantized(found, config.quantization, hardware, lambda event: None, lambda: False).eval()


def adapted(place: tuple[Workspace, Path], **values: Any) -> Any:
    config = config_of(**values)
    return add_adapter(base_of(place, **values), config.adapter, 42).eval()


def layers(model: Any) -> dict[str, Any]:
    """Adapted layers by their name in the base."""
    return {name.removeprefix("base_model.model.model."): module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def learners(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(place: tuple[Workspace, Path], **values: Any) -> Run:
    run = tiny.tiny_run(*place, **{"save_steps": 100, "eval_steps": 100, **values})
    jobs.execute(run, train)
    return run


def failure(run: Run) -> str:
    last = tiny.events_of(run)[-1]
    assert isinstance(last, Failed)
    assert last.traceback == ""
    return last.message


# Where, how large, how scaled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"lora_r": 4, "lora_alpha": 16}, 4.0),
        ({"lora_r": 4, "lora_alpha": 16, "lora_alpha_ratio": 2}, 2.0),
        ({"lora_r": 4, "lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(4)),
    ],
)
def test_the_adapter_is_scaled_by_alpha_over_its_rank_or_its_root(
    place: tuple[Workspace, Path], values: dict[str, Any], scale: float
) -> None:
    found = layers(adapted(place, **values))
    assert {module.scaling["default"] for module in found.values()} == {scale}
    assert {module.lora_A["default"].weight.shape[0] for module in found.values()} == {4}


@pytest.mark.parametrize(("wish", "expected"), [("all-linear", ALL), ("attention", ATTENTION), ("q_proj, up_proj", {"q_proj", "up_proj"})])
def test_adapters_go_where_the_target_modules_say(place: tuple[Workspace, Path], wish: str, expected: set[str]) -> None:
    names = layers(adapted(place, target_modules=wish))
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == 2 * len(expected)


@pytest.mark.parametrize("wish", ["all-linear", "attention", "q_proj"])
def test_skipped_layers_have_no_adapter(place: tuple[Workspace, Path], wish: str) -> None:
    assert {name.split(".")[1] for name in layers(adapted(place, target_modules=wish, layers_to_skip="0"))} == {"1"}


def test_a_number_deeper_in_a_name_is_no_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    base = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block(), Block()])})
    pattern = layers_pattern(base, [1])
    assert pattern is not None
    matched = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(pattern, name)}
    assert matched == {"layers.1.experts.0", "layers.1.experts.1"}


def test_a_start_decides_how_the_a_sides_are_drawn_and_changes_no_answer(place: tuple[Workspace, Path]) -> None:
    with torch.no_grad():
        plain = base_of(place)(IDS).logits
        for start, spread in [("default", 1 / math.sqrt(3 * 64)), ("gaussian", 1 / 4)]:
            model = adapted(place, init_lora_weights=start)
            drawn = torch.cat([m.lora_A["default"].weight.flatten() for name, m in layers(model).items() if "down" not in name])
            assert drawn.std().item() == pytest.approx(spread, rel=0.05)
            assert torch.equal(model(IDS).logits, plain)


def test_dora_starts_as_the_base_and_learns_a_magnitude(place: tuple[Workspace, Path]) -> None:
    model = adapted(place, use_dora=True)
    assert {name.split(".")[-3] for name in learners(model)} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, base_of(place)(IDS).logits, atol=1e-4)
    run = trained(place, use_dora=True)
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert len([name for name in weights if "magnitude" in name]) == len(layers(model))


@pytest.fixture(scope="module")
def t5(place: tuple[Workspace, Path]) -> str:
    return architectures.build(place[0].models / "t5", "t5").name


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers_to_skip": "1, 2"}, "layers_to_skip has 2, but this model's layers are 0 to 1."),
        ({"layers_to_skip": "0-1"}, "No layer is left for an adapter: target_modules is 'all-linear', layers_to_skip '0-1', "),
        ({"quant_bits": 16, "modules_to_save": "model"}, "No layer is left for an adapter: "),
        ({"modules_to_save": "head"}, "modules_to_save has 'head', but this model has no such module with weights."),
        ({"modules_to_save": "act_fn"}, "modules_to_save has 'act_fn', but this model has no such module with weights."),
        ({"model": "t5", "modules_to_save": "lm_head"}, "modules_to_save has 'lm_head', but this model's head and embeddings are one"),
        ({"modules_to_save": "norm, down_proj"}, "modules_to_save has 'down_proj', which is quantized and cannot be trained as a whole."),
        ({"modules_to_save": "mlp"}, "modules_to_save has 'mlp', which is quantized"),
        ({"lora_bias": "all"}, "lora_bias is 'all', but this model has no biases. Set it to none."),
        ({"init_adapter": "nothing"}, "init_adapter is 'nothing': no run with an adapter has this id"),
    ],
)
def test_what_this_model_cannot_have_is_one_sentence(place: tuple[Workspace, Path], t5: str, values: dict[str, Any], said: str) -> None:
    run = trained(place, **values)
    assert failure(run).startswith(said)
    loaded = "quantizing" in [event.name for event in tiny.events_of(run, Phase)]
    assert loaded == ("is quantized" in said)  # which is seen on the weights only


# What else is trained ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untied(place: tuple[Workspace, Path]) -> str:
    return tiny.tiny_model(place[0].models / "untied", tied=False).name


@pytest.mark.parametrize(("compute_dtype", "names"), [("float32", ("lm_head", "norm")), ("bfloat16", ("lm_head",))])
def test_modules_trained_fully_learn_in_float32_and_come_back(
    place: tuple[Workspace, Path], untied: str, compute_dtype: str, names: tuple[str, ...]
) -> None:
    values = {"model": untied, "compute_dtype": compute_dtype, "modules_to_save": ", ".join(names), "sample_every": 2}
    model = adapted(place, **values)
    whole = {name for name in learners(model) if "modules_to_save" in name}
    assert {name.split(".")[-4] for name in whole} == set(names)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}

    run = trained(place, **values)
    assert run.state() == "finished", tiny.events_of(run)[-1]
    saved = load_file(run.adapter / "adapter_model.safetensors")
    given = load_file(place[0].models / untied / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight")[: len(names)]:
        assert (saved[f"base_model.model.{name}"].float() - given[name].float()).abs().max() > 1e-3
    assert not [name for name in saved if "layernorm" in name]
    base = base_of(place, **values)
    with torch.no_grad():
        before = base(IDS).logits
        tuned = load_adapter(base, run.adapter)
        assert (tuned(IDS).logits - before).abs().max() > 0.1
        with tuned.disable_adapter():
            assert torch.equal(tuned(IDS).logits, before)


@pytest.mark.parametrize("wish", ["lm_head", "embed_tokens"])
def test_a_head_that_is_the_embedding_stays_it_when_trained(place: tuple[Workspace, Path], wish: str) -> None:
    model = adapted(place, modules_to_save=wish)
    assert [name for name in learners(model) if "lora" not in name] == [
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    ]
    run = trained(place, modules_to_save=wish, max_steps=8, warmup_ratio=0)
    tuned = load_adapter(base_of(place), run.adapter)
    head, embedding = tuned.get_output_embeddings().weight, tuned.get_input_embeddings().weight
    assert torch.equal(head, embedding)
    measured = tiny.events_of(trained(place, init_adapter=run.id, modules_to_save=wish, max_steps=1), HeldOut)[0].loss
    assert measured == pytest.approx(tiny.events_of(run, HeldOut)[-1].loss, abs=1e-5)


@pytest.fixture(scope="module")
def with_biases(place: tuple[Workspace, Path]) -> str:
    return tiny.tiny_model_with_biases(place[0].models / "biased").name


@pytest.mark.parametrize(("wish", "count"), [("none", 0), ("lora_only", 2), ("all", 8)])
def test_biases_are_trained_as_wished_and_saved(place: tuple[Workspace, Path], with_biases: str, wish: str, count: int) -> None:
    run = trained(place, model=with_biases, lora_bias=wish, target_modules="q_proj")
    assert run.state() == "finished", tiny.events_of(run)[-1]
    saved = {name: tensor for name, tensor in load_file(run.adapter / "adapter_model.safetensors").items() if name.endswith("bias")}
    assert len(saved) == count
    moved = [name for name, tensor in saved.items() if (tensor - 0.01).abs().max() > 1e-4]
    assert moved == list(saved)


# An adapter that is there -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(place: tuple[Workspace, Path]) -> Run:
    return trained(place, lora_r=8, lora_alpha=8, target_modules="q_proj, v_proj", max_steps=8, warmup_ratio=0)


def warnings_of(run: Run) -> list[str]:
    return [event.text for event in tiny.events_of(run, Log) if event.level == "warning"]


def test_a_run_goes_on_where_the_adapter_it_starts_from_ended(place: tuple[Workspace, Path], first: Run) -> None:
    same = {"lora_r": 8, "lora_alpha": 8, "target_modules": "q_proj, v_proj"}
    run = trained(place, init_adapter=first.id, **same, max_steps=8, warmup_ratio=0)
    ended, started = tiny.events_of(first, HeldOut)[-1].loss, tiny.events_of(run, HeldOut)[0].loss
    assert started == pytest.approx(ended, abs=1e-5)
    assert tiny.events_of(run, HeldOut)[-1].loss < started
    assert len(tiny.events_of(run, Step)) == 8
    assert not [line for line in warnings_of(run) if "adapter" in line]
    told = [event.text for event in tiny.events_of(run, Log)]
    assert f"Goes on with the adapter {first.id}: rank 8, alpha 8" in told


def test_its_shape_wins_over_the_settings_and_each_difference_is_told(place: tuple[Workspace, Path], first: Run) -> None:
    run = trained(place, init_adapter=first.id, lora_r=4, lora_alpha=16, use_rslora=True, layers_to_skip="1", max_steps=1)
    assert run.state() == "finished"
    told = warnings_of(run)
    for said in ("lora_r is 4, but", "lora_alpha is 16, but", "use_rslora is True, but", "layers_to_skip is "):
        assert len([line for line in told if line.startswith(said)]) == 1, said
    assert "target_modules is all-linear, but the adapter to go on with has q_proj, v_proj: that is used" in told
    weights = load_file(run.adapter / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 2
    assert {weight.shape[0] for name, weight in weights.items() if "lora_A" in name} == {8}


def test_only_the_adapter_is_trained_when_it_goes_on(place: tuple[Workspace, Path], first: Run) -> None:
    said: list[Event] = []
    adapter = config_of(init_adapter=first.id, lora_dropout=0.25).adapter
    model = continue_adapter(base_of(place), adapter, first.adapter, "elsewhere", said.append)
    assert all(".lora_" in name for name in learners(model))
    assert len(learners(model)) == 8
    assert {module.lora_dropout["default"].p for module in layers(model).values()} == {0.25}
    assert any("not elsewhere" in event.text for event in said if isinstance(event, Log))


def test_a_folder_in_the_workspace_is_an_adapter_and_nothing_outside_is(place: tuple[Workspace, Path], first: Run, tmp_path: Path) -> None:
    workspace = place[0]
    shutil.copytree(first.adapter, workspace.root / "mine" / "a", dirs_exist_ok=True)
    assert find_adapter("mine/a", workspace) == workspace.root / "mine" / "a"
    assert find_adapter(first.id, workspace) == first.adapter
    outside = shutil.copytree(first.adapter, tmp_path / "outside")
    for wish in (str(outside), f"../{outside.name}", "/", ".", "..", "mine", first.id + "/..", "x" * 300, "a\0b"):
        with pytest.raises(UserError) as caught:
            find_adapter(wish, workspace)
        assert caught.value.field == "init_adapter"


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def of_another_kind(folder: Path) -> None:
    change(folder, peft_type="IA3")


def change(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def of_another_size(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.zeros(3, *weight.shape[1:]) for name, weight in weights.items()}, folder / "adapter_model.safetensors")


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pickled, "has no adapter_model.safetensors"),
        (of_another_kind, "a IA3 adapter. Choose a LoRA adapter."),
        (lambda folder: change(folder, init_lora_weights="pissa"), "which started as pissa"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "its adapter_config.json cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "its adapter_config.json cannot be read"),
        (without_a_weight, "which does not fit tiny: it lacks 1 of its weights"),
        (of_another_size, "which does not fit tiny"),
        (lambda folder: change(folder, target_modules=["nowhere"]), "which does not fit tiny"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"), "which does not fit tiny"),
    ],
)
def test_an_adapter_that_cannot_be_gone_on_with_is_one_sentence(
    place: tuple[Workspace, Path], first: Run, tmp_path: Path, damage: Any, said: str
) -> None:
    workspace = Workspace.open(tmp_path)
    damage(shutil.copytree(first.adapter, workspace.root / "mine"))
    adapter = config_of(init_adapter="mine").adapter
    with pytest.raises(UserError) as caught:
        continue_adapter(base_of(place), adapter, find_adapter("mine", workspace), "tiny", lambda event: None)
    assert said in str(caught.value)
    assert str(caught.value).startswith("init_adapter is 'mine'")
    assert caught.value.field == "init_adapter"
    assert "\n" not in str(caught.value)


def test_an_adapter_with_new_tokens_goes_on_with_its_own_vocabulary(place: tuple[Workspace, Path]) -> None:
    first = trained(place, new_tokens="<|x|>, eos=<|end|>", prompt_format="guanaco", max_steps=2, warmup_ratio=0)
    run = trained(place, init_adapter=first.id, prompt_format="guanaco", max_steps=1)
    assert tiny.events_of(run, HeldOut)[0].loss == pytest.approx(tiny.events_of(first, HeldOut)[-1].loss, abs=1e-5)
    (rows,) = (weight for name, weight in load_file(run.adapter / "adapter_model.safetensors").items() if "token" in name)
    assert len(rows) == 2
    (first.adapter / "tokenizer.json").unlink()
    said = f"init_adapter is '{first.id}', which has new tokens, but its folder has no tokenizer.json that names them."
    assert failure(trained(place, init_adapter=first.id, max_steps=1)).startswith(said)


def test_a_dora_adapter_does_not_go_on_in_eight_bits(first: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(first.adapter, tmp_path / "mine")
    change(folder, use_dora=True)
    with pytest.raises(UserError, match="init_adapter is 'mine', which is DoRA, but quant_bits is 8"):
        check_start(folder, config_of(init_adapter="mine", quant_bits=8))
    assert not check_start(folder, config_of(init_adapter="mine"))


# Answering with it ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias")
@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"model": "untied", "modules_to_save": "norm"},
        {"modules_to_save": "lm_head"},
        {"model": "biased", "lora_bias": "all", "target_modules": "q_proj"},
        {"quant_bits": "8"},
    ],
)
def test_base_and_adapter_answer_side_by_side_whatever_the_adapter_is(
    place: tuple[Workspace, Path], untied: str, with_biases: str, values: dict[str, Any]
) -> None:
    chat = chat_model(trained(place, max_steps=6, warmup_ratio=0, held_out_share=0, **values))
    question = [Message(role="user", content="Question 3: which word is 3?")]
    greedy = Sampling(temperature=0, max_new_tokens=12)
    together = list(chat.reply([(chat.speaker, question), (chat.speaker.base, question)], greedy))[-1].texts
    alone = [list(chat.reply([(side, question)], greedy))[-1].texts[0] for side in (chat.speaker, chat.speaker.base)]
    assert list(together) == alone
    assert together[0] != together[1]
    assert together[1].rstrip("\ufffd") == plain_answer(base_of(place, **values), chat, question)


def plain_answer(base: Any, chat: ChatModel, question: list[Message]) -> str:
    """What a base that never saw an adapter says, without the half of a character at its end that a stream holds back."""
    asked = chat.tokenizer(tokens.prompt(chat.tokenizer, question), add_special_tokens=False, return_tensors="pt")
    answer = base.generate(**asked, do_sample=False, max_new_tokens=12, eos_token_id=chat.end_ids)[0, asked["input_ids"].shape[1] :]
    return str(chat.tokenizer.decode(answer, skip_special_tokens=True)).lstrip().rstrip("\ufffd")
