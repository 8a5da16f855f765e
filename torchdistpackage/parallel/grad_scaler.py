"""Loss scaling for float16 when each rank holds a part of the model: torch's scaler, of which all ranks agree.

::

    found_inf = max over the ranks of the pipe, tensor and data groups of found_inf of that rank's gradients

`torch.amp.GradScaler` decides from the gradients that it sees. Here each rank sees other ones, and a rank that skips a
step alone trains another model from then on, under another scale. What an optimizer found is therefore reduced before
anyone acts on it; like `clip_grad_parallel.py` next door, this is collective over groups of `tpc`.
"""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from torchdistpackage.errors import PipelineError
from torchdistpackage.parallel.pipeline_state import guarded_if_set_up
from torchdistpackage.parallel.zero import Bf16ZeroOptimizer
from torchdistpackage.topology import tpc
from torchdistpackage.topology.process_groups import communication_device

__all__ = ["PipelineGradScaler"]

_MODES = ("pipe", "tensor", "data")


@final
class PipelineGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for pipelines: all ranks skip a step together, or take it, and hold the same scale.

    The stage of the loss scales it: with `forward_backward(..., scaler=scaler)`, or by `scaler.scale(loss)` in its
    `fwd_fn`, where the loss that comes back is the scaled one. The first `unscale_` or `step` of an optimizer since the
    last `update` is collective over the pipe, the tensor and the data group: every rank makes the same calls for the
    same number of optimizers in the same order, with or without gradients. An optimizer without parameters is made
    with `[{"params": []}]`.

    The state is torch's, the same on every rank, and either class loads the other's. Before `tpc` is set up, and with
    one rank, it is torch's scaler. See Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740).

    Args:
        device: "cuda" or "cpu", where the scale is kept; None for "cuda" where it is available, else "cpu".
        init_scale: The first scale, a factor of the loss without a unit.
        growth_factor: > 1; the scale is multiplied by it after `growth_interval` steps without a skip.
        backoff_factor: < 1; the scale is multiplied by it after a skipped step.
        growth_interval: Steps in a row, counted in calls of `update`.
        enabled: False makes `step` call `optimizer.step()`, every other method do nothing, and nothing collective.

    Raises:
        AssertionError: A factor is out of its range; from `step` and `update`, as torch's.
        PipelineError: From the first `unscale_` or `step`, on every rank: no rank of the pipeline has called `scale`.

    Example:
        >>> from torchdistpackage import clip_grad_norm_, forward_backward
        >>> stage = torch.nn.Linear(4, 1)
        >>> optimizer, scaler = torch.optim.SGD(stage.parameters(), lr=0.1), PipelineGradScaler("cpu", init_scale=8.0)
        >>> def fwd_fn(x):
        ...     with torch.autocast("cpu", torch.float16):
        ...         return stage(x).float().mean()
        >>> loss = forward_backward(optimizer, fwd_fn, None, torch.ones(8, 4), num_microbatches=4, scaler=scaler)
        >>> stage.bias.grad
        tensor([8.])
        >>> scaler.unscale_(optimizer)  # only if something reads the gradients, as here
        >>> clip_grad_norm_(stage.parameters(), 10.0), stage.bias.grad
        (tensor(2.2361), tensor([1.]))
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def __init__(
        self,
        device: str | None = None,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._presumed = False  # the scale, that is: by a rank that has not called `scale`

    def _check_scale_growth_tracker(self, funcname: str) -> tuple[Tensor, Tensor]:
        """The scale and the growth tracker; a rank of a pipeline that does not see the loss makes them here."""
        if self._scale is None and tpc.is_mode_inited("pipe"):
            self._lazy_init_scale_growth_tracker(torch.device(self._device))
            self._presumed = True
        return super()._check_scale_growth_tracker(funcname)

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscales this rank's gradients and returns what all ranks found, an entry a device of this rank's.

        Both `unscale_` and the step of a fused optimizer come here, once each. Without a gradient there is an entry
        all the same, as torch takes none for a missing check.
        """
        unscale = super()._unscale_grads_
        sharded = optimizer if isinstance(optimizer, Bf16ZeroOptimizer) else None
        groups = [tpc.get_group(mode) for mode in _MODES if tpc.is_mode_inited(mode)]
        groups += [group for group in (sharded.shards.groups if sharded else []) if group not in groups]
        if not groups:
            if sharded:
                sharded.settle()
            return unscale(optimizer, inv_scale, found_inf, allow_fp16)
        with guarded_if_set_up("PipelineGradScaler"):
            if sharded:
                sharded.settle()
            own = unscale(optimizer, inv_scale, found_inf, allow_fp16)
            found, scaled = self._agree(own, found_inf, groups)
        if self._presumed:  # read once only: a GPU would have to be waited for
            if not scaled.item():
                raise PipelineError(
                    "no rank of the pipeline has scaled its loss, so there is nothing to unscale: pass scaler=scaler "
                    "to forward_backward, or let the fwd_fn of the last stage return scaler.scale(loss)"
                )
            self._presumed = False
        return {device: found.to(device) for device in own or [found_inf.device]}

    def _agree(
        self, own: dict[torch.device, Tensor], like: Tensor, groups: list[dist.ProcessGroup]
    ) -> tuple[Tensor, Tensor]:
        """Whether any rank has found an infinite gradient, and whether any has scaled a loss; as numbers, 0 or 1."""
        found = torch.stack([one.to(like.device) for one in own.values()] or [like]).amax()
        scaled = torch.full_like(found, not self._presumed)
        votes = torch.stack([found, scaled])
        for group in groups:
            votes = votes.to(communication_device(group))
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
        return votes[0], votes[1]
