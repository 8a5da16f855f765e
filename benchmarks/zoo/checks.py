"""What is asked of a model that was cut: the numbers of the model in one piece, its names, and stages of equal cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from running import opened, over_the_runtime, plain, tensors_of
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from torchdistpackage.split import Pipe, split

__all__ = ["Reference", "Row", "Wrong", "check"]

TOLERANCE = 1e-5  # of the largest number: sums of the same terms in another order are not bitwise the same


class Wrong(Exception):
    """The stages do not compute what the model computes."""


@dataclass(frozen=True)
class Row:
    """A line of the table; `reason` is empty where everything is right."""

    family: str
    model: str
    stages: int
    passed: bool
    balance: float | None = None
    optimum: float | None = None
    seconds: float | None = None
    skips: int | None = None
    training_error: float | None = None
    evaluation_error: float | None = None
    unused: str = ""
    aliases: str = ""
    input: str = ""
    parameters: int | None = None
    reason: str = ""

    def as_text(self) -> dict[str, str]:
        """For a file."""
        return {
            name: "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Result:
    """Of one training step, and where it left the buffers."""

    loss: float
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Names:
    """Keys of the model's state_dict that no stage has.

    Attributes:
        unused: Of what the forward does not use.
        aliases: Second names of what a stage has under another one.
    """

    unused: list[str]
    aliases: list[str]


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts running statistics back, so that the next run begins where this one began; tables made anew, too."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, content in kept:
                buffer.copy_(content)
                module._buffers[name] = buffer


def trained(model: nn.Module, step: Callable[[], float]) -> Result:
    """What a step leaves in the model's parameters and buffers."""
    model.zero_grad()
    with buffers_kept(model):
        loss = step()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()  # sets them to None: those in hand stay
    return Result(loss, gradients, buffers)


def difference(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number; nan if there is one anywhere."""
    worst, scale = torch.zeros(()), torch.zeros(())
    for a, b in zip(mine, theirs, strict=True):
        if b.numel():
            gap = torch.where(a == b, 0, a - b).abs()  # infinity, a bound that clips nothing, is equal to itself
            worst = torch.maximum(worst, gap.max())
            scale = torch.maximum(scale, b.abs().where(b.isfinite(), 0).max())
    return float(worst / scale) if scale else float(worst)


class Reference:
    """A model in one piece, with what it computes: made once, compared with every cut.

    Args:
        model: The model.
        shape: Of one row of its input.
        rows: Of a training batch.
        schedule: How the stages are trained; "" for one after the other, here, without messages.
    """

    def __init__(self, model: nn.Module, shape: Sequence[int], rows: int, schedule: str) -> None:
        torch.manual_seed(0)
        self._schedule, self._microbatches = schedule, 2 if schedule else 1
        self.model, self.batch, self.other = model, torch.randn(rows, *shape), torch.randn(rows - 1, *shape)
        for parameter in model.parameters():  # zeros would hide what is behind them: their gradients are zeros, too
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        model.train()
        self.training = trained(model, lambda: plain(model, self.batch, self._microbatches))
        self.output = self._evaluated(model)

    def step(self, pipe: Pipe) -> float:
        """Trains the stages once."""
        if self._schedule:
            return over_the_runtime(pipe, self.batch, self._microbatches, self._schedule)
        return plain(pipe, self.batch, self._microbatches)

    def _evaluated(self, run: Any) -> Any:
        run.eval()
        with torch.no_grad():
            output = run(self.other)
        run.train()
        return output

    def training_error(self, pipe: Pipe) -> float:
        """Of loss, gradients and running statistics.

        Raises:
            Wrong: A gradient is there that should not be, or the other way round.
        """
        found, wanted = trained(self.model, lambda: self.step(pipe)), self.training
        for name, gradient in wanted.gradients.items():
            if (gradient is None) != (found.gradients[name] is None):
                raise Wrong(f"{name} has {'a' if gradient is None else 'no'} gradient, unlike in the model")
        mine, theirs = ([g for g in run.gradients.values() if g is not None] for run in (found, wanted))
        ours, same = ([b for b in run.buffers.values() if b.is_floating_point()] for run in (found, wanted))
        loss = abs(found.loss - wanted.loss) / abs(wanted.loss)
        return float(torch.tensor([loss, difference(mine, theirs), difference(ours, same)]).max())

    def evaluation_error(self, pipe: Pipe) -> float:
        """Of the output on a batch of another size.

        Raises:
            Wrong: It has another structure.
        """
        mine = self._evaluated(pipe)
        form, wanted = (str(tree_structure(opened(output))) for output in (mine, self.output))
        if type(mine) is not type(self.output) or form != wanted:
            raise Wrong(f"in evaluation the stages return {form[:200]}, the model {wanted[:200]}")
        return difference(tensors_of(mine), tensors_of(self.output))

    def names(self, pipe: Pipe) -> Names:
        """Compares the names of all stages with the model's.

        Raises:
            Wrong: A stage has a name that the model does not have, or a parameter with a gradient is on no stage.
        """
        held = [pipe.get_stage_module(stage).state_dict(keep_vars=True) for stage in range(pipe.num_stages)]
        keys, objects = {key for state in held for key in state}, {id(t) for state in held for t in state.values()}
        wanted = self.model.state_dict(keep_vars=True)
        if foreign := sorted(keys - set(wanted)):
            raise Wrong(f"the stages have {foreign[0]}, which the model does not have")
        missing = sorted(set(wanted) - keys)
        aliases = [name for name in missing if id(wanted[name]) in objects]
        unused = [name for name in missing if name not in aliases]
        for name in unused:
            if self.training.gradients.get(name) is not None:
                raise Wrong(f"no stage has {name}")
        return Names(unused, aliases)


def check(reference: Reference, family: str, name: str, stages: int, costs: str) -> Row:
    """Splits the model and compares.

    Args:
        reference: The model in one piece.
        family: For the row.
        name: For the row.
        stages: How many.
        costs: What is balanced, see `split`.
    """
    size = "x".join(map(str, reference.batch.shape))
    count = sum(parameter.numel() for parameter in reference.model.parameters())
    facts: dict[str, Any] = {"family": family, "model": name, "stages": stages, "input": size, "parameters": count}
    try:
        began = time.perf_counter()
        pipe = split(reference.model, reference.batch, stages, costs=costs, repeats=1)  # type: ignore[arg-type]
        facts["seconds"] = time.perf_counter() - began
        loads = [row.load for row in pipe.report.rows]
        mean = sum(loads) / len(loads)
        best = pipe.report.optimum
        facts |= {"balance": max(loads) / mean, "optimum": None if best is None else best / mean}
        names = reference.names(pipe)
        facts |= {"skips": len(pipe.skips), "unused": " ".join(names.unused), "aliases": " ".join(names.aliases)}
        facts["training_error"] = reference.training_error(pipe)
        facts["evaluation_error"] = reference.evaluation_error(pipe)
        for what in ("training_error", "evaluation_error"):
            if not facts[what] <= TOLERANCE:
                raise Wrong(f"{what.replace('_', ' ')} {facts[what]:.2g}")
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(**facts, passed=False, reason=reason[:500])
    return Row(**facts, passed=True)
