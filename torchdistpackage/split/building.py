"""From a decided cut to the stages: records the forward in both modes and makes modules of the pieces."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.calls import undisturbed
from torchdistpackage.split.cutting import Cut, matched, record_as_is
from torchdistpackage.split.graph import CutRow, Row
from torchdistpackage.split.names import tensors_of
from torchdistpackage.split.pipe import Pipe
from torchdistpackage.split.recording import Recording
from torchdistpackage.split.signature import Calling, Example, Returning
from torchdistpackage.split.traced_stage import Code, TracedStage, assemble, make_code, put
from torchdistpackage.split.untraceable import Untraceable

__all__ = ["Pieces", "alike", "apply_cut", "make_pieces"]


@dataclass(frozen=True)
class Pieces:
    """A cut model.

    Attributes:
        stages: Its stages.
        cut_rows: The cut of the forward as the model was, and of the other mode's where that is another forward.
    """

    stages: list[TracedStage]
    cut_rows: list[CutRow]


def apply_cut(model: nn.Module, example: Example, cut: Cut, **options: Any) -> Pipe:
    """Makes the stages of a cut that has been decided.

    Raises:
        Untraceable: The forward cannot be recorded.
        SplitError: The forward is not the one that was cut.
    """
    row = Row(record_as_is(model, example, cut.opened, set(cut.closed), **options))
    if cut.boundaries[-1] != len(row.nodes):
        raise SplitError(
            f"the cut is one of {cut.boundaries[-1]} nodes, and the forward has {len(row.nodes)}: is the model the "
            "same on every rank, and in the same mode?"
        )
    pieces = make_pieces(model, example, cut, row, options)
    skips = {pair for cut_row in pieces.cut_rows for pair in cut_row.skips}
    for cut_row in pieces.cut_rows:
        cut_row.row.recording.values.clear()  # the example's activations
    return Pipe(model, pieces.stages, tuple(sorted(skips)), row.recording.graph, cut.report)


def make_pieces(model: nn.Module, example: Example | None, cut: Cut, row: Row, options: Any) -> Pieces:
    """Makes the stages.

    Args:
        model: Whose stages.
        example: What it is called with.
        cut: Where it is cut.
        row: Its forward in the present mode.
        options: For `record`.
    """
    mode, main = model.training, CutRow(row, cut.boundaries)
    other = _in_other_mode(model, example, cut, row, options)
    signature, constants = inspect.signature(model.forward), dict[str, Any]()

    def code_of(cut_row: CutRow | str, stage: int) -> Code | str:
        if isinstance(cut_row, str):
            return cut_row
        recording = cut_row.row.recording
        calling = Calling(signature, recording.inputs, recording.fixed)
        return make_code(cut_row, stage, calling, Returning(recording.output, recording.literals), constants)

    stages, count = [], main.num_stages
    for stage in range(count):
        code = code_of(main, stage)
        codes = {mode: code, not mode: code if other is None else code_of(other, stage)}
        stages.append(assemble(model, stage, count, codes, constants))
    _add_other_names(model, stages)
    return Pieces(stages, [main, *([other] if isinstance(other, CutRow) else [])])


def _add_other_names(model: nn.Module, stages: list[TracedStage]) -> None:
    """A module or parameter that the model has under a second name has it in its stages, too: checkpoints say both.

    A name that some stage has is left alone: a head that is the embedding as well is the head on its stage only.
    """
    taken = {name for stage in stages for name, _ in stage.named_modules(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and path not in taken and any(True for _ in tensors_of(module)):
            for stage in stages:
                if any(other is module for other in stage.modules()):
                    put(stage, model, path, module)
    taken = {name for stage in stages for name, _ in tensors_of(stage)}
    for path, tensor in tensors_of(model):
        if path not in taken:
            for stage in stages:
                if any(other is tensor for _, other in tensors_of(stage)):
                    put(stage, model, path, tensor)


def _in_other_mode(model: nn.Module, example: Example | None, cut: Cut, row: Row, options: Any) -> CutRow | str | None:
    """The same cut of the forward in the other mode; None where the two forwards are alike, or why there is none."""
    with undisturbed([model]):
        model.train(not model.training)
        try:
            other = Row(record_as_is(model, example, cut.opened, set(cut.closed), **options, prefix="e"))
        except (Untraceable, SplitError) as error:
            mode = "training" if model.training else "evaluation"
            return f"the model was split, but not for {mode}: its forward cannot be recorded in that mode ({error})"
    if alike(row.recording, other.recording):
        return None
    return CutRow(other, matched(row, other, cut.boundaries))


def alike(a: Recording, b: Recording) -> bool:
    """Whether two recordings compute the same in the same order."""
    return (a.output, a.literals, a.fixed) == (b.output, b.literals, b.fixed) and _plain(a) == _plain(b)


def _plain(recording: Recording) -> list[Any]:
    """The nodes with numbers in the place of each other."""
    number = {node: i for i, node in enumerate(recording.graph.nodes)}

    def plain(node: fx.Node) -> Any:
        if node.op == "get_attr":
            constant = recording.constants.get(str(node.target))
            return ("attribute", node.target) if constant is None else ("constant", id(constant))
        return ("value", number[node])

    kept = [node for node in recording.graph.nodes if node.op != "get_attr"]
    return [
        (
            n.op,
            n.target if n.op.startswith("call_") else "",
            str(fx.node.map_arg(n.args, plain)),
            str(fx.node.map_arg(n.kwargs, plain)),
            n.meta.get("ambient"),
        )
        for n in kept
    ]
