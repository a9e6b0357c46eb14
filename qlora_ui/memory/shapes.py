"""A model's shape, read from the content of its config.json: every matrix and norm, without a weight. Knows nothing of disk or torch.

The module names are those of transformers' own code, because `target_modules` names modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from qlora_ui.errors import UserError
from qlora_ui.memory.habits import GATED_T5, GEMMA_2, LLAMA, OPT, PARALLEL_LAYER_NORM, T5, Habits

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A matrix by its path in the layer. Those with the same `reads` are given the same tensor.

    transformers does not quantize all of them: not the head, and in T5 not the second matrix of a feed-forward block, which is `wide`:
    in float32 where others are in float16. Where there are `experts`, so many matrices are one bare tensor. `ranks` is the rank of its
    adapter in multiples of lora_r, 0 where PEFT leaves it out of all-linear.
    """

    path: str
    in_features: int
    out_features: int
    reads: str
    bias: bool = False
    quantized: bool = True
    wide: bool = False
    experts: int = 0
    ranks: int = 1

    @property
    def weights(self) -> int:
        return self.in_features * self.out_features * max(self.experts, 1)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation of so many numbers a token, and its own parameters."""

    width: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Layers that are alike, one after the other, from the number `first`.

    No text goes through the side that is idle, as that which sees pictures. `routed` are the numbers of a token on their way through
    experts and back; `extra_parameters` are all that are neither in a matrix nor in a norm.
    """

    side: Literal["decoder", "encoder", "idle"] = "decoder"
    first: int = 0
    layers: int
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    routed: int = 0
    extra_parameters: int = 0

    @property
    def parameters(self) -> int:
        biases = sum(linear.out_features for linear in self.linears if linear.bias)
        in_a_layer = sum(linear.weights for linear in self.linears) + biases + sum(norm.parameters for norm in self.norms)
        return self.layers * in_a_layer + self.extra_parameters


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory depends on. `kind` is the config's model_type; `intermediate` is the width of the feed-forward block.

    The head has parameters of its own when it is not tied to the embedding. `outer` are matrices beside the layers; positions and all
    else that is there are `extra_parameters`.
    """

    kind: str
    habits: Habits = LLAMA
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    embedding: Linear
    head: Linear
    extra_parameters: int = 0
    outer: tuple[Linear, ...] = ()
    final_norms: tuple[Norm, ...]
    stacks: tuple[Stack, ...]

    @property
    def is_encoder_decoder(self) -> bool:
        return any(stack.side == "encoder" for stack in self.stacks)

    @property
    def linears(self) -> tuple[tuple[Linear, int], ...]:
        """All matrices between embeddings and head, and how many of each there are."""
        inner = ((linear, stack.layers) for stack in self.stacks for linear in stack.linears)
        return (*inner, *((linear, 1) for linear in self.outer))

    @property
    def parameters(self) -> int:
        """All of the model, counted as transformers counts them: tied ones once."""
        outside = self.embedding.weights + self.extra_parameters + (0 if self.tied else self.head.weights)
        outside += sum(norm.parameters for norm in self.final_norms) + sum(linear.weights for linear in self.outer)
        return outside + sum(stack.parameters for stack in self.stacks)


def read_shape(config: Config, name: str) -> ModelShape:
    """The shape of the model whose config.json says this. Raises UserError for an architecture that has no reader."""
    kind = str(config.get("model_type", "nothing"))
    if kind not in READERS:
        raise UserError(
            f"{name} is of the architecture {kind!r}, whose memory is not known. Known are {', '.join(sorted(READERS))}.", field="model"
        )
    try:
        return READERS[kind](config)
    except KeyError as error:
        raise UserError(f"The config.json of {name} does not say {error.args[0]}. Fetch or copy the model again.", field="model") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"The config.json of {name} cannot be read: {error}. Fetch or copy the model again.", field="model") from error


# The families -------------------------------------------------------------------------------------------------------------


def _sizes(c: Config, kv_heads: str = "num_key_value_heads") -> dict[str, int]:
    """The sizes that decoders have in common. A head's width and the number of key heads may be left to follow from the others."""
    heads = int(c["num_attention_heads"])
    return {
        "vocab": int(c["vocab_size"]),
        "hidden": int(c["hidden_size"]),
        "layers": int(c["num_hidden_layers"]),
        "heads": heads,
        "kv_heads": int(c.get(kv_heads) or heads),
        "head_dim": int(c.get("head_dim") or c["hidden_size"] // heads),
    }


def _whole(
    c: Config,
    sizes: Mapping[str, int],
    stacks: tuple[Stack, ...],
    *,
    intermediate: int,
    tied: bool,
    final_norms: tuple[Norm, ...],
    embedding: str,
    head: str = "lm_head",
    **more: Any,
) -> ModelShape:
    """The model around its layers. Its head is tied as the config says, else as is usual for its kind."""
    width = more.pop("embedding_width", sizes["hidden"])
    return ModelShape(
        kind=str(c["model_type"]),
        intermediate=intermediate,
        tied=bool(c.get("tie_word_embeddings", tied)),
        embedding=Linear(path=embedding, in_features=sizes["vocab"], out_features=width, reads="tokens", quantized=False),
        head=Linear(path=head, in_features=width, out_features=sizes["vocab"], reads="last hidden states", quantized=False),
        final_norms=final_norms,
        stacks=stacks,
        **{**sizes, **more},
    )


def _separate_attention(s: Mapping[str, int], *, bias: bool = False, out_bias: bool = False, out: str = "o_proj") -> tuple[Linear, ...]:
    queries, keys = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return (
        *(
            Linear(path=f"self_attn.{name}", in_features=s["hidden"], out_features=width, reads="attention input", bias=bias)
            for name, width in widths.items()
        ),
        Linear(path=f"self_attn.{out}", in_features=queries, out_features=s["hidden"], reads="attention output", bias=out_bias),
    )


def _feed_forward(hidden: int, inner: int, first: tuple[str, ...], second: str, *, bias: bool = False) -> tuple[Linear, ...]:
    return (
        *(Linear(path=path, in_features=hidden, out_features=inner, reads="feed-forward input", bias=bias) for path in first),
        Linear(path=second, in_features=inner, out_features=hidden, reads="feed-forward inner", bias=bias),
    )


def _llama(
    c: Config,
    *,
    tied: bool = False,
    norms: int = 2,
    qk_norm: Literal["", "head", "all"] = "",
    qkv_bias: bool = False,
    head_dim: int = 0,
    habits: Habits = LLAMA,
) -> ModelShape:
    """Llama and its many relatives. `qk_norm`: queries and keys are normalised, each head by itself or all together."""
    s = _sizes({"head_dim": head_dim, **c})
    inner, bias = int(c["intermediate_size"]), bool(c.get("attention_bias", False))
    around = (Norm(width=s["hidden"], parameters=s["hidden"]),) * norms
    queries, keys = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    own = {"": (), "head": (s["head_dim"],) * 2, "all": (queries, keys)}[qk_norm]
    inside = tuple(Norm(width=width, parameters=parameters) for width, parameters in zip((queries, keys), own, strict=False))
    linears = (
        *_separate_attention(s, bias=qkv_bias or bias, out_bias=bias),
        *_feed_forward(s["hidden"], inner, ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", bias=bool(c.get("mlp_bias", False))),
    )
    stack = Stack(layers=s["layers"], linears=linears, norms=(*around, *inside))
    return _whole(c, s, (stack,), intermediate=inner, tied=tied, final_norms=around[:1], embedding="embed_tokens", habits=habits)


def _phi3(c: Config) -> ModelShape:
    s, inner = _sizes(c), int(c["intermediate_size"])
    queries, keys = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    norm = Norm(width=s["hidden"], parameters=s["hidden"])
    linears = (
        Linear(path="self_attn.qkv_proj", in_features=s["hidden"], out_features=queries + 2 * keys, reads="attention input"),
        Linear(path="self_attn.o_proj", in_features=queries, out_features=s["hidden"], reads="attention output"),
        Linear(path="mlp.gate_up_proj", in_features=s["hidden"], out_features=2 * inner, reads="feed-forward input"),
        Linear(path="mlp.down_proj", in_features=inner, out_features=s["hidden"], reads="feed-forward inner"),
    )
    stack = Stack(layers=s["layers"], linears=linears, norms=(norm, norm))
    return _whole(c, s, (stack,), intermediate=inner, tied=False, final_norms=(norm,), embedding="embed_tokens")


def _fused(c: Config, s: Mapping[str, int], inner: int, qkv: int, attention: str, bias: bool) -> tuple[Linear, ...]:
    """The matrices of GPT-NeoX, and of Falcon, which has their names from it."""
    return (
        Linear(path=f"{attention}.query_key_value", in_features=s["hidden"], out_features=qkv, reads="attention input", bias=bias),
        Linear(path=f"{attention}.dense", in_features=s["hidden"], out_features=s["hidden"], reads="attention output", bias=bias),
        *_feed_forward(s["hidden"], inner, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", bias=bias),
    )


def _gpt_neox(c: Config) -> ModelShape:
    s, inner = _sizes(c), int(c["intermediate_size"])
    norm = Norm(width=s["hidden"], parameters=2 * s["hidden"])
    linears = _fused(c, s, inner, 3 * s["hidden"], "attention", True)
    if not c.get("attention_bias", True):
        linears = tuple(replace(linear, bias=linear.path.startswith("mlp")) for linear in linears)
    around: dict[str, Any] = {"tied": False, "final_norms": (norm,), "embedding": "embed_in", "habits": PARALLEL_LAYER_NORM}
    return _whole(c, s, (Stack(layers=s["layers"], linears=linears, norms=(norm, norm)),), intermediate=inner, **around)


def _falcon(c: Config) -> ModelShape:
    new, several = bool(c.get("new_decoder_architecture", False)), not c.get("multi_query", True)
    s = _sizes(c, "num_kv_heads")
    if not new:
        s["kv_heads"] = s["heads"] if several else 1
    inner = int(c.get("ffn_hidden_size") or 4 * s["hidden"])
    norm = Norm(width=s["hidden"], parameters=2 * s["hidden"])
    side_by_side = c.get("num_ln_in_parallel_attn") or (2 if new else 1)
    norms = (norm,) * (side_by_side if new or c.get("parallel_attn", True) else 2)
    qkv = (s["heads"] + 2 * s["kv_heads"]) * s["head_dim"]
    stack = Stack(layers=s["layers"], linears=_fused(c, s, inner, qkv, "self_attention", bool(c.get("bias", False))), norms=norms)
    around: dict[str, Any] = {"tied": True, "final_norms": (norm,), "embedding": "word_embeddings", "habits": PARALLEL_LAYER_NORM}
    return _whole(c, s, (stack,), intermediate=inner, **around)


def _opt(c: Config) -> ModelShape:
    s, inner, bias = _sizes(c), int(c["ffn_dim"]), bool(c.get("enable_bias", True))
    width = int(c.get("word_embed_proj_dim") or s["hidden"])
    norm = Norm(width=s["hidden"], parameters=2 * s["hidden"])
    linears = (
        *_separate_attention(s, bias=bias, out_bias=bias, out="out_proj"),
        *_feed_forward(s["hidden"], inner, ("fc1",), "fc2", bias=bias),
    )
    outer = (
        Linear(path="project_in", in_features=width, out_features=s["hidden"], reads="embeddings"),
        Linear(path="project_out", in_features=s["hidden"], out_features=width, reads="last hidden states"),
    )
    before = c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm", False)
    return _whole(
        c,
        s,
        (Stack(layers=s["layers"], linears=linears, norms=(norm, norm)),),
        intermediate=inner,
        tied=True,
        final_norms=(norm,) if before else (),
        embedding="embed_tokens",
        embedding_width=width,
        extra_parameters=(int(c["max_position_embeddings"]) + 2) * s["hidden"],  # its first two rows are for nothing
        outer=outer if width != s["hidden"] else (),
        habits=OPT,
    )


def _t5(c: Config) -> ModelShape:
    heads, width, hidden, inner = int(c["num_heads"]), int(c["d_kv"]), int(c["d_model"]), int(c["d_ff"])
    sizes = {"vocab": int(c["vocab_size"]), "hidden": hidden, "layers": int(c["num_layers"]), "heads": heads, "kv_heads": heads}
    norm = Norm(width=hidden, parameters=hidden)
    first = ("wi_0", "wi_1") if str(c.get("feed_forward_proj", "relu")).startswith("gated") else ("wi",)

    def attention(path: str, keys_read: str, name: str) -> tuple[Linear, ...]:
        reads = {"q": f"{name} input", "k": keys_read, "v": keys_read}
        return (
            *(Linear(path=f"{path}.{m}", in_features=hidden, out_features=heads * width, reads=r) for m, r in reads.items()),
            Linear(path=f"{path}.o", in_features=heads * width, out_features=hidden, reads=f"{name} output"),
        )

    def feed_forward(number: int) -> tuple[Linear, ...]:
        path = f"layer.{number}.DenseReluDense"
        *most, last = _feed_forward(hidden, inner, tuple(f"{path}.{name}" for name in first), f"{path}.wo")
        return (*most, replace(last, quantized=False, wide=True))

    own = attention("layer.0.SelfAttention", "attention input", "attention")
    cross = attention("layer.1.EncDecAttention", "encoder output", "cross-attention")
    relative = int(c.get("relative_attention_num_buckets", 32)) * heads
    encoder = Stack(side="encoder", layers=sizes["layers"], linears=(*own, *feed_forward(1)), norms=(norm,) * 2, extra_parameters=relative)
    decoder = Stack(
        layers=int(c.get("num_decoder_layers") or sizes["layers"]),
        linears=(*own, *cross, *feed_forward(2)),
        norms=(norm,) * 3,
        extra_parameters=relative,
    )
    return _whole(
        c,
        {**sizes, "head_dim": width},
        (encoder, decoder),
        intermediate=inner,
        tied=True,
        final_norms=(norm, norm),
        embedding="shared",
        habits=GATED_T5 if len(first) > 1 else T5,
    )


READERS: dict[str, Callable[[Config], ModelShape]] = {
    "llama": _llama,
    "mistral": _llama,
    "ministral": _llama,
    "ministral3": _llama,
    "granite": _llama,
    "helium": _llama,
    "ernie4_5": partial(_llama, tied=True),
    "hunyuan_v1_dense": partial(_llama, qk_norm="head"),
    "exaone4": partial(_llama, qk_norm="head"),
    "qwen2": partial(_llama, qkv_bias=True),
    "qwen3": partial(_llama, qk_norm="head", head_dim=128),
    "smollm3": partial(_llama, tied=True),
    "olmo2": partial(_llama, qk_norm="all"),
    "olmo3": partial(_llama, qk_norm="all"),
    "gemma": partial(_llama, tied=True, head_dim=256),
    "gemma2": partial(_llama, tied=True, norms=4, head_dim=256, habits=GEMMA_2),
    "gemma3_text": partial(_llama, tied=True, norms=4, qk_norm="head", head_dim=256),
    "phi3": _phi3,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "falcon": _falcon,
    "t5": _t5,
}
