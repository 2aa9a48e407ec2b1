"""The header of a file: version, layers in Tucker format, shared tensors, checksum."""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from tdlrt.errors import CheckpointError
from tdlrt.nn.reshape import Reshape

__all__ = ["FORMAT", "KEY", "Header", "LayerFormat", "checksum", "maps_strings"]

FORMAT = 1
KEY = "tdlrt"
"""The entry of the safetensors metadata that holds the header."""


class LayerFormat(NamedTuple):
    """The Tucker format of one layer.

    Attributes:
        ranks: (r_1, ..., r_d).
        learned: Modes that are factorised.
        reshape: Sizes of the modes of rows and columns, if a matrix is in the format of a tensor.
    """

    ranks: tuple[int, ...]
    learned: tuple[int, ...]
    reshape: Reshape | None = None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file holds besides tensors.

    Attributes:
        layers: Layers in Tucker format by name.
        aliases: For each further name of a shared tensor, the name that it is stored under.
        metadata: The user's own strings.
    """

    layers: dict[str, LayerFormat]
    aliases: dict[str, str]
    metadata: dict[str, str]

    def to_json(self, checksum: int | None = None) -> str:
        """The header as JSON with sorted keys, so that equal headers give equal texts."""
        layers = {name: _without_none(layer._asdict()) for name, layer in self.layers.items()}
        fields = {"version": FORMAT, "checksum": checksum, **asdict(self), "layers": layers}
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None) -> tuple[Header, int]:
        """Read a header of this or an earlier version.

        Returns:
            The header, and the checksum that is stored with it.

        Raises:
            CheckpointError: There is no header, or it is damaged or of a newer version.
        """
        if text is None:
            raise CheckpointError(
                "is a safetensors file, but tdlrt.save did not write it; use "
                "safetensors.torch.load_model"
            )
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        version = fields.get("version") if isinstance(fields, dict) else None
        if type(version) is not int:  # type(), because True equals 1
            version = None
        if version is not None and version > FORMAT:
            raise CheckpointError(
                f"has format {version}, expected at most {FORMAT}; upgrade tdlrt to read it"
            )
        if version != FORMAT or not _is_well_formed(fields):
            raise CheckpointError("has a damaged header; use another copy of the file")
        layers = {
            name: LayerFormat(
                ranks=tuple(layer["ranks"]),
                learned=tuple(layer["learned"]),
                reshape=_as_tuples(layer.get("reshape")),
            )
            for name, layer in fields["layers"].items()
        }
        header = cls(layers=layers, aliases=fields["aliases"], metadata=fields["metadata"])
        return header, fields["checksum"]


def checksum(header: Header, tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of a header and of tensors on the CPU, the tensors in alphabetical order."""
    value = zlib.crc32(header.to_json().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(ctypes.string_at(tensor.data_ptr(), tensor.nbytes), value)
    return value


def maps_strings(value: object) -> bool:
    """Whether a value is a mapping from strings to strings."""
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for item in value.items() for text in item
    )


def _is_well_formed(fields: Mapping[str, Any]) -> bool:
    layers = fields.get("layers")
    return (
        maps_strings(fields.get("aliases"))
        and maps_strings(fields.get("metadata"))
        and type(fields.get("checksum")) is int
        and isinstance(layers, dict)
        and all(
            isinstance(layer, dict)
            and all(_lists_ints(layer.get(name)) for name in ("ranks", "learned"))
            and ("reshape" not in layer or _is_pair(layer["reshape"]))
            for layer in layers.values()
        )
    )


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that have a value; files from before there were reshapes name none."""
    return {name: value for name, value in fields.items() if value is not None}


def _as_tuples(reshape: Sequence[Sequence[int]] | None) -> Reshape | None:
    if reshape is None:
        return None
    rows, columns = reshape
    return tuple(rows), tuple(columns)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_lists_ints, value))


def _lists_ints(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)
