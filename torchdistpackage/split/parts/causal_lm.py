"""Bottom, Trunk and Top of every model that `split/causal_lm.py` can cut, whatever its family.

Each runs the model's own forward for its layers (`held_stage.py`): masks, positions, scaled embeddings, soft caps,
router losses and key-value caches are those of the model.

Bottom and Top of a tied model have a copy each of the tied weight, because they belong to different processes. There
`forward_backward` adds up the gradients of both; in one process `share_tied_weights` makes the two one again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.stage_forward import LastOutput
from torchdistpackage.split.decoder.stand_in import Called, shown
from torchdistpackage.split.parts.base import BaseBottomModel, BaseTopModel, BaseTrunkModel
from torchdistpackage.split.parts.configuration import num_layers_of
from torchdistpackage.split.parts.held_stage import CausalLMPart
from torchdistpackage.split.parts.registry import GENERIC, ModelRegistry
from torchdistpackage.split.ties import ties_in

__all__ = ["CausalLMBottomModel", "CausalLMTopModel", "CausalLMTrunkModel", "share_tied_weights"]

_logger = logging.getLogger(__name__)


@ModelRegistry.register(GENERIC, "bottom")
class CausalLMBottomModel(CausalLMPart, BaseBottomModel):
    """Embeddings and the first layers of any decoder-only model; see `BaseBottomModel` for the arguments of a call.

    Args:
        config: Of the whole model.
        end_layer: The number of its layers.
        stage: The stage that it holds; None for new weights.

    Raises:
        SplitError: The model cannot be cut so.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=10
        ... )
        >>> bottom = CausalLMBottomModel(config, end_layer=1)
        >>> bottom(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: Any, end_layer: int, *, stage: nn.Module | None = None) -> None:
        super().__init__(config, end_layer)
        self._hold(stage)
        if self.sends_token_ids:
            _logger.warning(
                "layers of a %s look at token ids, so that the Bottom sends them on: the Trunk sees the text",
                type(self.stage).__name__,
            )

    @classmethod
    def from_pretrained_split(  # type: ignore[override]
        cls,
        full_state_dict: Mapping[str, Tensor],
        config: Any,
        end_layer: int = 2,
        *,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> Any:
        """The part with its weights, in evaluation mode; the whole model's stay as they are.

        Args:
            full_state_dict: `whole.state_dict()`.
            config: `whole.config`.
            end_layer: The number of its layers.
            dtype: Of the weights; None to keep theirs.
            trust_remote_code: As for `from_pretrained`.

        Raises:
            CheckpointError: Tensors are missing or of another shape.
            SplitError: The model cannot be cut so.
        """
        return cls(
            config, end_layer, stage=cls._filled(full_state_dict, config, 0, end_layer, dtype, trust_remote_code)
        )

    def get_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        with self._alone():
            found: nn.Module = cast(Any, self.stage).get_input_embeddings()
        return found

    def apply_position_encoding(self, inputs_embeds: Tensor, position_ids: Tensor | None) -> Tensor:
        """What the model gives to its first layer: with rotary positions, which act in the layers, nothing is added.

        Args:
            inputs_embeds: Embedded tokens, (rows, tokens, width).
            position_ids: (rows, tokens).
        """
        embed = self.get_embeddings()
        name = next(name for name, module in self.stage.named_modules() if module is embed)
        ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
        answer: Callable[..., Any] = lambda *args, **kwargs: inputs_embeds  # noqa: E731
        with self._alone(), shown(self.stage, {name: Called(embed, answer)}):
            arguments = self._first_call(ids, position_ids=position_ids)
        hidden: Tensor = next(iter(arguments.values()))
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `BaseBottomModel.forward`; `kwargs` are further arguments of the model's own forward.

        A few families send more than the hidden state: then it is a dict, which the next part takes as it is.
        """
        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        hidden, cache = self._run(input_ids, past_key_values, use_cache, arguments)
        return (hidden, cache) if use_cache else hidden


@ModelRegistry.register(GENERIC, "trunk")
class CausalLMTrunkModel(CausalLMPart, BaseTrunkModel):
    """Layers from the middle of any decoder-only model; see `BaseTrunkModel`.

    Args:
        config: Of the whole model.
        start_layer: Index of its first layer.
        end_layer: The index after its last one.
        stage: The stage that it holds; None for new weights.

    Raises:
        SplitError: The model cannot be cut so.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=10
        ... )
        >>> trunk = CausalLMTrunkModel(config, start_layer=1, end_layer=3)
        >>> trunk(torch.zeros(1, 3, 8)).shape, len(trunk.get_transformer_blocks())
        (torch.Size([1, 3, 8]), 2)
    """

    def __init__(self, config: Any, start_layer: int, end_layer: int, *, stage: nn.Module | None = None) -> None:
        super().__init__(config, start_layer, end_layer)
        self._hold(stage)

    @classmethod
    def from_pretrained_split(  # type: ignore[override]
        cls,
        full_state_dict: Mapping[str, Tensor],
        config: Any,
        start_layer: int = 2,
        end_layer: int = 10,
        *,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> Any:
        """As `CausalLMBottomModel.from_pretrained_split`, for the layers start_layer .. end_layer-1."""
        stage = cls._filled(full_state_dict, config, start_layer, end_layer, dtype, trust_remote_code)
        return cls(config, start_layer, end_layer, stage=stage)

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `BaseTrunkModel.forward`; `kwargs` are further arguments of the model's own forward."""
        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        hidden, cache = self._run(hidden_states, past_key_values, use_cache, arguments)
        return (hidden, cache) if use_cache else hidden


@ModelRegistry.register(GENERIC, "top")
class CausalLMTopModel(CausalLMPart, BaseTopModel):
    """The last layers, norm and head of any decoder-only model; see `BaseTopModel`.

    Args:
        config: Of the whole model.
        start_layer: Index of its first layer.
        stage: The stage that it holds; None for new weights.

    Raises:
        SplitError: The model cannot be cut so.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=10
        ... )
        >>> top = CausalLMTopModel(config, start_layer=3)
        >>> top(torch.zeros(1, 3, 8)).logits.shape, type(top.get_final_norm()).__name__
        (torch.Size([1, 3, 10]), 'LlamaRMSNorm')
    """

    def __init__(self, config: Any, start_layer: int, *, stage: nn.Module | None = None) -> None:
        super().__init__(config, start_layer)
        self._hold(stage)

    @classmethod
    def from_pretrained_split(  # type: ignore[override]
        cls,
        full_state_dict: Mapping[str, Tensor],
        config: Any,
        start_layer: int = 10,
        *,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
    ) -> Any:
        """As `CausalLMBottomModel.from_pretrained_split`, for the layers from start_layer on."""
        end = num_layers_of(config)
        stage = cls._filled(full_state_dict, config, start_layer, end, dtype, trust_remote_code)
        return cls(config, start_layer, stage=stage)

    def get_final_norm(self) -> nn.Module | None:
        """The norm after the last layer; None where there is none, or it is in the head."""
        return next((module for module in self._behind() if "norm" in type(module).__name__.lower()), None)

    def get_lm_head(self) -> nn.Module:
        """Hidden state -> logits; what a few families do between norm and head (`project_out`, a cap) is not in it."""
        with self._alone():
            found: nn.Module = cast(Any, self.stage).get_output_embeddings()
        return next((module for module in self._behind() if found in module.modules()), found)

    def _behind(self) -> list[nn.Module]:
        """What runs after the last layer."""
        layout = self._record.layout
        with self._alone():
            return [self.stage.get_submodule(name) for name in layout.row[layout.num_layers :]]

    def forward(
        self,
        hidden_states: Any,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `BaseTopModel.forward`, with the model's own loss; `kwargs` are further arguments of its forward."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        arguments = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels, **kwargs}
        output, cache = self._run(hidden_states, past_key_values, use_cache, arguments)
        assert isinstance(output, LastOutput)
        return CausalLMOutputWithPast(
            loss=output.loss,
            logits=output.logits,
            past_key_values=cache if use_cache else None,
        )


def share_tied_weights(bottom: nn.Module, top: nn.Module) -> list[str]:
    """Makes weights that the whole model ties one parameter again, where one process has both Bottom and Top.

    Gradients of both ends then add up in it, as in the whole model. Call it before making an optimizer.

    Args:
        bottom: Its value is kept.
        top: Of the same model, on the same device.

    Returns:
        The names, in the Top, that are shared now; none for a model without ties.

    Raises:
        SplitError: The two are on different devices, or their copies are of different shapes.

    Example:
        >>> from transformers import GPT2Config  # its head is its embedding
        >>> config = GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=10)
        >>> bottom, top = CausalLMBottomModel(config, 1), CausalLMTopModel(config, 3)
        >>> share_tied_weights(bottom, top)
        ['lm_head.weight']
        >>> top.get_lm_head().weight is bottom.get_embeddings().weight
        True
    """
    kept = {tie.names: tie.parameter for tie in ties_in(bottom).values()}
    shared: list[str] = []
    for name, tie in ties_in(top).items():
        ours, theirs = kept.get(tie.names), tie.parameter
        if ours is None or theirs is None:
            continue
        if ours.device != theirs.device or ours.shape != theirs.shape:
            raise SplitError(
                f"{name} is {tuple(theirs.shape)} on {theirs.device} and its other end {tuple(ours.shape)} on "
                f"{ours.device}; both ends have to be on one device"
            )
        path, _, attribute = name.rpartition(".")
        setattr(top.get_submodule(path), attribute, ours)
        shared.append(name)
    return shared
