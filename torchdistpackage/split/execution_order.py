"""The layers of a model in the order in which they run, found by tracing: `flatten_model(model)` without a list.

A row of layers passes one value from each layer to the next. Where several values are under way (a residual, a skip
connection, a size that is needed later), everything up to the place where there is one again becomes one layer::

    x ---- conv1 ---- bn1 ---- block ---- a ----+---- add ---- head
                                     |          |
                                     +--- b ----+
    layers  conv1      bn1      block   [a, b, add]             head
"""

from __future__ import annotations

from torch import fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.building import make_pieces
from torchdistpackage.split.cutting import Cut, closed_again, record_as_is
from torchdistpackage.split.graph import CutRow, Row
from torchdistpackage.split.report import SplitReport
from torchdistpackage.split.signature import Example

__all__ = ["traced_layers"]


def traced_layers(model: nn.Module, example: Example | None) -> list[nn.Module]:
    """The layers; the model's own modules wherever one of them is all that a layer does.

    Args:
        model: Takes one tensor, returns anything.
        example: What it is called with; without one, Python in the forward must not look at sizes.

    Raises:
        Untraceable: The forward cannot be recorded.
        SplitError: The forward takes several values, or differs too much between training and evaluation.
    """
    closed, opened = set[str](), _containers(model)
    row = Row(record_as_is(model, example, opened, closed))
    inputs = sum(node.op == "placeholder" for node in row.recording.graph.nodes)
    if inputs != 1:
        raise SplitError(
            f"a row of layers takes one value, and {type(model).__name__} takes {inputs}; use split(), whose stages "
            "take what they need"
        )
    narrow = [point for point in range(1, len(row.nodes)) if row.crossing[point] == 1 and point not in row.forbidden]
    kept = tuple(sorted(opened - closed))
    cut = Cut(kept, tuple(sorted(closed)), (0, *narrow, len(row.nodes)), SplitReport((), "layers"))
    cut = closed_again(model, example, row, cut, {})
    row = Row(record_as_is(model, example, cut.opened, set(cut.closed)))
    pieces = make_pieces(model, example, cut, row, {})
    for cut_row in pieces.cut_rows:
        if cut_row.skips or any(
            len({f.value for f in cut_row.flows if f.target == s}) != 1 for s in range(1, cut_row.num_stages)
        ):
            raise SplitError(
                f"the layers of {type(model).__name__} differ between training and evaluation; list them by hand, or "
                "use split(), which keeps both"
            )
    alone = [_module_alone(cut_row, stage) for cut_row in pieces.cut_rows[:1] for stage in range(cut_row.num_stages)]
    for cut_row in pieces.cut_rows[1:]:
        other = [_module_alone(cut_row, stage) for stage in range(cut_row.num_stages)]
        alone = [name if name == theirs else None for name, theirs in zip(alone, other, strict=True)]
    found: list[nn.Module] = []
    for name, piece in zip(alone, pieces.stages, strict=True):
        found.append(piece if name is None else model.get_submodule(name))
    return found


def _containers(model: nn.Module) -> set[str]:
    """Names of the modules that hold a list of modules of the user's own: what a deep model is made of."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

    def holds_blocks(module: nn.Module) -> bool:
        rows = [child for child in module.children() if isinstance(child, lists)]
        return any(sum(not type(m).__module__.startswith("torch.nn") for m in row.children()) > 1 for row in rows)

    return {name for name, module in model.named_modules() if name and holds_blocks(module)}


def _module_alone(cut_row: CutRow, stage: int) -> str | None:
    """The name of the module whose call is all that a stage does."""
    nodes = cut_row.nodes_of(stage)
    if len(nodes) != 1 or nodes[0].op != "call_module" or "ambient" in nodes[0].meta:
        return None
    node = nodes[0]
    plain = len(node.args) == 1 and isinstance(node.args[0], fx.Node) and not node.kwargs
    last = stage == cut_row.num_stages - 1
    whole = not last or (cut_row.row.results == (node,) and cut_row.row.recording.output.is_leaf())
    return str(node.target) if plain and whole else None
