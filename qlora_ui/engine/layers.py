"""Which layers of a base can be stored in few bits, beyond what transformers sees by itself. Knows nothing of disk or Gradio."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn


@contextlib.contextmanager
def plain_linears(model_class: type | None) -> Iterator[None]:
    """While a model of this class is built, its own kinds of linear layer that compute just what `nn.Linear` does are `nn.Linear`.

    transformers quantizes only layers of exactly that class: Falcon's, a subclass, would all stay in 16 bits.
    """
    module = sys.modules[model_class.__module__] if model_class else None
    own = [(name, kind) for name, kind in vars(module).items() if _is_plain(kind)] if module else []
    for name, _ in own:
        setattr(module, name, nn.Linear)
    try:
        yield
    finally:
        for name, kind in own:
            setattr(module, name, kind)


def _is_plain(kind: Any) -> bool:
    """Whether this is a subclass of `nn.Linear` that differs in nothing but its name: told by its answer."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Linear)) or kind is nn.Linear:
        return False
    try:
        with torch.random.fork_rng(devices=[]):
            layer, rows = kind(5, 3), torch.randn(2, 5)
        with torch.no_grad():
            return torch.allclose(layer(rows), nn.functional.linear(rows, layer.weight, layer.bias), atol=1e-5)
    except Exception:  # noqa: BLE001  it wants other arguments, or answers in another form: then it is something else
        return False


def left_whole(model: Any) -> dict[str, int]:
    """Names and parameters of the matrices that were not quantized, though they are neither embeddings nor head."""
    left: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt, nn.Embedding)) or module is model.get_output_embeddings():
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1:
                label = path.rpartition(".")[2] if name == "weight" else name
                left[label] = left.get(label, 0) + weight.numel()
    return left
