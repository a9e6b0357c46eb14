"""Two rows that test what a format can hold, and how they come into a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = [{"prompt": "Grüße, 你好", "completion": 'a "quoted"\nline; and, more\t'}, {"prompt": "b", "completion": "c"}]


def put(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
