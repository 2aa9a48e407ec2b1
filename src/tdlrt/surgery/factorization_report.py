"""What `factorize_` does to each layer, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tdlrt.text_tables import format_shape, format_table

__all__ = ["FactorizationReport", "FactorizationRow"]


@dataclass(frozen=True, kw_only=True)
class FactorizationRow:
    """What happened, or would happen, to one layer.

    Attributes:
        name: Name of the layer in the model.
        kind: Its class before.
        shape: Shape of its weight.
        ranks: Ranks at the start, or None where the layer is left alone.
        parameters: Numbers that stand for the weight afterwards.
        dense_parameters: Numbers in the dense weight.
        note: Why it was left alone, or what is worth knowing.
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
    """The plan or the outcome of `factorize_`; prints as a table."""

    rows: tuple[FactorizationRow, ...]

    _parameters_header: ClassVar[str] = "now"

    @property
    def factorized(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers put in Tucker format."""
        return tuple(row for row in self.rows if row.ranks is not None)

    @property
    def skipped(self) -> tuple[FactorizationRow, ...]:
        """Rows of the layers left alone, the reason in `note`."""
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
