"""Transformer blocks, and a stack of them, dense and tensor parallel.

Sequence parallel, what stands between the pairs of linear layers works on this rank's part of the sequence::

    Transformer   x whole -> split -> [ block ] -> ... -> [ block ] -> gather -> whole
    block         part -> ln_1 -> (gather) attention (reduce-scatter) -> + -> ln_2 -> (gather) mlp (reduce-scatter) -> +

In a pipeline, stages of single blocks hand their parts on: each rank of the tensor group has a pipeline of its own, and
sends 1 / t of what whole tensors would take (so `scatter_gather_tensors`, which is for whole ones, has to stay off).
Split before the first block, gather after the last, with the functions of `regions.py`. Neighbours: `attn.py` and
`mlp.py`.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.tensor_parallel.attn import Attention, TpAttention
from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh
from torchdistpackage.parallel.tensor_parallel.layers import TpLayerNorm
from torchdistpackage.parallel.tensor_parallel.mlp import Mlp, TpMlp
from torchdistpackage.parallel.tensor_parallel.regions import (
    Group,
    gather_from_sequence_parallel_region,
    maybe_split_into_sequence_parallel,
    set_sequence_parallel_attr,
)

__all__ = ["Block", "ParallelBlock", "Transformer"]


@final
class Block(nn.Module):
    """Attention and two linear layers, each after a normalisation and beside a residual, on one rank.

    Args:
        dim: Features.
        mlp_ratio: Hidden features of the linear layers, as a multiple of dim.
        num_heads: Heads of the attention.

    Raises:
        SplitError: The heads cannot share dim equally.

    Example:
        >>> Block(16, num_heads=4)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, mlp_ratio: float = 4, num_heads: int = 8) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block.

        Args:
            hidden_states: (batch, sequence, dim).

        Returns:
            The same shape.
        """
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        out: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return out


@final
class ParallelBlock(nn.Module):
    """`Block` over the tensor group. Making one is collective over the group.

    Parameters have the names of `Block`'s, with `.linear` before the last word for those of linear layers. All are
    DTensors, the normalisations' too; those that every rank holds whole (`ln_1`, `ln_2`, biases of `proj` and `fc2`)
    get the same gradients on all of them. The weight of `qkv` has a shape of its own, see `ColParallelLinear`.

    Args:
        dim: Features.
        mlp_ratio: Hidden features of the linear layers, as a multiple of dim.
        num_heads: Heads of the attention, of the whole block.
        sequence_parallel: Whether input and output are this rank's part of the sequence, instead of whole.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.

    Raises:
        SplitError: The ranks cannot share heads or hidden features equally.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> dense, block = Block(16, num_heads=4), ParallelBlock(16, num_heads=4, sequence_parallel=True)
        >>> block.init_from_full(dense)
        >>> x = torch.randn(2, 6, 16)
        >>> whole = gather_from_sequence_parallel_region(block(maybe_split_into_sequence_parallel(x)))
        >>> torch.allclose(whole, dense(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4,
        num_heads: int = 8,
        sequence_parallel: bool = False,
        *,
        tp_group: Group = None,
    ) -> None:
        super().__init__()
        mesh, self.sequence_parallel = tensor_mesh(tp_group), sequence_parallel
        self.ln_1 = TpLayerNorm(dim, sequence_parallel, mesh)
        self.attn = TpAttention(dim, num_heads=num_heads, tp_group=mesh, sequence_parallel=sequence_parallel)
        self.ln_2 = TpLayerNorm(dim, sequence_parallel, mesh)
        hidden = int(dim * mlp_ratio)
        self.mlp = TpMlp(dim, hidden_features=hidden, tp_group=mesh, sequence_parallel=sequence_parallel)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block.

        Args:
            hidden_states: (batch, sequence, dim), whole; (batch, sequence / t, dim), this rank's part, if sequence
                parallel.

        Returns:
            The same shape; marked as a part if it is one.

        Raises:
            SplitError: The ranks cannot share the sequence equally.
        """
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        out: Tensor = hidden_states + self.mlp(self.ln_2(hidden_states))
        return set_sequence_parallel_attr(out) if self.sequence_parallel else out

    @torch.no_grad()
    def init_from_full(self, blk: Block) -> None:
        """Takes over the parameters of a dense block: those of the first rank. Collective over the tensor group.

        Raises:
            SplitError: It has another size.
        """
        self.ln_1.init_from_full(blk.ln_1)
        self.attn.init_from_full(blk.attn)
        self.ln_2.init_from_full(blk.ln_2)
        self.mlp.init_from_full(blk.mlp)


@final
class Transformer(nn.Module):
    """A stack of blocks; input and output are whole, on every rank. Making one is collective over the tensor group.

    Args:
        dim: Features.
        mlp_ratio: Hidden features of the linear layers, as a multiple of dim.
        num_heads: Heads of the attention, of the whole model.
        depth: Blocks.
        tensor_parallel: Whether to make each a `ParallelBlock`; else it is a `Block`, which needs no process group.
        sequence_parallel: Whether the blocks work on parts of the sequence, which the model splits and gathers;
            without `tensor_parallel` it means nothing.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.

    Raises:
        SplitError: The ranks cannot share heads or hidden features equally.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> Transformer(16, num_heads=4, depth=2, tensor_parallel=False)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4,
        num_heads: int = 8,
        depth: int = 12,
        tensor_parallel: bool = True,
        sequence_parallel: bool = True,
        *,
        tp_group: Group = None,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise SplitError(f"a Transformer needs at least one block, got depth={depth}")
        self.mesh = tensor_mesh(tp_group) if tensor_parallel else None
        self.sequence_parallel = tensor_parallel and sequence_parallel
        self.blocks = nn.ModuleList(self._block(dim, mlp_ratio, num_heads) for _ in range(depth))

    def _block(self, dim: int, mlp_ratio: float, num_heads: int) -> nn.Module:
        if self.mesh is None:
            return Block(dim, mlp_ratio, num_heads)
        return ParallelBlock(dim, mlp_ratio, num_heads, self.sequence_parallel, tp_group=self.mesh)

    def forward(self, x: Tensor) -> Tensor:
        """The stack.

        Args:
            x: (batch, sequence, dim), whole, the same on every rank of the tensor group.

        Returns:
            The same shape, whole.

        Raises:
            SplitError: The ranks cannot share the sequence equally.
        """
        if self.sequence_parallel:
            x = maybe_split_into_sequence_parallel(x, group=self.mesh)
        for block in self.blocks:
            x = block(x)
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.mesh)
        return x
