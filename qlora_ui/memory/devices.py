"""Devices that memory can be planned for: cards by name, and what a device is. Knows nothing of disk, torch or Gradio."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qlora_ui.errors import UserError

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """What trains: its memory, and the dtype that `compute_dtype` auto means there. `title` has the size that the box says."""

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    compute_dtype: str = "bfloat16"
    title: str = ""


# GiB as torch counts a card's memory, which is less than the box says: the driver keeps some, and error correction takes a
# sixteenth of the older ones. From out-of-memory messages and nvidia-smi listings in public issue threads; where they differ
# by a tenth or so, the least. None was at hand to be measured.
CARDS = tuple(
    Device(name=name, title=title, kind="cuda", memory_bytes=int(gib * GIB), compute_dtype=dtype)
    for name, title, gib, dtype in (
        ("T4", "T4 · 16 GB", 14.6, "float16"),
        ("3090", "RTX 3090 · 24 GB", 23.6, "bfloat16"),
        ("4090", "RTX 4090 · 24 GB", 23.6, "bfloat16"),
        ("L4", "L4 · 24 GB", 22.0, "bfloat16"),
        ("A10G", "A10G · 24 GB", 22.0, "bfloat16"),
        ("A6000", "A6000 · 48 GB", 47.4, "bfloat16"),
        ("A40", "A40 · 48 GB", 44.4, "bfloat16"),
        ("A100-40", "A100 · 40 GB", 39.4, "bfloat16"),
        ("A100-80", "A100 · 80 GB", 79.1, "bfloat16"),
        ("H100", "H100 · 80 GB", 79.1, "bfloat16"),
    )
)


def find_device(wish: str) -> Device:
    """A card by its name, or one of so many GiB. Raises UserError."""
    for card in CARDS:
        if card.name.lower() == wish.strip().lower():
            return card
    try:
        gib = float(wish)
    except ValueError:
        gib = math.nan
    if not 0 < gib < math.inf:
        names = ", ".join(card.name for card in CARDS)
        raise UserError(f"--gpu {wish!r} is no card that is known here. Give its memory in GiB, as 24, or one of {names}.")
    return Device(name="a GPU", kind="cuda", memory_bytes=int(gib * GIB))
