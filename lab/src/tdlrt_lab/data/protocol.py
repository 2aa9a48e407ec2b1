"""What a training needs to know of its data, whether they are images or text."""

from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

__all__ = ["Data", "DataRecord"]

DataRecord: TypeAlias = dict[str, dict[str, int | str]]
"""For each split of a data set, its sizes by name and a digest of its contents."""


class Data(Protocol):
    """Labelled examples for training, and held-out ones: `ImageData` or `TextData`."""

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def split(self) -> Literal["test", "validation"]:
        """What the held-out examples are."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""

    @property
    def unit(self) -> str:
        """What the examples are, in the plural."""

    @property
    def epoch_examples(self) -> int:
        """Number of training examples in an epoch."""

    @property
    def description(self) -> str:
        """Sizes in words."""

    def record(self) -> DataRecord:
        """Sizes and digests, by which a resumed run recognises its data."""

    def held_out(self) -> tuple[Tensor, Tensor]:
        """The held-out examples as they are stored, and their labels."""

    def sample(self, count: int) -> Tensor:
        """Training examples as they are stored, drawn with a fixed seed."""

    def metadata(self) -> dict[str, str]:
        """What the inputs and outputs of a network mean, as texts by name."""

    def hold_out(self, part: float | int, seed: int) -> Any:
        """The same data with a part of the training set, drawn at random, in place of the test set.

        Raises:
            DataError: The training or the validation set would be empty.
        """

    def normalise(self, inputs: Tensor, /) -> Tensor:
        """The network's input for stored examples."""
