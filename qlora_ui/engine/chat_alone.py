"""Chat with the adapter beside this file: `python chat.py`. Needs torch, transformers, peft and bitsandbytes, and nothing else.

Base model, bits, prompt format and ends are those of the training; they are in chat.json and in the adapter's tokenizer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BitsAndBytesConfig, TextStreamer

HERE = Path(__file__).resolve().parent


def settings() -> dict[str, Any]:
    """What the training says about the base and the prompt format."""
    written: dict[str, Any] = json.loads((HERE / "chat.json").read_text("utf-8"))
    return written


def load(base: str = "", trusted: bool = False) -> tuple[Any, Any]:
    """The model with its adapter, and its tokenizer. `base` is a folder to use in place of the base's name."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    wish = settings()
    dtype: torch.dtype = getattr(torch, wish["compute_dtype"])
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.float32  # CPUs compute slowly in float16, or not at all
    bits = {"quantization_config": BitsAndBytesConfig(**wish["quantization"], bnb_4bit_compute_dtype=dtype)} if wish["quantization"] else {}
    kind = AutoModelForSeq2SeqLM if wish["encoder_decoder"] else AutoModelForCausalLM
    model = kind.from_pretrained(
        base or wish["base"],
        revision="main" if base else wish["revision"],
        **bits,
        dtype=dtype,
        device_map={"": device},
        trust_remote_code=trusted,
        use_safetensors=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(HERE / "adapter", trust_remote_code=trusted)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # tokens were added; their rows are in the adapter
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return PeftModel.from_pretrained(model, HERE / "adapter").eval(), tokenizer


def prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The text that asks for the next answer."""
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text + tokenizer.eos_token if settings()["encoder_decoder"] else text


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int, temperature: float) -> str:
    """Print the answer while it is written, and return it."""
    batch = tokenizer(prompt(tokenizer, messages), add_special_tokens=False, return_tensors="pt").to(model.device)
    read = 1 if settings()["encoder_decoder"] else batch["input_ids"].shape[1]
    with torch.inference_mode():
        written = model.generate(
            **batch,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_p=0.9 if temperature > 0 else None,
            top_k=None,
            eos_token_id=settings()["end_ids"],
            pad_token_id=tokenizer.pad_token_id,
        )
    said: str = tokenizer.decode(written[0, read:], skip_special_tokens=True)
    return said.strip()


def main() -> None:
    """One answer to --prompt, or a conversation until an empty line."""
    parser = argparse.ArgumentParser(description="Chat with the adapter beside this file.")
    parser.add_argument("--prompt", default="", help="ask one question and end")
    parser.add_argument("--base", default="", help="a folder with the base model, in place of its name on the Hub")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--trust-remote-code", action="store_true", help="let Python code that comes with the base model run")
    arguments = parser.parse_args()
    try:
        model, tokenizer = load(arguments.base, arguments.trust_remote_code)
    except OSError as error:
        name = arguments.base or settings()["base"]
        raise SystemExit(
            f"The base model {name} cannot be had: {str(error).splitlines()[0]} Give a folder with a copy: --base FOLDER"
        ) from error
    messages: list[dict[str, str]] = []
    while question := arguments.prompt or asked():
        messages.append({"role": "user", "content": question})
        said = answer(model, tokenizer, messages, arguments.max_new_tokens, arguments.temperature)
        messages.append({"role": "assistant", "content": said})
        if arguments.prompt:
            break


def asked() -> str:
    """The next question; nothing at the end of the input."""
    try:
        return input("\n> ")
    except EOFError:
        return ""


if __name__ == "__main__":
    main()
