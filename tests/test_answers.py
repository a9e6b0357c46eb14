"""Sample answers by step: thinned, rewound, kept in a snapshot, and sent to a page once."""

from __future__ import annotations

import json

from qlora_ui.answers import MOST_ROUNDS, Answers
from qlora_ui.events import Resumed, Sample
from qlora_ui.progress import Progress


def sample(step: int, prompt: str = "a", adapter: str = "") -> Sample:
    return Sample(step=step, prompt=prompt, base="b", adapter=adapter or f"{step}")


def steps(answers: Answers) -> list[int]:
    return [seen["step"] for seen in answers.rounds]


def test_prompts_of_a_step_are_a_round_also_when_two_are_alike() -> None:
    answers = Answers()
    for prompt in ("a", "b", "b"):
        answers.add(sample(0, prompt))
    answers.add(sample(5))
    assert steps(answers) == [0, 5]
    assert [said["prompt"] for said in answers.rounds[0]["said"]] == ["a", "b", "b"]


def test_the_first_and_the_newest_round_stay_however_many_there_are() -> None:
    answers = Answers()
    for step in range(0, 100_000, 100):
        answers.add(sample(step))
        assert len(answers.rounds) <= MOST_ROUNDS + 1
        assert (steps(answers)[0], steps(answers)[-1]) == (0, step)
    assert steps(answers) == sorted(set(steps(answers)))


def test_a_run_that_goes_on_asks_again_in_place_of_what_is_void() -> None:
    progress = Progress("run")
    for event in (sample(0), sample(2), sample(4), Resumed(step=2), sample(2, adapter="again"), sample(3)):
        progress.add(event)
    assert steps(progress.answers) == [0, 2, 3]
    assert [said["adapter"] for said in progress.answers.rounds[1]["said"]] == ["again"]


def test_a_page_is_sent_what_it_lacks_and_a_round_that_grew_again() -> None:
    answers = Answers()
    answers.add(sample(0))
    answers.add(sample(2))
    first = answers.since([])
    assert [seen["step"] for seen in first["news"]] == [0, 2]
    known = first["rounds"]
    assert answers.since(known)["news"] == []
    answers.add(sample(2, "b"))
    (grown,) = answers.since(known)["news"]
    assert [said["prompt"] for said in grown["said"]] == ["a", "b"]
    assert len(answers.since(known)["rounds"]) == 2


def test_a_snapshot_goes_on_as_the_fold_would() -> None:
    progress = Progress("run")
    progress.add(sample(0))
    again = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    for one in (progress, again):
        one.add(sample(0, "b"))
    assert again.answers.to_dict() == progress.answers.to_dict()
