"""Validation of the result of a run before anything is shown of it."""

import math
import reprlib
from typing import Any

from tdlrt.errors import RunError
from tdlrt_lab.run.metrics import is_finite_number

__all__ = ["checked_summary"]

NUMBERS = {
    "accuracy": (0.0, 100.0),
    "compression": (-math.inf, 1.0),
    "network_compression": (-math.inf, 1.0),
    "parameters": (0.0, math.inf),
    "network_parameters": (0.0, math.inf),
    "network_dense_parameters": (0.0, math.inf),
    "macs": (0.0, math.inf),
    "dense_macs": (0.0, math.inf),
    "seconds": (0.0, math.inf),
}
"""Numbers that a summary must have, and their ranges."""

MAYBE_NUMBERS = (
    *("tau", "budget", "dense_accuracy", "dense_seconds"),
    *("bits_per_character", "dense_bits_per_character"),
)
TEXTS = ("model", "data", "method")
MAYBE_TABLES = ("versions", "machine", "ranks")


def checked_summary(summary: dict[str, Any], place: str) -> dict[str, Any]:
    """A summary that has what a run writes, as far as anything depends on it.

    Args:
        summary: The content of `summary.json`.
        place: The file, for error messages.

    Returns:
        The summary, with None for each number that it may have and has not.

    Raises:
        RunError: A value is missing, of another type or out of its range.
    """

    def wrong(key: str, value: object, expected: str) -> RunError:
        return RunError(f"{place}: {key} is {reprlib.repr(value)}; expected {expected}")

    for key in (*NUMBERS, *TEXTS, "seed", "layers"):
        if key not in summary:
            raise RunError(f"{place}: no {key}; expected the result of a run of this version")
    for key, (low, high) in NUMBERS.items():
        if not (is_finite_number(summary[key]) and low <= summary[key] <= high):
            raise wrong(key, summary[key], f"a finite number from {low:g} to {high:g}")
    for key in MAYBE_NUMBERS:
        if not (summary.get(key) is None or is_finite_number(summary[key])):
            raise wrong(key, summary[key], "a finite number")
    for key in TEXTS:
        if not isinstance(summary[key], str):
            raise wrong(key, summary[key], "a name")
    if not _is_count(summary["seed"]):
        raise wrong("seed", summary["seed"], "an integer from 0")
    for key in MAYBE_TABLES:
        if not isinstance(summary.get(key, {}), dict):
            raise wrong(key, summary[key], "names with values")
    layers = summary["layers"]
    if not isinstance(layers, list) or not all(_is_layer(layer) for layer in layers):
        raise wrong("layers", layers, "name, shape, ranks, parameters and MACs of each layer")
    summary = {**dict.fromkeys(MAYBE_NUMBERS), **summary}
    compared = summary["method"] != "dense" and summary["dense_accuracy"] is not None
    if compared and summary["dense_seconds"] is None:
        raise wrong("dense_seconds", None, "a finite number beside dense_accuracy")
    return summary


def _is_layer(layer: object) -> bool:
    return (
        isinstance(layer, dict)
        and isinstance(layer.get("name"), str)
        and _are_counts(layer.get("shape"))
        and "ranks" in layer
        and (layer["ranks"] is None or _are_counts(layer["ranks"]))
        and _is_count(layer.get("parameters"))
        and "macs" in layer
        and (layer["macs"] is None or is_finite_number(layer["macs"]))  # None for an embedding
        and is_finite_number(layer.get("compression"))
    )


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(_is_count(number) for number in value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
