"""The handwritten digits of scikit-learn."""

import torch
from torch import Tensor

from ..runtime.errors import UserError


def load_digits() -> tuple[Tensor, Tensor]:
    """Return 1,797 float64 images ``(1797, 8, 8)`` from -1 to 1, and their int64 labels, in the order of the package.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise UserError(
            "this experiment needs the digits of scikit-learn, which is not installed; write pip install scikit-learn"
        ) from None
    digits = datasets.load_digits()
    return torch.tensor(digits.images / 8 - 1, dtype=torch.float64), torch.tensor(digits.target)
