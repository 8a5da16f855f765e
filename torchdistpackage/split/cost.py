"""What layers cost: parameters, FLOPs, measured time, saved activations, and the bytes that cross a cut.

The numbers go to `boundaries.balanced_boundaries` and to the planner's cost model. The functions here take a row:
layers that run one after the other, each on the output of the one before, as in `nn.Sequential`; `call_cost`, which
comes from `calls.py`, takes one call of anything. Counting a row disturbs nothing: training flags, buffers (the running
statistics of batch norm), `.grad` and the random number generators are afterwards what they were before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from torchdistpackage.errors import SplitError
from torchdistpackage.split.calls import Call, CallCost, call_cost, check_repeats, tensors_in, undisturbed

__all__ = [
    "CallCost",
    "CostName",
    "call_cost",
    "cut_bytes",
    "flop_counts",
    "layer_costs",
    "measured_times",
    "parameter_counts",
    "undisturbed",
]

CostName: TypeAlias = Literal["parameters", "flops", "time"]


def parameter_counts(layers: Sequence[nn.Module]) -> tuple[int, ...]:
    """Elements of the parameters of each layer; a shared parameter counts for the first layer that has it.

    Example:
        >>> parameter_counts([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)])
        (16, 0, 5)
    """
    seen: set[int] = set()
    counts: list[int] = []
    for layer in layers:
        new = [parameter for parameter in layer.parameters() if id(parameter) not in seen]
        seen.update(map(id, new))
        counts.append(sum(parameter.numel() for parameter in new))
    return tuple(counts)


def flop_counts(layers: Sequence[nn.Module], example_input: Any) -> tuple[int, ...]:
    """Floating-point operations of each layer's forward pass, as `torch.utils.flop_counter` counts them.

    Matrix products, convolutions and attention count (a multiplication and an addition are two); element-wise work
    counts nothing. The layers run in evaluation mode, so that one example is enough for batch norm.

    Args:
        layers: The row.
        example_input: Input of the first layer, a tensor or what else that layer takes as its one argument.

    Raises:
        SplitError: A layer does not run on the output of the one before.

    Example:
        >>> flop_counts([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)], torch.zeros(2, 3))
        (48, 0, 16)
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, 70 MB

    counts: list[int] = []
    with undisturbed(layers, example_input), torch.no_grad():
        value = _own(example_input)
        for number, layer in enumerate(layers):
            layer.eval()
            with FlopCounterMode(display=False) as counter:
                value = _run(layer, value, number)
            counts.append(counter.get_total_flops())
    return tuple(counts)


def cut_bytes(layers: Sequence[nn.Module], example_input: Any) -> tuple[int, ...]:
    """Bytes of the activations that a cut behind each layer but the last would send to the next stage.

    Args:
        layers: The row.
        example_input: Input of the first layer; bytes grow with its batch size.

    Returns:
        One number less than there are layers: number i is for a cut between layers i and i + 1. The gradient that comes
        back has as many bytes, less those of integer tensors.

    Raises:
        SplitError: A layer does not run on the output of the one before.

    Example:
        >>> cut_bytes([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)], torch.zeros(2, 3))
        (32, 32)
    """
    sizes: list[int] = []
    with undisturbed(layers, example_input), torch.no_grad():
        value = _own(example_input)
        for number, layer in enumerate(layers[:-1]):
            layer.eval()
            value = _run(layer, value, number)
            sizes.append(sum(tensor.nbytes for tensor in tensors_in(value)))
    return tuple(sizes)


def measured_times(layers: Sequence[nn.Module], example_input: Any, repeats: int = 3) -> tuple[float, ...]:
    """Seconds that each layer takes for a forward and a backward pass here and now: the medians of the repeats.

    Layers run in the mode they are in. On CUDA the device is waited for before each reading of the clock. One run
    before the first measurement is not counted: it allocates and chooses kernels.

    Args:
        layers: The row.
        example_input: Input of the first layer, of the size of a micro-batch and on the device of the layers.
        repeats: Measurements a layer.

    Raises:
        SplitError: A layer does not run on the output of the one before, or repeats is less than 1.

    Example:
        >>> times = measured_times([nn.Linear(1000, 1000), nn.ReLU()], torch.zeros(64, 1000))
        >>> len(times), min(times) > 0
        (2, True)
    """
    check_repeats(repeats)
    medians: list[float] = []
    with undisturbed(layers, example_input):
        value = _own(example_input)
        for number, layer in enumerate(layers):
            call = Call(partial(_run, layer, number=number), (value,), {}, list(layer.parameters()))
            run = call.timed(repeats)
            medians.append(run.forward + run.backward)
            value = tree_map_only(torch.Tensor, torch.Tensor.detach, run.output)
    return tuple(medians)


def layer_costs(
    layers: Sequence[nn.Module], costs: CostName | Sequence[float], example_input: Any = None
) -> tuple[float, ...]:
    """The costs of a row by name, or the caller's own numbers once checked.

    Args:
        layers: The row.
        costs: "parameters", "flops", "time", or one number a layer.
        example_input: Input of the first layer, for "flops" and "time".

    Raises:
        SplitError: An unknown name, no example input where one is needed, or not one number a layer.

    Example:
        >>> layer_costs([nn.Linear(3, 4), nn.ReLU()], "parameters")
        (16, 0)
    """
    if not isinstance(costs, str):
        if len(costs) != len(layers):
            raise SplitError(f"{len(costs)} costs were given for {len(layers)} layers; give one number for each layer")
        return tuple(costs)
    if costs == "parameters":
        return parameter_counts(layers)
    if costs not in ("flops", "time"):
        raise SplitError(f"unknown costs {costs!r}; use 'parameters', 'flops', 'time' or one number for each layer")
    if example_input is None:
        raise SplitError(f"costs={costs!r} runs the layers: pass example_input, the input of the first layer")
    return flop_counts(layers, example_input) if costs == "flops" else measured_times(layers, example_input)


def _run(layer: nn.Module, value: Any, number: int) -> Any:
    try:
        return layer(value)
    except Exception as error:
        raise SplitError(
            f"layer {number} ({type(layer).__name__}) does not run on the output of the layer before it, or on "
            f"example_input if it is the first: {error}"
        ) from error


def _own(example_input: Any) -> Any:
    """Copies of the tensors, so that a layer that works in place does not reach the caller's."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), example_input)
