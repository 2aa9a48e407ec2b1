"""Storing a run on disk and taking it up again."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

from tdlrt.errors import CheckpointError, ConfigError, RunError
from tdlrt.files import write_atomically
from tdlrt.serialization import load, save
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import ImageData
from tdlrt_lab.run.finite import check_state
from tdlrt_lab.run.processes import any_process, is_first
from tdlrt_lab.run.results import numbered_checkpoint, numbered_checkpoints, writing
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
ADVICE = "start the run anew with --overwrite, or put the right checkpoint there"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When checkpoints are written, beside the end of each epoch and a signal; how many stay.

    Attributes:
        steps: Steps between two of them; None for no such rule.
        minutes: Minutes after one of them, at the next end of a step; None for no such rule.
        keep: How many of the last ones stay.
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
    """Writes the checkpoints of a training when they are due.

    Args:
        path: Of the newest one.
        plan: When they are due.
    """

    def __init__(self, path: Path, plan: Checkpoints) -> None:
        self._path, self._plan = path, plan
        self._written = time.monotonic()

    def after_step(self, training: Training) -> None:
        """Write one if it is due; every process must call this."""
        # After the last step of an epoch one is written anyway. Where the last steps were skipped,
        # the checkpoint before them is the one to go back to.
        at_end = training.step % training.steps_per_epoch == 0
        if not at_end and not training.skipped_in_a_row and self._due(training):
            self.write(training)

    def write(self, training: Training) -> None:
        """Write one now; every process must call this.

        Raises:
            NonFiniteError: A weight is not finite; the checkpoints are as before.
            RunError: It cannot be written; the checkpoints are as before.
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
        late = time.monotonic() >= self._written + 60 * minutes
        return any_process(lambda: late, training.device)  # their clocks differ


def save_checkpoint(training: Training, path: Path, *, keep: int = 1) -> None:
    """Store everything the rest of the run depends on; a crash leaves the checkpoints before.

    Args:
        training: The training.
        path: Of the newest checkpoint; older ones stand beside it, numbered.
        keep: How many stay.

    Raises:
        RunError: It cannot be written.
    """
    state = {"format": FORMAT, **training.state_dict()}
    if not is_first():  # state_dict needs all processes, the file one
        return
    new = path.with_name("new.pt")
    with writing(path):
        write_atomically(new, lambda file: _dump(state, file))
        # The others make way once the new one is whole; killed in between, no file is lost.
        for number in range(keep - 1, 0, -1):
            newer = numbered_checkpoint(path, number - 1)
            if newer.exists():
                newer.replace(numbered_checkpoint(path, number))
        new.replace(path)
        for number, older in numbered_checkpoints(path).items():
            if number >= keep:
                older.unlink()


def _dump(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch finishes its archive even where a write failed, and complains about that instead.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class _DamagedError(RunError):
    """A checkpoint cannot be read."""


def load_newest(training: Training, paths: Sequence[Path], warn: Callable[[str], object]) -> None:
    """Take up the newest checkpoint that can be read, if there is one at all.

    Args:
        training: The training.
        paths: The checkpoints, the newest first.
        warn: Told which ones were damaged; they are renamed.

    Raises:
        RunError: None can be read, or the newest that can is of another version or network.
    """
    damaged: list[tuple[Path, RunError]] = []
    for path in paths:
        try:
            state = _read(path, training.device)
        except _DamagedError as error:
            damaged.append((path, error))
            continue
        _take_up(training, state, path)
        for bad, why in damaged:
            bad.replace(bad.with_name(bad.name + ".damaged"))
            reason = str(why).removesuffix(f"; {ADVICE}")
            warn(f"{reason}; set aside as {bad.name}.damaged, continuing from {path.name}")
        return
    if damaged:
        raise damaged[0][1]


def load_checkpoint(training: Training, path: Path) -> None:
    """Take up a stored run. Only tensors and plain types are read, no code.

    Raises:
        RunError: The file is broken, of another version, or of another network.
    """
    _take_up(training, _read(path, training.device), path)


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    # A damaged file makes the unpickler and the zip reader raise nearly anything.
    try:
        state = read_state(path, device)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _DamagedError(f"{path}: not a readable checkpoint ({reason}); {ADVICE}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        raise RunError(f"{path}: format {found!r}; expected a checkpoint of format 1; {ADVICE}")
    return dict(state)


def _take_up(training: Training, state: dict[str, Any], path: Path) -> None:
    try:
        check_position(state, training.config.epochs, training.steps_per_epoch)
        training.load_state_dict(state)
    except (
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
    """Store the network alone; `tdlrt.load` takes it up in a new dense one.

    Raises:
        RunError: It cannot be written.
    """
    config = training.config
    limits = ("tau", "budget") if config.method == "tdlrt" else ()
    options = {name: getattr(config, name) for name in ("model", "data", "method", *limits)}
    texts = {name: str(value) for name, value in options.items() if value is not None}
    with writing(path):
        save(training.model, path, metadata=texts)


def load_model(config: RunConfig, path: Path, data: ImageData) -> nn.Module:
    """The network that `save_model` stored, of any method, masks multiplied into its weights.

    Args:
        config: The options of its run.
        path: The file.
        data: Images of the shape and with the classes of those it was trained on.

    Returns:
        The network, in evaluation mode, on the device of the options.

    Raises:
        CheckpointError: The file cannot be read or is of another network.
    """
    training = Training(config, data)
    try:
        training.method.restore(training, load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    load(path, training.model)
    for module in training.model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and prune.is_pruned(module):
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    return training.model.eval()
