"""A small sweep: lists of values for a setting or two -> the trainings that try them all. Knows nothing of torch or Gradio."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qlora_ui.config import RunConfig, find_knob
from qlora_ui.errors import UserError
from qlora_ui.inspection import Inspector
from qlora_ui.progress import duration
from qlora_ui.queueing import Entry
from qlora_ui.time_plan import TimePlan, time_plan

MOST_SETTINGS = 2
MOST_NAME = 48
MOST_RUNS = 32  # what somebody still looks at; more is a search, for which there are other tools


def read_values(name: str, text: str) -> list[Any]:
    """A list with commas, or with semicolons where the values have commas themselves. Raises UserError for a value that is none."""
    knob = find_knob(name)
    values = [knob.parse(part.strip()) for part in text.split(";" if ";" in text else ",") if part.strip()]
    if not values:
        raise UserError(f"There is no value for {name}. Write some with commas between them.", field=name)
    for value in values:
        knob.check(value)
        if values.count(value) > 1:
            raise UserError(f"{name} has {shown(value)} twice. Each value is tried once.", field=name)
    return values


def combinations(config: RunConfig, over: Mapping[str, Sequence[Any]]) -> dict[str, RunConfig]:
    """A config for each combination, by a name that says what is its own. Raises UserError when one of them is no valid config."""
    if not 1 <= len(over) <= MOST_SETTINGS:
        raise UserError(f"A sweep is over one or two settings, these are {len(over)}. Choose some of them.")
    choices = list(itertools.product(*over.values()))
    if len(choices) > MOST_RUNS:
        raise UserError(f"These would be {len(choices)} runs, more than {MOST_RUNS}. Leave some values out.")
    made = {}
    for values in choices:
        chosen = dict(zip(over, values, strict=True))
        try:
            made[", ".join(f"{name} {shown(value)}" for name, value in chosen.items())] = config.with_values(chosen)
        except UserError as error:
            told = " and ".join(f"{name} {shown(value)}" for name, value in chosen.items())
            raise UserError(f"With {told}: {error}", field=error.field) from error
    return made


def entries(configs: Mapping[str, RunConfig], over: Mapping[str, Sequence[Any]], isolated: bool) -> list[Entry]:
    """They as they wait in the queue, all of one sweep, whose name says when it was made and over what."""
    sweep = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {' × '.join(over)}"
    return [Entry(config=config, name=slug(name, over), isolated=isolated, sweep=sweep) for name, config in configs.items()]


def slug(name: str, over: Iterable[str]) -> str:
    """What a run of that name is called on disk: `learning-rate-1e-4-lora-r-8`, with the settings' initials where that is too long."""
    if len(name) > MOST_NAME:
        for setting in over:
            name = name.replace(setting, "".join(word[0] for word in setting.split("_")))
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())[:MOST_NAME].strip("-.")


def shown(value: Any) -> str:
    """As a person writes it: 1e-4, not 0.0001 or 1e-04."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    text = re.sub(r"\.?0*e-0*", "e-", f"{value:e}") if 0 < abs(value) < 0.01 else f"{value:g}"
    return text if float(text) == value else repr(value)


def plans(configs: Sequence[RunConfig], inspector: Inspector, pace: Callable[[RunConfig], float | None]) -> list[TimePlan]:
    """What each will do with its rows. `pace` knows the seconds of a step. Raises UserError for rows that cannot be trained on."""
    made = []
    for config in configs:
        data, seen = inspector.read(config.data), inspector.known(config)
        made.append(time_plan(config, data, seen.preview if seen else None, pace(config)))
    return made


def plan_words(planned: Sequence[TimePlan]) -> str:
    """`4 runs, 180 steps in all. About 12 min, at the pace that was measured here.`"""
    steps = sum(plan.steps for plan in planned)
    seconds = [plan.steps * plan.seconds_a_step for plan in planned if plan.seconds_a_step is not None]
    if len(seconds) < len(planned):
        time = "How long they take is known once such a step was measured here."
    else:
        time = f"About {duration(sum(seconds))} of training, at the pace that was measured here."
    return f"{len(planned)} run{'' if len(planned) == 1 else 's'}, {steps:,} steps in all. {time}"
