"""The software and hardware that a result depends on."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["machine", "made_by", "versions"]


def versions() -> dict[str, str]:
    """Versions of Python, torch and tdlrt."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tdlrt": version("tdlrt"),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and settings that affect timings; nothing that identifies the machine."""
    facts = {
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def made_by(command: str, *packages: str, device: str = "cpu") -> dict[str, Any]:
    """The command of a result, the versions of what made it, packages among them, and the machine.

    Raises:
        importlib.metadata.PackageNotFoundError: A package is not installed.
    """
    return {
        "command": command,
        "versions": versions() | {name: version(name) for name in packages},
        "machine": machine(torch.device(device)),
    }
