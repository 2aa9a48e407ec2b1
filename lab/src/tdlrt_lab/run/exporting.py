"""Exporting the network of a finished run, and measuring the exported file."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tdlrt.errors import ConfigError, ExportError, RunError
from tdlrt.export import FORMATS, ExportReport, export, load_network
from tdlrt.nn import TuckerLayer
from tdlrt.paths import Preference
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import Data, load_data
from tdlrt_lab.models import build_model
from tdlrt_lab.names import pick
from tdlrt_lab.run.accuracy import accuracy
from tdlrt_lab.run.checkpoint import load_model
from tdlrt_lab.run.files import check_own
from tdlrt_lab.run.results import RunDirectory
from tdlrt_lab.run.timing import (
    Case,
    batch_in_channels_last,
    channels_last,
    inference,
    median_seconds,
    parameter_count,
    weight_bytes,
)

__all__ = [
    "accuracy_on",
    "calibration_inputs",
    "export_path",
    "export_run",
    "inference_times",
    "load_run",
]

CALIBRATION_EXAMPLES = 512


def export_run(
    run: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "onnx",
    int8: bool = False,
    prefer: str = "size",
    data_dir: str | Path | None = None,
    batch_size: int | None = None,
    rounds: int = 5,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Export the network of a finished run and measure the file.

    Args:
        run: The run directory.
        out: The file; by default one named after the network, in `run/export`.
        format: One of `tdlrt.export.FORMATS`.
        int8: Quantise after training, calibrated on training examples.
        prefer: 'size' for the layers with the fewest parameters, 'speed' for the fastest ones.
        data_dir: Folder of the parquet files; by default that of the run.
        batch_size: Test examples for the comparison and the timing; by default the batch size of
            the run.
        rounds: Timed rounds.
        overwrite: Replace a file at `out`.

    Returns:
        The figures of `tdlrt.export.ExportReport`; 'accuracy' of the trained network, in percent
        over the test set; 'int8_accuracy', None without int8; and 'networks', one row each for
        the dense, the trained and the exported network. The trained one is called 'tucker', or by
        its method if it has no Tucker layers; in a dense run it has no row.

    Raises:
        UnknownNameError: The format is not known.
        ConfigError: The format does not support int8.
        ExportError: The path exists.
        RunError: The directory contains no finished run.
        CheckpointError: Its model cannot be read.
        DataError: The data cannot be read.
        MissingExtraError: A package that the format needs is not installed.
    """
    writer, directory = pick("format", format, FORMATS), RunDirectory(run)
    preference: Any = pick("prefer", prefer, {name: name for name in get_args(Preference)})
    if int8 and not writer.has_int8:
        formats = " or ".join(name for name, one in FORMATS.items() if one.has_int8)
        raise ConfigError(
            f"int8 with format {format!r}: expected a format that supports int8: {formats}"
        )
    config = _finished(directory)
    name = f"{config.model}{'-int8' if int8 else ''}{writer.suffix}"
    path = export_path(directory, name) if out is None else Path(out)
    if path.exists() and not overwrite:
        raise ExportError(
            f"{path}: already exists; replace it with --overwrite, or choose another path with "
            "--out"
        )
    model, data = load_run(run, data_dir)
    held_out, _ = data.held_out()
    inputs = data.normalise(held_out[: batch_size or config.batch_size])
    report = export(
        model,
        path,
        inputs,
        format=format,
        calibration=calibration_inputs(data) if int8 else None,
        prefer=preference,
        metadata=data.metadata(),
        overwrite=overwrite,
    )
    exported = load_network(path, format, model)
    return {
        "run": str(directory.path),
        "file": str(path),
        "format": format,
        "int8": int8,
        "prefer": prefer,
        "parity": report.parity,
        "parameters": report.parameters,
        "bytes": report.bytes,
        "size_ratio": report.size_ratio,
        "seconds": report.seconds,
        "accuracy": directory.read_summary()["accuracy"],
        "int8_accuracy": accuracy_on(exported, data) if int8 else None,
        "batch_size": len(inputs),
        "unit": data.unit,
        "networks": _network_rows(config, data, model, exported, report, inputs, rounds),
    }


def _network_rows(
    config: RunConfig,
    data: Data,
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    report: ExportReport,
    inputs: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    """Parameters, bytes and time of the dense, the trained and the exported network."""
    dense = build_model(config.model, data.input_shape, len(data.classes)).eval()
    times = inference_times(dense, model, exported, inputs, rounds)
    is_tucker = any(isinstance(module, TuckerLayer) for module in model.modules())
    trained = "tucker" if is_tucker else config.method
    sizes = {
        "dense": ("dense", parameter_count(dense), weight_bytes(dense)),
        "trained": (trained, parameter_count(model), weight_bytes(model)),
        "exported": ("exported", report.parameters, report.bytes),
    }
    if config.method == "dense":
        del sizes["trained"]
    return [
        {"network": name, "parameters": parameters, "bytes": size, "inference_ms": 1e3 * times[key]}
        for key, (name, parameters, size) in sizes.items()
    ]


def export_path(directory: RunDirectory, name: str) -> Path:
    """The path of an exported file inside a run directory.

    Raises:
        RunError: The folder leads out of the run directory.
    """
    path = directory.path / "export" / name
    check_own(path.parent, within=directory.path)
    return path


def load_run(run: str | Path, data_dir: str | Path | None = None) -> tuple[nn.Module, Data]:
    """The network of a finished run, in evaluation mode on the CPU, and its data.

    Args:
        run: The run directory.
        data_dir: Folder of the parquet files; by default that of the run.

    Raises:
        RunError: The directory contains no finished run.
        CheckpointError: Its model cannot be read.
        DataError: The data cannot be read.
    """
    directory = RunDirectory(run)
    config = _finished(directory)
    data = load_data(config.data, data_dir or config.data_dir, train_images=config.train_images)
    return load_model(config, directory.model, data), data


def accuracy_on(network: Callable[[Tensor], Tensor], data: Data) -> float:
    """Percentage of the labels of the test set that a network predicts."""
    return accuracy(lambda x: network(data.normalise(x)), *data.held_out())


def _finished(directory: RunDirectory) -> RunConfig:
    """The options of a finished run, with the CPU as its device."""
    if not directory.config.exists():
        raise RunError(
            f"{directory.path}: contains no run; expected a directory written by tdlrt train"
        )
    stored = directory.read_config()
    if not directory.summary.exists():
        raise RunError(
            f"{directory.path}: the run is not finished; continue it with --resume, then export it"
        )
    try:
        return RunConfig(**{**stored, "device": "cpu"})
    except TypeError as error:
        raise RunError(
            f"{directory.config}: has options that this version does not have ({error})"
        ) from error


def calibration_inputs(data: Data) -> Tensor:
    """A sample of the training examples, drawn with a fixed seed, as inputs of the network."""
    return data.normalise(data.sample(CALIBRATION_EXAMPLES))


def inference_times(
    dense: nn.Module,
    model: nn.Module,
    exported: Callable[[Tensor], Tensor],
    inputs: Tensor,
    rounds: int,
) -> dict[str, float]:
    """Median seconds per batch; of the dense network, in the faster of two memory layouts."""
    inputs_last = batch_in_channels_last(inputs)
    if isinstance(exported, nn.Module) and not isinstance(exported, torch.fx.GraphModule):
        exported, inputs_of_export = channels_last(exported), inputs_last
    else:
        inputs_of_export = inputs
    cases: dict[str, Case] = {
        "dense": inference(dense, inputs),
        "dense, channels last": inference(channels_last(copy.deepcopy(dense)), inputs_last),
        "trained": inference(channels_last(copy.deepcopy(model)), inputs_last),
        "exported": inference(exported, inputs_of_export),
    }
    times = median_seconds(cases, rounds)
    return times | {"dense": min(times["dense"], times["dense, channels last"])}
