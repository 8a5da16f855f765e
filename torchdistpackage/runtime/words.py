"""Values in words, for messages to people: what a function got, at a glance and in one line.

Nothing here runs in a step that goes well. Neighbours: `stage.py` notes on an exception of the user's function what
that had got; `parallel/` says what an argument is that it refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from torchdistpackage.runtime.message import Message

__all__ = ["in_words", "note_call", "with_type"]

_LEAVES = 6  # shown of a value
_CHARACTERS = 40  # of a text
_META = ("device meta", "meta device", "meta tensor")  # how torch's errors speak of it
_ADVICE = (
    "the stage, or what it got, is on the meta device, where tensors have no values: give it values first, by "
    "pipe.build_stage(...), record_init(...).fill([stage]), or stage.to_empty(device=...) and a checkpoint"
)


def in_words(value: Any) -> str:
    """A value in one line: dtype and shape of tensors, inside of lists, tuples and dicts, too.

    Example:
        >>> import torch
        >>> in_words([torch.ones(3, 16), {"mask": torch.ones(3).bool(), "note": "all"}])
        "[float32 (3, 16), {mask: bool (3,), note: 'all'}]"
    """
    return _Words().of(value)


def with_type(value: Any) -> str:
    """The same with the name of its type in front, for what might be anything.

    Example:
        >>> import torch
        >>> with_type(torch.ones(3, 16)), with_type("1f1b"), with_type(torch.nn.ReLU())
        ('a value of type Tensor, float32 (3, 16)', "a value of type str, '1f1b'", 'a value of type ReLU')
    """
    name, words = type(value).__name__, in_words(value)
    return f"a value of type {name}" + (f", {words}" if words != name else "")


def note_call(
    error: Exception, stage: int, message: Message | None, far: Sequence[Message], own: Iterable[Any], count: int
) -> None:
    """Adds to an exception what `fwd_fn` had got when it raised it.

    Args:
        error: The exception.
        stage: Whose function it was.
        message: From the stage before.
        far: From stages further before.
        own: This stage's slices of its own inputs.
        count: How many values there were.
    """
    if not hasattr(error, "add_note"):  # before Python 3.11
        return
    came = [(each, "from an earlier stage") for each in far]
    if message is not None:
        came.append((message, f"from stage {stage - 1}"))
    values = [(value, where) for each, where in came for value in _values(each)]
    values += [(value, "from inputs") for value in own]
    words = _Words()
    said = words.list((f"{words.of(value)} {where}" for value, where in values), len(values))
    kind = "" if count == 1 else f"a list of {count}: " if count else "an empty list"
    error.add_note(f"fwd_fn of stage {stage} got {kind}{said}")
    # Torch's own only: the text of a user's exception is made by the user's code.
    if type(error) in (RuntimeError, NotImplementedError) and any(mark in str(error) for mark in _META):
        error.add_note(_ADVICE)


def _values(message: Message) -> list[Any]:
    layout, tensors, _ = message
    tree: Any = None if layout is None else layout.tree(tensors)
    return list(tree) if type(tree) in (list, tuple) else [tree]


class _Words:
    """Counts the leaves that have been said, so that a line stays a line."""

    def __init__(self) -> None:
        self._left = _LEAVES

    def of(self, value: Any) -> str:
        """A value, or as much of it as there is room for."""
        if type(value) in (list, tuple):
            inner = self.list(map(self.of, value), len(value))
            return f"[{inner}]" if type(value) is list else f"({inner})"
        if isinstance(value, dict):
            said = (f"{key if type(key) is str else _leaf(key)}: {self.of(each)}" for key, each in value.items())
            return f"{{{self.list(said, len(value))}}}"
        self._left -= 1
        return _leaf(value)

    def list(self, said: Iterator[str], count: int) -> str:
        """Some of a container, until there is no more room; `said` is read one by one."""
        shown: list[str] = []
        while len(shown) < count and self._left > 0:
            shown.append(next(said))
        return ", ".join([*shown, "..."] if len(shown) < count else shown)


def _leaf(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{where}"
    if value is None or type(value) in (bool, int, float, str):
        text = repr(value)
        return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}..."
    return type(value).__name__
