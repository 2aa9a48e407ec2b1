"""`tdlrt export`: the table of what was measured, and what is said below it."""

from typing import Any

from rich.table import Table

from tdlrt_lab.cli.terminal_tables import number_table

__all__ = ["closing_lines", "export_table"]


def export_table(found: dict[str, Any]) -> Table:
    """Parameters, bytes and time of the exported network below those it stands for."""
    table = number_table("network", "parameters", "bytes", "ms per batch", "of dense")
    for row in found["networks"]:
        table.add_row(
            _name(found) if row["network"] == "exported" else row["network"],
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            f"{row['inference_ms']:.2f}",
            f"{row['inference_ms'] / found['networks'][0]['inference_ms']:.3f}",
        )
    return table


def closing_lines(found: dict[str, Any]) -> list[str]:
    """Parity, size, accuracy and place of the file."""
    lines = [
        f"parity error {found['parity']:.1e} on {found['batch_size']} test images",
        f"file size {found['size_ratio']:.3f} times 4 bytes per parameter",
    ]
    if found["int8"]:
        lines.append(f"accuracy {found['int8_accuracy']:.2f} % (trained {found['accuracy']:.2f} %)")
    return [*lines, f"{found['file']} written in {found['seconds']:.1f} s"]


def _name(found: dict[str, Any]) -> str:
    return f"{found['format']} int8" if found["int8"] else str(found["format"])
