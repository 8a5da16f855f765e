"""Stages from a Hugging Face directory: a process makes and reads its own stages only, never the whole model.

::

    config.json  -->  the model on the meta device  -->  split_causal_lm  -->  part of stage 2, no weights
    shards       -->  the tensors of stage 2        ------------------------>  part of stage 2

Names and layouts in the files are not those of the modules (the experts of a mixture are single there and stacked in
the model, old files lack a prefix), and each version of transformers knows more of these. So transformers' own
`from_pretrained` does the loading: it is asked of a class that gives out the part where it wants to make a model, and
gets a dict of tensors that are still in their files (`weight_files.py`); of these it reads those that the part has.
`pretrained_saving.py` is the way back.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.weight_files import WeightFiles, find, listed, need_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["load_stages"]

_logger = logging.getLogger(__name__)


def load_stages(
    directory: str | os.PathLike[str],
    num_stages: int,
    stages: Sequence[int] | None = None,
    *,
    config: PretrainedConfig | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    input_weight: float = 1,
    output_weight: float = 1,
    module_names: Sequence[Sequence[str]] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> dict[int, nn.Module]:
    """Makes stages of a causal language model, and reads their weights, and no others, from where it was saved.

    Needs transformers and safetensors. As after `from_pretrained` the parts are in evaluation mode. A head that is tied
    to the embedding is read on both stages. Weights that the model does not know are left alone with a warning in the
    log.

    Args:
        directory: Where `save_pretrained` or `write_index` wrote, or a name on the hub: of that only the files that
            these stages need are fetched.
        num_stages: Of the pipeline.
        stages: The wanted ones; all when None.
        config: Instead of the one in the directory.
        dtype: Of the weights; None or "auto" for what the configuration says, else what the files have.
        device: Where to put the parts; the CPU when None. They go through the memory of the host one by one.
        input_weight: As for `split_causal_lm`.
        output_weight: As for `split_causal_lm`.
        module_names: As for `split_causal_lm`.
        attn_implementation: As for `from_pretrained`.
        trust_remote_code: As for `from_pretrained`.

    Returns:
        Stage -> part, as `split_causal_lm` makes them.

    Raises:
        CheckpointError: The directory has no configuration or no safetensors files, they cannot be read, tensors are
            missing or of another shape, or the weights are quantized; the message names files and tensors.
        SplitError: The model cannot be cut as asked.
        ModuleNotFoundError: transformers or safetensors is not installed; the message names the extra.

    Example:
        >>> parts = load_stages("Qwen/Qwen3-8B", 4, [2])  # doctest: +SKIP
        >>> parts[2].model.layers  # doctest: +SKIP
    """
    need_transformers()
    source = os.fspath(directory)
    config = _configuration(source, trust_remote_code) if config is None else config
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} holds quantized weights, which stages cannot be made of; load the originals")
    with WeightFiles(source, getattr(config, "transformers_weights", None)) as files:
        if dtype in (None, "auto"):
            dtype = getattr(config, "dtype", None) or files.float_dtype()
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        whole = _without_weights(config, dtype, attn_implementation, trust_remote_code)
        parts = split_causal_lm(
            whole,
            num_stages,
            stages,
            input_weight=input_weight,
            output_weight=output_weight,
            module_names=module_names,
        )
        ready: list[nn.Module] = []
        for part in parts.values():
            _fill(part, whole, files, dtype, trust_remote_code)
            ready.append(part)
            if device is not None:
                for each in ready:  # those before, too: a module that two parts share was loaded anew
                    each.to(device)
    return parts


def _configuration(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if os.path.exists(source) and not os.path.isdir(source):
        raise CheckpointError(f"{source} is a file; give the directory that holds config.json")
    if find(source, "config.json") is None:
        raise CheckpointError(
            f"{source} has no config.json, so it is not a directory that save_pretrained wrote"
            if os.path.isdir(source)
            else f"{source} is not a directory, and no config.json of that name is on the hub or in its cache"
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # it is a paragraph
        raise CheckpointError(f"config.json of {source} cannot be used: {reason}") from error


def _without_weights(config: Any, dtype: Any, attn_implementation: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    asked = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = copy.deepcopy(config)  # it may be the user's, and is written to
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **asked)
    model.tie_weights()  # the first versions of transformers 5 do not do that on the meta device
    return model


def _fill(part: Any, whole: Any, files: WeightFiles, dtype: Any, trust_remote_code: bool) -> None:
    """Loads a part by `from_pretrained` of its class."""
    # Python does not call __init__ when __new__ returns an object of another class
    loader = type(type(part).__name__, (type(part),), {"__new__": lambda cls, *args, **kwargs: part})
    with _with_tied_partners(part, whole), _without_report():
        for module in part.modules():  # a module that two parts share counts as done after the first
            vars(module).pop("_is_hf_initialized", None)
        try:
            _, info = loader.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=whole.config,
                state_dict=files.tensors(),
                dtype=dtype,
                generation_config=_generation_config(files.source),
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # they are reported below, with their names
                output_loading_info=True,
            )
        except Exception as error:
            files.check()
            raise CheckpointError(f"{files.source} cannot be loaded as {type(part).__name__}: {error}") from error
        files.check()
        _check(part, whole, info, files.source)


def _check(part: Any, whole: Any, info: Mapping[str, Any], source: str) -> None:
    """Raises unless all is loaded; a warning names weights that no stage knows."""
    model = type(part).__name__
    if missing := set(info["missing_keys"]):
        raise CheckpointError(f"{source} does not hold {listed(missing)} of {model}; is it of this model, and whole?")
    if wrong := {name: (tuple(there), tuple(here)) for name, there, here in info["mismatched_keys"]}:
        shapes = [f"{name} is {there} in the files and {here} in {model}" for name, (there, here) in wrong.items()]
        raise CheckpointError(f"{source} does not fit its config.json: {listed(shapes)}")
    prefix = f"{whole.base_model_prefix}."  # files of a base model lack it
    known = {name.removeprefix(prefix) for name in whole.state_dict()}
    if unknown := {name for name in info["unexpected_keys"] if name.removeprefix(prefix) not in known}:
        _logger.warning("%s holds weights that %s does not have: %s", source, model, listed(unknown))


@contextmanager
def _with_tied_partners(part: Any, whole: Any) -> Iterator[None]:
    """Lends a part the other ends of its ties while it is loaded.

    A tied weight is in the files under one of its names. Which one, and whether both are there and equal, is then
    decided by transformers, with all names at hand; an embedding next to its tied head costs no memory.
    """
    ties = getattr(whole, "all_tied_weights_keys", {})
    own = set(part.state_dict())
    near = {target: kept for target, kept in ties.items() if target in own or kept in own}
    lent: list[tuple[nn.Module, str, bool]] = []
    for name in sorted({*near, *near.values()} - own):
        parent, steps = part, name.split(".")
        for depth, step in enumerate(steps[:-1]):
            if getattr(parent, step, None) is None:
                lent.append((parent, step, step in parent._modules))
                parent.add_module(step, whole.get_submodule(".".join(steps[: depth + 1])))
            parent = parent.get_submodule(step)
    for target in near:  # the loader ties them when it knows which are there
        path, _, attribute = target.rpartition(".")
        owner = part.get_submodule(path)
        setattr(owner, attribute, nn.Parameter(torch.empty_like(getattr(owner, attribute), device="meta")))
    part.all_tied_weights_keys = dict(near)
    try:
        yield
        if untied := near.keys() - part.all_tied_weights_keys.keys():
            pairs = [f"{name} to {near[name]}" for name in untied]
            raise CheckpointError(
                f"the configuration of {type(part).__name__} ties {listed(pairs)}, but the files hold different values "
                "of the two; pass config= with tie_word_embeddings=False"
            )
    finally:
        part.all_tied_weights_keys = dict(ties)
        for parent, step, known in lent:
            if known:
                parent._modules[step] = None
            else:
                del parent._modules[step]


@contextmanager
def _without_report() -> Iterator[None]:
    """Keeps from the log the table in which transformers calls the other stages' weights unexpected."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _generation_config(source: str) -> Any:
    from transformers import GenerationConfig

    return None if find(source, "generation_config.json") is None else GenerationConfig.from_pretrained(source)
