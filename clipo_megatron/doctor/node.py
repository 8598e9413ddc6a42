"""Level node: what one host has and can do, measured there in seconds: folders, memory, limits, ports, packages.

Each function takes the values it judges, so that the same rule can be tried on other values; `run_node` reads them.
Loads without torch.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipo_megatron.checkpoint.file_lock import take_lock
from clipo_megatron.checkpoint.sizes import size_text
from clipo_megatron.checks.host_memory import allowed_bytes
from clipo_megatron.checks.memory import estimate_memory
from clipo_megatron.checks.preflight import existing_folder
from clipo_megatron.doctor.devices import device_facts, device_findings
from clipo_megatron.doctor.finding import Finding, fail, of_problems, ok, skip, warn
from clipo_megatron.doctor.imports import check_confinement, check_imports
from clipo_megatron.doctor.job_time import check_time, read_pace
from clipo_megatron.doctor.packages import package_facts, package_findings
from clipo_megatron.doctor.shared_folder import check_shared_folder, model_facts
from clipo_megatron.errors import ConfigError, WorkerError
from clipo_megatron.recipe import Recipe
from clipo_megatron.weights.architecture import read_architecture

_MIB, _GIB = 1 << 20, 1 << 30
_LEAST_TEMPORARY, _GOOD_TEMPORARY = 256 * _MIB, 5 * _GIB
"""Free bytes of /tmp: Ray's session logs and sockets; what it spills comes on top."""
_OBJECT_STORE = 512 * _MIB
"""Of a CPU run; see cluster/session.py, which can't be imported without Ray. A test compares them."""
_PORTS = 160
"""That Ray takes on a host: its services, and its workers for 32 CPUs."""
_LEAST_FILES, _GOOD_FILES = 4096, 65535
_SCRATCH = "/tmp"
"""Where the project puts Ray's session. Not tempfile's choice: that is another folder as soon as this one is full."""
_SOCKET_CHARS = 107
_OWN_SOCKET_CHARS = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""Of Python's multiprocessing, below TMPDIR. Ray's and vLLM's sockets lie in folders that the project chooses."""
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCase:
    """What the node checks look at."""

    recipe: Recipe
    log_folders: Sequence[Path] = ()
    """Folders that this host writes logs and reports to, beside the run folder."""
    ports: Mapping[str, int] | None = None
    """Ports that services of the job will listen on here, by name; None: not told."""
    find_ports: Callable[[int], Sequence[int]] | None = None
    """Gives so many free ports of this host, or raises OSError."""
    find_address: Callable[[], str] | None = None
    """In a job: the address at which this host's Ray will listen, or raises WorkerError."""
    find_share: Callable[[Recipe], int] | None = None
    """In a job: the policy ranks of the node that gets most, or raises ConfigError; None: this host gets all."""
    needs_torch: bool = True
    """Import torch and look at the devices by it."""


def run_node(case: NodeCase) -> tuple[list[Finding], dict[str, str]]:
    """All node checks, and the facts of this host that must be equal on all of them."""
    recipe, folder = case.recipe, Path(case.recipe.run.folder) / case.recipe.run.name
    placement, ranks = find_ranks(recipe, case.find_share)
    is_gpu = recipe.run.device != "cpu"
    findings = [
        check_writable("run folder", folder, needs_lock=True),
        *(check_writable("log folder", path) for path in case.log_folders),
        check_shared_folder(recipe),
        *(check_temporary(Path(path), holds_ray=path == _SCRATCH) for path in _temporary_folders()),
        check_socket_path(os.environ.get("TMPDIR") or _SCRATCH),
        check_shared_memory(Path("/dev/shm"), needed=_shared_memory_needed(recipe)),
        check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        check_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[1], is_gpu=is_gpu),
        *check_environment(os.environ, is_gpu=is_gpu),
        check_address(socket.gethostname()) if case.find_address is None else check_own_address(case.find_address),
        *check_ports(case.ports),
        check_free_ports(case.find_ports),
        placement,
        check_host_memory(recipe, available=allowed_bytes(), ranks=ranks),
        check_time(os.environ, read_pace(folder / "metrics.jsonl")),
        *package_findings(recipe),
        *device_findings(recipe, needs_torch=case.needs_torch),
        # On a CPU the run's own workers tell as soon, and the nodes of a job have better to do.
        check_imports() if is_gpu and case.needs_torch else skip("imports", "run.device = cpu; level model tries them"),
        check_confinement(),
    ]
    facts = package_facts() | device_facts() | model_facts(recipe) | _clock_fact(folder)
    return findings, facts


def check_writable(name: str, folder: Path, *, needs_lock: bool = False) -> Finding:
    """A file can be made, written, brought to the disk and removed in a folder, or in the nearest one that exists.

    Args:
        name: of the finding.
        folder: may be there or not.
        needs_lock: try as well whether a file can be locked there, as a run locks its folder.
    """
    there = existing_folder(folder)
    remedy = f"give this host the right to write to {there} (mounted read-only? full? other owner?), or choose another folder"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".clipo-canary-") as file:
            started = time.perf_counter()
            file.write(b"\0" * _MIB)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - started
            if needs_lock:
                take_lock(file.fileno(), there, otherwise="choose a run.folder on another file system")
    except ConfigError as error:
        cause, _, remedy = str(error).rpartition("; ")
        return fail(name, cause, remedy)
    except OSError as error:
        return fail(name, f"{folder}: can't be written to on this host ({error.strerror or error})", remedy)
    rate = 1 / max(seconds, 1e-6)
    if rate < 1:
        return warn(name, f"{there}: 1 MiB takes {seconds:.1f} s to write", "choose a faster file system for the run")
    return ok(name, f"{there}: can be written to")


def check_temporary(folder: Path, *, holds_ray: bool) -> Finding:
    """Room in a folder of temporary files.

    Args:
        folder: /tmp, where Ray keeps its session and engines their files, or TMPDIR, where all others do.
        holds_ray: it is the former, which no variable moves: its path is part of the paths of sockets, which are short.
    """
    name = "temporary folder"
    if holds_ray:
        other = f"let the site enlarge it: Ray's session is in {folder} whatever TMPDIR says"
    else:
        other = "set TMPDIR to another local folder with room"
    try:
        free = shutil.disk_usage(folder).free
        # Blocks may be left where inodes, or a quota, are not.
        with tempfile.NamedTemporaryFile(dir=folder, prefix="clipo-canary-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        cause = f"{folder}: can't be written to ({error.strerror or error})"
        return fail(name, cause, f"free space in {folder} on this host, or {other}")
    cause = f"{folder}: {size_text(free)} free"
    remedy = f"remove old files from {folder} on this host, or {other}"
    if free < _LEAST_TEMPORARY:
        return fail(name, cause, remedy)
    return warn(name, cause, remedy) if free < _GOOD_TEMPORARY else ok(name, cause)


def check_socket_path(folder: str) -> Finding:
    """Processes meet at sockets below the temporary folder, and the path of a socket has at most 107 bytes."""
    name, longest = "socket path", len(os.fsencode(folder)) + _OWN_SOCKET_CHARS
    cause = f"TMPDIR = {folder}: a socket there would have a path of {longest} bytes, {_SOCKET_CHARS} are allowed"
    if longest > _SOCKET_CHARS:
        return fail(name, cause, "set TMPDIR to a short folder such as /tmp")
    return ok(name, cause)


def check_shared_memory(folder: Path, *, needed: int) -> Finding:
    """Room in /dev/shm for Ray's object store and weights that are handed over; too little ends a worker by a bus error."""
    name = "shared memory"
    if not folder.is_dir():
        return fail(name, f"{folder}: not there", "mount a tmpfs there; in a container give it the host's")
    free = shutil.disk_usage(folder).free
    cause = f"{folder}: {size_text(free, is_binary=True)} free, {size_text(needed, is_binary=True)} needed"
    if free < needed:
        return fail(name, cause, f"remove leftovers from {folder} on this host, or enlarge it (mount -o remount,size=)")
    return ok(name, cause)


def check_open_files(limit: int) -> Finding:
    """The hard limit on open files: Ray opens several for each worker and connection."""
    name, cause = "open files", f"ulimit -Hn = {'unlimited' if limit < 0 else limit}"
    remedy = f"raise it to {_GOOD_FILES} (limits.conf, or PropagateResourceLimits of SLURM)"
    if 0 <= limit < _LEAST_FILES:
        return fail(name, cause, remedy)
    return warn(name, cause, remedy) if 0 <= limit < _GOOD_FILES else ok(name, cause)


def check_locked_memory(limit: int, *, is_gpu: bool) -> Finding:
    """InfiniBand registers memory, which counts as locked."""
    name, cause = "locked memory", f"ulimit -Hl = {'unlimited' if limit < 0 else limit}"
    if is_gpu and 0 <= limit < _GIB:
        return warn(name, cause, "set it to unlimited where NCCL uses InfiniBand (limits.conf)")
    return ok(name, cause)


def check_environment(environment: Mapping[str, str], *, is_gpu: bool) -> list[Finding]:
    """Variables that change what workers do, though no one meant them to."""
    name, findings = "environment", []
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if is_gpu and "expandable_segments:True" in environment.get(variable, ""):
            cause = f"{variable} = {environment[variable]}: vLLM's memory pool can't give memory back under expandable segments"
            findings.append(fail(name, cause, f"unset {variable}"))
    if stray := [variable for variable in _RANK_VARIABLES if variable in environment]:
        cause = f"{', '.join(stray)}: set already, and inherited by every worker"
        findings.append(warn(name, cause, f"unset {' '.join(stray)} before the job"))
    proxies = [variable for variable in ("http_proxy", "https_proxy", "HTTP_PROXY") if environment.get(variable)]
    if proxies and not (environment.get("no_proxy") or environment.get("NO_PROXY")):
        cause = f"{', '.join(proxies)}: set without no_proxy, so that connections between nodes may go to the proxy"
        findings.append(warn(name, cause, "set no_proxy to the nodes' names and addresses"))
    home = environment.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        cause = f"HOME = {home or 'not set'}: caches of Triton and vLLM go there, and it can't be written to"
        findings.append(warn(name, cause, "set HOME to a folder that can be written to"))
    return findings or [ok(name, "no variable in the way")]


def check_address(host: str) -> Finding:
    """This host's name leads to an address that other nodes can reach: gloo offers that one to them."""
    name = "address"
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None, family=socket.AF_INET)})
    except OSError as error:
        return warn(name, f"{host}: its name leads to no address ({error})", "add it to the name service or /etc/hosts")
    cause = f"{host} is {', '.join(addresses)}"
    if all(address.startswith("127.") for address in addresses):
        remedy = "on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or correct /etc/hosts"
        return warn(name, cause, remedy)
    return ok(name, cause)


def check_own_address(find: Callable[[], str]) -> Finding:
    """There is an address for this host's Ray that the job's other nodes reach it at.

    Args:
        find: gives it, or raises WorkerError.
    """
    name = "address"
    try:
        return ok(name, f"Ray will listen at {find()}")
    except WorkerError as error:
        cause, _, remedy = str(error).rpartition("; ")
        return fail(name, cause, remedy)


def check_ports(ports: Mapping[str, int] | None) -> list[Finding]:
    """Nobody listens yet on the ports that the job's services shall have on this host."""
    name, findings = "ports", []
    if ports is None:
        return []
    for service, port in ports.items():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As servers do: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except (OSError, OverflowError) as error:
                cause = f"port {port} of {service}: can't be had on this host ({getattr(error, 'strerror', error)})"
                findings.append(fail(name, cause, "end what listens there (`ss -ltnp`), or choose another port"))
    return findings or [ok(name, f"{len(ports)} ports are free")]


def check_free_ports(find: Callable[[int], Sequence[int]] | None) -> Finding:
    """There are ports left to choose from for Ray.

    Args:
        find: gives so many free ports, or raises OSError.
    """
    name = "free ports"
    if find is None:
        return skip(name, "not asked for")
    try:
        find(_PORTS)
    except OSError as error:
        remedy = "end what listens there (`ss -ltnp`), or set CLIPO_PORTS=FIRST-LAST to others of this site"
        return fail(name, str(error), remedy)
    return ok(name, f"{_PORTS} for Ray")


def find_ranks(recipe: Recipe, find: Callable[[Recipe], int] | None) -> tuple[Finding, int]:
    """Whether the job's nodes hold all workers, and how many policy ranks a node gets at most.

    Args:
        recipe: of the run.
        find: tells that number, or raises ConfigError.
    """
    name, everywhere = "placement", recipe.layout.world_size
    if find is None:
        return skip(name, "not in a job"), everywhere
    try:
        share = find(recipe)
    except ConfigError as error:
        return of_problems(name, error.problems, otherwise="")[0], everywhere
    return ok(name, f"at most {share} of {everywhere} policy ranks on a node"), share


def check_host_memory(recipe: Recipe, *, available: int | None, ranks: int) -> Finding:
    """Host memory that the trainer's ranks of this node take: reference weights, offloaded optimizer."""
    name = "host memory"
    if available is None:
        return skip(name, "this system does not tell its free memory")
    try:
        architecture = read_architecture(Path(recipe.model.path))
        needed = estimate_memory(recipe, architecture).host_bytes * ranks
    except (ConfigError, OSError):
        return skip(name, "no model folder that tells sizes")
    cause = (
        f"{size_text(available, is_binary=True)} free, the {ranks} trainer ranks of this node need at least "
        f"{size_text(needed, is_binary=True)}"
    )
    if needed > available:
        return fail(name, cause, "ask for more memory (--mem=0), or turn off optimizer.cpu_offload or the KL reference")
    return ok(name, cause)


def _temporary_folders() -> list[str]:
    return list(dict.fromkeys([_SCRATCH, os.environ.get("TMPDIR") or _SCRATCH]))


def _shared_memory_needed(recipe: Recipe) -> int:
    if recipe.run.device != "cpu":
        return 4 * _GIB
    return _OBJECT_STORE + 4 * (recipe.sync.bucket_mib << 20)


def _clock_fact(folder: Path) -> dict[str, str]:
    """Seconds that this host's clock is ahead of the shared file system's."""
    there = existing_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".clipo-canary-") as file:
            os.utime(file.name)  # no times given: the file server's clock sets them
            return {"clock ahead": f"{time.time() - os.stat(file.name).st_mtime:.2f}"}
    except OSError:
        return {}
