"""The one error a person sees. Knows nothing of anything else in this project."""

from __future__ import annotations


class UserError(Exception):
    """Something the person did or can mend; its message is shown word for word, without a traceback.

    The message is one sentence or two: the thing, its value, the remedy. `field` names the setting it belongs to
    (a knob of `config.py`, or `data`, `model`), so that a screen can show it beside what caused it.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Busy(UserError):
    """What is wanted is somebody else's just now: the same may be granted later."""
