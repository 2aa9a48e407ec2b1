"""`tdlrt demo`: train, export and compare a small network in one command."""

from dataclasses import asdict
from pathlib import Path
from textwrap import wrap
from typing import Annotated

from rich.console import Console

from tdlrt.text_tables import format_bytes
from tdlrt_lab.cli.display import RunDisplay
from tdlrt_lab.cli.output import OUTPUT, AsJson, Debug, shown_option
from tdlrt_lab.cli.screens import LineScreen, choose_screen
from tdlrt_lab.demo import BATCHES, Demonstration, demonstrate
from tdlrt_lab.run.files import write_text

__all__ = ["closing_line", "demo"]

LINE = 79


def closing_line(found: Demonstration) -> str:
    """Accuracy, sizes and times of both files, and where run and report are."""
    small, dense = found.tdlrt, found.dense
    times = " and ".join(
        f"{small.milliseconds[batch]:.3g} ms for {batch} image{'s' * (batch > 1)} "
        f"(dense {dense.milliseconds[batch]:.3g} ms)"
        for batch in BATCHES
    )
    return (
        f"The network trained in Tucker format classifies {small.accuracy:.1f} % of the test "
        f"images correctly (dense {dense.accuracy:.1f} %), its ONNX file of "
        f"{format_bytes(small.bytes)} is {dense.bytes / small.bytes:.1f}x smaller than the dense "
        f"one's {format_bytes(dense.bytes)}, and onnxruntime takes {times}; the run is in "
        f"{found.out}, its report in {found.report}."
    )


def demo(
    out: Annotated[str, shown_option("Run directory.", OUTPUT)] = "runs/demo",
    overwrite: Annotated[
        bool, shown_option("Replace an earlier run in OUT.", OUTPUT, "--overwrite")
    ] = False,
    picture: Annotated[
        Path | None,
        shown_option("Also write what is printed as an SVG picture.", OUTPUT, metavar="FILE.svg"),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a small network on digits beside the dense one, and compare their files.

    LeNet-5 is trained on the embedded digits in Tucker format, down to a tenth of
    its parameters, and dense. Both are exported to ONNX and run in onnxruntime.
    """
    console = Console(record=picture is not None)
    recorded = LineScreen(console) if picture is not None else None
    with recorded or choose_screen(as_json=as_json) as screen:
        found = demonstrate(
            out, overwrite=overwrite, observer=RunDisplay(screen, out), progress=screen.line
        )
        screen.event({"event": "demo", **asdict(found)})
        screen.line(
            "\n".join(
                wrap(closing_line(found), LINE, break_long_words=False, break_on_hyphens=False)
            )
        )
    if picture is not None:
        write_text(picture, console.export_svg(title="tdlrt demo"))
