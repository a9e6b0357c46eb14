"""What a run is told to do: frozen parts, each knob declared once. Knows nothing of disk, torch or Gradio.

Form, preset check, command-line flag and README table all derive from `KNOBS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_ui.errors import UserError
from qlora_ui.knobs import Knob, Part, knob

VERSION = 1
STARTER_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Part, section="model"):
    """Which base model."""

    model: str = knob(
        STARTER_MODEL, "Model", "A Hugging Face id (owner/name), or the name of a folder in the workspace's models.", main=True
    )
    revision: str = knob("main", "Revision", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = knob(
        False,
        "Run the model's own code",
        "For models that come with Python code. It can do all that you can: only the command line or a preset file may allow it.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("No model is chosen. Give a Hugging Face id (owner/name).", field="model")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Part, section="quantization"):
    """How the frozen base is stored and computed with (QLoRA paper, section 3)."""

    quant_bits: str = knob(
        "4",
        "Base bits",
        "How the base's linear layers are stored: 4 is QLoRA, 8 is LLM.int8, 16 leaves them unquantized in the compute dtype.",
        choices=("4", "8", "16"),
    )
    quant_type: str = knob(
        "nf4", "4-bit type", "NF4 suits normally distributed weights; the paper found it better than FP4.", choices=("nf4", "fp4")
    )
    double_quant: bool = knob(
        True, "Double quantization", "Quantizes the quantization constants too: saves 0.37 bits per parameter, costs nothing measurable."
    )
    compute_dtype: str = knob(
        "auto",
        "Compute dtype",
        "What weights are dequantized to for the matrix products. Paper: bfloat16. Auto looks at the hardware and logs why.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quant_storage: str = knob(
        "uint8",
        "4-bit storage",
        "The dtype that 4-bit weights are packed in; their bits stay the same. FSDP shards only what has the compute dtype.",
        choices=("uint8", "bfloat16", "float16", "float32"),
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Part, section="adapter"):
    """The LoRA adapter, the only thing that is trained."""

    lora_r: int = knob(
        16,
        "LoRA rank",
        "Size of the adapter's bottleneck. The paper used 64 and found quality independent of it; 8 to 64 is usual.",
        low=1,
        high=512,
        main=True,
    )
    lora_alpha: int = knob(
        16, "LoRA alpha", "The adapter's output is scaled by alpha / rank. The paper kept 16.", low=1, high=1024, main=True
    )
    lora_alpha_ratio: float = knob(
        0.0,
        "Alpha ratio",
        "Alpha as a multiple of the rank, so that the scale stays when the rank changes; 0 means by alpha.",
        low=0,
        high=64,
    )
    lora_dropout: float = knob(
        0.05, "LoRA dropout", "Share of the adapter's inputs zeroed while training. Paper: 0.1 up to 13B, 0.05 above.", low=0, high=0.9
    )
    lora_bias: str = knob(
        "none",
        "Train biases",
        "Biases of the base that are trained too, where the model has any: none, all, or those of adapted layers. Not in float16; "
        "in bfloat16 they move in coarse steps.",
        choices=("none", "all", "lora_only"),
    )
    target_modules: str = knob(
        "all-linear",
        "Target modules",
        "Where adapters go: all-linear (the paper: needed to match full fine-tuning), attention, or module names with commas.",
    )
    layers_to_skip: str = knob(
        "", "Layers to skip", "Layers that get no adapter, by number from 0: 0, 5, 20-23. In an encoder-decoder, of both halves."
    )
    modules_to_save: str = knob(
        "",
        "Modules trained fully",
        "Modules trained as a whole in float32 and saved with the adapter, with commas: lm_head, embed_tokens. Costs much memory.",
    )
    use_rslora: bool = knob(
        False, "rsLoRA", "Scales by alpha / square root of the rank instead of alpha / rank: keeps high ranks learning."
    )
    use_dora: bool = knob(
        False,
        "DoRA",
        "Learns a magnitude of each output beside LoRA's direction: a little better at low ranks, and slower. Not with 8 bits.",
    )
    init_lora_weights: str = knob(
        "default",
        "LoRA start",
        "How the adapter's A side starts: LoRA's own uniform numbers, or Gaussian ones as in its paper. B starts at zero.",
        choices=("default", "gaussian"),
    )
    init_adapter: str = knob(
        "",
        "Start from adapter",
        "A run's id or an adapter folder in the workspace to train further. Its rank and targets win. Empty: a new one.",
    )

    def __post_init__(self) -> None:
        if reason := NO_START.get(self.init_lora_weights.partition("_niter")[0]):
            raise UserError(
                f"init_lora_weights is {self.init_lora_weights!r}, but {reason}. Use default or gaussian.", field="init_lora_weights"
            )
        super().__post_init__()
        self.skipped_layers()
        if self.init_adapter and self.init_lora_weights != "default":
            raise UserError(
                f"init_lora_weights is {self.init_lora_weights!r}, but init_adapter is set, whose weights are the start. "
                "Set init_lora_weights to default, or clear init_adapter.",
                field="init_lora_weights",
            )

    @property
    def alpha(self) -> float:
        """What the adapter is scaled by, over its rank."""
        return self.lora_alpha_ratio * self.lora_r or self.lora_alpha

    def skipped_layers(self) -> list[int]:
        """The numbers in `layers_to_skip`, ranges spelled out. Raises UserError for what is neither."""
        numbers = set[int]()
        for part in filter(None, (part.strip() for part in self.layers_to_skip.split(","))):
            span = [int(number) for number in part.split("-")] if re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?", part) else []
            if not span or span[0] > span[-1]:
                raise UserError(f"layers_to_skip has {part!r}: write numbers and ranges, as 0, 5, 20-23.", field="layers_to_skip")
            numbers.update(range(span[0], span[-1] + 1))
        return sorted(numbers)


NO_START = {
    "pissa": "PiSSA takes the principal part out of the base's weights: it needs an unquantized base, and leaves another base than the "
    "one the adapter will be put on",
    "olora": "OLoRA changes the base's weights: the adapter would only work on that changed base",
    "corda": "CorDA takes a part out of the base's weights: it needs an unquantized base, and leaves another one",
    "loftq": "LoftQ quantizes the base itself, to other weights than the plain 4-bit ones that the adapter will be put on",
    "eva": "EVA reads rows until its singular vectors stand still, which on few rows is never",
    "lora_ga": "LoRA-GA needs gradients of the base's weights, which a quantized base does not have",
    "orthogonal": "PEFT's orthogonal start fails on quantized weights",
    "mica": "MiCA needs the singular vectors of unquantized weights",
}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Part, section="data"):
    """Which rows, and what of them is learned."""

    data: str = knob(
        "",
        "Data set",
        "bundled:NAME, a file or a folder of files, or a Hugging Face id: owner/name, with :subset, @revision and #split where wanted.",
    )
    data_format: str = knob(
        "auto", "Row format", "How rows are written: auto recognises each row by its columns; else one format's name for all of them."
    )
    columns: str = knob(
        "", "Column mapping", "Which column holds what, when the names are others: instruction=question, output=answer. Empty: as named."
    )
    prompt_format: str = knob(
        "tokenizer",
        "Prompt format",
        "The chat template rows are written in: the tokenizer's own, ChatML, Guanaco's ### Human / ### Assistant, Alpaca's, or your own.",
        choices=("tokenizer", "chatml", "guanaco", "alpaca", "custom"),
    )
    chat_template: str = knob(
        "",
        "Chat template",
        "Your own Jinja template, for the prompt format custom. {% generation %} marks what the assistant writes.",
    )
    new_tokens: str = knob(
        "",
        "New tokens",
        "Tokens to add to the vocabulary, with commas. pad=, eos= or bos= before one gives it that role: pad=<|pad|>, <|tool|>. "
        "Their embeddings are trained and saved with the adapter; no other row is touched.",
    )
    train_on: str = knob(
        "assistant",
        "Train on",
        "Which tokens count in the loss: every assistant turn, the last one only, or everything (the paper's OASST1 recipe).",
        choices=("assistant", "last", "everything"),
        main=True,
    )
    max_seq_len: int = knob(
        512,
        "Max length",
        "Tokens of a row that are read; memory grows with it. The paper's OASST1 recipe: 512.",
        unit="tokens",
        low=16,
        high=131072,
        main=True,
    )
    long_rows: str = knob(
        "truncate",
        "Long rows",
        "Rows longer than the max length: truncate cuts off their end, drop leaves them out, split makes several rows of one.",
        choices=("truncate", "drop", "split"),
    )
    held_out_share: float = knob(
        0.05,
        "Held-out share",
        "Part of the rows kept away from training, to measure what was learned and not memorised.",
        low=0,
        high=0.5,
        main=True,
    )
    held_out_rows: int = knob(
        0, "Held-out rows", "A fixed number of rows to hold out; 0 means by share.", unit="rows", low=0, high=1_000_000
    )
    held_out_split: str = knob(
        "", "Held-out split", "The Hub set's own split to measure on, as test. Empty: rows of the data set itself are held out."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_format == "custom" and not self.chat_template:
            raise UserError("prompt_format is custom, but there is no chat_template. Write one, or choose another.", field="chat_template")


# All of Trainer's that need no further package or argument; each is tried in the tests.
OPTIMIZERS = (
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adafactor",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "adagrad",
    "sgd",
)


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig(Part, section="optimization"):
    """How the adapter is trained."""

    learning_rate: float = knob(
        2e-4, "Learning rate", "Peak step size. Paper: 0.0002 up to 13B, 0.0001 for 33B and 65B.", low=1e-8, high=1, main=True
    )
    num_train_epochs: float = knob(
        1.0,
        "Epochs",
        "Passes over the training rows. Ignored when max steps is set. After a few, rows are learned by heart.",
        low=0.01,
        high=1000,
        main=True,
    )
    max_steps: int = knob(
        0,
        "Max steps",
        "Optimizer steps to train for; 0 means by epochs. The paper's Guanaco: 1875.",
        unit="steps",
        low=0,
        high=10_000_000,
        main=True,
    )
    micro_batch_size: int = knob(
        4,
        "Micro-batch",
        "Rows that go through the model at once; packed, as many tokens as they may have. Memory grows with it.",
        unit="rows",
        low=1,
        high=1024,
        main=True,
    )
    gradient_accumulation_steps: int = knob(
        4,
        "Accumulation",
        "Micro-batches per optimizer step. Effective batch = micro-batch x accumulation; paper: 16.",
        low=1,
        high=4096,
        main=True,
    )
    lr_scheduler: str = knob(
        "constant",
        "Schedule",
        "How the learning rate moves after warm-up. The paper kept it constant.",
        choices=("constant", "linear", "cosine"),
    )
    warmup_ratio: float = knob(
        0.03, "Warm-up", "Share of the steps over which the learning rate rises from 0. Paper: 0.03.", low=0, high=0.9
    )
    warmup_steps: int = knob(
        0, "Warm-up steps", "Steps over which the learning rate rises from 0; 0 means by share.", unit="steps", low=0, high=1_000_000
    )
    optimizer: str = knob(
        "paged_adamw_32bit",
        "Optimizer",
        "Paged AdamW moves its state to CPU memory when the GPU is short of it: the paper's choice. On CPU nothing is paged.",
        choices=OPTIMIZERS,
    )
    loraplus_lr_ratio: float = knob(
        1.0,
        "LoRA+ ratio",
        "The B side learns at this multiple of the learning rate (LoRA+; its paper: 16). 1 means alike.",
        low=1,
        high=1000,
    )
    adam_beta1: float = knob(0.9, "Adam beta1", "Memory of the gradients.", low=0, high=0.99999)
    adam_beta2: float = knob(0.999, "Adam beta2", "Memory of the squared gradients. Paper: 0.999.", low=0.5, high=0.99999)
    adam_epsilon: float = knob(1e-8, "Adam epsilon", "Keeps Adam from dividing by nearly nothing.", low=1e-12, high=0.1)
    max_grad_norm: float = knob(0.3, "Max gradient norm", "Larger gradients are scaled down to it. Paper: 0.3.", low=0.001, high=1000)
    weight_decay: float = knob(
        0.0, "Weight decay", "Pull of the adapter towards zero at each step. The paper's recipe has none.", low=0, high=1
    )
    neftune_noise_alpha: float = knob(
        0.0,
        "NEFTune noise",
        "Noise on the embeddings while training, which can make answers better; 5 is usual, 0 means none.",
        low=0,
        high=100,
    )
    on_divergence: str = knob(
        "pause",
        "If the loss diverges",
        "After ten steps in a row whose loss or gradients are not finite: pause, or go back once to the last good checkpoint with a "
        "fifth of the learning rate.",
        choices=("pause", "go_back"),
    )
    group_by_length: bool = knob(
        False, "Group by length", "Puts rows of like length into a batch, as the paper did: less padding, but the loss goes up and down."
    )
    packing: str = knob(
        "auto",
        "Packing",
        "Several rows in one sequence without padding, which do not see each other. Auto and on: where the model allows it; the log says.",
        choices=("auto", "on", "off"),
    )
    gradient_checkpointing: str = knob(
        "auto",
        "Gradient checkpointing",
        "Recomputes activations in the backward pass, as the paper: much less memory, a third more time. Auto: when they would not fit.",
        choices=("auto", "on", "off"),
    )
    seed: int = knob(42, "Seed", "Fixes data order, held-out rows, dropout and the adapter's start.", low=0, high=2**31 - 1)


TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Part, section="schedule"):
    """When the run measures and saves."""

    eval_steps: int = knob(
        20, "Evaluate every", "Steps between two measurements of the held-out loss.", unit="steps", low=1, high=1_000_000
    )
    save_steps: int = knob(
        20, "Checkpoint every", "Steps between two checkpoints. A killed run keeps the newest.", unit="steps", low=1, high=1_000_000
    )
    save_total_limit: int = knob(
        2, "Checkpoints kept", "Older ones are deleted, so that the disk does not fill; the best one stays.", low=1, high=1000
    )
    keep: str = knob(
        "last",
        "Result",
        "Which weights become the adapter: the last, or those with the best held-out loss (each new best is then saved as a checkpoint).",
        choices=("last", "best"),
    )
    early_stopping_patience: int = knob(
        0,
        "Early stopping",
        "Measurements in a row without a better held-out loss after which the training ends; 0 means never.",
        unit="measurements",
        low=0,
        high=1000,
    )
    sample_every: int = knob(
        100,
        "Samples every",
        "Steps between two rounds of sample answers; there is one before the first step and one after the last too. "
        "0 means none. A round writes 48 tokens: seconds on a GPU, as long as several small steps on a CPU.",
        unit="steps",
        low=0,
        high=1_000_000,
    )
    sample_prompts: str = knob(
        "", "Sample prompts", "What base and adapter are asked, one prompt a line. Empty: the first three held-out questions."
    )
    report_to: str = knob(
        "",
        "Trackers",
        "Where the metrics go besides this app, with commas: tensorboard, wandb, trackio, where installed. Empty: nowhere.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trackers()

    def trackers(self) -> list[str]:
        """The names in `report_to`, each once. Raises UserError for one that is none."""
        names = [name for part in self.report_to.lower().split(",") if (name := part.strip()) not in ("", "none")]
        for name in names:
            if name not in TRACKERS:
                raise UserError(f"report_to names {name!r}: use {', '.join(TRACKERS)}, with commas.", field="report_to")
        return list(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All a run is told. `values()` is its flat form: knob name -> value; names are unique over the parts."""

    preset: str = ""
    model: ModelConfig = field(default_factory=lambda: ModelConfig())
    quantization: QuantizationConfig = field(default_factory=lambda: QuantizationConfig())
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig())
    data: DataConfig = field(default_factory=lambda: DataConfig())
    optimization: OptimizationConfig = field(default_factory=lambda: OptimizationConfig())
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig())

    def __post_init__(self) -> None:
        if self.adapter.use_dora and self.quantization.quant_bits == "8":
            raise UserError(
                "use_dora is true, but quant_bits is 8: DoRA does not work on 8-bit layers. "
                "Set quant_bits to 4 or 16, or use_dora to false.",
                field="use_dora",
            )
        if self.data.new_tokens and self.adapter.init_adapter:
            raise UserError(
                "new_tokens and init_adapter are both set: an adapter that goes on keeps its own vocabulary. Leave one of them out.",
                field="new_tokens",
            )
        asked = {"early_stopping_patience": self.schedule.early_stopping_patience > 0, "keep": self.schedule.keep == "best"}
        measured = self.data.held_out_share or self.data.held_out_rows or self.data.held_out_split
        for name in (name for name, is_asked in asked.items() if is_asked and not measured):
            value = getattr(self.schedule, name)
            raise UserError(
                f"{name} is {value}, but no row is held out to measure on. Set held_out_share, or leave {name} out.", field=name
            )

    @property
    def effective_batch(self) -> int:
        """Rows per optimizer step on one device."""
        return self.optimization.micro_batch_size * self.optimization.gradient_accumulation_steps

    def total_steps(self, train_rows: int) -> int:
        """Optimizer steps on one device, counted as transformers' Trainer counts them."""
        if self.optimization.max_steps:
            return self.optimization.max_steps
        return math.ceil(self.optimization.num_train_epochs * self.steps_an_epoch(train_rows))

    def steps_an_epoch(self, train_rows: int) -> int:
        """Those of one pass over the rows. Its last may have fewer of them."""
        batches = math.ceil(train_rows / self.optimization.micro_batch_size)
        return max(1, math.ceil(batches / self.optimization.gradient_accumulation_steps))

    def values(self) -> dict[str, Any]:
        """Flat: every knob's name and value."""
        return {name: getattr(getattr(self, k.section), name) for name, k in KNOBS.items()}

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """A copy with some knobs set; text is read as the knob's type. Raises UserError naming the knob."""
        by_section: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            k = find_knob(name)
            by_section.setdefault(k.section, {})[name] = k.parse(value)
        return dataclasses.replace(self, **{s: dataclasses.replace(getattr(self, s), **v) for s, v in by_section.items()})

    def to_dict(self) -> dict[str, Any]:
        """The form that is written to `config.json`."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(written: Mapping[str, Any]) -> RunConfig:
        """Inverse of `to_dict`; a knob younger than the config has its default. Raises UserError for what this app does not know."""
        if written.get("version") != VERSION:
            raise UserError(
                f"This run's config has version {written.get('version')!r}; this app reads version {VERSION}. Use the app that wrote it."
            )
        if damaged := [part for part in PARTS if not isinstance(written.get(part, {}), Mapping)]:
            raise UserError(f"This run's config is damaged: {damaged[0]} holds no settings. Start the run anew.")
        flat = {name: value for part, knobs in written.items() if part in PARTS for name, value in knobs.items()}
        if unknown := sorted(set(flat) - set(KNOBS)):
            raise UserError(f"This run's config has settings that this app does not know: {', '.join(unknown)}. Use the app that wrote it.")
        return dataclasses.replace(RunConfig(), preset=str(written.get("preset", ""))).with_values(flat)


PARTS: dict[str, type[Part]] = {
    part.section: part for part in (ModelConfig, QuantizationConfig, AdapterConfig, DataConfig, OptimizationConfig, ScheduleConfig)
}
KNOBS: dict[str, Knob] = {k.name: k for part in PARTS.values() for k in part.knobs()}


def find_knob(name: str) -> Knob:
    """The knob of that name. Raises UserError with the nearest name when there is none."""
    if name in KNOBS:
        return KNOBS[name]
    near = difflib.get_close_matches(name, KNOBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else " The README lists all settings."
    raise UserError(f"There is no setting {name!r}.{hint}", field=name)


def settings_table() -> str:
    """All settings as a Markdown table, as the README shows it."""
    rows = ["| setting | default | range | what it does |", "|---|---|---|---|"]
    for k in KNOBS.values():
        bounds = ", ".join(k.choices) or (f"{k.low:,g} to {k.high:,g}" if k.low is not None and k.high is not None else "")
        default = str(k.default).lower() if k.kind is bool else str(k.default)
        unit = f" {k.unit}" if k.unit and bounds else ""
        rows.append(f"| `{k.name}` | {default or '(none)'} | {bounds}{unit} | {k.help} |")
    return "\n".join(rows)
