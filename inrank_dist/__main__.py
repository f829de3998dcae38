"""``python -m inrank_dist COMMAND`` is the console script ``inrank COMMAND``."""

import sys

from .commands.main import main

sys.exit(main())
