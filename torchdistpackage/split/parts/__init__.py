"""A language model physically split over parties: Bottom, Trunk and Top, each with its own weights and nothing else.

::

    bottom, trunk, top = ModelFactory.create_split_models("gpt2", "gpt2", split_point_1=2, split_point_2=10)
    logits = top(trunk(bottom(input_ids))).logits

=========================  ======================================================================
`base.py`                  what a part is; the classes that families derive from; `blocks.py` runs their layers
`causal_lm.py`             the family that serves every model which `split/causal_lm.py` can cut; `held_stage.py` is how
`gpt2.py` `gemma.py`       those that have a name of their own
`qwen2.py`
`registry.py`              kind of model -> its classes
`factory.py`               a saved model -> its parts; `devices.py` says where they go
`checkpoint_tensors.py`    a checkpoint as a state dict, read when it is asked for
`files.py`                 a part to disk and back; `metadata.py` is the file beside the weights
`checkpoint_split.py`      a checkpoint -> the files of its parts, without making them; `checkpoint_plan.py` says
                           what goes where, `safetensors_copy.py` moves the bytes
`configuration.py`         what a configuration says about layers
`core.py` `models/`        where SplitLearn, whose interface this is, has these classes
=========================  ======================================================================

In training each part is a stage of a pipeline of three ranks: `forward_backward` sends activations forward and
gradients back. The names below are loaded on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdistpackage.split.parts.base import BaseBottomModel, BaseSplitModel, BaseTopModel, BaseTrunkModel
    from torchdistpackage.split.parts.causal_lm import (
        CausalLMBottomModel,
        CausalLMTopModel,
        CausalLMTrunkModel,
        share_tied_weights,
    )
    from torchdistpackage.split.parts.checkpoint_split import PartFile, split_checkpoint, verify_part
    from torchdistpackage.split.parts.devices import place_parts
    from torchdistpackage.split.parts.factory import ModelFactory
    from torchdistpackage.split.parts.files import load_split_model
    from torchdistpackage.split.parts.gemma import GemmaBottomModel, GemmaTopModel, GemmaTrunkModel
    from torchdistpackage.split.parts.gpt2 import GPT2BottomModel, GPT2TopModel, GPT2TrunkModel
    from torchdistpackage.split.parts.qwen2 import Qwen2BottomModel, Qwen2TopModel, Qwen2TrunkModel
    from torchdistpackage.split.parts.registry import ModelRegistry

_HOME = {
    "base": "BaseBottomModel BaseSplitModel BaseTopModel BaseTrunkModel",
    "causal_lm": "CausalLMBottomModel CausalLMTopModel CausalLMTrunkModel share_tied_weights",
    "checkpoint_split": "PartFile split_checkpoint verify_part",
    "devices": "place_parts",
    "factory": "ModelFactory",
    "files": "load_split_model",
    "gemma": "GemmaBottomModel GemmaTopModel GemmaTrunkModel",
    "gpt2": "GPT2BottomModel GPT2TopModel GPT2TrunkModel",
    "qwen2": "Qwen2BottomModel Qwen2TopModel Qwen2TrunkModel",
    "registry": "ModelRegistry",
}
_FILE = {name: file for file, names in _HOME.items() for name in names.split()}

__all__ = [
    "BaseBottomModel",
    "BaseSplitModel",
    "BaseTopModel",
    "BaseTrunkModel",
    "CausalLMBottomModel",
    "CausalLMTopModel",
    "CausalLMTrunkModel",
    "GPT2BottomModel",
    "GPT2TopModel",
    "GPT2TrunkModel",
    "GemmaBottomModel",
    "GemmaTopModel",
    "GemmaTrunkModel",
    "ModelFactory",
    "ModelRegistry",
    "PartFile",
    "Qwen2BottomModel",
    "Qwen2TopModel",
    "Qwen2TrunkModel",
    "load_split_model",
    "place_parts",
    "share_tied_weights",
    "split_checkpoint",
    "verify_part",
]


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
