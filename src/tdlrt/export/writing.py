"""`export`: writes a trained network to a file, reads it back and compares the outputs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tdlrt.errors import ExportError, NonFiniteError, UnknownNameError
from tdlrt.export import onnx, plain_files, pt2
from tdlrt.export.source import Source
from tdlrt.files import open_regular, write_bytes
from tdlrt.paths import Preference
from tdlrt.surgery import copied, plain_layers, without_adapters

__all__ = ["FORMATS", "ExportReport", "Format", "export", "load_network"]

Network: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """A file format: how a network is written to a file, and read from it.

    A graph holds operations, of which attention may be made; other formats hold torch's layers.
    """

    suffix: str
    dump: Callable[[Source], bytes]
    load: Callable[[bytes, nn.Module], Network]
    has_int8: bool = True
    is_graph: bool = True


FORMATS = {
    "plain": Format(
        ".safetensors", plain_files.dump, plain_files.load, has_int8=False, is_graph=False
    ),
    "pt2": Format(".pt2", pt2.dump, pt2.load),
    "onnx": Format(".onnx", onnx.dump, onnx.load),
}


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """Measurements of an exported file.

    Attributes:
        path: The file.
        format: One of `FORMATS`.
        int8: Whether weights and activations are 8-bit integers.
        parity: max |y - y_0| / max |y_0|, for the outputs y of the file and y_0 of the model.
        parameters: Number of parameters of the plain network, which the file has.
        model_parameters: Number of parameters of the model that was exported, in Tucker format. It
            is smaller than `parameters` where kernel modes are factorised, because torch has no
            layer for them.
        bytes: Size of the file.
        seconds: Time that writing and comparing took.
    """

    path: Path
    format: str
    int8: bool
    parity: float
    parameters: int
    model_parameters: int
    bytes: int
    seconds: float

    @property
    def size_ratio(self) -> float:
        """Size of the file relative to 4 bytes per parameter."""
        return self.bytes / (4 * self.parameters)


def export(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor,
    *,
    format: str = "onnx",
    calibration: Tensor | None = None,
    fuse_batch_norm: bool = True,
    prefer: Preference = "size",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a trained network to a file that runs without this library.

    The network is converted to plain torch layers (`to_plain`, for the shape of `inputs`), written
    for any batch size, read back and compared with the model before the file appears at `path`.

    Args:
        model: A model that maps one tensor to one tensor, both with the batch first; exported in
            evaluation mode and not changed.
        path: The file to write; missing folders are made.
        inputs: Inputs for the comparison, (N, ...), preferably real and not random.
        format: "plain" (safetensors, for users who have the code of the model: see `load_plain`),
            "pt2" (torch.export) or "onnx".
        calibration: A few hundred typical inputs, (N, ...). If given, weights and activations are
            quantised to int8 after training. For "pt2" and "onnx" only.
        fuse_batch_norm: Fold batch norms into the layers before them wherever `to_plain` can.
        prefer: 'size' for the fewest parameters, 'speed' for the least time (see `to_plain`).
        metadata: Strings to store in the file, such as how inputs are normalised.
        overwrite: Replace an existing file at `path`.

    Returns:
        Measurements of the file.

    Raises:
        UnknownNameError: The format is not known.
        PathError: prefer is neither 'size' nor 'speed'.
        ExportError: The path exists or cannot be written, the inputs do not fit, or the model
            cannot be traced.
        NonFiniteError: The outputs of the model are not finite.
        MissingExtraError: A package that the format needs is not installed.
    """
    started = time.perf_counter()
    path = Path(path)
    _check(path, inputs, format, calibration, overwrite)
    model = copied(model).cpu().eval()
    inputs = inputs.detach().cpu()
    outputs = _outputs(model, inputs)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = without_adapters(model)
    plain_network = plain_layers(
        model,
        input_size=None,
        example_inputs=inputs,
        prefer=prefer,
        fuse_batch_norm=fuse_batch_norm,
        pack=not FORMATS[format].is_graph,
    ).requires_grad_(False)
    source = Source(
        model=model,
        plain=plain_network,
        example=torch.cat([inputs[:1], inputs[:1]]),  # a batch of 1 would be traced as a constant
        calibration=None if calibration is None else calibration.detach().cpu(),
        metadata=metadata or {},
    )
    data = FORMATS[format].dump(source)
    with torch.no_grad():
        found = FORMATS[format].load(data, model)(inputs)
    write_bytes(path, data, ExportError)
    return ExportReport(
        path=path,
        format=format,
        int8=calibration is not None,
        parity=float((found - outputs).abs().max() / outputs.abs().max()),
        parameters=sum(parameter.numel() for parameter in plain_network.parameters()),
        model_parameters=parameters,
        bytes=len(data),
        seconds=time.perf_counter() - started,
    )


def load_network(path: str | Path, format: str, model: nn.Module) -> Network:
    """The network of an exported file, on the CPU.

    Args:
        path: The file.
        format: Its format.
        model: The model that was exported; only format "plain" needs it.

    Raises:
        ExportError: The file cannot be read; or one of format "plain" is broken or has another
            format.
    """
    if format == "plain":
        return plain_files.load_plain(path, model)
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror or error}); expected an exported file"
        ) from error
    return FORMATS[format].load(data, model)


def _check(
    path: Path, inputs: Tensor, format: str, calibration: Tensor | None, overwrite: bool
) -> None:
    if format not in FORMATS:
        raise UnknownNameError(f"unknown format {format!r}. Known: {', '.join(FORMATS)}")
    if calibration is not None and not FORMATS[format].has_int8:
        raise ExportError(
            f"format {format!r} with calibration: torch's plain layers compute in floats; use "
            "format 'onnx' or 'pt2' for int8"
        )
    if os.path.isdir(path):  # Path.is_dir raises for names that are too long
        raise ExportError(f"{path}: is a folder; expected the path of a file")
    if os.path.lexists(path) and not overwrite:
        raise ExportError(f"{path}: exists already; choose another path, or allow overwriting")
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ExportError(
            f"inputs: got a tensor of shape {tuple(inputs.shape)}, expected at least one input, "
            "with the batch first"
        )
    if calibration is not None and (
        calibration.ndim == 0 or len(calibration) == 0 or calibration.shape[1:] != inputs.shape[1:]
    ):
        raise ExportError(
            f"calibration: got a tensor of shape {tuple(calibration.shape)}, expected at least "
            f"one input of shape {tuple(inputs.shape[1:])}, with the batch first"
        )


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of the trained model, one finite tensor."""
    with torch.no_grad():
        outputs = model(inputs)
    if not isinstance(outputs, Tensor):
        raise ExportError(
            f"model: returned a {type(outputs).__name__}, expected one tensor; wrap it in a module "
            "that returns the tensor you need"
        )
    if not outputs.isfinite().all():
        raise NonFiniteError("model: its outputs are not finite; nothing was written")
    return outputs
