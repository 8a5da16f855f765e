"""Data parallelism around a pipeline: torch's `fully_shard`, whose gradients are reduced exactly once a step.

So is the newer of torch's two `replicate`, in `replicate_with_fsdp`, which is a `fully_shard` without shards.

Left alone, a fully sharded module reduces its gradients in every backward: once a micro-batch. Here it only adds them
up until the stage's last backward, and reduces while that runs; torch's word for it is gradient synchronization::

    F0  F1  B0  F2  B1  F3  B2  [arm] B3 [finish]
    adds up ................. adds up | reduces layer by layer while B3 still runs

A split backward gives weights their gradients in a half that torch does not know of: `finish` then reduces, which
takes a torch that can be told when (`set_manual_backward_finalization`). Parameters are gathered for every micro-batch,
unless the module keeps them (`reshard_after_forward=False`, `set_reshard_after_backward(False)`).

Neighbours: `data_parallel.py` finds these modules and calls this; wrappers of the other kind are its own.
"""

from __future__ import annotations

from typing import Any, final

import torch

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.dtensors import refuse_fused_shard
from torchdistpackage.split.model_tensors import is_fully_sharded

__all__ = ["FullySharded", "is_fully_sharded", "refuse_device"]


def refuse_device(module: Any) -> None:
    """Comes before a fully sharded module gathers its parameters: torch's own error would be an AttributeError.

    Raises:
        PipelineError: This torch cannot do that on a CPU.
    """
    if not hasattr(torch.cpu.Stream, "record_event") and any(p.device.type == "cpu" for p in module.parameters()):
        raise PipelineError(
            f"fully_shard of torch {torch.__version__} does not run on CPUs; install a newer torch, or use "
            "DistributedDataParallel, NaiveDDP or Bf16ZeroOptimizer"
        )


@final
class FullySharded:
    """A module that `fully_shard` was applied to, for one step; what is inside of it follows it.

    Args:
        module: The outermost such module.
    """

    def __init__(self, module: Any) -> None:
        for name, parameter in module.named_parameters():
            refuse_fused_shard(name, parameter)
        refuse_device(module)
        self.module = module
        self._manual = hasattr(module, "set_manual_backward_finalization") and hasattr(module, "finalize_backward")
        if self._manual:
            module.set_manual_backward_finalization(True)
        self._reduce(False)

    def arm(self, *, split: bool) -> None:
        """Comes right before the last backward.

        Args:
            split: Whether it is the second half of one.

        Raises:
            PipelineError: This torch cannot reduce what a split backward leaves.
        """
        if not split:
            self._reduce(True)
        elif not self._manual:
            raise PipelineError(
                "a module that fully_shard was applied to needs a newer torch (with "
                "FSDPModule.set_manual_backward_finalization) under schedules that split the backward; choose one with "
                "whole backwards (1f1b, interleaved-1f1b, ...), or wrap the stage in DistributedDataParallel"
            )

    def finish(self) -> None:
        """Comes after the last backward: gradients are reduced when it returns."""
        self._reduce(True)
        if self._manual:
            self.module.finalize_backward()
            self.module.set_manual_backward_finalization(False)

    def cancel(self) -> None:
        """Comes after a failure: leaves the module as it was; gradients of the step that were not reduced are lost."""
        if hasattr(self.module, "reset_iter_state"):
            self.module.reset_iter_state()
        if self._manual:
            self.module.set_manual_backward_finalization(False)
        self._reduce(True)

    def _reduce(self, wanted: bool) -> None:
        self.module.set_requires_gradient_sync(wanted)
        self.module.set_is_last_backward(wanted)
