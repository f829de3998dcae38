"""Orders that are the same on every machine and with every version of NumPy."""

import numpy as np


def stable_permutation(length: int, *seeds: int) -> np.ndarray:
    """A permutation (length,) int64 that depends on its arguments alone.

    By sorting raw random numbers: NumPy promises that these stay the same in later versions, and does not
    promise it for ``Generator.permutation``.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(length), kind="stable")
