"""Exchange of text between two nodes: one number that says how alike their texts are."""

SPANS = 50  # short ones, so that each part of a split text meets swapped and own text alike


def exchanged(first: str, second: str, share: float) -> tuple[str, str]:
    """Return two texts that have swapped a share of their characters, place for place.

    Both texts are cut into ``SPANS`` spans as far as the shorter one reaches, and whole spans are
    swapped, the last of them in part, so that the share is met to the character. What is swapped
    for a small share is swapped for a larger one as well. Lengths in characters stay.

    Args:
        first: a text; what it has beyond the length of the other stays.
        second: the other text, likewise.
        share: 0 swaps nothing, 1 everything as far as the shorter text reaches.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share} is not between 0 and 1")
    num = min(len(first), len(second))
    # Multiples of the golden ratio spread evenly over any regular pattern, so that a swap meets
    # the training, validation and test parts of each span (`text.pack`) in about equal shares.
    order = sorted(range(SPANS), key=lambda k: (k + 1) * 0.6180339887498949 % 1)
    rank = {span: place for place, span in enumerate(order)}
    mine, other = [], []
    for span in range(SPANS):
        start, end = num * span // SPANS, num * (span + 1) // SPANS
        part = min(max(share * SPANS - rank[span], 0.0), 1.0)
        cut = start + round((end - start) * part)
        mine += [second[start:cut], first[cut:end]]
        other += [first[start:cut], second[cut:end]]
    return "".join([*mine, first[num:]]), "".join([*other, second[num:]])
