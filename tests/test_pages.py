"""The pages of the project: every command, code block and link in them works; the README is short.

Here commands are parsed by the program that they are for. ``test_pages_run.py`` runs those that can run anywhere.
"""

import argparse
import functools
import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pages
import pytest
from pages import PAGES, ROOT, Block

from inrank_dist.commands.common import no_overrides
from inrank_dist.commands.main import COMMANDS, Parser
from inrank_dist.config import load_config
from inrank_dist.data import check_batch_sizes
from inrank_dist.launcher import deepspeed_job, torchrun_job
from inrank_dist.runtime.errors import UserError
from inrank_dist.study import read_study
from inrank_dist.theory import EXPERIMENTS

PLAIN = "model: {num_layers: 2, num_heads: 2, hidden_size: 32, max_seq_len: 16}\n"
"""The model of YAML blocks that have none."""

GPUS = 8
"""Of each node in the commands of the pages."""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of the pages are given: the project's folders, and a my.yaml and hosts of the user."""
    for name in ("configs", "launch", "tests", "pyproject.toml", "Dockerfile"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in pages.own_configs().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_inrank(argv: list[str]) -> None:
    """Parse a command with its own parser; settings are checked as ``train`` checks them."""
    if not argv or argv == ["--help"]:
        return
    name, *rest = argv
    assert name in COMMANDS, f"there is no command {name}"
    module = importlib.import_module(f"inrank_dist.commands.{name}")
    parser = Parser(prog=f"inrank {name}", allow_abbrev=False)
    module.add_arguments(parser)
    if hasattr(module, "complete"):
        rest = module.complete(rest)
    try:
        arguments, overrides = parser.parse_known_args(rest)
    except SystemExit as end:  # --help
        assert end.code == 0
        return
    if hasattr(arguments, "config"):
        load_config(arguments.config, overrides)
    else:
        no_overrides(overrides)
    if name == "study":
        check_study(arguments.file.resolve())
    if name == "theory":
        assert arguments.name in (None, *EXPERIMENTS)


@functools.cache  # it takes a second
def check_study(file: Path) -> None:
    read_study(file)


def check_script(words: list[str]) -> None:
    """A script of launch/ with options that its help names; the command after them is checked as well."""
    script, *rest = words
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if script == "launch/torchrun.sh" and rest and rest != ["--help"]:
        return check_inrank(torchrun_job.read_job(rest).command)
    if script == "launch/deepspeed.sh" and rest:
        return check_deepspeed(rest)
    if script == "launch/test.sh":
        return check_pytest(rest)
    if script == "launch/bench-gpu.sh":
        return check_inrank(["bench", *rest])
    if script == "launch/container.sh" and rest:
        rest = [word for word in rest if word not in ("-p", "--help")]
        return check_inrank(torchrun_job.read_job(rest).command) if rest else None
    own, _, arguments = rest, None, []
    if "--" in rest:
        own, arguments = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    known = the_help_of(script)
    for option in own:
        assert not option.startswith("-") or re.search(rf"{option}\b", known), f"{script} has no option {option}"
    load_config("my.yaml", arguments)
    return None


def the_help_of(script: str) -> str:
    """What ``script --help`` prints; slurm.sbatch, which only a job runs, takes options of slurm.sh."""
    if script.endswith(".sbatch"):
        script = "launch/slurm.sh"
    done = subprocess.run([ROOT / script, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + "--help"


def check_deepspeed(words: list[str]) -> None:
    """Hosts of a page do not resolve: those of the file stand for them."""
    words = ["localhost" if word == "node1" else word for word in words]
    if "-n" not in words or "-f" in words:
        command = words[next(i for i, word in enumerate(words) if word == "train") :]
        return check_inrank(command)
    return check_inrank(deepspeed_job.read_job(words).command)


def check_pytest(words: list[str]) -> None:
    """The marks are those of pyproject.toml."""
    marks = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if "-m" in words:
        assert set(re.findall(r"\w+", words[words.index("-m") + 1])) <= {*marks, "not", "or", "and"}


def check_pip(words: list[str]) -> None:
    """The project with extras that it has, or packages that one of its extras has."""
    text = (ROOT / "pyproject.toml").read_text()
    assert words[0] == "install"
    for word in words[1:]:
        if word == "-e":
            continue
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        for extra in (extras[1] or "").split(",") if extras else ():
            assert not extra or re.search(rf"^{extra} = \[", text, re.MULTILINE), f"there is no extra {extra}"
        assert extras or f'"{word}' in text, f"{word} is no package of the project"


def check_docker(words: list[str]) -> None:
    """The image is built where the Dockerfile is, and runs commands of ours."""
    assert words[0] in ("build", "run")
    if words[0] == "run" and "inrank" in words:
        check_inrank(words[words.index("inrank") + 1 :])


def check_python(words: list[str]) -> None:
    """A file of the project, or a module that Python has."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"there is no module {words[1]}"
    else:
        assert (ROOT / words[0]).is_file(), f"{words[0]} does not exist"


def check_nothing(words: list[str]) -> None:
    """Programs of others, of which nothing of ours is an argument."""


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "inrank": check_inrank,
    "pip": check_pip,
    "docker": check_docker,
    "python": check_python,
    "python3": check_python,
    "sbatch": lambda words: check_script(words[words.index("launch/slurm.sbatch") :]),
    ".": lambda words: None,
    "torchrun": lambda words: check_inrank(words[words.index("inrank_dist") + 1 :] if "inrank_dist" in words else []),
    "tensorboard": check_nothing,
    "lm_eval": check_nothing,
    "scancel": check_nothing,
}
"""Program -> what checks its arguments."""


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page: str, checkout: Path) -> None:
    wrong = []
    for command in pages.commands(page):
        words = [word for word in command.words if not re.match(r"[A-Z_]+=", word)]
        try:
            if words[0].startswith("launch/"):
                check_script(words)
            elif command.inline and len(words) == 2 and words[0] == "inrank":
                assert words[1] in COMMANDS  # a sentence that names the command
            else:
                CHECKS[words[0].removeprefix(".venv/bin/")](words[1:])
        except (UserError, AssertionError, KeyError, ValueError, argparse.ArgumentError) as error:
            wrong.append(f"{command}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def process_counts(words: list[str]) -> list[int]:
    """The numbers of processes that a command plans for or starts, with ``GPUS`` on each node; empty: none."""

    def number(option: str, default: int) -> int:
        return int(words[words.index(option) + 1]) if option in words else default

    if "--config" not in words:
        return []
    if "plan" in words:
        return [number("--world-size", 1)]
    if words[0] in ("launch/torchrun.sh", "launch/container.sh"):
        job = torchrun_job.read_job([word for word in words[1:] if word != "-p"])
        return [(job.processes or GPUS) * nodes for nodes in range(job.nodes[0], job.nodes[1] + 1)]
    if "launch/slurm.sh" in words or "launch/slurm.sbatch" in words:
        return [number("--nodes", 1) * GPUS]
    if words[0] == "launch/deepspeed.sh":
        return [number("-n", 2 * GPUS)]
    return [number("--nproc-per-node", 1)]


@pytest.mark.parametrize("name", [*pages.own_configs()])
def test_the_batches_of_the_pages_fit_their_processes(name: str, checkout: Path) -> None:
    """Of every command that names a config, with the configs as they are printed; my.yaml may be any of the user's."""
    checked = 0
    for command in (command for page in PAGES for command in pages.commands(page)):
        words = command.text.replace(" my.yaml", f" {name}").split()
        for processes in process_counts(words):
            train = load_config(words[words.index("--config") + 1])[0].train
            check_batch_sizes(train.global_batch_size, train.micro_batch_size, processes)
            checked += processes > 2
    assert checked > 9


@pytest.mark.parametrize("page", PAGES)
def test_shellcheck_finds_nothing(page: str) -> None:
    """SC1091: it cannot read the environment that is activated."""
    for block in pages.blocks(page):
        if block.language == "sh":
            command = ["shellcheck", "--shell", "bash", "--exclude", "SC1091", "-"]
            done = subprocess.run(command, input=block.text, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{page}:{block.line}\n{done.stdout}"


def test_a_command_that_is_wrong_is_found(checkout: Path) -> None:
    for wrong in (
        "train --config my.yaml --trian.steps 2",
        "bench --foo 1",
        "inspect",
        "plan --config none.yaml",
        "trai",
    ):
        with pytest.raises((UserError, AssertionError)):
            check_inrank(shlex.split(wrong))
    for wrong in ("launch/slurm.sh --rum x", "launch/torchrun.sh train --config my.yaml --bogus 1", "launch/none.sh"):
        with pytest.raises((UserError, AssertionError)):
            check_script(shlex.split(wrong))
    with pytest.raises(AssertionError):
        check_pip(["install", "-e", ".[bogus]"])


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for line, target in pages.links(page):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            broken.append(f"{page}:{line} {target}")
        elif anchor and slugless(file, anchor):
            broken.append(f"{page}:{line} {target}: no such heading")
    assert not broken, "\n".join(broken)


def slugless(file: Path, anchor: str) -> bool:
    return anchor not in pages.anchors(str(file.resolve().relative_to(ROOT.resolve())))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    """Paths in code spans, such as ``tests/test_plan.py`` and ``gpt2-small-inrank.yaml`` of the page's own folder."""
    missing = []
    for found in re.finditer(
        r"`((?:tests|configs|launch|inrank_dist)/[\w./-]+\w|\w[\w-]*\.yaml)(?:::(\w+))?`", pages.prose(page)
    ):
        name = found[1]
        places = (ROOT / name, (ROOT / page).parent / name, ROOT / "configs" / name)
        file = next((place for place in places if place.exists()), None)
        if name not in ("config.yaml", "OTHER.yaml", *pages.own_configs()) and file is None:
            missing.append(name)
        elif found[2] and f"def {found[2]}(" not in file.read_text():
            missing.append(found[0])
    assert not missing, f"{page} names {', '.join(missing)}"


def test_the_readme_is_short() -> None:
    assert len(pages.read("README.md").splitlines()) < 200


def test_the_readme_lists_every_command() -> None:
    table = pages.read("README.md").partition("## Commands")[2]
    assert {*re.findall(r"^\| `inrank (\w+)", table, re.MULTILINE)} == {*COMMANDS}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for _, target in pages.links(page):
            path = target.partition("#")[0]
            file = ((ROOT / page).parent / path).resolve() if not re.match(r"https?:", target) and path else None
            if file and file.is_dir() and (file / "README.md").exists():
                file = file / "README.md"
            if file and file.suffix == ".md" and (name := str(file.relative_to(ROOT.resolve()))) not in reached:
                waiting.append(name)
    found = {
        str(file.relative_to(ROOT))
        for file in ROOT.rglob("README.md")
        if not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
    }
    assert found == {page for page in PAGES if page.endswith("README.md")} <= reached


def test_the_tables_of_settings_are_those_of_the_code() -> None:
    written = pages.read(pages.SETTINGS_PAGE).partition(pages.SETTINGS_BEGIN)
    tables = (written[1] + written[2]).lstrip("\n")
    assert tables == pages.settings_tables(), "configs/README.md is older than the settings; run python tests/pages.py"


def test_every_yaml_block_is_a_config_or_a_study(checkout: Path) -> None:
    found: list[Block] = [b for page in PAGES for b in pages.blocks(page) if b.language == "yaml"]
    assert len(found) >= 3
    for block in found:
        file = checkout / "block.yaml"
        if "variants:" in block.text:
            file.write_text(block.text.replace("base: quickstart", "base: configs/quickstart"))
            assert read_study(file)
        else:
            base = "" if block.text.startswith("base:") or "model:" in block.text else PLAIN
            file.write_text(base + block.text)
            load_config(file, [])


BLOCKS = {
    "pipeline(": "tests/test_export_crossing.py",
    "my-factors/inrank.json": "tests/test_export.py",
    "fully_shard": "tests/test_library.py",
    "Trainer(": "tests/test_pages_run.py",
    "Accelerator()": "tests/test_pages_run.py",
    "for batch in batches": "tests/test_pages_run.py",
}
"""A text of each Python block -> the test that runs it, with ``pages.python_block``."""


def test_every_python_block_is_run_by_a_test() -> None:
    for block in (b for page in PAGES for b in pages.blocks(page) if b.language == "python"):
        (test,) = (test for marker, test in BLOCKS.items() if marker in block.text)
        assert "python_block(" in (ROOT / test).read_text(), f"{block.page}:{block.line} is not run by {test}"
        compile(block.text, f"{block.page}:{block.line}", "exec")
    assert {b.language for page in PAGES for b in pages.blocks(page)} <= {"sh", "python", "yaml", "text"}
