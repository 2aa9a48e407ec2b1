"""`tdlrt export`: a trained network as a file that runs without tdlrt."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tdlrt.export import FORMATS
from tdlrt.text_tables import format_bytes
from tdlrt_lab.cli.output import OUTPUT, AsJson, Debug, empty_table, shown_option
from tdlrt_lab.options import DATA
from tdlrt_lab.run.exporting import export_run

__all__ = ["closing_lines", "export", "export_table"]


def export_table(found: dict[str, Any]) -> Table:
    """Parameters, bytes and times of the dense, the Tucker and the exported network."""
    numbers = ["parameters", "bytes", "ms per batch", "of dense"]
    table = empty_table(["network"], numbers=numbers)
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
    """Parity error, size, accuracy and path of the file."""
    lines = [
        f"parity error {found['parity']:.1e} on {found['batch_size']} test {found['unit']}",
        f"{format_bytes(found['bytes'])}, {_smaller(found)}",
    ]
    if found["int8"]:
        lines.append(f"accuracy {found['int8_accuracy']:.2f} % (trained {found['accuracy']:.2f} %)")
    return [*lines, f"{found['file']} written in {found['seconds']:.1f} s"]


def _smaller(found: dict[str, Any]) -> str:
    """How the size of the file compares with that of the dense network's weights."""
    ratio = found["networks"][0]["bytes"] / found["bytes"]
    if ratio >= 1:
        return f"{ratio:.1f}x smaller than the dense weights"
    return f"{1 / ratio:.2f}x the size of the dense weights"


def _name(found: dict[str, Any]) -> str:
    return f"{found['format']} int8" if found["int8"] else str(found["format"])


def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN", help="Run directory written by train.")],
    format: Annotated[
        str,
        shown_option(
            f"File format: {', '.join(FORMATS)}. plain holds only weights (safetensors), to load "
            "with the code of the network.",
            OUTPUT,
        ),
    ],
    int8: Annotated[
        bool,
        shown_option(
            "Quantise weights and activations to 8 bits, calibrated on training images.",
            OUTPUT,
            "--int8",
        ),
    ] = False,
    prefer: Annotated[
        str,
        shown_option(
            "Choice of plain layers: size (fewest parameters) or speed (least time).",
            OUTPUT,
        ),
    ] = "size",
    out: Annotated[
        str | None, shown_option("Path of the file.", OUTPUT, show_default="RUN/export/MODEL...")
    ] = None,
    overwrite: Annotated[bool, shown_option("Replace the file.", OUTPUT, "--overwrite")] = False,
    data_dir: Annotated[
        str | None,
        shown_option(
            "Folder with NAME/train.parquet and NAME/test.parquet.",
            DATA,
            show_default="as in the run",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        shown_option(
            "Number of test images for comparison and timing.",
            DATA,
            min=1,
            show_default="as in the run",
        ),
    ] = None,
    rounds: Annotated[
        int, shown_option("Number of timed rounds; medians are shown.", DATA, min=1)
    ] = 5,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Export the network of a finished run to a file that runs without tdlrt.

    Loads the file again and shows the parity error (largest difference from the
    outputs of the trained network, relative to the largest output), and size and
    speed compared with the dense and the Tucker network.
    """
    found = export_run(
        run_dir,
        out,
        format=format,
        int8=int8,
        prefer=prefer,
        data_dir=data_dir,
        batch_size=batch_size,
        rounds=rounds,
        overwrite=overwrite,
    )
    if as_json:
        print(json.dumps(found))
    else:
        Console().print(export_table(found))
        print("\n".join(closing_lines(found)))
