"""Many processes as one run, each with some devices of the mesh: how they find one another, and how they wait."""

import itertools
import socket
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax

from moejax.config import refuse

OURS = {"MOEJAX_COORDINATOR": "host:port of process 0", "MOEJAX_PROCESSES": "how many there are",
        "MOEJAX_PROCESS": "which this is, from 0"}
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # that JAX reads
REPAIR = f"set {', '.join(OURS)} in every process, or MOEJAX_PROCESSES=1 to run alone"
waits = itertools.count()


class Unreachable(RuntimeError):
    """The processes of a group did not find one another."""


class Group(NamedTuple):
    """How this process joins the others.  What is None is found by JAX."""

    processes: int | None = None
    process: int | None = None
    coordinator: str | None = None  # host:port of process 0
    method: str | None = None  # `cluster_detection_method` of jax.distributed.initialize


def detect(environment: Mapping[str, str]) -> Group | None:
    """The group that this process belongs to; None if it runs alone.  MOEJAX_PROCESSES=1 is alone whatever else is set,
    and MOEJAX_COORDINATOR=auto leaves everything to JAX.  Raises ConfigError: ours are incomplete or wrong.
    """
    given = {name: environment[name] for name in OURS if environment.get(name)}
    if given == {"MOEJAX_COORDINATOR": "auto"}:
        return Group()
    if given:
        return from_ours(given)
    # Within mpirun the variables of SLURM, if any, are those of MPI's own launcher.
    if (count := number(environment, "OMPI_COMM_WORLD_SIZE")) > 1:
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"  # which Open MPI 5 has no more
        return Group(count, number(environment, "OMPI_COMM_WORLD_RANK"), None, method)
    # Of a step, not of the job: a shell in an allocation of many tasks is one task.
    if (count := number(environment, "SLURM_STEP_NUM_TASKS")) > 1 and all(name in environment for name in SLURM):
        return Group(count, number(environment, "SLURM_PROCID"), None, "slurm")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    pod = "," in hosts or "TPU_PROCESS_ADDRESSES_PATH" in environment or number(environment, "MEGASCALE_NUM_SLICES") > 1
    indexed_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return Group() if pod or indexed_job else None


def number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


def from_ours(given: Mapping[str, str]) -> Group | None:
    """The group of our own variables, all of which must be there for more than one process."""
    problems, alone = [], given.get("MOEJAX_PROCESSES") == "1"
    missing = [f"{name} ({meaning})" for name, meaning in OURS.items() if name not in given and not alone]
    if missing:
        problems.append(f"a group of processes needs {', '.join(OURS)}; got {', '.join(given)} alone; "
                        f"set {' and '.join(missing)} too, or MOEJAX_PROCESSES=1 to run without a group")
    host, _, port = given.get("MOEJAX_COORDINATOR", "host:1").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        problems.append(f"MOEJAX_COORDINATOR is host:port of process 0, or auto on its own; got "
                        f"{given['MOEJAX_COORDINATOR']!r}; set it as in 10.0.0.1:8476")
    counts = {name: int(text) for name, text in given.items() if text.isdecimal()}
    problems += [f"{name} is a whole number, 0 or more; got {given[name]!r}; set it to {OURS[name]}"
                 for name in ("MOEJAX_PROCESSES", "MOEJAX_PROCESS") if name in given and name not in counts]
    processes, process = counts.get("MOEJAX_PROCESSES"), counts.get("MOEJAX_PROCESS", 0)
    if processes is not None and process >= processes:
        problems.append(f"MOEJAX_PROCESS must lie below MOEJAX_PROCESSES; got {process} and {processes}; number the "
                        f"processes from 0, or set MOEJAX_PROCESSES={process + 1} or more")
    refuse(problems)
    return None if alone else Group(processes, process, given["MOEJAX_COORDINATOR"], "deactivate")


def start(group: Group, heartbeat: int = 100, patience: int = 300) -> None:
    """Join the group.  Call before anything uses a device; does nothing if this process has joined already.

    Args: heartbeat: seconds without a sign of life after which a process counts as dead, and the others end; also how
        long one that ends waits for the others to end; patience: seconds to wait for all processes to come.
    Raises Unreachable: process 0 does not answer, or its port is taken, or JAX does not find the group.
    """
    if jax.distributed.is_initialized():
        return
    if group.coordinator:
        reach(group.coordinator, group.process == 0, patience)
    if group.process == 0:  # if one does not come, JAX aborts the process and does not say what it waited for
        at = f" at {group.coordinator}" if group.coordinator else ""
        print(f"process 0 of {group.processes} waits for the others{at}, {patience} s at most", file=sys.stderr)
    try:
        jax.distributed.initialize(
            group.coordinator, group.processes, group.process, cluster_detection_method=group.method,
            initialization_timeout=patience, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat)
    except (ImportError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise Unreachable("the environment names a group of processes, and JAX could not join it "
                          f"({type(error).__name__}: {error}); {REPAIR}") from error


def reach(coordinator: str, here: bool, patience: int) -> None:
    """Make sure that process 0, which is `here` or not, can be reached: else JAX ends the process with no exception."""
    host, _, port = coordinator.rpartition(":")
    if here:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise Unreachable(f"process 0 answers at the port of MOEJAX_COORDINATOR; {port} of this machine cannot be "
                              f"used ({error}); set another in every process") from None
        return
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > end:
                raise Unreachable(f"every process must reach process 0 at MOEJAX_COORDINATOR; {coordinator} did not "
                                  f"answer in {patience} s ({error}); start process 0 as well, set the address to "
                                  "its own, or open the port") from None
            time.sleep(0.2)


def barrier(name: str) -> None:
    """Wait until every process of the group is here.  They may come hours apart: this is no collective of devices."""
    if jax.distributed.is_initialized():
        from orbax.checkpoint import multihost  # a second of import that a single process does not need

        # A day at most; a process that has died is noticed by its heartbeat.
        multihost.get_barrier_sync_fn()(key=f"moejax/{name}/{next(waits)}", timeout_ms=24 * 3600 * 1000)


def first() -> bool:
    """This process is the only one, or number 0 of its group.  In a group it starts the devices, as `barrier` does."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0
