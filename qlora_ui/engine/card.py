"""The model card that lies beside a saved adapter: for whoever finds the adapter elsewhere. Knows nothing of torch or Gradio.

It is read in public, so it names no folder of this machine: a model or a data set from this disk appears by its last name only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_ui.config import RunConfig
from qlora_ui.data import hub, sources
from qlora_ui.data.catalog import CATALOG
from qlora_ui.events import Event, HeldOut, Planned, Step

# What may hold a path, or is told above the table. A template lies beside the card in its own file.
NOT_LISTED = ("model", "revision", "data", "columns", "chat_template")


FROZEN = {
    "8": "Trained with LoRA: the base is frozen in 8 bits (LLM.int8)",
    "16": "Trained with LoRA: the base is frozen and not quantized",
}


def text(facts: Mapping[str, Any], config: RunConfig, events: Sequence[Event], adapter: Mapping[str, Any]) -> str:
    """The card, with the YAML front matter that the Hub reads. `facts` is the run's `config.json`, `events` all that it told,
    `adapter` is PEFT's `adapter_config.json`.
    """
    q = config.quantization
    frozen = FROZEN.get(q.quant_bits, f"Trained with QLoRA: the base is frozen in {q.quant_type.upper()}")
    base, on_hub = base_name(facts, config)
    data, licence = data_name(config.data.data)
    front: dict[str, Any] = {"library_name": "peft", "tags": [*(["qlora"] if "QLoRA" in frozen else []), "lora", "base_model:adapter"]}
    if on_hub:
        front["base_model"] = base
    if is_hub(config.data.data):
        front["datasets"] = [hub.HubSet.parse(config.data.data).name]
    commit = facts.get("model_commit")
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
            "---",
            "",
            f"# LoRA adapter for {code(base)}",
            "",
            f"{frozen}, the adapter is all that was learned.",
            "",
            f"- Base model: {code(base)}" + (f", commit {code(commit)}" if commit else ""),
            f"- Data: {code(data)}" + (f", licence {licence}" if licence else ", licence not known"),
            *losses(events),
            "",
            "## How to load it",
            "",
            "```python",
            *loading(base, commit, config, str(facts.get("compute_dtype", "float32")), adapter),
            "```",
            "",
            "## Settings",
            "",
            "| setting | value |",
            "|---|---|",
            *(f"| {name} | {code(value)} |" for name, value in config.values().items() if name not in NOT_LISTED and value != ""),
            "",
            "## Library versions",
            "",
            *(f"- {name} {version}" for name, version in facts.get("versions", {}).items()),
            "",
        ]
    )


def base_name(facts: Mapping[str, Any], config: RunConfig) -> tuple[str, bool]:
    """What to call the base, and whether that is an id of the Hub."""
    name = str(facts.get("model_name") or config.model.model)
    local = Path(name).is_absolute() or facts.get("model_origin") == "a local folder"
    return (Path(name).name, False) if local else (name, True)


def data_name(reference: str) -> tuple[str, str]:
    """What to call the data set, and its licence where it is known."""
    known = {s.reference: s.licence for s in CATALOG.values()} | {f"bundled:{name}": s.licence for name, s in sources.BUNDLED.items()}
    on_hub = is_hub(reference)
    return (reference if on_hub else Path(sources.shown(reference)).name), known.get(reference, "")


def is_hub(reference: str) -> bool:
    """Whether this names a data set on the Hub, and nothing on this disk."""
    return hub.is_reference(reference) and not Path(reference).exists()


def losses(events: Sequence[Event]) -> list[str]:
    """What was read, and what came of it, as list items."""
    planned = [event for event in events if isinstance(event, Planned)]
    steps = [event for event in events if isinstance(event, Step)]
    measured = [event for event in events if isinstance(event, HeldOut)]
    lines = [f"- Rows: {event.train_rows:,} to train on, {event.held_out_rows:,} held out" for event in planned[-1:]]
    lines += [f"- Last training loss: {event.loss:.4f} (step {event.step:,})" for event in steps[-1:] if event.loss is not None]
    if measured:
        first, last = measured[0], measured[-1]
        lines.append(f"- Held-out loss: {first.loss:.4f} at step {first.step:,}, {last.loss:.4f} at step {last.step:,}")
    return lines


def loading(base: str, commit: str | None, config: RunConfig, dtype: str, adapter: Mapping[str, Any]) -> list[str]:
    """The lines of Python that load the adapter without this app."""
    q = config.quantization
    told = (f", revision={commit!r}" if commit else "") + (", trust_remote_code=True" if config.model.trust_remote_code else "")
    kind = "AutoModelForSeq2SeqLM" if adapter["task_type"] == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    four = f"bnb_4bit_quant_type={q.quant_type!r}, bnb_4bit_use_double_quant={q.double_quant}, bnb_4bit_compute_dtype=torch.{dtype}"
    bits = {"4": f"BitsAndBytesConfig(load_in_4bit=True, {four})", "8": "BitsAndBytesConfig(load_in_8bit=True)"}.get(q.quant_bits, "None")
    rows = "max(len(tokenizer), base.get_input_embeddings().num_embeddings)"
    room = [f"base.resize_token_embeddings({rows}, mean_resizing=False)  # for its new tokens"]
    return [
        "import torch",
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer, BitsAndBytesConfig",
        "",
        'adapter = "."  # the folder of this card, or its id on the Hub',
        "tokenizer = AutoTokenizer.from_pretrained(adapter)  # with the chat template that it was trained in",
        f"bits = {bits}",
        f"base = {kind}.from_pretrained({base!r}{told}, quantization_config=bits, dtype=torch.{dtype})",
        *(room if adapter.get("trainable_token_indices") else []),
        "model = PeftModel.from_pretrained(base, adapter)",
    ]


def code(value: Any) -> str:
    """A value as Markdown shows it, whatever it holds: in a table cell of one line."""
    shown = str(value).replace("\n", " ").replace("|", "\\|").replace("`", "'")
    return f"`{shown}`"
