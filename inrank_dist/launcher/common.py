"""What the launchers share."""

import argparse
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..commands.main import Parser
from ..runtime.errors import UserError

SHUTDOWN_SECONDS = 180
"""How long processes that were asked to leave may take: longer than ``checkpoint.grace_seconds``, after which they
leave by themselves."""


@dataclass
class Outcome:
    """What became of the processes that a launcher has started on this node.

    Attributes:
        statuses: their exit statuses by local rank, once a signal has ended them.
        final: exit status of the launcher, once they have ended by themselves and are not started again.
    """

    statuses: dict[int, int] = field(default_factory=dict)
    final: int | None = None


def read_words(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse a launcher's options, of which ``-n`` is one (``processes``), and the command behind them (``words``).

    Raises:
        UserError: with what to write instead.
    """
    parser.add_argument(
        "words", metavar="COMMAND", nargs=argparse.REMAINDER, help="command of inrank with its words, passed on"
    )
    given = parser.parse_args(list(words))
    if given.words[:1] == ["--"]:
        del given.words[0]
    if not given.words:
        raise UserError(f"no command; write {parser.prog} [-n PROCESSES] COMMAND, such as train --config FILE")
    if given.processes is not None and given.processes < 1:
        raise UserError(f"-n is {given.processes}; write a number of processes of at least 1")
    return given


def killed(process: str, number: int) -> str:
    """A line on a process that could not say one itself."""
    why = " (out of memory? see the kernel's log)" if number == signal.SIGKILL else ""
    return f"{process} was killed by {signal.Signals(number).name}{why}"
