"""Everything about a message but its numbers: structure, shapes, dtypes, strides, constants.

A layout is described once, as JSON (no pickle: that would run what a peer sends), when it first appears on an edge, and
has a small number from then on; `outlet.py` and `inlet.py` keep those numbers. What a description says is checked
before memory is set aside for it. Neighbours: `message.py` has the frames in which the numbers travel.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchdistpackage.errors import ScheduleError, TransportError
from torchdistpackage.schedule.routing import Skips, check_skips, skips_of

__all__ = ["ALIGNMENT", "MAX_FRAME", "Layout", "Leaf", "TensorLayout", "Travel"]

ALIGNMENT = 64  # bytes; any dtype's item size divides it, and it keeps vector loads aligned
MAX_FRAME = 1 << 37  # bytes; a header that announces more is damaged
MAX_STAGES = 1 << 16  # so that the number of a skip, which has both ends, fits into a header


class Travel(enum.IntEnum):
    """Whether a tensor is in the frame."""

    ALWAYS = 0
    KEEP = 1  # it is, and the receiver keeps it for later messages
    KEPT = 2  # it is not: the receiver has it


class TensorLayout(NamedTuple):
    """One tensor of a message: hashable, so that it is also the key under which layouts are found again."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    is_cuda: bool
    travel: int = Travel.ALWAYS


Leaf = Any  # a TensorLayout, or (type, value) of a constant; for a slice the value is its three numbers

INEXACT = (float, complex)
"""Constants whose equality does not see everything: -0.0 equals 0.0, and NaN not even itself."""

_SEQUENCES = {torch.Size: "size", slice: "slice"}
_DAMAGE = (LookupError, ValueError, TypeError, AttributeError, NotImplementedError, ScheduleError, TransportError)
_PLAIN = (list, tuple, dict, OrderedDict, defaultdict, deque)
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes)


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything about a message but the numbers.

    Attributes:
        spec: Structure of the pytree; None for a bare tensor.
        leaves: One entry a leaf, in pytree order.
        wire_dtype: The dtype that floating tensors are cast to while they travel; None for no cast.
        skips: The table of the model's skips, as the sender's stage has said it; so it comes to every stage.
    """

    spec: pytree.TreeSpec | None
    leaves: tuple[Leaf, ...]
    wire_dtype: torch.dtype | None = None
    skips: Skips = ()

    @cached_property
    def tensors(self) -> tuple[TensorLayout, ...]:
        """The tensors among the leaves."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, TensorLayout))

    @cached_property
    def packed(self) -> tuple[TensorLayout, ...]:
        """The tensors that are in the frame."""
        return tuple(tensor for tensor in self.tensors if tensor.travel != Travel.KEPT)

    @cached_property
    def keeps(self) -> bool:
        """Whether any tensor is kept by the receiver, from this message or from an earlier one."""
        return any(tensor.travel != Travel.ALWAYS for tensor in self.tensors)

    @cached_property
    def placements(self) -> tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int], ...]:
        """For each packed tensor: dtype on the wire, shape, strides, and offset in the frame in items of that dtype."""
        table, offset = [], ALIGNMENT
        for tensor in self.packed:
            cast = self.wire_dtype is not None and tensor.dtype.is_floating_point
            dtype = self.wire_dtype if cast and self.wire_dtype is not None else tensor.dtype
            table.append((dtype, tensor.shape, tensor.stride, offset // dtype.itemsize))
            offset += aligned(math.prod(tensor.shape) * dtype.itemsize)
        return tuple(table)

    @cached_property
    def frame_bytes(self) -> int:
        """Length of the whole frame, header included."""
        return ALIGNMENT + sum(aligned(math.prod(shape) * dtype.itemsize) for dtype, shape, _, _ in self.placements)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """A window on a frame's memory for each tensor, in the dtype that it has on the wire."""
        return [
            buffer.view(dtype).as_strided(shape, stride, offset)
            if 0 not in shape
            else buffer.new_empty(shape, dtype=dtype)
            for dtype, shape, stride, offset in self.placements
        ]

    def read(self, buffer: Tensor, device: torch.device) -> list[Tensor]:
        """The tensors of a frame in their own dtype, on their own kind of device."""
        views = self.views(buffer)
        if self.wire_dtype is None and self._on == {buffer.is_cuda}:
            return views
        return [
            # One call for both moves; a host-staged CUDA tensor lands on this rank's own device.
            view.to(device=device if tensor.is_cuda else "cpu", dtype=tensor.dtype)
            for view, tensor in zip(views, self.packed, strict=True)
        ]

    @cached_property
    def _on(self) -> set[bool]:
        return {tensor.is_cuda for tensor in self.packed}

    @cached_property
    def is_cuda(self) -> bool:
        """Whether any tensor in the frame lives on a CUDA device."""
        return any(tensor.is_cuda for tensor in self.packed)

    def describe(self) -> dict[str, Any]:
        """The layout in JSON's types.

        Raises:
            TransportError: The pytree has a container that cannot be rebuilt from its name.
        """
        spec = None if self.spec is None else describe_spec(self.spec, "a stage")
        wire = None if self.wire_dtype is None else _dtype_name(self.wire_dtype)
        leaves = [_leaf_to_json(leaf) for leaf in self.leaves]
        return {"spec": spec, "wire": wire, "leaves": leaves, "skips": self.skips}

    @classmethod
    def from_description(cls, data: dict[str, Any]) -> Layout:
        """Reads `describe` back.

        Raises:
            TransportError: The description is damaged.
        """
        try:
            spec = None if data["spec"] is None else pytree.treespec_loads(data["spec"])
            wire = None if data["wire"] is None else _dtype_from_name(data["wire"])
            layout = cls(spec, tuple(map(_leaf_from_json, data["leaves"])), wire, _skips_from_json(data["skips"]))
            expected, length = 1 if spec is None else spec.num_leaves, layout.frame_bytes
            if len(layout.leaves) != expected or length > MAX_FRAME:
                raise ValueError(f"{len(layout.leaves)} leaves for {expected}, {length} bytes of at most {MAX_FRAME}")
        except _DAMAGE as error:
            raise TransportError(f"a message describes its layout in a way that cannot be read: {error!r}") from error
        return layout

    def tree(self, tensors: Sequence[Any]) -> Any:
        """Puts tensors (or anything in their place) and the constants back into the structure."""
        if self.spec is None:
            return tensors[0]
        taken = iter(tensors)
        return pytree.tree_unflatten(
            [next(taken) if isinstance(leaf, TensorLayout) else _constant(leaf) for leaf in self.leaves], self.spec
        )


def describe_spec(spec: pytree.TreeSpec, who: str) -> str:
    """The structure of a pytree as text.

    Args:
        spec: The structure.
        who: What returned it, for the message.

    Raises:
        TransportError: It has a container that cannot be rebuilt from its name.
    """
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError, ValueError) as error:
        kind = next(filter(None, map(_foreign, _nodes(spec))), None)
        what, advice = f"a container ({error})", "return tensors in tuples, lists or dicts"
        if kind is not None:
            what, inner = f"a {kind.__name__}", "tuple(x)" if issubclass(kind, tuple) else "what is in it"
            advice = f"return {inner} and make the {kind.__name__} again in the next stage"
        raise TransportError(
            f"{who} returned {what}, which other ranks cannot rebuild; {advice}, or register the container with "
            "torch's pytree and a serialized_type_name"
        ) from error


def _nodes(spec: pytree.TreeSpec) -> Iterator[pytree.TreeSpec]:
    yield spec
    # Newer versions of torch have renamed it.
    for child in spec.children() if hasattr(spec, "children") else spec.children_specs:
        yield from _nodes(child)


def _foreign(node: pytree.TreeSpec) -> type | None:
    """The class of a container that is not Python's own; of a named tuple it is the context."""
    if node.type is None or node.type in _PLAIN:
        return None
    return node.context if isinstance(node.context, type) else node.type


def _constant(leaf: Leaf) -> Any:
    kind, value = leaf
    return slice(*value) if kind is slice else value


def leaf_key(leaf: Any, *, training: bool, travel: int = Travel.ALWAYS) -> Leaf:
    """What has to be known of a leaf before its numbers.

    Raises:
        TransportError: The leaf is neither a dense tensor nor a plain constant.
    """
    if isinstance(leaf, Tensor):
        if leaf.is_meta:
            raise TransportError(
                "a stage returned a tensor on the meta device, which has no values; give the stage values first, by "
                "pipe.build_stage(...), record_init(...).fill([stage]), or stage.to_empty(device=...) and a checkpoint"
            )
        if leaf.layout is not torch.strided or leaf.is_quantized or hasattr(leaf, "to_local"):
            raise TransportError(
                f"a stage returned a {type(leaf).__name__} with layout {leaf.layout}; only dense tensors travel "
                "between stages: convert it first (to_dense(), dequantize(), to_local())"
            )
        grad = training and leaf.requires_grad
        return TensorLayout(leaf.shape, leaf.stride(), leaf.dtype, grad, leaf.is_cuda, travel)
    if isinstance(leaf, _CONSTANTS):
        return (type(leaf), leaf)
    if isinstance(leaf, (torch.dtype, torch.device, torch.Size)):
        return (type(leaf), leaf)
    if isinstance(leaf, slice) and all(part is None or type(part) is int for part in _parts(leaf)):
        return (slice, _parts(leaf))  # a slice has a hash from Python 3.12 on only
    raise TransportError(
        f"a stage returned a {type(leaf).__name__}, which cannot travel to another rank; return tensors, None, "
        "numbers, strings, sizes and slices of whole numbers in tuples, lists or dicts"
    )


def _parts(value: slice) -> tuple[Any, Any, Any]:
    return (value.start, value.stop, value.step)


def is_like(tensor: Tensor, known: TensorLayout | None) -> bool:
    """Whether a bare tensor has the layout that the last one had: the quick way past `leaf_key`."""
    return (
        known is not None
        and type(tensor) is Tensor
        and tensor.shape == known.shape
        and tensor.dtype is known.dtype
        and tensor.requires_grad == known.requires_grad
        and tensor.stride() == known.stride
        and tensor.is_cuda == known.is_cuda
        and tensor.layout is torch.strided
    )


def is_leaf_like(leaf: Any, known: Leaf, travel: int) -> bool:
    """Whether a leaf of a message of several has the layout that it had last time."""
    if isinstance(known, TensorLayout):
        return known.travel == travel and is_like(leaf, known)
    kind, value = known
    if type(leaf) is not kind:
        return False
    if kind is slice:
        return bool(_parts(leaf) == value)
    return repr(leaf) == repr(value) if kind in INEXACT else bool(leaf == value)


def dense(leaf: Leaf) -> Leaf:
    """The layout in which a tensor travels: its own strides if it fills its memory (channels-last), else contiguous."""
    if not isinstance(leaf, TensorLayout):
        return leaf
    # By hand: torch would tell by a tensor on its meta device, the first of which imports sympy for a second or more.
    shape, stride = tuple(leaf.shape), tuple(leaf.stride)
    order = sorted(range(len(shape)), key=lambda dim: -stride[dim])  # outermost first
    if any(step == 0 < size - 1 for size, step in zip(shape, stride, strict=True)):
        order = sorted(order)  # expanded: its strides say no order
    steps, step = [0] * len(shape), 1
    for dim in reversed(order):
        steps[dim], step = step, step * max(1, shape[dim])
    return leaf._replace(shape=shape, stride=tuple(steps))


def aligned(size: int, to: int = ALIGNMENT) -> int:
    """Rounds up to a multiple of `to`."""
    return -(-size // to) * to


def share_bytes(layout: Layout, size: int) -> int:
    """Length of one tensor-parallel rank's share of the frame behind the header; with size 1 all of it."""
    return aligned(layout.frame_bytes - ALIGNMENT, ALIGNMENT * size) // size


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def _leaf_to_json(leaf: Leaf) -> Any:
    if isinstance(leaf, TensorLayout):
        return [
            "tensor",
            list(leaf.shape),
            list(leaf.stride),
            _dtype_name(leaf.dtype),
            leaf.requires_grad,
            leaf.is_cuda,
            leaf.travel,
        ]
    kind, value = leaf
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is torch.dtype:
        return ["dtype", _dtype_name(value)]
    if kind is torch.device:
        return ["device", str(value)]
    if kind in (torch.Size, slice):
        return [_SEQUENCES[kind], list(value)]
    return ["constant", value]


def _checked(tensor: TensorLayout) -> TensorLayout:
    """Before memory is set aside for it: whether there can be such a tensor, which fills its memory as `dense` does."""
    shape, stride = tensor.shape, tensor.stride
    plain = len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in (*shape, *stride))
    extent = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if plain and 0 not in shape else 0
    if not plain or extent >= max(1, math.prod(shape)):
        raise ValueError(f"a tensor of shape {shape} with strides {stride}")
    return tensor._replace(travel=Travel(tensor.travel))


def _skips_from_json(data: Any) -> Skips:
    skips = skips_of(data)
    check_skips(skips, MAX_STAGES)
    return skips


def _leaf_from_json(data: Any) -> Leaf:
    kind, *rest = data
    if kind == "tensor":
        shape, stride, dtype, *others = rest
        return _checked(TensorLayout(tuple(shape), tuple(stride), _dtype_from_name(dtype), *others))
    readers: dict[str, Callable[..., Any]] = {
        "bytes": lambda text: bytes.fromhex(text),
        "complex": lambda real, imag: complex(real, imag),
        "dtype": _dtype_from_name,
        "device": torch.device,
        "size": torch.Size,
        "slice": lambda parts: slice(*parts),
        "constant": lambda value: value,
    }
    value = readers[kind](*rest)
    return leaf_key(value, training=False) if kind == "slice" else (type(value), value)
