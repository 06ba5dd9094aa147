"""Cut batches by token budget, the same number of passes on every rank."""

from collections.abc import Sequence


def plan_microbatches(lengths: Sequence[int], ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Share items out over ranks and cut each share into micro-batches.

    Items are sorted by length, so that neighbours need little padding, and cut into as few passes as keep
    `longest x count` within the budget. Each pass is dealt over the ranks in turn. A pass that is too small for
    all ranks leaves some ranks an empty list: they run a filler of weight zero, since under ZeRO every rank
    takes part in every pass.

    Args:
        lengths: tokens of each item (for a pair, of its longest sequence times their number).
        ranks: number of workers.
        token_budget: padded tokens in one pass of one rank. A single longer item still gets a pass.

    Returns:
        [rank][pass] -> item indices; every rank has the same number of passes, every index occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    passes: list[list[list[int]]] = []
    position = 0
    while position < len(order):
        per_rank = max(1, token_budget // max(1, lengths[order[position]]))
        group = order[position : position + per_rank * ranks]
        passes.append([group[rank::ranks] for rank in range(ranks)])
        position += len(group)
    return [[group[rank] for group in passes] for rank in range(ranks)]
