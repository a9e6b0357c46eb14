"""`python -m qlora_ui`: the command line."""

import os
import sys

from qlora_ui.cli import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as end:  # argparse: help, or a command that is none
        code = end.code if isinstance(end.code, int) else 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that waits for threads which were left to themselves, such as a request to a Hub that hangs.
    os._exit(code)
