"""Numbers in messages."""


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``24 layers``, ``2 processes``, ``2 micro-batches``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number up to ``most``, ascending."""
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def nearest_divisors(number: int, value: int) -> str:
    """``4 or 8``: the largest divisor of a number up to ``value`` and the smallest above it, those that exist."""
    known = divisors(number, number)
    below, above = [n for n in known if n <= value], [n for n in known if n > value]
    return " or ".join(str(n) for n in (*below[-1:], *above[:1]))
