"""Multiply-adds of a forward pass that no layer does, such as those of attention."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["ProductsOutside"]


class ProductsOutside:
    """Counts the matrix products and convolutions outside of given layers in a forward pass.

    torch.utils.flop_counter counts them. For attention it knows only the products of the plain
    formula on every device, so attention is computed by that one meanwhile.

    Args:
        layers: Layers whose operations are not counted.

    Attributes:
        macs: Multiply-adds, half the floating-point operations; 0 before a pass.
    """

    def __init__(self, layers: Collection[nn.Module]) -> None:
        self.macs = 0
        self._layers = layers

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what is computed in the block. The caller removes the hooks that this sets."""
        # Imported here because `import torch` alone does not load these modules.
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.utils.flop_counter import FlopCounterMode

        counter = FlopCounterMode(display=False)
        entered: list[int] = []
        inside = 0

        def enter(*_: object) -> None:
            entered.append(counter.get_total_flops())

        def leave(*_: object) -> None:
            nonlocal inside
            before = entered.pop()
            if not entered:  # a layer may be part of another one
                inside += counter.get_total_flops() - before

        for layer in self._layers:
            layer.register_forward_pre_hook(enter)
            layer.register_forward_hook(leave)
        with counter, sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # The counter looks at all modules; a compiled model warns that it is seen twice.
            warnings.filterwarnings("ignore", ".*global hooks on modules")
            yield
        self.macs = (counter.get_total_flops() - inside) // 2
