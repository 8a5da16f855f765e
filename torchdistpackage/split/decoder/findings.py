"""What a dry run has seen, and what follows: what is sent, and what cannot be cut.

Every output of a layer or unit was a fresh leaf of autograd, so "depends on" is a question to autograd:

- the layers must be called one after the other, each once, and nothing with parameters between them;
- a layer's hidden state must come from the layer before it alone, and the logits from the last layer alone;
- another argument of a layer that comes from weights travels: all the way, when the prologue made it (the embeddings
  that every layer looks at again), to the next layer only, when the layer before returned it;
- what anything else made of the outputs of earlier layers cannot be had on a later stage.

A family that does otherwise is refused in words: a wrong number would be worse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.layout import ArgumentKey, DecoderLayout, Skeleton, hidden_key

__all__ = ["ROWS", "TOKENS", "Call", "Findings", "conclude"]

ROWS, TOKENS = 3, 7
"""The size of the dry run's batch: two numbers that no other dimension is likely to have, one after the other."""

_TRACE = "cut it with torchdistpackage.split_model, by tracing"


@dataclass(frozen=True)
class Call:
    """One call of a unit or a layer.

    Attributes:
        name: Of the module.
        place: In the list of layers; None for a unit.
        args: As it was called.
        kwargs: As it was called.
    """

    name: str
    place: int | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden state among the arguments.

        Raises:
            SplitError: What stands in its place is no tensor.
        """
        key = hidden_key(self.args, self.kwargs)
        found = self.args[key] if isinstance(key, int) else self.kwargs[key]
        if not isinstance(found, Tensor):
            raise SplitError(f"{self.name} is called with a {type(found).__name__} in the place of a hidden state")
        return found

    def others(self) -> Iterator[tuple[ArgumentKey, Any]]:
        """The other arguments."""
        key = hidden_key(self.args, self.kwargs)
        arguments: list[tuple[ArgumentKey, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return ((name, value) for name, value in arguments if name != key)


@dataclass
class Findings:
    """What the run leaves behind.

    Attributes:
        calls: In order.
        leaves: Who returned it, leaf of autograd.
        made: id -> who returned it, the tensor, kept so that ids stay theirs.
        returns: Place -> form of what a layer returns.
        shared: Arguments that are mappings into which layers write.
    """

    calls: list[Call] = field(default_factory=list)
    leaves: list[tuple[str, Tensor]] = field(default_factory=list)
    made: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    returns: dict[int, Any] = field(default_factory=dict)
    shared: set[ArgumentKey] = field(default_factory=set)

    def sources(self, tensor: Tensor) -> tuple[str, ...]:
        """The units and layers whose outputs a tensor was made of."""
        if id(tensor) in self.made:
            return (self.made[id(tensor)][0],)
        if not tensor.requires_grad:
            return ()
        leaves = [leaf for _, leaf in self.leaves]
        found = torch.autograd.grad(tensor.sum(), leaves, allow_unused=True, retain_graph=True)
        used = [unit for (unit, _), gradient in zip(self.leaves, found, strict=True) if gradient is not None]
        return tuple(dict.fromkeys(used))


def conclude(twin: nn.Module, skeleton: Skeleton, seen: Findings, logits: Tensor, reads_ids: bool) -> DecoderLayout:
    """The layout that follows from a dry run.

    Raises:
        SplitError: The forward is not a prologue, a row of layers and an epilogue.
    """
    name = type(twin).__name__
    weighty = {unit for unit in skeleton.units if next(twin.get_submodule(unit).parameters(), None) is not None}
    before, row = _order(name, skeleton, seen, weighty)
    names = [call.name for call in row]
    _check_flow(name, skeleton, seen, row, logits)
    carried, chained = _travelling(name, seen, before, row)
    idle = weighty - {call.name for call in seen.calls}
    rows_at = tuple(_rows_at(call.hidden) for call in row)
    return DecoderLayout(
        skeleton=skeleton,
        prologue=tuple(unit for unit in before if unit in weighty),
        row=tuple(names),
        idle=tuple(unit for unit in skeleton.units if unit in idle),
        randoms=tuple(unit for unit in before if unit not in weighty),
        carried=carried,
        chained=chained,
        shared=tuple(sorted(seen.shared, key=str)),
        returns=tuple(seen.returns[place] for place in range(skeleton.num_layers)),
        rows_at=tuple(-3 if at is None else at for at in rows_at),
        reads_ids=reads_ids or None in rows_at[: skeleton.num_layers],
    )


def _order(name: str, skeleton: Skeleton, seen: Findings, weighty: set[str]) -> tuple[list[str], list[Call]]:
    """The units before the layers; the calls of the layers and of the units behind them."""
    order = [call.place for call in seen.calls if call.place is not None]
    if order != list(range(skeleton.num_layers)):
        shown = f"{order[:12]}{'...' if len(order) > 12 else ''}"
        raise SplitError(
            f"{name} does not run its {skeleton.num_layers} layers ({skeleton.layers}) once each and in order, but as "
            f"{shown}; {_TRACE}"
        )
    places = [number for number, call in enumerate(seen.calls) if call.place is not None]
    within = [call.name for call in seen.calls[places[0] : places[-1]] if call.place is None and call.name in weighty]
    if within:
        raise SplitError(
            f"{name} calls {', '.join(dict.fromkeys(within))} between its layers, which belongs to no stage alone; "
            f"{_TRACE}"
        )
    after = [call for call in seen.calls[places[-1] + 1 :] if call.name in weighty]
    if len({call.name for call in after}) < len(after):
        raise SplitError(
            f"{name} calls {', '.join(call.name for call in after)} behind its layers, one twice; {_TRACE}"
        )
    again = {call.name for call in seen.calls[places[0] :]} - weighty  # a dropout that works behind the layers, too
    before = [name for name in dict.fromkeys(call.name for call in seen.calls[: places[0]]) if name not in again]
    return before, [*(seen.calls[number] for number in places), *after]


def _check_flow(name: str, skeleton: Skeleton, seen: Findings, row: list[Call], logits: Tensor) -> None:
    """Each hidden state comes from the element before it, behind the layers from any of those."""
    steps = [*((call.name, call.hidden) for call in row[1:]), ("the end", logits)]
    for place, (to, hidden) in enumerate(steps):
        since = min(place, skeleton.num_layers - 1)
        allowed = {call.name for call in row[since : place + 1]}
        found = seen.sources(hidden)
        wrong = [unit for unit in found if unit not in allowed]
        if wrong or not found:
            what = f"also takes what {', '.join(wrong[:4])} returned" if found else "does not take what that returned"
            raise SplitError(
                f"in {name} the way from {row[place].name} to {to} {what}, which is not sent from stage to stage; "
                f"{_TRACE}"
            )


def _travelling(
    name: str, seen: Findings, before: list[str], row: list[Call]
) -> tuple[dict[int, tuple[ArgumentKey, ...]], dict[int, tuple[ArgumentKey, ...]]]:
    """The arguments besides the hidden state that earlier stages have to send: all the way, and to the next layer."""
    carried: dict[int, list[ArgumentKey]] = {}
    chained: dict[int, list[ArgumentKey]] = {}
    for place, call in enumerate(row):
        for key, value in call.others():
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            sources = {unit for tensor in tensors for unit in seen.sources(tensor)}
            if not sources:
                continue
            if sources <= {*before}:
                carried.setdefault(place, []).append(key)
            elif place and sources == {row[place - 1].name} and all(id(tensor) in seen.made for tensor in tensors):
                chained.setdefault(place, []).append(key)
            else:
                raise SplitError(
                    f"argument {key!r} of {call.name} of {name} is made of what {', '.join(sorted(sources)[:4])} "
                    f"returned, which is not sent from stage to stage; {_TRACE}"
                )
    return (
        {place: tuple(keys) for place, keys in carried.items()},
        {place: tuple(keys) for place, keys in chained.items()},
    )


def _rows_at(hidden: Tensor) -> int | None:
    """The dimension of the rows, counted from the end; the next one is that of the tokens."""
    shape = tuple(hidden.shape)
    found = [at - len(shape) for at in range(len(shape) - 1) if shape[at : at + 2] == (ROWS, TOKENS)]
    return found[0] if found else None
