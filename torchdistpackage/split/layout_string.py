"""Megatron-LM's pipeline layouts: where to cut, written as one string.

`"Et*3|(tt|)*29,m|L"` is the value of Megatron-LM's `--pipeline-model-parallel-layout`; people bring such strings with
their models. A letter is a layer, `|` ends a stage::

    E   embedding, once and first              *n      what is before it, n times
    t   transformer layer                      (...)   what is between them, as one
    m   multi-token-prediction layer           ,       and blanks mean nothing
    L   loss, once and last

Stages may be empty. Source: megatron/core/transformer/pipeline_parallel_layer_layout.py in NVIDIA/Megatron-LM; here
brackets may also stand in brackets. This file only reads and counts; whoever knows the layers of a model says how many
come before, in and after the row of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import NoReturn

from torchdistpackage.errors import SplitError

__all__ = ["layout_boundaries", "parse_layout"]

_TOKEN = re.compile(r"(?P<blank>[,\s]+)|(?P<symbol>[EtmL|])|(?P<open>\()|(?P<close>\))|\*(?P<times>\d+)|(?P<wrong>.)")
_MOST_SYMBOLS = 100_000  # `t*999999999` is a slip of the finger, not a model


@dataclass(frozen=True)
class _Symbol:
    text: str
    column: int


def parse_layout(layout: str) -> tuple[str, ...]:
    """The letters of each stage.

    Args:
        layout: As in the module's table.

    Raises:
        SplitError: The layout cannot be read, or E is not first, L not last, or a t behind an m; it shows where.

    Example:
        >>> parse_layout("Et*3|(tt|)*2,m|L")
        ('Ettt', 'tt', 'tt', 'm', 'L')
        >>> parse_layout("E||t|L")
        ('E', '', 't', 'L')
        >>> parse_layout("Et*3|x*2|L")
        Traceback (most recent call last):
        torchdistpackage.errors.SplitError: pipeline layout: 'x' is none of E t m L | ( ) * ,
            Et*3|x*2|L
                 ^
    """
    symbols = _unrolled(layout)
    _check_order(layout, symbols)
    return tuple("".join(symbol.text for symbol in symbols).split("|"))


def layout_boundaries(
    layout: str, *, before: int, blocks: int, after: int, num_stages: int | None = None, mtp_blocks: int = 0
) -> tuple[int, ...]:
    """The cut points that a layout means in a row of layers: some before the blocks, the blocks, some after them.

    E stands for all layers before the blocks, L for all layers after them. Stages without layers have equal cut points.

    Args:
        layout: As in the module's table.
        before: Layers before the blocks, such as an embedding; they go to the first stage.
        blocks: Blocks, those that `mtp_blocks` counts included.
        after: Layers after the blocks, such as the last norm and the head; they go to the last stage.
        num_stages: Stages that there must be; by default as many as the layout has.
        mtp_blocks: How many of the blocks, the last ones, are multi-token-prediction layers. With 0 the model has none:
            each m then stands for no layer.

    Returns:
        The cut points, from 0 to before + blocks + after.

    Raises:
        SplitError: The layout cannot be read, or does not have as many stages, t or m as there are to be.

    Example:
        >>> layout_boundaries("Et*3|(tt|)*2L", before=1, blocks=7, after=2)
        (0, 4, 6, 8, 10)
        >>> layout_boundaries("Ett|tm|L", before=1, blocks=4, after=1, mtp_blocks=1)
        (0, 3, 5, 6)
        >>> layout_boundaries("E||tt|L", before=1, blocks=3, after=1)
        Traceback (most recent call last):
        torchdistpackage.errors.SplitError: the layout 'E||tt|L' has 2 t, but the model has 3 transformer blocks; it
        counts 0 on stages 0 to 1, 2 on stage 2, 0 on stage 3
    """
    if min(before, blocks, after, mtp_blocks) < 0 or mtp_blocks > blocks:
        raise SplitError(
            f"before={before}, blocks={blocks}, after={after}, mtp_blocks={mtp_blocks} are no numbers of layers: none "
            f"is negative, and mtp_blocks is a part of blocks"
        )
    stages = parse_layout(layout)
    if num_stages is not None and len(stages) != num_stages:
        raise SplitError(
            f"the layout {layout!r} has {len(stages)} stages, but there are to be {num_stages}; it has "
            f"{len(stages) - 1} bars, and {num_stages} stages take {num_stages - 1}"
        )
    _check_number(layout, stages, "t", blocks - mtp_blocks, "transformer blocks")
    if mtp_blocks:
        _check_number(layout, stages, "m", mtp_blocks, "multi-token-prediction blocks")
    counted = "tm" if mtp_blocks else "t"
    cuts = accumulate((sum(map(stage.count, counted)) for stage in stages), initial=before)
    return (0, *list(cuts)[1:-1], before + blocks + after)


def _unrolled(layout: str) -> list[_Symbol]:
    """The layout without brackets and numbers; each symbol knows the column that it comes from."""
    groups: list[list[list[_Symbol]]] = [[]]  # one list of repeatable pieces for each open bracket
    opened: list[int] = []
    repeatable = False
    for match in _TOKEN.finditer(layout):
        kind, text, column = match.lastgroup, match.group(), match.start()
        if kind == "blank":
            continue
        if kind == "wrong":
            reason = "a number must follow '*'" if text == "*" else f"{text!r} is none of E t m L | ( ) * ,"
            _fail(layout, column, reason)
        if kind == "open":
            groups.append([])
            opened.append(column)
        elif kind == "symbol":
            groups[-1].append([_Symbol(text, column)])
        elif kind == "close":
            if not opened:
                _fail(layout, column, "this bracket closes nothing")
            opened.pop()
            inside = groups.pop()
            groups[-1].append([symbol for piece in inside for symbol in piece])
        else:
            if not repeatable:
                _fail(layout, column, f"there is nothing in front of {text!r} to repeat")
            piece, times = groups[-1].pop(), int(match["times"][:9])
            if len(piece) * times > _MOST_SYMBOLS:
                _fail(layout, column, f"this makes more than {_MOST_SYMBOLS} layers")
            groups[-1].append(piece * times)
        repeatable = kind in ("symbol", "close")
    if opened:
        _fail(layout, opened[-1], "this bracket is never closed")
    return [symbol for piece in groups[0] for symbol in piece]


def _check_order(layout: str, symbols: Sequence[_Symbol]) -> None:
    if not symbols or symbols[0].text != "E":
        _fail(layout, symbols[0].column if symbols else 0, "a layout starts with E, the embedding, on the first stage")
    if symbols[-1].text != "L":
        _fail(layout, symbols[-1].column, "a layout ends with L, the loss, on the last stage")
    in_mtp = False
    for number, symbol in enumerate(symbols):
        if symbol.text == "E" and number > 0:
            _fail(layout, symbol.column, "E, the embedding, comes once, and first")
        if symbol.text == "L" and number < len(symbols) - 1:
            _fail(layout, symbol.column, "L, the loss, comes once, and last")
        if symbol.text == "t" and in_mtp:
            _fail(layout, symbol.column, "a transformer layer t cannot come behind a multi-token-prediction layer m")
        in_mtp = in_mtp or symbol.text == "m"


def _check_number(layout: str, stages: Sequence[str], letter: str, wanted: int, name: str) -> None:
    """Shows how the layout counts: stages in a row with the same number are put together."""
    counts = [stage.count(letter) for stage in stages]
    if sum(counts) == wanted:
        return
    parts, first = [], 0
    for count, run in groupby(counts):
        size = len(list(run))
        many = f"stages {first} to {first + size - 1}"
        parts.append(f"{count} on stage {first}" if size == 1 else f"{count} on {'each of ' if count else ''}{many}")
        first += size
    raise SplitError(
        f"the layout {layout!r} has {sum(counts)} {letter}, but the model has {wanted} {name}; it counts "
        f"{', '.join(parts)}"
    )


def _fail(layout: str, column: int, reason: str) -> NoReturn:
    line = re.sub(r"\s", " ", layout)  # a line break would move the caret
    raise SplitError(f"pipeline layout: {reason}\n    {line}\n    {' ' * column}^")
