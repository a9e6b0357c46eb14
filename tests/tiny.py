"""The smallest real things to test with: a random 2-layer Llama with its tokenizer, rows, a config, a run's events."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from qlora_ui.config import RunConfig
from qlora_ui.events import Event
from qlora_ui.runs import Run, Workspace

NAME = "tiny"
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "the",
    "and",
    "ing",
    "user",
    "assistant",
    "Human",
    "Assistant",
    "Ġthe",
    "Ġis",
    "Ġword",
    "Ġanswer",
    "Ġquestion",
    "Question",
    "ĊĊ",
    "ĠĠ",
)

# Unmarked on purpose, as most published templates are: what is trained must be found by rendering.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Byte-level BPE with every byte and a few merges: any text comes back as it was."""
    return copy.deepcopy(_tokenizer())


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@functools.cache
def _built(tied: bool) -> tempfile.TemporaryDirectory[str]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261122)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,  # so that greedy answers are not decided by rounding
                tie_word_embeddings=tied,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    built = tempfile.TemporaryDirectory(prefix="tiny-model-")
    model.save_pretrained(built.name)
    tokenizer.save_pretrained(built.name)
    return built


def tiny_model(folder: Path, *, tied: bool = True) -> Path:
    """Make `folder` a model: safetensors, config and tokenizer. Built once a process, copied after that."""
    import torch

    torch.set_num_threads(1)  # what is this small gains nothing from a second core, and loses much when others want that core
    return Path(shutil.copytree(_built(tied).name, folder))


def tiny_model_with_biases(folder: Path) -> Path:
    """The tiny model with biases in its attention, as Qwen 2 has them."""
    import torch
    from safetensors.torch import load_file, save_file

    config = tiny_model(folder) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_bias": True}))
    weights = load_file(folder / "model.safetensors")
    biases = {
        name.replace("weight", "bias"): torch.full((weight.shape[0],), 0.01) for name, weight in weights.items() if "self_attn" in name
    }
    save_file({**weights, **biases}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_gguf(path: Path) -> Path:
    """The tiny model as the package index would carry it: one GGUF file, in float32."""
    import gguf
    import numpy
    from safetensors.numpy import load_file

    weights = load_file(Path(_built(True).name) / "model.safetensors")
    config = json.loads((Path(_built(True).name) / "config.json").read_text())
    tokenizer = tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // heads["q_proj"])
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in backend["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHAT_TEMPLATE)

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config["num_hidden_layers"]):
        for name, its_name in LAYER_TENSORS.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            if count := heads.get(name.rsplit(".", 1)[-1]):  # llama.cpp keeps the two halves of a rotation side by side
                weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{layer}.{its_name}.weight", numpy.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_rows(path: Path, n: int = 12) -> Path:
    """Write `n` Alpaca rows of different lengths, every third with an input."""
    rows = [
        {
            "instruction": f"Question {i}: which word is {i}?",
            "input": f"the {i} and the {i + 1}" if i % 3 == 0 else "",
            "output": "The answer is" + f" word {i}" * (1 + i % 4) + ".",
        }
        for i in range(n)
    ]
    path.write_text(json.dumps(rows), "utf-8")
    return path


def tiny_config(data: Path | str, **values: Any) -> RunConfig:
    """A run of 4 steps on the tiny model, in float32 so that every CPU computes the same; any knob can be set."""
    small = {
        "model": NAME,
        "data": str(data),
        "prompt_format": "chatml",
        "compute_dtype": "float32",
        "max_seq_len": 128,
        "held_out_share": 0.2,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "learning_rate": 0.01,
        "max_steps": 4,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "sample_every": 0,
    }
    return RunConfig().with_values({**small, **values})


def tiny_run(workspace: Workspace, data: Path | str, **values: Any) -> Run:
    """A run folder that nobody trains yet; its lock is free."""
    run, lock = workspace.create(tiny_config(data, **values), "tiny", {})
    lock.release()
    return run


def events_of(run: Run, *kinds: type[Event]) -> list[Any]:
    """The run's events of these kinds, or all."""
    return [event for event in run.read()[0] if not kinds or isinstance(event, kinds)]


def tiny_trainer(run: Run) -> Any:
    """The Trainer that the engine makes for a run, its model and rows inside, before the first step."""
    from qlora_ui.engine import tokens
    from qlora_ui.engine.adapter import add_adapter
    from qlora_ui.engine.hardware import detect
    from qlora_ui.engine.model import find_here, load_quantized, load_tokenizer
    from qlora_ui.engine.train import encode, make_trainer, read_rows

    config = run.config()
    found = find_here(config.model.model, config.model.revision, run.workspace.models)
    assert found is not None
    hardware = detect(config.quantization.compute_dtype)
    tokenizer = load_tokenizer(found)
    tokens.set_prompt_format(tokenizer, config.data.prompt_format, config.data.chat_template)
    rows = encode(run, tokenizer, read_rows(run, config, _silent, _never), _silent, _never)
    model = add_adapter(load_quantized(found, config.quantization, hardware, _silent, _never), config.adapter, config.optimization.seed)
    return make_trainer(run, config, hardware, model, tokenizer, rows[0], rows[1], _silent, _never)


def rows_of_step(step: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The rows in the micro-batches of an optimizer step, packed or padded, as ids and labels."""
    rows = []
    for batch in step["micro_batches"]:
        ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
        if "attention_mask" in batch:
            sizes = batch["attention_mask"].sum(-1).tolist()
            stretches = [(line, 0, size) for line, size in enumerate(sizes)]
        else:
            starts = [place for place, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
            stretches = [(0, start, end) for start, end in zip(starts, [*starts[1:], len(ids[0])], strict=True)]
        rows += [{"input_ids": ids[line][start:end], "labels": labels[line][start:end]} for line, start, end in stretches]
    return rows


def _silent(event: Event) -> None:
    pass


def _never() -> bool:
    return False
