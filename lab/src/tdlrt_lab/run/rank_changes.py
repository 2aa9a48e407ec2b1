"""The ranks of a run step by step: which layers changed theirs, and when."""

import json
import reprlib
from collections.abc import Iterable
from typing import Any

__all__ = ["RankRecorder", "check_rank_changes", "is_ranks"]

MAX_LETTERS = 2**20
"""Letters of JSON from which on a run records no more changes.

It bounds what a change of all ranks in every step of a long run adds to `metrics.jsonl`, one line
of which may have 2^22 letters, and to each checkpoint, which may have 2 million values.
"""


class RankRecorder:
    """Finds the layers whose ranks differ from those of the step before."""

    def __init__(self) -> None:
        self._ranks: dict[str, list[int]] = {}
        self._letters = 0

    def changes(self, step: int, ranks: dict[str, list[int]]) -> list[list[Any]]:
        """The change that this step made, `[[step, {layer: ranks}]]`; else nothing.

        Args:
            step: Number of steps since the start of the training.
            ranks: Ranks of each layer after the step.
        """
        changed = {name: row for name, row in ranks.items() if self._ranks.get(name) != row}
        self._ranks = ranks
        if not changed or self._letters >= MAX_LETTERS:
            return []
        self._letters += _letters([step, changed])
        return [[step, changed]]

    def restore(self, ranks: dict[str, list[int]], recorded: Iterable[list[Any]]) -> None:
        """Continue from these ranks, and from the changes that were recorded before."""
        self._ranks, self._letters = ranks, sum(map(_letters, recorded))


def check_rank_changes(changes: Any, first: int, last: int) -> None:
    """Check changes of ranks from a file.

    Args:
        changes: The changes.
        first: Number of steps before which there is none.
        last: Number of steps after which there is none.

    Raises:
        ValueError: They are not what `RankRecorder` finds in these steps.
    """
    if not isinstance(changes, list):
        raise ValueError(f"rank_changes {reprlib.repr(changes)}: expected a list")
    for change in changes:
        if not (
            isinstance(change, list)
            and len(change) == 2
            and type(change[0]) is int
            and first <= change[0] <= last
            and is_ranks(change[1])
        ):
            raise ValueError(
                f"rank_changes: {reprlib.repr(change)}: expected a step after the one before, "
                f"at most {reprlib.repr(last)}, and a list of integers for each layer"
            )
        first = change[0] + 1


def is_ranks(value: object) -> bool:
    """Whether a value has a list of integers for each layer."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(row, list) and all(type(r) is int for r in row)
        for name, row in value.items()
    )


def _letters(change: list[Any]) -> int:
    return len(json.dumps(change))
