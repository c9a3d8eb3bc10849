"""Sizes that many sizes are rounded up to, so that what was made for one serves its neighbours."""


def bucket(count: int, parts: int, least: int = 1) -> int:
    """Returns the smallest bucket that holds `count`: from `least` on, each doubling is cut into `parts` equal steps.

    With one part a bucket may be half empty, with two a third, with four a fifth.

    Args:
        count: at least 1.
        parts: a power of two.
        least: the smallest bucket, a power of two.
    """
    if count <= least:
        return least
    below = least
    while 2 * below < count:
        below *= 2
    step = max(1, below // parts)
    return below + -(-(count - below) // step) * step
