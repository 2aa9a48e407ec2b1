"""Which linear layers become tensors of more than two modes: as asked for, or found in a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tdlrt.errors import NothingMatchedError, RankError, UnsupportedLayerError
from tdlrt.nn.calls import Inputs, calls_for
from tdlrt.nn.layer_types import dense_shape, takes_reshape
from tdlrt.nn.models import check_model
from tdlrt.nn.reshape import Reshape, check_reshape
from tdlrt.surgery.selection import considered_layers, pattern_list

__all__ = ["flattened_modes", "reshaped_layers"]


def reshaped_layers(
    model: nn.Module, reshape: Mapping[str, Reshape] | None
) -> dict[nn.Module, Reshape]:
    """The linear layers that `factorize_` is asked to read as tensors, and their modes.

    Raises:
        RankError: The argument is no mapping, or sizes do not multiply to those of the matrix.
        NothingMatchedError: A pattern matches no layer.
        UnsupportedLayerError: A pattern matches a layer that is not linear.
    """
    if reshape is None:
        return {}
    if not isinstance(reshape, Mapping):
        raise RankError(
            f"reshape: got {reshape!r}, expected a dict from the names of layers to their modes, "
            "such as {'fc1': ((500,), (50, 4, 4))}, or what tdlrt.flattened_modes(model, "
            "input_size) returns"
        )
    layers = considered_layers(model)
    found: dict[nn.Module, Reshape] = {}
    for pattern in pattern_list(list(reshape), "reshape"):
        matches = {name: one for name, one in layers.items() if fnmatchcase(name, pattern)}
        if not matches:
            raise NothingMatchedError(
                f"reshape: the pattern {pattern!r} matches no layer, expected one that matches "
                f"some of {', '.join(layers) or 'no layers at all'}"
            )
        for name, module in matches.items():
            if not takes_reshape(module):
                raise UnsupportedLayerError(
                    f"reshape[{pattern!r}]: {name} is a {type(module).__name__}, expected "
                    "torch.nn.Linear itself, Conv1D of transformers or a type whose registered "
                    "function takes reshape; a convolution is a tensor already"
                )
            modes = check_reshape(reshape[pattern], dense_shape(module), f"reshape[{pattern!r}]")
            found.setdefault(module, modes)
    return found


def flattened_modes(
    model: nn.Module,
    input_size: Sequence[int] | None = None,
    *,
    example_inputs: Inputs | None = None,
) -> dict[str, Reshape]:
    """The linear layers behind a flattened feature map, with the modes of the map.

    One forward pass in evaluation mode finds them. The input of a layer counts as a flattened map
    if `flatten`, `view` or `reshape` made it from a tensor of shape (batch, C, H, W) or of another
    number of dimensions, and only functions that keep its shape came in between, such as dropout.
    Modes of size 1 are left out, and so is a layer that is called with different maps.

    Args:
        model: Any model; not changed, nor is torch's random state.
        input_size: Shape of the input with the batch, such as (1, 3, 32, 32).
        example_inputs: Instead of input_size, what the model is called with: a tensor, a tuple of
            inputs or a dict of keyword arguments.

    Returns:
        For each layer by name its modes ((out,), (C, H, W)), as `factorize_` takes them. The
        dictionary may be edited, to split a mode further for example.

    Raises:
        TypeError: input_size is not a sequence of ints, or example_inputs has another type.
        ValueError: Not exactly one of the two is given, a size is negative or far too large, or
            the model does not take zeros of this size.
        UnsupportedLayerError: A layer has no shape yet, or the model is no module.

    >>> network = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(96, 10))
    >>> flattened_modes(network, (1, 1, 6, 6))
    {'2': ((10,), (6, 4, 4))}
    """
    check_model(model)
    if input_size is None and example_inputs is None:
        raise ValueError(
            "input_size: got None, expected the shape of an input, such as (1, 3, 32, 32), or "
            "example_inputs in its place"
        )
    watch = _Maps()
    with watch:
        calls_for(model, (), input_size, example_inputs)
    found: dict[str, Reshape] = {}
    for name, module in model.named_modules():
        maps = watch.maps.get(id(module._parameters.get("weight")), set())
        if type(module) is nn.Linear and len(maps) == 1:
            modes = tuple(size for size in next(iter(maps)) if size > 1)
            if len(modes) > 1:
                found[name] = ((module.out_features,), modes)
    return found


_FLATTENS = ("flatten", "reshape", "view")


class _Maps(TorchFunctionMode):
    """Records from which maps the inputs of linear layers were flattened.

    Attributes:
        maps: For each weight by its id, the shapes of the maps without the batch, () for an input
            that is no flattened map.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[int, set[tuple[int, ...]]] = {}
        # The tensors are held, because the id of one that is gone may be that of another.
        self._flat: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch and look at its first argument and its result."""
        options = dict(kwargs or {})
        result = func(*args, **options)
        given = [*args, *options.values()]
        first = given[0] if given else None
        if isinstance(first, Tensor):
            if func is F.linear:
                _, made_from = self._flat.get(id(first), (first, ()))
                self.maps.setdefault(id(given[1]), set()).add(made_from)
            elif isinstance(result, Tensor):
                self._follow(func.__name__, first, given[1:], result)
        return result

    def _follow(self, name: str, first: Tensor, others: Sequence[Any], result: Tensor) -> None:
        batch, *sizes = first.shape or (0,)
        if name in _FLATTENS and len(sizes) > 1 and result.shape == (batch, math.prod(sizes)):
            self._flat[id(result)] = (result, tuple(sizes))
        elif id(first) in self._flat and result.shape == first.shape:
            if not any(isinstance(one, Tensor) and one.ndim > 1 for one in others):
                self._flat[id(result)] = (result, self._flat[id(first)][1])
