"""What torch's `ColwiseParallel` and `RowwiseParallel` leave open: four more styles for plans of `parallelize_module`.

::

    Linear                  input                 output               weight (whole shape)     who
    ------------------------------------------------------------------------------------------------------------------
    first of a pair         whole                 its columns          Shard(0)                 torch, ColwiseParallel
    second of a pair        its columns           whole, summed        Shard(1)                 FreshRowwise
    q, k, v in one          whole                 its columns of each  strided, see below       FusedColwise
    q, k, v side by side    whole, entered once   its columns          Shard(0)                 SharedColwise
    norm of one head        its heads             its heads            whole                    WholeOnShards

Neighbours: `plans.py` puts them into plans; torch's DTensor does the communication and its gradients.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.dtensors import refuse_fused_shard
from torchdistpackage.runtime.backward import differentiable_alias

__all__ = ["FreshRowwise", "FusedColwise", "SharedColwise", "WholeOnShards"]


@final
class FusedColwise(ParallelStyle):
    """Columns of a linear layer that computes several matrices at once: q, k and v, or a gate and its values.

    A plain shard would give rank 0 of 2 all of q and half of k. Here each of the parts is sharded, and the parameter is
    still the whole one, in its own order, for checkpoints and for everybody who asks for `full_tensor()`::

        weight, parts=3      q0 q1 | k0 k1 | v0 v1          rank 0: q0 k0 v0      rank 1: q1 k1 v1

    torch has this placement for `fully_shard` over tensor parallelism (`_StridedShard`), and norms and optimizers know
    it. The product is computed on the local tensors.

    Args:
        parts: How many matrices there are, all of one size.

    Example:
        >>> from torchdistpackage import apply_tensor_parallel
        >>> layers = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        >>> _ = apply_tensor_parallel(layers, {"qkv": FusedColwise(3), "proj": FreshRowwise()})
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise SplitError(f"FusedColwise is for nn.Linear, not for {type(module).__name__}")
        if module.out_features % (self.parts * device_mesh.size()):
            raise SplitError(
                f"{module.out_features} outputs in {self.parts} parts do not divide by {device_mesh.size()} ranks of "
                "the tensor group; choose another tensor size, or leave this layer whole"
            )
        placement = _StridedShard(0, split_factor=self.parts)
        _distribute(module, device_mesh, placement)
        module.register_forward_pre_hook(_EnterRegion(device_mesh))
        _show_local(module)
        module.register_state_dict_post_hook(_refuse_wrong_order)  # type: ignore[no-untyped-call]
        return module

    def __repr__(self) -> str:
        return f"FusedColwise(parts={self.parts})"


@final
class WholeOnShards(ParallelStyle):
    """A module that every rank holds whole and runs on its own shard: the norm of each head, or of its own tokens.

    Each rank's gradient is a part of the sum. It stays so until somebody needs it: `grad` is a DTensor in placement
    `Partial`, micro-batches add to it without communication, and `clip_grad_norm_`, `full_tensor()` and torch's
    optimizers sum it over the ranks. torch's own `SequenceParallel` does the same for its three classes of norms.

    Example:
        >>> plan = {"q_proj": ColwiseParallel(), "q_norm": WholeOnShards()}
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for inner in list(module.modules()):
            if inner._parameters:
                _distribute(inner, device_mesh, Replicate())
                _show_local(inner)
        return module

    def __repr__(self) -> str:
        return "WholeOnShards()"


@final
class FreshRowwise(ParallelStyle):
    """`RowwiseParallel` whose output is nobody's view: a forward may go on in place with it, as with a layer's output.

    Args:
        input_layouts: As there.

    Example:
        >>> plan = {"fc1": ColwiseParallel(), "fc2": FreshRowwise()}
    """

    def __init__(self, *, input_layouts: Placement | None = None) -> None:
        super().__init__()
        self._inner = RowwiseParallel(input_layouts=input_layouts)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._inner._apply(module, device_mesh)
        module.register_forward_hook(_as_own)
        return module

    def __repr__(self) -> str:
        return f"FreshRowwise(input_layouts={self._inner.input_layouts})"


def _as_own(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return differentiable_alias(output)


@final
class SharedColwise(ParallelStyle):
    """`ColwiseParallel` for layers that read one tensor, such as q, k and v: they enter the parallel region once.

    The gradients that they send back are then added before they are summed over the ranks: one all-reduce in the
    backward, not one a layer. Layers that get different tensors all the same enter one by one, as ever. Use one object
    for the layers of one group.

    Example:
        >>> together = SharedColwise()
        >>> plan = {"gate_proj": together, "up_proj": together, "down_proj": FreshRowwise()}
    """

    def __init__(self) -> None:
        super().__init__()
        self._inner = ColwiseParallel()
        self._shared: _SharedInput | None = None

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if self._shared is None:
            self._shared = _SharedInput(device_mesh)
        self._shared.users += 1
        self._inner._apply(module, device_mesh)
        module.register_forward_pre_hook(self._shared, prepend=True)  # torch's hook takes a DTensor as it is
        return module

    def __repr__(self) -> str:
        return "SharedColwise()"


class _SharedInput:
    """The last tensor that one of the layers was given, as a DTensor; let go once all have asked."""

    def __init__(self, mesh: DeviceMesh, users: int = 0) -> None:
        self._mesh, self.users = mesh, users
        self._given: Tensor | None = None
        self._entered: DTensor | None = None
        self._left = 0

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], Tensor) or isinstance(inputs[0], DTensor):
            return None
        tensor = inputs[0]
        if self._given is not tensor or self._entered is None or self._entered.requires_grad != _wanted(tensor):
            self._given, self._left = tensor, self.users
            self._entered = DTensor.from_local(tensor, self._mesh, [Replicate()], run_check=False)
        entered, self._left = self._entered, self._left - 1
        if self._left == 0:
            self._given = self._entered = None
        return (entered, *inputs[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedInput:
        copied = memo[id(self)] = _SharedInput(self._mesh, self.users)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": None, "_entered": None}


def _refuse_wrong_order(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        refuse_fused_shard(f"{prefix}{name}", parameter)


class _EnterRegion:
    """A forward pre-hook: the input as it is, whose gradient is summed over the ranks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        whole = DTensor.from_local(inputs[0], self._mesh, [Replicate()], run_check=False)
        return (whole.to_local(grad_placements=[Partial()]), *inputs[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> _EnterRegion:
        return _EnterRegion(self._mesh)


def _wanted(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.detach(), mesh, [placement])  # the values of the group's first rank
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def _show_local(module: nn.Module) -> None:
    """While the module runs, its parameters look like this rank's local tensors: any forward can compute with them."""
    module.register_forward_pre_hook(_show)
    module.register_forward_hook(_hide, always_call=True)


def _show(module: nn.Module, inputs: Any) -> None:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, DTensor):
            replicated = [isinstance(placement, Replicate) for placement in parameter.placements]
            partial = [Partial() if whole else p for whole, p in zip(replicated, parameter.placements, strict=True)]
            module.__dict__[name] = parameter.to_local(grad_placements=partial)


def _hide(module: nn.Module, inputs: Any, output: Any) -> None:
    for name in module._parameters:
        module.__dict__.pop(name, None)
