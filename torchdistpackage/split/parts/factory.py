"""A saved language model -> Bottom, Trunk and Top.

::

    MODEL_DIR/config.json          ----> which layers there are          split points are checked, devices chosen
    MODEL_DIR/*.safetensors        ----> Bottom: its tensors, no others  ----> its device
                                   ----> Trunk                           ----> its device
                                   ----> Top                             ----> its device

Each part is made by the class that its family has registered, with a state dict that reads from the files what it is
asked for. Only weights that cannot be read in parts (pickled ones) make the whole model be loaded first.
"""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from torchdistpackage.errors import CheckpointError, SplitError
from torchdistpackage.split.decoder.pretrained import read_config, without_weights
from torchdistpackage.split.decoder.weight_files import WeightFiles, has_pickled_weights, need_transformers
from torchdistpackage.split.parts.base import BaseSplitModel
from torchdistpackage.split.parts.checkpoint_tensors import CheckpointTensors, PickledTensors, float_type
from torchdistpackage.split.parts.configuration import layers_of, num_layers_of, settle_attention
from torchdistpackage.split.parts.devices import parse_device_map
from torchdistpackage.split.parts.held_stage import CausalLMPart, empty_stage
from torchdistpackage.split.parts.metadata import COMPONENTS
from torchdistpackage.split.parts.registry import GENERIC, ModelRegistry

__all__ = ["ModelFactory"]


@final
class ModelFactory:
    """Makes the parts of saved models.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(home.name)
        >>> bottom, trunk, top = ModelFactory.create_split_models("gpt2", home.name, 1, 3)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> torch.equal(top(trunk(bottom(ids))).logits, model.eval()(ids).logits)
        True
    """

    @staticmethod
    def create_split_models(
        model_type: str,
        model_name_or_path: str | os.PathLike[str],
        split_point_1: int,
        split_point_2: int,
        device: torch.device | str | int = "cpu",
        device_map: str | Mapping[str, Any] | None = None,
        low_memory: bool = False,
        verbose: bool = False,
        storage_path: str | os.PathLike[str] | None = None,
        auto_save: bool = False,
        parts: Iterable[str] | None = None,
        *,
        config: Any = None,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> tuple[Any, Any, Any]:
        """Bottom, Trunk and Top of a saved model, in evaluation mode and in the types of the checkpoint.

        Args:
            model_type: `config.model_type` of the model, "auto" to take it from there, or "causal_lm"; or what a family
                of your own was registered as.
            model_name_or_path: A directory that `save_pretrained` wrote, or a name on the hub.
            split_point_1: First layer of the Trunk.
            split_point_2: First layer of the Top.
            device: Where to, for all parts.
            device_map: {"bottom": ..., "trunk": ..., "top": ...}, or "auto": by size and free memory. Parts move what
                comes in to where they are.
            low_memory: Refuse weights that cannot be read part by part (`pytorch_model.bin`); without it the whole
                model is loaded for those. safetensors are always read part by part, straight from the files.
            verbose: Show a progress bar.
            storage_path: Where auto_save writes.
            auto_save: Save each part as soon as it is there, to
                `storage_path/bottom/NAME_2-10_bottom.safetensors` and so on; see `load_split_model`.
            parts: Those that are wanted, such as ["trunk"]; the others are None, and nothing of them is read.
            config: Instead of the one in the directory, as with dropout changed; it is not written to.
            attn_implementation: As for `from_pretrained`.
            dtype: Of the weights, instead of the checkpoint's.
            torch_dtype: An older name of dtype.
            trust_remote_code: As for `from_pretrained`.

        Returns:
            (bottom, trunk, top).

        Raises:
            KeyError: Nobody knows the model_type.
            SplitError: Its registration is not complete, the split points do not leave a layer for each part, the
                model is of another kind, or there is no such device; also a ValueError.
            CheckpointError: Files or tensors are missing or broken.

        Example: see `ModelFactory`.
        """
        need_transformers()
        wanted = _wanted(parts)
        if model_type != "auto":
            ModelRegistry.need_complete(model_type)
        if auto_save and storage_path is None:
            raise SplitError("auto_save needs to know where to: pass storage_path='parts'")
        if not isinstance(model_name_or_path, (str, os.PathLike)):
            raise SplitError(f"model_name_or_path must be a directory or a name on the hub, got {model_name_or_path!r}")
        source = os.fspath(model_name_or_path)
        config = copy.deepcopy(config) if config is not None else _config(source, model_type, trust_remote_code)
        _need_same_kind(model_type, config, source)
        kind = config.model_type if model_type == "auto" else model_type
        ModelRegistry.need_complete(kind)
        points = _points(split_point_1, split_point_2, num_layers_of(config))
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        dtype = float_type(torch_dtype if dtype is None else dtype)
        options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}

        def sizes() -> dict[str, int]:
            return _sizes(config, points, dtype, trust_remote_code)

        devices = parse_device_map(device_map, device, sizes)
        name = Path(os.path.abspath(source) if os.path.isdir(source) else source).name
        made: dict[str, Any] = {}
        for component in _progress(wanted, verbose):
            of = ModelRegistry.get_model_class(kind, component)
            layers = layers_of(component, *_range(component, points))
            # Weights may be mapped from their files, and two parts must not have a tied one from one mapping.
            with _state(source, config, low_memory, options) as state:
                part = _make(of, state, config, layers, dtype, options)
            made[component] = part.to(devices[component]).eval()
            if auto_save:
                file = f"{name}_{points[0]}-{points[1]}_{component}"
                part.save_split_model(Path(os.fspath(storage_path), component, file))  # type: ignore[arg-type]
        return made.get("bottom"), made.get("trunk"), made.get("top")

    @staticmethod
    def list_available_models() -> list[str]:
        """The kinds of models that have a family of their own, and "causal_lm", which serves all others.

        Returned, not printed.

        Example:
            >>> {"causal_lm", "gpt2", "gemma", "qwen2"} <= {*ModelFactory.list_available_models()}
            True
        """
        return ModelRegistry.list_supported_models()


def _wanted(parts: Iterable[str] | None) -> list[str]:
    several = isinstance(parts, Iterable) and not isinstance(parts, str)
    wanted = set(COMPONENTS) if parts is None else {*parts} if several else {parts}
    if not wanted or wanted - set(COMPONENTS):
        raise SplitError(f"parts must be some of {list(COMPONENTS)}, got {parts!r}")
    return [part for part in COMPONENTS if part in wanted]


def _points(first: int, second: int, layers: int) -> tuple[int, int]:
    try:
        points = operator.index(first), operator.index(second)
    except TypeError:
        raise SplitError(f"split points are numbers of layers, got {first!r} and {second!r}") from None
    if not 0 < points[0] < points[1] < layers:
        third = max(1, layers // 3)
        advice = f"try {third}, {layers - third}" if layers >= 3 else "three parts need three"
        raise SplitError(
            f"split points must satisfy 0 < split_point_1 < split_point_2 < {layers}, the number of layers, so that "
            f"each part has one; got {points[0]}, {points[1]}: {advice}"
        )
    return points


def _range(component: str, points: Sequence[int]) -> tuple[int, int]:
    return {"bottom": (0, points[0]), "trunk": (points[0], points[1]), "top": (points[1], points[1])}[component]


def _config(source: str, model_type: str, trust_remote_code: bool) -> Any:
    """Of the directory; what transformers does not know is plain, for families of the user's own."""
    try:
        config = read_config(source, trust_remote_code)
    except CheckpointError:
        own = model_type in ModelRegistry.list_supported_models() and not _is_generic(model_type)
        if not own or not os.path.isfile(os.path.join(source, "config.json")):
            raise
        from transformers import PretrainedConfig

        try:
            fields, _ = PretrainedConfig.get_config_dict(source)
            found = PretrainedConfig.from_dict(fields)
        except Exception as error:  # no JSON, or no fields
            raise CheckpointError(f"config.json of {source} cannot be used: {' '.join(str(error).split())}") from error
        vars(found)["model_type"] = fields.get("model_type", model_type)
        return found
    return config


def _need_same_kind(model_type: str, config: Any, source: str) -> None:
    if _is_generic(model_type) and not _same_kind(model_type, config):
        raise SplitError(
            f"{source} holds a model of type {config.model_type!r}, not {model_type!r}: pass "
            f"model_type={config.model_type!r}, or 'auto'"
        )


def _is_generic(model_type: str) -> bool:
    """Whether the parts are those that the library brings along, which know what they can hold."""
    return model_type == "auto" or issubclass(ModelRegistry.get_model_class(model_type, "bottom"), CausalLMPart)


def _same_kind(model_type: str, config: Any) -> bool:
    kinds = {config.model_type, config.get_text_config().model_type}
    own = model_type in ModelRegistry.list_supported_models()
    classes = [ModelRegistry.get_model_class(model_type, part) for part in COMPONENTS] if own else []
    free = any(not getattr(of, "model_types", ()) for of in classes)  # GENERIC, or made by a user for any kind
    named = {kind for of in classes for kind in getattr(of, "model_types", ())}
    return model_type in ("auto", GENERIC) or free or bool(({model_type, f"{model_type}_text"} | named) & kinds)


def _make(of: type[BaseSplitModel], state: Any, config: Any, layers: dict[str, int], dtype: Any, options: Any) -> Any:
    """One part, by its family's own way."""
    if issubclass(of, CausalLMPart):
        options = {**options, **({} if dtype is None else {"dtype": dtype})}
    else:
        options = {}
        settle_attention(config)
    part = of.from_pretrained_split(state, config, **layers, **options)
    if not isinstance(part, BaseSplitModel):
        raise SplitError(
            f"{of.__name__}.from_pretrained_split returned {type(part).__name__}; it has to return the part, with its "
            "weights loaded"
        )
    if dtype is not None and not issubclass(of, CausalLMPart):
        part = part.to(dtype)
    return part


@contextmanager
def _state(source: str, config: Any, low_memory: bool, options: Any) -> Iterator[Mapping[str, Tensor]]:
    """The weights of the whole model, by name."""
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} holds quantized weights, which parts cannot be made of; split the originals")
    try:
        whole = without_weights(config, **options)
    except (ValueError, KeyError):  # a kind that transformers does not know
        whole = None
    if has_pickled_weights(source) and not low_memory:
        yield PickledTensors(source, whole)
        return
    with WeightFiles(source, getattr(config, "transformers_weights", None)) as files:
        yield CheckpointTensors(files, whole)


def _sizes(config: Any, points: tuple[int, int], dtype: Any, trust_remote_code: bool) -> dict[str, int]:
    """Bytes of each part; layers, where transformers does not know the model."""
    ranges = {"bottom": (0, points[0]), "trunk": points, "top": (points[1], num_layers_of(config))}
    found: dict[str, int] = {}
    for component, (start, end) in ranges.items():
        try:
            stage = empty_stage(config, start, end, dtype=dtype, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError):
            return {name: (stop - begin) * 2**30 for name, (begin, stop) in ranges.items()}
        found[component] = sum(tensor.numel() * tensor.element_size() for tensor in stage.state_dict().values())
    return found


def _progress(components: Sequence[str], verbose: bool) -> Iterable[str]:
    if not verbose:
        return components
    from transformers.utils.logging import tqdm

    found: Iterable[str] = tqdm(components, desc="parts")
    return found
