"""The LoRA adapter: put a new one on the base, go on with an old one, load one to answer. Knows nothing of rows or Gradio."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from qlora_ui.config import AdapterConfig
from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log
from qlora_ui.runs import Workspace

Emit = Callable[[Event], None]
WEIGHTS = "adapter_model.safetensors"
ATTENTION = ("attn", "attention")
START = {"default": True, "gaussian": "gaussian"}


def add_adapter(base: Any, adapter: AdapterConfig, seed: int, learned: Sequence[int] = ()) -> PeftModel:
    """A new trainable LoRA adapter on a frozen base. The adapter is float32; B starts at zero, so it changes nothing yet.

    `learned` are tokens whose embeddings, and rows of the head, are trained too.
    """
    torch.manual_seed(seed)
    fully = modules_to_save(base, adapter.modules_to_save)
    lora = LoraConfig(
        r=adapter.lora_r,
        lora_alpha=_whole(adapter.alpha),
        lora_dropout=adapter.lora_dropout,
        bias=adapter.lora_bias,
        target_modules=target_modules(base, adapter.target_modules),
        exclude_modules=layers_pattern(base, adapter.skipped_layers()),
        modules_to_save=fully,
        ensure_weight_tying=any(base.get_submodule(path) is base.get_input_embeddings() for path in fully or ()) and ties(base),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=START[adapter.init_lora_weights],
        trainable_token_indices=token_layers(base, list(learned), fully or []),
        task_type="SEQ_2_SEQ_LM" if getattr(base.config, "is_encoder_decoder", False) else "CAUSAL_LM",
    )
    _check_bias(base, adapter.lora_bias)
    try:
        model = get_peft_model(base, lora)
    except ValueError as error:
        raise UserError(f"target_modules is {adapter.target_modules!r}: {str(error).splitlines()[0]}", field="target_modules") from error
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


def token_layers(base: Any, learned: list[int], fully: Collection[str]) -> dict[str, list[int]] | None:
    """In PEFT's words: of which layers which rows are trained. A head that shares the embedding's rows is no layer of its own.

    Of a layer that is trained `fully`, all rows are trained anyway.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers) and name not in fully]
    return dict.fromkeys(names, learned) if learned and names else None


def target_modules(base: Any, wish: str) -> str | list[str]:
    """The wish in PEFT's words. Raises UserError for a name that no module has, and for `attention` where none is named so."""
    if wish == "all-linear":
        return wish
    if wish != "attention":
        return _present(base, _names(wish))
    names = [
        name
        for name, module in base.named_modules()
        if _is_linear(module) and any(word in name.lower().rpartition(".")[0] for word in ATTENTION)
    ]
    if not names:
        raise UserError("target_modules is 'attention', but no module of this model is named so. Name the modules.", field="target_modules")
    return names


def _present(base: Any, names: list[str]) -> list[str]:
    paths = [f".{path}" for path, _ in base.named_modules() if path]
    if missing := [name for name in names or [""] if not any(path.endswith(f".{name}") for path in paths)]:
        head = base.get_output_embeddings()
        linear = {path.rpartition(".")[2] for path, module in base.named_modules() if _is_linear(module) and module is not head}
        raise UserError(
            f"target_modules has {missing[0]!r}, but this model has no such module. It has {', '.join(sorted(linear))}; "
            "all-linear takes them all.",
            field="target_modules",
        )
    return names


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def layers_pattern(base: Any, skipped: Collection[int]) -> str | None:
    """A pattern that matches all modules in these layers. Raises UserError for a layer that the model does not have."""
    if not skipped:
        return None
    numbers = [next((int(part) for part in name.split(".") if part.isdigit()), -1) for name, _ in base.named_modules()]
    last = max(numbers)
    if missing := [layer for layer in skipped if layer > last]:
        raise UserError(f"layers_to_skip has {missing[0]}, but this model's layers are 0 to {last}.", field="layers_to_skip")
    # The first number in a module's path is its layer; later ones are something else, as experts.
    return rf"(?:(?!\d+\.)[^.]+\.)*(?:{'|'.join(map(str, skipped))})\..*"


def modules_to_save(base: Any, wish: str) -> list[str] | None:
    """The paths of all modules so named: PEFT matches ends of names, so that its `norm` would take `input_layernorm` too.

    Raises UserError for a name that is not there, or whose module is stored in too few bits to be trained.
    """
    paths: list[str] = []
    for name in _names(wish):
        found = {path: module for path, module in base.named_modules() if f".{path}".endswith(f".{name}")}
        if not found:
            raise UserError(f"modules_to_save has {name!r}, but this model has no such module. Usual: lm_head.", field="modules_to_save")
        if any(isinstance(part, (Linear4bit, Linear8bitLt)) for module in found.values() for part in module.modules()):
            raise UserError(
                f"modules_to_save has {name!r}, which is quantized and cannot be trained as a whole. "
                "Take it from modules_to_save, or set quant_bits to 16.",
                field="modules_to_save",
            )
        paths.extend(found)
    if ties(base):  # head and embedding are one: PEFT keeps them so, under the embedding's name
        names = {module: path for path, module in base.named_modules()}
        head, embedding = names[base.get_output_embeddings()], names[base.get_input_embeddings()]
        paths = [embedding if path == head else path for path in paths]
    return sorted(set(paths)) or None


def ties(base: Any) -> bool:
    """Whether the output head and the input embedding are the same weights."""
    return base.get_output_embeddings() is not None and base.get_output_embeddings().weight is base.get_input_embeddings().weight


def _check_bias(base: Any, bias: str) -> None:
    if bias == "none":
        return
    if not any(name.endswith(".bias") for name, _ in base.named_parameters()):
        raise UserError(f"lora_bias is {bias!r}, but this model has no biases. Set it to none.", field="lora_bias")
    if base.dtype == torch.float16:  # bitsandbytes casts a layer's bias to its input's dtype, and loss scaling needs float32
        raise UserError(f"lora_bias is {bias!r}, which cannot be trained in float16. Set it to none.", field="lora_bias")


def _names(wish: str) -> list[str]:
    return [name.strip() for name in wish.split(",") if name.strip()]


def _whole(number: float) -> int | float:
    """An int where it is one: that is how PEFT's own tools write alpha."""
    return int(number) if number == int(number) else number


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


def continue_adapter(base: Any, adapter: AdapterConfig, folder: Path, base_name: str, emit: Emit) -> PeftModel:
    """A saved adapter on its base, trainable. Its shape wins over the config's, and each difference is told.

    Raises UserError when it is not LoRA or does not fit the base.
    """
    written = _written(folder, adapter)
    written.lora_dropout = adapter.lora_dropout  # no part of its shape: the run's own wish
    for name, wish, its_own in _differences(base, adapter, written):
        emit(Log(text=f"{name} is {wish}, but the adapter to go on with has {its_own}: that is used", level="warning"))
    if written.base_model_name_or_path and written.base_model_name_or_path != base_name:
        emit(Log(text=f"The adapter to go on with was trained on {written.base_model_name_or_path}, not {base_name}", level="warning"))
    _check_bias(base, written.bias)
    try:
        model = PeftModel.from_pretrained(base, folder, config=written, is_trainable=True)
        if missing := set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(load_file(folder / WEIGHTS)):
            raise ValueError(f"it lacks {len(missing)} of its weights")  # PEFT would leave them as they are drawn
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"init_adapter is {adapter.init_adapter!r}, which does not fit {base_name}: {str(error).strip().splitlines()[-1].strip(' .')}. "
            "Choose an adapter of this model.",
            field="init_adapter",
        ) from error
    emit(Log(text=f"Goes on with the adapter {adapter.init_adapter}: rank {written.r}, alpha {written.lora_alpha:g}"))
    return _ready(model)


def _written(folder: Path, adapter: AdapterConfig) -> LoraConfig:
    try:
        kind = json.loads((folder / "adapter_config.json").read_text("utf-8"))["peft_type"]
        if kind != "LORA":
            raise UserError(f"init_adapter is {adapter.init_adapter!r}, a {kind} adapter. Choose a LoRA adapter.", field="init_adapter")
        written = LoraConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"init_adapter is {adapter.init_adapter!r}, but its adapter_config.json cannot be read ({error}). Choose another.",
            field="init_adapter",
        ) from error
    if written.init_lora_weights not in (True, *START.values()):
        raise UserError(
            f"init_adapter is {adapter.init_adapter!r}, which started as {written.init_lora_weights}: it belongs to another base than "
            "the plain one. Convert it to plain LoRA first (PEFT's save_pretrained can), or choose another.",
            field="init_adapter",
        )
    return written


def _differences(base: Any, adapter: AdapterConfig, written: LoraConfig) -> list[tuple[str, Any, Any]]:
    """Knob, what the run says, what the adapter has: for those whose effect the adapter's shape decides."""
    pairs = [
        ("lora_r", adapter.lora_r, written.r),
        ("lora_alpha", _whole(adapter.alpha), _whole(written.lora_alpha)),
        ("lora_bias", adapter.lora_bias, written.bias),
        ("use_rslora", adapter.use_rslora, written.use_rslora),
        ("use_dora", adapter.use_dora, written.use_dora),
        ("modules_to_save", modules_to_save(base, adapter.modules_to_save), written.modules_to_save),
        ("layers_to_skip", layers_pattern(base, adapter.skipped_layers()), written.exclude_modules),
    ]
    told: list[tuple[str, Any, Any]] = [pair for pair in pairs if pair[1] != pair[2]]
    if _targeted(base, target_modules(base, adapter.target_modules)) != _targeted(base, written.target_modules):
        names = [written.target_modules] if isinstance(written.target_modules, str) else written.target_modules or ()
        its_own = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        told.append(("target_modules", adapter.target_modules, its_own))
    return told


def _targeted(base: Any, targets: str | Collection[str]) -> set[str]:
    """The linear layers that PEFT would adapt for these targets."""
    head = base.get_output_embeddings()
    linear = {name for name, module in base.named_modules() if _is_linear(module) and module is not head}
    if targets == "all-linear":
        return linear
    if isinstance(targets, str):
        return {name for name in linear if re.fullmatch(targets, name)}
    return {name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)}


def mixes(model: PeftModel) -> bool:
    """Whether PEFT can answer with and without the adapter in one batch.

    Not with DoRA, trained biases, a norm trained fully, or adapters on the bare weights of a mixture of experts.
    """
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return False
    config = model.peft_config["default"]
    whole = [module.original_module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return (
        config.bias == "none" and not config.use_dora and all(isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) for module in whole)
    )


def load_adapter(base: Any, folder: Path) -> PeftModel:
    """A saved adapter on its base, for answering. Only safetensors are read. Raises UserError when there are none."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors. Choose a run whose adapter was saved.", field="run")
    model = PeftModel.from_pretrained(base, folder, is_trainable=False)
    return model.eval()


def load_weights(model: PeftModel, checkpoint: Path) -> None:
    """Give the adapter in training the weights of one of its checkpoints."""
    set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
