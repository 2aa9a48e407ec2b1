"""A GPT: a decoder-only transformer that predicts the next character of a text."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT"]


class GPT(nn.Module):
    """Pre-norm transformer with learned positions, causal attention and an untied head.

    Query, key and value are one linear layer, as in GPT-2: in low-rank form they share the basis of
    their inputs, and a step has 24 matrices to move and not 36. The head is not tied to the
    embedding: with 128 characters each is below 1 % of the network, and both stay dense. The
    initial weights are torch's defaults: in the first steps embeddings of deviation 1 learn faster
    than those of GPT-2, of deviation 0.02, beside which the output of the first blocks is large.

    Args:
        vocabulary: Number of characters, V.
        context: Number of positions, T.
        width: Length of the vector of a position.
        layers: Number of blocks.
        heads: Number of attention heads, a divisor of the width.

    Source: Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int = 256, layers: int = 6, heads: int = 4
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:
        """Logits of the next character at each position.

        Args:
            text: Codes of characters, (N, T), of any type: text is stored in bytes.

        Returns:
            (N, V, T), the classes along dimension 1 as `torch.nn.functional.cross_entropy` and the
            training loop expect them.
        """
        places = torch.arange(text.shape[1], device=text.device)
        hidden = self.characters(text.long()) + self.positions(places)
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits.mT


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attention(self.norm1(x))
        hidden: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + hidden

    def _attention(self, x: Tensor) -> Tensor:
        # (N, T, 3 width) to three of (N, heads, T, width / heads).
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return result
