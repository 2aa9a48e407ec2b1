"""Storing a run on disk and taking it up again."""

from pathlib import Path
from typing import Any

import torch

from tdlrt.errors import RunError
from tdlrt.experiments.training import Training
from tdlrt.files import write_atomically
from tdlrt.serialization import save

__all__ = ["load_checkpoint", "save_checkpoint", "save_model"]

FORMAT = 1


def save_checkpoint(training: Training, path: Path) -> None:
    """Store everything the rest of the run depends on; a crash leaves the previous checkpoint."""
    state = {"format": FORMAT, **training.state_dict()}
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(training: Training, path: Path) -> None:
    """Take up a stored run. Only tensors and plain types are read, no code.

    Raises:
        RunError: The file is broken, of another version, or of another network.
    """
    advice = "start the run anew with --overwrite, or put the right checkpoint there"
    # A damaged file makes the unpickler and the zip reader raise nearly anything.
    try:
        state: dict[str, Any] = torch.load(path, map_location=training.device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not a readable checkpoint ({reason}); {advice}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise RunError(f"{path}: format {found!r}; expected a checkpoint of format 1; {advice}")
    try:
        training.load_state_dict(state)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(
            f"{path}: does not fit the network of this run ({error}); {advice}"
        ) from error


def save_model(training: Training, path: Path) -> None:
    """Store the network alone; `tdlrt.load` takes it up in a new dense one."""
    config = training.config
    limits = ("tau", "budget") if config.method == "tdlrt" else ()
    options = {name: getattr(config, name) for name in ("model", "data", "method", *limits)}
    texts = {name: str(value) for name, value in options.items() if value is not None}
    save(training.model, path, metadata=texts)
