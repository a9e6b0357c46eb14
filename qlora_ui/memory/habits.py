"""How kinds of models compute, as far as it decides what they keep for the backward pass. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Habits:
    """A pair of figures is bytes a number: in 16 bits, in float32. As they stand here, they are Llama's.

    `stream` goes from layer to layer; `norm` is kept of each number that is normalised, `inner` of the feed-forward block's width.
    """

    stream: tuple[int, int] = (2, 4)
    norm: tuple[int, int] = (4, 4)
    inner: tuple[int, int] = (6, 12)
    norms_read_the_same: bool = False
    soft_caps: bool = False  # no fused kernel for attention, and one more function after the logits
    fused_attention: bool = True  # there is a kernel that keeps no scores
    attention_dropout: bool = False  # which no such kernel of a CPU has
    mask_of_each_head: bool = False
    dropout: bool = False  # of its own, beside the adapter's


LLAMA = Habits()
GEMMA_2 = Habits(soft_caps=True)
# Autocast computes LayerNorm in float32, and what comes after it stays so.
LAYER_NORM = Habits(stream=(4, 4), inner=(4, 4))
PARALLEL_LAYER_NORM = Habits(stream=(4, 4), inner=(4, 4), norms_read_the_same=True)
OPT = Habits(stream=(4, 4), inner=(4, 4), dropout=True)
T5 = Habits(norm=(6, 4), inner=(2, 4), mask_of_each_head=True, dropout=True)
GATED_T5 = Habits(norm=(6, 4), inner=(20, 24), mask_of_each_head=True, dropout=True)  # its GELU is written out step by step
