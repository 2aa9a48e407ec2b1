"""Doing the runs of a sweep as tasks of a Ray cluster, on one machine or on several."""

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
from tdlrt_lab.sweep.execute import Emit, fail, pending, work
from tdlrt_lab.sweep.plan import SweepError, SweepRun

__all__ = ["execute_on_ray"]

LOCAL = "local"
RETRIES = 3
"""How often a run whose process dies is continued in another one before it counts as failed."""


def execute_on_ray(
    runs: Sequence[SweepRun], emit: Emit, address: str, *, jobs: int | None = None
) -> None:
    """Do all runs that are not done and that no other process holds, each as a task of Ray.

    A run whose process or machine dies is continued from its last checkpoint by another process.

    Args:
        runs: The runs, in their order.
        emit: Told what happens, by this thread.
        address: "local" starts a cluster on this machine, and stops it at the end. "auto" is the
            cluster that this machine belongs to; "HOST:PORT" and "ray://HOST:PORT" name one.
        jobs: Runs at a time on each machine, which share its processors and its GPUs. None is one
            per GPU, and one on a machine without GPUs.

    Raises:
        MissingExtraError: Ray is not installed.
        SweepError: The cluster cannot be reached, or has no device that a run asks for.
        RunError: A machine of the cluster does not see the directory of the sweep, or has another
            version of tdlrt.
        Interrupted: A signal stopped the sweep; the same call continues it.
    """
    # Ray prints on stdout, unless told otherwise before its import, that it retries a task.
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
        # As with our own processes, one does one run, so that runs share no state.
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
    """The task of a run; a cancelled one gets SIGINT and stores what it has."""
    _check_machine(token, versions()["tdlrt"])
    work([one], events.put)


def _portable(one: SweepRun) -> SweepRun:
    """The same run for a process that was started in another folder."""
    folder = one.config.data_dir
    config = one.config if folder is None else replace(one.config, data_dir=os.path.abspath(folder))
    return replace(one, config=config, out=one.out.absolute())


@contextmanager
def _connection(ray: Any, address: str) -> Iterator[dict[str, Mapping[str, float]]]:
    """Connect to a cluster; gives the resources of its machines that have processors."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # Ray itself would wait for minutes
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
    """A file by which other machines know that they see the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".{uuid4().hex}.shared"
    token.touch()
    try:
        yield token
    finally:
        token.unlink()


def _check_machines(ray: Any, machines: Mapping[str, object], token: Path) -> None:
    """Refuse a cluster that has a machine where the runs could not go on."""
    check = ray.remote(num_cpus=0, max_calls=1)(_check_machine)
    for result in [
        check.options(**_place(ray, machine)).remote(token, versions()["tdlrt"])
        for machine in machines
    ]:
        error = _error(ray, result)
        if error is not None:
            raise error


def _check_machine(token: Path, expected: str) -> None:
    """Check the machine that this process runs on."""
    found, name = versions()["tdlrt"], platform.node()
    if found != expected:
        raise RunError(f"machine {name}: has tdlrt {found}, expected {expected}; install it there")
    if not token.exists():
        raise RunError(
            f"{token.parent}: machine {name} does not see this folder, or sees another one under "
            "the same path; expected a folder that all machines share; name one with --out"
        )


def _share(
    one: SweepRun, machines: Sequence[Mapping[str, float]], jobs: int | None
) -> dict[str, float]:
    """What Ray reserves for a run: its part of the smallest machine that it may go to."""
    device = one.config.device
    with_gpus = [machine for machine in machines if machine.get("GPU")]
    if device not in ("auto", "cpu", "cuda"):
        raise SweepError(f"{one.name}: device {device!r} beside --ray; expected auto, cpu or cuda")
    if device == "cuda" and not with_gpus:
        raise SweepError(f"{one.name}: device 'cuda': no machine of the cluster has a GPU")
    if device == "cpu" or not with_gpus:
        return {"num_cpus": _part(min(machine["CPU"] for machine in machines), jobs or 1)}
    gpus = min(machine["GPU"] for machine in with_gpus)
    jobs = jobs or ceil(gpus)
    cpus = min(machine["CPU"] for machine in with_gpus)
    return {"num_cpus": _part(cpus, jobs), "num_gpus": min(1, _part(gpus, jobs))}


def _part(units: float, jobs: int) -> float:
    """An equal part for each of so many jobs: whole units, or less than one of them."""
    return units // jobs if units >= jobs else 1 / ceil(jobs / units)


def _place(ray: Any, machine: str) -> dict[str, Any]:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=False)
    return {"scheduling_strategy": strategy}


def _events(ray: Any) -> Any:
    """A queue from the runs to this process, beside it, so that it dies with no other machine."""
    from ray.util.queue import Queue

    here = ray.get_runtime_context().get_node_id()
    return Queue(actor_options={"num_cpus": 0, **_place(ray, here)})


def _error(ray: Any, result: Any) -> Exception | None:
    """What a task that ended died of."""
    try:
        ray.get(result)
    except Exception as error:  # of Ray, or of the task, which Ray wraps
        return getattr(error, "cause", error)
    return None
