"""A part to disk and back: safetensors, and a JSON file that says what they are.

::

    bottom.safetensors      the tensors, under the names of the whole model
    bottom_metadata.json    written last: which layers of which model, its configuration, a checksum of each tensor

The two are all that a party needs. `checkpoint_split.py` writes the same from a checkpoint, without making the parts.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.decoder.weight_files import WeightFiles, need_transformers
from torchdistpackage.split.model_tensors import whole_tensor
from torchdistpackage.split.parts.base import BaseSplitModel
from torchdistpackage.split.parts.checkpoint_tensors import CheckpointTensors, float_type
from torchdistpackage.split.parts.configuration import layers_of, num_layers_of, settle_attention
from torchdistpackage.split.parts.devices import known_device
from torchdistpackage.split.parts.held_stage import CausalLMPart
from torchdistpackage.split.parts.metadata import PartMetadata, metadata, metadata_path, weights_path
from torchdistpackage.split.parts.registry import GENERIC, ModelRegistry

__all__ = ["load_part", "load_split_model", "save_part"]


def load_split_model(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> Any:
    """A part that was saved by `save_split_model` or `torchdistpackage split`, in evaluation mode.

    Its class is the one that its family has registered. On the CPU the weights stay in the file until they are used, as
    with transformers: do not change the file in place while the part lives; saving over it makes a new one.

    Args:
        path: Of the weights, `parts/top.safetensors`.
        device: Where to.
        dtype: Of the floating tensors; None for that of the file.
        verify: Whether to compare the weights with the checksums in the metadata first, as after a transfer.

    Raises:
        CheckpointError: Files are missing or broken; the message names them.
        KeyError: The family is not registered here.
        SplitError: There is no such device or type.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config
        >>> from torchdistpackage.split.parts import GPT2TopModel
        >>> home = tempfile.TemporaryDirectory()
        >>> top = GPT2TopModel(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10), start_layer=3)
        >>> path = top.save_split_model(f"{home.name}/top")
        >>> sorted(file.name for file in Path(home.name).iterdir())
        ['top.safetensors', 'top_metadata.json']
        >>> again = load_split_model(path, dtype="bfloat16", verify=True)
        >>> type(again).__name__, again.start_layer, again.get_lm_head().weight.dtype
        ('GPT2TopModel', 3, torch.bfloat16)
    """
    return load_part(path, None, device=device, dtype=dtype, verify=verify)


def save_part(part: BaseSplitModel, save_path: str | os.PathLike[str], *, save_metadata: bool = True) -> Path:
    """See `BaseSplitModel.save_split_model`.

    Raises:
        CheckpointError: The files cannot be written, or the part is on the meta device.
    """
    need_transformers()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = _weights(save_path, part.component)
    tensors: dict[str, Tensor] = {}
    for name, tensor in part.state_dict().items():
        tensors[name] = _own(name, tensor, tensors)
    beside, unfinished = metadata_path(path), Path(f"{path}.unfinished")
    about = _about(part, tensors) if save_metadata else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata={"format": "pt"})
        beside.unlink(missing_ok=True)  # it is of what was there before
        os.replace(unfinished, path)
        if about is not None:
            about.write(beside)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    return path


def load_part(
    path: str | os.PathLike[str],
    of: type[BaseSplitModel] | None = None,
    *,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = False,
) -> Any:
    """A part from its files.

    Args:
        path: Of the weights.
        of: A class that it must be of; where it is abstract or None, the class is the one that is registered.
        device: Where to.
        dtype: Of the floating tensors.
        verify: Whether to compare checksums first.

    Raises:
        CheckpointError: As `load_split_model`, or the part is of another class.
    """
    need_transformers()
    device, dtype = known_device(device), float_type(dtype)
    if os.fspath(path).endswith("_metadata.json"):
        raise CheckpointError(f"{os.fspath(path)} describes a part; give the .safetensors file beside it")
    weights = _weights(path, getattr(of, "component", "") or _only_component(path))
    if not weights.is_file():
        raise CheckpointError(f"{weights} is not there; give the path that save_split_model returned")
    about = PartMetadata.read(metadata_path(weights))
    made = _class(about, of, weights)
    if verify:
        from torchdistpackage.split.parts.checkpoint_split import verify_part

        verify_part(weights)
    layers = layers_of(about.component, about.start_layer, about.end_layer)
    try:
        config = _config(about, made)
        with WeightFiles(str(weights.parent), weights.name) as files:
            state = CheckpointTensors(files, of_whole=about.names == "checkpoint")
            part: Any = made._from_saved(state, config, about.names != "checkpoint", **layers)
    except (ValueError, CheckpointError) as error:  # the two files do not belong together, or to this class
        raise CheckpointError(f"{weights} cannot be loaded as {made.__name__}: {error}") from error
    if "generation_config" in about.extra and isinstance(part, CausalLMPart):
        from transformers import GenerationConfig

        cast(Any, part.stage).generation_config = GenerationConfig.from_dict(about.extra["generation_config"])
    return part.to(device=device, dtype=dtype).eval()


def _own(name: str, tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """A tensor on the CPU that shares no memory with the others, as the format wants it."""
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no values to save")
    whole = whole_tensor(tensor).detach().to("cpu")
    alone = whole.is_contiguous() and whole.untyped_storage().nbytes() == whole.numel() * whole.element_size()
    alone = alone and all(other.data_ptr() != whole.data_ptr() for other in others.values())
    return whole if alone else whole.clone(memory_format=torch.contiguous_format)


def _about(part: BaseSplitModel, tensors: Mapping[str, Tensor]) -> PartMetadata:
    floating = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    kind: Mapping[str, str] = getattr(type(part), "_registry_info", {})
    return metadata(
        part.component,
        part.start_layer,
        part.end_layer,
        num_layers_of(part.config),
        _Config(part.config, kind.get("model_type", GENERIC)),
        num_parameters=part.num_parameters(),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        dtype=str(floating[0] if floating else torch.get_default_dtype()),
        sha256={name: _hash(tensor) for name, tensor in tensors.items()},
        names="part",
        model_class=type(part).__name__,
        extra={"family": kind.get("model_type", GENERIC), **_generation(part)},
    )


def _generation(part: BaseSplitModel) -> dict[str, Any]:
    """How the model ends a text and picks tokens, for `generate`."""
    found = getattr(part.stage, "generation_config", None) if isinstance(part, CausalLMPart) else None
    return {} if found is None else {"generation_config": json.loads(found.to_json_string())}


def _hash(tensor: Tensor) -> str:
    flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


class _Config:
    """The configuration as JSON, also of models that are not of transformers."""

    def __init__(self, config: Any, kind: str) -> None:
        self._config, self.model_type = config, getattr(config, "model_type", None) or kind

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        found: dict[str, Any] = self._config.to_dict() if hasattr(self._config, "to_dict") else dict(vars(self._config))
        return found


def _config(about: PartMetadata, of: type[BaseSplitModel]) -> Any:
    from transformers import AutoConfig, PretrainedConfig

    fields = dict(about.config)
    kind = fields.pop("model_type", None) or about.model_type
    try:
        config: Any = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # one for a kind that is not of transformers, others for values that cannot be
        if not str(error).startswith("Unrecognized model identifier"):
            raise CheckpointError(f"the configuration in the metadata cannot be used: {error}") from error
        if issubclass(of, CausalLMPart):
            raise CheckpointError(
                f"the model is of type {kind!r}, which transformers does not know here; import the code that registers "
                "it with AutoConfig and AutoModelForCausalLM first"
            ) from None
        config = PretrainedConfig(**fields)
        vars(config)["model_type"] = kind
    if not issubclass(of, CausalLMPart):
        settle_attention(config)
    if num_layers_of(config) != about.total_layers:
        raise CheckpointError(
            f"the metadata says {about.total_layers} layers, and the configuration in it {num_layers_of(config)}"
        )
    return config


def _class(about: PartMetadata, of: type[BaseSplitModel] | None, weights: Path) -> type[Any]:
    if of is not None and of.component and about.component != of.component:
        raise CheckpointError(
            f"{weights} holds a {about.component}, not a {of.component}: {of.__name__} cannot load it"
        )
    if of is not None and not inspect.isabstract(of):
        return of
    kind = str(about.extra.get("family") or about.model_type)
    return ModelRegistry.get_model_class(kind, about.component)


def _weights(path: str | os.PathLike[str], component: str) -> Path:
    """The file that a path means: a directory stands for the component's file in it."""
    found = Path(path)
    if component and (found.is_dir() or os.fspath(path).endswith("/")):
        return weights_path(found, component)
    stem = found.name.removesuffix(".safetensors").removesuffix(".pt")  # SplitLearn writes .pt
    return found.with_name(f"{stem}.safetensors")


def _only_component(path: str | os.PathLike[str]) -> str:
    """The component whose file is in a directory, if it is the only one there."""
    found = [file.stem for file in Path(path).glob("*.safetensors")] if Path(path).is_dir() else []
    if Path(path).is_dir() and len(found) != 1:
        raise CheckpointError(f"{os.fspath(path)} is a directory with {sorted(found) or 'no parts'}; give one file")
    return found[0] if found else ""
