"""Builds a model without memory, while everything that is asked says that it is on the CPU, and writes the tape.

::

    model_init                        Disguise                       Recorder                      tape
      w = torch.empty(4, 2)      -->                            --> aten.empty, on meta       --> s0 = empty
      w.device, w.is_meta        -->  cpu, False
      w.normal_()                -->                            --> aten.normal_, on meta     --> s0: normal_, draws
      torch.ones(3).tolist()     -->  [1.0, 1.0, 1.0]

Models look where their weights are: transformers and timm leave initialisation out on the meta device. What they would
do on the CPU is what must be recorded, so they are told that it is the CPU. Who looks at values gets them, by doing
again what they depend on. What cannot be recorded ends it (`NotRepeatable`), also if the model's code catches the
exception. Neighbours: `init_tape.py` is what is written, `deferred_init.py` decides what to do when it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from torchdistpackage.split.init_tape import Entry, NotRepeatable, Region, Tape

__all__ = ["Disguise", "Recorder"]

_META, _CPU = torch.device("meta"), torch.device("cpu")
_AGAIN = 50  # how often the entries of a tape may be done again, on average, for those who look at values
_NO_SEED = 24 + 8 * 300
"""A byte in the middle of the 624 numbers of a generator's state; all of them follow from the first, unless it is
changed. A seed has 32 bits there, so that any other mark would be the state that some `manual_seed` leads to."""
_WRITE_ONLY = frozenset(
    {"zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_",
     "cauchy_", "geometric_"}
)  # fmt: skip
"""Operations on a tensor that do not read what was in it."""
_SETTING = frozenset({"set_", "detach_", "requires_grad_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"})
"""Operations that change what a tensor is, and write no memory."""


@final
class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on the meta device and writes those that change memory down.

    Attributes:
        tape: What was written.
        trouble: Why the tape is not right; None while it is.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape(torch.default_generator.get_state())
        self.trouble: str | None = None
        self._storages: dict[int, int] = {}  # its address -> its number
        self._kept: list[torch.UntypedStorage] = []  # so that no address is used twice
        self._marks: dict[bytes, int] = {_key(self.tape.start): -1}
        self._mark = self.tape.start
        self._again = 0

    # --- what a recorded tensor is ------------------------------------------------------------------------------------

    def region(self, tensor: Any) -> Region | None:
        """Where a tensor is; None if it was not recorded."""
        if not isinstance(tensor, Tensor) or tensor.device != _META or tensor.layout is not torch.strided:
            return None
        number = self._storages.get(tensor.untyped_storage()._cdata)
        return None if number is None else Region.of(tensor, number)

    def value(self, tensor: Tensor) -> Tensor:
        """The present value of a recorded tensor; random numbers are drawn for it that will be drawn again.

        Raises:
            NotRepeatable: This has been done too often.
        """
        region = self.region(tensor)
        assert region is not None
        with _disable_current_modes():
            look = self.tape.peek(region)
        self._again += look.entries
        if self._again > _AGAIN * (len(self.tape.entries) + _AGAIN):
            raise self.fail("it looks at values of tensors too often")
        return look.value

    def fail(self, reason: str) -> NotRepeatable:
        """Notes that the tape is not right; the first reason stays."""
        self.trouble = self.trouble or reason
        return NotRepeatable(reason)

    def finish(self) -> Tape:
        """The tape, and torch's generator as it was at the start."""
        self.tape.end = self._state_seen()
        torch.default_generator.set_state(self.tape.start)
        return self.tape

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        with torch._C.DisableTorchFunction():
            try:
                return self._operation(func, args, dict(kwargs or {}))
            except Exception as error:
                self.fail(f"{func} ({type(error).__name__}: {error})")
                raise

    def _operation(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        regions = {id(tensor): region for tensor in tensors if (region := self.region(tensor)) is not None}
        on_cpu = torch.device(kwargs.get("device") or _CPU).type == "cpu"
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not regions and (tensors or not on_cpu):
            self._check_real(func, tensors, on_cpu and "device" in kwargs, random)
            number = func is torch.ops.aten._to_copy.default and tensors[0].device == _CPU and tensors[0].dim() == 0
            if number and kwargs == {"device": _META}:  # the number of `w[2:] = number`, brought to where w is
                return tensors[0].clone()
            return func(*args, **kwargs)
        self._check(func, tensors, regions, kwargs, on_cpu)
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(self.value(args[0]))
        written = _written(func, args, kwargs)
        if any(id(tensor) not in regions for tensor in written):
            raise self.fail(f"{func} writes into a tensor that has values already")
        state = self._state_seen() if random else None
        sizes = [tensor.untyped_storage().nbytes() for tensor in written]
        inputs, options = tree_map_only(
            Tensor, lambda t: t if id(t) in regions or t.dim() == 0 else _on_meta(t), (args, kwargs)
        )
        if on_cpu and ("device" in options or not tensors):
            options["device"] = _META
        options.pop("pin_memory", None)
        try:
            results = func(*inputs, **options)
        except (NotImplementedError, RuntimeError):
            views = any(result.alias_info is not None for result in func._schema.returns)
            return self._really(func, args, kwargs, regions, written or random or views)
        if sizes != [tensor.untyped_storage().nbytes() for tensor in written]:
            raise self.fail(f"{func} changes the size of a tensor's memory")
        self._write(func, (args, kwargs), regions, written, results, random, state)
        return results

    def _check_real(self, func: Any, tensors: list[Tensor], to_cpu: bool, random: bool) -> None:
        """An operation without recorded tensors happens for real, unless it would draw the recorded random numbers."""
        if random and any(tensor.device == _CPU for tensor in tensors):
            raise self.fail(f"{func} draws random numbers into a tensor that has values already")
        if to_cpu and any(tensor.is_meta for tensor in tensors):
            raise self.fail(f"{func} brings a tensor from the meta device to the CPU")

    def _check(
        self, func: Any, tensors: list[Tensor], regions: dict[int, Region], kwargs: dict[str, Any], on_cpu: bool
    ) -> None:
        if func.namespace not in ("aten", "prims"):
            raise self.fail(f"{func} is no operation of torch")
        if kwargs.get("generator") is not None:
            raise self.fail(f"{func} draws from a generator of its own")
        if not on_cpu:
            raise self.fail(f"{func} brings a tensor to {kwargs['device']}")
        strange = [tensor for tensor in tensors if id(tensor) not in regions and tensor.device != _CPU]
        if strange:
            raise self.fail(f"{func} has a tensor on the CPU and one on {strange[0].device}")

    def _really(self, func: Any, args: Any, kwargs: Any, regions: dict[int, Region], forbidden: Any) -> Any:
        """What cannot be done without values, with the values; the result is a constant."""
        if forbidden:
            raise self.fail(f"{func} does not work without values")
        inputs, options = tree_map_only(Tensor, lambda t: self.value(t) if id(t) in regions else t, (args, kwargs))
        return func(*inputs, **options)

    def _write(
        self,
        func: Any,
        inputs: Any,
        regions: dict[int, Region],
        written: list[Tensor],
        results: Any,
        random: bool,
        state: Any,
    ) -> None:
        made = [self._made(func, leaf) for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if (not written and not random and not any(made)) or name in _SETTING:
            return
        fresh = {region.storage for region in made if region}
        changed = {regions[id(tensor)].storage for tensor in written}
        read = {region.storage for key, region in regions.items()}
        overwritten: set[int] = set()
        if name in _WRITE_ONLY:
            others = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf is not written[0]]
            read = {regions[id(tensor)].storage for tensor in others if id(tensor) in regions}
            overwritten = {s for s in changed - read if _covers(regions[id(written[0])], self.tape.sizes[s])}
        args, kwargs = tree_map_only(
            Tensor, lambda t: regions[id(t)] if id(t) in regions else t.detach().clone(), inputs
        )
        entry = Entry(
            func,
            args,
            kwargs,
            made=tuple(made),
            reads=frozenset(read),
            writes=frozenset(fresh | changed),
            overwrites=frozenset(fresh | overwritten),
            random=random,
            state=state,
            default_dtype=torch.get_default_dtype(),
        )
        self.tape.entries.append(entry)
        if random:
            self._set_mark(len(self.tape.entries) - 1)

    def _made(self, func: Any, tensor: Tensor) -> Region | None:
        """The region of a result with a storage of its own, which gets a number."""
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.device != _META:
            raise self.fail(f"{func} gives a tensor that is {tensor.layout} on {tensor.device}")
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return None
        number = self._storages[storage._cdata] = len(self._kept)
        self._kept.append(storage)
        self.tape.sizes.append(storage.nbytes())
        return Region.of(tensor, number)

    # --- the generator ------------------------------------------------------------------------------------------------

    def _state_seen(self) -> Tensor | int | None:
        """What the generator was set to since the last draw.

        It does not move by itself here. Instead each draw leaves a mark, a state that nothing else leads to; a state
        that was read and set again (`fork_rng`) is recognised by it, and any other one was set by `manual_seed`.
        """
        state = torch.default_generator.get_state()
        if torch.equal(state, self._mark):
            return None
        mark = self._marks.get(_key(state))
        return state if mark is None else mark

    def _set_mark(self, number: int) -> None:
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(number)
        mark = torch.default_generator.get_state()
        mark[:8] = before[:8]  # torch.initial_seed() stays what it was
        mark[_NO_SEED] ^= 255
        torch.default_generator.set_state(mark)
        self._mark = mark
        self._marks[_key(mark)] = number


def _key(state: Tensor) -> bytes:
    return bytes(state.numpy().tobytes())


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes, by its schema."""
    found: list[Any] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else kwargs.get(argument.name))
    if func is torch.ops.aten.native_batch_norm.default and args[5]:
        found += args[3:5]  # the running mean and variance; its schema does not say so
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _covers(region: Region, nbytes: int) -> bool:
    """Whether a tensor is all of its storage, in any order."""
    expected = 1
    for stride, size in sorted(zip(region.stride, region.size, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return expected * region.dtype.itemsize == nbytes and 0 not in region.size


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


@final
class Disguise(TorchFunctionMode):
    """Answers for recorded tensors as if they were on the CPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call of a function or method of torch, or of a property of a tensor."""
        kwargs = kwargs or {}
        recorder = self._recorder
        region = recorder.region(args[0]) if args else None
        try:
            if func in _MOVES:
                return self._move(func, args, kwargs)
            if region is None:
                return func(*args, **kwargs)
            if func in _ANSWERS and (func is not Tensor.type or len(args) == 1):
                return _ANSWERS[func](args[0], region)
            if func in _LOOKS:
                with _disable_current_modes():
                    return func(recorder.value(args[0]), *args[1:], **kwargs)
            if func in _MEMORY:
                raise recorder.fail("it works on the memory of a tensor")
            if func is Tensor.new_tensor:
                return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs})
            if func is Tensor.__setitem__ and isinstance(args[2], (bool, int, float)):
                return func(args[0], args[1], torch.tensor(args[2], dtype=args[0].dtype))  # torch 2.6 loses a number
            if getattr(func, "__module__", "") == "torch.nn.init":
                return self._initialize(func, args, kwargs)
        except Exception as error:
            recorder.fail(f"{getattr(func, '__name__', func)} ({type(error).__name__}: {error})")
            raise
        return func(*args, **kwargs)

    def _initialize(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Torch's own functions see the device as it is, and may leave the meta device alone."""
        before = len(self._recorder.tape.entries)
        made = func(*args, **kwargs)
        if args[0].numel() and len(self._recorder.tape.entries) == before:
            raise self._recorder.fail(f"{func.__name__} does nothing without memory")
        return made

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to` and its like: what is said to be on the CPU already stays where it is."""
        tensor, recorded = args[0], self._recorder.region(args[0]) is not None
        if func is Tensor.cpu:
            return tensor if recorded else func(*args, **kwargs)
        other = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)), None)
        if other is not None and self._recorder.region(other) is not None:
            return tensor.to(_META if recorded else _CPU, other.dtype)
        if other is not None and recorded and other.device == _CPU:
            return tensor.to(other.dtype)
        if not recorded or func is Tensor.type_as:
            return func(*args, **kwargs)
        here = [_META if _is_cpu(value) else value for value in args[1:]]
        return func(tensor, *here, **{name: _META if _is_cpu(value) else value for name, value in kwargs.items()})


def _is_cpu(value: Any) -> bool:
    return (isinstance(value, str) and value == "cpu") or (isinstance(value, torch.device) and value.type == "cpu")


_MOVES = frozenset({Tensor.to, Tensor.cpu, Tensor.type_as})
_LOOKS = frozenset({Tensor.tolist, Tensor.__format__})
_MEMORY = frozenset(
    {Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.storage_type,
     Tensor._typed_storage}
)  # fmt: skip
"""What leads to the memory itself, which others could write, or which is not there at all."""
_ANSWERS: dict[Any, Callable[[Tensor, Region], Any]] = {
    Tensor.device.__get__: lambda tensor, region: _CPU,
    Tensor.is_meta.__get__: lambda tensor, region: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda tensor, region: True,  # type: ignore[attr-defined]
    Tensor.get_device: lambda tensor, region: -1,
    Tensor.type: lambda tensor, region: torch.empty(0, dtype=tensor.dtype).type(),
}
