"""Which optimizer holds the gradient of a parameter, where that is not the parameter itself.

A sharded optimizer (`zero.py`) takes gradients out of the parameters and keeps a part of them on each rank. Whoever
reads the gradients of a model asks here first: `clip_grad_parallel.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from torchdistpackage.parallel.zero import Bf16ZeroOptimizer

__all__ = ["holder", "holders", "register"]

_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> weak reference to its optimizer


def register(parameter: Tensor, optimizer: Bf16ZeroOptimizer) -> None:
    """From now on this optimizer holds the parameter's gradient, instead of any before it."""
    _held[parameter] = weakref.ref(optimizer)


def holder(parameter: Tensor) -> Bf16ZeroOptimizer | None:
    """The optimizer that holds the parameter's gradient."""
    reference: weakref.ref[Bf16ZeroOptimizer] | None = _held.get(parameter)  # type: ignore[no-untyped-call]
    return None if reference is None else reference()


def holders(parameters: Iterable[Tensor]) -> list[Bf16ZeroOptimizer]:
    """The optimizers that hold gradients of these parameters, in the order of the first that each holds."""
    found = [holder(parameter) for parameter in parameters]
    return list({id(one): one for one in found if one is not None}.values())
