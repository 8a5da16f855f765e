"""Which tensors of a checkpoint a stage is made of: the real loader is run, on tensors without bytes.

::

    header of a file   lm_head.weight: BF16, (32, 16)  -->  a tensor on the meta device  -->  fill_stage
                                          |                                                     |
                                          `-- its name is noted when it is asked for            `-- raises what is wrong

Names and layouts in files are not those of the modules: experts are single, prefixes are missing, a tied head is there
under the name of the embedding. `filling.py` leaves that to transformers' loader, and whoever wants to know what the
loader will read asks the same loader; nothing is said twice. As it checks names and shapes on the way, a checkpoint
that cannot be loaded is found before a byte of it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.filling import fill_stage, without_progress_bars
from torchdistpackage.split.decoder.safetensors_header import TensorEntry

__all__ = ["dtype_in_files", "needed_tensors", "quiet", "torch_dtype"]

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_SPELLINGS = {dtype: spelling for spelling, dtype in _DTYPES.items()}
_FIRST_VALUES = ("_move_missing_keys_from_meta_to_device", "_initialize_missing_keys")  # of transformers' loader


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The type of a tensor in a file; uint8 for those that torch does not have, which hold packed numbers."""
    return _DTYPES.get(entry.dtype, torch.uint8)


def dtype_in_files(dtype: torch.dtype, name: str = "a tensor") -> str:
    """How safetensors spells a type.

    Args:
        dtype: Of torch.
        name: What to call the tensor in the error.

    Raises:
        CheckpointError: The format has no such type, as those of quantized tensors.

    Example:
        >>> dtype_in_files(torch.bfloat16)
        'BF16'
    """
    if dtype not in _SPELLINGS:
        raise CheckpointError(f"{name} is {dtype}, which safetensors files cannot hold; convert it to a float type")
    return _SPELLINGS[dtype]


def needed_tensors(
    part: Any,
    whole: Any,
    tensors: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    *,
    name: str = "the checkpoint",
    trust_remote_code: bool = False,
) -> frozenset[str]:
    """The names of the tensors that `load_stages` reads for a stage.

    Args:
        part: A stage on the meta device, from `split_causal_lm`; of no use afterwards.
        whole: The model that it was cut from; of no use for another stage afterwards, because ties join the two.
        tensors: All tensors of the checkpoint, by their names in the files.
        dtype: Of the floating parameters.
        name: What to call the checkpoint in errors.
        trust_remote_code: As for `from_pretrained`.

    Raises:
        CheckpointError: Tensors are missing or of another shape.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(home.name)
        >>> from torchdistpackage.split import split_causal_lm
        >>> from torchdistpackage.split.decoder.pretrained import without_weights
        >>> from torchdistpackage.split.decoder.safetensors_header import read_header
        >>> tensors = read_header(f"{home.name}/model.safetensors").tensors
        >>> whole = without_weights(model.config)
        >>> part = split_causal_lm(whole, 2, [1])[1]
        >>> needed = needed_tensors(part, whole, tensors, torch.float32)
        >>> len(tensors), len(needed), "transformer.wte.weight" in needed  # the head is tied to it
        (52, 27, True)
    """
    source = _Headers(tensors, name)
    for step in _FIRST_VALUES:  # what is missing is named afterwards, and must not take memory before
        vars(part)[step] = lambda *args, **kwargs: None
    with quiet():
        fill_stage(part, whole, source, dtype, trust_remote_code)
    return frozenset(source.noted)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from saying that weights are loaded or written, and which ones a stage does not know."""
    logger = logging.getLogger(fill_stage.__module__)
    logger.addFilter(_nothing)
    try:
        with without_progress_bars():
            yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


@final
class _Headers:
    """A `WeightSource` that gives out shapes and remembers whose."""

    def __init__(self, entries: Mapping[str, TensorEntry], name: str) -> None:
        self.name = name
        self.noted: set[str] = set()  # the loader asks in several threads; adding to a set is one step
        self._entries = entries

    def tensors(self) -> dict[str, Any]:
        return {name: _Noted(self, name) for name in self._entries}

    def are_one(self, name: str, other: str) -> bool:
        """Files hold a tensor under one name."""
        return False

    def generation_config(self) -> None:
        """None: it has no tensors."""

    def check(self) -> None:
        """Nothing is read, so nothing can fail."""

    def empty(self, name: str) -> Tensor:
        self.noted.add(name)
        entry = self._entries[name]
        shape: Tensor = torch.empty(entry.shape, dtype=torch_dtype(entry), device="meta").as_subclass(_Shape)
        return shape


@final
class _Noted:
    def __init__(self, headers: _Headers, name: str) -> None:
        self._headers, self._name = headers, name

    def __getitem__(self, part: Any) -> Tensor:
        return self._headers.empty(self._name)[part]


@final
class _Shape(Tensor):
    """A tensor on the meta device that stays there: the loader moves all that it reads to the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            kwargs.pop("device", None)
            args = (args[0], *(each for each in args[1:] if not isinstance(each, (str, int, torch.device))))
        elif func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return args[0]
        elif func is torch.equal:
            return True  # two ends of a tie: the values are compared by whoever loads them
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
