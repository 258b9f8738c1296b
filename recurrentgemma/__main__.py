"""`python -m recurrentgemma`: the command line."""

import sys

from recurrentgemma.cli import main

sys.exit(main())
