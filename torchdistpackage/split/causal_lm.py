"""Decoder-only language models -> stages, for every family that transformers ships, and those that are built alike.

::

    parts = split_causal_lm(model, num_stages=4, stages=[rank])
    logits = parts[3](parts[2](parts[1](parts[0](input_ids))))

A stage keeps the model's own forward (see `decoder/`), so nothing here knows a family. `sequential.py` is for models
whose layers you can write down, `traced.py` for those that can be recorded; both send masks and positions from stage to
stage, where this door makes them on each stage out of the arguments of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.cuts import cuts_of_names, cuts_of_points, cuts_of_weights
from torchdistpackage.split.decoder.find import find_layout
from torchdistpackage.split.decoder.part import make_part, unwrapped
from torchdistpackage.split.decoder.stage_forward import STAGE, Stage
from torchdistpackage.split.decoder.twin import make_twin
from torchdistpackage.split.names import record_names
from torchdistpackage.split.pipe import put_in_use
from torchdistpackage.split.pipeline_stage import PipelineStage
from torchdistpackage.split.ties import record_ties
from torchdistpackage.split.traced import SplitPoint, pipeline

__all__ = [
    "ModelSplitter",
    "causal_lm_module_names",
    "create_automatic_splitter",
    "create_manual_causal_lm_splitter",
    "new_cache",
    "split_causal_lm",
]

AttentionMaskCreator = Callable[..., Any]
Splitted = tuple[list[nn.Module], list[nn.Module], list[PipelineStage], AttentionMaskCreator | None]


@runtime_checkable
class ModelSplitter(Protocol):
    """What a trainer calls to cut a model; any function of this form will do.

    Returns four values: the modules of all stages; those of this rank, the same objects; the stages of this rank, with
    their places; and None or a function that makes attention masks on each rank, out of the batch, so that they need
    not be sent.

    Example:
        >>> def halves(model, example_args, example_kwargs, stage_indices, train, device, rank, pp_group):
        ...     layers = list(model)
        ...     modules = [nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])]
        ...     mine = stage_indices[rank]
        ...     stages = [PipelineStage(modules[index], index, len(modules), device, pp_group) for index in mine]
        ...     return modules, [modules[index] for index in mine], stages, None
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 1))
        >>> _, _, (stage,), _ = halves(model, (), None, [(0,), (1,)], True, "cpu", 1, None)
        >>> isinstance(halves, ModelSplitter), stage.is_last, len(stage.submod)
        (True, True, 2)
    """

    def __call__(
        self,
        model: nn.Module,
        example_args: tuple[Any, ...],
        example_kwargs: Mapping[str, Any] | None,
        stage_indices: Sequence[Sequence[int]],
        train: bool,
        device: torch.device | str | None,
        rank: int,
        pp_group: Any,
    ) -> Splitted:
        """Cuts a model.

        Args:
            model: The whole model, on the meta device or not.
            example_args: Positional arguments of one micro-batch.
            example_kwargs: Keyword arguments.
            stage_indices: For each rank the global indices of its stages.
            train: Whether it is going to be trained.
            device: Where this rank computes.
            rank: This rank in the pipeline.
            pp_group: Its process group.
        """


def split_causal_lm(
    model: nn.Module,
    num_stages: int,
    stages: Iterable[int] | None = None,
    *,
    input_weight: float = 1,
    output_weight: float = 1,
    cut_points: Sequence[int] | None = None,
    module_names: Sequence[Sequence[str]] | None = None,
) -> dict[int, nn.Module]:
    """Cuts a decoder-only language model between its layers; the stages compute exactly what the model does.

    A stage is an object of the model's own class that shares the model's layers: training the stages trains the model,
    `state_dict` has the model's names, and what a stage does not hold is None. Call it as you call the model::

        hidden = parts[0](input_ids, attention_mask=mask)            # (rows, tokens, width)
        logits = parts[1](hidden, attention_mask=mask)               # (rows, tokens, vocabulary)

    Every stage gets the same keyword arguments (`attention_mask`, `position_ids`, `past_key_values`, ...): masks and
    rotary positions are made where they are needed, and not sent. A few families send more than the hidden state; a
    stage then returns a dict, which the next one takes as it is. With `labels` the last stage returns the model's own
    loss. A cache belongs to one stage: see `new_cache`. `part.is_first_stage` and `part.is_last_stage` say where it is.

    Args:
        model: A causal language model of transformers, or one that is built alike: a `torch.nn.ModuleList` of layers
            that are called one after the other, between embeddings and a head. Also on the meta device.
        num_stages: Stages of the whole pipeline.
        stages: Those that are wanted, all when None.
        input_weight: What the embeddings cost, in layers.
        output_weight: What norm and head cost, in layers.
        cut_points: Index of the layer at which each stage but the first begins, instead of weights.
        module_names: Names of the modules of each stage, instead of either; see `causal_lm_module_names`.

    Returns:
        Global index -> stage, ascending.

    Raises:
        SplitError: The model is an encoder-decoder, or not built like that; there are not enough layers; a cut point
            or a name is missing, unknown, given twice or out of order.

    Example:
        >>> import torch
        >>> class Toy(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed = nn.Embedding(10, 4)
        ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...         self.head = nn.Linear(4, 10)
        ...     def forward(self, ids):
        ...         x = self.embed(ids)
        ...         for layer in self.layers:
        ...             x = layer(x).relu()
        ...         return self.head(x)
        >>> model, ids = Toy(), torch.tensor([[1, 2, 3]])
        >>> parts = split_causal_lm(model, 2)
        >>> list(parts[1].state_dict())
        ['layers.2.weight', 'layers.2.bias', 'head.weight', 'head.bias']
        >>> torch.equal(parts[1](parts[0](ids)), model(ids))
        True
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SplitError(
            f"{type(model).__name__} is an encoder-decoder (config.is_encoder_decoder); only decoder-only language "
            "models are cut here: use torchdistpackage.split_model"
        )
    wanted = list(range(num_stages)) if stages is None else sorted({*stages})
    if num_stages < 1 or any(not 0 <= stage < num_stages for stage in wanted):
        raise SplitError(f"stages {wanted} are asked for, but the {num_stages} stages are numbered from 0")
    layout = find_layout(model)
    if module_names is not None and cut_points is not None:
        raise SplitError("cut_points and module_names both say where to cut; give one of them")
    if module_names is not None:
        cuts = cuts_of_names(model, layout, num_stages, module_names)
    elif cut_points is not None:
        cuts = cuts_of_points(layout, num_stages, cut_points)
    else:
        cuts = cuts_of_weights(layout, num_stages, input_weight, output_weight)
    twin = make_twin(model)
    parts = [
        make_part(model, layout, twin, start, stop, first=stage == 0, last=stage == num_stages - 1)
        for stage, (start, stop) in enumerate(itertools.pairwise(cuts))
    ]
    record_names(model, parts)
    record_ties(parts, range(num_stages + 1))
    return {stage: put_in_use(parts[stage], stage, num_stages) for stage in wanted}


def causal_lm_module_names(
    model: nn.Module, num_stages: int, *, input_weight: float = 1, output_weight: float = 1
) -> list[list[str]]:
    """The names of the modules of each stage, as `split_causal_lm` would cut; to be changed and given to it.

    Modules without parameters are on every stage and are not named.

    Args:
        model: The whole model, also on the meta device.
        num_stages: Stages.
        input_weight: What the embeddings cost, in layers.
        output_weight: What norm and head cost, in layers.

    Raises:
        SplitError: As `split_causal_lm`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=10
        ... )
        >>> causal_lm_module_names(LlamaForCausalLM(config), 2)
        [['model.embed_tokens', 'model.layers.0'], ['model.layers.1', 'model.norm', 'lm_head']]
    """
    layout = find_layout(model)
    cuts = cuts_of_weights(layout, num_stages, input_weight, output_weight)
    names = [list(layout.row[start:stop]) for start, stop in itertools.pairwise(cuts)]
    return (
        [[*layout.prologue, *names[0]], *names[1:-1], [*names[-1], *layout.idle]]
        if num_stages > 1
        else [[*layout.prologue, *names[0], *layout.idle]]
    )


def new_cache(part: nn.Module) -> Any:
    """An empty key-value cache for one stage and one batch of sequences; of the class that the model itself makes.

    Pass it as `past_key_values`, whatever the model's own name for it, in every forward of the stage::

        caches = [new_cache(part) for part in parts.values()]

    Args:
        part: A stage of `split_causal_lm`.

    Raises:
        SplitError: The model makes no cache that transformers knows.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=10)).eval()
        >>> parts = split_causal_lm(model, 2)
        >>> caches = {stage: new_cache(part) for stage, part in parts.items()}
        >>> x = torch.tensor([[1, 2, 3]])
        >>> for stage, part in parts.items():
        ...     x = part(x, past_key_values=caches[stage])
        >>> x.shape, caches[1].get_seq_length()
        (torch.Size([1, 3, 10]), 3)
    """
    stage: Stage | None = vars(unwrapped(part)).get(STAGE)
    if stage is None:
        raise SplitError(f"{type(part).__name__} is no stage of split_causal_lm; a cache belongs to a stage")
    if stage.layout.cache is None:
        raise SplitError(f"{type(part).__name__} makes no key-value cache of transformers; generate without one")
    return stage.layout.cache.fresh()


def create_manual_causal_lm_splitter(
    num_layers: int | None = None, input_weight: float = 1, output_weight: float = 1
) -> ModelSplitter:
    """A splitter for decoder-only language models: between layers, without tracing.

    Args:
        num_layers: How many layers the model must have; None to take what its configuration says.
        input_weight: What the embeddings cost, in layers.
        output_weight: What norm and head cost, in layers.

    Returns:
        A `ModelSplitter`. It refuses a model whose number of layers is not known, or not this one.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> splitter = create_manual_causal_lm_splitter(num_layers=4)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> _, (mine,), (stage,), _ = splitter(model, (ids,), None, [(0,), (1,)], True, "cpu", 1, None)
        >>> stage.stage_index, list(mine.transformer.h)
        (1, ['2', '3'])
    """

    def split_by_layers(
        model: nn.Module,
        example_args: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        stage_indices: Sequence[Sequence[int]] = ((0,),),
        train: bool = True,
        device: torch.device | str | None = None,
        rank: int = 0,
        pp_group: Any = None,
    ) -> Splitted:
        _check_layers(model, num_layers)
        parts = split_causal_lm(
            model, _count(stage_indices, rank), input_weight=input_weight, output_weight=output_weight
        )
        own = getattr(model, "get_attn_mask_fn", None)
        return _splitted(list(parts.values()), stage_indices, rank, device, pp_group, own() if own else padding_mask)

    return split_by_layers


def create_automatic_splitter(split_spec: Mapping[str, SplitPoint | str]) -> ModelSplitter:
    """A splitter for any model that can be traced, cut at the modules that are named.

    Args:
        split_spec: Name of a module -> `SplitPoint.BEGINNING` or `END`, or `"beginning"` or `"end"`.

    Raises:
        SplitError: A point is neither; a ValueError, too.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> splitter = create_automatic_splitter({"2": "beginning"})
        >>> _, (mine,), _, masks = splitter(model, (torch.zeros(3, 2),), None, [(0,), (1,)], True, "cpu", 1, None)
        >>> list(mine.state_dict()), masks
        (['2.weight', '2.bias'], None)
    """
    points = {name: _point(name, point) for name, point in split_spec.items()}

    def split_at_modules(
        model: nn.Module,
        example_args: tuple[Any, ...] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        stage_indices: Sequence[Sequence[int]] = ((0,),),
        train: bool = True,
        device: torch.device | str | None = None,
        rank: int = 0,
        pp_group: Any = None,
    ) -> Splitted:
        pipe = pipeline(model, tuple(example_args), example_kwargs, split_spec=points)
        count = _count(stage_indices, rank)
        if pipe.num_stages != count:
            raise SplitError(
                f"split_spec cuts the model into {pipe.num_stages} stages, but the ranks have {count}: "
                f"{[list(indices) for indices in stage_indices]}"
            )
        return _splitted([pipe.get_stage_module(i) for i in range(count)], stage_indices, rank, device, pp_group, None)

    vars(split_at_modules)["traces"] = True  # what cannot be traced without weights may be traced with them
    return split_at_modules


def padding_mask(
    input_ids: Tensor | None = None, attention_mask: Any = None, position_ids: Tensor | None = None, **inputs: Any
) -> Any:
    """The attention mask that stages of a causal language model take: the batch's own; each stage makes the rest."""
    return attention_mask


def _splitted(
    modules: list[nn.Module],
    stage_indices: Sequence[Sequence[int]],
    rank: int,
    device: torch.device | str | None,
    group: Any,
    masks: AttentionMaskCreator | None,
) -> Splitted:
    mine = list(stage_indices[rank])
    stages = [PipelineStage(modules[index], index, len(modules), device, group) for index in mine]
    return modules, [modules[index] for index in mine], stages, masks


def _count(stage_indices: Sequence[Sequence[int]], rank: int) -> int:
    found = sorted(index for indices in stage_indices for index in indices)
    if found != list(range(len(found))) or not found or not 0 <= rank < len(stage_indices):
        raise SplitError(
            f"stage_indices must give every stage to one rank, [(0, 2), (1, 3)] for 4 stages on 2 ranks; got "
            f"{[list(indices) for indices in stage_indices]} for rank {rank}"
        )
    return len(found)


def _check_layers(model: nn.Module, wanted: int | None) -> None:
    config = getattr(model, "config", None)
    count = wanted if wanted is not None else getattr(config, "num_hidden_layers", None)
    if count is None:
        raise SplitError("Cannot auto-detect num_layers: model.config.num_hidden_layers is missing; pass num_layers")
    skeleton = find_layout(model).skeleton
    if count != skeleton.num_layers:
        raise SplitError(f"num_layers is {count}, but {skeleton.layers} of the model has {skeleton.num_layers} layers")


def _point(name: str, point: SplitPoint | str) -> SplitPoint:
    if isinstance(point, SplitPoint):
        return point
    if str(point).lower() not in ("beginning", "end"):
        raise SplitError(f"split_spec[{name!r}] must be a SplitPoint, 'beginning' or 'end', got {point!r}")
    return SplitPoint[str(point).upper()]
