"""``python -m vfiod.server``: what ``vfiod serve`` executes."""

import sys

from vfiod.server.program import main

sys.exit(main())
