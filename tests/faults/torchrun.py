"""``python -m faults.torchrun FAULT.json-text [OPTIONS] COMMAND``: ``launch/torchrun.sh``, a fault in its processes."""

import sys

from inrank_dist.launcher import torchrun

torchrun.PROGRAM = ("-m", "faults", sys.argv[1])  # type: ignore[assignment]
torchrun.run(sys.argv[2:])
