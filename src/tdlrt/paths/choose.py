"""The choice of a forward path, for layers, conversion to plain torch, export and summary alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

from tdlrt.errors import PathError
from tdlrt.paths.cost import Purpose, path_cost
from tdlrt.paths.stages import PATHS, LayerShape, PathName, has_plain_form, path_parameters

__all__ = ["Preference", "cached_path", "check_preference", "choose_path"]

Preference: TypeAlias = Literal["size", "speed"]

_DENSE_FAVOUR = 0.85


def choose_path(
    calls: Sequence[LayerShape], purpose: Purpose, prefer: Preference = "speed"
) -> PathName:
    """Choose the forward path of a layer.

    With 'speed' it is the path with the least `path_cost` over all calls, and 'dense' unless
    another path is at least 15 % cheaper: the estimated costs are wrong by ten to thirty per cent,
    in the same way for similar stages, and a wrong choice of 'dense' costs little time. With 'size'
    it is the path with the fewest `path_parameters`, and the fastest of them if there are several.

    Args:
        calls: Shapes of the layer and its input, one for each call; at least one.
        purpose: Whether the path is for training, for inference or for plain torch layers.
        prefer: 'speed' or 'size'.
    """
    paths = PATHS
    if purpose == "plain":
        paths = tuple(path for path in PATHS if all([has_plain_form(path, one) for one in calls]))
    if prefer == "size":
        sizes = {path: path_parameters(path, calls[0]) for path in paths}
        paths = tuple(path for path in paths if sizes[path] == min(sizes.values()))
    costs = [
        (_DENSE_FAVOUR if path == "dense" else 1.0)
        * sum([path_cost(path, call, purpose) for call in calls])
        for path in paths
    ]
    return paths[costs.index(min(costs))]  # torch.compile cannot trace min with a key


cached_path = lru_cache(maxsize=4096)(choose_path)
"""`choose_path` with a cache."""


def check_preference(prefer: Preference) -> Preference:
    """Return a preference unchanged if it is valid.

    Raises:
        PathError: It is neither 'size' nor 'speed'.
    """
    if prefer not in ("size", "speed"):
        raise PathError(
            f"prefer: got {prefer!r}, expected 'size' or 'speed'; pass 'size' for the fewest "
            "parameters, 'speed' for the least time"
        )
    return prefer
