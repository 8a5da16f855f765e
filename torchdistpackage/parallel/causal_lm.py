"""`split/causal_lm.py` with the ranks filled in: this rank's stages of a language model, and text from all of them.

Generation is transformers' own `generate`, on every rank at once: each rank runs the same loop over the same logits,
and where that loop calls the model, the ranks run their stages and the last one shares its logits::

    rank 0   generate:  ids -> [stages 0] ------------->            -> logits -> next token -> ids -> ...
    rank 1   generate:  ids              -> [stages 1] -> logits -->           next token -> ids -> ...

So beams, sampling, penalties, streamers and stopping rules are those of transformers. Each stage keeps its own cache.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import PipelineError, SplitError
from torchdistpackage.parallel.pipeline_sched import forward_backward
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.parallel.step_plan import placement_of
from torchdistpackage.schedule import Action, Op, Placement, Plan
from torchdistpackage.split.causal_lm import new_cache, split_causal_lm
from torchdistpackage.split.decoder.part import shallow_copy, unwrapped
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import broadcast_json, gather_json

__all__ = ["generate", "partition_causal_lm"]


def partition_causal_lm(
    model: nn.Module,
    schedule: str | Plan | Placement | os.PathLike[str] = "1f1b",
    chunks: int | None = None,
    **options: Any,
) -> dict[int, nn.Module]:
    """This rank's stages of a decoder-only language model under a schedule.

    Args:
        model: The whole model, with weights or on the meta device; the same on every rank.
        schedule: Says which rank owns which stage: as for `partition_chunks`.
        chunks: Stages a rank, where a name leaves the choice.
        options: Those of `torchdistpackage.split.split_causal_lm`: `input_weight`, `output_weight`,
            `cut_points`, `module_names`.

    Returns:
        Global index of the stage -> its module, in the order of the model; lists for `fwd_fn` and `inputs` have the
        same order.

    Raises:
        SplitError: The model cannot be cut so.
        ScheduleError: The schedule is unknown or does not run that many chunks.
        TopologyError: The process groups are not set up.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> parts = partition_causal_lm(model, "zb-v")
        >>> list(parts)  # on one rank; rank 0 of 4 has stages 0 and 7
        [0, 1]
        >>> fwd_fn = [lambda x, part=part: part(x) for part in parts.values()]
        >>> parameters = list(nn.ModuleList(parts.values()).parameters())  # a tied one of both ends once
    """
    placement = placement_of(schedule, tpc.get_pp_size(), chunks)
    return split_causal_lm(model, placement.num_stages, placement.local_stages(tpc.get_pp_rank()), **options)


@torch.no_grad()
def generate(
    parts: Mapping[int, nn.Module],
    input_ids: Tensor,
    *,
    schedule: str | Plan | Placement | os.PathLike[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> Any:
    """Text from all stages: transformers' `generate`, on every rank of the pipeline. Collective.

    Whether modules are in `eval()` mode is yours.

    Args:
        parts: This rank's stages, from `partition_causal_lm`; also wrapped in DistributedDataParallel.
        input_ids: The prompts, (rows, tokens), the same on every rank.
        schedule: The one that the stages were cut for; None to ask the ranks which stages they hold.
        seed: Of the random numbers, where tokens are drawn; the first rank's when None. The state of torch's
            generators is left as it was.
        options: Those of `transformers.GenerationMixin.generate`, the same on every rank: `attention_mask`,
            `max_new_tokens`, `do_sample`, `num_beams`, ... A cache is used unless `use_cache=False`.

    Returns:
        What `generate` returns, on every rank: (rows, prompt and new tokens).

    Raises:
        SplitError: The model cannot generate, or the ranks do not hold each of its stages once.
        PipelineError: A cache is given, or another rank failed.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2))
        >>> generate(partition_causal_lm(model), torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=True).shape
        torch.Size([1, 7])
    """
    with guarded("generate"):
        parts = {index: unwrapped(part) for index, part in parts.items()}
        shell = _shell(parts, _one_microbatch(_placement(parts, schedule)))
        drawn = seed if seed is not None else torch.initial_seed() % 2**63
        agreed = broadcast_json(drawn, tpc.get_control_group("pipe")) if tpc.get_pp_size() > 1 else drawn
    if options.get("past_key_values") is not None:
        raise PipelineError("generate makes the caches of all stages itself: leave past_key_values out")
    caches = _Caches.of(parts) if options.get("use_cache", True) else None
    cached = {"use_cache": False} if caches is None else {"past_key_values": caches}
    devices = [input_ids.device] if input_ids.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(agreed)
        return shell.generate(input_ids, **{**options, **cached})


def _placement(parts: Mapping[int, nn.Module], schedule: Any) -> Placement:
    """Which rank owns which stage: what the schedule says, or what the ranks say that they hold."""
    if schedule is not None:
        return placement_of(schedule, tpc.get_pp_size(), len(parts))
    mine = sorted(parts)
    held = gather_json(mine, tpc.get_control_group("pipe")) if tpc.get_pp_size() > 1 else [mine]
    owner = {stage: rank for rank, stages in enumerate(held) for stage in stages}
    if sorted(stage for stages in held for stage in stages) != list(range(len(owner))):
        raise SplitError(f"the ranks hold the stages {held}; pass each rank's own, such that each stage is there once")
    return Placement(len(held), tuple(owner[stage] for stage in range(len(owner))))


def _one_microbatch(placement: Placement) -> Plan:
    """The only order in which one micro-batch can go through the stages, and come back."""
    actions = []
    for rank in range(placement.num_ranks):
        stages = placement.local_stages(rank)
        there = [Action(stage, Op.FORWARD, 0) for stage in stages]
        actions.append((*there, *(Action(stage, Op.BACKWARD, 0) for stage in reversed(stages))))
    return Plan("one micro-batch", placement, 1, tuple(actions))


def _shell(parts: Mapping[int, nn.Module], schedule: Any) -> Any:
    """An object of the model's class, for `generate`: its forward is a step of the pipeline."""
    part = next(iter(parts.values()))
    whole = getattr(type(part), "_whole_forward", None)
    if whole is None or not hasattr(part, "generate"):
        raise SplitError(f"{type(part).__name__} does not generate: pass stages of a transformers model ...ForCausalLM")
    signature = inspect.signature(whole)

    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return _step(parts, schedule, input_ids, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    made: Any = shallow_copy(part)
    made.__class__ = type(type(part).__name__, (type(part),), {"forward": forward, "__module__": type(part).__module__})
    return made


def _step(parts: Mapping[int, nn.Module], schedule: Any, input_ids: Any, kwargs: dict[str, Any]) -> Any:
    """One forward of the whole model; the logits arrive on every rank."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if input_ids is None:
        raise PipelineError("generate needs input_ids; inputs_embeds cannot be sent into the first stage")
    caches = next((kwargs.pop(name) for name in ("past_key_values", "cache_params") if kwargs.get(name)), None)
    for name in ("return_dict", "inputs_embeds", "past_key_values", "cache_params", "use_cache"):
        kwargs.pop(name, None)

    def stage(number: int, part: nn.Module) -> Any:
        cache = {} if caches is None else {"past_key_values": caches.of_chunk(number), "use_cache": True}
        return lambda x: part(x, **kwargs, **cache)

    functions = [stage(number, part) for number, part in enumerate(parts.values())]
    inputs = [input_ids if index == 0 else None for index in parts]
    logits = forward_backward(
        fwd_fn=functions, inputs=inputs, forward_only=True, schedule=schedule, broadcast_loss=True
    )
    return CausalLMOutputWithPast(logits=logits.to(input_ids.device), past_key_values=caches)


@final
class _Caches:
    """The caches of this rank's stages, which `generate` takes for one.

    What it asks, the first answers, and what it does to it (beams, rollbacks) is done to all.

    Args:
        caches: One a stage, in the order of the model.
    """

    _DONE_TO_ALL = frozenset({"reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset"})
    is_compileable = False

    def __init__(self, caches: list[Any]) -> None:
        self._caches = caches

    @classmethod
    def of(cls, parts: Mapping[int, nn.Module]) -> _Caches | None:
        """New ones; None for a model that makes none."""
        try:
            return cls([new_cache(part) for part in parts.values()])
        except SplitError:
            return None

    def of_chunk(self, number: int) -> Any:
        """The cache of a stage of this rank."""
        return self._caches[number]

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._caches[0])

    def __getattr__(self, name: str) -> Any:
        if name not in self._DONE_TO_ALL:
            return getattr(self._caches[0], name)

        def done(*args: Any, **kwargs: Any) -> None:
            for cache in self._caches:
                getattr(cache, name)(*args, **kwargs)

        return done
