"""The image: really built on a Debian made here, its command really run; and launch/container.sh with a real podman."""

import ast
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_tools import LAUNCH, ROOT, Program, job_config, require, require_privilege, wait_until

from inrank_dist.train.checkpoint import list_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200), pytest.mark.xdist_group("image")]

SHORT = [
    "--train.steps=8", "--lowrank.interval=2", "--lowrank.warmup_steps=6", "--schedule.warmup_steps=2",
    "--data.max_bytes=200000", "--tokenizer.vocab_size=400", "--checkpoint.interval=0",
]  # fmt: skip
"""The quickstart in seconds: two growths and the freeze."""


class Builder:
    """buildah with a storage of its own, in ``folder``, which podman sees as well."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "TMPDIR": str(folder),  # RUN --mount=type=cache is kept below it
        }
        # Overlays do not lie upon overlays, as where this itself runs in a container.
        words = [
            "buildah",
            "--root",
            folder / "try",
            "--runroot",
            folder / "run",
            "--storage-driver",
            "overlay",
            "info",
        ]
        overlays = subprocess.run(words, capture_output=True, timeout=60).returncode == 0
        (folder / "storage.conf").write_text(
            f'[storage]\ndriver = "{"overlay" if overlays else "vfs"}"\n'
            f'graphroot = "{folder / "storage"}"\nrunroot = "{folder / "run"}"\n'
        )
        # podman raises the limits unless it is told others, which a container may not. Neither systemd nor, with runc,
        # one version of cgroups is needed.
        limits = {
            name: min(4096, resource.getrlimit(number)[1] % 2**63)
            for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC))
        }
        ulimits = [f"{name}={value}:{value}" for name, value in limits.items()]
        (folder / "containers.conf").write_text(
            f"[containers]\ndefault_ulimits = {json.dumps(ulimits)}\n"
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )

    def call(self, *words: Any, check: bool = True, timeout: float = 900) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            ["buildah", *map(str, words)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
        )
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return done

    def build(self, tag: str, context: Path) -> str:
        """Build the Dockerfile of a folder, with wheels from where this machine has them; the log."""
        words = ["--tag", tag, "--build-arg", "BASE=localhost/base"]
        settings = pip_settings()
        for name in {"index-url", "extra-index-url", "find-links", "trusted-host", "cert"} & set(settings):
            value = settings[name]
            if name == "cert":
                words += ["--volume", f"{value}:/machine.pem:ro"]  # at its own place Debian's packages write
                value = "/machine.pem"
            for word in value.split():
                place = Path(word.removeprefix("file://"))
                if place.is_dir():
                    place = place.parent if word.startswith("file://") else place  # an index names files beside it
                    words += ["--volume", f"{place}:{place}:ro"]
            words += ["--build-arg", f"PIP_{name.replace('-', '_').upper()}={value}"]
        done = self.call("bud", "--isolation", "chroot", "--layers", *words, context)
        return done.stdout + done.stderr

    def close(self) -> None:
        """Leave nothing: no container, no mount, no file."""
        if shutil.which("podman"):
            subprocess.run(["podman", "rm", "--all", "--force"], env=self.environment, capture_output=True, timeout=120)
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", mount], check=True, timeout=60)
        shutil.rmtree(self.folder)


class Image:
    """The built image, and a container of it in which commands run (chroot isolation)."""

    def __init__(self, builder: Builder, name: str, log: str) -> None:
        self.builder, self.name, self.log = builder, name, log
        said = json.loads(builder.call("inspect", "--type", "image", name).stdout)["OCIv1"]
        self.config, self.layers = said["config"], said["rootfs"]["diff_ids"]
        self.container = builder.call("from", name).stdout.strip()

    def run(
        self, *words: Any, volumes: dict[Path, str] | None = None, user: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """What ``docker run IMAGE WORDS`` does: the entry point of the image and the words, or else its command."""
        options = ["--isolation", "chroot", *(["--user", user] if user else [])]
        for there, inside in (volumes or {}).items():
            options += ["--volume", f"{there}:{inside}"]
        entry = self.config.get("Entrypoint") or []
        return self.builder.call("run", *options, self.container, "--", *entry, *words, check=False, timeout=300)


def pip_settings() -> dict[str, str]:
    """Where this machine's pip takes wheels from: its options, by name."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in sorted(
        done.stdout.splitlines(), key=lambda line: line.startswith(":env:")
    ):  # variables have the last word
        name, _, value = line.partition("=")
        settings[name.removeprefix(":env:").rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def stand_in_base(builder: Builder) -> None:
    """``localhost/base``: the Debian (or Ubuntu) of this machine, from its own mirror, without Python."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release["VERSION_CODENAME"].strip('"')
    words = ["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    targets = [
        line.split() for line in subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    mirror = next(uri for name, _, uri in targets if name == suite)
    components = {component for name, component, uri in targets if (name, uri) == (suite, mirror)}
    base = builder.folder / "base"
    done = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--components={','.join(sorted(components))}", suite, base, mirror],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    settings = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    kept = [line for line in settings.splitlines() if line.startswith(("Acquire::http", "Acquire::Check"))]
    (base / "etc/apt/apt.conf.d/99machine").write_text("\n".join(kept) + "\n")
    archive = builder.folder / "base.tar"  # an archive keeps its owners; a folder would become root's
    subprocess.run(["tar", "-C", base, "--exclude=./dev/*", "-cf", archive, "."], check=True, timeout=120)
    shutil.rmtree(base)
    container = builder.call("from", "scratch").stdout.strip()
    builder.call("add", "--quiet", container, archive, "/")
    builder.call("commit", "--quiet", "--rm", container, "localhost/base")
    archive.unlink()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The Dockerfile of this checkout, built."""
    require("debootstrap", "buildah", packages="debootstrap buildah")
    require_privilege("unshare", "--mount", "true", what="mounts, which debootstrap and buildah need")
    require_privilege("chroot", "/", "true", what="chroot, which debootstrap and buildah need")
    builder = Builder(tmp_path_factory.mktemp("image"))
    try:
        stand_in_base(builder)
        source = builder.folder / "source"  # as it is now: a checkout may change while its image is built
        source.mkdir()
        for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy2(ROOT / name, source)
        for name in ("inrank_dist", "configs", "launch"):
            shutil.copytree(ROOT / name, source / name)
        yield Image(builder, "localhost/inrank", builder.build("localhost/inrank", source))
    finally:
        builder.close()


def owned_folder(folder: Path, user: int) -> Path:
    """A folder of this user which he reaches; pytest's are for their owner alone."""
    folder.mkdir()
    os.chown(folder, user, user)
    return folder


@pytest.mark.nightly
def test_the_first_command_trains_as_an_ordinary_user(image: Image, tmp_path: Path) -> None:
    """The image's own command, user, folder and variables: all of the quickstart, with nothing left to install."""
    assert image.config["User"] == "1000:1000"
    assert image.config["Cmd"] == ["/inrank/launch/quickstart.sh"]
    runs = owned_folder(tmp_path / "runs", 1000)
    done = image.run(*image.config["Cmd"], *SHORT, volumes={runs: "/inrank/runs"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Making the environment" not in done.stdout
    for said in ("on 2 processes (cpu, fsdp", "grow: mean rank", "freeze: mean rank"):
        assert said in done.stdout
    sample = done.stdout.partition("== A sample")[2].splitlines()
    assert sample[1].startswith("def ") and sample[-1].startswith("== Done. Report: ")
    run = runs / "quickstart"
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.name == "step-00000008" and (checkpoint / "complete").is_file()
    assert [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()].count("summary") == 1
    assert "<html" in (run / "report.html").read_text()
    assert {(file.stat().st_uid, file.stat().st_gid) for file in run.rglob("*")} == {(1000, 1000)}


@pytest.mark.nightly
def test_any_other_command_and_any_user(image: Image, tmp_path: Path) -> None:
    """A user whom the image does not know trains from a config and to a folder of his own."""
    assert "inrank_dist 0." in image.run("inrank", "--version").stdout
    assert image.run("bash", "-c", "id -u; id -g; pwd; exit 7").stdout == "1000\n1000\n/inrank\n"
    assert image.run("bash", "-c", "exit 7").returncode == 7
    mistake = image.run("inrank", "trane")
    assert mistake.returncode == 2 and "error: " in mistake.stderr
    folder = owned_folder(tmp_path / "own", 4321)
    words = ["-n", "2", "train", "--config", "/inrank/configs/quickstart.yaml", "--run.dir", "/own/run"]
    done = image.run(
        "launch/torchrun.sh", *words, *SHORT, "--parallel.engine=ddp", volumes={folder: "/own"}, user="4321:4321"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 2 processes (cpu, ddp" in done.stdout
    assert len(list_checkpoints(folder / "run")) == 1
    assert {file.stat().st_uid for file in folder.rglob("*")} == {4321}


@pytest.mark.nightly
def test_what_is_inside(image: Image) -> None:
    """The project and its libraries, pinned: no tests, no history, no caches, nothing that belongs to the user."""
    script = (
        "import json, os\n"
        "from importlib.metadata import distributions\n"
        "from pathlib import Path\n"
        "size = sum(os.lstat(os.path.join(f, n)).st_size for f, _, names in os.walk('/opt/venv') for n in names)\n"
        "mine = [str(p) for top in ('/opt/venv', '/inrank') for p in Path(top).rglob('*') if p.lstat().st_uid]\n"
        "found = {d.name.lower().replace('_', '-'): d.version for d in distributions()}\n"
        "seen = sorted(p.name for p in Path('/inrank').iterdir())\n"
        "cached = [str(p) for p in (Path('/var/cache/apt/archives').glob('*.deb'))]\n"
        "print(json.dumps([size, mine, found, seen, cached]))\n"
    )
    done = image.run("python", "-c", script)
    assert done.returncode == 0, done.stderr
    size, owned, found, seen, cached = json.loads(done.stdout)
    assert seen == ["LICENSE", "README.md", "configs", "launch", "pyproject.toml", "runs"]
    assert owned == [] and cached == []
    assert image.run("ls", "/root/.cache", user="0:0").returncode == 2
    pinned = [line for line in (LAUNCH / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert found.pop("torch").partition("+")[0] == dict(line.split("==") for line in pinned)["torch"]
    ours = {f"{name}=={version}" for name, version in found.items()} - {f"inrank-dist=={found['inrank-dist']}"}
    assert {name for name in ours - set(pinned) if not name.startswith(("nvidia-", "triton", "cuda-"))} == {
        f"pip=={found['pip']}"
    }
    images = json.loads(image.builder.call("images", "--json", image.name).stdout)
    print(f"image {images[0]['size']}, of it libraries {size / 2**20:.0f} MiB")


@pytest.mark.nightly
def test_a_change_of_source_leaves_the_libraries_in_the_cache(image: Image, tmp_path: Path) -> None:
    """The big layer is the very same; what follows it is new, and so is what runs."""
    source = shutil.copytree(image.builder.folder / "source", tmp_path / "source")
    (source / "inrank_dist/__init__.py").write_text('__version__ = "7.7.7"\n')
    changed = Image(image.builder, "localhost/changed", image.builder.build("localhost/changed", source))
    assert "Successfully uninstalled inrank_dist" in image.log  # the step of the libraries says so
    assert "Successfully uninstalled inrank_dist" not in changed.log
    assert changed.layers[:3] == image.layers[:3]  # the base, its packages, the libraries
    assert changed.layers[3] != image.layers[3]
    assert changed.run("inrank", "--version").stdout == "inrank_dist 7.7.7\n"


@pytest.fixture(scope="module")
def podman(image: Image) -> dict[str, str]:
    """The environment for a podman that knows the image."""
    require("podman", "runc", packages="podman runc")
    environment = [
        f"{name}={value}" for name, value in image.builder.environment.items() if name.startswith("CONTAINERS_")
    ]
    words = ["podman", "run", "--rm", "--network", "host", image.name, "true"]
    require_privilege("env", *environment, *words, what="containers")
    return image.builder.environment


@pytest.mark.nightly
def test_docker_stop_makes_the_first_command_save(podman: dict[str, str], image: Image, tmp_path: Path) -> None:
    """As process 1, in an image that cannot be written and without a network. SIGTERM is what `docker stop` sends."""
    runs = owned_folder(tmp_path / "runs", 1000)
    words = ["podman", "run", "--rm", "--name", "stopped", "--read-only", "--tmpfs", "/tmp", "--env", "HOME=/tmp"]
    words += ["--network", "none", "--volume", f"{runs}:/inrank/runs", image.name, *image.config["Cmd"]]
    job = Program([*words, *SHORT, "--train.steps=100000", "--log.interval=1"], tmp_path / "output", podman)
    try:
        wait_until(lambda: " 3/100000" in job.text or job.process.poll() is not None, 120, lambda: job.text)
        done = subprocess.run(["podman", "stop", "--time", "100", "stopped"], env=podman, timeout=120)
        assert done.returncode == 0
        assert job.wait(120) == 75, job.text
    finally:
        job.end()
    assert "stopped; the same command goes on from there" in job.text
    assert len(list_checkpoints(runs / "quickstart")) == 1


@pytest.mark.nightly
def test_container_sh_trains_here_and_passes_signals_on(
    podman: dict[str, str], image: Image, corpus: Path, tmp_path: Path
) -> None:
    """Paths are those of outside; the network is this machine's; a variable comes through; a signal stops all."""
    job_config(corpus, tmp_path, run__dir=Path("here"), train__steps=100_000, data__cache_dir=str(corpus / "cache"))
    environment = podman | {
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "INRANK_VENV": "/no",
    }
    script = ["env", "-C", tmp_path, LAUNCH / "container.sh", "-e", "podman", "-i", image.name, "-d", corpus]
    job = Program([*script, "-n", 2, "train", "--config", "config.yaml"], tmp_path / "output", environment)
    try:
        wait_until(lambda: " 3/100000" in job.text or job.process.poll() is not None, 120, lambda: job.text)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(120) == 75, job.text
    finally:
        job.end()
    assert "on 2 processes (cpu, fsdp" in job.text
    assert "GLOO_SOCKET_IFNAME lo (given)" in job.text
    (checkpoint,) = list_checkpoints(tmp_path / "here")
    done = subprocess.run(
        [str(word) for word in (*script, "verify", "--run", "here")], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and checkpoint.name in done.stdout, done.stdout + done.stderr


def script_here(folder: Path, engines: list[str], gpus: int) -> dict[str, str]:
    """An environment whose PATH has these engines, which say how they were called, and so many GPUs."""
    bodies = dict.fromkeys(engines, 'echo "$(basename "$0")" "$@"') | {"nvidia-smi": f"seq {gpus}"}
    tools = folder / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "sed", "grep", "id", "mkdir", "env", "basename", "seq"):
        (tools / name).symlink_to(shutil.which(name) or name)
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod((tools / name).stat().st_mode | stat.S_IXUSR)
    return {"PATH": str(tools), "HOME": str(folder), "NCCL_DEBUG": "INFO", "INRANK_VENV": "/no", "UNKNOWN": "1"}


@pytest.mark.parametrize(
    ("engines", "gpus", "words", "says"),
    [
        (["docker", "podman"], 2, [], ["docker run ", " --gpus all ", " --network host ", " --ipc host "]),
        (
            ["docker", "podman"],
            2,
            ["-e", "podman"],
            ["podman run ", " --device nvidia.com/gpu=all ", " label=disable "],
        ),
        (["podman"], 0, [], ["podman run ", f" --user {os.getuid()}:{os.getgid()} ", " --env NCCL_DEBUG "]),
        (["apptainer"], 2, [], ["apptainer exec ", " --nv ", " inrank_dist.sif /inrank/launch/torchrun.sh "]),
        (["docker"], 0, ["-i", "mine:1"], [" mine:1 /inrank/launch/torchrun.sh "]),
    ],
)
@pytest.mark.parametrize("printed", [False, True], ids=["run", "printed"])
def test_words_for_the_engines(
    tmp_path: Path, engines: list[str], gpus: int, words: list[str], says: list[str], printed: bool
) -> None:
    """Engines and GPUs that are not on a test machine. What -p prints is what is run."""
    environment = script_here(tmp_path, engines, gpus)
    command = [LAUNCH / "container.sh", *words, *(["-p"] if printed else []), "-d", "/usr", "-N", "2", "-m", "node1"]
    done = subprocess.run(
        [*map(str, command), "train", "--config", "my.yaml"], env=environment, cwd=tmp_path, capture_output=True,
        text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    for said in (*says, str(tmp_path), "/usr", " -N 2 -m node1 train --config my.yaml"):
        assert said in line
    for never in ("INRANK_VENV", "UNKNOWN", *(() if gpus else ("--gpus", "nvidia.com"))):
        assert never not in line


@pytest.mark.parametrize(
    ("engines", "words", "says"),
    [
        (
            [],
            "train",
            "error: no docker, podman or apptainer on PATH; install one, or use launch/torchrun.sh without a container",
        ),
        (["docker"], "", "error: no command; write "),
        (["docker"], "-i", "error: -i lacks its value; see "),
        (["docker"], "-x train", "error: -x is not an option of "),
        (["docker"], "-d /no/such train", "error: -d is /no/such; write a folder that exists"),
        (
            ["docker"],
            "-e podman train",
            "error: -e is podman, which is not on PATH; leave -e out to use one that is",
        ),
        (["docker"], "-e lxc train", "error: -e is lxc; write docker, podman or apptainer"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, engines: list[str], words: str, says: str) -> None:
    environment = script_here(tmp_path, engines, 0)
    done = subprocess.run(
        [str(LAUNCH / "container.sh"), *words.split()], env=environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(says)


def test_help_says_how_it_is_called() -> None:
    done = subprocess.run([LAUNCH / "container.sh", "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "Usage: launch/container.sh [-i IMAGE]" in done.stdout
    assert "set -euo" not in done.stdout
