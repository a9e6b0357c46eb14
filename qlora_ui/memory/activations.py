"""What a forward pass keeps for the backward pass, counted from what each operation keeps. Knows nothing of disk, torch or Gradio.

Read off the code of transformers, PEFT and bitsandbytes: of a product with a frozen matrix nothing is kept; of an adapter its
input; of dropout a mask; of attention queries, keys, values and result; of a norm its input in float32. The tests compare with
the tensors that real models keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_ui.config import RunConfig
from qlora_ui.memory.habits import Habits
from qlora_ui.memory.shapes import Linear, ModelShape, Stack
from qlora_ui.memory.trained import adapted

# Of a packed sequence on a CPU. Longer ones are slower there: attention computes what the mask then hides, and that grows with
# the square.
CPU_TOKEN_BUDGET = 512
# Of one number: Trainer makes logits float32, and their gradient is made beside them; an encoder-decoder's own loss has a third copy.
LOGIT_BYTES, LOGIT_BYTES_ENCODER_DECODER = 8, 12
LOSS_CHUNK = 64  # tokens whose softmax is computed at once


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What goes through the model at once: tokens in all, and in one sequence, whose numbers have so many bytes.

    `masked`: attention is given a mask, because a sequence holds several rows or padding.
    """

    tokens: int
    sequence: int
    masked: bool
    dtype_bytes: int
    on_cpu: bool = False

    @staticmethod
    def of(shape: ModelShape, config: RunConfig, dtype_bytes: int, on_cpu: bool) -> Batch:
        """The largest micro-batch: every row as long as it may be."""
        o, longest = config.optimization, config.data.max_seq_len
        tokens, sequence, masked = o.micro_batch_size * longest, longest, o.micro_batch_size > 1
        if shape.is_encoder_decoder:  # half is read and half is written: nobody knows beforehand
            sequence, masked = longest // 2, True
        elif o.packing != "off" and not o.neftune_noise_alpha:
            tokens = max(min(tokens, CPU_TOKEN_BUDGET), longest) if on_cpu else tokens
            sequence, masked = tokens, not on_cpu  # on a CPU each row is attended to by itself
        return Batch(tokens=tokens, sequence=sequence, masked=masked, dtype_bytes=dtype_bytes, on_cpu=on_cpu)

    @property
    def half(self) -> bool:
        return self.dtype_bytes == 2

    def bytes_of(self, pair: tuple[int, int]) -> int:
        """Of a pair of figures, in 16 bits and in float32, the one that holds."""
        return pair[0] if self.half else pair[1]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes. `layers` are all layers' own, `inputs` what is kept of them when they are computed again, `largest` one layer's.

    `outside` is kept beside the layers; `passing` comes and goes in the pass through one layer. `copies` are all layers' adapters
    in 16 bits, among `layers`: autocast keeps them to the end of the forward pass, whether the layers are computed again or not.
    """

    layers: int
    inputs: int
    largest: int
    outside: int
    passing: int
    copies: int

    @property
    def kept(self) -> int:
        return self.layers + self.outside

    def at_peak(self, logits: int, recompute: bool) -> int:
        """What is there beside the logits at the peak: while the loss is computed, or without them, in the pass through a layer."""
        if recompute:
            return self.inputs + self.outside + max(0, max(self.largest, self.copies) + self.passing - logits)
        return self.kept + max(0, self.passing - logits)


def logits_bytes(shape: ModelShape, batch: Batch) -> int:
    """Logits of all tokens that may be trained, and their gradient."""
    if shape.is_encoder_decoder:
        return shape.vocab * batch.tokens // 2 * LOGIT_BYTES_ENCODER_DECODER
    each = LOGIT_BYTES + batch.dtype_bytes * shape.habits.soft_caps
    return shape.vocab * (batch.tokens * each + LOSS_CHUNK * LOGIT_BYTES)


def activations_of(shape: ModelShape, config: RunConfig, batch: Batch) -> Activations:
    """Those of one micro-batch. Encoder and decoder share its tokens."""
    sides = 1 + shape.is_encoder_decoder
    habits, tokens, stacks = shape.habits, batch.tokens // sides, [stack for stack in shape.stacks if stack.side != "idle"]
    copies = [copy_bytes(shape, stack, config, batch) for stack in stacks]
    layers = [layer_bytes(shape, stack, config, batch, tokens) + copy for stack, copy in zip(stacks, copies, strict=True)]
    number = tokens * batch.bytes_of(habits.stream)
    stream = number * shape.hidden
    widest = batch.dtype_bytes * max(
        (linear.weights for linear, _ in shape.linears if linear.quantized), default=0
    )  # unpacked for a product
    masks = 3 * tokens * _mask_bytes(shape, batch) if habits.mask_of_each_head else batch.sequence * tokens * batch.masked
    return Activations(
        layers=sum(layer * stack.layers for layer, stack in zip(layers, stacks, strict=True)),
        inputs=sum(stream * stack.layers for stack in stacks),
        largest=max(layers),
        outside=sides * (stream + 4 * tokens * shape.hidden) + masks,
        copies=sum(copy * stack.layers for copy, stack in zip(copies, stacks, strict=True)),
        passing=max(number * (7 * shape.intermediate // 2 + 2 * shape.hidden), number * (2 * shape.intermediate + shape.hidden) + widest),
    )


def layer_bytes(shape: ModelShape, stack: Stack, config: RunConfig, batch: Batch, tokens: int) -> int:
    """What one layer keeps of so many tokens."""
    habits, linears = shape.habits, _adapted_in(shape, stack, config)
    normed = sum(norm.width for norm in stack.norms[: 1 if habits.norms_read_the_same else None])
    attentions = sum(linear.reads.endswith("attention output") for linear in stack.linears)
    dropped = (len(stack.norms) * shape.hidden + shape.intermediate * habits.mask_of_each_head) * habits.dropout
    each = normed * batch.bytes_of(habits.norm) + shape.intermediate * batch.bytes_of(habits.inner) + dropped
    each += attentions * _attention_bytes(shape, stack, batch) + _adapter_bytes(stack, linears, config, batch, habits)
    # PEFT adds an adapter to a bare tensor before it is used, and that sum is kept.
    summed = sum(linear.weights for linear in linears if linear.experts)
    return tokens * (each + batch.dtype_bytes * stack.routed) + batch.dtype_bytes * summed


def copy_bytes(shape: ModelShape, stack: Stack, config: RunConfig, batch: Batch) -> int:
    """One layer's adapter in 16 bits, where it is computed so."""
    ends = sum(linear.ranks * (linear.in_features + linear.out_features) for linear in _adapted_in(shape, stack, config))
    return 2 * config.adapter.lora_r * ends * batch.half


def _adapted_in(shape: ModelShape, stack: Stack, config: RunConfig) -> list[Linear]:
    targets = {target for target, layers in adapted(shape, config.adapter) if layers}
    return [linear for linear in stack.linears if linear in targets]


def _attention_bytes(shape: ModelShape, stack: Stack, batch: Batch) -> int:
    """A token's part of an attention: queries, keys, values, the result, and what the softmax needs again."""
    size, queries, keys = batch.dtype_bytes, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if shape.habits.soft_caps:
        return 3 * size * queries + 8 * shape.heads * batch.sequence
    quick = batch.on_cpu and batch.half and not batch.masked and batch.sequence <= CPU_TOKEN_BUDGET  # plain products are, for short rows
    dropped = shape.habits.attention_dropout and batch.on_cpu
    if quick or dropped or not shape.habits.fused_attention:
        score = 3 * size if dropped else size + 4 * (batch.half and not batch.on_cpu)
        return 3 * size * queries + score * shape.heads * batch.sequence
    repeated = queries if batch.masked else keys  # with a mask each query head is given keys and values of its own
    fused = sum(linear.reads.endswith("attention input") for linear in stack.linears) == 1
    around = queries + keys if fused and repeated == keys else 0  # the values are a part of one product, which is kept whole
    return size * (2 * (queries + repeated) + around) + 4 * shape.heads + _mask_bytes(shape, batch)


def _mask_bytes(shape: ModelShape, batch: Batch) -> int:
    return batch.dtype_bytes * batch.sequence * (shape.heads if shape.habits.mask_of_each_head else 1) * batch.masked


def _adapter_bytes(stack: Stack, linears: Sequence[Linear], config: RunConfig, batch: Batch, habits: Habits) -> int:
    """A token's part of what adapters keep: their input, with dropout a copy and a mask for each, and the narrow product between."""
    size, bits, linears = batch.dtype_bytes, config.quantization.quant_bits, [linear for linear in linears if not linear.experts]
    narrow = size * config.adapter.lora_r * len(linears)
    if config.adapter.lora_dropout:
        by_the_base = (
            size * sum({linear.reads: linear.in_features for linear in stack.linears if linear.quantized}.values()) * (bits == "8")
        )
        return narrow + by_the_base + (size + (4 if batch.on_cpu else 1)) * sum(linear.in_features for linear in linears)
    if batch.half and (batch.on_cpu or bits == "16"):  # each casts its input for itself
        return narrow + size * sum(linear.in_features for linear in linears)
    new = [linear for linear in linears if batch.on_cpu or not linear.reads.endswith("attention output")]  # that is kept already
    if batch.half and habits.stream[0] == 4:
        return narrow + size * sum(linear.in_features for linear in new)
    return narrow + size * sum({linear.reads: linear.in_features for linear in new}.values())
