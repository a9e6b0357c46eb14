"""What a person is told of dropped rows: each reason once, and every row in it as long as the list can be read."""

from __future__ import annotations

from qlora_ui.data.checks import Dropped
from qlora_ui.data.reasons import in_words


def test_each_reason_is_told_once_with_its_rows() -> None:
    dropped = [Dropped(row=row, reason="is empty" if row != 5 else "is a number") for row in (2, 4, 5, 6, 7, 8)]
    assert in_words(dropped) == {"is empty": "rows 2, 4, 6-8", "is a number": "row 5"}


def test_a_list_of_very_many_scattered_rows_ends_with_their_number() -> None:
    words = in_words(Dropped(row=row, reason="is empty") for row in range(1, 2001, 2))["is empty"]
    assert words.startswith("rows 1, 3, 5, ")
    assert words.endswith(", … (1,000 in all)")
    assert len(words) < 200
