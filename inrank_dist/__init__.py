"""Pre-train language models whose weights grow in rank as they learn, sharded over any number of processes."""

__version__ = "0.1.0"
