"""From votes between two to a rating of each: Elo as in the QLoRA paper, and Bradley-Terry. Pure: knows nothing of disk or models.

Elo (arXiv 2305.14314, section 5.3): everybody begins at 1000, K is 32, and because the outcome depends on the order of the games,
it is the mean over many random orders. Bradley-Terry: the strengths under which the votes are most likely, on the same scale.

A tie is half a win for each. "Both bad" says of the two just what a tie says, that neither is better, and is rated as one; it is
counted by itself, because a contestant that is only ever less bad is not good.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Outcome = Literal["left", "right", "tie", "both bad"]
SCORES: dict[Outcome, float] = {"left": 1.0, "right": 0.0, "tie": 0.5, "both bad": 0.5}
"""Of the left contestant; the right one has what is missing to 1."""

START = 1000.0
K = 32.0
POINTS = 400 / math.log(10)  # of a rating, in one unit of the logarithm of the odds
MOST_ORDERS = 10_000  # as many as the paper's
MOST_UPDATES = 4_000_000  # of ratings, so that ten thousand votes take well under a second
SEED = 0
IN_95_PERCENT = 1.959964  # standard deviations to either side
MOST_NEWTON_STEPS = 100
NEWTON_TOLERANCE = 1e-6  # less than a thousandth of a point

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Game:
    """Two contestants, and which of them a person found better."""

    left: str
    right: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class Record:
    """All games between two. `ties` are without those of which both were bad."""

    one: str
    other: str
    wins: int = 0
    losses: int = 0
    ties: int = 0
    both_bad: int = 0

    @property
    def games(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad

    @property
    def win_share(self) -> float:
        """Of `one`, a tie of either kind being half a win."""
        return (self.wins + (self.ties + self.both_bad) / 2) / self.games


@dataclass(frozen=True, kw_only=True)
class Strength:
    """A Bradley-Terry rating with its 95 % interval, the mean of those that can be compared being 1000.

    Infinite, or None, where the votes give no number: then there is no interval, and `why` goes on from the contestant's name.
    """

    rating: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a contestant stands. `elo_half_width` is what the number of random orders leaves open, at 95 %: as in the paper's table
    it says nothing of how few the votes are. The interval of `strength` does."""

    name: str
    games: int
    wins: int
    losses: int
    ties: int
    both_bad: int
    elo: float
    elo_half_width: float
    strength: Strength


def standings(games: Sequence[Game]) -> list[Standing]:
    """Everybody who took part, the strongest first."""
    names = sorted({name for game in games for name in (game.left, game.right)})
    strengths, (elos, half_widths) = bradley_terry(names, games), elo(names, games)
    counts = {name: Counter[str]() for name in names}
    for record in records(games):
        counts[record.one].update(wins=record.wins, losses=record.losses, ties=record.ties, both_bad=record.both_bad)
        counts[record.other].update(wins=record.losses, losses=record.wins, ties=record.ties, both_bad=record.both_bad)
    rated = [
        Standing(
            name=name,
            games=counts[name].total(),
            **{kind: counts[name][kind] for kind in ("wins", "losses", "ties", "both_bad")},
            elo=float(elos[at]),
            elo_half_width=float(half_widths[at]),
            strength=strengths[at],
        )
        for at, name in enumerate(names)
    ]
    return sorted(rated, key=lambda one: (one.elo if one.strength.rating is None else one.strength.rating, one.elo), reverse=True)


def records(games: Sequence[Game]) -> list[Record]:
    """Each two that met, by name, and how it went."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for game in games:
        one, other = sorted((game.left, game.right))
        kind = {"tie": "ties", "both bad": "both_bad"}.get(game.outcome) or (
            "wins" if (game.outcome == "left") == (game.left == one) else "losses"
        )
        counts.setdefault((one, other), Counter())[kind] += 1
    return [Record(one=one, other=other, **counts[one, other]) for one, other in sorted(counts)]


# Elo ----------------------------------------------------------------------------------------------------------------------


def elo(names: Sequence[str], games: Sequence[Game]) -> tuple[Array, Array]:
    """The mean rating of each over random orders of the games, and the half-width of the 95 % interval of that mean.

    All orders are played at once, one game of each at a time.
    """
    if not games:
        return np.full(len(names), START), np.zeros(len(names))
    number = {name: at for at, name in enumerate(names)}
    lefts, rights = (np.array([number[getattr(game, side)] for game in games]) for side in ("left", "right"))
    scores = np.array([SCORES[game.outcome] for game in games])
    count = orders(len(games))
    drawn = np.random.default_rng(SEED).permuted(np.tile(np.arange(len(games), dtype=np.int32), (count, 1)), axis=1)
    ratings = np.full((count, len(names)), START)
    every = np.arange(count)
    for played in drawn.T:
        left, right = (every, lefts[played]), (every, rights[played])
        expected = 1 / (1 + 10 ** ((ratings[right] - ratings[left]) / 400))
        gain = K * (scores[played] - expected)
        ratings[left] += gain
        ratings[right] -= gain
    return ratings.mean(0), IN_95_PERCENT * ratings.std(0, ddof=1) / math.sqrt(count)


def orders(games: int) -> int:
    """In how many random orders so many games are played: the paper's 10,000, or as many as there is time for."""
    return max(2, min(MOST_ORDERS, MOST_UPDATES // max(1, games)))


# Bradley-Terry ------------------------------------------------------------------------------------------------------------


def bradley_terry(names: Sequence[str], games: Sequence[Game]) -> list[Strength]:
    """The most likely strength of each, in the order of the names, with the interval that the Fisher information gives.

    A tie tells more than the half win and half loss as which it is counted: with ties the intervals are rather too wide, never
    too narrow. Strengths exist only among those who have all won against each other, if through others (Ford 1957): for the
    largest such group they are computed, and of everybody else it is said on which side of it they are.
    """
    won = np.zeros((len(names), len(names)))
    number = {name: at for at, name in enumerate(names)}
    for record in records(games):
        one, other = number[record.one], number[record.other]
        won[one, other], won[other, one] = record.games * record.win_share, record.games * (1 - record.win_share)
    reaches = _reach(won > 0)
    group = _comparable(reaches, won)
    if len(group) < 2:
        return [_alone(bool(won[at].any()), bool(won[:, at].any())) for at in range(len(names))]
    rating, half_width = _fitted(won[np.ix_(group, group)])
    rated = {
        at: Strength(rating=float(value), low=float(value - half), high=float(value + half))
        for at, value, half in zip(group, rating, half_width, strict=True)
    }
    anybody = group[0]
    return [rated.get(at) or _beside(bool(reaches[at, anybody]), bool(reaches[anybody, at])) for at in range(len(names))]


def _reach(beat: Array) -> Array:
    """Who won against whom, also through others: `beat` followed as often as there are contestants."""
    reaches = beat | np.eye(len(beat), dtype=bool)
    for _ in range(len(beat).bit_length()):
        reaches = reaches @ reaches
    return reaches


def _comparable(reaches: Array, won: Array) -> list[int]:
    """The largest group in which each reaches each; of several, that with the most games."""
    groups = sorted({tuple(np.flatnonzero(mutual).tolist()) for mutual in reaches & reaches.T})
    return max(map(list, groups), key=lambda group: (len(group), won[np.ix_(group, group)].sum()), default=[])


def _fitted(won: Array) -> tuple[Array, Array]:
    """Ratings around 1000 and the half-widths of their intervals, by Newton's method on the likelihood, which is concave."""
    played = won + won.T
    strength = np.zeros(len(won))
    mean = np.full_like(won, 1 / len(won))  # votes tell differences only: without it there would be no inverse

    def likelihood(at: Array) -> float:
        return -float((won * np.logaddexp(0, at - at[:, None])).sum())

    for _ in range(MOST_NEWTON_STEPS):
        chance = 1 / (1 + np.exp(strength - strength[:, None]))  # of the row's against the column's
        weight = played * chance * (1 - chance)
        covariance = np.linalg.inv(np.diag(weight.sum(1)) - weight + mean) - mean
        step = covariance @ (won - played * chance).sum(1)
        while likelihood(strength + step) < likelihood(strength):
            step /= 2
        strength = strength + step
        if np.abs(step).max() < NEWTON_TOLERANCE:
            return START + POINTS * strength, POINTS * IN_95_PERCENT * np.sqrt(np.diag(covariance))
    raise ArithmeticError(f"Bradley-Terry did not converge on {played.sum() / 2:g} votes between {len(won)}.")


def _alone(has_won: bool, has_lost: bool) -> Strength:
    """Where no two have both won against each other."""
    if has_won and not has_lost:
        return Strength(rating=math.inf, why="has not lost yet, so that the votes set no upper bound")
    if has_lost and not has_won:
        return Strength(rating=-math.inf, why="has not won yet, so that the votes set no lower bound")
    return Strength(rating=None, why="has won and lost, but against no one both ways: more votes are needed")


def _beside(above: bool, below: bool) -> Strength:
    """One who is not in the group of those that can be compared. `above`: has won against one of them, if through others."""
    if above:
        return Strength(rating=math.inf, why="has not lost to any that has a number, so that the votes set no upper bound")
    if below:
        return Strength(rating=-math.inf, why="has not won against any that has a number, so that the votes set no lower bound")
    return Strength(rating=None, why="has not met any that has a number, not even through others: votes between them are needed")
