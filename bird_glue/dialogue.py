"""Commands to ExaBGP, one at a time, and its answers.

ExaBGP answers some commands at once and others in a queue of its own, with bare words that
don't say which command they belong to. So the next one is sent when the last is answered.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass

from bird_glue.channel import Channel
from bird_glue.messages import Answer, Text

ANSWER_SECONDS = 30.0
IDLE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a command, its output, and when that was known."""

    done: bool
    output: tuple[str, ...]
    time: float


Finish = Callable[[Result], None]


@dataclass(frozen=True, slots=True)
class Command:
    """A line for ExaBGP, and who waits for the result."""

    line: str
    finish: Finish


class Dialogue:
    """The commands on one channel. ``unanswered``: those of an earlier client."""

    def __init__(self, channel: Channel, unanswered: int, now: float) -> None:
        self._channel = channel
        self._foreign = unanswered
        self._queue: collections.deque[Command] = collections.deque()
        self._current: Command | None = None
        self._output: list[str] = []
        self._since = now  # of the last word either side said

    def ask(self, line: str, finish: Finish = lambda result: None) -> None:
        """Send a command when its turn comes."""
        self._queue.append(Command(line, finish))

    def heard(self, event: Answer | Text, now: float) -> None:
        """ExaBGP said this."""
        self._since = now
        if isinstance(event, Text):
            self._output.append(event.line)
            return
        output, self._output = tuple(self._output), []
        if self._foreign:
            self._foreign -= 1
        elif self._current is not None:
            current, self._current = self._current, None
            current.finish(Result(event.done, output, now))

    def pump(self, now: float) -> None:
        """Send what can be sent. Raises OSError when the relay is gone."""
        waiting = self._foreign or self._current is not None
        if not waiting and not self._queue and now - self._since >= IDLE_SECONDS:
            self.ask("version")  # only to see whether it still answers
        if not waiting and self._queue:
            self._current = self._queue.popleft()
            self._since = now
            self._channel.send(self._current.line)

    def stuck(self, now: float) -> bool:
        """Whether an answer is overdue."""
        waiting = self._foreign or self._current is not None
        return bool(waiting) and now - self._since > ANSWER_SECONDS

    def next_due(self) -> float:
        """When there is something to do though nothing was heard."""
        waiting = self._foreign or self._current is not None
        return self._since + (ANSWER_SECONDS if waiting else IDLE_SECONDS) + 0.01
