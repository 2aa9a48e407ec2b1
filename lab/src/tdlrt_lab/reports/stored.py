"""Measurements on the stored network of a run: forward time and singular values of its cores."""

import math
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor

from tdlrt.errors import RunError
from tdlrt.linalg import squared_singular_values, unfold
from tdlrt.surgery import to_plain
from tdlrt.tensor_files import open_tensors
from tdlrt_lab.config import RunConfig
from tdlrt_lab.data import DATA_SETS, Data, DatasetInfo, ImageData, TextData
from tdlrt_lab.models import build_model
from tdlrt_lab.names import pick
from tdlrt_lab.reports.collect import Run
from tdlrt_lab.reports.values import printable
from tdlrt_lab.run.checkpoint import load_model
from tdlrt_lab.run.plots import MAX_LAYERS, MAX_MODES
from tdlrt_lab.run.timing import inference_seconds

__all__ = ["core_spectra", "latency"]

ROUNDS = 5
CORE = ".core"
MAX_CORE = 2**22
"""Values of a core whose spectra are computed: those of 2048 x 2048 take some seconds."""

MAX_CLASSES = 2**16


def latency(run: Run, batch_size: int) -> dict[str, float]:
    """Milliseconds of a forward pass of the run's plain network and of the dense network.

    Raises:
        RunError: The stored network cannot be read or rebuilt.
    """
    try:
        config = RunConfig(**{**run.config, "device": "cpu"})
        data = _random_data(run, config, max(2, batch_size))
        model = load_model(config, run.directory.model, data)
        inputs = data.normalise(data.sample(batch_size))
        plain = to_plain(model, input_size=inputs.shape)
    except Exception as error:  # files of other versions can fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"no latency: the network cannot be rebuilt ({reason})") from error
    dense = build_model(config.model, data.input_shape, len(data.classes))
    seconds = inference_seconds({"plain": plain, "dense": dense}, inputs, ROUNDS)
    return {
        "latency_ms": 1e3 * seconds["plain"],
        "dense_latency_ms": 1e3 * seconds["dense"],
    }


def _random_data(run: Run, config: RunConfig, examples: int) -> Data:
    """Random examples of the shape and classes of the data set, which is not read."""
    info = pick("data set", config.data, DATA_SETS)
    return _random_text(info) if info.is_text else _random_images(run, config, info, examples)


def _random_text(info: DatasetInfo) -> TextData:
    (context,) = info.input_shape
    files = (torch.randint(info.classes, (2 * context,), dtype=torch.uint8),)
    return TextData(name="random", train_files=files, test_files=files, context=context)


def _random_images(run: Run, config: RunConfig, info: DatasetInfo, images: int) -> ImageData:
    channels, height, width = info.input_shape
    size = (height, width) if config.image_size is None else (config.image_size,) * 2
    # The number of classes of an image folder is the number of outputs of the last layer.
    classes = run.summary["layers"][-1]["shape"][0] if info.folder else info.classes
    if not 0 < classes <= MAX_CLASSES:
        raise RunError(f"{classes} classes; expected at most {MAX_CLASSES:,}")
    pixels = torch.randint(256, (images, channels, *size), dtype=torch.uint8)
    labels = torch.arange(images) % classes
    return ImageData(
        name=config.data,
        train_images=pixels,
        train_labels=labels,
        test_images=pixels,
        test_labels=labels,
        classes=tuple(map(str, range(classes))),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
    )


def core_spectra(run: Run) -> dict[str, list[list[float]]]:
    """Singular values of each unfolded core, divided by the largest, by layer and mode.

    Cores without values and very large ones are left out, and layers beyond those that a figure
    shows have no modes.

    Raises:
        RunError: The stored network cannot be read, or a core has NaN or infinite values.
    """
    try:
        with open_tensors(run.directory.model) as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
            cores = [key for key, shape in shapes.items() if _is_shown(key, shape)]
            return {
                printable(key.removesuffix(CORE)): (
                    _spectra(key, file.get_tensor(key).float()) if number < MAX_LAYERS else []
                )
                for number, key in enumerate(cores)
            }
    except (OSError, SafetensorError) as error:
        raise RunError(f"{run.directory.model.name} cannot be read ({error})") from error


def _is_shown(key: str, shape: Sequence[int]) -> bool:
    return key.endswith(CORE) and 1 < len(shape) <= MAX_MODES and 0 < math.prod(shape) <= MAX_CORE


def _spectra(key: str, core: Tensor) -> list[list[float]]:
    if not core.isfinite().all():
        raise RunError(f"{key} has NaN or infinite values")
    return [_spectrum(core, mode) for mode in range(core.ndim)]


def _spectrum(core: Tensor, mode: int) -> list[float]:
    """The first min(r_i, prod r_j) singular values of a mode; the others are zero."""
    rows = unfold(core, mode)
    if rows.shape[0] > rows.shape[1]:  # the smaller Gram matrix has the same eigenvalues
        rows = rows.mT
    values = squared_singular_values(rows, 0).sqrt()
    relative: list[float] = (values / values[0].clamp(min=1e-300)).tolist()
    return relative
