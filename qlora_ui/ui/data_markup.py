"""What the Data tab shows, as HTML: report, lengths, rows, tokens. Every value is escaped: it is text, never markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

from qlora_ui.data import reasons, sources
from qlora_ui.data.catalog import PaperSet
from qlora_ui.data.checks import Conversation, Dropped, Report
from qlora_ui.data.formats import FORMATS
from qlora_ui.data.lengths import LengthReport

if TYPE_CHECKING:
    from qlora_ui.engine.preview import Piece, RowView
    from qlora_ui.inspection import Look

ROLE_WORDS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool", "text": "Raw text"}
SHOWN_CHARACTERS = 2000  # of a turn or a piece
SHOWN_TURNS, SHOWN_PIECES = 100, 400  # of a row: some hold a hundred thousand, which no browser bears
SHOWN_REASONS = 200


def bundled_cards() -> str:
    """The bundled sets, each with rows, licence and use."""
    cards = (
        f'<article class="set-card"><h4>{escape(b.title)}</h4><p>{escape(b.about)}</p>'
        f'<p class="note">{b.rows} rows · {escape(b.licence)}</p></article>'
        for b in sources.BUNDLED.values()
    )
    return "".join(cards)


def catalog_card(entry: PaperSet) -> str:
    """One of the paper's sets: rows, licence, how its rows are written, what it was used for."""
    facts = " · ".join(filter(None, [f"{entry.rows} rows" if entry.rows else "", entry.licence, title(entry.format)]))
    note = f'<p class="note">{escape(entry.note)}</p>' if entry.note else ""
    said = f'<p>{escape(entry.used_for)}</p><p class="note">{escape(facts)}</p>{note}'
    return f'<div class="set-facts"><h4>{escape(entry.title)}</h4>{said}</div>'


# The report ----------------------------------------------------------------------------------------------------------


def summary(look: Look) -> str:
    """The report in one line, each part opening below it; nothing of what is not read yet."""
    if look.data is None:
        return ""
    report, lengths, doing = look.data.report, look.lengths, look.doing
    parts = [f"{report.read:,} {plural(report.read)}: {report.kept:,} kept, {len(report.dropped):,} dropped"]
    if lengths and not doing:  # else they are those of a sample
        if lengths.left_out:
            parts.append(f"{lengths.left_out:,} left out")
        parts += [
            f"{short(lengths.tokens_total)} tokens, {lengths.trained_share:.0%} trained",
            f"longest {lengths.longest:,}",
        ]
    line = f'<p class="headline">{escape(" · ".join(parts))}</p>'
    return (
        line
        + (progress(look) if doing else f'<p class="note" aria-live="polite">{formats(report)}</p>')
        + details(report, () if doing else look.left_out)
    )


def progress(look: Look) -> str:
    """What is still going on, and how far it is; a bar without an end where that is not known."""
    value = "" if look.share_done is None else f' value="{look.share_done:.3f}"'
    return f'<p class="note" aria-live="polite">{escape(look.doing)}</p><progress aria-label="{escape(look.doing)}"{value}></progress>'


def details(report: Report, left_out: Sequence[Dropped] = ()) -> str:
    """What opens below the line: the rows that were dropped or left out, and what there was besides."""
    parts = [
        dropped("dropped", report.dropped),
        dropped("kept but left out", left_out),
        dropped(f"dropped from the split {report.held_out_split}", report.held_out_dropped),
        counted("Formats", {title(name): rows for name, rows in report.formats.items()}) if len(report.formats) > 1 else "",
        counted("Scripts", report.scripts) if len(report.scripts) > 1 else "",
        listed("Columns that are not read", report.unused_columns),
    ]
    return f'<div class="parts">{"".join(parts)}</div>'


def formats(report: Report) -> str:
    """What the rows were taken for, in a sentence."""
    mixed = f" and {len(report.formats) - 1} more" if len(report.formats) > 1 else ""
    said = f"Format: {title(report.format)}{mixed}"
    if report.duplicates:
        said += f" · {report.duplicates:,} {'duplicate' if report.duplicates == 1 else 'duplicates'}"
    if report.conversations != report.kept:
        said += f" · {report.conversations:,} conversations"
    if report.empty_answers:
        said += f" · {report.empty_answers:,} without an answer"
    if report.held_out_split:
        said += f" · {report.held_out_rows:,} rows of {report.held_out_split} held out"
    return escape(said)


def title(format: str) -> str:
    """A format's name without what explains it."""
    return FORMATS[format].partition(":")[0]


def plural(rows: int) -> str:
    return "row" if rows == 1 else "rows"


def short(number: int) -> str:
    """`412k`, `5.3M`: how many, at a glance."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}" if number < 100 * size else f"{number // size:,}{unit}"
    return str(number)


def dropped(what: str, rows: Sequence[Dropped]) -> str:
    if not rows:
        return ""
    said = reasons.in_words(rows)
    cells = "".join(f"<tr><td>{where}</td><td>{escape(why)}</td></tr>" for why, where in islice(said.items(), SHOWN_REASONS))
    more = f"<p>{len(said) - SHOWN_REASONS:,} more reasons are in the download.</p>" if len(said) > SHOWN_REASONS else ""
    return (
        f"<details><summary>{len(rows):,} {plural(len(rows))} {escape(what)}, with reasons</summary>"
        f"<table><thead><tr><th>Which</th><th>Why</th></tr></thead><tbody>{cells}</tbody></table>{more}</details>"
    )


def counted(title: str, counts: Mapping[str, int]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{rows:,}</td></tr>" for name, rows in counts.items())
    return f"<details><summary>{len(counts)} {escape(title.lower())}</summary><table><tbody>{cells}</tbody></table></details>"


def listed(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    items = "".join(f"<li>{escape(name[:100])}</li>" for name in names)
    return f"<details><summary>{escape(title)}: {len(names)}</summary><ul>{items}</ul></details>"


# Lengths -------------------------------------------------------------------------------------------------------------


def lengths(report: LengthReport) -> str:
    """The histogram of tokens a row with the max-length line in it, what is lost there, and how much would be padding."""
    most = max((bin.rows for bin in report.histogram), default=1) or 1
    bars = "".join(
        f'<i class="{"cut" if bin.low > report.max_seq_len else "read"}" style="height:{100 * bin.rows / most:.1f}%" '
        f'title="{bin.low:,} to {bin.high:,} tokens: {bin.rows:,} rows"></i>'
        for bin in report.histogram
    )
    place = line_place(report)
    side = "left" if place > 60 else "right"
    beyond = " beyond" if report.histogram and report.max_seq_len > report.histogram[-1].high else ""
    words = f"max length {report.max_seq_len:,}" + (", beyond all rows" if beyond else "")
    line = f'<b class="line {side}{beyond}" style="left:{place:.2f}%"><span>{words}</span></b>'
    said = f"Tokens a row: the longest has {report.longest:,}; {report.over:,} are longer than the max length {report.max_seq_len:,}."
    middle = report.histogram[len(report.histogram) // 2].low if report.histogram else 0
    last = report.histogram[-1].high if report.histogram else 0
    cells = "".join(f"<tr><td>{bin.low:,} to {bin.high:,}</td><td>{bin.rows:,}</td></tr>" for bin in report.histogram if bin.rows)
    return (
        f'<figure class="lengths"><div class="bars" role="img" aria-label="{escape(said)}">{bars}{line}</div>'
        f'<div class="axis" aria-hidden="true"><span>1</span><span>{middle:,}</span><span>{last:,} tokens</span></div>'
        f"<figcaption>{escape(lost(report))} Padding: {report.padding_share:.0%} of a batch, {report.padding_share_packed:.0%} if packed."
        f"</figcaption><details><summary>Lengths as a table</summary><table><thead><tr><th>Tokens</th><th>Rows</th></tr></thead>"
        f"<tbody>{cells}</tbody></table></details></figure>"
    )


def line_place(report: LengthReport) -> float:
    """Where the max length stands on the axis, in percent; at the right end when it is beyond the last bar."""
    bins = report.histogram
    for index, bin in enumerate(bins):
        if report.max_seq_len <= bin.high:
            within = max(0.0, report.max_seq_len - bin.low + 1) / (bin.high - bin.low + 1)
            return 100 * (index + within) / len(bins)
    return 100.0


def lost(report: LengthReport) -> str:
    """What the max length costs, in a sentence."""
    count = len(report.untrainable)
    if not report.over:
        left_out = f"; {count:,} {plural(count)} with nothing to train on {'is' if count == 1 else 'are'} left out" if count else ""
        return f"No row is longer than {report.max_seq_len:,} tokens, nothing is lost{left_out}."
    rows, their = ("1 row is", "its") if report.over == 1 else (f"{report.over:,} rows are", "their")
    ends = {"truncate": f"cut at {their} end", "drop": "left out", "split": "split"}[report.long_rows]
    left_out = f", and {count:,} {plural(count)} {'has' if count == 1 else 'have'} nothing left to train on" if count else ""
    # Of a split row every later piece trains one token less: its first has nothing before it to be predicted from.
    return f"{rows} longer and {ends}: {report.tokens_lost:,} tokens are not read, {report.trained_lost:,} fewer are trained{left_out}."


# Rows ----------------------------------------------------------------------------------------------------------------


def pager(first: int, shown: int, found: int, total: int) -> str:
    """Which rows are shown."""
    if not found:
        return '<p class="note single-page">No row is like that: change the search or the order.</p>'
    of = f"{found:,} found of {total:,}" if found != total else f"{total:,}"
    pages = "note single-page" if shown == found else "note"
    return f'<p class="{pages}">{first + 1:,} to {first + shown:,} of {of}</p>'


def bubbles(rows: Sequence[Conversation]) -> str:
    """Conversations as chat bubbles."""
    cards = []
    for row in rows:
        turns = "".join(
            f'<div class="turn {message.role}"><span>{ROLE_WORDS[message.role]}</span>{escape(clipped(message.content))}</div>'
            for message in row.messages[:SHOWN_TURNS]
        )
        more = not_shown(len(row.messages) - SHOWN_TURNS, "turns")
        cards.append(f'<article class="row-card"><header>Row {row.row}</header>{turns}{more}</article>')
    return f'<div class="rows">{"".join(cards)}</div>'


def token_view(rows: Sequence[RowView]) -> str:
    """Rows as the model reads them: what is trained is tinted and underlined, special tokens are framed, what is cut is struck out."""
    legend = (
        '<p class="note legend"><mark>trained on</mark> <span>only read</span> <code class="special">special token</code> '
        '<s class="cut">cut off</s> <span class="padding">padding</span></p>'
    )
    cards = []
    for row in rows:
        cut = f", {row.tokens - row.kept_tokens:,} cut off" if row.kept_tokens < row.tokens else ""
        head = f"Row {row.row} · {row.tokens:,} tokens, {row.trained:,} trained{cut}"
        padding = f'<span class="padding">{row.padding:,} × padding</span>' if row.padding else ""
        pieces, more = "".join(map(piece, row.pieces[:SHOWN_PIECES])), not_shown(len(row.pieces) - SHOWN_PIECES, "pieces")
        cards.append(f'<article class="row-card"><header>{head}</header><pre>{pieces}{padding}</pre>{more}</article>')
    return f'{legend}<div class="rows">{"".join(cards)}</div>'


def piece(part: Piece) -> str:
    """A stretch of tokens of one kind."""
    text = escape(clipped(part.text))
    if part.begins:
        return f'<span class="next" role="separator">next sequence</span>{piece(replace(part, begins=False))}'
    if part.special:
        text = f'<code class="special">{text}</code>'
    if part.cut:
        return f'<s class="cut">{text}</s>'
    return f"<mark>{text}</mark>" if part.trained else text


def not_shown(count: int, what: str) -> str:
    return f'<p class="note">… {count:,} more {what} are not shown here.</p>' if count > 0 else ""


def clipped(text: str) -> str:
    left = len(text) - SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:SHOWN_CHARACTERS]} … ({left:,} more characters)"
