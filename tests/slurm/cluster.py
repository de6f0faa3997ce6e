"""A Slurm of its own on one machine: nodes with host names, addresses and GPUs that exist in name only.

Debian's slurmctld, slurmd, slurm-client and munge, as root, without systemd. Names and ports belong to this process, so
that two clusters can run side by side; everything that was started is stopped by its process id.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PORTS = 300
"""Of one cluster: the controller's, one a node, and srun's."""
READY_SECONDS = 180
"""For a daemon to come up or a query to be answered: on a busy machine many times what a quiet one takes."""
RESTING = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")

CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired, two minutes by default.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
# Messages, connections and the first process of a job take longer than the defaults allow where the machine is busy.
MessageTimeout=60
TCPTimeout=15
BatchStartTimeout=60
InactiveLimit=0
MinJobAge=3600
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SrunPortRange={srun_ports}
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """Start with `start`, end with `stop`; commands run by `run` see this Slurm alone."""

    def __init__(self, root: Path, nodes: int, gpus: int = 8) -> None:
        self.root, self.gpus = root, gpus
        self.nodes = [f"t{os.getpid()}n{n}" for n in range(1, nodes + 1)]
        self._commands: dict[str, tuple[str, ...]] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Up, all nodes idle. Raises RuntimeError with the daemons' logs where they do not come up."""
        missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch", "unshare") if not shutil.which(name)]
        if missing or os.geteuid() != 0:
            raise RuntimeError(
                f"a Slurm for the tests needs root and Debian's slurmctld slurmd slurm-client munge; missing: {missing}"
            )
        self._write_configuration()
        munge = [f"--{option}={self.root}/munge/{name}" for option, name in MUNGE.items()]
        idle = ("sinfo", "-h", "--partition=batch", "--states=idle", "--format=%D")
        try:
            self._spawn("munged", "munged", "-F", "--num-threads=2", *munge)
            self._wait_until((self.root / "munge/socket").exists, "munged")
            self._spawn("slurmctld", "slurmctld", "-D")
            self._wait_until(lambda: "is UP" in self.run("scontrol", "ping", check=False), "slurmctld")
            for node in self.nodes:
                self.start_node(node)
            self._wait_until(lambda: self.run(*idle, check=False) == str(len(self.nodes)), "nodes")
        except TimeoutError as e:
            logs = "\n".join(f"{p.name}:\n{p.read_text()[-2000:]}" for p in (self.root / "log").iterdir())
            self.stop()
            raise RuntimeError(f"Slurm did not come up: {e}\n{logs}") from None

    def _wait_until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait for a daemon, and start again what has ended: a port or a socket may have been taken for a moment."""

        def now() -> bool:
            for name, daemon in list(self._daemons.items()):
                if daemon.poll() is not None:
                    self._spawn(name, *self._commands[name])
            return ready()

        wait_for(now, READY_SECONDS, what)

    def start_node(self, node: str) -> None:
        """A slurmd in namespaces of its own, in which it has its own host name and knows the others' addresses."""
        inside = f"hostname {node} && mount --bind {self.root}/hosts /etc/hosts && exec slurmd -D -N {node}"
        self._spawn(node, "unshare", "--uts", "--mount", "sh", "-c", inside)

    def kill_node(self, node: str) -> None:
        """What a lost node looks like: its daemon and all its processes are gone at once."""
        self._daemons.pop(node).kill()
        for process in _processes():
            if process.environment.get("SLURMD_NODENAME") == node and "SLURM_JOB_ID" in process.environment:
                process.kill()

    def stop(self) -> None:
        """Jobs first, then the daemons."""
        if "slurmctld" in self._daemons:
            self.run("scancel", "--quiet", "--user=root", check=False)
            wait_for(lambda: not self.run("squeue", "-h", check=False), 60, "jobs to end", give_up=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: object, check: bool = True, **variables: object) -> str:
        """What a command of Slurm, or one that calls them, prints."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        environment |= {"SLURM_CONF": f"{self.root}/slurm.conf"} | {k: str(v) for k, v in variables.items()}
        done = subprocess.run(
            [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=180
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: status {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def ask(self, *query: object) -> str:
        """What a query prints; repeated where the controller is too busy to answer."""
        end = time.monotonic() + READY_SECONDS
        while True:
            try:
                return self.run(*query)
            except (RuntimeError, subprocess.TimeoutExpired):
                if time.monotonic() > end:
                    raise
                time.sleep(1)

    def submit(self, *words: object, **variables: object) -> str:
        """`sbatch WORDS` -> the job's number."""
        return self.run("sbatch", "--parsable", *words, **variables).partition(";")[0]

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.ask("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, seconds: float, states: Sequence[str] = RESTING) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        return wait_for(
            lambda: job if (job := self.job(number))["JobState"] in states else None, seconds, f"job {number}"
        )

    def _write_configuration(self) -> None:
        for folder in ("munge", "state", "spool", "log", "dev"):
            (self.root / folder).mkdir(parents=True)
        (self.root / "munge/key").write_bytes(os.urandom(1024))
        (self.root / "munge/key").chmod(0o400)
        for gpu in range(self.gpus):  # Slurm wants character devices; the digits become CUDA_VISIBLE_DEVICES
            os.mknod(self.root / f"dev/nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        addresses = {node: f"127.0.1.{place}" for place, node in enumerate(self.nodes, 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {node}" for node, address in addresses.items())]
        (self.root / "hosts").write_text("\n".join(lines) + "\n")
        port = _free_ports(PORTS)
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port + place} CPUs=64 RealMemory=10000 "
            f"Gres=gpu:{self.gpus} State=UNKNOWN"
            for place, (node, address) in enumerate(addresses.items(), 1)
        )
        (self.root / "slurm.conf").write_text(
            CONFIGURATION.format(
                name=f"test{os.getpid()}",
                host=socket.gethostname().partition(".")[0],
                root=self.root,
                port=port,
                srun_ports=f"{port + 50}-{port + PORTS - 1}",
                nodes=nodes,
            )
        )
        (self.root / "gres.conf").write_text(
            "".join(f"NodeName={node} Name=gpu File={self.root}/dev/nvidia[0-{self.gpus - 1}]\n" for node in self.nodes)
        )

    def _spawn(self, name: str, *command: str) -> None:
        """A daemon that ends with this process, however that ends."""
        self._commands[name] = command
        environment = {**os.environ, "SLURM_CONF": f"{self.root}/slurm.conf"}
        with (self.root / f"log/{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig=KILL", *command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


MUNGE = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}


class Process:
    """A process of this machine, by its environment."""

    def __init__(self, folder: Path) -> None:
        self.id = int(folder.name)
        words = (folder / "environ").read_bytes().split(b"\0")
        self.environment = dict(w.decode(errors="replace").split("=", 1) for w in words if b"=" in w)
        self.command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.id, number)


def _processes() -> list[Process]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append(Process(folder))
        except OSError:  # ended meanwhile
            continue
    return found


def processes_of(job: str) -> list[Process]:
    """The script of a job, its sruns and its tasks."""
    return [p for p in _processes() if p.environment.get("SLURM_JOB_ID") == job]


def ranks(job: str) -> dict[int, Process]:
    """The ranks of a job that have begun, by number: the processes that `launch/` started with RANK set."""
    return {int(p.environment["RANK"]): p for p in processes_of(job) if "RANK" in p.environment}


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on, below those that the kernel hands out."""
    first = 20000 + os.getpid() % 20 * PORTS
    for start in range(first, 32000 - count, count):
        try:
            for port in range(start, start + count, 10):
                with socket.socket() as s:
                    s.bind(("", port))
        except OSError:
            continue
        return start
    raise RuntimeError("no free range of ports")


def wait_for[T](ready: Callable[[], T], seconds: float, what: str, *, give_up: bool = True) -> T:
    end = time.monotonic() + seconds
    while not (answer := ready()):
        if time.monotonic() > end:
            if give_up:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            break
        time.sleep(0.2)
    return answer


@contextmanager
def running(nodes: int) -> Iterator[Cluster]:
    """A cluster, up until the end of the block."""
    with tempfile.TemporaryDirectory(prefix="bft-slurm-") as folder:
        Path(folder).chmod(0o755)  # munged wants its socket to be within everybody's reach
        cluster = Cluster(Path(folder), nodes)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()


def main() -> None:
    """Whether a cluster can be had here: a task on each node."""
    with running(nodes=2) as cluster:
        print(cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "uname", "-n"))


if __name__ == "__main__":
    main()
