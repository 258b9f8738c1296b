"""`python -m recurrentgemma.cli`."""

import sys

from recurrentgemma.cli import main

sys.exit(main())
