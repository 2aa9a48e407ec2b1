"""The number that says how well a network does: accuracy on images, bits per character on text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ACCURACY", "BITS", "Measure", "measure_of"]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of a result, measured on the held-out set.

    Attributes:
        name: Its name in summaries, in the metrics of an epoch and in events.
        words: Its name for readers.
        unit: Its unit, or nothing.
        digits: Decimals that are shown.
        higher_is_better: Whether the larger of two values is the better one.
    """

    name: str
    words: str
    unit: str
    digits: int
    higher_is_better: bool

    @property
    def title(self) -> str:
        """Title of a column or an axis."""
        return f"{self.words} ({self.unit})" if self.unit else self.words

    def number(self, value: float, width: int = 0) -> str:
        """A value with its unit, padded with spaces to a width."""
        return f"{value:{width}.{self.digits}f} {self.unit}".rstrip()

    def text(self, value: float, width: int = 0) -> str:
        """A value with its name and unit."""
        return f"{self.words} {self.number(value, width)}"


ACCURACY = Measure(name="accuracy", words="accuracy", unit="%", digits=2, higher_is_better=True)
BITS = Measure(
    name="bits_per_character",
    words="bits per character",
    unit="",
    digits=3,
    higher_is_better=False,
)


def measure_of(values: Mapping[str, Any]) -> Measure:
    """The measure of a result: of a summary, an event, or the fields of an epoch's metrics.

    >>> measure_of({"accuracy": 98.0}).text(98.0)
    'accuracy 98.00 %'
    >>> measure_of({"accuracy": 50.0, "bits_per_character": 2.5}).text(2.5)
    'bits per character 2.500'
    """
    return ACCURACY if values.get(BITS.name) is None else BITS
