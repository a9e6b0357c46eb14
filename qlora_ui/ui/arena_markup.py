"""Votes as tables, in escaped HTML: how each contestant stands, and how any two did against each other. Knows nothing of disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from qlora_ui.evaluate import ratings
from qlora_ui.evaluate.ratings import Record, Standing
from qlora_ui.votes import Vote

NO_VOTES = '<p class="note">No vote yet. Ask a question and say which answer is better: ratings with their uncertainty stand here then.</p>'
HEAD = {
    "Contestant": "",
    "Bradley-Terry": "95 % interval",
    "": "",
    "Elo": "± of the mean",
    "Votes": "",
    "Won": "",
    "Lost": "",
    "Tie": "",
    "Both bad": "",
}


def announced(message: str) -> str:
    """A line that is read out when it comes."""
    return f'<p class="note" role="status">{escape(message)}</p>'


def tables(votes: Sequence[Vote]) -> str:
    """Ratings, then head to head, then how to read them."""
    if not votes:
        return NO_VOTES
    names = {side.speaker: side.name for vote in votes for side in (vote.pair.left, vote.pair.right)}  # the newest name of each
    games = [vote.game for vote in votes]
    standings = ratings.standings(games)
    many = f"{len(votes):,} votes" if len(votes) > 1 else "One vote"
    return (
        f'<p class="headline">{many}</p>{rated(standings, names)}{missing(standings, names)}'
        f"{against(ratings.records(games), [standing.name for standing in standings], names)}{legend(len(votes))}"
    )


def rated(standings: Sequence[Standing], names: Mapping[str, str]) -> str:
    bounds = [bound for standing in standings for bound in (standing.strength.low, standing.strength.high) if bound is not None]
    scale = (min(bounds), max(bounds)) if bounds else (0.0, 0.0)
    head = "".join(f'<th scope="col">{name}<small>{under}</small></th>' for name, under in HEAD.items())
    rows = "".join(row(standing, names[standing.name], scale) for standing in standings)
    return scrolled("Ratings", f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def row(standing: Standing, name: str, scale: tuple[float, float]) -> str:
    counts = (standing.games, standing.wins, standing.losses, standing.ties, standing.both_bad)
    figures = "".join(f"<td>{count:,}</td>" for count in counts)
    elo = f"{standing.elo:,.0f} <small>± {standing.elo_half_width:.1f}</small>"
    return (
        f'<tr><th scope="row">{escape(name)}</th><td>{strength(standing)}</td><td class="interval">{interval(standing, scale)}</td>'
        f"<td>{elo}</td>{figures}</tr>"
    )


def strength(standing: Standing) -> str:
    rating = standing.strength
    if rating.rating is None:
        return "–"
    if math.isinf(rating.rating):
        return "∞" if rating.rating > 0 else "−∞"
    return f"{rating.rating:,.0f} <small>{rating.low:,.0f} to {rating.high:,.0f}</small>"


def interval(standing: Standing, scale: tuple[float, float]) -> str:
    """The rating as a point on its interval, beside those of the others."""
    (low, high), at = scale, standing.strength
    if at.rating is None or at.low is None or at.high is None:
        return ""
    left, point, right = ((value - low) / (high - low) * 100 for value in (at.low, at.rating, at.high))
    return f'<span><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i><b style="left:{point:.1f}%"></b></span>'


def missing(standings: Sequence[Standing], names: Mapping[str, str]) -> str:
    """Why somebody has no Bradley-Terry number."""
    whys = [f"{names[standing.name]} {standing.strength.why}." for standing in standings if standing.strength.why]
    return "".join(f'<p class="note">{escape(why)}</p>' for why in whys)


def against(records: Sequence[Record], order: Sequence[str], names: Mapping[str, str]) -> str:
    """What share each row won of its votes against each column."""
    shares = {(record.one, record.other): (record.win_share, record.games) for record in records}
    shares |= {(other, one): (1 - share, games) for (one, other), (share, games) in shares.items()}

    def cell(one: str, other: str) -> str:
        share, games = shares.get((one, other), (0.0, 0))
        return f"<td>{share:.0%} <small>of {games:,}</small></td>" if games else "<td>–</td>"

    head = "".join(f'<th scope="col">{escape(names[other])}</th>' for other in order)
    rows = "".join(f'<tr><th scope="row">{escape(names[one])}</th>{"".join(cell(one, other) for other in order)}</tr>' for one in order)
    body = f"<table><thead><tr><td>Won against</td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<details><summary>Head to head</summary>{scrolled('Head to head', body)}</details>"


def legend(votes: int) -> str:
    return (
        '<details><summary>How to read this</summary><p class="note">Both ratings: 400 points more are odds of 10 to 1. Tie and both bad '
        "count half a win for each. Bradley-Terry is the most likely strength given all votes at once, 1000 being the mean of those that "
        "have a number; the interval says how sure that is, and where intervals overlap much, the votes do not tell yet who is better. "
        "Elo is computed as in the QLoRA paper: everybody begins at 1000, K is 32, mean over "
        f"{ratings.orders(votes):,} random orders of the votes; its ± is only what the number of orders leaves open.</p></details>"
    )


def scrolled(label: str, table: str) -> str:
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">{table}</div>'
