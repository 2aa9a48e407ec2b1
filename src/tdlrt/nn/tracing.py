"""Calls of the library's layers in a trace by torch.fx: one node each, like those of torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Proxy

from tdlrt.errors import UnsupportedLayerError

__all__ = ["is_traced", "traced_call"]


def is_traced(*inputs: object) -> bool:
    """Whether an input of a layer is a Proxy of torch.fx."""
    return any(isinstance(one, Proxy) for one in inputs)


def traced_call(
    module: nn.Module,
    known_forward: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """The node of a layer in a trace.

    Args:
        module: The layer.
        known_forward: The forward method of which a call of the module is the same.
        args: Inputs of the call, of which at least one is a Proxy.
        kwargs: Inputs by name.

    Raises:
        UnsupportedLayerError: The layer itself is traced, or has a forward method of its own.
    """
    proxy = next(one for one in (*args, *kwargs.values()) if isinstance(one, Proxy))
    tracer: Any = proxy.tracer
    if tracer.root is module or type(module).forward is not known_forward:
        raise UnsupportedLayerError(
            f"input: got a torch.fx Proxy inside a {type(module).__name__}, expected a tensor; "
            "use a Tracer whose is_leaf_module is true for this layer, and wrap a single layer "
            "in torch.nn.Sequential"
        )
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, tuple(args), dict(kwargs))
