"""No knob is dead: changing any of them changes what the engine is told, or what it makes. A new knob needs its line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from qlora_ui import jobs
from qlora_ui.config import KNOBS, RunConfig
from qlora_ui.data import sources
from qlora_ui.engine import model as engine_model
from qlora_ui.engine import watch
from qlora_ui.engine.hardware import detect
from qlora_ui.engine.model import find_here, quantization_config
from qlora_ui.engine.train import read_rows, train, training_arguments
from qlora_ui.engine.watch import FiniteSteps
from qlora_ui.errors import UserError
from qlora_ui.events import HeldOut, Log, Sample, Step
from qlora_ui.runs import Run, Workspace

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def never() -> bool:
    return False


# What a run looks like from outside: each of these is compared between two runs that differ in one knob. ------------------


def arguments(run: Run) -> Any:
    """What Trainer is told."""
    told = training_arguments(run, run.config(), detect("float32"), has_held_out=True).to_dict()
    return {name: value for name, value in told.items() if name not in ("output_dir", "logging_dir", "run_name")}


def quantization(run: Run) -> Any:
    """What bitsandbytes is told, and the dtype of the whole."""
    config = run.config().quantization
    dtype = getattr(torch, detect(config.compute_dtype).compute_dtype)
    told = quantization_config(config, dtype)
    return dtype, told and told.to_dict()


def adapter(run: Run) -> Any:
    """What PEFT is told, and what is trained in consequence, with how it starts."""
    model = tiny.tiny_trainer(run).model
    told = model.peft_config["default"].to_dict()
    trained = {name: weight.detach().sum().item() for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value for name, value in told.items() if name != "base_model_name_or_path"}, trained


def optimizer_groups(run: Run) -> Any:
    groups = tiny.tiny_trainer(run).create_optimizer().param_groups
    return [(len(group["params"]), group["lr"]) for group in groups]


def rows(run: Run) -> Any:
    """The tokens and labels of all rows, in their two parts."""
    trainer = tiny.tiny_trainer(run)
    return [[part[index] for index in range(len(part))] for part in (trainer.train_dataset, trainer.eval_dataset or [])]


def conversations(run: Run) -> Any:
    """What is read from the data set; what cannot be read is told in words."""
    try:
        data = read_rows(run, run.config(), lambda event: None, never)
    except UserError as error:
        return str(error)
    return [row.messages for row in data.conversations], [row.messages for row in data.held_out]


def found_model(run: Run) -> Any:
    config = run.config().model
    found = find_here(config.model, config.revision, run.workspace.models)
    return found and found.folder


def asked_of_the_hub(run: Run) -> Any:
    asked: list[Any] = []

    def snapshot_download(name: str, **wishes: Any) -> str:
        asked.append((name, wishes["revision"]))
        raise LocalEntryNotFoundError("not here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_model, "snapshot_download", snapshot_download)
        found_model(run)
    return asked


def kept(run: Run) -> list[str]:
    """The checkpoints that are left at its end."""
    jobs.execute(run, train)
    return sorted(folder.name for folder in run.folder.glob("checkpoint-*"))


def told(run: Run) -> Any:
    """What a whole training says: log lines but for those that hold measurements of the machine, samples, and held-out losses."""
    jobs.execute(run, train)
    log = [event.text for event in tiny.events_of(run, Log) if "GiB" not in event.text and "Device" not in event.text]
    samples = [(event.step, event.prompt, event.adapter) for event in tiny.events_of(run, Sample)]
    return run.state(), log, samples, [event.loss for event in tiny.events_of(run, HeldOut)]


def after_divergence(run: Run) -> list[float]:
    """The learning rates of a training whose loss is never finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FiniteSteps, "take", lambda self, loss: self.__dict__.update(loss_is_finite=loss.isnan()) or loss)
        patch.setattr(watch, "MOST_SKIPPED_IN_A_ROW", 2)
        jobs.execute(run, train)
    return [event.learning_rate for event in tiny.events_of(run, Step)]


Look = Callable[[Run], Any]

# Knob -> (what it is changed to, where that shows, what else both runs need).
SEEN: dict[str, tuple[Any, Look] | tuple[Any, Look, dict[str, Any]]] = {
    "model": ("other", found_model),
    "revision": ("v2", asked_of_the_hub, {"model": "owner/name"}),
    "trust_remote_code": (True, told, {"max_steps": 1}),
    "quant_bits": ("8", quantization),
    "quant_type": ("fp4", quantization),
    "double_quant": (False, quantization),
    "compute_dtype": ("bfloat16", quantization),
    "quant_storage": ("bfloat16", quantization),
    "lora_r": (8, adapter),
    "lora_alpha": (32, adapter),
    "lora_alpha_ratio": (3, adapter),
    "lora_dropout": (0.25, adapter),
    "lora_bias": ("lora_only", adapter, {"model": "biased"}),
    "target_modules": ("attention", adapter),
    "layers_to_skip": ("0", adapter),
    "modules_to_save": ("lm_head", adapter),
    "use_rslora": (True, adapter),
    "use_dora": (True, adapter),
    "init_lora_weights": ("gaussian", adapter),
    "init_adapter": ("mine", told, {"max_steps": 1}),
    "data": ("other.json", conversations),
    "data_format": ("guanaco", conversations),
    "columns": ("output=input", conversations),
    "prompt_format": ("guanaco", rows),
    "chat_template": (TEMPLATE + "!", rows, {"prompt_format": "custom", "chat_template": TEMPLATE}),
    "train_on": ("everything", rows),
    "max_seq_len": (48, rows),
    "long_rows": ("drop", rows, {"max_seq_len": 48}),
    "held_out_share": (0.5, rows),
    "held_out_rows": (3, rows),
    "new_tokens": ("<|new|>", told, {"max_steps": 1}),
    "held_out_split": ("test", conversations, {"data": "o/set"}),
    "learning_rate": (0.02, arguments),
    "num_train_epochs": (3, arguments),
    "max_steps": (7, arguments),
    "micro_batch_size": (3, arguments),
    "gradient_accumulation_steps": (3, arguments),
    "lr_scheduler": ("cosine", arguments),
    "warmup_ratio": (0.5, arguments),
    "warmup_steps": (3, arguments),
    "optimizer": ("sgd", arguments),
    "loraplus_lr_ratio": (4, optimizer_groups),
    "adam_beta1": (0.8, arguments),
    "adam_beta2": (0.9, arguments),
    "adam_epsilon": (1e-6, arguments),
    "max_grad_norm": (1, arguments),
    "weight_decay": (0.1, arguments),
    "neftune_noise_alpha": (5, arguments),
    "on_divergence": ("go_back", after_divergence, {"max_steps": 4}),
    "group_by_length": (True, arguments),
    "packing": ("off", told, {"max_steps": 1}),
    "gradient_checkpointing": ("on", told, {"max_steps": 1}),
    "seed": (7, arguments),
    "eval_steps": (1, arguments),
    "save_steps": (1, arguments),
    "save_total_limit": (5, kept, {"max_steps": 4, "save_steps": 1}),
    "early_stopping_patience": (1, told, {"max_steps": 4, "eval_steps": 1, "learning_rate": 1.0}),
    "keep": ("best", told, {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0}),
    "sample_every": (1, told, {"max_steps": 1}),
    "report_to": ("tensorboard", told, {"max_steps": 1}),
    "sample_prompts": ("Hello?", told, {"max_steps": 1, "sample_every": 1}),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With the models, the adapter and the data sets that the table names."""
    folder = tmp_path_factory.mktemp("knobs")
    workspace = Workspace.open(folder / "home")
    tiny.tiny_model(workspace.models / tiny.NAME)
    tiny.tiny_model(workspace.models / "other")
    tiny.tiny_model_with_biases(workspace.models / "biased")
    tiny.tiny_rows(folder / "rows.json")
    tiny.tiny_rows(folder / "other.json", 13)
    adapter_run = tiny.tiny_run(workspace, folder / "rows.json", max_steps=2, lora_r=2)
    jobs.execute(adapter_run, train)
    adapter_run.adapter.rename(workspace.root / "mine")
    return workspace


def run_of(workspace: Workspace, values: dict[str, Any]) -> Run:
    data = str(values.get("data", "rows.json"))
    place = data if "/" in data else workspace.root.parent / data
    return tiny.tiny_run(workspace, place, **{name: value for name, value in values.items() if name != "data"})


def with_a_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for it, whose rows are the same in every split."""
    plain_read = sources.read

    def row(number: int) -> sources.RawRow:
        return sources.RawRow(number=number, values={"prompt": f"Question {number}?", "completion": f"Answer {number}."})

    def read(reference: str, *rest: Any) -> Any:
        return iter([row(1), row(2)] if reference.startswith("o/set") else plain_read(reference, *rest))

    monkeypatch.setattr(sources, "read", read)


def test_the_table_has_every_knob() -> None:
    assert set(SEEN) == set(KNOBS)


@pytest.fixture(scope="module")
def looked() -> dict[Any, Any]:
    """What was seen of runs before a change."""
    return {}


@pytest.mark.parametrize("name", KNOBS)
def test_changing_a_knob_changes_something(
    workspace: Workspace, looked: dict[Any, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_set_on_the_hub(monkeypatch)
    changed, look, *rest = SEEN[name]
    needed = rest[0] if rest else {}
    before, after = (run_of(workspace, {**needed, **values}) for values in ({}, {name: changed}))
    if name != "data":
        differing = {knob for knob, value in before.config().values().items() if after.config().values()[knob] != value}
        assert differing == {name}
    if (unchanged := (look.__name__, *sorted(needed.items()))) not in looked:  # most knobs are changed beside the same others
        looked[unchanged] = look(before)
    assert looked[unchanged] != look(after)


@pytest.mark.parametrize("name", ["quant_bits", "adam_beta1", "lora_r", "train_on"])
def test_two_runs_that_are_alike_look_alike(workspace: Workspace, name: str) -> None:
    """Else a difference would prove nothing."""
    look = SEEN[name][1]
    assert look(run_of(workspace, {})) == look(run_of(workspace, {}))


def test_every_default_is_a_value_of_its_own_type() -> None:
    assert all(type(value) is KNOBS[name].kind for name, value in RunConfig().values().items())
