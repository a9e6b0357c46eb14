"""Ratings against what is computed by hand, against truths that votes were drawn from, and where votes give no number."""

from __future__ import annotations

import math
import time
from itertools import permutations

import numpy as np
import pytest

from qlora_ui.evaluate.ratings import Game, Outcome, Record, Standing, bradley_terry, elo, records, standings


def games(*told: str) -> list[Game]:
    """'a>b' is a win of a on the left, 'a<b' of b on the right, 'a=b' a tie, 'a!b' both bad; 'a>b*3' three of them."""
    outcomes: dict[str, Outcome] = {">": "left", "<": "right", "=": "tie", "!": "both bad"}
    return [
        Game(left=one[0], right=one[2], outcome=outcomes[one[1]]) for one in told for _ in range(int(one[4:] or 1) if len(one) > 3 else 1)
    ]


def by_name(played: list[Game]) -> dict[str, Standing]:
    return {standing.name: standing for standing in standings(played)}


def in_order(played: tuple[Game, ...]) -> float:
    """What a has after these games in this order: Elo word for word."""
    rating = {"a": 1000.0, "b": 1000.0, "c": 1000.0}
    for game in played:
        score = {"left": 1.0, "right": 0.0, "tie": 0.5, "both bad": 0.5}[game.outcome]
        expected = 1 / (1 + 10 ** ((rating[game.right] - rating[game.left]) / 400))
        rating[game.left] += 32 * (score - expected)
        rating[game.right] -= 32 * (score - expected)
    return rating["a"]


def test_a_first_win_moves_each_by_half_of_k_and_a_second_by_less() -> None:
    assert elo(["a", "b"], games("a>b"))[0].tolist() == [1016, 984]
    assert elo(["a", "b"], games("b<a", "a>b"))[0] == pytest.approx([1030.53, 969.47], abs=0.005)
    assert elo(["a", "b"], games("a=b", "a!b"))[0].tolist() == [1000, 1000]
    assert elo(["a"], [])[0].tolist() == [1000]


def test_elo_is_the_mean_over_the_orders_in_which_the_games_may_come_and_the_same_each_time() -> None:
    played = games("a>b*2", "b>c", "a<c", "c=a")
    ratings, half_widths = elo(["a", "b", "c"], played)
    expected = np.mean([in_order(order) for order in permutations(played)])
    assert 0 < half_widths[0] < 1
    assert ratings[0] == pytest.approx(expected, abs=2 * half_widths[0])
    assert ratings.sum() == pytest.approx(3000)
    assert elo(["a", "b", "c"], played)[0].tolist() == ratings.tolist()


def test_bradley_terry_of_two_is_the_logarithm_of_their_odds_with_its_textbook_interval() -> None:
    a, b = bradley_terry(["a", "b"], games("a>b*2", "b<a", "a<b"))
    assert (a.rating, b.rating) == pytest.approx((1000 + 200 * math.log10(3), 1000 - 200 * math.log10(3)))
    deviation = math.sqrt(1 / (4 * 0.75 * 0.25)) / 2  # of one of the two, whose mean is fixed
    assert (a.low, a.high) == pytest.approx([a.rating + sign * 1.96 * deviation * 400 / math.log(10) for sign in (-1, 1)], abs=0.01)


def test_bradley_terry_finds_the_strengths_that_explain_all_votes_at_once() -> None:
    a, b, c = bradley_terry(["a", "b", "c"], games("a>b*20", "b>a*10", "b>c*20", "c>b*10", "a>c*40", "c>a*10"))
    assert a.rating - b.rating == pytest.approx(400 * math.log10(2))  # type: ignore[operator]
    assert b.rating - c.rating == pytest.approx(400 * math.log10(2))  # type: ignore[operator]


def test_a_tie_of_either_kind_is_half_a_win_for_each_and_both_bad_is_counted_by_itself() -> None:
    tied, halved = by_name(games("a>b*2", "a=b", "b!a")), by_name(games("a>b*3", "b>a"))
    assert tied["a"].strength == halved["a"].strength
    assert (tied["b"].wins, tied["b"].losses, tied["b"].ties, tied["b"].both_bad, tied["b"].games) == (0, 2, 1, 1, 4)
    assert records(games("b<a*2", "a=b", "b!a", "c>a")) == [
        Record(one="a", other="b", wins=2, ties=1, both_bad=1),
        Record(one="a", other="c", losses=1),
    ]
    assert records(games("b<a*2", "a=b", "b!a"))[0].win_share == 0.75


def test_who_never_lost_is_infinite_with_the_reason_and_the_others_are_rated_without() -> None:
    ratings = by_name(games("a>b*3", "b>c", "c>b", "c>d", "e>f", "f>e"))
    assert [ratings[name].strength.rating for name in "ad"] == [math.inf, -math.inf]
    assert [ratings[name].strength.why.split(",")[0] for name in "ade"] == [
        "has not lost to any that has a number",
        "has not won against any that has a number",
        "has not met any that has a number",
    ]
    assert ratings["b"].strength.rating == pytest.approx(1000)
    assert ratings["e"].strength.rating is None
    assert all(900 < standing.elo < 1100 for standing in ratings.values())
    assert [standing.name for standing in standings(games("a>b*3", "b>c*2", "c>b", "c>d"))] == ["a", "b", "c", "d"]


def test_where_no_two_have_won_both_ways_nobody_has_a_number_and_each_is_told_why() -> None:
    ratings = by_name(games("a>b", "b>c"))
    assert [ratings[name].strength.rating for name in "abc"] == [math.inf, None, -math.inf]
    assert "more votes are needed" in ratings["b"].strength.why
    assert standings([]) == []


def test_one_loss_in_a_hundred_thousand_is_not_too_few() -> None:
    a, b = bradley_terry(["a", "b"], games("a>b*99999", "b>a"))
    assert a.rating - b.rating == pytest.approx(400 * math.log10(99999))  # type: ignore[operator]


@pytest.mark.parametrize(("tied", "low", "high"), [(0.0, 0.93, 0.975), (0.4, 0.95, 1.0)])
def test_of_95_percent_intervals_95_percent_hold_the_truth_and_more_where_there_are_ties(tied: float, low: float, high: float) -> None:
    random = np.random.default_rng(7)
    names, truth = ["a", "b", "c", "d"], np.array([150.0, 50.0, -50.0, -150.0]) + 1000
    held = 0
    for _ in range(300):
        played = []
        for left, right in (random.choice(4, 2, replace=False) for _ in range(160)):
            chance = 1 / (1 + 10 ** ((truth[right] - truth[left]) / 400))
            both = tied * 2 * min(chance, 1 - chance)  # of a tie, so that half wins for half losses leave the chance as it is
            drawn = random.random()
            outcome: Outcome = "left" if drawn < chance - both / 2 else "tie" if drawn < chance + both / 2 else "right"
            played.append(Game(left=names[left], right=names[right], outcome=outcome))
        held += sum(s.low <= true <= s.high for s, true in zip(bradley_terry(names, played), truth, strict=True))  # type: ignore[operator]
    assert low <= held / 1200 <= high


def test_both_ratings_find_the_order_that_ten_thousand_votes_were_drawn_from_in_less_than_a_second() -> None:
    random = np.random.default_rng(1)
    truth = dict(zip("fbdace", range(0, 600, 100), strict=True))
    played = []
    for _ in range(10_000):
        left, right = random.choice(list(truth), 2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[right] - truth[left]) / 400))
        played.append(Game(left=left, right=right, outcome="left" if random.random() < chance else "right"))
    before = time.process_time()
    found = standings(played)
    assert time.process_time() - before < 1
    assert [standing.name for standing in found] == list("ecadbf")
    assert sorted(found, key=lambda standing: -standing.elo) == found
    for standing in found:
        assert standing.strength.rating == pytest.approx(truth[standing.name] + 750, abs=25)
