"""Executing the runs of a sweep as tasks of a Ray cluster, on one or several machines."""

import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any
from uuid import uuid4

from tdlrt.errors import RunError
from tdlrt.extras import needs_extra
from tdlrt_lab.run.environment import versions
from tdlrt_lab.run.runner import Interrupted
from tdlrt_lab.run.signals import stop_requests
from tdlrt_lab.sweep.attempts import Emit, fail, pending, work
from tdlrt_lab.sweep.plan import SweepError, SweepRun

__all__ = ["execute_on_ray"]

LOCAL = "local"
RETRIES = 3
"""How often a run is continued after its process dies, before it counts as failed."""


def execute_on_ray(
    runs: Sequence[SweepRun], emit: Emit, address: str, *, jobs: int | None = None
) -> None:
    """Do all runs that are neither finished nor being done by another process, as tasks of Ray.

    If the process or the machine of a run dies, another process continues from its last checkpoint.

    Args:
        runs: The runs, in the order in which they are submitted.
        emit: Called with each event, by this thread.
        address: "local" starts a cluster on this machine and stops it at the end. "auto" is the
            cluster that this machine belongs to; "HOST:PORT" and "ray://HOST:PORT" name one.
        jobs: Number of runs at a time on each machine, which share its CPU cores and GPUs. By
            default one per GPU, and one on a machine without GPUs.

    Raises:
        MissingExtraError: Ray is not installed.
        SweepError: The cluster cannot be reached, or has no device that a run needs.
        RunError: A machine of the cluster cannot see the directory of the sweep, or has another
            version of tdlrt.
        Interrupted: A signal stopped the sweep; the same call continues it.
    """
    # Must be set before the import: otherwise Ray prints each retry of a task on stdout.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    with needs_extra("ray", "--ray", distribution="tdlrt-lab"):
        import ray

    waiting = [_portable(one) for one in pending(runs, emit)]
    if not waiting:
        return
    with _connection(ray, address) as machines, _token(waiting[0].out) as token:
        shares = [_share(one, [*machines.values()], jobs) for one in waiting]
        _check_machines(ray, machines, token)
        events = _events(ray)
        # max_calls=1: each process does one run, so that runs share no state.
        task = ray.remote(max_calls=1, max_retries=RETRIES, retry_exceptions=[Interrupted])(_do)
        with stop_requests() as stop:
            tasks = {
                task.options(name=one.name, **share).remote(one, token, events): one
                for one, share in zip(waiting, shares, strict=True)
            }
            stopping = False
            while tasks:
                ended, _ = ray.wait([*tasks], timeout=0.1)
                for event in events.get_nowait_batch(events.qsize()):
                    emit(event)
                for result in ended:
                    one, error = tasks.pop(result), _error(ray, result)
                    if error is not None and not stopping:
                        fail(one, emit, error)
                if stop.is_set() and not stopping:
                    stopping = True
                    for result in tasks:
                        ray.cancel(result)
    if stopping:
        raise Interrupted("interrupted; what was trained so far is stored")


def _do(one: SweepRun, token: Path, events: Any) -> None:
    """The task of a run; on cancellation it gets SIGINT and writes a checkpoint."""
    _check_machine(token, versions()["tdlrt"])
    work([one], events.put)


def _portable(one: SweepRun) -> SweepRun:
    """The same run with absolute paths, for a process in another working directory."""
    folder = one.config.data_dir
    config = one.config if folder is None else replace(one.config, data_dir=os.path.abspath(folder))
    return replace(one, config=config, out=one.out.absolute())


@contextmanager
def _connection(ray: Any, address: str) -> Iterator[dict[str, Mapping[str, float]]]:
    """Connect to a cluster; yields the resources of its machines that have CPUs, by node ID."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # fails at once; Ray would wait for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="error")
    except (OSError, ValueError) as error:
        raise SweepError(
            f"--ray {address}: {error}; expected 'local', 'auto' on a machine of a running "
            "cluster, HOST:PORT or ray://HOST:PORT; 'ray start --head' starts a cluster"
        ) from error
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        yield {n["NodeID"]: n["Resources"] for n in nodes if n["Resources"].get("CPU")}
    finally:
        ray.shutdown()


@contextmanager
def _token(folder: Path) -> Iterator[Path]:
    """A file by which other machines check that they see the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".{uuid4().hex}.shared"
    token.touch()
    try:
        yield token
    finally:
        token.unlink()


def _check_machines(ray: Any, machines: Mapping[str, object], token: Path) -> None:
    """Check every machine of the cluster."""
    check = ray.remote(num_cpus=0, max_calls=1)(_check_machine)
    for result in [
        check.options(**_place(ray, machine)).remote(token, versions()["tdlrt"])
        for machine in machines
    ]:
        error = _error(ray, result)
        if error is not None:
            raise error


def _check_machine(token: Path, expected: str) -> None:
    """Check that this machine has the expected version and sees the folder of the token.

    Raises:
        RunError: It does not.
    """
    found, name = versions()["tdlrt"], platform.node()
    if found != expected:
        raise RunError(
            f"machine {name}: has tdlrt {found}, expected {expected}; install that version there"
        )
    if not token.exists():
        raise RunError(
            f"{token.parent}: machine {name} does not see this folder, or sees a different one at "
            "the same path; expected a folder that all machines share; choose one with --out"
        )


def _share(
    one: SweepRun, machines: Sequence[Mapping[str, float]], jobs: int | None
) -> dict[str, float]:
    """The resources that Ray reserves for a run, by the smallest machine that can do it."""
    device = one.config.device
    with_gpus = [machine for machine in machines if machine.get("GPU")]
    if device not in ("auto", "cpu", "cuda"):
        raise SweepError(f"{one.name}: device {device!r} and --ray; expected auto, cpu or cuda")
    if device == "cuda" and not with_gpus:
        raise SweepError(f"{one.name}: device 'cuda': no machine of the cluster has a GPU")
    if device == "cpu" or not with_gpus:
        return {"num_cpus": _part(min(machine["CPU"] for machine in machines), jobs or 1)}
    gpus = min(machine["GPU"] for machine in with_gpus)
    jobs = jobs or ceil(gpus)
    cpus = min(machine["CPU"] for machine in with_gpus)
    return {"num_cpus": _part(cpus, jobs), "num_gpus": min(1, _part(gpus, jobs))}


def _part(units: float, jobs: int) -> float:
    """An equal part of the units for each job: a whole number, or a fraction below one."""
    return units // jobs if units >= jobs else 1 / ceil(jobs / units)


def _place(ray: Any, machine: str) -> dict[str, Any]:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=False)
    return {"scheduling_strategy": strategy}


def _events(ray: Any) -> Any:
    """A queue from the runs to this process, on its own machine in case another one fails."""
    from ray.util.queue import Queue

    here = ray.get_runtime_context().get_node_id()
    return Queue(actor_options={"num_cpus": 0, **_place(ray, here)})


def _error(ray: Any, result: Any) -> Exception | None:
    """The exception of a finished task; None if it succeeded."""
    try:
        ray.get(result)
    except Exception as error:  # an error of Ray, or one of the task, which Ray wraps
        return getattr(error, "cause", error)
    return None
