"""A real Slurm on this machine: its own munged, a controller and two nodes, each killed with all that it started."""

import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import psutil
from cluster_tools import ROOT, Program, free_port, launch_environment, require, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel", "salloc")
NODES = ("n1", "n2")

REAPER = """
import ctypes, os, signal, subprocess, sys
import psutil

def end(*_):
    me = psutil.Process()
    while below := [each for each in me.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]:
        for process in below:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
    os._exit(0)

signal.signal(signal.SIGTERM, end)
prctl = ctypes.CDLL(None).prctl
prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
prctl(1, int(signal.SIGTERM), 0, 0, 0)  # PR_SET_PDEATHSIG: the tests were killed
child = subprocess.Popen(sys.argv[1:])
while os.wait()[0] != child.pid:
    pass
end()
"""
"""slurmd's job steps leave it as daemons; this parent they fall to, and it ends, by SIGKILL, all that is below it."""

SETTINGS = """
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
KillWait=10
SchedulerParameters=sched_interval=2,sched_min_interval=1000000,bf_interval=2,batch_sched_delay=1
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=1000 Gres=gpu:h100:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=1000 Gres=gpu:h100:2
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=n1,n2 MaxTime=INFINITE State=UP
"""


class Slurm:
    """Partitions ``cpu`` (the default) and ``gpu``, both of the nodes n1 and n2. ``close`` leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        require(*PROGRAMS, packages="slurm-wlm munge")
        self._folder = folder
        self._programs: dict[str, Program] = {}
        (folder / "state").mkdir(parents=True)
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        ports = {name: free_port() for name in ("port", *NODES)}
        (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, host=socket.gethostname(), **ports))
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu Type=h100 File={folder}/gpu[0-1]\n")
        around = launch_environment().items()
        self.environment = {key: value for key, value in around if not key.startswith(("SLURM", "SBATCH"))}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        try:
            names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            options = [f"--{option}={folder}/munge.{name}" for option, name in names.items()]
            # --force: in a container, folders above may be open to others.
            self._start("munged", "munged", "--foreground", "--force", *options)
            wait_until((folder / "munge.socket").exists, 60, self.logs)
            self._start("slurmctld", "slurmctld", "-D")
            for node in NODES:
                self._start(node, "slurmd", "-D", "-N", node)
            for node in NODES:
                self._wait_for_node(node)
        except BaseException:
            self.close()
            raise

    def start_node(self, node: str) -> None:
        """Start a node that was killed; it may be used when this returns."""
        self._start(node, "slurmd", "-D", "-N", node)
        self._wait_for_node(node)

    def kill_node(self, node: str) -> None:
        """SIGKILL to the node's slurmd and to all that it runs."""
        self._kill(self._programs.pop(node))

    def processes(self, node: str, words: str) -> list[psutil.Process]:
        """What a node runs, of which the command line has the words."""
        below = psutil.Process(self._programs[node].process.pid).children(recursive=True)
        return [process for process in below if words in _command_line(process)]

    def run(self, *words: object) -> "subprocess.CompletedProcess[str]":
        """A command of this Slurm, or one that uses it."""
        command = [str(word) for word in words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=150, cwd=ROOT)

    def facts(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        assert shown.returncode == 0, shown.stderr
        return dict(re.findall(r"(\S+?)=(\S*)", shown.stdout))

    def wait_for(self, job: str, timeout: float, what: Callable[[], object], *states: str) -> dict[str, str]:
        """The facts when the job is in one of the states; without: when it has ended for good.

        Slurm holds a requeued job back for two minutes, so that nothing of its last start is left; a few do here.
        """

        def there() -> dict[str, str] | None:
            facts = self.facts(job)
            state = facts["JobState"]
            if state in states or (not states and state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")):
                return facts
            if facts["Reason"] == "BeginTime" and facts["EligibleTime"] > _in_seconds(20):
                self.run("scontrol", "update", f"JobId={job}", f"StartTime={_in_seconds(6)}")
            return None

        return dict(wait_until(there, timeout, lambda: f"{self.facts(job)}\n{what()}\n{self.logs()}"))

    def logs(self) -> str:
        """The last lines of all programs, for a failure."""
        return "\n".join(f"{name}:\n{program.text[-2000:]}" for name, program in self._programs.items())

    def close(self) -> None:
        for name in reversed(list(self._programs)):
            self._kill(self._programs.pop(name))

    def _start(self, name: str, *words: str) -> None:
        output = self._folder / f"{name}.log"
        self._programs[name] = Program([sys.executable, "-c", REAPER, *words], output, self.environment)

    def _wait_for_node(self, node: str) -> None:
        words = ("sinfo", "--noheader", "--partition", "cpu", "--nodes", node, "--format", "%T")
        wait_until(lambda: self.run(*words).stdout.strip() == "idle", 90, self.logs)

    def _kill(self, program: Program) -> None:
        program.process.terminate()
        program.wait(60)
        program.end()


def _in_seconds(seconds: float) -> str:
    """A time to come, as Slurm writes it."""
    return f"{datetime.now() + timedelta(seconds=seconds):%FT%T}"


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
