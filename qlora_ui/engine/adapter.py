"""The LoRA adapter: put a new one on the base, go on with an old one, load one to answer. Knows nothing of rows or Gradio."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from qlora_ui.config import AdapterConfig, RunConfig
from qlora_ui.engine.shape import START, check_bias, layers_pattern, lora_config, modules_to_save, refused, target_modules, targeted, whole
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.runs import Workspace

Emit = Callable[[Event], None]
WEIGHTS = "adapter_model.safetensors"


def add_adapter(base: Any, adapter: AdapterConfig, seed: int, learned: Sequence[int] = ()) -> PeftModel:
    """A new trainable LoRA adapter on a frozen base. The adapter is float32; B starts at zero, so it changes nothing yet.

    `learned` are tokens whose embeddings, and rows of the head, are trained too.
    """
    torch.manual_seed(seed)
    lora = lora_config(base, adapter, learned)
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise refused(adapter, error) from error
    return _ready(model)


def _ready(model: PeftModel) -> PeftModel:
    """What is trained in full precision, and an input that asks for gradients, which gradient checkpointing needs."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT leaves these copies in the compute dtype, too coarse to learn in
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    model.enable_input_require_grads()
    # Trainer's checkpoints too: PEFT would ask the Hub whether the vocabulary grew, and then save all embeddings of the base.
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
    return model


# An adapter that is there already ----------------------------------------------------------------------------------------


def find_adapter(wish: str, workspace: Workspace) -> Path:
    """The folder of a run's adapter, or of one in the workspace. Raises UserError when there is none that can be read safely."""
    try:
        places = [place.resolve() for place in (workspace.runs / wish / "adapter", workspace.root / wish)]
        folder = next(place for place in places if place.is_relative_to(workspace.root) and (place / "adapter_config.json").is_file())
    except (StopIteration, OSError, ValueError) as error:  # the latter two: what no file can be named
        raise UserError(
            f"init_adapter is {wish!r}: no run with an adapter has this id, and no adapter folder in {workspace.root} this name.",
            field="init_adapter",
        ) from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"init_adapter is {wish!r}, but it has no adapter_model.safetensors. Other files can run code when loaded; save it anew.",
            field="init_adapter",
        )
    return folder


def check_start(folder: Path, config: RunConfig) -> bool:
    """Whether an adapter to go on with brings a vocabulary of its own. Raises UserError for one that this run cannot go on with."""
    wish = config.adapter.init_adapter
    written = _written(folder, wish)
    if written.use_dora and config.quantization.quant_bits == "8":
        raise UserError(
            f"init_adapter is {wish!r}, which is DoRA, but quant_bits is 8: DoRA does not work on 8-bit layers. Set quant_bits to 4 or 16.",
            field="init_adapter",
        )
    if written.trainable_token_indices and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"init_adapter is {wish!r}, which has new tokens, but its folder has no tokenizer.json that names them. Copy it there.",
            field="init_adapter",
        )
    return bool(written.trainable_token_indices)


def continue_adapter(base: Any, adapter: AdapterConfig, folder: Path, base_name: str, emit: Emit) -> PeftModel:
    """A saved adapter on its base, trainable. Its shape wins over the config's, and each difference is told.

    Raises UserError when it is not LoRA or does not fit the base.
    """
    written = _written(folder, adapter.init_adapter)
    written.lora_dropout = adapter.lora_dropout  # no part of its shape: the run's own wish
    for name, wish, its_own in _differences(base, adapter, written):
        emit(Log(text=f"{name} is {wish}, but the adapter to go on with has {its_own}: that is used", level="warning"))
    if written.base_model_name_or_path and written.base_model_name_or_path != base_name:
        emit(Log(text=f"The adapter to go on with was trained on {written.base_model_name_or_path}, not {base_name}", level="warning"))
    try:
        check_bias(base, written.bias)
        model = PeftModel.from_pretrained(base, folder, config=written, is_trainable=True)
        if missing := set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(load_file(folder / WEIGHTS)):
            raise ValueError(f"it lacks {len(missing)} of its weights")  # PEFT would leave them as they are drawn
    except (UserError, ValueError, RuntimeError, IndexError, SafetensorError) as error:
        raise UserError(
            f"init_adapter is {adapter.init_adapter!r}, which does not fit {base_name}: {str(error).splitlines()[-1].strip(' .')}. "
            "Choose an adapter of this model.",
            field="init_adapter",
        ) from error
    emit(Log(text=f"Goes on with the adapter {adapter.init_adapter}: rank {written.r}, alpha {written.lora_alpha:g}"))
    return _ready(model)


def _written(folder: Path, wish: str) -> LoraConfig:
    try:
        kind = json.loads((folder / "adapter_config.json").read_text("utf-8"))["peft_type"]
        if kind != "LORA":
            raise UserError(f"init_adapter is {wish!r}, a {kind} adapter. Choose a LoRA adapter.", field="init_adapter")
        written = LoraConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"init_adapter is {wish!r}, but its adapter_config.json cannot be read ({error}). Choose another.",
            field="init_adapter",
        ) from error
    if written.init_lora_weights not in (True, *START.values()):
        raise UserError(
            f"init_adapter is {wish!r}, which started as {written.init_lora_weights}: it belongs to another base than "
            "the plain one. Convert it to plain LoRA first (PEFT's save_pretrained can), or choose another.",
            field="init_adapter",
        )
    return written


def _differences(base: Any, adapter: AdapterConfig, written: LoraConfig) -> list[tuple[str, Any, Any]]:
    """Knob, what the run says, what the adapter has: for those whose effect the adapter's shape decides."""
    pairs = [
        ("lora_r", adapter.lora_r, written.r),
        ("lora_alpha", whole(adapter.alpha), whole(written.lora_alpha)),
        ("lora_bias", adapter.lora_bias, written.bias),
        ("use_rslora", adapter.use_rslora, written.use_rslora),
        ("use_dora", adapter.use_dora, written.use_dora),
        ("modules_to_save", modules_to_save(base, adapter.modules_to_save), written.modules_to_save),
        ("layers_to_skip", layers_pattern(base, adapter.skipped_layers()), written.exclude_modules),
    ]
    told: list[tuple[str, Any, Any]] = [pair for pair in pairs if pair[1] != pair[2]]
    if targeted(base, target_modules(base, adapter.target_modules)) != targeted(base, written.target_modules):
        its_own = written.target_modules if isinstance(written.target_modules, str) else ", ".join(sorted(written.target_modules or ()))
        told.append(("target_modules", adapter.target_modules, its_own))
    return told


def mixes(model: PeftModel) -> bool:
    """Whether PEFT can answer with each of the adapters and without one in one batch.

    Not with DoRA, trained biases, a norm trained fully, or adapters on the bare weights of a mixture of experts. Of several adapters
    none may have layers or tokens of its own that are trained as they are: PEFT leaves them out where the active adapter has none.
    """
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return False
    configs = model.peft_config.values()
    own = [module.original_module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    whole = [module.original_module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return (
        all(config.bias == "none" and not config.use_dora for config in configs)
        and all(isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) for module in whole)
        and (len(configs) == 1 or not own)
    )


def load_adapter(base: Any, folder: Path, name: str = "default") -> PeftModel:
    """A saved adapter on its base, or on one that has others, for answering. Only safetensors are read.

    Raises UserError when there are none, or they do not fit the base, which is spoiled then.
    """
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors. Choose a run whose adapter was saved.", field="run")
    try:
        if isinstance(base, PeftModel):
            base.load_adapter(folder, adapter_name=name, is_trainable=False)
            model = base
        else:
            model = PeftModel.from_pretrained(base, folder, adapter_name=name, is_trainable=False)
        needed = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
        with safe_open(folder / WEIGHTS, framework="pt") as saved:
            there = set(saved.keys())
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise _misfit(folder, str(error).splitlines()[-1]) from error
    if missing := needed - there:  # PEFT would leave them as they are drawn
        raise _misfit(folder, f"it lacks {len(missing)} of its weights")
    if unknown := [name for name in there - needed if "lora_" in name]:
        raise _misfit(folder, f"{len(unknown)} of its weights are for layers that the model does not have")
    return model.eval()


def _misfit(folder: Path, reason: str) -> UserError:
    return UserError(f"The adapter {folder.name} does not fit this base model: {reason.strip(' .')}. Choose another.", field="adapter")


def load_weights(model: PeftModel, checkpoint: Path) -> None:
    """Give the adapter in training the weights of one of its checkpoints."""
    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
