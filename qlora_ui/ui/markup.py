"""Values to HTML, every one escaped: what a row, a log or an error says is text, never markup."""

from __future__ import annotations

from html import escape

from qlora_ui.progress import Progress, duration


def error(message: str, field: str = "") -> str:
    """A sentence about what the person can mend. The page's script puts it at the `field` of the form too."""
    at = f' data-field="{escape(field)}"' if field else ""
    return f'<p class="problem" role="alert"{at}>{escape(message)}</p>' if message else ""


def note(message: str) -> str:
    return f'<p class="note">{escape(message)}</p>' if message else ""


def question(words: str) -> str:
    return f'<p class="question" role="alert">{escape(words)}</p>'


def status(progress: Progress | None, trouble: str = "") -> str:
    """The run bar's line; `trouble` is what no event tells. What screen readers announce changes with the phase, not with every step."""
    if progress is None:
        return f'<div class="status" data-state="idle">{escape(trouble or "No run yet. Choose data, then start training.")}</div>'
    line = " · ".join(filter(None, [progress.status_line(), trouble]))
    said = progress.end_sentence() or trouble or progress.phase
    return (
        f'<div class="status" data-state="{progress.state}">{escape(line)}{traceback(progress)}</div>'
        f'<div class="visually-hidden" aria-live="polite">{escape(f"{progress.name}: {said}")}</div>'
    )


def traceback(progress: Progress) -> str:
    """Where a run broke off because of our bug: what we need to mend it, folded away."""
    told = progress.failure.traceback if progress.failure else ""
    return f'<details class="traceback"><summary>details</summary><pre tabindex="0">{escape(told)}</pre></details>' if told else ""


def bar(progress: Progress | None) -> str:
    """The thin progress line under the status."""
    share = 0.0 if progress is None else progress.share_done
    state = "idle" if progress is None else progress.state
    return (
        f'<div class="bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{share * 100:.0f}" data-state="{state}"><i style="width:{share * 100:.1f}%"></i></div>'
    )


def tiles(progress: Progress | None) -> str:
    """The small figures in a row. Always the same seven, so that nothing moves."""
    last = progress.last if progress else None
    eta = progress.eta_seconds if progress else None
    figures = {
        "step": f"{progress.step:,} / {progress.total_steps:,}" if progress and progress.total_steps else "",
        "loss": f"{progress.loss:.3f}" if progress and progress.loss is not None else "",
        "held-out": f"{progress.held_out_loss:.3f}" if progress and progress.held_out_loss is not None else "",
        "learning rate": f"{last.learning_rate:.1e}" if last else "",
        "tokens/s": f"{last.tokens_per_second:,.0f}" if last else "",
        "memory": f"{last.memory_gib:.1f} GiB" if last else "",
        "time left": duration(eta) if eta is not None else "",
    }
    under = {
        "held-out": f"best at {progress.best.step}" if progress and progress.best else "",
        "time left": f'done <time data-at="{progress.done_at:.0f}"></time>' if progress and progress.done_at is not None else "",
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value) or '–'}</dd><dd class='under'>{under.get(name, '')}</dd></div>"
        for name, value in figures.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


def hints(sentences: list[str]) -> str:
    """The place under the tiles, as high with two hints as with none. Not announced: their figures move with every step."""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences) or '<p class="none">Nothing to point out so far.</p>'
    return f'<div class="hints" role="note" aria-label="Hints">{said}</div>'


NO_LOG = "What the run does is written here, line by line."


def log() -> str:
    """The box that the page's script fills with the last lines of the run's log."""
    return f'<pre class="log" role="log" tabindex="0" aria-label="Log">{NO_LOG}\n</pre>'


def reading(name: str, share: float) -> str:
    """The run bar's line while the events of a long run are read."""
    return f'<div class="status" data-state="idle">{escape(name)} · reading what it did so far: {share:.0%}</div>'
