"""What a case of odd data is, and the ordinary row that it departs from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Case:
    """What lies in the workspace, and what must come of it: a refusal with this in it, or these rows kept and dropped."""

    what: str
    name: str
    content: str | bytes | Callable[[Path], object]
    refused: str = ""
    kept: int = 0
    dropped: dict[int, str] = field(default_factory=dict)


ROW = {"prompt": "Say yes.", "completion": "Yes."}
LINE = json.dumps(ROW) + "\n"
LONG = "x" * 20 * 2**20
HEADER = "prompt,completion\n"
