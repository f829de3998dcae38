"""Human-readable formats of counts, durations and losses."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def fixed(value: Any, digits: int) -> str:
    """``value`` with a fixed number of decimals; ``-`` if it is not a number, ``nan`` or ``inf`` if it is not
    finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    return f"{value:,.{digits}f}"


def amount(value: Any) -> str:
    """A count of parameters or tokens, such as ``124.4M`` or ``1.23B``; all digits below 100,000."""
    count = number(value)
    if count is None:
        return "-"
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,.0f}"


def operations(value: Any) -> str:
    """A number of floating-point operations, such as ``8.21 T`` or ``1.30 E``; all digits below a million."""
    count = number(value)
    if count is None:
        return "-"
    for letter, unit in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= unit:
            return f"{count / unit:.2f} {letter}"
    return f"{count:,.0f}"


def size(value: Any) -> str:
    """A number of bytes, such as ``12.3 MiB`` or ``4.56 GiB``."""
    count = number(value)
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: Any) -> str:
    """Seconds as ``h:mm:ss``, or ``2d 03:04:05`` from one day on."""
    value = number(seconds)
    if value is None:
        return "-"
    minutes, secs = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02d}:{secs:02d}"
    return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}:{secs:02d}"


def perplexity_of(entropy: Any) -> float | None:
    """``exp(entropy)`` for an entropy or loss in nats per token; None if it is missing or the result overflows."""
    nats = number(entropy)
    return math.exp(nats) if nats is not None and nats < 700 else None
