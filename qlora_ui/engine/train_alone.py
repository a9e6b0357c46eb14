"""Trains an adapter as settings.json says, on the tokens of train.jsonl, without QLoRA UI.

pip install torch transformers peft bitsandbytes accelerate datasets
"""

# %% What is trained, and what this machine computes with
import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, EarlyStoppingCallback, Trainer, TrainingArguments

here = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
settings = json.loads((here / "settings.json").read_text("utf-8"))
on_gpu = torch.cuda.is_available()
best = "float32" if not on_gpu else "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
compute_dtype = best if settings["compute_dtype"] == "auto" else settings["compute_dtype"]
dtype = getattr(torch, compute_dtype)

# %% The base model, frozen
quantization = settings["quantization"]
if quantization.get("load_in_4bit"):
    quantization["bnb_4bit_compute_dtype"] = dtype
model = AutoModelForCausalLM.from_pretrained(
    settings["model"],
    revision=settings["revision"],
    quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
    dtype=dtype,
    device_map="auto" if on_gpu else {"": "cpu"},
).requires_grad_(False)
for module in model.modules():
    if isinstance(module, Linear4bit):
        module.support_avx512bf16_for_cpu = False  # bitsandbytes' quicker CPU kernel has no backward pass
tokenizer = AutoTokenizer.from_pretrained(settings["model"], revision=settings["revision"])

# %% The adapter
torch.manual_seed(settings["seed"])
model = get_peft_model(model, LoraConfig(**settings["lora"]))
model.enable_input_require_grads()
model.print_trainable_parameters()

# %% The rows: token ids, and labels that are -100 where nothing is learned
files = {name: str(here / f"{name}.jsonl") for name in ("train", "held_out") if (here / f"{name}.jsonl").exists()}
rows = load_dataset("json", data_files=files)
print("The first row:", repr(tokenizer.decode(rows["train"][0]["input_ids"])))


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows to one batch, filled up at the right; what is filler is neither seen nor learned."""
    longest = max(len(row["input_ids"]) for row in batch)
    filler = {"input_ids": settings["pad_token_id"], "labels": -100}
    made = {name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in batch]) for name, value in filler.items()}
    lengths = torch.tensor([len(row["input_ids"]) for row in batch])
    return {**made, "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long()}


# %% Training
arguments = TrainingArguments(
    output_dir=str(here / "checkpoints"),
    use_cpu=not on_gpu,
    bf16=compute_dtype == "bfloat16",
    fp16=compute_dtype == "float16",
    **settings["training"],
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows["train"], eval_dataset=rows.get("held_out"), data_collator=padded)
if settings["early_stopping_patience"]:
    trainer.add_callback(EarlyStoppingCallback(settings["early_stopping_patience"]))
trainer.train()

# %% The result
model.save_pretrained(here / "adapter")
tokenizer.chat_template = settings["chat_template"]
tokenizer.save_pretrained(here / "adapter")
(here / "losses.json").write_text(json.dumps(trainer.state.log_history, indent=1), "utf-8")
print("The adapter is in", here / "adapter")
