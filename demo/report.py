"""What the demo prints. Every sentence stands for something that was just checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lab.probe import Pair, Reach

WIDTH = 100
Expected = Callable[[Pair], tuple[bool, bool]]  # whether TCP and ICMP should get through

SHOWN = 6  # of a list of things that are wrong


class Report:
    """Prints steps and checks, and counts what was not as it should be."""

    def __init__(self) -> None:
        plain = Console(highlight=False)
        self.console = Console(
            highlight=False, width=min(plain.width, WIDTH) if plain.is_terminal else WIDTH
        )
        self.checks = 0
        self.failures: list[str] = []
        self._begun = time.monotonic()
        self._steps = 0

    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._begun

    def step(self, title: str) -> None:
        """Begin a step."""
        self._steps += 1
        self.console.print()
        self.console.rule(
            f"[bold]{self._steps}. {title}[/] [dim]({self.elapsed():.0f} s)[/]", align="left"
        )

    def note(self, text: str) -> None:
        """Something being done; claims nothing."""
        self.console.print(Text(f"  {text}", style="dim"))

    def check(self, sentence: str, is_so: bool, instead: object = "") -> None:
        """Print a sentence with whether it is so; ``instead`` is what was found if not."""
        self.checks += 1
        if is_so:
            self.console.print(Text("  ✔ ", style="bold green").append(sentence, style="default"))
            return
        self.failures.append(sentence)
        self.console.print(Text("  ✘ ", style="bold red").append(sentence))
        if isinstance(instead, list):
            shown = ", ".join(map(str, instead[:SHOWN]))
            instead = f"{shown} and {len(instead) - SHOWN} more" if instead[SHOWN:] else shown
        if instead != "":
            self.console.print(Text(f"    instead: {instead}", style="red"))

    def output(self, where: str, command: str, text: str) -> None:
        """A command and what it printed."""
        self.console.print(Text(f"  {where}$ {command}", style="bold cyan"))
        for line in text.rstrip().splitlines():
            self.console.print(Text(f"    {line.rstrip()}"), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table; all columns but the first are numbers."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in columns:
            table.add_column(column, justify="left" if column == columns[0] else "right")
        for row in rows:
            table.add_row(*row)
        self._indented(table)

    def matrix(self, names: Sequence[str], found: Mapping[Pair, Reach], expected: Expected) -> None:
        """Who reaches whom: a row is a source, a column a destination."""
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        table.add_column("from \\ to", justify="right")
        for number, _ in enumerate(names, 1):
            table.add_column(str(number), justify="center")
        for number, source in enumerate(names, 1):
            cells = [_cell((source, target), found, expected) for target in names]
            table.add_row(Text(f"{source} {number:>2}"), *cells)
        self._indented(table)
        self.console.print(
            Text("    T: TCP, I: ICMP, ··: neither, !: not as it should be", style="dim")
        )

    def _indented(self, table: Table) -> None:
        self.console.print(Padding(table, (0, 0, 0, 2)))


def _cell(pair: Pair, found: Mapping[Pair, Reach], expected: Expected) -> Text:
    reach = found.get(pair)
    if reach is None:
        return Text("")
    text = ("T" if reach.tcp else "·") + ("I" if reach.icmp else "·")
    if (reach.tcp, reach.icmp) != expected(pair):
        return Text(text + "!", style="bold red")
    return Text(text, style="green" if text == "TI" else "bold yellow")
