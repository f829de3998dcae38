"""Benchmarks behind ``inrank bench``: parts of the trainer compared with the alternatives."""
