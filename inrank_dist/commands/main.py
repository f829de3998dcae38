"""The command line: find the command, run it, turn the user's mistakes into one line."""

import argparse
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

from .. import __version__
from ..runtime import console
from ..runtime.environment import logs_for_node
from ..runtime.errors import JobFailed, UserError
from ..runtime.parent import watch_launcher
from ..runtime.signals import exiting_on_stop

COMMANDS = {
    "train": "the main job: prepare the data, train, checkpoint, report; resumes by itself",
    "prepare": "tokenizer and packed dataset only",
    "eval": "validation loss and perplexity of a checkpoint",
    "generate": "samples of text from a checkpoint",
    "inspect": "table of layers: shape, rank, null rank, explained ratio, effective rank, parameters",
    "plan": "parameters, arithmetic, memory and communication of a config, without the hardware",
    "verify": "whether the checkpoints of a run are whole and can be resumed from",
    "report": "one self-contained HTML file with plots",
    "study": "many runs of one config, variants against their controls, into one table",
    "bench": "measurements: full rank against low rank; a rank decision; what checkpoints cost",
}


OUTLIVE_CONSOLE = ("train", "prepare", "study")
"""Commands whose product is files: they go on when nobody reads what they print."""


class StoreOnce(argparse.Action):
    """An option with one value, refused the second time: argparse takes the last one and ignores the others."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        given = vars(parser).setdefault("given", set())
        if self.option_strings and self.dest in given:
            parser.error(f"{self.option_strings[-1]} is given twice, the second time as {values}; write it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse that raises the user's mistakes instead of printing its own two lines."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("action", None, StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 75 stopped on request, 2 the user's mistake, 1 another process or node is lost (both with
        one line on stderr). Anything else is raised.
    """
    words = list(sys.argv[1:] if words is None else words)
    # The deepspeed launcher passes what it also writes to LOCAL_RANK.
    words = [word for word in words if not word.startswith("--local_rank=")]
    console.guard(outlive=bool(words) and words[0] in OUTLIVE_CONSOLE)
    watch_launcher()
    # Log once per node: the other processes of a launcher make the same mistake at the same time.
    logs = logs_for_node()
    _print_any_text()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("inrank_dist").setLevel(logging.INFO if logs else logging.ERROR)
    # One process of a job prepares the data, whichever comes first, and it alone can tell how far it is.
    logging.getLogger("inrank_dist.preparation").setLevel(logging.INFO)
    try:
        command, rest = _command(words)
        if command is None:
            return 0
        with exiting_on_stop() if command == "train" else nullcontext():
            module = importlib.import_module(f".{command}", __package__)
            parser = Parser(prog=f"inrank {command}", description=COMMANDS[command], allow_abbrev=False)
            module.add_arguments(parser)
            if hasattr(module, "complete"):
                rest = module.complete(rest)
            arguments, overrides = parser.parse_known_args(rest)
            module.run(arguments, overrides)
        sys.stdout.flush()
        return 0
    except UserError as error:
        line = " ".join(str(error).split())
        _report_mistake(line, logs)
        return _leave(2, line)
    except JobFailed as error:
        _report_mistake(str(error), True)
        return _leave(1, str(error))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for every command
            line = ". ".join(str(error).split(". ")[:2]) + OUT_OF_MEMORY
            _report_mistake(line, logs or _watch() is None)
            return _leave(2, line)
        if not _in_process_group():
            raise
        return _leave(1, _tell(error))
    except BaseException as error:
        stop = sys.modules.get("inrank_dist.runtime.stop")
        if stop is None or not isinstance(error, stop.Stopped):
            raise
        if logs:
            print(error, file=sys.stderr)
        return _leave(stop.EXIT_STOPPED)


def _print_any_text() -> None:
    """A console of another encoding than UTF-8 shows ``\\u2014`` for a character that it lacks, and nothing fails."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            escapes = stream.errors == "surrogateescape" and stream.encoding.lower() == "utf-8"
            if stream.errors in ("strict", "surrogateescape") and not escapes:
                stream.reconfigure(errors="backslashreplace")


OUT_OF_MEMORY = (
    "; write a smaller train.micro_batch_size, train.activation_checkpointing: true, or start more processes (inrank "
    "plan says what a run takes)"
)

LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "gloo")
"""What the messages hold that a process gets when another one has gone."""


def _tell(error: Exception) -> str:
    """Print the traceback of a failure, unless another process failed first and this is its echo.

    Returns:
        One line for the other processes.
    """
    line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    watch = _watch()
    echo = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_CONNECTION)
    first = watch.failure_of_another(wait_seconds=2.0 if echo else 0.0) if watch else None
    rank = os.environ.get("RANK", "0")
    if first:
        watch.exit(first[1], sys.modules["inrank_dist.runtime.watch"].exit_message(rank, first))
    if echo:
        print(
            f"process {rank} lost another process, which was killed, or whose machine or network is gone ({line})",
            file=sys.stderr,
        )
    else:
        print(f"process {rank} failed:", file=sys.stderr)
        traceback.print_exc()
    return line


def _report_mistake(line: str, logs: bool) -> None:
    """One voice a node."""
    watch = _watch()
    if watch:
        watch.reported = True
    if logs:
        print("error:", line, file=sys.stderr)


def _leave(status: int, line: str = "") -> int:
    """End at once where there is a process group: to take it down in order would mean to wait for the others."""
    if _in_process_group():
        watch = _watch()
        if watch:
            if line:
                watch.report_failure(status, line)
            watch.linger()
            watch.exit(status, "")
        console.flush()
        os._exit(status)
    return status


def _watch() -> Any:
    module = sys.modules.get("inrank_dist.runtime.watch")
    return module.current() if module is not None else None


def _in_process_group() -> bool:
    """Without importing torch, which takes seconds and which help and most mistakes do not need."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _command(words: list[str]) -> tuple[str | None, list[str]]:
    parser = Parser(prog="inrank", description=__import__("inrank_dist").__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"inrank_dist {__version__}")
    listing = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, meaning in COMMANDS.items():
        listing.add_parser(name, help=meaning, add_help=False)
    if not words:
        parser.print_help()
        return None, []
    arguments, unknown = parser.parse_known_args(words[:1])
    if unknown:
        raise UserError(f"{words[0]!r} is no command; write inrank COMMAND, one of {', '.join(COMMANDS)}")
    return arguments.command, words[1:]
