"""The report of `factorize_`: a table with a row per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tdlrt.text_tables import format_shape, format_table

__all__ = ["FactorizationReport", "FactorizationRow"]

_NOTABLE = 0.005  # smaller changes are rounding, and print as 0%


@dataclass(frozen=True, kw_only=True)
class FactorizationRow:
    """The outcome for one layer, or for another module that holds weights and stays dense.

    Attributes:
        name: Name of the layer in the model.
        kind: Class of the layer before.
        shape: Shape of the weight, or of the largest one; empty if it has none yet.
        ranks: Initial ranks; None if the layer stays dense.
        parameters: Number of parameters of the weight afterwards.
        dense_parameters: Number of entries of the dense weight.
        note: Why the layer stays dense, or a remark.
        change: ||W - W'|| / ||W|| for the weight W before and W' at the start, from truncation and
            scale; None if the weight stays, or has no values.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    parameters: int
    dense_parameters: int
    note: str = ""
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class FactorizationReport:
    """The result of `factorize_`, or its plan if dry_run is set; prints as a table.

    Attributes:
        rows: One per layer, then one per other module that holds weights of two or more dimensions.
        vectors: One per module that holds vectors alone, such as a norm; nothing to factorise.
    """

    rows: tuple[FactorizationRow, ...]
    vectors: tuple[FactorizationRow, ...] = ()

    _parameters_header: ClassVar[str] = "now"

    @property
    def factorized(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers that get Tucker format."""
        return tuple(row for row in self.rows if row.ranks is not None)

    @property
    def skipped(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers that stay dense, with the reason in `note`."""
        return tuple(row for row in self.rows if row.ranks is None)

    def __str__(self) -> str:
        moved = [row.change for row in self.rows if row.change is not None]
        table = [
            [
                row.name,
                format_shape(row.shape),
                "-" if row.ranks is None else format_shape(row.ranks),
                f"{row.dense_parameters:,}",
                f"{row.parameters:,}",
                row.note if row.change is None else _changed(row.change, row.note),
            ]
            for row in self.rows
        ]
        header = ["layer", "shape", "ranks", "dense", self._parameters_header, "note"]
        lines = [format_table(header, table), self._total_line]
        if self.vectors:
            lines.append(f"vectors stay as they are: {_by_kind(self.vectors)}")
        if max(moved, default=0) > _NOTABLE:
            lines.append(
                f"The start changes weights by up to {100 * max(moved):.0f}%; to keep a trained "
                "network,\npass rank=tdlrt.RelativeTolerance(0.1), which bounds the change."
            )
        return "\n".join(lines)

    @property
    def _total_line(self) -> str:
        hits = self.factorized
        before = sum(row.dense_parameters for row in hits)
        after = sum(row.parameters for row in hits)
        return (
            f"{len(hits)} of {len(self.rows)} layers in Tucker format, "
            f"{before:,} -> {after:,} weight parameters"
        )


def _by_kind(rows: Sequence[FactorizationRow]) -> str:
    """How many modules of each kind there are, with how many parameters."""
    kinds = dict.fromkeys(row.kind for row in rows)
    groups = {kind: [row.parameters for row in rows if row.kind == kind] for kind in kinds}
    return ", ".join(f"{len(n)} {kind} ({sum(n):,} parameters)" for kind, n in groups.items())


def _changed(change: float, note: str) -> str:
    return f"changed by {100 * change:.0f}%" + (f", {note}" if note else "")
