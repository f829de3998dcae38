"""Measurements of parts of the trainer against what others do; behind ``inrank bench``."""
