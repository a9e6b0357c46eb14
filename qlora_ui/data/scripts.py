"""Which writing system a text is in: a cheap stand-in for its language. Knows nothing of rows."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

LOOKED_AT = 200
NONE = "none"

# How Unicode's character names begin, where that is not what a person calls the script.
_CALLED = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    first = unicodedata.name(character, "").split(" ")[0]
    return _CALLED.get(first, first.capitalize())


def of(text: str) -> str:
    """The script of most letters at the start of a text: `Latin`, `Cyrillic`, `Chinese`; `none` without letters."""
    beginning = text[:LOOKED_AT]
    if beginning.isascii():
        return "Latin" if any(map(str.isalpha, beginning)) else NONE
    counts = Counter(_script(character) for character in beginning if character.isalpha())
    # Japanese is written with Chinese characters too; its own are what tells it.
    if counts["Japanese"]:
        return "Japanese"
    return counts.most_common(1)[0][0] if counts else NONE
