"""A real Slurm cluster on this machine: munged, slurmctld and a slurmd for each node, in one temporary folder.

Everything is the cluster's own (configuration, keys, ports, process ids), so it neither needs systemd nor
disturbs another cluster on the same machine. The nodes share the host: 127.0.0.1 is the address of all,
and their names, as on some real clusters, mean nothing to the resolver.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.support.distributed import pytest_worker

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
NODE_VARIABLE = "BOV_TEST_NODE"
"""In the environment of a slurmd and of the steps that it starts."""
# Jobs leave the queue with one of these.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")

SLURM_CONF = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
SlurmdTimeout={slurmd_timeout}
AuthType=auth/munge
# A requeued job waits until its credentials have expired: two minutes, unless told otherwise.
AuthInfo=socket={munge}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups and no systemd: this must work inside a container.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
# The nodes claim what the tests need, whatever the machine has.
SlurmdParameters=config_overrides
KillWait=20
MinJobAge=3600
# Ports of training follow from the number of its job: another cluster on this machine has others.
FirstJobId={first_job}
SchedulerParameters=batch_sched_delay=0,sched_interval=1
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE_CONF = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 State=UNKNOWN"


class ClusterUnavailable(RuntimeError):
    """No Slurm can be had on this machine; the message says what is missing."""


def install_slurm() -> None:
    """Install Debian's Slurm packages where they are missing (some 20 s).

    Raises:
        ClusterUnavailable: not root, no apt-get, or apt-get failed.
    """
    if os.geteuid() != 0:
        raise ClusterUnavailable("a Slurm cluster of one's own needs root")
    if all(shutil.which(program) for program in DAEMONS):
        return
    if not shutil.which("apt-get"):
        raise ClusterUnavailable("Slurm is not installed, and there is no apt-get to install it with")
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        run = subprocess.run(["apt-get", "-qq", *arguments], env=environ, capture_output=True, text=True)
        if run.returncode != 0:
            raise ClusterUnavailable(f"apt-get {' '.join(arguments)} failed: {run.stderr.strip()[-500:]}")


class SlurmCluster:
    """Start with `with SlurmCluster() as cluster:`; leaving the block ends every process that it started.

    Args:
        nodes: how many; they are called node1, node2, …
        slurmd_timeout: seconds without an answer after which Slurm takes a node for dead (its own default is 300).
    """

    def __init__(self, nodes: int = 2, slurmd_timeout: int = 300) -> None:
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.slurmd_timeout = slurmd_timeout
        # Short and world-readable: munged refuses a socket in a private folder, and a socket's path is limited.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.config = self.folder / "slurm.conf"
        self.environ = {
            # Not from inside another job, and no PATH without sbin: daemons live there.
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(self.config),
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/bin:/bin",
        }
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._daemons:
                subprocess.run(["scancel", "--user=root"], env=self.environ, timeout=30, capture_output=True)
                self._wait(lambda: not self.command("squeue", "--noheader").strip(), 30)
        except (OSError, subprocess.SubprocessError, TimeoutError):
            pass  # what is left is ended below
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *arguments: str, check: bool = True, **environ: str) -> str:
        """Output of a Slurm command. Raises CalledProcessError with Slurm's message."""
        run = subprocess.run(
            arguments, env=self.environ | environ, capture_output=True, text=True, timeout=60, check=False
        )
        if check and run.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: exit {run.returncode}\n{run.stdout}{run.stderr}")
        return run.stdout

    def submit(self, *arguments: str, cwd: Path, **environ: str) -> int:
        """`sbatch` in `cwd`; the job's number. Raises RuntimeError where Slurm refuses the job."""
        run = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            cwd=cwd,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if run.returncode != 0:
            raise RuntimeError(f"sbatch {' '.join(arguments)}: {run.stderr.strip()}")
        return int(run.stdout.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        words = self.command("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_end(self, number: int, timeout: float) -> dict[str, str]:
        """The job's fields once it has ended. Raises TimeoutError with its log after `timeout` seconds."""
        try:
            self._wait(lambda: self.job(number)["JobState"] in ENDED, timeout)
        except TimeoutError:
            raise TimeoutError(f"job {number} did not end in {timeout:.0f} s\n{self.log(number)}") from None
        return self.job(number)

    def log(self, number: int) -> str:
        """What the job has printed so far."""
        path = Path(self.job(number)["StdOut"])
        return path.read_text(errors="replace") if path.is_file() else f"no log at {path}"

    def processes(self) -> list[int]:
        """Processes that belong to this cluster: daemons, steps and tasks carry its folder in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if str(self.folder).encode() + b"/" in text:
                    found.append(int(entry.name))
        return found

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, also once more after `kill_node`."""
        self._daemon("slurmd", "-D", "-N", name, "-f", str(self.config), **{NODE_VARIABLE: name})

    def kill_node(self, name: str) -> int:
        """`kill -9` of a node's slurmd, its steps and all their processes, as if its power had gone; how many."""
        marks = [f"{variable}={name}\0".encode() for variable in (NODE_VARIABLE, "SLURMD_NODENAME")]
        killed = 0
        for process in self.processes():
            with contextlib.suppress(OSError):
                if any(mark in Path(f"/proc/{process}/environ").read_bytes() for mark in marks):
                    os.kill(process, signal.SIGKILL)
                    killed += 1
        return killed

    def node_state(self, name: str) -> str:
        """What `sinfo` says of a node: idle, mixed, down*, …"""
        return self.command("sinfo", "--noheader", f"--nodes={name}", "--format=%T").split()[0]

    def _start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o755)
        (self.folder / "state").mkdir()
        (munge / "munge.key").write_bytes(os.urandom(1024))
        (munge / "munge.key").chmod(0o400)
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        nodes = [
            NODE_CONF.format(name=name, host=host, port=port) for name, port in zip(self.nodes, ports, strict=True)
        ]
        self.config.write_text(
            SLURM_CONF.format(
                name=f"test{os.getpid()}",
                host=host,
                folder=self.folder,
                munge=munge,
                controller_port=controller_port,
                slurmd_timeout=self.slurmd_timeout,
                first_job=1 + 100 * pytest_worker(),
                nodes="\n".join(nodes),
            )
        )
        self._daemon(
            "munged",
            "--foreground",
            "--force",  # of its complaints about folders only warnings remain: /tmp is world-writable
            f"--socket={munge}/munge.socket",
            f"--key-file={munge}/munge.key",
            f"--pid-file={munge}/munged.pid",
            f"--log-file={munge}/munged.log",
            f"--seed-file={munge}/munged.seed",
        )
        self._wait((munge / "munge.socket").exists, 20)
        self._daemon("slurmctld", "-D", "-f", str(self.config))
        for node in self.nodes:
            self.start_node(node)
        self._wait(self._all_idle, 60)

    def _daemon(self, *command: str, **environ: str) -> None:
        """In the foreground of a session of its own: no fork to lose track of, no Ctrl-C meant for pytest."""
        with (self.folder / f"{command[0]}.out").open("ab") as output:
            process = subprocess.Popen(
                command,
                env=self.environ | environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
            )
        self._daemons.append(process)

    def _all_idle(self) -> bool:
        for daemon in self._daemons:
            if daemon.poll() is not None:
                logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.folder.rglob("*.out"))
                raise RuntimeError(f"{daemon.args[0]} ended with {daemon.returncode}\n{logs}")
        states = self.command("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def _wait(self, condition, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm: not ready after {timeout:.0f} s")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on. All are held until all are known, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
