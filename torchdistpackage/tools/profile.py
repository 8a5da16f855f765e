"""What every module of a model costs: time, and memory that autograd keeps, there and back.

::

    profile = get_model_profile(model, (images,), backward=True)       # runs the model, prints the table

    infos = register_profile_hooks(model)                              # or in a loop of your own
    loss_fn(model(images), targets).backward()
    report_prof(infos)

    get_model_profile(model, (images,), backward=True, trace="trace.json.gz")     # for ui.perfetto.dev

Times come from a stop watch at the borders of modules (`laps.py`), memory from what autograd saves (`recorder.py`), so
that both are the same on every device. What is kept is exact; workspace that an operation needs for a moment only, the
gradients and the allocator's leftovers are not in it: see `torch.cuda.max_memory_allocated` for all of it together.
What operations a module's time goes to is asked of torch.profiler (`trace.py`), in a run of its own.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, overload

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.profiler import profile as Profiler
from torch.utils._pytree import tree_map_only

from torchdistpackage.split.calls import undisturbed
from torchdistpackage.tools.module_calls import visible_modules
from torchdistpackage.tools.profile_table import ModelProfile, ModuleCost, report_prof
from torchdistpackage.tools.recorder import Recorder
from torchdistpackage.tools.trace import check_no_profiler, checked_path, operations_table, profiler_for
from torchdistpackage.tools.values import tensors_in

__all__ = ["get_model_profile", "register_profile_hooks"]

Infos = TypeVar("Infos", bound=MutableMapping[str, ModuleCost])


def get_model_profile(
    model: nn.Module,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    sort: bool = True,
    topn: int = 20,
    max_depth: int = 5,
    min_mem: float = 50,
    *,
    backward: bool = False,
    repeats: int = 3,
    trace: str | os.PathLike[str] | None = None,
    operations: bool = False,
) -> ModelProfile:
    """Runs a model and prints the time and the kept memory of its modules; shows where checkpoints pay.

    The first run counts calls and bytes and warms up, the others are timed, and medians are shown. Afterwards training
    flags, buffers, gradients, random number generators and the arguments are as before, whatever happens; hooks of
    yours do run, those on gradients included. Gradients are on or off as they are where you call it.

    The output is its own loss: every output that requires a gradient gets ones. What `torch.compile(module)` returned
    is one row; modules that were scripted, or compiled in place, are part of the row around them. A checkpointed module
    keeps what its checkpoint keeps, and its second forward counts as backward.

    Args:
        model: Is called; in the mode, train or eval, in which it is.
        args: Its positional arguments; one tensor may be given as it is.
        kwargs: Its keyword arguments.
        sort: Whether to sort by memory for time and leave out what is small; without, every module is shown.
        topn: Rows shown a level; negative for all.
        max_depth: The deepest level shown.
        min_mem: Modules that keep less than this many MB (10**6 bytes) are left out.
        backward: Whether to go back as well, for the times of that.
        repeats: Timed runs.
        trace: A file for a trace of one more run, under torch.profiler, with a range for every call of a module, named
            like it, and "NAME (backward)" on the way back: .json or .json.gz, for ui.perfetto.dev or chrome://tracing.
        operations: Whether to print the topn operations that took longest in such a run, too.

    Returns:
        The cost of every module by name, "root" for the model; `str` is the table that was printed, and its attribute
        `operations` the part about operations, None without.

    Raises:
        ValueError: repeats is less than 1; something is on the meta device or not initialised, so that nothing can be
            timed; the model was scripted, or compiled in place; trace is no name of a .json or .json.gz file.
        TypeError: args is no sequence, or kwargs is no mapping.
        OSError: trace cannot be written; the model has not run then.
        RuntimeError: trace or operations are asked for under a profiler of yours; it shows the modules anyway.

    Example:
        >>> import contextlib, io
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with contextlib.redirect_stdout(io.StringIO()):  # the times are other ones each time
        ...     profile = get_model_profile(model, torch.zeros(5, 3))
        >>> profile["0"].kept, profile["1"].kept, profile["2"].kept, profile["root"].kept
        (60, 80, 0, 140)
        >>> profile["1"].output
        80
    """
    positional, keyword = _checked(model, args, kwargs, repeats), dict(kwargs or {})
    path = None if trace is None else checked_path(trace)
    profiler = profiler_for(_tensors(model, positional, keyword)) if path is not None or operations else None
    if profiler is not None:
        check_no_profiler()
    runs: list[dict[str, ModuleCost]] = []
    with undisturbed([model], (positional, keyword)), _as_it_was(model):
        for number in range(repeats + 1):
            runs.append(_run(model, positional, keyword, backward=backward, memory=number == 0))
        if profiler is not None:
            _run(model, positional, keyword, backward=backward, memory=False, profiler=profiler)
    if profiler is not None and path is not None:
        profiler.export_chrome_trace(str(path))
    costs = {name: ModuleCost.of(module) for name, module in visible_modules(model).items()}
    costs |= {
        name: _with_medians(cost, [run[name] for run in runs[1:] if name in run]) for name, cost in runs[0].items()
    }
    found = ModelProfile(costs)
    if profiler is not None and operations:
        found.operations = operations_table(profiler, costs, topn)
    return report_prof(found, topn, max_depth, min_mem, sort)


@overload
def register_profile_hooks(model: nn.Module, infos: None = None) -> ModelProfile: ...


@overload
def register_profile_hooks(model: nn.Module, infos: Infos) -> Infos: ...


def register_profile_hooks(
    model: nn.Module, infos: MutableMapping[str, ModuleCost] | None = None
) -> MutableMapping[str, ModuleCost]:
    """Measures every pass that you run through a model from now on; `report_prof(infos)` shows the last one.

    A pass is one call of the model and the backward pass that follows it, if one does; costs are in `infos` when each
    of the two is over. After several calls before a backward pass the times back are those of the last one only.
    Counting what autograd keeps takes some microseconds a saved tensor, which adds to the times of small modules;
    `get_model_profile` counts and times in different runs.

    In a pass under a `torch.profiler.profile` of yours the modules are ranges in its trace: by their names, and as
    "NAME (backward)" on the way back.

    Args:
        model: Gets hooks, until `infos.remove()`.
        infos: Where to put the costs; a new `ModelProfile` by default. With a mapping of another kind the hooks stay.

    Returns:
        `infos`: the cost of every module by name, "root" for the model.

    Raises:
        ValueError: The model was scripted, or compiled in place.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> infos = register_profile_hooks(model)
        >>> model(torch.zeros(5, 3)).sum().backward()
        >>> infos["0"].calls, infos["0"].kept, infos["0"].backward > 0
        (1, 60, True)
        >>> infos.remove()
    """
    found = ModelProfile() if infos is None else infos
    recorder = Recorder(model, found.update)
    found.update({name: ModuleCost.of(module) for name, module in recorder.modules.items()})
    if isinstance(found, ModelProfile):
        found.on_remove(recorder.remove)
    return found


def _checked(
    model: nn.Module, args: Sequence[Any] | torch.Tensor, kwargs: Mapping[str, Any] | None, repeats: int
) -> tuple[Any, ...]:
    """The positional arguments, if all is well."""
    if isinstance(args, torch.Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"args must be a tuple of positional arguments, got {type(args).__name__}: pass (x,) for one, or "
            f"kwargs=batch for a dictionary"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping of keyword arguments, got {type(kwargs).__name__}")
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}: times are medians of that many runs")
    visible_modules(model)  # raises if it is none
    own = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in [*own, *(("an argument", tensor) for tensor in tensors_in((args, kwargs)))]:
        if is_lazy(tensor):
            raise ValueError(f"{name} is not initialised yet: run the model once, then profile it")
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where nothing is computed, so nothing can be timed: materialise the "
                f"model first, for example by model.to_empty(device='cpu')"
            )
    return tuple(args)


def _run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    backward: bool,
    memory: bool,
    profiler: Profiler | None = None,
) -> dict[str, ModuleCost]:
    """One pass with copies of the arguments, as the model may work in place; under a profiler it is not timed."""
    costs: dict[str, ModuleCost] = {}
    own_args, own_kwargs = tree_map_only(torch.Tensor, _copy, (args, kwargs))
    recorder = Recorder(model, costs.update, memory=memory, times=profiler is None)
    try:
        with profiler or nullcontext():
            output = model(*own_args, **own_kwargs)
            roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
            if backward and roots:
                torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        return costs
    except Exception as error:
        if recorder.broken_by is not None and recorder.broken_by[1] is error and hasattr(error, "add_note"):
            error.add_note(f"while get_model_profile ran module {recorder.broken_by[0]}")
        raise
    finally:
        recorder.remove()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """What a layer may change in place: no leaf, but with a gradient where the original has one."""
    return tensor.detach().requires_grad_(tensor.requires_grad).clone()


def _with_medians(cost: ModuleCost, timed: Sequence[ModuleCost]) -> ModuleCost:
    """Bytes and calls of the first run, times of the others."""
    if not timed:  # a module that runs by chance
        return cost
    return replace(
        cost,
        forward=statistics.median(run.forward for run in timed),
        forward_self=statistics.median(run.forward_self for run in timed),
        backward=statistics.median(run.backward for run in timed),
        backward_self=statistics.median(run.backward_self for run in timed),
    )


def _tensors(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """What may be on a device."""
    yield from model.parameters()
    yield from model.buffers()
    yield from tensors_in((args, kwargs))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back what `undisturbed` does not know of: gradients, and the generators of Python and numpy."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with _same_random_numbers():
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Puts back the generators of Python and of numpy, if that is installed."""
    state = random.getstate()
    try:
        import numpy as np
    except ModuleNotFoundError:
        restore = None
    else:
        restore = partial(np.random.set_state, np.random.get_state())
    try:
        yield
    finally:
        random.setstate(state)
        if restore is not None:
            restore()
