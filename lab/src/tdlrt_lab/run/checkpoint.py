"""Saving a training to disk and restoring it."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils import prune

from tdlrt.errors import CheckpointError, ConfigError, RunError
from tdlrt.files import sync_folder, write_atomically
from tdlrt.serialization import load, save
from tdlrt.tensor_files import open_tensors
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data
from tdlrt_lab.run.files import writing
from tdlrt_lab.run.finite import check_state
from tdlrt_lab.run.processes import any_process, is_first
from tdlrt_lab.run.results import numbered_checkpoint, numbered_checkpoints
from tdlrt_lab.run.stored_state import check_position, read_state
from tdlrt_lab.run.training import Training

__all__ = [
    "CheckpointWriter",
    "Checkpoints",
    "load_checkpoint",
    "load_model",
    "load_newest",
    "save_checkpoint",
    "save_model",
]

FORMAT = 1
ADVICE = "restart the run with --overwrite, or restore the right checkpoint"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """How many checkpoints are kept, and when they are written besides after each epoch.

    Attributes:
        steps: Write one after every so many steps; None to disable.
        minutes: Write one at the first step that ends so many minutes after the last; None to
            disable.
        keep: How many checkpoints are kept; the oldest are deleted.
    """

    steps: int | None = None
    minutes: float | None = None
    keep: int = 1

    def __post_init__(self) -> None:
        """Check every range."""
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"checkpoint_steps {self.steps!r}: expected at least 1 step")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError(f"checkpoint_minutes {self.minutes!r}: expected a positive number")
        if self.keep < 1:
            raise ConfigError(f"keep {self.keep!r}: expected at least 1 checkpoint")


class CheckpointWriter:
    """Writes the checkpoints of a training.

    Args:
        path: Path of the newest checkpoint.
        plan: When checkpoints are due.
    """

    def __init__(self, path: Path, plan: Checkpoints) -> None:
        self._path, self._plan = path, plan
        self._written = time.monotonic()

    def after_step(self, training: Training) -> None:
        """Write a checkpoint if one is due; every process must call this."""
        # One is written at the end of every epoch anyway. None is written after skipped steps,
        # so that the newest checkpoint is from before them.
        at_end = training.step % training.steps_per_epoch == 0
        if not at_end and not training.skipped_in_a_row and self._due(training):
            self.write(training)

    def write(self, training: Training) -> None:
        """Write a checkpoint now; every process must call this.

        Raises:
            NonFiniteError: A weight is not finite; the existing checkpoints are unchanged.
            RunError: The file cannot be written; the existing checkpoints are unchanged.
        """
        check_state(training.model)
        save_checkpoint(training, self._path, keep=self._plan.keep)
        self._written = time.monotonic()

    def _due(self, training: Training) -> bool:
        steps, minutes = self._plan.steps, self._plan.minutes
        if steps is not None and training.step % steps == 0:
            return True
        if minutes is None:
            return False
        is_late = time.monotonic() >= self._written + 60 * minutes
        return any_process(lambda: is_late, training.device)  # the clocks of processes differ


def save_checkpoint(training: Training, path: Path, *, keep: int = 1) -> None:
    """Save the state of a training; a crash while it is written leaves the old checkpoints intact.

    Args:
        training: The training.
        path: Path of the newest checkpoint; older ones are in the same folder, numbered.
        keep: How many checkpoints are kept.

    Raises:
        RunError: It cannot be written.
    """
    state = {"format": FORMAT, **training.state_dict()}
    if not is_first():  # all processes take part in state_dict, one writes the file
        return
    new = path.with_name("new.pt")
    with writing(path):
        write_atomically(new, lambda file: _torch_save(state, file))
        # Rename the older ones once the new one is complete: a kill in between loses no file.
        for number in range(keep - 1, 0, -1):
            newer = numbered_checkpoint(path, number - 1)
            if newer.exists():
                newer.replace(numbered_checkpoint(path, number))
        new.replace(path)
        sync_folder(path.parent)
        for number, older in numbered_checkpoints(path).items():
            if number >= keep:
                older.unlink()


def _torch_save(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # After a failed write torch still tries to finish the archive and reports that failure.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _DamagedError(RunError):
    """The file of a checkpoint is damaged."""


def load_newest(training: Training, paths: Sequence[Path], warn: Callable[[str], object]) -> None:
    """Restore the newest readable checkpoint; without any checkpoints, do nothing.

    Args:
        training: The training.
        paths: The checkpoints, the newest first.
        warn: Called with a message for each damaged checkpoint; those files are renamed.

    Raises:
        RunError: None is readable, or the newest readable one is of another version or network.
    """
    damaged: list[tuple[Path, RunError]] = []
    for path in paths:
        try:
            state = _read(path, training.device)
        except _DamagedError as error:
            damaged.append((path, error))
            continue
        _restore(training, state, path)
        for bad, why in damaged:
            bad.replace(bad.with_name(bad.name + ".damaged"))
            reason = str(why).removesuffix(f"; {ADVICE}")
            warn(f"{reason}; renamed to {bad.name}.damaged, continuing from {path.name}")
        return
    if damaged:
        raise damaged[0][1]


def load_checkpoint(training: Training, path: Path) -> None:
    """Restore a training from a checkpoint. Only tensors and plain types are loaded, no code.

    Raises:
        RunError: The file is damaged, of another version, or of another network.
    """
    _restore(training, _read(path, training.device), path)


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    # On a damaged file the unpickler and the zip reader raise exceptions of almost any type.
    try:
        state = read_state(path, device)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _DamagedError(f"{path}: not a readable checkpoint ({reason}); {ADVICE}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        raise RunError(
            f"{path}: format {found!r}; expected a checkpoint of format {FORMAT}; {ADVICE}"
        )
    return dict(state)


def _restore(training: Training, state: dict[str, Any], path: Path) -> None:
    try:
        check_position(state, training.config.epochs, training.steps_per_epoch)
        training.load_state_dict(state)
    except (  # a state of another network fails in many ways
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise RunError(
            f"{path}: does not fit the network of this run ({error}); {ADVICE}"
        ) from error


def save_model(training: Training, path: Path) -> None:
    """Save the network alone; `tdlrt.load` loads it into a new dense one.

    Raises:
        RunError: It cannot be written.
    """
    config = training.config
    limits = ("tau", "budget") if config.method == "tdlrt" else ()
    options = {name: getattr(config, name) for name in ("model", "data", "method", *limits)}
    metadata = {name: str(value) for name, value in options.items() if value is not None}
    with writing(path):
        save(training.model, path, metadata=metadata)


def load_model(config: RunConfig, path: Path, data: Data) -> nn.Module:
    """Load a network that `save_model` saved, of any method.

    Args:
        config: The options of its run.
        path: The file.
        data: Data with the image shape and the number of classes of the training data.

    Returns:
        The network in evaluation mode, on the device of `config`; pruning masks are multiplied
        into the weights.

    Raises:
        CheckpointError: The file cannot be read, or is of another network.
    """
    training = Training(config, data)
    try:
        with open_tensors(path) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}
            training.method.restore(training, stored)
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    load(path, training.model)
    for module in training.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and prune.is_pruned(module):
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    return training.model.eval()
