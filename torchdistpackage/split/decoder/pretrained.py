"""Stages from a Hugging Face directory: a process makes and reads its own stages only, never the whole model.

::

    config.json  -->  the model on the meta device  -->  split_causal_lm  -->  part of stage 2, no weights
    shards       -->  the tensors of stage 2        ------------------------>  part of stage 2

Names and layouts in the files are not those of the modules (the experts of a mixture are single there and stacked in
the model, old files lack a prefix), and each version of transformers knows more of these. So transformers' own
`from_pretrained` does the loading (`filling.py`): it gets a dict of tensors that are still in their files
(`weight_files.py`), and reads those that the part has. `pretrained_saving.py` is the way back.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.causal_lm import split_causal_lm
from torchdistpackage.split.decoder.filling import fill_stage
from torchdistpackage.split.decoder.weight_files import WeightFiles, find, need_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["load_stages", "read_config", "without_weights"]


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
    cut_points: Sequence[int] | None = None,
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
        cut_points: As for `split_causal_lm`.
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
        >>> import tempfile
        >>> from transformers import AutoModelForCausalLM, GPT2Config
        >>> home = tempfile.TemporaryDirectory()
        >>> model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10))
        >>> model.save_pretrained(home.name)
        >>> part = load_stages(home.name, 2, [1])[1]
        >>> list(part.transformer.h), torch.equal(part.lm_head.weight, model.lm_head.weight)
        (['2', '3'], True)
    """
    need_transformers()
    source = os.fspath(directory)
    config = read_config(source, trust_remote_code) if config is None else config
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{source} holds quantized weights, which stages cannot be made of; load the originals")
    with WeightFiles(source, getattr(config, "transformers_weights", None)) as files:
        if dtype in (None, "auto"):
            dtype = getattr(config, "dtype", None) or files.float_dtype()
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        whole = without_weights(config, dtype, attn_implementation, trust_remote_code)
        parts = split_causal_lm(
            whole,
            num_stages,
            stages,
            input_weight=input_weight,
            output_weight=output_weight,
            cut_points=cut_points,
            module_names=module_names,
        )
        ready: list[nn.Module] = []
        for part in parts.values():
            fill_stage(part, whole, files, dtype, trust_remote_code)
            ready.append(part)
            if device is not None:
                for each in ready:  # those before, too: a module that two parts share was loaded anew
                    each.to(device)
    return parts


def read_config(source: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a directory, or of a model on the hub.

    Raises:
        CheckpointError: There is none, or transformers does not know its kind.
    """
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
    except Exception as error:  # values that cannot be have an error of their own in transformers
        reason = " ".join(str(error).split())  # it is a paragraph
        raise CheckpointError(f"config.json of {source} cannot be used: {reason}") from error


def without_weights(
    config: Any, dtype: Any = None, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The whole causal language model of a configuration, on the meta device."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    asked = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    config = copy.deepcopy(config)  # it may be the user's, and is written to
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **asked)
    model.tie_weights()  # the first versions of transformers 5 do not do that on the meta device
    return model
