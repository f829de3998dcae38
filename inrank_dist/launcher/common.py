"""Code shared by the launchers."""

import argparse
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..commands.main import Parser
from ..runtime.errors import UserError

SHUTDOWN_SECONDS = 180
"""How long processes may take to exit after a stop request. Longer than ``checkpoint.grace_seconds``, after which they
exit by themselves."""


@dataclass
class Outcome:
    """How the processes that a launcher started on this node ended.

    Attributes:
        statuses: exit statuses by local rank, set once a signal has ended the processes.
        final: exit status of the launcher, set once the processes have exited by themselves and will not be restarted.
    """

    statuses: dict[int, int] = field(default_factory=dict)
    final: int | None = None


def parse_command_line(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a launcher's options (including ``-n``: ``processes``) and the command that follows them (``command``).

    Raises:
        UserError: with what to write instead.
    """
    parser.add_argument(
        "command", metavar="COMMAND", nargs=argparse.REMAINDER, help="inrank command and its arguments, passed on"
    )
    options = parser.parse_args(list(argv))
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        raise UserError(f"no command; write {parser.prog} [-n PROCESSES] COMMAND, such as train --config FILE")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"-n is {options.processes}; write a number of processes of at least 1")
    return options


def describe_kill(process: str, number: int) -> str:
    """Error message for a process that was killed by a signal."""
    why = " (out of memory? see the kernel's log)" if number == signal.SIGKILL else ""
    return f"{process} was killed by {signal.Signals(number).name}{why}"
