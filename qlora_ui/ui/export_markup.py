"""What the Export tab says, as HTML in which every value is escaped. Knows nothing of components or torch."""

from __future__ import annotations

import time
from html import escape

from qlora_ui.exported import MOST_DOWNLOAD_BYTES, Record
from qlora_ui.exporting import Job
from qlora_ui.exports import gguf_commands, size_words
from qlora_ui.ui import markup

TITLES = {"adapter": "Adapter", "merged": "Merged model", "folder": "Folder that chats"}
ABOUT = {
    "adapter": "What PEFT loads, with tokenizer, chat template and model card. Small; needs the base model beside it.",
    "merged": "Base and adapter in one, in 16 bits, for plain transformers and for conversion to GGUF. As large as the base.",
    "folder": "The adapter, a README and a script that chats with it without this app. Needs the base model.",
}
HEADS = {"running": "Exporting", "done": "Exported and verified", "cancelled": "Cancelled", "failed": "Not exported"}
NOTHING = markup.note("Nothing was exported since the app was started. What is made here is reloaded and compared before it is kept.")


def now(job: Job | None) -> str:
    """The newest export: its way while it is made, then how it ended. What is announced changes with its end only."""
    if job is None:
        return NOTHING
    ending = "Exported, but not pushed" if job.name and job.stand != "done" else HEADS[job.stand]
    head = f"{ending}: {TITLES[job.kind].lower()} of {job.run}, step {job.step}"
    doing = "Ending…" if job.asked_to_end and job.stand == "running" else job.doing
    share = 100 * (1.0 if job.stand == "done" else job.share or 0.0)
    log = "".join(f"{line}\n" for line in job.log)
    words = markup.error(job.words) if job.stand == "failed" else f'<p class="verified">{escape(job.words)}</p>' if job.words else ""
    return (
        f'<p class="headline">{escape(head)}</p>'
        f'<div class="bar" role="progressbar" aria-label="export" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share:.0f}" '
        f'data-state="{job.stand}"><i style="width:{share:.1f}%"></i></div>'
        f'<p class="note doing">{escape(doing)}</p>{words}'
        f'<pre class="log" tabindex="0" aria-label="Log of the export">{escape(log)}</pre>'
        f'<div class="visually-hidden" aria-live="polite">{escape(job.words)}</div>'
    )


def facts(name: str, record: Record) -> str:
    """What is known of an export that lies in the workspace."""
    made = time.strftime("%d %b %Y, %H:%M UTC", time.gmtime(record.made))
    pushed = f'<p class="note">On the Hub: {escape(record.pushed)}</p>' if record.pushed else ""
    verified = f"<details><summary>Verified by reloading</summary><p>{escape(record.verified)}.</p></details>" if record.verified else ""
    where = f"exports/{escape(name)} in the workspace · {size_words(record.bytes)} · made {made}"
    large = f"More than {size_words(MOST_DOWNLOAD_BYTES)} are not handed through a browser: copy it from there."
    too_large = markup.note(large) if record.bytes > MOST_DOWNLOAD_BYTES else ""
    return f'<p class="note">{where}</p>{too_large}{pushed}{verified or markup.note("Nothing is known of how it was made.")}'


def label(name: str, record: Record) -> str:
    """An export in a line."""
    if not record.kind:
        return f"{name} · {size_words(record.bytes)}"
    title = TITLES.get(record.kind, record.kind) + (" in NF4" if record.quantized else "")
    return f"{title} · {record.run}, step {record.step} · {size_words(record.bytes)}"


def gguf(folder: str) -> str:
    """How to make a GGUF file of a merged model in that folder; without one, of which to make it."""
    if not folder:
        return markup.note(
            "For llama.cpp and Ollama: export a merged model (not in NF4) and choose it above; then the command stands here."
        )
    commands = "\n".join(gguf_commands(folder, f"{folder}.gguf"))
    return (
        f"{markup.note('llama.cpp, Ollama and others read GGUF. llama.cpp itself converts this model, where it knows the architecture:')}"
        f'<pre class="commands" tabindex="0" aria-label="Commands">{escape(commands)}</pre>'
    )
