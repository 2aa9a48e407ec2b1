"""Tables and summary lines of the commands."""

from typing import Any

from rich.table import Table

from tdlrt.text_tables import format_count, format_shape
from tdlrt_lab.cli.output import empty_table
from tdlrt_lab.measures import measure_of

__all__ = ["closing_line", "layer_table"]


def layer_table(summary: dict[str, Any]) -> Table:
    """Shape, ranks, parameters, multiply-adds and compression of each layer of a run."""
    table = empty_table(["layer"], ["shape", "ranks"], ["parameters", "MACs", "compression"])
    for layer in summary["layers"]:
        dense = layer["ranks"] is None
        table.add_row(
            layer["name"],
            format_shape(layer["shape"]),
            "dense" if dense else format_shape(layer["ranks"]),
            f"{layer['parameters']:,}",
            "" if layer["macs"] is None else format_count(layer["macs"]),
            "" if dense else _percent(layer["compression"]),
        )
    table.add_section()
    compressed = summary["method"] != "dense"
    if compressed:
        parameters, saved = f"{summary['parameters']:,}", _percent(summary["compression"])
        table.add_row("compressed layers", "", "", parameters, "", saved)
    parameters, macs = f"{summary['network_parameters']:,}", format_count(summary["macs"])
    saved = _percent(summary["network_compression"]) if compressed else ""
    table.add_row("whole network", "", "", parameters, macs, saved)
    if compressed:
        parameters = f"{summary['network_dense_parameters']:,}"
        table.add_row("dense network", "", "", parameters, format_count(summary["dense_macs"]), "")
    return table


def closing_line(summary: dict[str, Any]) -> str:
    """Quality, compression and time of a run, with those of the dense baseline if there is one."""
    measure = measure_of(summary)
    quality, seconds = measure.text(summary[measure.name]), f"{summary['seconds']:.1f} s"
    if summary["method"] == "dense":
        return f"{quality} in {seconds}"
    dense = summary[f"dense_{measure.name}"]
    if dense is not None:
        quality += f" (dense {measure.number(dense)})"
        seconds += f" (dense {summary['dense_seconds']:.1f} s)"
    return f"{quality}, compression {_percent(summary['compression'])}, {seconds}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
