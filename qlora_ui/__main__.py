"""`python -m qlora_ui`: the command line."""

import sys

from qlora_ui.cli import main

sys.exit(main())
