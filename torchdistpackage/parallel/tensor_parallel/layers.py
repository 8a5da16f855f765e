"""Linear layers (and a normalisation) whose weights are shared out over the tensor group, as DTensors.

A parameter has the shape of the whole layer, of which each rank holds a shard: `state_dict`, optimizers, norms,
`fully_shard` and distributed checkpoints see one parameter of one model. Activations are plain tensors, so that what
stands between the layers is ordinary code. A pair of layers needs one sum forward and one backward::

        x whole -> [ column 0 | column 1 ] -> y_0 | y_1 -> [ row 0 ] -> share 0 \
                        rank 0     rank 1                  [ row 1 ] -> share 1 / sum (+ bias, once) -> whole

or, sequence parallel, a gather before and a reduce-scatter after, which move as much and keep what stands between two
pairs (normalisation, dropout, residual) split over the ranks.

The products are computed on the local shards: a collective is where `regions.py` says, nowhere else. Neighbours:
`weights.py` makes the parameters; `attn.py` and `mlp.py` are pairs of these layers.
"""

from __future__ import annotations

import math
from typing import Any, cast, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.dtensors import local_tensor
from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh
from torchdistpackage.parallel.tensor_parallel.regions import (
    Group,
    enter_tensor_parallel_region,
    gather_from_sequence_parallel_region,
    leave_tensor_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torchdistpackage.parallel.tensor_parallel.weights import set_whole, spread, take_over

__all__ = ["ColParallelLinear", "RowParallelLinear", "TpLayerNorm", "TpLinear"]


@final
class TpLinear(nn.Module):
    """A linear layer whose weight is stored (in, out), made on one rank and all of it.

    Args:
        fin: Features that come in.
        fout: Features that go out.
        bias: Whether there is one.
        device: Of the parameters; None for torch's default.
        dtype: Of the parameters; None for torch's default.

    Example:
        >>> layer = TpLinear(4, 6)
        >>> layer.weight.shape, layer(torch.zeros(2, 3, 4)).shape
        (torch.Size([4, 6]), torch.Size([2, 3, 6]))
    """

    def __init__(
        self,
        fin: int,
        fout: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fin, fout, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(fout, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New random weights, uniform up to 1 / sqrt(fin) either way; the bias becomes zero.

        Inside of a tensor-parallel layer: those that the first rank would draw for the whole layer, whatever the number
        of ranks. Then it is collective over the tensor group, and needs the memory of the whole layer for a moment.
        """
        bound = 1.0 / math.sqrt(max(self.weight.shape[0], 1))
        whole = torch.empty(self.weight.shape, device=self.weight.device, dtype=self.weight.dtype)
        set_whole(self.weight, whole.uniform_(-bound, bound))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product.

        Args:
            x: (..., in).

        Returns:
            (..., out); the local features where the parameters are shards of columns.
        """
        bias = None if self.bias is None else local_tensor(self.bias).flatten()
        return F.linear(x, local_tensor(self.weight).flatten(1).t(), bias)


@final
class ColParallelLinear(nn.Module):
    """A linear layer of which each rank of the tensor group computes some of the outputs.

    `.linear` holds the parameters, DTensors of the whole layer's size: weight (in, out), split along out. This rank's
    part of a parameter or gradient is `weight.grad.to_local()`, all of it `weight.grad.full_tensor()`. Made
    of several `parts` (q, k and v in one), the weight is (in, parts, out / parts) and each part is split along its own
    outputs: `weight.full_tensor().flatten(1)` is the dense layer's, `bias.full_tensor().flatten()`, too. A shape of its
    own keeps the shards what torch's checkpoints and `fully_shard` understand, rectangles.

    All ranks start from the numbers of the first rank of the group, whatever their seeds. Making one is collective
    over the group; on the meta device it is not: there `to_empty` follows, and `reset_parameters` of every module that
    has it, on all ranks in one order.

    Args:
        fin: Features that come in, of the whole layer.
        fout: Features that go out, of the whole layer.
        bias: Whether there is one.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.
        sequence_parallel: Whether the input is this rank's part of the sequence (dim -2), which the layer gathers;
            else it is whole, the same on every rank.
        parts: How many matrices stand side by side in the weight.

    Raises:
        SplitError: The ranks cannot share the outputs equally.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> layer = ColParallelLinear(8, 32)
        >>> layer(torch.zeros(2, 5, 8)).shape  # on one rank; (2, 5, 16) on each of two
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        fin: int,
        fout: int,
        bias: bool = True,
        tp_group: Group = None,
        sequence_parallel: bool = False,
        *,
        parts: int = 1,
    ) -> None:
        super().__init__()
        self.mesh = tensor_mesh(tp_group)
        self.fin, self.fout, self.sequence_parallel = fin, fout, sequence_parallel
        _check_positive(fin, "inputs (fin)")
        _check_shared(fout, self.mesh, "outputs (fout)", parts)
        self.linear = TpLinear(fin, fout, bias)
        self._spread(parts)

    def forward(self, x: Tensor) -> Tensor:
        """The local outputs.

        Args:
            x: (..., in), whole; (..., sequence / t, in), this rank's part, if sequence parallel.

        Returns:
            (..., out / t) for the whole sequence: this rank's outputs, of each of the parts in turn.

        Raises:
            SplitError: The input has another number of features.
        """
        if x.shape[-1:] != (self.fin,):
            raise SplitError(f"the layer has {self.fin} inputs, on every rank, and got shape {tuple(x.shape)}")
        if self.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.mesh)
        else:
            x = enter_tensor_parallel_region(x, self.mesh)
        local: Tensor = self.linear(x)
        return local

    def init_weight_from_full(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes over the parameters of a dense layer: those of the first rank. Collective over the tensor group.

        Args:
            weight: (in, out), whole.
            bias: (out,), whole; None leaves the layer's as it is.

        Raises:
            SplitError: A shape is not that of the whole layer, or the layer has no bias.

        Example:
            >>> dense, layer = TpLinear(4, 6), ColParallelLinear(4, 6)
            >>> layer.init_weight_from_full(dense.weight, dense.bias)
            >>> torch.equal(layer.linear.weight.full_tensor(), dense.weight)
            True
        """
        take_over(self.linear, weight, bias, (self.fin, self.fout))

    def init_weight_from_full_attn(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """As `init_weight_from_full` for a fused q, k and v, each of which is split over the ranks by itself.

        A layer that was made with another number of parts than 3 gets new parameters, of 3: do so before an optimizer
        has the old ones.

        Args:
            weight: (in, 3 * dim), whole: q, k and v side by side.
            bias: (3 * dim,), whole; None leaves the layer's as it is.

        Raises:
            SplitError: A shape is not that of the whole layer, or q, k and v cannot be split.

        Example:
            >>> dense, layer = TpLinear(4, 12), ColParallelLinear(4, 12, parts=3)
            >>> layer.init_weight_from_full_attn(dense.weight, dense.bias)
            >>> layer.linear.weight.shape, torch.equal(layer.linear.weight.full_tensor().flatten(1), dense.weight)
            (torch.Size([4, 3, 4]), True)
        """
        if self.linear.weight.ndim == 2 or self.linear.weight.shape[1] != 3:
            _check_shared(self.fout, self.mesh, "outputs (fout) of q, k and v", 3)
            for name, parameter in list(self.linear.named_parameters()):
                whole = cast(DTensor, parameter.detach()).full_tensor().flatten(int(name == "weight"))
                setattr(self.linear, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
            self._spread(3)
        self.init_weight_from_full(weight, bias)

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"{self.fin} -> {self.fout} over {self.mesh.size()}, sequence_parallel={self.sequence_parallel}"

    def _spread(self, parts: int) -> None:
        shape = () if parts == 1 else (parts, self.fout // parts)
        spread(self.linear, self.mesh, "weight", (self.fin, *shape) if shape else (), Shard(1 + (parts > 1)))
        spread(self.linear, self.mesh, "bias", shape, Shard(int(parts > 1)))


@final
class RowParallelLinear(nn.Module):
    """A linear layer of which each rank of the tensor group has some of the inputs; the products are added up.

    `.linear` holds the parameters, DTensors of the whole layer's shape (`weight.grad.to_local()` is this rank's part,
    `weight.grad.full_tensor()` all of it): weight (in, out), split along in; bias, held by every rank, and added once,
    to the sum. Construction as of `ColParallelLinear`.

    Sequence parallel, the bias has seen one part of the sequence on each rank: its gradients are added up over the
    ranks in every backward. That is one more message, of a few bytes, and makes `.grad` the same on every rank.

    Args:
        fin: Features that come in, of the whole layer.
        fout: Features that go out.
        bias: Whether there is one.
        sequence_parallel: Whether the output is this rank's part of the sequence (dim -2); else it is whole, the same
            on every rank.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.

    Raises:
        SplitError: The ranks cannot share the inputs equally.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> layer = RowParallelLinear(32, 8)
        >>> layer(torch.zeros(2, 5, 32)).shape  # on one rank; each of two gives (2, 5, 16) and gets the same
        torch.Size([2, 5, 8])
    """

    def __init__(
        self, fin: int, fout: int, bias: bool = True, sequence_parallel: bool = False, tp_group: Group = None
    ) -> None:
        super().__init__()
        self.mesh = tensor_mesh(tp_group)
        self.fin, self.fout, self.sequence_parallel = fin, fout, sequence_parallel
        _check_shared(fin, self.mesh, "inputs (fin)", 1)
        _check_positive(fout, "outputs (fout)")
        self.linear = TpLinear(fin, fout, bias)
        spread(self.linear, self.mesh, "weight", (), Shard(0))
        spread(self.linear, self.mesh, "bias", (), Replicate())

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what all ranks make of their inputs, and the bias.

        Args:
            x: (..., in / t), this rank's features, as `ColParallelLinear` returns them.

        Returns:
            (..., out), whole; (..., sequence / t, out), this rank's part, if sequence parallel.

        Raises:
            SplitError: The input has another number of features, or the ranks cannot share the sequence equally.
        """
        own = self.fin // self.mesh.size()
        if x.shape[-1] != own:
            raise SplitError(
                f"each of {self.mesh.size()} ranks has {own} of the {self.fin} inputs of this layer, and got "
                f"{x.shape[-1]}, in shape {tuple(x.shape)}; feed it with what a ColParallelLinear returns"
            )
        share = F.linear(x, local_tensor(self.linear.weight).t())
        if self.sequence_parallel:
            out = reduce_scatter_to_sequence_parallel_region(share, group=self.mesh)
        else:
            out = leave_tensor_parallel_region(share, self.mesh)
        if self.linear.bias is None:
            return out
        bias = local_tensor(self.linear.bias)
        if self.sequence_parallel:
            bias = enter_tensor_parallel_region(bias, self.mesh)
        return out + bias.to(out.dtype)

    def init_weight_from_full(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """As `ColParallelLinear.init_weight_from_full`."""
        take_over(self.linear, weight, bias, (self.fin, self.fout))

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"{self.fin} -> {self.fout} over {self.mesh.size()}, sequence_parallel={self.sequence_parallel}"


@final
class TpLayerNorm(nn.LayerNorm):
    """Layer normalisation beside tensor-parallel layers: its parameters are DTensors that every rank holds whole.

    Without sequence parallelism all ranks compute the same, gradients included. With it each sees its part of the
    sequence, and the gradients of both parameters are added up over the ranks, in one message for each backward.

    Args:
        dim: Features.
        sequence_parallel: Whether the input is this rank's part of the sequence.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.
        eps: As of `nn.LayerNorm`.

    Example:
        >>> norm = TpLayerNorm(8, sequence_parallel=True)
        >>> norm(torch.randn(2, 5, 8)).shape, norm.weight.shape
        (torch.Size([2, 5, 8]), torch.Size([8]))
    """

    def __init__(self, dim: int, sequence_parallel: bool = False, tp_group: Group = None, eps: float = 1e-5) -> None:
        super().__init__(dim, eps)
        self.mesh, self.sequence_parallel = tensor_mesh(tp_group), sequence_parallel
        for name in ("weight", "bias"):
            spread(self, self.mesh, name, (), Replicate())

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.LayerNorm`, on a plain tensor.

        Args:
            x: (..., dim).
        """
        weight, bias = local_tensor(self.weight), local_tensor(self.bias)
        if self.sequence_parallel:
            weight, bias = _EnterTogether.apply(weight, bias, self.mesh)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

    def init_from_full(self, norm: nn.LayerNorm) -> None:
        """Takes over the parameters of a dense one: those of the first rank. Collective over the tensor group.

        Raises:
            SplitError: It has another size, or no parameters.
        """
        for name in ("weight", "bias"):
            own, whole = getattr(self, name), getattr(norm, name, None)
            if whole is None or whole.shape != own.shape:
                found = "no such parameter" if whole is None else f"shape {tuple(whole.shape)}"
                raise SplitError(f"the {name} of the norm has shape {tuple(own.shape)}; the dense one has {found}")
        for own, whole in ((self.weight, norm.weight), (self.bias, norm.bias)):
            set_whole(own, whole)


class _EnterTogether(torch.autograd.Function):
    """Two tensors as they are, whose gradients are summed over the ranks in one message.

    Each gets a gradient with memory of its own: of views into one tensor, DTensors can be neither copied nor saved.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
        ctx.mesh = mesh
        return weight.view_as(weight), bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, None]:
        both = torch.stack((weight, bias))
        dist.all_reduce(both, group=ctx.mesh.get_group())
        return both[0].clone(), both[1].clone(), None


def _check_shared(size: int, mesh: DeviceMesh, what: str, parts: int) -> None:
    _check_positive(size, what)
    if parts < 1 or size % (parts * mesh.size()):
        each = f" in {parts} parts" if parts != 1 else ""
        raise SplitError(
            f"{size} {what}{each} cannot be shared equally by the {mesh.size()} ranks of the tensor group; choose a "
            f"multiple of {max(parts, 1) * mesh.size()}, or another size of the group"
        )


def _check_positive(size: int, what: str) -> None:
    if not isinstance(size, int) or size < 1:
        raise SplitError(f"a layer needs a positive whole number of {what}, got {size!r}")
