"""A real SLURM of a few nodes on this machine, for tests and benchmarks: Debian's daemons, one temporary directory.

No root, no systemd, nothing in /etc or /var. Several can run at once. The first node is called as this host, so that
the name which a job looks up for its rendezvous resolves; all nodes are 127.0.0.1 and limit neither CPUs nor memory.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.parallel.parent_death import die_with_parent

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel", "slurmctld", "slurmd", "munged")

PACKAGES = "slurmctld slurmd slurm-client munge"

PARTITION = "main"

_PREFIX = "llada-slurm-"

_OWNER = "owner"

# cred_expire: a requeued job waits that long; 5 is the least that SLURM takes. MessageTimeout: a busy test machine.
# FirstJobId: jobs choose ports by their ids, which would be the same in every SLURM of this machine.
_CONFIGURATION = """\
ClusterName=llada
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
{listen}
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=0
MinJobAge=600
FirstJobId={first_job}
KillWait={kill_wait_s}
UnkillableStepTimeout=10
SlurmdTimeout=60
MessageTimeout=30
PartitionName={partition} Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""

_NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4000\n"


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that this machine lacks."""
    return [name for name in PROGRAMS if _find(name) is None]


def how_to_install(missing: list[str]) -> str:
    """The message where programs are missing."""
    return (
        f"a SLURM on this machine needs {' '.join(missing)}, not found here; Debian and Ubuntu: "
        f"apt-get install --no-install-recommends {PACKAGES}"
    )


class PrivateSlurm:
    """A SLURM cluster that lives as long as the `with` block.

    `kill_wait_s`: from SIGTERM to SIGKILL of a job that is cancelled, requeued or out of time.

    Raises (on entry):
        ResourceError: programs are missing, or the daemons did not come up; with the tails of their logs.
    """

    def __init__(self, nodes: int = 2, kill_wait_s: int = 5) -> None:
        host = socket.gethostname().split(".")[0]
        self.nodes = [host, *(f"{host}-{number}" for number in range(2, nodes + 1))]
        self.environment: dict[str, str] = {}
        """The environment of every program that speaks to this SLURM; jobs inherit its SLURM_CONF."""
        self._kill_wait_s = kill_wait_s
        self._home = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> PrivateSlurm:
        if missing := missing_programs():
            raise ResourceError(how_to_install(missing))
        _sweep_abandoned()
        try:
            self._start()
        except ResourceError:  # free ports are found by binding and closing: another program may take one in between
            self._start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> str:
        """Output of a SLURM command (stdout, stripped).

        Raises:
            ResourceError: it failed (not with `check=False`), with what it said.
        """
        result = subprocess.run(
            command, env=self.environment, cwd=self._home, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and result.returncode != 0:
            raise ResourceError(f"{' '.join(command)}: {(result.stderr or result.stdout).strip()}")
        return result.stdout.strip()

    def state(self, job: int | str) -> str:
        """State of a job in SLURM's words: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, …"""
        return self.run("squeue", "-h", "-a", "-t", "all", "-j", str(job), "-o", "%T", check=False)

    def set_node(self, node: str, state: str) -> None:
        """`scontrol update`: `down` takes a node from its jobs at once, `resume` gives it back."""
        reason = [] if state == "resume" else ["reason=test"]
        self.run("scontrol", "update", f"nodename={node}", f"state={state}", *reason)

    def processes(self, module: str, node: str | None = None) -> list[psutil.Process]:
        """Python processes of this cluster's jobs that run `-m MODULE`; on one node, or on all."""
        found = []
        for process in _members(self._home):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                python = bool(command) and Path(command[0]).name.startswith("python")  # srun carries the same words
                running = python and "-m" in command and module == command[command.index("-m") + 1]
                if running and node in (None, process.environ().get("SLURMD_NODENAME")):
                    found.append(process)
        return found

    def logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        paths = sorted([*self._home.glob("*.log"), *self._home.glob("*.out"), *self._home.glob("munge/log")])
        tails = {path: path.read_text(errors="replace").splitlines()[-lines:] for path in paths if path.is_file()}
        return "\n".join(f"--- {path.name}\n" + "\n".join(tail) for path, tail in tails.items() if tail)

    def stop(self) -> list[str]:
        """Cancel all jobs, end the daemons, remove the directory. Returns the commands that would not end by then."""
        if not self._home.name:
            return []
        self._cancel_jobs()
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        left = _kill_members(self._home)
        shutil.rmtree(self._home, ignore_errors=True)
        self._home, self.environment = Path(), {}
        return left

    def _start(self) -> None:
        try:
            self._bring_up()
        except TimeoutError as error:
            logs = self.logs()
            self.stop()
            raise ResourceError(f"the private SLURM did not start: {error}\n{logs}") from error
        except BaseException:
            self.stop()
            raise

    def _bring_up(self) -> None:
        # short, because munge's socket goes below it (108 bytes), and open to look into, which munge asks for
        self._home = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self._home.chmod(0o755)
        me = psutil.Process()
        (self._home / _OWNER).write_text(f"{me.pid} {me.create_time()}")
        for name in ("munge", "state", *(f"spool.{node}" for node in self.nodes)):
            (self._home / name).mkdir(mode=0o755)
        key = self._home / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(64))
        controller_port = self._write_configuration()
        self.environment = self._clean_environment()
        files = [f"--{name}-file={self._home}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self._spawn("munged", "munged", "-F", f"--socket={self._home}/munge/socket", *files)
        self._await(lambda: (self._home / "munge" / "socket").exists(), "munged")
        self._spawn("slurmctld", "slurmctld", "-D", "-i", "-f", str(self._home / "slurm.conf"))
        for node in self.nodes:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self._home / "slurm.conf"))
        # a client call without a controller blocks for seconds, so its port comes first
        self._await(lambda: _listens(controller_port), "slurmctld")
        self._await(lambda: set(self.run("sinfo", "-hN", "-o", "%T", check=False).split()) == {"idle"}, "the nodes")

    def _write_configuration(self) -> int:
        """slurm.conf; returns the controller's port."""
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        text = _CONFIGURATION.format(
            host=self.nodes[0],
            controller_port=controller_port,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            home=self._home,
            listen="CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if _host_is_loopback() else "",
            first_job=random.randrange(1, 50_000),
            kill_wait_s=self._kill_wait_s,
            partition=PARTITION,
            nodes=",".join(self.nodes),
        )
        nodes = "".join(_NODE.format(name=name, port=port) for name, port in zip(self.nodes, ports, strict=True))
        (self._home / "slurm.conf").write_text(text + nodes)
        return controller_port

    def _clean_environment(self) -> dict[str, str]:
        """This process's environment without what a surrounding SLURM job left in it."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SCANCEL_", "SLURMD_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self._home / "slurm.conf"), "PATH": _search_path()}

    def _spawn(self, name: str, program: str, *arguments: str) -> None:
        with (self._home / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [_find(program) or program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self._home,
                env=self.environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _await(self, ready: Callable[[], bool], what: str, limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not ready():
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise TimeoutError(f"{' '.join(dead)} ended" if dead else f"no sign of {what} within {limit_s:.0f} s")
            time.sleep(0.05)

    def _cancel_jobs(self) -> None:
        alive = [name for name, daemon in self._daemons.items() if daemon.poll() is None]
        if not {"munged", "slurmctld"} <= set(alive):
            return
        with contextlib.suppress(ResourceError, subprocess.TimeoutExpired):
            if jobs := self.run("squeue", "-h", "-o", "%A").split():
                self.run("scancel", *jobs, check=False)
            deadline = time.monotonic() + 15
            while self.run("squeue", "-h", "-o", "%A") and time.monotonic() < deadline:
                time.sleep(0.1)


def _find(program: str) -> str | None:
    return shutil.which(program, path=_search_path())


def _search_path() -> str:
    """An ordinary user's PATH often lacks the daemons' folder."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _host_is_loopback() -> bool:
    """Daemons that bind the host's own address can be reached at 127.0.0.1 only where the two are the same."""
    try:
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.5).close()
    except OSError:
        return False
    return True


def _members(home: Path) -> Iterator[psutil.Process]:
    """Living processes that carry the mark of the cluster in `home`: its daemons, steps and all that jobs started."""
    mark = str(home / "slurm.conf")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.environ().get("SLURM_CONF") == mark and process.pid != os.getpid()
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _kill_members(home: Path) -> list[str]:
    killed = []
    for process in _members(home):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            process.send_signal(signal.SIGKILL)
            killed.append(command)
    return killed


def _sweep_abandoned() -> None:
    """End what a killed owner left: its daemons went with it, its jobs did not."""
    for home in Path("/tmp").glob(f"{_PREFIX}*"):
        try:
            if home.stat().st_uid != os.geteuid():
                continue
            pid, created = (home / _OWNER).read_text().split()
            alive = psutil.Process(int(pid)).create_time() == float(created)
        except psutil.NoSuchProcess:
            alive = False
        except (OSError, ValueError):  # just being made, or removed
            continue
        if not alive:
            _kill_members(home)
            shutil.rmtree(home, ignore_errors=True)
