"""Numbers with their nouns."""


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``24 layers``, ``2 processes``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('s') else 's'}"
