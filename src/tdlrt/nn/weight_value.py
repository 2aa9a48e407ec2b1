"""The full weight of a Tucker layer as a value that nobody can write into by mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdlrt.errors import UnsupportedLayerError

__all__ = ["WeightValue"]

_WRITES = ("__set__", "__setitem__")  # the other functions that write have names that end in _


class WeightValue(Tensor):
    """A weight W that is computed from other parameters; writing into it or a view of it raises.

    A write would change nothing but this temporary tensor, so that an init function would have no
    effect. Results of all other operations are ordinary tensors.
    """

    @staticmethod
    def of(weight: Tensor) -> Tensor:
        """The value of a weight; a compiler gets the weight itself."""
        return weight if torch.compiler.is_compiling() else weight.as_subclass(WeightValue)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Apply a torch function.

        Raises:
            UnsupportedLayerError: The function writes into the value.
        """
        options, name = kwargs or {}, func.__name__
        target = next(iter((*args, *options.values())), None)
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        if (writes and _holds(target, cls)) or _holds(options.get("out"), cls):
            raise UnsupportedLayerError(
                f"weight: got a write ({name}), but this weight is computed from a core and bases, "
                "so that the write would be lost; initialise the dense model before it is "
                "factorised, or call reset_parameters() of the layer"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **options)
            shared = isinstance(result, Tensor) and (
                name in ("__get__", "detach") or result._is_view()
            )
            return result.as_subclass(cls) if shared and name != "as_subclass" else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _holds(target: object, kind: type[Tensor]) -> bool:
    """Whether an argument is a tensor of a kind, or a list with one."""
    return any(isinstance(one, kind) for one in (target if isinstance(target, list) else [target]))
