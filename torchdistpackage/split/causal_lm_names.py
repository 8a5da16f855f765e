"""Which modules of a decoder go to which stage, by name; and how many stages there are to be.

Pure arithmetic and strings: no model is looked at, so that a split can be written into a configuration file, printed
and changed by hand before any weight is loaded::

    generate_hf_model_fqn_per_model_part(2, 3)      stage 0   model.embed_tokens  model.layers.0  model.layers.1
                                                    stage 1   model.layers.2  model.norm  lm_head

Function names, arguments and numbers are those of NVIDIA NeMo AutoModel's pipelining functions, whose configurations
therefore work as they are. Neighbours: `causal_lm.py` cuts a model by such lists, `boundaries.py` distributes layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchdistpackage.errors import SplitError
from torchdistpackage.schedule import Placement
from torchdistpackage.split.boundaries import uniform_sizes

__all__ = [
    "MULTIMODAL_SUFFIXES",
    "calculate_virtual_stages",
    "generate_hf_model_fqn_per_model_part",
    "stage_ids_this_rank",
]

MULTIMODAL_SUFFIXES = (
    "vision_tower",
    "visual",
    "image_encoder",
    "vision_encoder",
    "audio_tower",
    "audio_encoder",
    "audio_model",
    "mm_projector",
    "multi_modal_projector",
    "multimodal_projector",
    "vision_projector",
    "audio_projector",
)
"""What encoders beside the decoder are called in the models at hand; they feed the first stage."""


class _StageIdsError(SplitError, AssertionError):
    """Stages that cannot be dealt out; an AssertionError, too, because callers of this API catch that."""


def stage_ids_this_rank(pp_rank: int, pp_size: int, num_stages: int, style: str = "loop") -> tuple[int, ...]:
    """The stages of one rank.

    Args:
        pp_rank: The rank in its pipeline.
        pp_size: Ranks of the pipeline.
        num_stages: Stages of the model, a multiple of `pp_size`.
        style: `"loop"`, or `"v"` for two stages a rank that run there and back.

    Returns:
        Global indices, in the order of the model.

    Raises:
        SplitError: The stages cannot be dealt out so; an AssertionError as well.

    Example:
        >>> stage_ids_this_rank(1, 4, 8), stage_ids_this_rank(1, 4, 8, "v")
        ((1, 5), (1, 6))
    """
    if style not in ("loop", "v"):
        raise _StageIdsError(f"style must be 'loop' or 'v', got {style!r}")
    if not 0 <= pp_rank < pp_size:
        raise _StageIdsError(f"there is no rank {pp_rank} in a pipeline of {pp_size} rank(s)")
    per_rank, left_over = divmod(num_stages, pp_size)
    if left_over or per_rank < 1:
        raise _StageIdsError(f"num_stages {num_stages} must be a multiple of pp_size {pp_size}")
    if style == "v" and per_rank != 2:
        raise _StageIdsError(
            f"a v has 2 stages a rank, but {num_stages} stages on {pp_size} ranks are {per_rank}; use "
            f"{2 * pp_size} stages"
        )
    place = Placement.v if style == "v" else Placement.loop
    return place(pp_size, per_rank).local_stages(pp_rank)


def generate_hf_model_fqn_per_model_part(
    num_stages: int,
    num_layers: int,
    include_embeddings: bool = True,
    include_lm_head: bool = True,
    include_rotary_emb: bool = True,
    fqn_prefix: str = "model.",
    include_multimodal_encoders: bool = True,
    extra_module_fqns: Sequence[str] | None = None,
    lm_head_fqn: str = "lm_head",
) -> list[list[str]]:
    """Module names of every stage of a decoder whose parts are called as Llama's are.

    Layers are spread evenly; what is left over goes to the first stages. The lists may name modules that a model does
    not have: encoders, and a rotary embedding. What they name twice, the rotary embedding, has no parameters.

    Args:
        num_stages: Stages to fill.
        num_layers: Decoder layers.
        include_embeddings: Name the token embedding, on the first stage.
        include_lm_head: Name the head, on the last stage.
        include_rotary_emb: Name the rotary embedding, on every stage.
        fqn_prefix: Where the decoder sits in the model, with its dot.
        include_multimodal_encoders: Name encoders beside the decoder, on the first stage.
        extra_module_fqns: Full names of more modules for the first stage.
        lm_head_fqn: The head's full name.

    Returns:
        One list of full names a stage.

    Raises:
        SplitError: There is no stage, or there are fewer layers than stages.

    Example:
        >>> for names in generate_hf_model_fqn_per_model_part(
        ...     2, 3, include_rotary_emb=False, include_multimodal_encoders=False
        ... ):
        ...     print(names)
        ['model.embed_tokens', 'model.layers.0', 'model.layers.1']
        ['model.layers.2', 'model.norm', 'lm_head']
    """
    if num_stages < 1:
        raise SplitError(f"Number of stages must be at least 1, got {num_stages}")
    if num_stages > num_layers:
        raise SplitError(
            f"Number of stages ({num_stages}) cannot exceed number of layers ({num_layers}); use fewer ranks or chunks"
        )
    first = [f"{fqn_prefix}embed_tokens"] if include_embeddings else []
    if include_multimodal_encoders:
        first += [f"{fqn_prefix}{suffix}" for suffix in MULTIMODAL_SUFFIXES]
    first += extra_module_fqns or ()
    layers = (f"{fqn_prefix}layers.{number}" for number in range(num_layers))
    sizes = sorted(uniform_sizes(num_layers, num_stages), reverse=True)
    stages = [[next(layers) for _ in range(size)] for size in sizes]
    stages[0] = first + stages[0]
    stages[-1] += [f"{fqn_prefix}norm", *([lm_head_fqn] if include_lm_head else [])]
    if include_rotary_emb:
        for names in stages:
            names.append(f"{fqn_prefix}rotary_emb")
    return stages


def calculate_virtual_stages(
    num_layers: int,
    layers_per_stage: int | None,
    pp_size: int,
    is_single_stage_schedule: bool,
    round_to_pp_multiple: str | None = None,
) -> tuple[int, int]:
    """How many stages a model is cut into, and how many of them a rank has.

    Args:
        num_layers: Layers of the model.
        layers_per_stage: The most layers of a stage; None for one stage a rank, or two under a schedule of several.
        pp_size: Ranks of the pipeline.
        is_single_stage_schedule: Whether the schedule runs exactly one stage a rank.
        round_to_pp_multiple: `"up"` or `"down"` to the next multiple of `pp_size`; None to refuse anything else.

    Returns:
        Stages in all, stages a rank.

    Raises:
        SplitError: The stages are no multiple of the ranks, or not as many a rank as the schedule runs.

    Example:
        >>> calculate_virtual_stages(32, 8, 4, is_single_stage_schedule=True)
        (4, 1)
        >>> calculate_virtual_stages(32, 3, 4, is_single_stage_schedule=False, round_to_pp_multiple="down")
        (8, 2)
    """
    if pp_size < 1:
        raise SplitError(f"pp_size must be at least 1, got {pp_size}")
    if layers_per_stage is None:
        per_rank = 1 if is_single_stage_schedule else 2
        return pp_size * per_rank, per_rank
    if layers_per_stage < 1:
        raise SplitError(f"layers_per_stage must be at least 1, got {layers_per_stage}")
    if round_to_pp_multiple not in (None, "up", "down"):
        raise SplitError(f"Invalid value for round_to_pp_multiple: {round_to_pp_multiple!r}; use 'up', 'down' or None")
    needed = -(-num_layers // layers_per_stage)
    found = f"{num_layers} layers with at most {layers_per_stage} a stage need {needed} stages"
    per_rank, left_over = divmod(needed, pp_size)
    if left_over and round_to_pp_multiple is None:
        raise SplitError(
            f"{found}, and their number must be divisible by the {pp_size} ranks of the pipeline; change "
            "layers_per_stage, or pass round_to_pp_multiple='up' or 'down'"
        )
    per_rank += bool(left_over) and round_to_pp_multiple == "up"
    if per_rank < 1:
        raise SplitError(
            f"{found}, which rounded down to a multiple of {pp_size} ranks is none at all; round 'up', or take a "
            f"layers_per_stage of at most {max(1, num_layers // pp_size)}"
        )
    if is_single_stage_schedule and per_rank != 1:
        raise SplitError(
            f"Single stage schedule requires exactly 1 stage a rank, but {found}: {per_rank} on each of {pp_size} "
            f"ranks; take layers_per_stage={-(-num_layers // pp_size)}, or a schedule for several stages a rank"
        )
    if not is_single_stage_schedule and per_rank < 2:
        raise SplitError(
            f"Multi-stage schedule requires at least 2 stages a rank, but {found}: {per_rank} on each of {pp_size} "
            f"ranks; take layers_per_stage={max(1, -(-num_layers // (2 * pp_size)))}, or a schedule like '1f1b'"
        )
    return per_rank * pp_size, per_rank
