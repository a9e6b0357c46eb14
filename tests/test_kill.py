"""Short form of `python -m tests.benchmarks kill`: killed at an exact moment, a run tells the truth, has all it reported, and goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.kill import Kill, Trainer, kill, trainer

KILLS = [
    Kill(executor="thread", phase="loading", delay_seconds=0.05),
    Kill(executor="thread", phase="checkpoint", count=9),
    Kill(executor="thread", phase="thinning", count=22),  # after the last step
    Kill(executor="thread", phase="event", count=30),
    Kill(executor="thread", phase="adapter", count=3),
    Kill(executor="process", phase="step", count=5, victim="all"),
]


@pytest.fixture(scope="module")
def opened() -> Iterator[Trainer]:
    with trainer() as made:
        yield made


@pytest.mark.parametrize("planned", KILLS, ids=lambda planned: f"{planned.executor} {planned.phase}")
def test_a_killed_run_tells_the_truth_has_what_it_reported_and_goes_on(opened: Trainer, planned: Kill) -> None:
    kill(opened, planned)
