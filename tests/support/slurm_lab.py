"""A real SLURM of several nodes on this machine: each node has its own network, host name, processes, /tmp and /dev/shm.

slurmctld and all clients live in a network namespace of their own, and a bridge joins it with those of the nodes: nothing
touches the machine's own interfaces. Needs root, slurmctld, slurmd, munged, ip, nsenter and unshare.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "munge", "ip", "nsenter", "unshare", "runuser", "sbatch")
_CONTROLLER = "ctl"


def missing() -> str:
    """What this machine lacks for such a cluster; empty when nothing."""
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(absent)} not on PATH (Debian: apt-get install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "root is needed for network namespaces"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else f"namespaces can't be made ({probe.stderr.decode().strip()})"


class SlurmLab:
    """A running cluster; `stop` ends it and all jobs.

    Args:
        folder: for what SLURM writes, in `shared`.
        shared: on the nodes at the same path, as a cluster's file system is; all else of /tmp is each node's own.
        nodes: n1 to n<nodes>, at 10.77.0.1 and on.
        gpus: H100s that each node claims to have.
    """

    def __init__(self, folder: Path, *, shared: Path, nodes: int, gpus: int = 8) -> None:
        self.folder = folder
        self._shared = shared
        self._root = folder / "slurm"
        self._prefix = f"lab{os.getpid()}"
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._controller: subprocess.Popen[bytes] | None = None
        for name in ("etc", "state", "log", "run", "dev"):
            (self._root / name).mkdir(parents=True)
        self._write_configuration(gpus)
        self.environment: dict[str, str] = {
            **os.environ,
            "SLURM_CONF": str(self._root / "etc" / "slurm.conf"),
            "SBATCH_PARTITION": "batch",
        }

    def start(self) -> None:
        """Start the daemons; returns when all nodes are idle."""
        _start_munge()
        self._make_network()
        command = ["slurmctld", "-D"]
        self._controller = self._popen(self._inside(_CONTROLLER, command), log="slurmctld.out")
        for name in self.names:
            self.start_node(name)
        self._wait_for(lambda: self.states().count("idle") == len(self.names), 60, "nodes did not become idle")

    def stop(self) -> None:
        """Kill everything; the controller first, which would wait for lost nodes."""
        if self._controller is not None:
            _kill(self._controller)
        for name in list(self._nodes):
            self.kill_node(name)
        for name in (_CONTROLLER, *self.names):
            subprocess.run(["ip", "netns", "del", f"{self._prefix}-{name}"], capture_output=True)

    def run(self, *command: str, check: bool = True, timeout_s: float = 60, **environment: str) -> str:
        """Run a command as on a login node; its standard output."""
        done = subprocess.run(
            self._inside(_CONTROLLER, list(command)),
            env={**self.environment, **environment},
            text=True,
            capture_output=True,
            timeout=timeout_s,
            cwd=self.folder,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip() if check else (done.stdout + done.stderr).strip()

    def submit(self, *arguments: str, **environment: str) -> str:
        """`sbatch`; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, **environment)

    def job(self, number: str) -> Mapping[str, str]:
        """What SLURM says of a job."""
        text = self.run("scontrol", "-o", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: str, *states: str, timeout_s: float) -> Mapping[str, str]:
        """Wait until a job is in one of some states."""
        found: dict[str, str] = {}

        def is_there() -> bool:
            found.update(self.job(number))
            return found["JobState"] in states

        self._wait_for(is_there, timeout_s, f"job {number} is not {' or '.join(states)}", found)
        return found

    def restart_soon(self, number: str) -> None:
        """Start a requeued job after some seconds of SLURM's two minutes of patience: at once, the old steps are not gone."""
        self.run("scontrol", "update", f"jobid={number}", "StartTime=now+8")

    def wait_until_idle(self, *names: str) -> None:
        """Wait until nodes, say, one that was switched on again, take jobs; no job may be on them."""
        selected = ("--nodes", ",".join(names))

        def are_idle() -> bool:
            return set(self.run("sinfo", "-h", "-N", *selected, "-o", "%T", check=False).split()) == {"idle"}

        self._wait_for(are_idle, 90, f"{', '.join(names)}: not idle")

    def states(self) -> list[str]:
        """Of all nodes."""
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T", check=False).split()

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        spool = self._root / f"spool.{name}"
        spool.mkdir(exist_ok=True)
        shared = self._shared
        script = (
            f"mount -t tmpfs tmpfs /dev/shm; mkdir -p /mnt/shared; mount --bind {shared} /mnt/shared; "
            f"mount -t tmpfs tmpfs /tmp; chmod 1777 /tmp; mkdir -p {shared}; mount --bind /mnt/shared {shared}; "
            f"slurmd -D -N {name} & while :; do sleep 3600 & wait $!; done"
        )
        extra = ["--pid", "--fork", "--kill-child", "--mount-proc"]
        self._nodes[name] = self._popen(self._inside(name, ["bash", "-c", script], extra), log=f"{name}.out")

    def kill_node(self, name: str) -> None:
        """Cut a node's power: all its processes die at once."""
        _kill(self._nodes.pop(name))

    def on_node(self, name: str, *command: str) -> str:
        """Run a command on a node, by root and beside SLURM."""
        child = _only_child(self._nodes[name].pid)
        entered = ["nsenter", "--target", str(child), "--net", "--uts", "--mount", "--pid", "--", *command]
        return subprocess.run(entered, check=True, text=True, capture_output=True, timeout=60).stdout.strip()

    def _inside(self, name: str, command: list[str], extra: list[str] | None = None) -> list[str]:
        hosts = self._root / "etc" / "hosts"
        enter = f'hostname {name}; mount --bind {hosts} /etc/hosts; exec "$@"'
        return [
            *("nsenter", f"--net=/run/netns/{self._prefix}-{name}"),
            *("unshare", "--uts", "--mount", "--propagation", "private", *(extra or []), "--"),
            *("bash", "-c", enter, "_", *command),
        ]

    def _popen(self, command: list[str], *, log: str) -> subprocess.Popen[bytes]:
        with (self._root / "log" / log).open("ab") as file:
            return subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=self.folder
            )

    def _make_network(self) -> None:
        controller, bridge = f"{self._prefix}-{_CONTROLLER}", "bridge0"
        _ip("netns", "add", controller)
        _ip("-n", controller, "link", "set", "lo", "up")
        _ip("-n", controller, "link", "add", bridge, "type", "bridge")
        _ip("-n", controller, "addr", "add", "10.77.0.254/24", "dev", bridge)
        _ip("-n", controller, "link", "set", bridge, "up")
        for number, name in enumerate(self.names, 1):
            node = f"{self._prefix}-{name}"
            _ip("netns", "add", node)
            _ip("-n", node, "link", "set", "lo", "up")
            _ip("-n", controller, "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", node)
            _ip("-n", controller, "link", "set", f"v{number}", "master", bridge, "up")
            _ip("-n", node, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")
            # It leads nowhere; libraries take the address of the default route for their own.
            _ip("-n", node, "route", "add", "default", "via", "10.77.0.254")

    def _write_configuration(self, gpus: int) -> None:
        root, count = self._root, len(self.names)
        for number in range(gpus):
            os.mknod(root / "dev" / f"nvidia{number}", 0o020666, os.makedev(1, 3))  # as /dev/null
        names = ["127.0.0.1 localhost", f"10.77.0.254 {_CONTROLLER}"]
        names += [f"10.77.0.{number} {name}" for number, name in enumerate(self.names, 1)]
        (root / "etc" / "hosts").write_text("\n".join(names) + "\n")
        (root / "etc" / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu Type=h100 File={root}/dev/nvidia[0-{gpus - 1}]\n"
        )
        settings = {
            "ClusterName": "lab",
            "SlurmctldHost": f"{_CONTROLLER}(10.77.0.254)",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "StateSaveLocation": f"{root}/state",
            "SlurmdSpoolDir": f"{root}/spool.%n",
            "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{root}/run/slurmd.%n.pid",
            "SlurmctldLogFile": f"{root}/log/slurmctld.log",
            "SlurmdLogFile": f"{root}/log/slurmd.%n.log",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core_Memory",
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",  # or nodes that claim more than this machine has are drained
            "ReturnToService": "2",
            "EnforcePartLimits": "ALL",
            "MailProg": "/bin/true",
            "MpiDefault": "none",
            "SlurmdTimeout": "300",
            "KillWait": "5",
            "SchedulerParameters": "batch_sched_delay=0,bf_interval=1,sched_interval=1",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        span = "1" if count == 1 else f"[1-{count}]"
        lines += [
            f"NodeName=n{span} NodeAddr=10.77.0.{span} Sockets=2 CoresPerSocket=56 ThreadsPerCore=2 RealMemory=2000000 "
            f"Gres=gpu:h100:{gpus} State=UNKNOWN",
            "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefMemPerCPU=1000 State=UP",
        ]
        (root / "etc" / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _wait_for(self, is_there, timeout_s: float, message: str, found: object = "") -> None:
        deadline = time.monotonic() + timeout_s
        while not is_there():
            assert time.monotonic() < deadline, f"{message} after {timeout_s} s: {found or self.states()}"
            time.sleep(0.3)


def _start_munge() -> None:
    folder = Path("/run/munge")
    folder.mkdir(mode=0o755, exist_ok=True)
    shutil.chown(folder, "munge", "munge")
    if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode:
        subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged") or "munged"], check=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and the only child that it waits for, which for a node is its first process."""
    with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
        os.kill(_only_child(process.pid), signal.SIGKILL)
    process.kill()
    process.wait(timeout=20)


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
