"""The metrics of an epoch, and their validation when they are read from a file."""

import math
import reprlib
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from tdlrt_lab.run.rank_changes import check_rank_changes, is_ranks

__all__ = ["EpochMetrics", "is_finite_number"]


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """The metrics of one epoch; a line of `metrics.jsonl`.

    Attributes:
        epoch: Number of the epoch, from 1.
        loss: Mean training loss over the epoch.
        train_accuracy: In percent, over the training batches, each before its step.
        test_accuracy: In percent, on the test set at the end of the epoch; None in a run that
            holds out a validation set and does not use the test set.
        compression: 1 - parameters / dense parameters over the factorised weights.
        network_compression: The same over all parameters.
        parameters: Parameters of the factorised weights; of the whole network if there are none.
        ranks: Ranks of each factorised layer.
        lr: Learning rate of the last step.
        seconds: Duration of training and evaluation.
        validation_accuracy: In percent, on the validation set; None if there is none.
        skipped_steps: Steps of the run so far that were skipped because a loss or gradient was
            NaN or infinite.
        bits_per_character: Mean cross-entropy of a character on the set of `split` at the end of
            the epoch, in bits; None for images.
        steps: Steps of the run up to the end of the epoch; 0 in runs of earlier versions.
        rank_changes: Each step of the epoch that changed ranks, as `[step, {layer: ranks}]` with
            the number of steps since the start of the run and the new ranks of the layers that
            changed. The first epoch begins with all ranks at step 0. Empty in runs of earlier
            versions; a run that fills 2^20 letters with changes leaves out the later ones.
    """

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float | None
    compression: float
    network_compression: float
    parameters: int
    ranks: dict[str, list[int]]
    lr: float
    seconds: float
    validation_accuracy: float | None = None
    skipped_steps: int = 0
    bits_per_character: float | None = None
    steps: int = 0
    rank_changes: list[list[Any]] = field(default_factory=list)

    @property
    def split(self) -> Literal["test", "validation"]:
        """The set on which `accuracy` was measured."""
        return "test" if self.validation_accuracy is None else "validation"

    @property
    def accuracy(self) -> float:
        """In percent, on the set of `split` at the end of the epoch."""
        measured = {"test": self.test_accuracy, "validation": self.validation_accuracy}[self.split]
        return math.nan if measured is None else measured

    @classmethod
    def from_dict(cls, values: Any) -> "EpochMetrics":
        """Build the metrics from the fields that a file contains.

        Raises:
            ValueError: A field is missing, unknown or of the wrong type.
        """
        try:
            metrics = cls(**values)
        except TypeError as error:
            raise ValueError(f"not the metrics of an epoch ({error})") from error
        # Runs on images have no bits per character.
        missing = metrics.bits_per_character is None
        left_out = {"ranks", "rank_changes", *["bits_per_character"] * missing}
        numbers = {name: value for name, value in vars(metrics).items() if name not in left_out}
        others = {name: v for name, v in numbers.items() if not isinstance(v, int | float)}
        if others not in ({}, {"test_accuracy": None}, {"validation_accuracy": None}):
            raise ValueError(f"got {numbers}, expected numbers")
        if not is_ranks(metrics.ranks):
            raise ValueError(f"ranks {metrics.ranks!r}: expected a list of integers for each layer")
        epoch, steps = metrics.epoch, metrics.steps
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps {reprlib.repr(steps)}: expected an integer from 0")
        if metrics.rank_changes != []:
            if type(epoch) is not int or epoch < 1 or steps < epoch:
                raise ValueError(
                    f"rank_changes of epoch {reprlib.repr(epoch)}, which ends after step "
                    f"{reprlib.repr(steps)}: expected an epoch from 1, and steps in each"
                )
            check_rank_changes(metrics.rank_changes, steps * (epoch - 1) // epoch, steps)
        return metrics


def is_finite_number(value: object) -> bool:
    """Whether a value is a number and neither infinite nor NaN."""
    # math.isfinite fails for an integer that is too large for a float.
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max
