"""How a hyperparameter is declared, read from text and checked. Knows none of them, and nothing of disk, torch or Gradio."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, get_type_hints

from qlora_ui.errors import UserError

SWITCH = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def knob(
    default: Any,
    label: str,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    main: bool = False,
) -> Any:
    """Declare a hyperparameter: a dataclass field that carries its bounds (inclusive), unit, label and help."""
    return field(
        default=default, metadata={"label": label, "help": help, "unit": unit, "low": low, "high": high, "choices": choices, "main": main}
    )


@dataclass(frozen=True, kw_only=True)
class Knob:
    """The declaration of one hyperparameter, read back from the part that it is a field of."""

    name: str
    section: str
    kind: type
    default: Any
    label: str
    help: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    main: bool

    @property
    def title(self) -> str:
        """The label, with the unit where the label does not say it."""
        return f"{self.label} ({self.unit})" if self.unit and self.unit not in self.label.lower() else self.label

    def parse(self, value: Any) -> Any:
        """The value in the knob's type, from text, a form or YAML. Raises UserError when it has no such reading."""
        if isinstance(value, Mapping | Set | Sequence) and not isinstance(value, str):
            wanted = "one" if self.kind in (str, bool) else self.requirement()
            raise UserError(f"{self.name} is several values: it must be {wanted}.", field=self.name)
        word = "" if value is None else str(value).strip()
        if self.kind is str:
            # YAML reads a bare `on` as true; and what is a choice today may have been yes or no in an older config.
            return ("on" if SWITCH[word.lower()] else "off") if "on" in self.choices and word.lower() in SWITCH else word
        if self.kind is bool:
            if word.lower() in SWITCH:
                return SWITCH[word.lower()]
            raise UserError(f"{self.name} is {value!r}: use true or false.", field=self.name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or (self.kind is int and number != int(number)):
            shown = "empty" if value in (None, "") else word.lower() if isinstance(value, bool) else repr(value)
            raise UserError(f"{self.name} is {shown}: it must be {self.requirement()}.", field=self.name)
        return int(number) if self.kind is int else number

    def check(self, value: Any) -> None:
        """Raise UserError when the value is outside the bounds or not one of the choices."""
        if self.choices and value not in self.choices:
            raise UserError(f"{self.name} is {value!r}: use one of {', '.join(self.choices)}.", field=self.name)
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            raise UserError(f"{self.name} is {value}: it must be {self.requirement()}.", field=self.name)

    def requirement(self) -> str:
        """In words: what a number must be."""
        noun = "a whole number" if self.kind is int else "a number"
        shown = "{:,.0f}" if self.kind is int else "{:g}"
        bounds = f" from {shown.format(self.low)} to {shown.format(self.high)}" if self.low is not None and self.high is not None else ""
        return noun + bounds + (f" ({self.unit})" if self.unit else "")


class Part:
    """A dataclass of knobs, under the name of its section. It checks its own values when made: an invalid one cannot exist."""

    section: ClassVar[str]

    def __init_subclass__(cls, *, section: str) -> None:
        cls.section = section

    def __post_init__(self) -> None:
        for k in self.knobs():
            k.check(getattr(self, k.name))

    @classmethod
    @cache
    def knobs(cls) -> tuple[Knob, ...]:
        """The declarations of its fields, in their order."""
        kinds = get_type_hints(cls)
        return tuple(
            Knob(name=f.name, section=cls.section, kind=kinds[f.name], default=f.default, **f.metadata)
            for f in dataclasses.fields(cls)  # type: ignore[arg-type]
        )
