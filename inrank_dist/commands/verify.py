"""``inrank verify``: checks which checkpoints of a run can be resumed from."""

import argparse
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..runtime.errors import UserError
from ..runtime.home import path_argument
from ..train.checkpoint import Finding, check_run_folder, examine
from .common import console, no_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--run DIR``."""
    parser.add_argument("--run", metavar="DIR", type=path_argument, required=True, help="run folder")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Hash every file of every checkpoint, compare the tensors' headers with the settings and the rank table, and print
    a table of the findings.

    Raises:
        UserError: a checkpoint cannot be resumed from, or there is none.
    """
    no_overrides(rest)
    check_run_folder(arguments.run)
    checkpoints, left = examine(arguments.run)
    if checkpoints or left:
        console(width=240).print(_table([*checkpoints, *left]))
    if not checkpoints:
        raise UserError(f"{arguments.run} holds no checkpoint; train it first")
    bad = [finding.folder.name for finding in checkpoints if not finding.resumable]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(checkpoints)} checkpoints of {arguments.run} cannot be resumed from: "
            f"{', '.join(bad)}; restore them from a copy, or remove them"
        )


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("step", "state", "resumable", "ephemeral"):
        table.add_column(heading)
    for heading in ("files", "size"):
        table.add_column(heading, justify="right")
    table.add_column("problem", overflow="fold")
    for finding in findings:
        table.add_row(
            finding.folder.name,
            finding.state,
            "yes" if finding.resumable else "no",
            {True: "yes", False: "no", None: "-"}[finding.ephemeral],
            str(finding.files),
            f"{finding.bytes / 1e6:.1f} MB",
            Text(_problem(finding)),  # as Text, because a file name may contain rich markup
        )
    return table


def _problem(finding: Finding) -> str:
    """The problem without the path of the folder, which is already in the row."""
    return finding.problem.replace(f"{finding.folder}/", "").replace(str(finding.folder), "it")
