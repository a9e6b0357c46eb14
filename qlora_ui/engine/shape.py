"""What adapter a model can have: a config's wishes in PEFT's words, or one sentence on what cannot be. Knows nothing of rows or Gradio.

Only names and kinds of modules are looked at, so that it can be told before any weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from qlora_ui.config import AdapterConfig
from qlora_ui.engine.model import Found
from qlora_ui.errors import UserError
from qlora_ui.memory.trained import check_experts

ATTENTION = ("attn", "attention")
LINEAR = (torch.nn.Linear, Conv1D)
START = {"default": True, "gaussian": "gaussian"}


def check(found: Found, dtype: torch.dtype, adapter: AdapterConfig, tokens: int, new: Sequence[int]) -> None:
    """Raise UserError for an adapter that this model cannot have. Loads no weights; `tokens` and `new` are as in `model.make_room`."""
    config = AutoConfig.from_pretrained(found.folder, trust_remote_code=found.trusted)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            outline = kind.from_config(config, dtype=dtype, trust_remote_code=found.trusted)
    except Exception:  # noqa: BLE001  a model's own code may want weights at once; the same is asked of the loaded model
        return
    rows = outline.get_input_embeddings().weight.shape[0]
    wish = lora_config(outline, adapter, sorted({*new, *range(rows, tokens)}))
    if any(weight.ndim == 3 for weight in outline.parameters()) and adapts_experts(outline, wish, adapter):
        check_experts(adapter)


def adapts_experts(outline: Any, wish: LoraConfig, adapter: AdapterConfig) -> bool:
    """Whether PEFT would put an adapter on bare tensors of many matrices. It is asked by doing, which changes the outline."""
    plain = LoraConfig(r=1, target_modules=wish.target_modules, exclude_modules=wish.exclude_modules)
    try:
        with torch.device("meta"):
            adapted = inject_adapter_in_model(plain, outline)
    except ValueError as error:
        raise refused(adapter, error) from error
    return any(isinstance(module, ParamWrapper) for module in adapted.modules())


def refused(adapter: AdapterConfig, error: ValueError) -> UserError:
    """What PEFT says no to."""
    return UserError(f"target_modules is {adapter.target_modules!r}: {str(error).splitlines()[0]}", field="target_modules")


def lora_config(base: Any, adapter: AdapterConfig, learned: Sequence[int] = ()) -> LoraConfig:
    """The adapter in PEFT's words. `learned` are tokens whose embeddings, and rows of the head, are trained too."""
    targets = target_modules(base, adapter.target_modules)
    skipped = layers_pattern(base, adapter.skipped_layers())
    fully = modules_to_save(base, adapter.modules_to_save)
    rows = token_layers(base, learned, fully or ())
    check_bias(base, adapter.lora_bias)
    adapted = targeted(base, targets)
    if adapted and not any(_stays(name, skipped, fully or ()) for name in adapted):
        raise UserError(
            f"No layer is left for an adapter: target_modules is {adapter.target_modules!r}, layers_to_skip {adapter.layers_to_skip!r}, "
            f"modules_to_save {adapter.modules_to_save!r}. Take fewer layers away.",
            field="target_modules",
        )
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=whole(adapter.alpha),
        lora_dropout=adapter.lora_dropout,
        bias=adapter.lora_bias,
        target_modules=targets,
        exclude_modules=skipped,
        modules_to_save=fully,
        ensure_weight_tying=ties(base) and any(base.get_submodule(path) is base.get_input_embeddings() for path in fully or ()),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=START[adapter.init_lora_weights],
        trainable_token_indices=rows,
        task_type="SEQ_2_SEQ_LM" if getattr(base.config, "is_encoder_decoder", False) else "CAUSAL_LM",
    )


def _stays(name: str, skipped: str | None, fully: Collection[str]) -> bool:
    return not (skipped and re.fullmatch(skipped, name)) and not any(f"{name}.".startswith(f"{path}.") for path in fully)


def token_layers(base: Any, learned: Sequence[int], fully: Collection[str]) -> dict[str, list[int]] | None:
    """In PEFT's words: of which layers which rows are trained. A head that shares the embedding's rows is no layer of its own.

    Of a layer that is trained `fully`, all rows are trained anyway. Raises UserError for a model whose head cannot be trained row by row.
    """
    if not learned:
        return None
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    plain = head is None or (type(head) is torch.nn.Linear and "bias" not in dict(head.named_parameters()))
    if not plain:
        raise UserError("This model's head has a bias or is quantized, so new_tokens cannot be trained in it.", field="new_tokens")
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers) and name not in fully]
    return {name: list(learned) for name in names} or None


def target_modules(base: Any, wish: str) -> str | list[str]:
    """The wish in PEFT's words. Raises UserError for a name that no module has, or none that an adapter can be put on."""
    if wish == "all-linear":
        return wish
    if wish == "attention":
        names = [name for name in targeted(base, wish) if any(word in name.lower().rpartition(".")[0] for word in ATTENTION)]
        if not names:
            raise UserError(
                "target_modules is 'attention', but no module of this model is named so. Name the modules.", field="target_modules"
            )
        return names
    here = ", ".join(sorted({name.rpartition(".")[2] for name in targeted(base, "all-linear")}))
    names = split(wish)
    if not names:
        raise UserError(f"target_modules is {wish!r}: give all-linear, attention, or names from {here}.", field="target_modules")
    stacked = any(weight.ndim > 2 for weight in base.parameters())  # experts, whose matrices PEFT knows by the names they had alone
    for name in names:
        found = [module for path, module in base.named_modules() if _ends(path, name)]
        if not found and not stacked:
            raise UserError(f"target_modules has {name!r}, but this model has no such module. Its own are {here}.", field="target_modules")
        if found and not any(isinstance(module, (*LINEAR, torch.nn.Embedding)) for module in found):
            raise UserError(
                f"target_modules has {name!r}, a {type(found[0]).__name__}, which takes no adapter. Name the layers in it, of {here}.",
                field="target_modules",
            )
    return names


def targeted(base: Any, targets: str | Collection[str]) -> set[str]:
    """The layers that PEFT would adapt for these targets: linear ones, and embeddings where they are named."""
    head = base.get_output_embeddings()
    linear = {name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not head}
    if targets in ("all-linear", "attention"):
        return linear
    layers = {name for name, module in base.named_modules() if isinstance(module, (*LINEAR, torch.nn.Embedding))}
    if isinstance(targets, str):
        return {name for name in layers if re.fullmatch(targets, name)}
    return {name for name in layers if any(_ends(name, target) for target in targets)}


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
    names = {module: path for path, module in base.named_modules()}
    head, embedding = names.get(base.get_output_embeddings(), ""), names[base.get_input_embeddings()]
    paths: list[str] = []
    for name in split(wish):
        found = {path: module for path, module in base.named_modules() if _ends(path, name) and any(True for _ in module.parameters())}
        if not found:
            said = f"modules_to_save has {name!r}, but this model has no such module with weights. Usual: lm_head."
            raise UserError(said, field="modules_to_save")
        if any(isinstance(part, (Linear4bit, Linear8bitLt)) for module in found.values() for part in module.modules()):
            raise UserError(
                f"modules_to_save has {name!r}, which is quantized and cannot be trained as a whole. "
                "Take it from modules_to_save, or set quant_bits to 16.",
                field="modules_to_save",
            )
        shared = ties(base) and any(path in (head, embedding) for path in found)
        if shared and embedding.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            raise UserError(
                f"modules_to_save has {name!r}, but this model's head and embeddings are one matrix, {embedding}, which PEFT can only "
                "train as a whole under another name. Leave it out.",
                field="modules_to_save",
            )
        paths.extend(found)
    if ties(base):  # head and embedding are one: PEFT keeps them so, under the embedding's name
        paths = [embedding if path == head else path for path in paths]
    return sorted(set(paths)) or None


def ties(base: Any) -> bool:
    """Whether the output head and the input embedding are the same weights."""
    return base.get_output_embeddings() is not None and base.get_output_embeddings().weight is base.get_input_embeddings().weight


def check_bias(base: Any, bias: str) -> None:
    """Raise UserError where biases are to be trained that are not there, or cannot be."""
    if bias == "none":
        return
    if not any(name.endswith(".bias") for name, _ in base.named_parameters()):
        raise UserError(f"lora_bias is {bias!r}, but this model has no biases. Set it to none.", field="lora_bias")
    if base.dtype == torch.float16:  # bitsandbytes casts a layer's bias to its input's dtype, and loss scaling needs float32
        raise UserError(f"lora_bias is {bias!r}, which cannot be trained in float16. Set it to none.", field="lora_bias")


def split(wish: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in wish.split(",") if name.strip()]


def whole(number: float) -> int | float:
    """An int where it is one: that is how PEFT's own tools write alpha."""
    return int(number) if number == int(number) else number


def _ends(path: str, name: str) -> bool:
    return f".{path}".endswith(f".{name}")
