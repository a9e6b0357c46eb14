"""A run as a folder that trains it again without this app: script, notebook, settings, tokens. Knows nothing of Gradio or the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from qlora_ui import checkpoints
from qlora_ui.command_line import train_command
from qlora_ui.config import RunConfig
from qlora_ui.data import checks
from qlora_ui.disk import telling_trouble
from qlora_ui.engine import tokens, train
from qlora_ui.engine.model import find, load_tokenizer
from qlora_ui.errors import UserError
from qlora_ui.events import Event
from qlora_ui.runs import Run

ALONE = Path(__file__).with_name("train_alone.py")
NOT_TOLD = ("base_model_name_or_path", "inference_mode", "peft_version", "auto_mapping", "revision", "peft_type", "runtime_config")
README = """# {name}, trained again without QLoRA UI

    pip install torch transformers peft bitsandbytes accelerate datasets
    python train.py

`settings.json` holds every setting, `train.jsonl` the tokens and what of them is learned, `train.ipynb` the same script in
cells. `model` in the settings is an id of the Hub, or the folder of a model that lies on this machine only. The rows of a
batch are padded here where QLoRA UI packs them: a step takes longer, and its loss is the same up to rounding and the draws
of dropout.

With QLoRA UI the same run is started so:

    {command}
"""


def write(run: Run, folder: Path, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Make the folder. Raises UserError for a run that the script could not repeat, and for a folder that is there already."""
    config, lora = run.config(), lora_settings(run)
    check(config, run.workspace.root)
    with telling_trouble(folder.parent):
        aside = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            raise UserError(f"{folder} exists already. Choose another folder.", field="to")
        try:
            aside.mkdir(parents=True)
            fill(aside, run, config, lora, should_stop)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def fill(folder: Path, run: Run, config: RunConfig, lora: dict[str, Any], should_stop: Callable[[], bool]) -> None:
    named = config.model
    found = find(named.model, named.revision, run.workspace.models, nobody, should_stop)
    tokenizer = load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format, config.data.chat_template)
    if tokens.is_encoder_decoder(tokenizer):
        raise UserError(f"{named.model} is an encoder-decoder, for which there is no script. Train it with QLoRA UI.")
    rows, held_out = train.encode(run, tokenizer, checks.load(run.folder / "data"), nobody, should_stop)
    commit = run.facts().get("model_commit")
    settings = {
        "model": named.model if commit else str(found.folder),  # what lies on this machine only has no other name
        "revision": commit or "main",
        "compute_dtype": config.quantization.compute_dtype,
        "quantization": bits(config),
        "lora": lora,
        "seed": config.optimization.seed,
        "pad_token_id": tokenizer.pad_token_id,
        "chat_template": tokenizer.chat_template,
        "training": training(config, has_held_out=len(held_out) > 0),
        "early_stopping_patience": config.schedule.early_stopping_patience if len(held_out) else 0,
    }
    (folder / "settings.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name, part in (("train", rows), ("held_out", held_out)):
        if len(part):
            write_rows(folder / f"{name}.jsonl", (part[index] for index in range(len(part))))
    script = ALONE.read_text("utf-8")
    (folder / "train.py").write_text(script, "utf-8")
    (folder / "train.ipynb").write_text(json.dumps(notebook(script), indent=1) + "\n", "utf-8")
    command = train_command(config, run.workspace.root)
    (folder / "README.md").write_text(README.format(name=run.name, command=command), "utf-8")


def check(config: RunConfig, home: Path) -> None:
    """Raise UserError for what plain Trainer and PEFT cannot be told in a script of this length."""
    beyond = {
        "new_tokens": config.data.new_tokens,
        "init_adapter": config.adapter.init_adapter,
        "modules_to_save": config.adapter.modules_to_save,
        "loraplus_lr_ratio": config.optimization.loraplus_lr_ratio != 1,
        "trust_remote_code": config.model.trust_remote_code,
    }
    if said := [name for name, value in beyond.items() if value]:
        raise UserError(
            f"There is no script for a run with {' and '.join(said)}. Repeat it with: {train_command(config, home)}", field=said[0]
        )


def lora_settings(run: Run) -> dict[str, Any]:
    """What the run's adapter was made with, in PEFT's words, where it is not PEFT's default. Raises UserError before there is one."""
    saved = run.adapter if run.adapter.is_dir() else checkpoints.newest_complete(run)
    if saved is None:
        raise UserError(f"{run.id} has no adapter and no checkpoint yet. Ask again after its first one.", field="run")
    config, plain = LoraConfig.from_pretrained(saved).to_dict(), LoraConfig().to_dict()
    told = {name: value for name, value in config.items() if name not in NOT_TOLD and value != plain[name]}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in told.items()}


def bits(config: RunConfig) -> dict[str, Any]:
    """BitsAndBytesConfig's arguments, without the compute dtype; empty for a base that is not quantized."""
    q = config.quantization
    if q.quant_bits != "4":
        return {"load_in_8bit": True} if q.quant_bits == "8" else {}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": q.quant_type,
        "bnb_4bit_use_double_quant": q.double_quant,
        "bnb_4bit_quant_storage": q.quant_storage,
    }


def training(config: RunConfig, has_held_out: bool) -> dict[str, Any]:
    """TrainingArguments' arguments, but for those that depend on the machine."""
    o, checkpointing = config.optimization, config.optimization.gradient_checkpointing != "off"
    keeps_best = has_held_out and config.schedule.keep == "best"
    return {
        **train.training_values(config, has_held_out),
        # Trainer finds the best among what it saves, so it saves whenever it measures.
        **({"load_best_model_at_end": True, "save_steps": config.schedule.eval_steps} if keeps_best else {}),
        "metric_for_best_model": "eval_loss" if has_held_out else None,
        "greater_is_better": False,
        "per_device_train_batch_size": o.micro_batch_size,
        "per_device_eval_batch_size": o.micro_batch_size,
        "gradient_accumulation_steps": o.gradient_accumulation_steps,
        "activation_checkpointing": checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
        "save_total_limit": config.schedule.save_total_limit,
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: list(map(int, row[name])) for name in ("input_ids", "labels")}) + "\n")


def notebook(script: str) -> dict[str, Any]:
    """The script in cells, one for each part that `# %%` begins."""
    about, *parts = script.split("# %% ")
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": about.strip().strip('"').strip()}]
    for part in parts:
        title, _, code = part.partition("\n")
        cells.append({"cell_type": "markdown", "metadata": {}, "source": f"## {title}"})
        cells.append({"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None, "source": code.strip()})
    return {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 4}


def nobody(event: Event) -> None:
    """What the run told when it did this is in its log."""
