"""Longer proofs, one command each: `python -m tests.benchmarks NAME`. They print what they measured."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib.metadata import version

NAMES = ("chatters", "data", "decoding", "kill", "long-run", "memory", "readers", "starter", "startup", "training")
WITH_OPTIONS = ("chatters", "kill", "long-run", "readers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("name", choices=NAMES)
    flags, arguments = parser.parse_known_args()
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "peft", "bitsandbytes", "gradio"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {libraries}\n", flush=True)
    benchmark = importlib.import_module(f"tests.benchmarks.{flags.name.replace('-', '_')}")
    benchmark.main(*([arguments] if flags.name in WITH_OPTIONS else []))


if __name__ == "__main__":
    main()
