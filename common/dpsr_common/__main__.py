"""`python -m dpsr_common COMMAND ...` is `dpsr COMMAND ...`, also where the environment's bin folder is not in PATH."""

import sys

from dpsr_common.command_line import main

sys.exit(main())
