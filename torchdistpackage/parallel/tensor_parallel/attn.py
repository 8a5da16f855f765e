"""Multi-head self-attention, dense and with its heads shared out over the tensor group.

::

    x -> qkv (columns) -> rank r: heads r * h / t ... (r + 1) * h / t of q, k and v -> attention -> proj (rows) -> x

No rank needs another's heads: a sum (or a reduce-scatter) after `proj` is all there is. Neighbours: `layers.py` has the
linear layers, `transformer.py` puts this between normalisations.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh
from torchdistpackage.parallel.tensor_parallel.layers import ColParallelLinear, RowParallelLinear, TpLinear
from torchdistpackage.parallel.tensor_parallel.regions import Group, own_random_numbers

__all__ = ["Attention", "TpAttention"]


@final
class Attention(nn.Module):
    """Multi-head self-attention on one rank; every position sees every other.

    Args:
        dim: Features.
        num_heads: Heads, a divisor of dim.
        qkv_bias: Whether q, k and v have biases.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the result.

    Raises:
        SplitError: The heads cannot share dim equally.

    Example:
        >>> Attention(16, num_heads=4)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, _head_dim(dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.qkv = TpLinear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = TpLinear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attention.

        Args:
            x: (batch, sequence, dim); any number of dims may stand in the place of batch.

        Returns:
            The shape of x.
        """
        dropout = self.attn_drop.p if self.training else 0.0
        out: Tensor = self.proj_drop(self.proj(_attend(self.qkv(x), self.head_dim, self.scale, dropout)))
        return out


@final
class TpAttention(nn.Module):
    """`Attention` with its heads shared out over the tensor group. Making one is collective over the group.

    Dropout: the ranks of a tensor group need equal seeds (`torch.manual_seed`). Each then draws masks of its own for
    its heads (`attn_drop`) and, sequence parallel, for its part of the result (`proj_drop`); a whole result gets the
    same mask on every rank. With different seeds the ranks would go on with different results.

    Args:
        dim: Features.
        num_heads: Heads of the whole layer, a divisor of dim.
        qkv_bias: Whether q, k and v have biases.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the result.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.
        sequence_parallel: Whether input and output are this rank's part of the sequence, instead of whole.

    Raises:
        SplitError: The heads cannot share dim equally, or the ranks the heads.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> dense, attention = Attention(16, num_heads=4), TpAttention(16, num_heads=4)
        >>> attention.init_from_full(dense)
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(attention(x), dense(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        tp_group: Group = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.mesh, self.sequence_parallel = tensor_mesh(tp_group), sequence_parallel
        self.num_heads, self.head_dim = num_heads, _head_dim(dim, num_heads)
        self.scale = self.head_dim**-0.5
        if num_heads % self.mesh.size():
            raise SplitError(
                f"{num_heads} heads cannot be shared equally by the {self.mesh.size()} ranks of the tensor group; "
                "choose a multiple, or another size of the group"
            )
        self.qkv = ColParallelLinear(dim, dim * 3, qkv_bias, self.mesh, sequence_parallel, parts=3)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = RowParallelLinear(dim, dim, True, sequence_parallel, self.mesh)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attention.

        Args:
            x: (batch, sequence, dim), whole; (batch, sequence / t, dim), this rank's part, if sequence parallel.

        Returns:
            The shape of x.

        Raises:
            SplitError: The ranks cannot share the sequence equally.
        """
        qkv = self.qkv(x)
        dropout = self.attn_drop.p if self.training else 0.0
        with own_random_numbers(qkv, self.mesh) if dropout > 0 else nullcontext():
            attended = _attend(qkv, self.head_dim, self.scale, dropout)
        out: Tensor = self.proj(attended)
        own = self.sequence_parallel and self.training and self.proj_drop.p > 0
        with own_random_numbers(out, self.mesh) if own else nullcontext():
            dropped: Tensor = self.proj_drop(out)
        return dropped

    @torch.no_grad()
    def init_from_full(self, attention: Attention) -> None:
        """Takes over the parameters of a dense one: those of the first rank. Collective over the tensor group.

        Raises:
            SplitError: It has another size or number of heads, or a bias that this one lacks.
        """
        if attention.num_heads != self.num_heads:
            raise SplitError(f"the dense attention has {attention.num_heads} heads, this one {self.num_heads}")
        self.qkv.init_weight_from_full_attn(attention.qkv.weight, attention.qkv.bias)
        self.proj.init_weight_from_full(attention.proj.weight, attention.proj.bias)


def _head_dim(dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads:
        raise SplitError(f"{num_heads} heads cannot share {dim} features equally; choose a divisor of {dim}")
    return dim // num_heads


def _attend(qkv: Tensor, head_dim: int, scale: float, dropout: float) -> Tensor:
    """(..., sequence, 3 * heads * head_dim) -> (..., sequence, heads * head_dim)."""
    heads = qkv.shape[-1] // (3 * head_dim)
    q, k, v = (part.reshape(*part.shape[:-1], heads, head_dim).transpose(-3, -2) for part in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(-3, -2).flatten(-2)
