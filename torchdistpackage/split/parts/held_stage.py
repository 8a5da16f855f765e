"""What Bottom, Trunk and Top of the library's own families have in common: each holds a stage of `split/causal_lm.py`.

The part and its stage share one set of modules, under the names of the whole model::

    CausalLMBottomModel ----+
                            +---->  model.embed_tokens, model.layers.0, model.layers.1
    stage (LlamaForCausalLM)+
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from torchdistpackage.errors import CheckpointError, PipelineError, SplitError
from torchdistpackage.split.causal_lm import new_cache, split_causal_lm
from torchdistpackage.split.decoder.filling import GivenTensors, WeightSource, fill_stage, without_progress_bars
from torchdistpackage.split.decoder.materialize import materialize_stages
from torchdistpackage.split.decoder.part import HELD
from torchdistpackage.split.decoder.pretrained import without_weights
from torchdistpackage.split.decoder.stage_forward import STAGE, Stage, run_stage
from torchdistpackage.split.decoder.weight_files import listed
from torchdistpackage.split.parts.base import BaseSplitModel
from torchdistpackage.split.parts.blocks import claim_cache
from torchdistpackage.split.parts.checkpoint_tensors import CheckpointTensors, PickledTensors, float_type
from torchdistpackage.split.parts.configuration import layers_of, need_layers, num_layers_of
from torchdistpackage.split.parts.registry import GENERIC
from torchdistpackage.split.pipe import expect_ends, note_end_run, put_aside, put_end_in_use
from torchdistpackage.split.ties import record_ends, ties_in

if TYPE_CHECKING:
    from threading import RLock

__all__ = ["CausalLMPart", "empty_stage"]


@torch.inference_mode(mode=False)  # a server may load within it, and its structure is looked at by means of autograd
def empty_stage(config: Any, start: int, end: int, *, dtype: Any = None, trust_remote_code: bool = False) -> nn.Module:
    """The layers start .. end-1 of a model, on the meta device, with what is before or behind them at its ends.

    Args:
        config: Of the whole model.
        start: First layer.
        end: After the last layer.
        dtype: Of the floating tensors; None for that of the configuration.
        trust_remote_code: As for `from_pretrained`.

    Returns:
        A stage of `split_causal_lm`, which knows what it shares with the other end of the model.

    Raises:
        SplitError: The model cannot be cut so, or it would be all of it.
    """
    total = num_layers_of(config)
    points = [point for point in (start, end) if 0 < point < total]
    if not points:
        raise SplitError(f"the layers {start}..{end - 1} are all {total} of the model; leave some to another part")
    whole = without_weights(config, dtype, None, trust_remote_code)
    index = 0 if start == 0 else 1
    stage = split_causal_lm(whole, len(points) + 1, [index], cut_points=points)[index]
    put_aside(stage)  # how many parts there are is not known: see `note_end_run`
    record_ends(stage)
    vars(stage)[_WHOLE] = whole
    return stage


expect_ends()

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # not in the part, which can be copied
_locks_made = threading.Lock()
_WHOLE = "_torchdistpackage_whole"  # in a stage without weights: the model on the meta device that it was cut from


class CausalLMPart(BaseSplitModel):
    """What the three parts have in common.

    Attributes:
        model_types: What `config.model_type` may be; anything when empty.
    """

    model_types: ClassVar[tuple[str, ...]] = ()

    @property
    def stage(self) -> nn.Module:
        """The part as an object of the model's own class, on the same modules."""
        return cast(nn.Module, vars(self)[HELD])

    @property
    def sends_token_ids(self) -> bool:
        """Whether layers of the model look at token ids, so that these go from part to part with the hidden state."""
        return self._record.layout.reads_ids

    @property
    def _record(self) -> Stage:
        return cast(Stage, vars(self.stage)[STAGE])

    def train(self, mode: bool = True) -> Any:
        """Puts the part into training mode, or out of it."""
        super().train(mode)
        if HELD in vars(self):
            self.stage.training = mode
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled are the class, the configuration and the weights; the stage is made anew where it is loaded."""
        layers = layers_of(self.component, self.start_layer, self.end_layer)
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        return _unpickled, (type(self), self.config, layers, dict(self.state_dict()), frozen, self.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        if ties_in(made.stage):
            put_end_in_use(made.stage, 0 if made._record.first else -1)
        return made

    def get_transformer_blocks(self) -> nn.ModuleList:
        """Its layers in order."""
        with self._alone():
            layers = self.stage.get_submodule(self._record.layout.skeleton.layers)
        return nn.ModuleList(layers.values())  # type: ignore[operator]

    def get_layer_name_pattern(self) -> str:
        r"""Such as `\.h\.[0-9]+`: what names of layers have in common."""
        return rf"\.{re.escape(self._record.layout.skeleton.layers.rpartition('.')[2])}\.[0-9]+"

    def prepare_attention_mask(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Any:
        """The mask that the model makes for the first layer of this part; None where it leaves that to the kernel.

        Args:
            attention_mask: (rows, tokens); None for no padding.
            hidden_states: (rows, tokens, width).
        """
        x: Tensor = hidden_states
        if self._record.first:
            x = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        return self._first_call(x, attention_mask=attention_mask).get("attention_mask")

    def _hold(self, stage: nn.Module | None, *, trust_remote_code: bool = False) -> None:
        """Takes the modules of a stage as its own; a new one with first values where none is given."""
        self._check_kind(self.config)
        if stage is None:
            stage = empty_stage(self.config, self.start_layer, self.end_layer, trust_remote_code=trust_remote_code)
            vars(stage).pop(_WHOLE)
            materialize_stages({0: stage})
        for space in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[space] = vars(stage)[space]  # one dictionary for both, whoever changes it
        vars(self)[HELD] = stage
        if ties_in(stage):
            put_end_in_use(stage, 0 if self._record.first else -1)
        self.training = stage.training

    @classmethod
    def _check_kind(cls, config: Any) -> None:
        kind = getattr(config, "model_type", None)
        if cls.model_types and kind not in cls.model_types:
            raise SplitError(
                f"{cls.__name__} is for {' or '.join(cls.model_types)}, and the configuration is one of {kind!r}: use "
                f"model_type={kind!r}, or {GENERIC!r} for any"
            )

    @classmethod
    def _filled(
        cls, state: Mapping[str, Tensor], config: Any, start: int, end: int, dtype: Any, trust_remote_code: bool
    ) -> nn.Module:
        """A stage with the weights of a state dict, in evaluation mode."""
        with torch.inference_mode(mode=False):
            return cls._filled_for_training(state, config, start, end, dtype, trust_remote_code)

    @classmethod
    def _filled_for_training(
        cls, state: Mapping[str, Tensor], config: Any, start: int, end: int, dtype: Any, trust_remote_code: bool
    ) -> nn.Module:
        cls._check_kind(config)
        need_layers(cls.__name__, start, end, num_layers_of(config))
        types = float_type(dtype) or _float_type(state, config)
        stage = empty_stage(config, start, end, dtype=types, trust_remote_code=trust_remote_code)
        with without_progress_bars():
            fill_stage(stage, vars(stage).pop(_WHOLE), _source(state), types, trust_remote_code)
        if float_type(dtype) is None and not _of_whole(state):
            _keep_types(stage, state)
        return stage

    @classmethod
    def _from_saved(cls, state: Mapping[str, Tensor], config: Any, own_names: bool, **layers: int) -> Any:
        part = cls.from_pretrained_split(state, config, **layers)
        if own_names and (foreign := state.keys() - part.state_dict().keys()):
            raise CheckpointError(f"the file holds {listed(foreign)}, which such a part does not have")
        return part

    def _run(self, x: Any, past_key_values: Any, use_cache: bool | None, arguments: dict[str, Any]) -> Any:
        """(What the stage gives, the cache)."""
        x, arguments = self._arrived((x, {name: value for name, value in arguments.items() if value is not None}))
        self._need_known(arguments)
        if past_key_values is None and use_cache:
            past_key_values = new_cache(self.stage)
        if past_key_values is not None:
            claim_cache(past_key_values, (self.start_layer, self.end_layer))
            arguments["past_key_values"] = past_key_values
            if use_cache is not False and "use_cache" in self._record.layout.switches:
                arguments["use_cache"] = True
        note_end_run(self.stage)
        with self._alone():
            return run_stage(self.stage, x, arguments), past_key_values

    def _need_known(self, arguments: Mapping[str, Any]) -> None:
        """Refuses what looks like a slip of the pen: most forwards take any name, and take no notice of it."""
        known = inspect.signature(type(self.stage)._whole_forward).parameters.keys() | {"position_ids", "labels"}  # type: ignore[attr-defined]
        for name in arguments.keys() - known:
            if near := difflib.get_close_matches(name, known, 1, cutoff=0.8):
                raise PipelineError(
                    f"{name!r} is no argument of {type(self.stage).__name__}; did you mean {near[0]!r}?"
                )

    def _alone(self) -> RLock:
        """Held while the stage runs: stand-ins are in its modules then, and a server may have several threads."""
        with _locks_made:
            return _locks.setdefault(self.stage, threading.RLock())

    def _first_call(self, x: Any, **arguments: Any) -> dict[str, Any]:
        """The arguments, by name, with which the model calls the first layer of this part; the layer does not run."""
        seen: list[dict[str, Any]] = []

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
            seen.append({**bound, **bound.get("kwargs", {})})
            raise _Seen

        with self._alone():
            handle = self.get_transformer_blocks()[0].register_forward_pre_hook(note, with_kwargs=True)
            try:
                self._run(x, None, None, arguments)
            except _Seen:
                return seen[0]
            finally:
                handle.remove()
        raise PipelineError(f"{type(self.stage).__name__} does not call its layer {self.start_layer}")


def _unpickled(
    of: type[Any],
    config: Any,
    layers: Mapping[str, int],
    state: Mapping[str, Tensor],
    frozen: list[str],
    training: bool,
) -> Any:
    part = of.from_pretrained_split(state, config, **layers)
    for name in frozen:
        part.get_parameter(name).requires_grad_(False)
    return part.train(training)


class _Seen(Exception):
    """What was to be seen was seen."""


def _source(state: Mapping[str, Tensor]) -> WeightSource:
    if isinstance(state, CheckpointTensors):
        return state.files
    return GivenTensors(state, state.name) if isinstance(state, PickledTensors) else GivenTensors(state)


def _of_whole(state: Mapping[str, Tensor]) -> bool:
    """Whether it is a checkpoint of a whole model, whose configuration says of what type the weights are to be."""
    return isinstance(state, PickledTensors) or (isinstance(state, CheckpointTensors) and state.of_whole)


def _float_type(state: Mapping[str, Tensor], config: Any) -> torch.dtype:
    """The type of the weights: of a checkpoint what `from_pretrained` takes, else what they have."""
    if _of_whole(state) and (said := float_type(getattr(config, "dtype", None))):
        return said
    if isinstance(state, CheckpointTensors):
        return state.files.float_dtype()
    return next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)


def _keep_types(stage: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives tensors the types and strides that they have in the state: the loader knows one type for all.

    Kernels round in another way where strides are others.
    """
    for name, tensor in stage.state_dict(keep_vars=True).items():
        if name not in state or not tensor.is_floating_point():
            continue
        if isinstance(state, CheckpointTensors):
            same = state.dtype(name) == tensor.dtype
        else:
            same = state[name].dtype == tensor.dtype and state[name].stride() == tensor.stride()
        if not same:
            tensor.data = state[name].detach().clone()
