"""One call of a function or module: its time there and back, its FLOPs, and what autograd keeps of it.

The measuring that `cost.py` does for rows of layers, and the splitters for whatever pieces of a model they run.
`undisturbed` goes around a number of calls, so that nobody can tell afterwards that the model has run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, final

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map_only

from torchdistpackage.errors import SplitError

__all__ = ["Call", "CallCost", "call_cost", "check_repeats", "tensors_in", "undisturbed"]


@dataclass(frozen=True)
class CallCost:
    """What one call costs.

    Attributes:
        forward: Seconds of the forward pass, 0 if not timed.
        backward: Seconds of the backward pass, 0 if not timed or if there is nothing to differentiate.
        flops: Floating-point operations of the forward pass.
        activation_bytes: What autograd keeps for the backward pass.

    Example:
        >>> CallCost(forward=0.002, backward=0.004, flops=48, activation_bytes=24).flops
        48
    """

    forward: float
    backward: float
    flops: int
    activation_bytes: int


def call_cost(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    parameters: Iterable[torch.Tensor] = (),
    repeats: int = 3,
    timed: bool = True,
    grad: bool = True,
    input_gradients: Literal["all", "required"] = "all",
) -> CallCost:
    """What one call of a function or module costs; its arguments are copied first, so it may work in place.

    One run counts, one warms up, then the repeats are timed. Training flags, buffers and random numbers are the
    caller's to protect, once around all its calls: `with undisturbed(modules, tensors):`.

    `activation_bytes` counts each storage that autograd holds once the forward pass is over, arguments included, whole
    and once. A tensor that two calls save, as the output of one and the input of the next, is counted by both.

    Args:
        function: What is called.
        args: Its positional arguments: tensors, anything else, and nested containers of them.
        kwargs: Its keyword arguments, likewise.
        parameters: Tensors that the function holds anyway. Gradients go to those that require one; none of them is an
            activation. If the function is a module, its own parameters and buffers are added.
        repeats: Timed runs; the medians are returned.
        timed: Whether to measure seconds. On the meta device there is nothing to measure: pass False.
        grad: Whether to record what a backward pass needs; without, `backward` and `activation_bytes` are 0.
        input_gradients: Which floating-point arguments get a gradient: all, or those that require one. The latter is
            exact, if the caller's values know whether they do.

    Returns:
        The cost; all 0 if neither the arguments, the parameters nor the result have a tensor (arithmetic on sizes).

    Raises:
        SplitError: repeats is less than 1, or tensors on the meta device are to be timed.

    Example:
        >>> call_cost(nn.Linear(3, 4), (torch.zeros(2, 3),), timed=False)
        CallCost(forward=0.0, backward=0.0, flops=48, activation_bytes=24)
        >>> call_cost(torch.Size.numel, (torch.Size([2, 3]),)).forward
        0.0
    """
    check_repeats(repeats)
    held = list(parameters)
    if isinstance(function, nn.Module):
        held.extend([*function.parameters(), *function.buffers()])
    call = Call(function, tuple(args), dict(kwargs or {}), held, grad, input_gradients == "all")
    tensors = call.tensors()
    if timed and any(tensor.is_meta for tensor in tensors):
        raise SplitError("times cannot be measured on the meta device, where nothing is computed; pass timed=False")
    counted = call.counted()
    if not timed or not (tensors or counted.has_tensors):
        return CallCost(0.0, 0.0, counted.flops, counted.activation_bytes)
    run = call.timed(repeats)
    return CallCost(run.forward, run.backward, counted.flops, counted.activation_bytes)


def check_repeats(repeats: int) -> None:
    """Raises SplitError if there would be nothing to take the median of."""
    if repeats < 1:
        raise SplitError(f"repeats must be 1 or more, got {repeats}")


@dataclass(frozen=True)
class Run:
    """Seconds there and back, and what came out."""

    forward: float
    backward: float
    output: Any


@dataclass(frozen=True)
class Count:
    """What a run needs apart from time, and whether its result has a tensor."""

    flops: int
    activation_bytes: int
    has_tensors: bool


@final
@dataclass(frozen=True)
class Call:
    """A function, what it is called with, and the tensors that it holds anyway; `call_cost` says what the rest is."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    held: list[torch.Tensor]
    grad: bool = True
    all_inputs: bool = True

    def tensors(self) -> list[torch.Tensor]:
        """What the call is known to work on."""
        return [*self.held, *tensors_in((self.args, self.kwargs))]

    def timed(self, repeats: int) -> Run:
        """Medians of the runs after one that allocates and chooses kernels; the output is the last one's."""
        run = self.timed_once()
        forward, backward = [], []
        for _ in range(repeats):
            run = self.timed_once()  # one run is kept at a time: its output may be large
            forward.append(run.forward)
            backward.append(run.backward)
        return Run(statistics.median(forward), statistics.median(backward), run.output)

    def timed_once(self) -> Run:
        """One forward and backward pass; autograd.grad instead of backward() because it leaves every .grad alone."""
        leaves = list({id(tensor): tensor for tensor in self.held if tensor.requires_grad}.values())
        with torch.set_grad_enabled(self.grad):
            args, kwargs = self._copies(leaves)
            devices = _cuda_devices(self.tensors())
            _synchronize(devices)
            start = time.perf_counter()
            output = self.function(*args, **kwargs)
            devices = devices or _cuda_devices(tensors_in(output))  # a function that makes a tensor out of sizes
            _synchronize(devices)
            middle = time.perf_counter()
            roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            if not (roots and leaves):
                return Run(middle - start, 0.0, output)
            ones = [torch.ones_like(tensor) for tensor in roots]
            _synchronize(devices)
            again = time.perf_counter()
            try:
                torch.autograd.grad(roots, leaves, ones, allow_unused=True)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                return Run(middle - start, 0.0, output)  # it has no derivative: training never goes back this way
            _synchronize(devices)
            return Run(middle - start, time.perf_counter() - again, output)

    def counted(self) -> Count:
        """One forward pass, its FLOPs, and what autograd still holds when it is over.

        Weak references to storages tell two views of one from two tensors, and what is kept from what is gone; the
        address of a storage alone would be given to the next one as soon as it is free.
        """
        held = {_reference(tensor) for tensor in self.held}
        saved: dict[Any, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[_reference(tensor)] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # with its graph, an output that is saved would hold itself for ever

        from torch.utils.flop_counter import FlopCounterMode  # imports triton, 70 MB

        with torch.set_grad_enabled(self.grad):
            args, kwargs = self._copies([])
            with saved_tensors_hooks(pack, _unpack), FlopCounterMode(display=False) as counter:
                output = self.function(*args, **kwargs)
            kept = [size for storage, size in saved.items() if storage not in held and not storage.expired()]
            return Count(counter.get_total_flops(), sum(kept), bool(tensors_in(output)))

    def _copies(self, leaves: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one run; a `torch.Size`, for pytree a node, would come out as a plain tuple."""
        args, kwargs = tree_map_only(
            torch.Tensor,
            partial(self._copy, leaves),
            (self.args, self.kwargs),
            is_leaf=lambda value: isinstance(value, torch.Size),
        )
        return args, kwargs

    def _copy(self, leaves: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
        """The copy that the function gets; what its gradient goes to is added to the leaves.

        A function that works in place may neither touch a leaf nor the input of the next run. What `expand` repeats
        is copied once and repeated again: a mask for every head would be that many times as large.
        """
        leaf = tensor.detach()
        repeated = leaf.layout == torch.strided and not leaf.is_nested and 0 in leaf.stride()
        if repeated:
            leaf = leaf[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in leaf.stride())]
        if (self.all_inputs or tensor.requires_grad) and (leaf.is_floating_point() or leaf.is_complex()):
            leaf.requires_grad_(self.grad)
            leaves.append(leaf)
        return leaf.clone().expand(tensor.shape) if repeated else leaf.clone()


def _reference(tensor: torch.Tensor) -> Any:
    """The storage of a tensor as a key; it has an `expired()`, which torch does not type."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def tensors_in(values: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a pytree."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _cuda_devices(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    return list({tensor.device for tensor in tensors if tensor.is_cuda})


def _synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


@contextmanager
def undisturbed(modules: Iterable[nn.Module], tensors: Any = ()) -> Iterator[None]:
    """Put training flags, buffers and random number generators back, whatever happens inside.

    Buffers get back what they held, and their places the same tensors as before; those on the meta device hold
    nothing, so nothing is copied for them.

    Args:
        modules: What will run; the modules inside them are meant, too.
        tensors: What they will run on: the generators of the CUDA devices of these and of the parameters and buffers
            are kept, next to the one of the CPU.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed([norm]):
        ...     _ = norm.eval(), norm.running_mean.fill_(7)
        >>> norm.training, norm.running_mean
        (True, tensor([0., 0.]))
    """
    every = list({id(inner): inner for module in modules for inner in module.modules()}.values())
    training = [module.training for module in every]
    # The objects as well as what is in them: a layer may fill a buffer or put another tensor in its place.
    buffers = [
        (module, name, buffer, buffer if buffer.is_meta else buffer.detach().clone())
        for module in every
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    parameters = [parameter for module in every for parameter in module.parameters(recurse=False)]
    devices = _cuda_devices([*tensors_in(tensors), *parameters, *(buffer for _, _, buffer, _ in buffers)])
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        try:
            yield
        finally:
            for module, flag in zip(every, training, strict=True):
                module.training = flag
            with torch.no_grad():
                for module, name, buffer, content in buffers:
                    if content is not buffer:
                        buffer.copy_(content)
                    module._buffers[name] = buffer
