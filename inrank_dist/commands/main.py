"""The command line: dispatches to a command and reports user errors in one line."""

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
from ..runtime.progress import CurrentStderrHandler, end_bars
from ..runtime.signals import exiting_on_stop

COMMANDS = {
    "train": "the main job: prepare the data, train, checkpoint, report; resumes by itself",
    "prepare": "tokenizer and packed dataset only",
    "eval": "validation loss and perplexity of a checkpoint",
    "generate": "samples of text from a checkpoint",
    "export": "a trained model as a folder of transformers, or with its factors",
    "inspect": "table of layers: shape, rank, null rank, explained ratio, effective rank, parameters",
    "plan": "parameters, FLOPs, memory and communication of a config, without the hardware",
    "verify": "whether the checkpoints of a run are complete and can be resumed from",
    "report": "one self-contained HTML file with plots",
    "compare": "several runs beside each other: one table, and one HTML file with plots",
    "study": "many runs of one config, variants against their controls, in one table",
    "theory": "the laboratory: small experiments after the papers",
    "bench": "benchmarks: full rank against low rank; a rank decision; the cost of checkpoints",
}

DESCRIPTION = """\
Pre-train language models whose weights grow in rank as they learn, sharded over any number of GPUs."""
EXAMPLES = """\
examples:
  inrank train --config configs/quickstart.yaml --run.dir runs/first
  inrank report --run runs/first
  inrank COMMAND --help

The README and the pages that it links describe the settings, clusters, the library and the method.
"""


OUTLIVE_CONSOLE = ("train", "prepare", "study", "theory")
"""Commands whose result is files. They continue if their output can no longer be written."""


class StoreOnce(argparse.Action):
    """An option with one value, rejected if it is given twice. argparse would silently use the last one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        given = vars(parser).setdefault("given", set())
        if self.option_strings and self.dest in given:
            parser.error(f"{self.option_strings[-1]} is given twice, the second time as {values}; write it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ``UserError`` instead of printing usage and exiting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("action", None, StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 75 stopped on request, 2 user error, 1 another process or node was lost (the last two with
        one line on stderr). Other exceptions propagate.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The DeepSpeed launcher passes --local_rank in addition to setting LOCAL_RANK.
    argv = [argument for argument in argv if not argument.startswith("--local_rank=")]
    console.guard(outlive=bool(argv) and argv[0] in OUTLIVE_CONSOLE)
    watch_launcher()
    # Log once per node: the processes of a job make the same mistake at the same time.
    logs = logs_for_node()
    _escape_unencodable()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[CurrentStderrHandler()])
    logging.getLogger("inrank_dist").setLevel(logging.INFO if logs else logging.ERROR)
    # Any process of a job may be the one that does the work, and only that one can report progress.
    logging.getLogger("inrank_dist.progress").setLevel(logging.INFO)
    try:
        command, rest = _parse_command(argv)
        if command is None:
            return 0
        with exiting_on_stop() if command == "train" else nullcontext():
            module = importlib.import_module(f".{command}", __package__)
            parser = Parser(prog=f"inrank {command}", description=COMMANDS[command], allow_abbrev=False)
            module.add_arguments(parser)
            if hasattr(module, "complete"):
                rest = module.complete(rest)
            arguments, overrides = parser.parse_known_args(rest)
            try:
                module.run(arguments, overrides)
            finally:
                end_bars()
        sys.stdout.flush()
        return 0
    except UserError as error:
        line = " ".join(str(error).split())
        _report_mistake(line, logs)
        return _exit(2, line)
    except JobFailed as error:
        _report_mistake(str(error), True)
        return _exit(1, str(error))
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; not every command imports torch
            line = ". ".join(str(error).split(". ")[:2]) + OUT_OF_MEMORY
            _report_mistake(line, logs or _watch() is None)
            return _exit(2, line)
        if not _in_process_group():
            raise
        return _exit(1, _report_failure(error))
    except BaseException as error:
        stop = sys.modules.get("inrank_dist.runtime.stop")
        if stop is None or not isinstance(error, stop.Stopped):
            raise
        if logs:
            print(error, file=sys.stderr)
        return _exit(stop.EXIT_STOPPED)


def _escape_unencodable() -> None:
    """Print characters that the console's encoding lacks as escapes such as ``\\u2014`` instead of failing."""
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
"""Substrings of the errors that a process gets when another one has gone."""


def _report_failure(error: Exception) -> str:
    """Print the traceback of a failure, unless it is a consequence of another process's failure.

    Returns:
        One line for the other processes.
    """
    line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    watch = _watch()
    consequence = isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_CONNECTION)
    first = watch.failure_of_another(wait_seconds=2.0 if consequence else 0.0) if watch else None
    rank = os.environ.get("RANK", "0")
    if first:
        watch.exit(first[1], sys.modules["inrank_dist.runtime.watch"].exit_message(rank, first))
    if consequence:
        print(
            f"process {rank} lost another process, which was killed, or whose machine or network is gone ({line})",
            file=sys.stderr,
        )
    else:
        print(f"process {rank} failed:", file=sys.stderr)
        traceback.print_exc()
    return line


def _report_mistake(line: str, logs: bool) -> None:
    """Print a user error, once per node."""
    watch = _watch()
    if watch:
        watch.reported = True
    if logs:
        print("error:", line, file=sys.stderr)


def _exit(status: int, line: str = "") -> int:
    """If there is a process group, exit at once: destroying it would wait for the other processes."""
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
    """Checked without importing torch, which takes seconds and is not needed for help and most user errors."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def _parse_command(argv: list[str]) -> tuple[str | None, list[str]]:
    parser = Parser(
        prog="inrank",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"inrank_dist {__version__}")
    listing = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, meaning in COMMANDS.items():
        listing.add_parser(name, help=meaning, add_help=False)
    if not argv:
        parser.print_help()
        return None, []
    arguments, unknown = parser.parse_known_args(argv[:1])
    if unknown:
        raise UserError(f"{argv[0]!r} is not a command; write inrank COMMAND, one of {', '.join(COMMANDS)}")
    return arguments.command, argv[1:]
