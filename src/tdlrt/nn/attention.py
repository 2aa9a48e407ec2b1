"""torch.nn.MultiheadAttention with projections that are layers, so that these can be factorised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdlrt.errors import StateDictError
from tdlrt.nn.tracing import is_traced, traced_call

__all__ = ["PACKED", "SplitAttention", "packed_weights"]

# The parameters in which torch's attention holds the projections of queries, keys and values.
PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class SplitAttention(nn.MultiheadAttention):
    """Attention whose projections W_q, W_k, W_v and W_o are layers of their own.

        A_h = softmax(Q_h K_h^T / sqrt(E / H) + mask),   y = W_o [A_1 V_1, ..., A_H V_H] + b_o,

    with Q = W_q x_q + b_q, K = W_k x_k + b_k and V = W_v x_v + b_v, each cut into H heads.
    torch.nn.MultiheadAttention packs W_q, W_k and W_v into one parameter; here each of them may be
    in Tucker format or dense. `forward` has the same arguments, masks and outputs. The biases stay
    the same Parameters: b_q, b_k and b_v in `in_proj_bias`.

    torch's fused operation for evaluation is not used; without `need_weights`, the products are
    those of torch.nn.functional.scaled_dot_product_attention.

    Args:
        dense: A torch.nn.MultiheadAttention. The weights of the new layers share its memory.

    Attributes:
        q_proj: W_q, of shape embed_dim x embed_dim, a layer without bias.
        k_proj: W_k, of shape embed_dim x kdim, a layer without bias.
        v_proj: W_v, of shape embed_dim x vdim, a layer without bias.
        out_proj: W_o with the bias b_o.

    Source: Vaswani et al., arXiv:1706.03762.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module  # type: ignore[assignment]

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        self.embed_dim, self.kdim, self.vdim = dense.embed_dim, dense.kdim, dense.vdim
        self.num_heads, self.head_dim = dense.num_heads, dense.head_dim
        self.dropout, self.batch_first = dense.dropout, dense.batch_first
        self.add_zero_attn = dense.add_zero_attn
        # torch's modules for transformers read these two before they use their fused operation.
        self._qkv_same_embed_dim = False
        self.register_parameter("in_proj_weight", None)
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.register_parameter(name, getattr(dense, name))
        for name, weight in zip("qkv", packed_weights(dense), strict=True):
            self.add_module(f"{name}_proj", _linear(weight, None))
        self.out_proj = _linear(dense.out_proj.weight, dense.out_proj.bias)
        self.train(dense.training)

    @property
    def q_proj_weight(self) -> Any:  # type: ignore[override]
        """W_q."""
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> Any:  # type: ignore[override]
        """W_k."""
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> Any:  # type: ignore[override]
        """W_v."""
        return self.v_proj.weight

    def projections(self) -> dict[str, nn.Module]:
        """The four layers by name."""
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        return {name: self.get_submodule(name) for name in names}

    def use(self, layers: Mapping[nn.Module, nn.Module]) -> None:
        """Put layers in the place of projections; those that stay get memory of their own."""
        for name, projection in self.projections().items():
            new = layers.get(projection, projection)
            if projection in set(new.modules()):  # an adapter keeps the layer too
                weight = projection.get_parameter("weight")
                own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
                projection.register_parameter("weight", own)
            self._modules[name] = new

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries to keys and values; see torch.nn.MultiheadAttention.

        Args:
            query: x_q, of shape (L, N, E), (N, L, E) with `batch_first`, or (L, E).
            key: x_k, with S positions in place of L and `kdim` features.
            value: x_v, with S positions and `vdim` features.
            key_padding_mask: Of shape (N, S): True, or -inf, where a key is left out.
            need_weights: Whether the averages A over the heads are returned too.
            attn_mask: Of shape (L, S) or (N H, L, S): True where a query does not attend to a key,
                or numbers that are added to Q K^T.
            average_attn_weights: Whether A is averaged over the heads.
            is_causal: A hint that attn_mask is the causal mask.

        Returns:
            y, and A of shape (N, L, S), or (N, H, L, S) if it is not averaged, or None.

        Raises:
            ValueError: is_causal is set without attn_mask, or an input or a mask has another shape.
            TypeError: A mask is neither boolean nor floating.
        """
        if is_traced(query, key, value):
            options = {"key_padding_mask": key_padding_mask, "need_weights": need_weights}
            options |= {"attn_mask": attn_mask, "average_attn_weights": average_attn_weights}
            options |= {"is_causal": is_causal}
            inputs = (query, key, value)
            return traced_call(self, SplitAttention.forward, inputs, options)  # type: ignore[no-any-return]
        if is_causal and attn_mask is None:
            raise ValueError(
                "attn_mask: got None with is_causal=True, expected the causal mask, of which "
                "is_causal is only a hint; pass "
                "torch.nn.Transformer.generate_square_subsequent_mask(L)"
            )
        batched = query.dim() == 3
        self._check_inputs(query, key, value)
        q, k, v = (
            self._batch_first(layer(x), batched)
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        if self.in_proj_bias is not None:
            q, k, v = (x + b for x, b in zip((q, k, v), self.in_proj_bias.chunk(3), strict=True))
        hint = is_causal and key_padding_mask is None and not need_weights
        mask = None if hint else self._mask(q, k, key_padding_mask, attn_mask, batched)
        k, v, added = self._with_added_keys(k, v)
        if mask is not None and added:
            mask = F.pad(mask, (0, added))
        q, k, v = (x.reshape(*x.shape[:-1], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        attention = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            scores = scores if mask is None else scores + mask
            attention = F.dropout(scores.softmax(dim=-1), dropout)
            heads = attention @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, hint)
        output = self.out_proj(self._layout_of_inputs(heads.transpose(1, 2).flatten(2), batched))
        if attention is not None:
            attention = attention.mean(dim=1) if average_attn_weights else attention
            attention = attention if batched else attention.squeeze(0)
        return output, attention

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse inputs that torch.nn.MultiheadAttention refuses, and say which one it is.

        In a trace of torch.jit sizes are tensors, and nothing is checked.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return
        dims = query.dim() if query.dim() == 2 else 3
        batch = slice(0, 1) if self.batch_first else slice(dims - 2, dims - 1)
        inputs = {"query": (query, "embed_dim"), "key": (key, "kdim"), "value": (value, "vdim")}
        for name, (x, width) in inputs.items():
            got = f"{name}: got shape {tuple(x.shape)}, expected"
            if x.dim() != dims or x.shape[-1] != getattr(self, width):
                raise ValueError(
                    f"{got} {dims} dimensions, the last of size {width}={getattr(self, width)}; "
                    "see torch.nn.MultiheadAttention"
                )
            if dims == 3 and x.shape[batch] != query.shape[batch]:
                raise ValueError(
                    f"{got} the batch of query, of shape {tuple(query.shape)} with "
                    f"batch_first={self.batch_first}"
                )
        if value.shape[:-1] != key.shape[:-1]:
            raise ValueError(
                f"value: got shape {tuple(value.shape)}, expected as many positions as key, of "
                f"shape {tuple(key.shape)}, has"
            )

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _layout_of_inputs(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.squeeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batched: bool,
    ) -> Tensor | None:
        """What both masks add to Q K^T, of a shape that fits (N, H, L, S)."""
        (n, targets, _), sources = q.shape, k.shape[1]
        added = None
        if attn_mask is not None:
            three = attn_mask.dim() == 3
            heads = (n * self.num_heads,) if three else ()
            expected = (*heads, targets, sources)
            _check_shape("attn_mask", attn_mask, expected)
            added = _added("attn_mask", attn_mask, q)
            added = added.reshape(n, -1, targets, sources) if three else added
        if key_padding_mask is not None:
            batch = (n, sources) if batched else (sources,)
            _check_shape("key_padding_mask", key_padding_mask, batch)
            padding = _added("key_padding_mask", key_padding_mask, q).reshape(n, 1, 1, sources)
            added = padding if added is None else added + padding
        return added

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those that `add_bias_kv` and `add_zero_attn` add, and how many."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, one.expand(len(x), -1, -1)], dim=1)
                for x, one in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            added += 1
        return k, v, added

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse the state of torch's attention, whose projections are packed."""
        packed = [name for name in PACKED if f"{prefix}{name}" in state_dict]
        if packed:
            raise StateDictError(
                f"{prefix}{packed[0]}: got the projections of a torch.nn.MultiheadAttention for a "
                "SplitAttention; load them into the dense model and factorise the model afterwards "
                "(tdlrt.factorize_)"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def packed_weights(dense: nn.MultiheadAttention) -> list[Tensor]:
    """W_q, W_k and W_v of torch's attention; parts of one parameter if it has packed them."""
    if dense.in_proj_weight is not None:
        return list(dense.in_proj_weight.chunk(3))
    return [dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight]


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    linear.register_parameter("bias", bias)
    return linear


def _check_shape(name: str, mask: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{name}: got shape {tuple(mask.shape)}, expected {expected}; see "
            "torch.nn.MultiheadAttention"
        )


def _added(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """What a mask adds to products of queries and keys: -inf where it is True, or its numbers."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    if not mask.is_floating_point():
        raise TypeError(
            f"{name}: got a mask of type {mask.dtype}, expected a boolean or floating one"
        )
    return mask.to(like.dtype)
