"""Training and test text in memory; windows of it are the examples."""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tdlrt_lab.data.protocol import DataRecord
from tdlrt_lab.data.validation import held_out_rows

__all__ = ["CHARACTERS", "TextData", "windows"]

CHARACTERS = 128
"""Those of ASCII: a byte is a character, and text needs no vocabulary to be stored with it."""

EPOCH_WINDOWS, HELD_OUT_WINDOWS = 1024, 512


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Files of ASCII text, each as its bytes.

    An example is a window: `context` characters, labelled with the characters that follow them.

    Attributes:
        name: Name of the data set.
        train_files: uint8, (n,) for a file of n characters.
        test_files: The same, for the test set.
        context: Characters of a window.
        split: Whether the test files are the test set or validation files in its place.
    """

    name: str
    train_files: tuple[Tensor, ...]
    test_files: tuple[Tensor, ...]
    context: int
    split: Literal["test", "validation"] = "test"

    @property
    def classes(self) -> tuple[str, ...]:
        """The characters."""
        return tuple(map(chr, range(CHARACTERS)))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an example, (context,)."""
        return (self.context,)

    @property
    def unit(self) -> str:
        """Windows."""
        return "windows"

    @property
    def epoch_examples(self) -> int:
        """Number of windows in an epoch: a pass over the text would be too long."""
        return EPOCH_WINDOWS

    @property
    def description(self) -> str:
        """Sizes in words."""
        train, test = (_length(files) for files in (self.train_files, self.test_files))
        return f"{train:,} training, {test:,} {self.split} characters in windows of {self.context}"

    def record(self) -> DataRecord:
        """Sizes, digests and the version of Python, by which a resumed run recognises its data."""
        splits = {"training": self.train_files, self.split: self.test_files}
        return {
            name: {
                "files": len(files),
                "characters": _length(files),
                "python": platform.python_version(),
                "sha256": _digest(files),
            }
            for name, files in splits.items()
        }

    def train_text(self) -> Tensor:
        """The training files one after the other, uint8, (characters,)."""
        return torch.cat(self.train_files)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Windows spread evenly over the test files; see `windows`.

        At most 512, so that an evaluation stays short beside an epoch.
        """
        text = torch.cat(self.test_files)
        last = len(text) - self.context - 1
        count = min(HELD_OUT_WINDOWS, 1 + last // self.context)
        starts = torch.arange(count) * last // max(1, count - 1)
        return windows(text, starts, self.context)

    def sample(self, count: int) -> Tensor:
        """Windows of the training text at places drawn with a fixed seed."""
        text, generator = self.train_text(), torch.Generator().manual_seed(0)
        starts = torch.randint(len(text) - self.context, (count,), generator=generator)
        return windows(text, starts, self.context)[0]

    def metadata(self) -> dict[str, str]:
        """What the inputs and outputs of a network mean, as texts by name."""
        return {
            "input": f"text (N, {self.context}): codes of ASCII characters",
            "output": f"logits (N, {CHARACTERS}, {self.context}) of the characters that follow",
        }

    def hold_out(self, part: float | int, seed: int) -> "TextData":
        """Replace the test set by validation files, drawn at random from the training set.

        Args:
            part: Share (float) or number (int) of the training files to hold out.
            seed: Seed of the random draw.

        Raises:
            DataError: The training or the validation set would be empty.
        """
        rows = held_out_rows(len(self.train_files), part, seed, "training files")
        validation, training = (
            tuple(self.train_files[number] for number in some.tolist()) for some in rows
        )
        return replace(self, train_files=training, test_files=validation, split="validation")

    def normalise(self, text: Tensor) -> Tensor:
        """The network's input: the characters as they are."""
        return text


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Windows of a text and the characters that follow those in them.

    Args:
        text: uint8, (characters,).
        starts: int64, (N,), from 0 to characters - context - 1.
        context: Characters of a window, T.

    Returns:
        Inputs, uint8, (N, T), and labels, int64, (N, T): x_t = text[start + t] and
        y_t = text[start + t + 1].
    """
    places = starts[:, None] + torch.arange(context + 1, device=text.device)
    found = text[places]
    return found[:, :-1], found[:, 1:].long()


def _length(files: Sequence[Tensor]) -> int:
    return sum(map(len, files))


def _digest(files: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{len(file)} ".encode())
        digest.update(file.numpy().data)
    return digest.hexdigest()
