"""Which sequences share a padded batch, when they all get one forward pass in any order."""

from collections.abc import Sequence


def padded_batches(
    lengths: Sequence[int], batch_tokens: int, *, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices into `lengths`, cut into batches of like length whose padded size stays within `batch_tokens`.

    Longest first, so that what does not fit into memory fails at once and not at the end. A sequence longer than
    the budget is a batch of its own; nothing is left out. `counts`: how many sequences of its length an index stands
    for, one if nothing is said.
    """
    batches: list[list[int]] = []
    num_rows = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        count = counts[index] if counts else 1
        num_rows += count
        if batches and num_rows * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            num_rows = count
    return batches
