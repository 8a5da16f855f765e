"""Two linear layers with an activation between them, dense and with the hidden features shared out over ranks.

Neighbours: `layers.py` has the linear layers, `transformer.py` puts this between normalisations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import final

import torch
from torch import Tensor, nn

from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh
from torchdistpackage.parallel.tensor_parallel.layers import ColParallelLinear, RowParallelLinear, TpLinear
from torchdistpackage.parallel.tensor_parallel.regions import Group, own_random_numbers

__all__ = ["Mlp", "TpMlp"]


@final
class Mlp(nn.Module):
    """Two linear layers on one rank.

    Args:
        in_features: Features that come in.
        hidden_features: Features between the layers; None for in_features.
        out_features: Features that go out; None for in_features.
        act_layer: Makes what stands between the layers.
        tp_group: Not used, so that `Mlp` and `TpMlp` are called alike.
        bias: Whether both layers have biases.
        drop: Dropout of the result.

    Example:
        >>> Mlp(8, 32)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        tp_group: Group = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.fc1 = TpLinear(in_features, hidden, bias)
        self.act = act_layer()
        self.fc2 = TpLinear(hidden, in_features if out_features is None else out_features, bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """The result.

        Args:
            x: (..., in_features).

        Returns:
            (..., out_features).
        """
        out: Tensor = self.drop2(self.fc2(self.act(self.fc1(x))))
        return out


@final
class TpMlp(nn.Module):
    """`Mlp` with its hidden features shared out over the tensor group. Making one is collective over the group.

    Dropout: the ranks of a tensor group need equal seeds (`torch.manual_seed`). A whole result then gets the same mask
    on every rank; sequence parallel, each rank draws a mask of its own for its part. What `act_layer` draws is the same
    on every rank, for different features.

    Args:
        in_features: Features that come in.
        hidden_features: Features between the layers, of all ranks together; None for in_features.
        out_features: Features that go out; None for in_features.
        act_layer: Makes what stands between the layers; it must work on single features.
        tp_group: The tensor group, or its mesh; None for `get_tp_group()`.
        bias: Whether both layers have biases.
        drop: Dropout of the result.
        sequence_parallel: Whether input and output are this rank's part of the sequence (dim -2), instead of whole.

    Raises:
        SplitError: The ranks cannot share the hidden features equally.
        TopologyError: This rank is not in the group, or nothing is set up.

    Example:
        >>> dense, mlp = Mlp(8, 32), TpMlp(8, 32)
        >>> mlp.init_from_full(dense)
        >>> x = torch.randn(2, 5, 8)
        >>> torch.allclose(mlp(x), dense(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        tp_group: Group = None,
        bias: bool = True,
        drop: float = 0.0,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_features if hidden_features is None else hidden_features
        self.mesh, self.sequence_parallel = tensor_mesh(tp_group), sequence_parallel
        self.fc1 = ColParallelLinear(in_features, hidden, bias, self.mesh, sequence_parallel)
        self.act = act_layer()
        out = in_features if out_features is None else out_features
        self.fc2 = RowParallelLinear(hidden, out, bias, sequence_parallel, self.mesh)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """The result.

        Args:
            x: (..., in_features), whole; (..., sequence / t, in_features), this rank's part, if sequence parallel.

        Returns:
            (..., out_features), with the other dims of x.

        Raises:
            SplitError: The ranks cannot share the sequence equally.
        """
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        own = self.sequence_parallel and self.training and self.drop2.p > 0
        with own_random_numbers(out, self.mesh) if own else nullcontext():
            dropped: Tensor = self.drop2(out)
        return dropped

    @torch.no_grad()
    def init_from_full(self, mlp: Mlp) -> None:
        """Takes over the parameters of a dense one: those of the first rank. Collective over the tensor group.

        Raises:
            SplitError: It has another size, or a bias that this one lacks.
        """
        self.fc1.init_weight_from_full(mlp.fc1.weight, mlp.fc1.bias)
        self.fc2.init_weight_from_full(mlp.fc2.weight, mlp.fc2.bias)
