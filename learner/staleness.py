"""How old a pair is, in weight versions. Values in, value out."""

from collections.abc import Sequence

from streaming.records import Pair, Version


def staleness(sampled: Version, current: Version, lineage: Sequence[Version]) -> int | None:
    """Versions between the one that sampled a token and the learner's; None where no bound holds.

    `lineage` has the last version of every older epoch that the current weights descend from. What an older epoch
    published after that is not an ancestor of the current weights: how far it is from them, nobody knows.
    """
    last = {version.epoch: version.number for version in (*lineage, current)}
    if sampled.number > last.get(sampled.epoch, -1):
        return None
    return current.number - sampled.number


def pair_staleness(pair: Pair, current: Version, lineage: Sequence[Version]) -> int | None:
    """Staleness of the oldest token of either side; None where any token has none. A pair without tokens is new."""
    spans = [*pair.chosen.spans, *(pair.rejected.spans if pair.rejected else [])]
    ages = [staleness(version, current, lineage) for version in {span.version for span in spans}]
    return None if None in ages else max((age for age in ages if age is not None), default=0)


def lineage_of(restored: Version | None, older: Sequence[Version], *, epoch: int) -> list[Version]:
    """The lineage of a learner that starts `epoch` from a checkpoint of version `restored` (None: from the beginning).

    Epochs since then that left no checkpoint started from the same weights, under the same number.
    """
    first, number = (0, 0) if restored is None else (restored.epoch - 1, restored.number)
    kept = [version for version in older if version.epoch <= first]
    return [*kept, *(Version(since, number) for since in range(first + 1, epoch))]
