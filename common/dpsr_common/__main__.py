"""Runs `python -m dpsr_common COMMAND ...` as `dpsr COMMAND ...`; the environment's bin folder need not be in PATH."""

import sys

from dpsr_common.command_line import main

sys.exit(main())
