"""Records the inputs and output shapes of a model's layers in one forward pass."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tdlrt.errors import UnsupportedLayerError
from tdlrt.nn.products import ProductsOutside
from tdlrt.paths.apply import is_channels_last

__all__ = [
    "Inputs",
    "LayerCall",
    "call_model",
    "calls_for",
    "evaluating",
    "random_state_kept",
    "watch_calls",
    "zeros_for",
]

# What a model is called with: its one input, all inputs in their order, or keyword arguments.
Inputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """One call of one layer.

    Attributes:
        input: The tensor that the layer was called with.
        output: Shape of the tensor that the layer returned.
    """

    input: Tensor
    output: tuple[int, ...]

    @property
    def channels_last(self) -> bool:
        """Whether the input is a batch of images with the channels last in memory."""
        return is_channels_last(self.input, self.input.ndim)


def zeros_for(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Zeros of a given shape, with the type and device of the model's first parameter.

    Raises:
        TypeError: The shape is not a sequence of ints.
        ValueError: A size is negative, or there is too little memory.
    """
    if (
        isinstance(input_size, str | bytes)
        or not isinstance(input_size, Sequence)
        or any(not isinstance(size, Integral) or isinstance(size, bool) for size in input_size)
    ):
        raise TypeError(
            f"input_size: got {input_size!r}, expected a sequence of ints, the batch size first, "
            "such as (1, 3, 32, 32)"
        )
    first: Any = next(model.parameters(), torch.zeros(0))
    try:
        return torch.zeros(tuple(input_size), dtype=first.dtype, device=first.device)
    except (RuntimeError, TypeError) as error:  # TypeError: more than 64 bits
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"input_size: got {tuple(input_size)}, expected the shape of a batch ({reason})"
        ) from error


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Restore torch's random state afterwards, on the CPU and on the devices of a model."""
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    with torch.random.fork_rng(list(devices), device_type=kind):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and leave it afterwards as it was, bit for bit.

    Training flags, parameters, buffers, attributes, hooks and torch's random state are restored,
    whatever forward passes have done to them. The flags are set one by one, because a `train`
    method of a user's module may change weights.

    Raises:
        UnsupportedLayerError: A layer has no shape yet, so that a pass would change the model.
    """
    lazy = [name for name, one in model.named_parameters() if is_lazy(one)]
    if lazy:
        raise UnsupportedLayerError(
            f"model: {lazy[0]} has no shape yet, expected a model whose layers have one; run a "
            "batch through it first, model(batch)"
        )
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    values = [value for _, before in attributes for value in before.values()]
    containers = [(value, copy.copy(value)) for value in values if type(value) in _CONTAINERS]
    held = (*model.parameters(), *model.buffers(), *values)
    tensors = {value for value in held if _is_plain_tensor(value)}
    contents = [(tensor, tensor.requires_grad, tensor.data) for tensor in tensors]
    copies = [data.clone() for _, _, data in contents]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with random_state_kept(model):
        try:
            # torch's fused operation for transformer layers calls none of the layers inside.
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for now, before in (*attributes, *containers):
                now.clear()
                now.extend(before) if isinstance(now, list) else now.update(before)
            for (tensor, requires_grad, data), value in zip(contents, copies, strict=True):
                _restore(tensor, requires_grad, data, value)


_CONTAINERS = (dict, OrderedDict, list, set)


def _is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value has memory of its own that can be compared: no meta or wrapped tensor."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return False
    return value.layout == torch.strided and not value.is_meta


@torch.no_grad()
def _restore(tensor: Tensor, requires_grad: bool, data: Tensor, value: Tensor) -> None:
    """Give a tensor its memory and values again; what has not changed is not written."""
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)
    if tensor.data_ptr() != data.data_ptr():
        tensor.data = data
    if not torch.equal(tensor, value):
        tensor.copy_(value)


def calls_for(
    model: nn.Module,
    layers: Collection[nn.Module],
    input_size: Sequence[int] | None,
    example_inputs: Inputs | None,
    outside: ProductsOutside | None = None,
) -> dict[nn.Module, list[LayerCall]]:
    """The calls of each layer for an input size or for example inputs; {} if neither is given.

    If `outside` is given, it counts the multiply-adds of the pass outside of its layers.

    Raises:
        TypeError: input_size is not a sequence of ints, or example_inputs has another type.
        ValueError: Both are given, or the model does not take zeros of this size.
        UnsupportedLayerError: A layer has no shape yet, so that a pass would change the model.
    """
    if example_inputs is None:
        return {} if input_size is None else _calls_on_zeros(model, layers, input_size, outside)
    if input_size is not None:
        raise ValueError(
            f"input_size: got {input_size!r} together with example_inputs, expected one of them; "
            "leave input_size out"
        )
    return watch_calls(model, layers, example_inputs, outside)


def _calls_on_zeros(
    model: nn.Module,
    layers: Collection[nn.Module],
    input_size: Sequence[int],
    outside: ProductsOutside | None,
) -> dict[nn.Module, list[LayerCall]]:
    zeros = zeros_for(model, input_size)
    try:
        return watch_calls(model, layers, zeros, outside)
    except UnsupportedLayerError:
        raise
    except Exception as error:  # a forward method may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"input_size: got {tuple(input_size)}, but {type(model).__name__} does not take one "
            f"tensor of zeros of this shape and of type {zeros.dtype} ({type(error).__name__}: "
            f"{reason}); correct the shape, or pass example_inputs, such as a tensor of token ids, "
            "or a tuple or dict of all inputs"
        ) from error


def watch_calls(
    model: nn.Module,
    layers: Collection[nn.Module],
    inputs: Inputs,
    outside: ProductsOutside | None = None,
) -> dict[nn.Module, list[LayerCall]]:
    """The calls of each layer in one forward pass in evaluation mode; an empty list if none.

    The model is not changed (see `evaluating`).

    Args:
        model: The model.
        layers: The layers whose calls are recorded.
        inputs: The input, a tuple or list of inputs, or a mapping of keyword arguments.
        outside: Counts the multiply-adds of the pass outside of its layers.

    Raises:
        TypeError: The inputs are none of these.
    """
    if not isinstance(inputs, Tensor | tuple | list | Mapping):
        raise TypeError(
            f"example_inputs: got {type(inputs).__name__}, expected a tensor, or a tuple or dict "
            "of the inputs of the model"
        )
    calls: dict[nn.Module, list[LayerCall]] = {layer: [] for layer in layers}

    def record(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        input = args[0] if args else kwargs["input"]
        calls[module].append(LayerCall(input=input, output=tuple(output.shape)))

    with evaluating(model), torch.no_grad():
        for layer in layers:  # `evaluating` takes these hooks away again
            layer.register_forward_hook(record, with_kwargs=True)
        with nullcontext() if outside is None else outside.counted():  # its hooks as well
            call_model(model, inputs)
    return calls


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """The output of a model for one input, all inputs in their order, or keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*([inputs] if isinstance(inputs, Tensor) else inputs))
