"""Permutations that are the same on every machine and with every version of NumPy."""

import numpy as np


def stable_permutation(length: int, *seeds: int) -> np.ndarray:
    """A permutation (length,) int64 that depends only on the arguments.

    Sorts raw random numbers, which NumPy keeps stable between versions. It makes no such promise for
    ``Generator.permutation``.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(length), kind="stable")
