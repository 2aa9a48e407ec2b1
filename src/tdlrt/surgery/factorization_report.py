"""The report of `factorize_`: a table with a row per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tdlrt.text_tables import format_shape, format_table

__all__ = ["FactorizationReport", "FactorizationRow"]


@dataclass(frozen=True, kw_only=True)
class FactorizationRow:
    """The outcome for one layer.

    Attributes:
        name: Name of the layer in the model.
        kind: Class of the layer before.
        shape: Shape of the weight.
        ranks: Initial ranks; None if the layer stays dense.
        parameters: Number of parameters of the weight afterwards.
        dense_parameters: Number of entries of the dense weight.
        note: Why the layer stays dense, or a remark.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    ranks: tuple[int, ...] | None
    parameters: int
    dense_parameters: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class FactorizationReport:
    """The result of `factorize_`, or its plan if dry_run is set; prints as a table."""

    rows: tuple[FactorizationRow, ...]

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
        table = [
            [
                row.name,
                format_shape(row.shape),
                "-" if row.ranks is None else format_shape(row.ranks),
                f"{row.dense_parameters:,}",
                f"{row.parameters:,}",
                row.note,
            ]
            for row in self.rows
        ]
        header = ["layer", "shape", "ranks", "dense", self._parameters_header, "note"]
        return f"{format_table(header, table)}\n{self._total_line}"

    @property
    def _total_line(self) -> str:
        hits = self.factorized
        before = sum(row.dense_parameters for row in hits)
        after = sum(row.parameters for row in hits)
        return (
            f"{len(hits)} of {len(self.rows)} layers in Tucker format, "
            f"{before:,} -> {after:,} weight parameters"
        )
