"""Longer proofs, one command each: `python -m tests.benchmarks NAME`. They print what they measured."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib.metadata import version

NAMES = ("data", "kill", "memory", "starter", "startup", "training")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seed", type=int, help="of the moments at which kill kills")
    name, seed = vars(parser.parse_args()).values()
    libraries = ", ".join(f"{library} {version(library)}" for library in ("torch", "transformers", "peft", "bitsandbytes", "gradio"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{machine}; {libraries}\n", flush=True)
    importlib.import_module(f"tests.benchmarks.{name}").main(*([] if seed is None else [seed]))


if __name__ == "__main__":
    main()
