"""What makes training quicker on a CPU and changes nothing of what is learned. Knows nothing of rows, configs or Gradio.

Each of the two cost about a sixth of a step: dropout's random numbers, drawn one at a time, and attention between packed
rows that the mask then hides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import repeat_kv

BY_ROW = "qlora_ui_by_row"
# Up to here a row's scores fit the cache, and in bfloat16 plain matrix products are 2 to 3 times as fast as torch's fused kernel.
SHORT_ROW = 512
# What attention may be told and still be softmax over all tokens before it.
UNDERSTOOD = {
    *("use_cache", "output_attentions", "output_hidden_states", "num_items_in_batch", "cache_position", "past_key_values"),
    *("position_ids", "scaling", "dropout", "sliding_window"),
}


# Dropout ------------------------------------------------------------------------------------------------------------------


class Dropout(torch.nn.Module):
    """Dropout that draws 15 random bits an element, four elements at a time; torch draws a float for each."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The values, some zeroed and the others scaled so that the mean stays; unchanged outside training."""
        if not self.training or not self.p:
            return values
        return values * drawn(self.p, values.shape).to(values.dtype).mul_(-1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drawn(p: float, shape: torch.Size) -> torch.Tensor:
    """0 where an element is dropped, and -1, all bits set, where it is kept, as int16. The share is the nearest 32,768th to `p`.

    Arithmetic in place, because torch takes five times as long to compare and to turn truth values into numbers.
    """
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)  # all 64 bits
    return bits[: shape.numel()].view(shape).bitwise_and_(2**15 - 1).sub_(round(p * 2**15)).bitwise_right_shift_(15).bitwise_not_()


def draw_dropout_faster(model: Any) -> None:
    """Replace the dropout of an adapter's layers. What is saved does not change: dropout has no weights."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, torch.nn.Dropout):
                module.lora_dropout[name] = Dropout(dropout.p).train(dropout.training)


# Attention ----------------------------------------------------------------------------------------------------------------


def attend_by_row(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention of each packed row to itself: (1, heads, tokens, size) in, (1, tokens, heads, size) out.

    A row begins where `position_ids` are 0. Raises NotImplementedError where a model means more by attention than that.
    """
    more = sorted(name for name, option in options.items() if name not in UNDERSTOOD and option is not None)
    if more or options.get("position_ids") is None:
        raise NotImplementedError(f"its attention is told of {', '.join(more)}" if more else "its attention is not told positions")
    how = {"scaling": options.get("scaling"), "dropout": options.get("dropout", 0.0)}
    starts = (options["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    rows = []
    for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True):
        part = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        window = options.get("sliding_window") or end - start
        if query.dtype != torch.float32 and end - start <= SHORT_ROW:
            rows.append(attend(*part, mask(end - start, window, query.dtype), **how))
        elif window < end - start:
            rows.append(sdpa_attention_forward(module, *part, mask(end - start, window, query.dtype), **how)[0])
        else:
            rows.append(sdpa_attention_forward(module, *part, None, **how, is_causal=True)[0])
    return torch.cat(rows, 1), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None, dropout: float
) -> torch.Tensor:
    """Attention as two matrix products with a softmax between them; shapes as in `attend_by_row`."""
    key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1])[0] for tensor in (key, value))
    scores = torch.baddbmm(mask[0], query[0], key.transpose(1, 2), alpha=scaling or query.shape[-1] ** -0.5)
    shares = scores.softmax(-1)
    shares = torch.nn.functional.dropout(shares, dropout) if dropout else shares  # at 0 it would still draw and keep its mask
    return (shares @ value).transpose(0, 1)[None]


def mask(length: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, 1, length, length) to add to the scores: each token sees itself and the `window - 1` before it."""
    unseen = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype)
    return (unseen.triu(1) + unseen.tril(-window))[None, None]


def _no_mask(*_: Any, **__: Any) -> None:
    """Rows that are computed apart need no mask to keep them so."""


AttentionInterface.register(BY_ROW, attend_by_row)
AttentionMaskInterface.register(BY_ROW, _no_mask)


@contextlib.contextmanager
def attention_by_row(model: Any) -> Iterator[None]:
    """Within this, packed rows are computed one by one. It must span the backward pass: checkpointing computes there again."""
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = BY_ROW
    try:
        yield
    finally:
        config._attn_implementation = before
