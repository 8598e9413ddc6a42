"""One node's part of a job's Ray cluster: `python -m clipo_megatron.slurm.ray_node ATTEMPT_FOLDER [--head]`, once a node.

All ports are chosen free and below those that the system gives out; the head writes its own to ATTEMPT_FOLDER/ports, where
the other nodes and the driver find them. Ends when it is told to, or with Ray.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipo_megatron.doctor.finding import host_name
from clipo_megatron.errors import WorkerError
from clipo_megatron.slurm.job_folder import PORTS_FILE, write_beside
from clipo_megatron.slurm.ports import free_ports

CPUS_VARIABLE, INTERFACE_VARIABLE, TIMEOUT_VARIABLE = "CLIPO_RAY_CPUS", "CLIPO_INTERFACE", "CLIPO_RAY_TIMEOUT"
GPUS_VARIABLE = "SLURM_GPUS_ON_NODE"
_DEFAULT_CPUS, _DEFAULT_TIMEOUT_S = "32", "300"
_NAMED_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
)
_SPARE_WORKER_PORTS = 64
NO_SPARE_WORKERS = ("RAY_prestart_worker_first_driver", "0")
"""Ray would start a process for each CPU of a node, which no actor uses: actors have environments of their own."""
_TRIES = 3
_EARLY_S = 150.0
"""A Ray that ends so soon after its start is started again: it gives up after half a minute of waiting for the head, and takes
as long to come to that on a busy node."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is Ray's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of this attempt of the job, on the shared file system")
    parser.add_argument("--head", action="store_true")
    args = parser.parse_args(arguments)
    try:
        return _run(args.folder, is_head=args.head)
    except (WorkerError, OSError) as error:
        print(f"clipo: error: {host_name()}: ray: {error}", file=sys.stderr)
        return 1


def own_address() -> str:
    """The address that other nodes reach this one at: of `CLIPO_INTERFACE`, else of the node's name as SLURM knows it.

    Raises:
        WorkerError: the interface has none, or the name leads nowhere but to this host itself.
    """
    if interface := os.environ.get(INTERFACE_VARIABLE):
        command = ["ip", "-4", "-o", "addr", "show", "dev", interface]
        try:
            shown = subprocess.run(command, text=True, capture_output=True, check=False).stdout.split()
        except OSError as error:
            raise WorkerError(
                f"{INTERFACE_VARIABLE} = {interface}: its address can't be looked up ({error}); install iproute2 on this node or in "
                "the image, or leave the variable out"
            ) from error
        if "inet" not in shown:
            raise WorkerError(
                f"{INTERFACE_VARIABLE} = {interface}: no such interface with an IPv4 address; see `ip addr`"
            )
        return shown[shown.index("inet") + 1].split("/")[0]
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError as error:
        raise WorkerError(f"the node's name {name} has no address ({error}); set {INTERFACE_VARIABLE}") from error
    outward = sorted(address for address in addresses if not address.startswith("127."))
    if not outward:
        raise WorkerError(
            f"the node's name {name} leads to {', '.join(sorted(addresses))} here, which other nodes can't reach; set "
            f"{INTERFACE_VARIABLE} to the interface of the cluster's network"
        )
    return outward[0]


def cpu_slots(environment: Mapping[str, str]) -> int:
    """Workers of a CPU run that fit on a node."""
    return int(environment.get(CPUS_VARIABLE, _DEFAULT_CPUS))


def start_timeout_s() -> float:
    """Seconds that a cluster has for its start."""
    return float(os.environ.get(TIMEOUT_VARIABLE, _DEFAULT_TIMEOUT_S))


def read_ports(folder: Path) -> dict[str, str]:
    """What the head wrote; empty where it has not yet."""
    path = folder / PORTS_FILE
    if not path.exists():
        return {}
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


def _run(folder: Path, *, is_head: bool) -> int:
    timeout_s = start_timeout_s()
    os.environ.setdefault(*NO_SPARE_WORKERS)
    cpus = cpu_slots(os.environ)
    scratch = Path("/tmp") / f"clipo-ray-{os.environ.get('SLURM_JOB_ID', os.getpid())}"
    shutil.rmtree(scratch, ignore_errors=True)  # of an earlier attempt on this node
    try:
        code = 1
        for _ in range(_TRIES):
            started = time.monotonic()
            code = _ray(_command(folder, scratch, is_head=is_head, cpus=cpus, timeout_s=timeout_s))
            if code == 0 or time.monotonic() - started > _EARLY_S:
                break
        return code
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _command(folder: Path, scratch: Path, *, is_head: bool, cpus: int, timeout_s: float) -> list[str]:
    address = own_address()
    own = free_ports(2 + len(_NAMED_PORTS) + 2 * cpus + _SPARE_WORKER_PORTS)
    ports = dict(zip(_NAMED_PORTS, own[1:], strict=False))
    gpus = os.environ.get(GPUS_VARIABLE, "0")
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    command += ["--node-ip-address", address, "--num-cpus", str(cpus), "--num-gpus", gpus]
    command += ["--worker-port-list", ",".join(map(str, own[1 + len(_NAMED_PORTS) : -1]))]
    command += [word for name, port in ports.items() for word in (f"--{name}", str(port))]
    if size := os.environ.get("CLIPO_RAY_OBJECT_STORE_BYTES"):
        command += ["--object-store-memory", size]
    if is_head:
        _announce(folder, {"address": f"{address}:{own[0]}", "host": host_name()})
        return [
            *(*command, "--head", "--port", str(own[0]), "--include-dashboard", "false"),
            *("--dashboard-host", address, "--temp-dir", str(scratch)),
            "--no-monitor",  # its metrics would listen on all interfaces, without the token; nothing is scaled here
            # Ray starts it whether it is wanted or not, and on 10001 unless told otherwise.
            *("--ray-client-server-port", str(own[-1])),
        ]
    return [*command, "--address", address_of_head(folder, timeout_s)]


def _announce(folder: Path, values: Mapping[str, str]) -> None:
    write_beside(folder / PORTS_FILE, "".join(f"{key}={value}\n" for key, value in values.items()))


def address_of_head(folder: Path, timeout_s: float) -> str:
    """Wait until the head has told its address and answers there: HOST:PORT.

    Args:
        folder: of the attempt.
        timeout_s: to wait.

    Raises:
        WorkerError: it does not in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        address = read_ports(folder).get("address", "")
        if address and _answers(address):
            return address
        time.sleep(0.5)
    told = read_ports(folder).get("address", f"no {PORTS_FILE} in {folder}")
    raise WorkerError(
        f"Ray's head does not answer after {timeout_s:.0f} s ({told}); look at the log of the first node, at a firewall between "
        f"the nodes, and whether {folder} is on a file system that all nodes share"
    )


def _answers(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _ray(command: list[str]) -> int:
    """Run Ray until it ends; SIGTERM ends it, which is no failure."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    is_asked = False

    def end(*_: object) -> None:
        nonlocal is_asked
        is_asked = True
        process.terminate()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if is_asked else code


if __name__ == "__main__":
    sys.exit(main())
