"""An optimizer's state by the names of the parameters, whatever it steps on.

::

    steps on                   the parameter's state is            saved as
    the parameter              one tensor                          optimizer.<name>.exp_avg      one box
    a DTensor of it            a DTensor, as the parameter         optimizer.<name>.exp_avg      this rank's box
    elements [a, b) of it      a flat tensor of them               optimizer.<name>.exp_avg      a few boxes
    a float32 copy of those    and the copy itself                 optimizer.<name>.master_weights, too

So each of them loads what any other has saved. A sharded optimizer is known by what it can tell (`ShardedOptimizer`),
not by its class: `parallel/` and this room do not know each other. Options (lr, betas, ...) are in `options.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from torchdistpackage.checkpoint.named_model import Named
from torchdistpackage.checkpoint.parts import Part, parts_of, parts_of_range
from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.model_tensors import is_dtensor, local_tensor

__all__ = ["MASTER", "ShardedOptimizer", "Stepped", "fresh_entry", "is_sharded", "parameters_of", "stepped_on"]

MASTER = "master_weights"


class StatePiece(Protocol):
    """Elements of a parameter that a rank's optimizer steps on.

    Attributes:
        parameter: The model's.
        start: First element of this rank's part of the parameter, counted row by row.
        stop: One after the last.
        tensor: What the wrapped optimizer steps on: the key of its state.
        is_master: Whether it is a float32 copy that is to be saved, too.
    """

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...

    @property
    def tensor(self) -> Tensor: ...

    @property
    def parameter(self) -> Tensor: ...

    @property
    def is_master(self) -> bool: ...


@runtime_checkable
class ShardedOptimizer(Protocol):
    """What an optimizer that owns elements instead of parameters has to tell to be saved; `Bf16ZeroOptimizer` does."""

    param_groups: list[dict[str, Any]]
    state: Any

    def state_pieces(self) -> Sequence[StatePiece]:
        """All that this rank steps on."""

    def state_parameters(self) -> list[list[Tensor]]:
        """The model's parameters, group by group."""

    def state_loaded(self) -> None:
        """State and parameters have new values."""


@final
@dataclass(frozen=True, eq=False)
class Stepped:
    """One tensor that an optimizer steps on.

    Attributes:
        named: The parameter that it is of.
        optimizer: Whose.
        group: The options of its group.
        tensor: The key of its state.
        span: First element, and the one after the last, of this rank's part of the parameter; None for all of it.
        is_master: Whether it is a float32 copy.
    """

    named: Named
    optimizer: Any
    group: Mapping[str, Any]
    tensor: Tensor
    span: tuple[int, int] | None
    is_master: bool

    @property
    def state(self) -> dict[str, Any]:
        """What there is so far; empty before the first step."""
        return dict(self.optimizer.state[self.tensor]) if self.tensor in self.optimizer.state else {}

    @property
    def whole(self) -> bool:
        """Whether it is all of what this rank has of the parameter."""
        return self.span is None or self.span == (0, local_tensor(self.named.tensor).numel())

    def key(self, entry: str, name: str | None = None) -> str:
        """Of an entry of its state, in the checkpoint."""
        return f"optimizer.{name or self.named.name}.{entry}"

    def parts(self, entry: str, value: Tensor) -> list[Part]:
        """An entry of its state, or itself, as boxes.

        Raises:
            CheckpointError: It is laid out neither as the parameter, nor whole.
        """
        key, parameter, tied = self.key(entry), self.named.tensor, self.named.tied
        local = local_tensor(parameter)
        like = value.shape == self.tensor.shape and (value.dim() or not self.tensor.dim())
        if self.span is not None and like and (is_dtensor(parameter) or value.shape != parameter.shape):
            return parts_of_range(key, parameter, *self.span, value, tied=tied)
        if is_dtensor(parameter) and not is_dtensor(value) and value.dim() and value.shape == local.shape:
            return parts_of_range(key, parameter, 0, local.numel(), value, tied=tied)
        if value.dim() and not self.whole:
            raise CheckpointError(
                f"{key} has the shape {tuple(value.shape)} where this rank owns {self.tensor.numel()} elements of the "
                f"parameter {tuple(parameter.shape)}; shard whole parameters (partition='parameters') to save it"
            )
        return parts_of(key, value, kind="state", tied=tied)


def is_sharded(optimizer: object) -> bool:
    """Whether it tells its pieces."""
    return isinstance(optimizer, ShardedOptimizer)


def parameters_of(optimizer: Any) -> list[list[Tensor]]:
    """The model's parameters in an optimizer, group by group."""
    if is_sharded(optimizer):
        return list(optimizer.state_parameters())
    return [list(group["params"]) for group in optimizer.param_groups]


def stepped_on(optimizers: Iterable[Any], model: Sequence[Named]) -> list[Stepped]:
    """Everything that the optimizers of this rank step on.

    Args:
        optimizers: Of torch, or with pieces.
        model: This rank's parameters.

    Raises:
        CheckpointError: A parameter is not of the model, or in two optimizers.
    """
    known = {id(one.tensor): one for one in model}
    taken: dict[int, str] = {}
    found = []
    for optimizer in optimizers:
        groups: dict[int, Mapping[str, Any]] = {}
        for number, parameters in enumerate(parameters_of(optimizer)):
            for place, parameter in enumerate(parameters):
                _check_known(known, parameter, f"parameter {place} of group {number} of {type(optimizer).__name__}")
                if id(parameter) in taken:
                    raise CheckpointError(
                        f"{known[id(parameter)].name} is in two optimizers, {taken[id(parameter)]} and "
                        f"{type(optimizer).__name__}; its state can be saved under its name once"
                    )
                groups[id(parameter)] = optimizer.param_groups[number]
        taken |= {key: type(optimizer).__name__ for key in groups}
        if is_sharded(optimizer):
            found += [
                Stepped(
                    known[id(piece.parameter)],
                    optimizer,
                    groups[id(piece.parameter)],
                    piece.tensor,
                    (piece.start, piece.stop),
                    piece.is_master,
                )
                for piece in optimizer.state_pieces()
            ]
        else:
            every = (parameter for group in optimizer.param_groups for parameter in group["params"])
            found += [Stepped(known[id(one)], optimizer, groups[id(one)], one, None, False) for one in every]
    return found


def fresh_entry(stepped: Stepped, entry: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for an entry of a state that the optimizer has not made yet, as it would make it.

    Like what it steps on, where the whole has the parameter's shape; else plain, and single numbers on the CPU unless
    the optimizer keeps its steps on the device.

    Args:
        stepped: Of which parameter.
        entry: Its name.
        shape: Of the whole, in the checkpoint.
        dtype: In which it is to be.
    """
    like = stepped.tensor.detach()
    if shape == tuple(stepped.named.tensor.shape) and (shape or entry != "step"):
        return torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)
    on_device = shape or stepped.group.get("capturable") or stepped.group.get("fused")
    return torch.zeros(shape, dtype=dtype, device=like.device if on_device else "cpu")


def _check_known(known: Mapping[int, Named], parameter: Tensor, what: str) -> None:
    if id(parameter) not in known:
        raise CheckpointError(
            f"{what}, of shape {tuple(parameter.shape)}, is not in the stages; make the optimizer of the very modules "
            "that the Checkpointer gets, after fully_shard or to_empty"
        )
