"""Which sequences share a padded batch, when they all get one forward pass in any order."""

from collections.abc import Sequence


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices into `lengths`, cut into batches of like length whose padded size stays within `batch_tokens`.

    Longest first, so that what does not fit into memory fails at once and not at the end. A sequence longer than
    the budget is a batch of its own; nothing is left out.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
