"""A model that was cut: its stages as modules, and who sends what to whom.

Every stage is made of the model's own objects; nothing is copied, so that training the stages trains the model, and a
process that keeps one stage and drops model and `Pipe` holds no more than that stage.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.schedule.routing import Routed
from torchdistpackage.split.names import record_names
from torchdistpackage.split.ties import record_ties, shared_parameters
from torchdistpackage.split.traced_stage import TracedStage

__all__ = [
    "Pipe",
    "PipeInfo",
    "are_ends_expected",
    "expect_ends",
    "note_end_run",
    "put_aside",
    "put_end_in_use",
    "put_in_use",
    "stages_in_use",
    "take_ends_run",
]

_in_use: WeakKeyDictionary[nn.Module, tuple[int, int, int]] = WeakKeyDictionary()
_ends: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_ends_expected: list[bool] = []
_ends_run: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_number = count()


@dataclass(frozen=True)
class StageInUse:
    """A stage that this process has asked for.

    Attributes:
        module: The stage.
        index: Its global index.
        num_stages: How many there are.
    """

    module: nn.Module
    index: int
    num_stages: int


_Stage = TypeVar("_Stage", bound=nn.Module)


def put_in_use(stage: _Stage, index: int, num_stages: int, made: int | None = None) -> _Stage:
    """Notes that this process is going to run a stage, and returns it.

    Args:
        stage: The module.
        index: Its global index.
        num_stages: How many there are.
        made: A number that says which cut it comes from; a new one when not given. All ranks cut in the same order.
    """
    _in_use[stage] = (next(_number) if made is None else made, index, num_stages)
    return stage


def put_aside(stage: nn.Module) -> None:
    """Takes back `put_in_use`."""
    _in_use.pop(stage, None)


def stages_in_use() -> Iterator[StageInUse]:
    """The stages that this process has asked for.

    The order is the same on all ranks that do the same: `parallel/` finds here what stages of other ranks share.
    """
    for stage, (_, index, stages) in sorted(_in_use.items(), key=lambda item: item[1]):
        yield StageInUse(stage, index, stages)


def put_end_in_use(stage: nn.Module, index: int) -> None:
    """Notes a stage that was cut without knowing how many others there are, and shares parameters.

    Args:
        stage: With ties that `record_ends` wrote.
        index: 0 for the first stage of a pipeline, -1 for the last.
    """
    _ends[stage] = index


def expect_ends() -> None:
    """Says that this process may run such stages."""
    _ends_expected.append(True)


def are_ends_expected() -> bool:
    """Whether it may."""
    return bool(_ends_expected)


def note_end_run(stage: nn.Module) -> None:
    """Notes that such a stage runs now; another one is left alone."""
    if stage in _ends:
        _ends_run[stage] = _ends[stage]


def take_ends_run() -> list[tuple[nn.Module, int]]:
    """Those that ran since the last call, and their index, the first one first."""
    found = sorted(_ends_run.items(), key=lambda item: -item[1])
    _ends_run.clear()
    return found


@dataclass(frozen=True)
class PipeInfo:
    """Facts about a `Pipe`.

    Attributes:
        graph: The whole forward as it was recorded.
        num_stages: p.
        has_loss_and_backward: Always False: the loss is computed by the user's `fwd_fn`.

    Example:
        >>> from torchdistpackage.split import split
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> info = split(model, torch.zeros(3, 4), 2, costs="flops").info()
        >>> info.num_stages, [node.name for node in info.graph.nodes if node.op == "call_module"]
        (2, ['_0', '_1', '_2'])
    """

    graph: fx.Graph
    num_stages: int
    has_loss_and_backward: bool = False


@final
class Pipe:
    """A model cut into stages; made by `split` and `pipeline`.

    Calling it runs all stages here, one after the other, and returns what the model returns.

    Attributes:
        skips: The pairs of stages that are no neighbours and between which values travel.
        report: What each stage costs: `print(pipe.report)`.

    Example:
        >>> from torchdistpackage.split import split
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> pipe = split(model, torch.zeros(3, 4), 2, costs="flops")
        >>> pipe.num_stages, list(pipe.get_stage_module(1).state_dict())
        (2, ['2.weight', '2.bias'])
        >>> pipe(torch.zeros(5, 4)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        stages: list[TracedStage],
        skips: tuple[tuple[int, int], ...],
        graph: fx.Graph,
        report: Any,
    ) -> None:
        self._model, self._stages, self._graph, self._made = model, stages, graph, next(_number)
        self.skips, self.report = skips, report
        record_names(model, stages)
        record_ties(stages, range(len(stages) + 1))

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return len(self._stages)

    def get_stage_module(self, stage: int) -> TracedStage:
        """One stage; always the same object.

        Args:
            stage: Its index, from 0.

        Raises:
            SplitError: There is no such stage.
        """
        if not 0 <= stage < self.num_stages:
            raise SplitError(f"there is no stage {stage}: {self.num_stages} stages are numbered from 0")
        return put_in_use(self._stages[stage], stage, self.num_stages, self._made)

    def build_stage(
        self,
        stage: int,
        device: torch.device | str | None = None,
        group: Any = None,
        *,
        init: Callable[[nn.Module], object] | None = None,
    ) -> TracedStage:
        """One stage on its device. Of a model on the meta device only this stage gets memory.

        Args:
            stage: Its index.
            device: Where to put it; as it is when not given, and the CPU for a model on the meta device.
            group: Not used: which ranks take part is known to `tpc`. Kept for code that names it.
            init: Fills the memory of a stage that was on the meta device; gets the stage. Without it every module is
                asked for `reset_parameters`.

        Raises:
            SplitError: There is no such stage, or nobody knows how to fill some parameters or buffers.
        """
        found = self.get_stage_module(stage)
        if not any(tensor.is_meta for tensor in _tensors(found)):
            return found if device is None else found.to(device)
        left = [] if init is not None else [name for module in found.named_modules() for name in _nobody_fills(*module)]
        if left:
            raise SplitError(
                f"stage {stage} is on the meta device, and nobody knows how to fill {', '.join(left[:8])}: pass "
                "init=..., which gets the stage, or call stage.to_empty(device=...) and load_whole_model_state_dict"
            )
        found.to_empty(device=device or "cpu")
        if init is not None:
            init(found)
        else:
            for module in found.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        return found

    @property
    def replicated_params(self) -> list[dict[int, str]]:
        """For each parameter that several stages hold: stage -> its name there. Their gradients are summed."""
        found = shared_parameters(self._stages, range(self.num_stages + 1))
        result = []
        for tie in found:
            named = {}
            for stage in tie.stages:
                holders = self._stages[stage].named_parameters(remove_duplicate=False)
                named[stage] = next(name for name, parameter in holders if parameter is tie.parameter)
            result.append(named)
        return result

    def info(self) -> PipeInfo:
        """Facts for tools."""
        return PipeInfo(self._graph, self.num_stages)

    def print_readable(self) -> str:
        """Writes the code of all stages to the standard output, and returns it."""
        text = "\n".join(f"# {stage.extra_repr()}\n{stage.generated_code().strip()}\n" for stage in self._stages)
        sys.stdout.write(text)
        return text

    def train(self, mode: bool = True) -> Pipe:
        """Puts all stages into training mode."""
        for stage in self._stages:
            stage.train(mode)
        return self

    def eval(self) -> Pipe:
        """Puts all stages into evaluation mode."""
        return self.train(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all stages here, as `forward` does."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all stages here, as the model would."""
        result = self._stages[0](*args, **kwargs)
        arrived: dict[int, list[Any]] = defaultdict(list)
        for index, stage in enumerate(self._stages[1:], start=1):
            if isinstance(result, Routed):
                for target, values in result.values.items():
                    arrived[target].extend(values)
            else:
                arrived[index].extend([result] if isinstance(result, Tensor) else result)
            result = stage(*arrived.pop(index, []))
        return result

    def __repr__(self) -> str:
        skips = f", values past stages {list(self.skips)}" if self.skips else ""
        return f"Pipe({type(self._model).__name__} in {self.num_stages} stages{skips})"


def _tensors(stage: nn.Module) -> list[Tensor]:
    return [*stage.parameters(), *stage.buffers()]


def _nobody_fills(path: str, module: nn.Module) -> list[str]:
    """Names of the tensors of a module on the meta device that does not know how to fill them."""
    if hasattr(module, "reset_parameters"):
        return []
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [f"{path}.{name}".lstrip(".") for name, tensor in own if tensor.is_meta]
