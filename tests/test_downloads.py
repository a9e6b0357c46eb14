"""Files that a page hands out do not pile up."""

from __future__ import annotations

import os

from qlora_ui.ui import downloads


def test_what_was_handed_out_is_removed_once_it_is_fetched() -> None:
    old, new = (downloads.fresh("chat.json") for _ in range(2))
    for path in (old, new):
        path.write_text(path.parent.name)
    long_ago = old.parent.stat().st_mtime - 2 * downloads.COPIED_SECONDS
    os.utime(old.parent, (long_ago, long_ago))
    newest = downloads.fresh("chat.json")
    assert not old.parent.exists()
    assert new.read_text() == new.parent.name
    assert newest.parent not in (old.parent, new.parent)
