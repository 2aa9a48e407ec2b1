"""`tdlrt doctor`: a check of the installation, its devices and its optional packages.

torch is imported last, so that what is installed shows at once.
"""

import json
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from rich.console import Console

from tdlrt_lab.cli.output import AsJson, Debug, empty_table

__all__ = ["ENABLES", "diagnose", "doctor", "installed", "tried"]

ENABLES = {
    "cli": "command line, plots, the data set digits",
    "data": "MNIST, CIFAR and other data sets, image folders",
    "export": "ONNX files and int8",
    "hf": "Hugging Face Hub, transformers and Accelerate",
    "lightning": "callback for Lightning",
    "log": "TensorBoard event files",
    "ray": "tdlrt compare on several machines",
    "bench": "benchmarks against TensorLy-Torch, Torch-Pruning and PEFT",
}


def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Check the installation, and show what each missing extra would enable.

    Runs one training step on every device. The exit code is 1 if a step fails.
    """
    from tdlrt.errors import RunError

    if as_json:
        found = diagnose()
        print(json.dumps(found))
    else:
        found = installed()
        _print_installed(found)
        print("a training step on each device:", flush=True)  # the import of torch takes seconds
        found |= tried()
        _print_tried(found)
    broken = [device["name"] for device in found["devices"] if device["error"]]
    if broken:
        raise RunError(f"a training step failed on {', '.join(broken)}")


def diagnose() -> dict[str, Any]:
    """What `installed` and `tried` find."""
    return installed() | tried()


def installed() -> dict[str, Any]:
    """Versions, cores and extras, which are known without an import of torch."""
    packages = ("tdlrt", "torch", "safetensors")
    known = metadata.metadata("tdlrt").get_all("Provides-Extra") or []
    return {
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "extras": [_extra(name) for name in ENABLES if name in known],
    }


def tried() -> dict[str, Any]:
    """Threads of torch, and devices with the error of a training step if it fails."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "devices": [
            {"name": name, "what": what, "error": _step_error(name)} for name, what in _devices()
        ],
    }


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    yield "cpu", platform.processor() or platform.machine()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _step_error(device: str) -> str | None:
    """Run one training step that checks ranks; return the first line of its error, if any."""
    import torch

    from tdlrt import TDLRT, factorize_

    try:
        layers = torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 5)
        model = torch.nn.Sequential(*layers).to(device)
        factorize_(model, rank=0.5)
        optimizer = TDLRT(model, torch.optim.SGD, lr=0.01, tau=0.1)
        model(torch.randn(4, 3, 8, 8, device=device)).square().mean().backward()
        optimizer.step()
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _extra(name: str) -> dict[str, Any]:
    """Name and purpose of an extra, versions of its packages (None if missing), what it lacks."""
    wanted = dict(_requirements(name))
    versions = {package: _version(package) for package in wanted}
    lacking = [
        package if versions[package] is None else f"{package}>={oldest}"
        for package, oldest in wanted.items()
        if _release(versions[package]) < _release(oldest)
    ]
    return {"name": name, "enables": ENABLES[name], "packages": versions, "lacking": lacking}


def _requirements(extra: str) -> Iterator[tuple[str, str]]:
    """Packages of an extra and their minimum versions, from the metadata of both distributions."""
    wanted = rf"([\w-]+)(?:\[\w+\])?>=([\d.]+)\s*;\s*extra == ['\"]{extra}['\"]"
    for package in ("tdlrt", "tdlrt-lab"):
        for line in metadata.requires(package) or []:
            match = re.fullmatch(wanted, line)
            if match:
                yield match[1], match[2]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _release(version: str | None) -> list[int]:
    """Numbers of a release without trailing zeros; empty for None."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def _print_installed(found: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    print(f"{found['system']}, cores: {found['cores']}")
    extras = empty_table(["extra", "enables", "state"])
    for extra in found["extras"]:
        lacking = ", ".join(extra["lacking"])
        extras.add_row(
            extra["name"], extra["enables"], f"needs {lacking}" if lacking else "installed"
        )
    Console().print(extras)
    missing = ",".join(extra["name"] for extra in found["extras"] if extra["lacking"])
    if missing:
        print(f"to install what is missing: pip install 'tdlrt[{missing}]'")


def _print_tried(found: dict[str, Any]) -> None:
    devices = empty_table(["device", "description", "training step"])
    for device in found["devices"]:
        devices.add_row(device["name"], device["what"], device["error"] or "works")
    Console().print(devices)
    print(f"torch threads: {found['threads']}")
