"""The front door: any model whose forward can be recorded, cut where the user says or where measurement says.

::

    pipe = split(model, images, num_stages=4)            # cuts by measured time
    pipe = pipeline(model, (images,), split_spec={"layer3": SplitPoint.BEGINNING})
    stage = pipe.get_stage_module(rank)                  # an ordinary module with the model's own names

How it goes: record the forward with whole modules as nodes (`tracer.py`), measure the nodes (`unit_costs.py`), find the
cuts (`boundaries.py`); where a module is too large to balance around, open it and record again. In the end the forward
is recorded twice, for training and for evaluation, so that `stage.train()` and `stage.eval()` do what the model's do.
"""

from __future__ import annotations

import difflib
import enum
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.building import apply_cut
from torchdistpackage.split.calls import undisturbed
from torchdistpackage.split.cutting import Cut, Wishes, closed_again, find_cut, record_as_is, report_of
from torchdistpackage.split.graph import Row
from torchdistpackage.split.marks import pipe_split
from torchdistpackage.split.pipe import Pipe
from torchdistpackage.split.signature import Example
from torchdistpackage.split.unit_costs import UnitCosts
from torchdistpackage.split.untraceable import refusals

__all__ = ["SplitPoint", "pipe_split", "pipeline", "split"]

_log = logging.getLogger(__name__)

Agree: TypeAlias = Callable[[Callable[[], Cut]], Cut]


class SplitPoint(enum.Enum):
    """Where a stage ends, seen from a module: before it or behind it.

    Example:
        >>> import torch
        >>> pipe = pipeline(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.zeros(1, 2),),
        ...                 split_spec={"1": SplitPoint.BEGINNING})
        >>> pipe.num_stages
        2
    """

    BEGINNING = 1
    END = 2


def pipeline(
    module: nn.Module,
    mb_args: tuple[Any, ...],
    mb_kwargs: Mapping[str, Any] | None = None,
    split_spec: Mapping[str, SplitPoint] | None = None,
    split_policy: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
    *,
    leaf_modules: Collection[str | type] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> Pipe:
    """Cuts a model where the user says; `torch.distributed.pipelining` has the same call.

    Cuts are at every `pipe_split()` that a forward calls, at whatever depth, and at the modules of `split_spec`.
    Marks that follow each other, and marks before the first or behind the last operation, make no empty stages.

    Args:
        module: The model; it stays as it is and can be split again.
        mb_args: Positional arguments of one micro-batch. What is no tensor becomes part of the split.
        mb_kwargs: Keyword arguments.
        split_spec: Name of a submodule -> before or behind it.
        split_policy: Gets the recorded forward as a `torch.fx.GraphModule` and returns it with calls of `pipe_split`
            inserted.
        leaf_modules: Names or classes of modules to leave whole, see `split`.
        leaf_functions: Functions to leave whole, see `split`.

    Raises:
        ValueError: Both split_spec and split_policy are given.
        SplitError: The model cannot be recorded, a name does not exist, or a cut cannot be where it is wanted.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> pipe = pipeline(model, (torch.zeros(4, 2),), split_spec={"1": SplitPoint.END})
        >>> [list(pipe.get_stage_module(i).state_dict()) for i in range(pipe.num_stages)]
        [['0.weight', '0.bias'], ['2.weight', '2.bias']]
    """
    if split_spec is not None and split_policy is not None:
        raise ValueError("pass split_spec or split_policy, not both: the policy sees the whole graph")
    names = [name for name, _ in module.named_modules() if name]
    for name in split_spec or ():
        _check_name(name, names)
    marks_at = {name: point.name.lower() for name, point in (split_spec or {}).items()}
    example = Example.of(mb_args, mb_kwargs)
    options: dict[str, Any] = {"leaf_functions": leaf_functions, "marks_at": marks_at}
    opened, closed = {_parent(name) for name in marks_at} - {""}, _leaves(module, leaf_modules)
    with refusals(module):
        while True:
            recording = record_as_is(module, example, opened, closed, **options)
            hidden = recording.hidden_marks - opened
            if not hidden:
                break
            if lost := hidden & closed:
                raise SplitError(f"{sorted(lost)[0]} calls pipe_split, but its forward cannot be recorded")
            opened |= hidden
        row = Row(recording)
        marks = row.marks if split_policy is None else _marks_of_policy(split_policy, module, row)
        for point in marks:
            if point in row.forbidden:
                raise SplitError(f"no cut can be right before {row.nodes[point].name}: {row.forbidden[point]}")
        with undisturbed([module]):
            costs = UnitCosts(module, timed=False).of(row)
        boundaries = (0, *marks, len(row.nodes))
        report = report_of(row, costs, [float(cost.flops) for cost in costs], boundaries, module, "flops")
        cut = Cut(tuple(sorted(opened)), tuple(sorted(closed)), boundaries, report)
        options["marks_at"] = {}  # from here on the cut points say it
        return apply_cut(module, example, closed_again(module, example, row, cut, options), **options)


def split(
    model: nn.Module,
    example_inputs: Any,
    num_stages: int,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    costs: Literal["time", "flops", "parameters"] | None = None,
    sizes: Sequence[int] | None = None,
    layout: str | None = None,
    together: Sequence[Sequence[str]] = (),
    stage_of: Mapping[str, int] | None = None,
    memory_limit: float | Sequence[float] | None = None,
    leaf_modules: Collection[str | type] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
    open_modules: Collection[str] = (),
    repeats: int = 3,
    tolerance: float = 0.05,
    agree: Agree | None = None,
) -> Pipe:
    """Cuts a model into stages of equal cost, wherever its forward can be cut.

    The forward is recorded on the example, the pieces are measured, and the cuts are those with the smallest load of
    the most loaded stage; where several are as good within 1 %, the one that sends the fewest bytes. Values may go
    from any stage to any later one. Batch sizes and other sizes may change from call to call.

    Args:
        model: Any module; it stays as it is and can be split again. On the meta device nothing is computed.
        example_inputs: What it is called with, of the size of a micro-batch: one tensor, or a tuple of arguments.
        num_stages: p.
        example_kwargs: Keyword arguments.
        costs: What to balance: "time" (forward and backward, measured here; default), "flops" (default on the meta
            device, and where several processes run, which would not measure alike), or "parameters".
        sizes: Nodes of each stage instead, as `pipe.report` lists them.
        layout: A layout in Megatron-LM's spelling instead, such as "Et*3|t*4|t*4L"; t is a block of the model's longest
            list.
        together: Lists of names of modules: what is between the first and the last of a list is on one stage.
        stage_of: Name of a module -> the stage that it must be on.
        memory_limit: Bytes of a stage, or one number a stage: four times its parameters, and the activations of as many
            micro-batches as 1F1B holds.
        leaf_modules: Names or classes of modules that stay whole: their Python runs as it is.
        leaf_functions: Functions that stay whole.
        open_modules: Names of modules that may be cut inside. Those that balance needs are found without.
        repeats: Measurements of each node.
        tolerance: Imbalance, as a share of the mean, below which no further modules are opened.
        agree: Makes all ranks use one rank's cut; given by `torchdistpackage.split_model`.

    Raises:
        SplitError: The model cannot be recorded (the message names module, line and what to try), no cut satisfies the
            wishes, or the example does not fit.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> pipe = split(resnet18(), torch.zeros(2, 3, 32, 32), 2, costs="flops")
        >>> [name for name, _ in pipe.get_stage_module(1).named_children()]
        ['avgpool', 'fc', 'layer2', 'layer3', 'layer4']
    """
    example = Example.of(example_inputs, example_kwargs)
    balanced = _known_costs(costs, any(parameter.is_meta for parameter in model.parameters()), agree is not None)
    wishes = Wishes(
        num_stages,
        balanced,
        sizes,
        layout,
        together,
        stage_of or {},
        memory_limit,
        open_modules,
        _leaves(model, leaf_modules),
        leaf_functions,
        repeats,
        tolerance,
    )

    def find() -> Cut:
        with refusals(model):
            return find_cut(model, example, wishes)

    cut = find() if agree is None else agree(find)
    with refusals(model):
        return apply_cut(model, example, cut, leaf_functions=leaf_functions)


def _known_costs(costs: str | None, meta: bool, agreed: bool) -> str:
    """What to balance: times only where there is time, and where all that cut go by one measurement."""
    alone = agreed or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if costs is None:
        if not alone:
            _log.info("several processes: balancing FLOPs, which are equal in all; split_model measures, for all alike")
        return "time" if alone and not meta else "flops"
    if costs not in ("time", "flops", "parameters") or (meta and costs == "time"):
        raise SplitError(
            f"costs={costs!r}: use 'time', 'flops' or 'parameters'; on the meta device nothing can be timed"
        )
    if costs == "time" and not alone:
        raise SplitError(
            "every process would measure other times and cut elsewhere: call torchdistpackage.split_model(model, "
            "example) on all ranks, where one measures for all, or pass costs='flops'"
        )
    return costs


def _leaves(model: nn.Module, leaf_modules: Collection[str | type]) -> set[str]:
    """Names of the modules to leave whole."""
    found: set[str] = set()
    names = [name for name, _ in model.named_modules() if name]
    for leaf in leaf_modules:
        if isinstance(leaf, str):
            _check_name(leaf, names)
            found.add(leaf)
        else:
            found.update(name for name, module in model.named_modules() if name and isinstance(module, leaf))
    return found


def _check_name(name: str, names: Sequence[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise SplitError(f"the model has no module {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def _marks_of_policy(policy: Callable[[fx.GraphModule], fx.GraphModule], model: nn.Module, row: Row) -> tuple[int, ...]:
    """Where a policy has put its marks into a copy of the recorded graph."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(row.recording.graph, {}))
    marked = policy(fx.GraphModule(model, graph))
    places = {node.name: index for index, node in enumerate(row.nodes)}
    marks, seen = set(), 0
    for node in marked.graph.nodes:
        if "pipe_split" in str(getattr(node.target, "__name__", node.target)):
            marks.add(seen)
        seen = max(seen, places.get(node.name, -1) + 1)
    return tuple(sorted(marks - {0, len(row.nodes)}))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
