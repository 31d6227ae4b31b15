"""Two rewards: for each answer a number, the larger the better."""


def digits(completions, **_):
    """Like answers of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def twenty(completion):
    """Like answers of twenty characters."""
    return -abs(len(completion) - 20) / 20
