"""Rows that are not trained on, in words: each reason with its rows. Knows nothing of where rows come from."""

from __future__ import annotations

from collections.abc import Iterable

from qlora_ui.data.checks import Dropped

SHOWN_STRETCHES = 20  # of rows with one reason; JSON and the download have them all


def in_words(dropped: Iterable[Dropped]) -> dict[str, str]:
    """The rows of each reason, as in `row 7` or `rows 2, 5-9`, in the order of the source."""
    rows: dict[str, list[int]] = {}
    for one in dropped:
        rows.setdefault(one.reason, []).append(one.row)
    return {reason: _listed(numbers) for reason, numbers in rows.items()}


def _listed(rows: list[int]) -> str:
    stretches: list[list[int]] = []
    for row in rows:
        if stretches and row == stretches[-1][-1] + 1:
            stretches[-1][1:] = [row]
        else:
            stretches.append([row])
    words = ", ".join("-".join(map(str, stretch)) for stretch in stretches[:SHOWN_STRETCHES])
    more = f", … ({len(rows):,} in all)" if len(stretches) > SHOWN_STRETCHES else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {words}{more}"
