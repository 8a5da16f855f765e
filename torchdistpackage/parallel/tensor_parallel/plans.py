"""Tensor parallelism of models that were written without it: which layers are sharded, and how.

A plan is torch's: `{name of a module: ParallelStyle}`, applied by `parallelize_module`. The first layer of a pair is
cut into columns, the second into rows, so that a pair needs one sum over the ranks in the forward and one in the
backward (Shoeybi et al., "Megatron-LM", 2019)::

    x --- whole on every rank --->  q k v | gate up  --- this rank's heads, columns --->  o | down  --- sum ---> x

Two kinds of models are known: decoders of transformers, which say themselves how they are cut (`_tp_plan`), and
modules of timm's vision transformers. What a plan does not name stays whole on every rank, which is always right.

Neighbours: `styles.py` has what torch's styles leave open; `clip_grad_parallel.py` counts what is whole once.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any, final

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.tensor_parallel.group import tensor_mesh
from torchdistpackage.parallel.tensor_parallel.styles import FreshRowwise, FusedColwise, SharedColwise, WholeOnShards
from torchdistpackage.topology import tpc

__all__ = ["apply_tensor_parallel", "tensor_parallel_plan"]

_logger = logging.getLogger(__name__)


def apply_tensor_parallel(
    module: nn.Module,
    plan: Mapping[str, ParallelStyle] | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> nn.Module:
    """Shards the layers of a model, or of a pipeline stage, over the tensor group. Collective over that group.

    Its parameters become DTensors of the whole shape, under the same names; every rank starts from the values of the
    group's first rank. Inputs and outputs of the module are whole, on every rank the same. Apply it before
    `fully_shard`, `NaiveDDP` and the optimizer.

    Dropout inside of a sharded pair draws for each rank's own part. Random numbers outside of it must be equal on the
    ranks of the group: seed them alike.

    Args:
        module: The model or stage, with whole parameters; on the meta device, too.
        plan: `{name of a module: style}` as for torch's `parallelize_module`; None for `tensor_parallel_plan(module)`.
        group: The tensor group or a mesh of one dimension; None for that of `tpc`.

    Returns:
        The module itself.

    Raises:
        SplitError: Nothing of it can be sharded, or heads or columns do not divide by the ranks.
        TopologyError: Process groups have not been set up.

    Example:
        >>> from torch.distributed.tensor.parallel import RowwiseParallel
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> _ = apply_tensor_parallel(model, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        >>> model[0].weight.shape  # of the whole layer, also where two ranks have half of it
        torch.Size([32, 8])
    """
    mesh = tensor_mesh(group)
    chosen = dict(tensor_parallel_plan(module, group=mesh) if plan is None else plan)
    _check_plan(module, chosen, given=plan is not None)
    already = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    if already:
        raise SplitError(
            f"{already[0]} of {type(module).__name__} is a DTensor already; apply tensor parallelism once, and before "
            "fully_shard"
        )
    if mesh.size() > 1:
        parallelize_module(module, mesh, chosen)
        _share_values(module, mesh)
        whole = sum(p.numel() for p in module.parameters() if not isinstance(p, DTensor))
        total = sum(p.numel() for p in module.parameters())
        _logger.info(
            "tensor parallelism over %d ranks: %d modules of %s; %d of %d parameters stay whole on every rank",
            mesh.size(),
            len(chosen),
            type(module).__name__,
            whole,
            total,
        )
    return module


def tensor_parallel_plan(
    module: nn.Module, *, group: dist.ProcessGroup | DeviceMesh | None = None
) -> dict[str, ParallelStyle]:
    """How the layers of this model, or of this stage, would be sharded. Change it and pass it on, or look at it.

    Args:
        module: A decoder of transformers or a part of one, or anything made of timm's attention and MLP modules.
        group: The tensor group or a mesh of one dimension; None for that of `tpc`.

    Returns:
        Name of a module -> its style.

    Raises:
        SplitError: It knows none of the model's layers (a stage of a pipeline may have none), or heads or columns do
            not divide by the ranks.

    Example:
        >>> from timm.models.vision_transformer import Block
        >>> for name, style in tensor_parallel_plan(nn.Sequential(Block(16, num_heads=4))).items():
        ...     print(name, style)  # on one rank; LocalHeads(2 of 4) on each of two
        0.attn LocalHeads(4 of 4)
        0.mlp.fc1 ColwiseParallel(...)
        0.mlp.fc2 FreshRowwise(...)
    """
    size = tensor_mesh(group).size()
    plan = {**_transformers_plan(module, size), **_timm_plan(module, size)}
    if not plan and not tpc.is_mode_inited("pipe"):  # a stage of a pipeline may have none of the layers
        kinds = sorted({type(inner).__name__ for inner in module.modules() if not list(inner.children())})
        raise SplitError(
            f"no layer of {type(module).__name__} is known to tensor_parallel_plan (it has {', '.join(kinds[:8])}); "
            "pass plan={name: ColwiseParallel() or RowwiseParallel(), ...} from torch.distributed.tensor.parallel, or "
            "build the model of ParallelBlock, TpMlp and TpAttention"
        )
    return plan


def _share_values(module: nn.Module, mesh: DeviceMesh) -> None:
    """Gives what stays whole the values of the group's first rank, as `parallelize_module` does for what it shards."""
    group = mesh.get_group()
    first = dist.get_global_rank(group, 0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if not isinstance(tensor, DTensor) and not tensor.is_meta:
            values = tensor.detach().contiguous()
            dist.broadcast(values, first, group=group)
            tensor.detach().copy_(values)


def _check_plan(module: nn.Module, plan: Mapping[str, ParallelStyle], *, given: bool) -> None:
    names = [name.split(".") for name, _ in module.named_modules()]
    missing = [
        pattern
        for pattern in plan
        if not any(
            len(name) == len(pattern.split(".")) and all(map(fnmatch, name, pattern.split("."))) for name in names
        )
    ]
    if missing or (given and not plan):
        what = f"names {', '.join(missing)}, which {type(module).__name__} does not have" if missing else "is empty"
        raise SplitError(f"the plan {what}; names are those of named_modules(), with * for any one word")
    wrong = {name: style for name, style in plan.items() if not isinstance(style, ParallelStyle)}
    if wrong:
        name, style = next(iter(wrong.items()))
        raise SplitError(
            f"the plan has {style!r} for {name}; pass a style of torch.distributed.tensor.parallel, such as "
            "ColwiseParallel() or RowwiseParallel()"
        )


# --- transformers: the authors' own plan ------------------------------------------------------------------------------


def _declared(module: nn.Module) -> dict[str, str] | None:
    found = getattr(module, "_tp_plan", None)
    return dict(found) if isinstance(found, Mapping) else None


def _transformers_plan(module: nn.Module, size: int) -> dict[str, ParallelStyle]:
    """The plan that the model's class declares, for the modules that are here.

    A module with one layer whose style is not known (experts, latent attention) stays whole with all of its layers; so
    does one with a parameter between columns and rows that the plan does not name: its gradient would be a part.
    """
    declared = _declared(module)
    if declared is None:
        return {}
    patterns = [(re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in declared.items()]
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for name, _ in [*module.named_modules(), *module.named_parameters()]:
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if style is not None:
            families[name.rpartition(".")[0]][name] = style
    plan: dict[str, ParallelStyle] = {}
    modules = dict(module.named_modules())
    tied = _tied(module)
    for parent, styles in families.items():
        layers = {name: modules.get(name) for name in styles}
        if not all(style in _STYLES and _takes(layers[name], style) for name, style in styles.items()):
            continue
        if "colwise" in styles.values() and not _stays_in_columns(styles, parent, module):
            continue
        columns = SharedColwise()
        for name, style in styles.items():
            if any(id(parameter) in tied for parameter in modules[name].parameters()):
                continue  # its other copy, perhaps on another rank, has to stay equal to it
            _check_division(name, modules[name], modules[parent], style, size)
            plan[name] = columns if style == "colwise" else _STYLES[style]()
    return plan


_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": SharedColwise,
    "rowwise": FreshRowwise,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: FreshRowwise(input_layouts=Replicate()),
    "rowwise_rep": lambda: FreshRowwise(input_layouts=Replicate()),
    "embedding_rowwise": lambda: FreshRowwise(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": WholeOnShards,
}


def _takes(layer: nn.Module | None, style: str) -> bool:
    if style == "replicated_with_grad_allreduce":
        return layer is not None
    kind = nn.Embedding if style.startswith("embedding") else nn.Linear
    return isinstance(layer, kind) and not list(layer.children())  # an adapter around one is not known


def _stays_in_columns(names: Mapping[str, str], parent: str, module: nn.Module) -> bool:
    """Whether nothing between the columns and the rows looks at all columns, or has parameters of its own."""
    owner: Any = module.get_submodule(parent)
    if getattr(owner, "activation_sparsity", 0):  # a threshold from the mean over all columns
        return False
    inner = (f"{parent}.{name}".lstrip(".") for name, _ in owner.named_parameters())
    return all(any(parameter.startswith(f"{name}.") for name in names) for parameter in inner)


def _tied(module: nn.Module) -> set[int]:
    """The ids of embedding and head weights that are one parameter in the whole model."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "tie_word_embeddings", False):
        return set()
    ends = [getattr(module, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    return {id(parameter) for end in ends if end is not None for parameter in end.parameters()}


def _check_division(name: str, layer: nn.Module, parent: nn.Module, style: str, size: int) -> None:
    if not isinstance(layer, nn.Linear) or style not in ("colwise", "rowwise"):
        return
    width = layer.out_features if style == "colwise" else layer.in_features
    head = getattr(parent, "head_dim", None) if "attn" in name or "attention" in name else None
    what, amount = (
        ("heads", width // head) if isinstance(head, int) and head and width % head == 0 else ("columns", width)
    )
    if amount % size:
        raise SplitError(
            f"{name} has {amount} {what}, which do not divide by {size} ranks of the tensor group; choose a size that "
            f"divides {amount}, or pass a plan without this layer and its neighbours"
        )


# --- timm: vision transformers ---------------------------------------------------------------------------------------


@final
class LocalHeads(ParallelStyle):
    """This rank's heads of timm's `Attention`: q, k and v in one layer, a forward that counts heads by an attribute."""

    def __init__(self, heads: int, local: int) -> None:
        super().__init__()
        self.heads, self.local = heads, local

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        plan: dict[str, ParallelStyle] = {"qkv": FusedColwise(3), "proj": FreshRowwise()}
        for name in ("q_norm", "k_norm"):
            if list(getattr(module, name).parameters()):
                plan[name] = WholeOnShards()
        if getattr(module, "gate", None) is not None:
            plan["gate"] = ColwiseParallel()
        parallelize_module(module, device_mesh, plan)
        module.num_heads = self.local
        if hasattr(module, "attn_dim"):
            module.attn_dim = self.local * module.head_dim
        return module  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"LocalHeads({self.local} of {self.heads})"


def _timm_plan(module: nn.Module, size: int) -> dict[str, ParallelStyle]:
    layers = sys.modules.get("timm.layers")  # whoever has such modules has loaded it
    if layers is None:
        return {}
    plan: dict[str, ParallelStyle] = {}
    for name, inner in module.named_modules():
        kind = type(inner)
        if kind in _attentions(layers) and isinstance(inner.norm, nn.Identity):
            plan[name] = LocalHeads(inner.num_heads, _share(f"{name} has {{}} heads", inner.num_heads, size))
        elif kind in (layers.Mlp, layers.GluMlp) and isinstance(inner.fc1, nn.Linear):
            if not isinstance(inner.norm, nn.Identity):
                continue
            _share(f"{name} has {{}} columns", inner.fc2.in_features, size)
            plan[f"{name}.fc1"] = ColwiseParallel() if kind is layers.Mlp else FusedColwise(2)
            plan[f"{name}.fc2"] = FreshRowwise()
        elif kind is layers.SwiGLU and isinstance(inner.norm, nn.Identity):
            _share(f"{name} has {{}} columns", inner.fc2.in_features, size)
            plan[f"{name}.fc1_g"] = plan[f"{name}.fc1_x"] = SharedColwise()
            plan[f"{name}.fc2"] = FreshRowwise()
    return plan


def _attentions(layers: Any) -> tuple[type, ...]:
    """Timm's plain attention, under the names that it had over time."""
    vision = sys.modules.get("timm.models.vision_transformer")
    found = (getattr(layers, "Attention", None), getattr(vision, "Attention", None))
    return tuple(kind for kind in found if isinstance(kind, type))


def _share(text: str, amount: int, size: int) -> int:
    if amount % size:
        raise SplitError(
            f"{text.format(amount)}, which do not divide by {size} ranks of the tensor group; choose a tensor size "
            f"that divides {amount}, or pass a plan without this module"
        )
    return amount // size
