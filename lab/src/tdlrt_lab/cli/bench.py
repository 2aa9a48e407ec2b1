"""`tdlrt bench`: the tables of what was measured."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tdlrt.text_tables import format_shape
from tdlrt_lab.cli.terminal_tables import number_table

__all__ = ["layer_times", "network_times"]


def network_times(rows: Sequence[dict[str, Any]]) -> Table:
    """Parameters, bytes and times of the networks; the last line relates them to the first."""
    table = number_table("network", "parameters", "bytes", "step (ms)", "inference (ms)")
    for row in rows:
        table.add_row(
            row["network"],
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            f"{row['step_ms']:.2f}",
            f"{row['inference_ms']:.2f}",
        )
    table.add_section()
    columns = ("parameters", "bytes", "step_ms", "inference_ms")
    shares = [rows[-1][column] / rows[0][column] for column in columns]
    table.add_row("of dense", *(f"{share:.3f}" for share in shares))
    return table


def layer_times(rows: Sequence[dict[str, Any]]) -> Table:
    """Forward and backward passes of each Tucker layer next to those of the dense one."""
    table = number_table("layer", "ranks", "parameters", "dense (ms)", "tucker (ms)", "of dense")
    for row in rows:
        table.add_row(
            row["layer"],
            format_shape(row["ranks"]),
            f"{row['parameters']:,}",
            f"{row['dense_ms']:.2f}",
            f"{row['tucker_ms']:.2f}",
            f"{row['tucker_ms'] / row['dense_ms']:.3f}",
        )
    return table
