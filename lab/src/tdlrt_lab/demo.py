"""The demonstration: a network trained small beside the dense one, and both as ONNX files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tdlrt.export import export, load_network
from tdlrt.optim.threads import threads_for
from tdlrt_lab.config import RunConfig
from tdlrt_lab.reports.write import write_report
from tdlrt_lab.run.exporting import accuracy_on, export_path, load_run
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.runner import Observer, run
from tdlrt_lab.run.timing import Case, inference, median_seconds

__all__ = ["BATCHES", "CONFIG", "Demonstration", "ExportedNetwork", "demonstrate"]

CONFIG = RunConfig(model="lenet5", data="digits", budget=0.1, epochs=6, batch_size=50)
"""LeNet-5 on the embedded digits, with the recipe for a budget that the tables use."""

BATCHES = (1, 128)
"""Numbers of images at which the files are timed."""


@dataclass(frozen=True, kw_only=True)
class ExportedNetwork:
    """A network as an ONNX file.

    Attributes:
        file: Its path.
        bytes: Its size.
        accuracy: Percentage of the test images that it classifies correctly in onnxruntime.
        milliseconds: Median time of a batch in onnxruntime, by number of images.
    """

    file: str
    bytes: int
    accuracy: float
    milliseconds: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demonstration found.

    Attributes:
        tdlrt: The network that was trained in Tucker format.
        dense: The network that was trained dense, with the same data, seed and epochs.
        out: The run directory.
        report: The page with the report.
    """

    tdlrt: ExportedNetwork
    dense: ExportedNetwork
    out: str
    report: str


def demonstrate(
    out: str | Path,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
    progress: Callable[[str], object] = lambda text: None,
    rounds: int = 5,
) -> Demonstration:
    """Train LeNet-5 on the digits in Tucker format and dense, and run both as ONNX files.

    Args:
        out: Run directory.
        overwrite: Replace an earlier run in `out`.
        observer: Called during the training.
        progress: Called with a description of each part that follows the training.
        rounds: Timed rounds.

    Raises:
        RunError: The directory cannot be used.
        MissingExtraError: The packages of the extra `export` are not installed.
        Interrupted: A signal stopped the run.
    """
    with threads_for(0):  # of torch: a network as small as this is no faster with more of them
        run(
            CONFIG, out, baseline=True, overwrite=overwrite, observer=observer, command="tdlrt demo"
        )
        progress("exporting both networks to ONNX, and running the files in onnxruntime")
        directory, networks = RunDirectory(out), {}
        for name, one in (("tdlrt", directory), ("dense", directory.baseline)):
            model, data = load_run(one.path)
            images = data.normalise(data.held_out()[0])
            path = export_path(one, f"{CONFIG.model}.onnx")
            export(model, path, images[:2], metadata=data.metadata(), overwrite=overwrite)
            networks[name] = path, load_network(path, "onnx", model)
    cases: dict[tuple[str, int], Case] = {
        (name, batch): inference(network, images[:batch])
        for name, (_, network) in networks.items()
        for batch in BATCHES
    }
    seconds = median_seconds(cases, rounds)
    exported = {
        name: ExportedNetwork(
            file=str(path),
            bytes=path.stat().st_size,
            accuracy=accuracy_on(network, data),
            milliseconds={batch: 1e3 * seconds[name, batch] for batch in BATCHES},
        )
        for name, (path, network) in networks.items()
    }
    progress("writing the report")
    report = write_report(out)
    return Demonstration(**exported, out=str(out), report=str(report.folder / "index.html"))
