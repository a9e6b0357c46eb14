"""A chat template tried in a process of its own, where it may use up its time or memory without taking the app along.

Jinja's sandbox keeps a template from the machine, but not from `{{ 'a' * 10**10 }}`. Knows nothing of tokenizers; run as a
script it imports nothing of this project, so that it starts at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

SECONDS, MEMORY_MIB, CHARACTERS = 3, 512, 1_000_000
SAFE = ""
TURNS = [{"role": role, "content": f"turn {number}"} for number, role in enumerate(("user", "assistant", "user", "assistant"))]


@lru_cache(maxsize=32)
def trouble(template: str) -> str:
    """Why the template is not safe to render here, empty when it is. What else is wrong with it is not looked at."""
    try:
        tried = subprocess.run(
            [sys.executable, "-I", str(Path(__file__))], input=json.dumps(template), capture_output=True, text=True, timeout=4 * SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"it does not end within {4 * SECONDS} seconds"
    if tried.returncode:  # the operating system ended it
        return f"it needs more than {SECONDS} seconds or {MEMORY_MIB} MiB for four short turns"
    return tried.stdout.strip()


def main() -> None:
    """Read a template, render it within bounds, and print what went wrong, if it was time, memory or length."""
    try:
        import resource
    except ImportError:  # Windows: the caller's clock is the only bound
        pass
    else:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB * 2**20, MEMORY_MIB * 2**20))
    print(_too_much(json.loads(sys.stdin.read())))


def _too_much(template: str) -> str:
    try:
        written = _environment().from_string(template).render(messages=TURNS, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    except (MemoryError, OverflowError):
        return f"it needs more than {MEMORY_MIB} MiB for four short turns"
    except Exception:  # noqa: BLE001
        # A template that breaks off is safe to render in the app, which does so next and tells a person of this very error.
        return SAFE
    return f"it writes {len(written):,} characters for four short turns" if len(written) > CHARACTERS else SAFE


def _environment() -> Any:
    """Jinja as transformers sets it up for chat templates; imported in the child only."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` as a block that changes nothing."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.globals["raise_exception"] = _refuse
    return environment


def _refuse(reason: str) -> None:
    raise ValueError(reason)


if __name__ == "__main__":
    main()
