"""The shape of a model of any architecture, counted on transformers' own model without weights. Knows nothing of runs or Gradio.

`memory.shapes` reads those that it knows from a config alone and needs no torch; this is for all others. Parameters, matrices and
which of them are quantized are as they will be loaded. What layers keep for the backward pass is told by what they are made of, so
it is less exact.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from textwrap import shorten
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_ui.engine.layers import plain_linear_kinds
from qlora_ui.errors import UserError
from qlora_ui.memory.habits import GATED_T5, LAYER_NORM, LLAMA, T5, Habits
from qlora_ui.memory.shapes import Linear, ModelShape, Norm, Stack

Side = Literal["decoder", "encoder", "idle"]

ATTENTION = ("attn", "attention")
ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")  # where such functions are defined
READ, INNER = "feed-forward input", "feed-forward inner"
SAID = 120  # characters of what a library says
SEEN = 64  # numbers that an activation function is tried on


def count_shape(config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of the model whose config.json says this. Raises UserError where it cannot be counted."""
    try:
        return _counted(json.dumps(config, sort_keys=True), name)
    except UserError:
        raise
    except Exception as error:  # each architecture has refusals and odd ways of its own
        cause = error.__cause__ or error  # transformers wraps what is wrong with a field
        reason = shorten(f"{type(cause).__name__}: {cause}", SAID, placeholder=" …")
        why = f"of which no shape could be made from its config.json ({reason})"
        raise _uncounted(name, str(config.get("model_type")), why, "Fetch or copy the model again, or measure one step instead.") from error


@lru_cache(maxsize=16)  # a page asks at every change of a field
def _counted(config: str, name: str) -> ModelShape:
    model = without_weights(json.loads(config), name)
    sizes, paths = Sizes.of(model), {module: path for path, module in model.named_modules()}
    embedding, head, linears = model.get_input_embeddings(), model.get_output_embeddings(), linears_of(model)
    if any(weight.ndim == 3 for weight in model.parameters()):
        linears = with_experts(linears, without_weights(json.loads(config), name))
    layers = list(layers_of(model, linears, sizes))
    used = [layer for layer in layers if layer.side != "idle"]
    shape = ModelShape(
        kind=model.config.model_type,
        habits=habits_of(model, used, sizes),
        vocab=head.weight.shape[0],
        hidden=sizes.hidden,
        intermediate=max(width_of(layer, sizes) for layer in used),
        layers=len(used),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        tied=head.weight is embedding.weight,
        embedding=_unquantized(paths[embedding], embedding.weight.shape, "tokens"),
        head=_unquantized(paths[head], head.weight.T.shape, "last hidden states"),
        outer=tuple(linear for linear in linears if not any(linear.path.startswith(f"{layer.path}.") for layer in layers)),
        final_norms=(),
        stacks=tuple(merged(stack_of(layer, sizes) for layer in (*used, *(layer for layer in layers if layer not in used)))),
    )
    shape = replace(shape, extra_parameters=sum(p.numel() for p in model.parameters()) - shape.parameters)
    # transformers' own model of some kinds is always tied, but a head that differs in the files is loaded as it is.
    return replace(shape, tied=shape.tied and json.loads(config).get("tie_word_embeddings") is not False)


def without_weights(config: Mapping[str, Any], name: str) -> Any:
    """transformers' own model, of the class that the engine loads; a model's own code is not run."""
    settings = {**config}
    kind = str(settings.pop("model_type", "nothing"))
    if kind not in CONFIG_MAPPING:
        raise _uncounted(name, kind, "which transformers does not know")
    made = AutoConfig.for_model(kind, **settings)
    auto = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    if type(made) not in auto._model_mapping:
        raise _uncounted(name, kind, "which transformers does not load as a model of text alone", "Choose another model.")
    with torch.device("meta"):
        # Another dtype would become torch's default, also of a training in another thread; a kernel that the config names may be fetched.
        return auto.from_config(made, dtype=None, attn_implementation="eager")


def _uncounted(name: str, kind: str, why: str, remedy: str = "Measure one step instead.") -> UserError:
    return UserError(f"The memory of {name} cannot be counted: it is of the architecture {kind!r}, {why}. {remedy}", field="model")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the config says of the part that text goes through, under whichever names."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dropout: bool
    attention_dropout: bool
    soft_caps: bool

    @staticmethod
    def of(model: Any) -> Sizes:
        text = model.config.get_text_config(decoder=True)
        # Layers may differ in their widths: the largest counts.
        layers = text.per_layer_config if hasattr(text, "num_hidden_layers") and hasattr(text, "per_layer_config") else [text]

        def said(name: str) -> Any:
            return max(getattr(layer, name, None) or 0 for layer in layers)

        hidden = said("hidden_size") or model.get_input_embeddings().weight.shape[1]
        heads = said("num_attention_heads") or 1  # there are those without attention
        return Sizes(
            hidden=hidden,
            heads=heads,
            kv_heads=1 if said("multi_query") else said("num_key_value_heads") or heads,
            head_dim=said("v_head_dim") or said("head_dim") or hidden // heads,
            dropout=bool(said("dropout")),
            attention_dropout=bool(said("attention_dropout") or said("attn_pdrop")),
            soft_caps=bool(said("attn_logit_softcapping")),
        )


# Matrices -----------------------------------------------------------------------------------------------------------------


def linears_of(model: Any) -> list[Linear]:
    """All but the head, by their whole paths. What each reads is not known yet."""
    whole = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    head, plain = model.get_output_embeddings(), plain_linear_kinds(type(model)).values()
    return [
        Linear(
            path=path,
            in_features=module.in_features if isinstance(module, nn.Linear) else module.nx,
            out_features=module.out_features if isinstance(module, nn.Linear) else module.nf,
            reads=path,
            bias=module.bias is not None,
            quantized=should_convert_module(path, whole) and type(module) in (nn.Linear, Conv1D, *plain),
            wide=not should_convert_module(path, model._keep_in_fp32_modules),
        )
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]


def with_experts(linears: Sequence[Linear], model: nn.Module) -> list[Linear]:
    """With the bare tensors that PEFT adapts too: experts, and who chooses among them. It leaves out others then: it is asked by doing."""
    try:
        with torch.device("meta"):
            adapted = dict(inject_adapter_in_model(LoraConfig(r=1, target_modules="all-linear"), model).named_modules())
    except ValueError:  # it does not adapt all of such a model, as Mamba: a run is refused with its reason
        return [*linears]
    bare = [
        Linear(
            path=f"{path.replace('.base_layer', '')}.{module.parameter_name}",
            in_features=module.in_features,
            out_features=module.out_features,
            reads=path,
            quantized=False,
            experts=module.num_experts,
            ranks=module.lora_A["default"].out_features,
        )
        for path, module in adapted.items()
        if isinstance(module, ParamWrapper)
    ]
    return [*(replace(linear, ranks=int(isinstance(adapted[linear.path], LoraLayer))) for linear in linears), *bare]


def _unquantized(path: str, size: Sequence[int], reads: str) -> Linear:
    return Linear(path=path.rpartition(".")[2], in_features=size[0], out_features=size[1], reads=reads, quantized=False)


def told_apart(linears: Sequence[Linear], hidden: int) -> tuple[Linear, ...]:
    """One layer's, with what they read: the last of a block reads what the others, which read the block's input, have led to."""
    last = {linear.path.rpartition(".")[0]: linear for linear in linears}

    def read(linear: Linear) -> str:
        block = linear.path.rpartition(".")[0]
        is_attention = any(word in block.lower() for word in ATTENTION)
        if last[block] is linear:
            return f"{block} attention output" if is_attention else f"{block} {INNER}"
        if linear.in_features == hidden:
            return f"{block} attention input" if is_attention else f"{block} {READ}"
        return linear.path

    return tuple(replace(linear, reads=read(linear)) for linear in linears)


# Layers -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of a list of layers: where it is in the model, and its matrices by their paths in it."""

    path: str
    number: int
    side: Side
    module: nn.Module
    linears: tuple[Linear, ...]


def layers_of(model: Any, linears: Sequence[Linear], sizes: Sizes) -> Iterator[Layer]:
    """Those of the outermost lists of modules."""
    decoder, sides = model.get_decoder(), dict[Side, set[nn.Module]]()
    if model.config.is_encoder_decoder:
        sides["encoder"] = set(model.get_encoder().modules())
    sides["decoder"] = set((decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else model).modules())
    for prefix, many in model.named_modules():
        if not isinstance(many, nn.ModuleList) or any(part.isdigit() for part in prefix.split(".")):
            continue
        side: Side = next((side for side, modules in sides.items() if many in modules), "idle")
        for number, module in enumerate(many):
            path = f"{prefix}.{number}"
            own = [replace(linear, path=linear.path.removeprefix(f"{path}.")) for linear in linears if linear.path.startswith(f"{path}.")]
            if own:  # a list of single matrices is none of layers
                yield Layer(path=path, number=number, side=side, module=module, linears=told_apart(own, sizes.hidden))


def stack_of(layer: Layer, sizes: Sizes) -> Stack:
    """Of this one layer."""
    stack = Stack(
        side=layer.side,
        first=layer.number,
        layers=1,
        linears=layer.linears,
        norms=tuple(norms_of(layer, sizes)),
        routed=2 * chosen_experts(layer) * sizes.hidden + experts_width(layer, sizes),
    )
    return replace(stack, extra_parameters=sum(p.numel() for p in layer.module.parameters()) - stack.parameters)


def merged(stacks: Iterable[Stack]) -> Iterator[Stack]:
    """Alike neighbours become one."""
    for _, alike in groupby(stacks, lambda stack: replace(stack, first=0)):
        first, *others = alike
        layers = 1 + len(others)
        yield replace(first, layers=layers, extra_parameters=layers * first.extra_parameters)


def norms_of(layer: Layer, sizes: Sizes) -> Iterator[Norm]:
    """The normalisations, with or without parameters. One as wide as a head is for each of them."""
    for path, module in layer.module.named_modules():
        if "norm" in type(module).__name__.lower() and not list(module.children()):
            width = max((p.shape[-1] if p.ndim == 1 else p.numel() for p in module.parameters()), default=sizes.hidden)
            if width == sizes.head_dim and any(word in path for word in ATTENTION):
                width *= sizes.kv_heads if path.rpartition(".")[2].startswith("k") else sizes.heads
            yield Norm(width=width, parameters=sum(p.numel() for p in module.parameters()))


def width_of(layer: Layer, sizes: Sizes) -> int:
    """Of the feed-forward block: of that for all tokens, and of the experts that one token goes to."""
    inner = [linear.in_features for linear in layer.linears if linear.reads.endswith(INNER) and not linear.experts]
    return max(inner, default=0) + experts_width(layer, sizes)


def experts_width(layer: Layer, sizes: Sizes) -> int:
    """Of those that one token goes to, together."""
    return chosen_experts(layer) * min((weight[0].numel() // sizes.hidden for weight in experts_of(layer)), default=0)


def chosen_experts(layer: Layer) -> int:
    """Of how many experts a token gets its answer; 0 where there are none, 1 where nobody says."""
    said: list[int] = [module.top_k for module in layer.module.modules() if isinstance(getattr(module, "top_k", None), int)]  # type: ignore[misc]
    return (said or [1])[0] if experts_of(layer) else 0


def experts_of(layer: Layer) -> list[torch.Tensor]:
    """Their matrices, many in a tensor."""
    return [weight for path, weight in layer.module.named_parameters() if weight.ndim == 3 and "expert" in path]


# Habits -------------------------------------------------------------------------------------------------------------------


def habits_of(model: Any, layers: Sequence[Layer], sizes: Sizes) -> Habits:
    """What layers made of such modules keep."""
    modules = [module for layer in layers for module in layer.module.modules()]
    gated = any(is_gated(layer) for layer in layers)
    if any("relative_attention_bias" in name for layer in layers for name, _ in layer.module.named_modules()):
        return GATED_T5 if gated else T5
    usual = LAYER_NORM if any(isinstance(module, nn.LayerNorm) for module in modules) else LLAMA
    return replace(
        usual,
        inner=(_inner_bytes(modules, torch.bfloat16) + 4 * gated, _inner_bytes(modules, torch.float32) + 8 * gated),
        soft_caps=sizes.soft_caps,
        fused_attention=model._supports_sdpa,
        attention_dropout=sizes.attention_dropout,
        dropout=sizes.dropout or any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules),
    )


def is_gated(layer: Layer) -> bool:
    """Whether the activation function's result is multiplied with something as wide: by matrices that lead to twice what is read then."""
    wide = Counter[str]()
    for linear in layer.linears:
        wide[linear.reads] += linear.out_features
    inner = [linear for linear in layer.linears if linear.reads.endswith(INNER)]
    of_experts = sorted(weight.numel() for weight in experts_of(layer))
    return any(wide[linear.reads.replace(INNER, READ)] >= 2 * linear.in_features for linear in inner) or (
        len(of_experts) > 1 and of_experts[-1] == 2 * of_experts[0]
    )


def _inner_bytes(modules: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """What the activation function keeps of a number. One that is learned keeps what it is given."""
    function = next((module for module in modules if type(module).__module__ in ACTIVATIONS and not list(module.parameters())), None)
    numbers, kept = torch.ones(SEEN, dtype=dtype, requires_grad=True), dict[int, int]()
    if function is None:
        return dtype.itemsize

    def weigh(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(weigh, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        _held = function(numbers)  # else the place of what is freed might be another's
    return sum(kept.values()) // SEEN
