"""What a redrive is about to do, for people: a line per kind of letter, then the letters."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Group as Page
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deploy.redrive import Planned

_MAX_SHOWN = 20
"""Letters that are shown one by one."""

_MAX_REASON = 80
"""Characters of a reason: enough to tell kinds apart."""


def page(planned: Sequence[Planned]) -> RenderableType:
    """Counts by stage and fate, and the first letters one by one."""
    if not planned:
        return Text("no dead letters like that")
    counts = Counter((one.stage, one.source.topic, one.left or "goes back") for one in planned)
    total = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "topic", "what happens", "letters"):
        total.add_column(name, justify="right" if name == "letters" else "left")
    for (stage, topic, fate), count in sorted(counts.items()):
        total.add_row(stage, topic, Text(fate), str(count), style="green" if fate == "goes back" else "")
    letters = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("bytes of", "request", "what happens", "why it died"):
        letters.add_column(name)
    for one in planned[:_MAX_SHOWN]:
        source = one.source
        letters.add_row(
            f"{source.topic}/{source.partition}@{source.offset}",
            "unknown" if one.request_number is None else str(one.request_number),
            Text(one.left or "goes back"),
            Text(_first_line(one.reason)),
        )
    rest = len(planned) - _MAX_SHOWN
    return Page(total, Text(), letters, Text(f"... and {rest} more\n" if rest > 0 else ""))


def _first_line(reason: str) -> str:
    line = reason.splitlines()[0] if reason else ""
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."
