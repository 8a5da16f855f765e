"""Bottom, Trunk and Top: what every part of a physically split language model can do.

::

    client   Bottom   token ids ----> embeddings, layers 0 .. a-1        ----> hidden state
    server   Trunk    hidden state -> layers a .. b-1                    ----> hidden state
    client   Top      hidden state -> layers b .. n-1, final norm, head  ----> logits, loss

The forwards here are written in terms of the abstract methods, for families that a user brings along: embeddings,
positions, blocks, norm, head. The families of `causal_lm.py` answer the same methods, but run the model's own forward.
`files.py` saves and loads, `registry.py` knows the classes, `factory.py` makes all three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchdistpackage.errors import CheckpointError
from torchdistpackage.split.parts.blocks import cache_for, positions, through_blocks
from torchdistpackage.split.parts.configuration import need_layers, num_layers_of

if TYPE_CHECKING:
    import os

__all__ = [
    "BaseBottomModel",
    "BaseSplitModel",
    "BaseTopModel",
    "BaseTrunkModel",
]

Part = TypeVar("Part", bound="BaseSplitModel")


class BaseSplitModel(nn.Module, ABC):
    """A part of a language model that one party holds.

    Args:
        config: Of the whole model.
        start_layer: Index of its first layer in the whole model.
        end_layer: The index after its last one.

    Attributes:
        config: Of the whole model.
        start_layer: Index of its first layer.
        end_layer: The index after its last layer.
        num_layers: How many it has.

    Raises:
        SplitError: It would hold no layer, or one that the model does not have.

    Example:
        >>> from transformers import GPT2Config
        >>> from torchdistpackage.split.parts import GPT2TrunkModel
        >>> config = GPT2Config(n_embd=8, n_layer=6, n_head=2, vocab_size=10)
        >>> trunk = GPT2TrunkModel(config, start_layer=1, end_layer=4)
        >>> isinstance(trunk, BaseSplitModel), trunk.component, trunk.num_layers
        (True, 'trunk', 3)
        >>> trunk.num_parameters(), round(trunk.memory_footprint_mb(), 3)
        (2616, 0.01)
    """

    component: ClassVar[str] = ""

    def __init__(self, config: Any, start_layer: int, end_layer: int) -> None:
        super().__init__()
        need_layers(type(self).__name__, start_layer, end_layer, num_layers_of(config))
        self.config = config
        self.start_layer = start_layer
        self.end_layer = end_layer
        self.num_layers = end_layer - start_layer

    @abstractmethod
    def get_transformer_blocks(self) -> Iterable[nn.Module]:
        """Its layers in order."""

    @abstractmethod
    def prepare_attention_mask(self, attention_mask: Tensor | None, hidden_states: Tensor) -> Any:
        """What the layers get as `attention_mask`.

        Args:
            attention_mask: (rows, tokens): 1 where there is a token, 0 where there is padding; None for no padding.
            hidden_states: What the first layer gets, (rows, tokens, width).
        """

    @abstractmethod
    def get_layer_name_pattern(self) -> str:
        r"""A regular expression for the names of layers in a state dict, such as `\.h\.[0-9]+`."""

    @classmethod
    @abstractmethod
    def from_pretrained_split(
        cls: type[Part], full_state_dict: Mapping[str, Tensor], config: Any, **kwargs: Any
    ) -> Part:
        """The part with its weights out of those of the whole model.

        Args:
            full_state_dict: Name -> tensor. The factory gives a mapping that reads a tensor from its file when it is
                asked for, so take what belongs to the part and no more.
            config: Of the whole model.
            **kwargs: `end_layer` for a Bottom, `start_layer` and `end_layer` for a Trunk, `start_layer` for a Top.
        """

    def block_arguments(self, hidden_states: Tensor, position_ids: Tensor) -> Mapping[str, Any]:
        """More keyword arguments for every layer, such as `position_embeddings`; none unless a family says so.

        Args:
            hidden_states: What the first layer gets, (rows, tokens, width).
            position_ids: (rows, tokens).
        """
        return {}

    def num_parameters(self) -> int:
        """Elements of all parameters; one that has several names counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def memory_footprint_mb(self) -> float:
        """MiB of parameters and buffers, in the types that they have."""
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20

    def save_split_model(self, save_path: str | os.PathLike[str], save_metadata: bool = True) -> Path:
        """Writes the weights as safetensors and, next to them, what is needed to load them again.

        Args:
            save_path: Of the weights, `parts/bottom.safetensors`; the suffix is added where it is missing. In a
                directory the file is called after the component. The metadata goes to `parts/bottom_metadata.json`.
            save_metadata: False to write the weights only; then only `from_pretrained_split` reads them.

        Returns:
            The path of the weights.

        Raises:
            CheckpointError: The files cannot be written, or the part is on the meta device.

        Example: see `torchdistpackage.split.parts.load_split_model`.
        """
        from torchdistpackage.split.parts.files import save_part

        return save_part(self, save_path, save_metadata=save_metadata)

    @classmethod
    def load_split_model(
        cls: type[Part],
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | int = "cpu",
        dtype: torch.dtype | str | None = None,
        verify: bool = False,
    ) -> Part:
        """A part that was saved, in evaluation mode; see `torchdistpackage.split.parts.load_split_model`.

        Args:
            path: What `save_split_model` returned, or the same path that it was given.
            device: Where to.
            dtype: Of the floating tensors; None for that of the file.
            verify: Whether to compare the weights with the checksums in the metadata first.

        Raises:
            CheckpointError: Files are missing or broken, or hold a part of another class.
            SplitError: There is no such device or type.

        Example: see `torchdistpackage.split.parts.load_split_model`.
        """
        from torchdistpackage.split.parts.files import load_part

        part: Part = load_part(path, cls, device=device, dtype=dtype, verify=verify)
        return part

    @classmethod
    def _from_saved(cls, state: Mapping[str, Tensor], config: Any, own_names: bool, **layers: int) -> Any:
        """The part from its own file: under its own names, if it was saved as a part, else under the checkpoint's."""
        if not own_names:
            return cls.from_pretrained_split(state, config, **layers)
        part = cls(config, **layers)
        try:
            part.load_state_dict({name: state[name] for name in state}, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"the file does not fit {cls.__name__}: {error}") from error
        return part

    def _arrived(self, values: Any) -> Any:
        """Tensors, moved to where this part is: parts of one process may be on several devices."""
        device = next((parameter.device for parameter in self.parameters()), None)
        if device is None:
            return values
        return tree_map_only(Tensor, lambda tensor: tensor if tensor.device == device else tensor.to(device), values)

    def _through_blocks(
        self, hidden: Tensor, attention_mask: Any, position_ids: Tensor, past_key_values: Any, use_cache: bool | None
    ) -> Tensor:
        mask = self.prepare_attention_mask(attention_mask, hidden)
        arguments = {"attention_mask": mask, "position_ids": position_ids, "use_cache": bool(use_cache)}
        more = self.block_arguments(hidden, position_ids)
        return through_blocks(self.get_transformer_blocks(), hidden, past_key_values, {**arguments, **more})


class BaseBottomModel(BaseSplitModel):
    """Embeddings and the first layers; token ids go in.

    Args:
        config: Of the whole model.
        end_layer: The number of its layers.

    Example:
        >>> from transformers import GPT2Config
        >>> from torchdistpackage.split.parts import GPT2BottomModel
        >>> config = GPT2Config(n_embd=8, n_layer=6, n_head=2, vocab_size=10)
        >>> bottom = GPT2BottomModel(config, end_layer=2)
        >>> hidden, cache = bottom(torch.tensor([[1, 2, 3]]), use_cache=True)
        >>> bottom(torch.tensor([[4]]), past_key_values=cache).shape, cache.get_seq_length()
        (torch.Size([1, 1, 8]), 4)
    """

    component = "bottom"

    def __init__(self, config: Any, end_layer: int) -> None:
        super().__init__(config, 0, end_layer)

    @abstractmethod
    def get_embeddings(self) -> nn.Module:
        """The embedding of tokens."""

    @abstractmethod
    def apply_position_encoding(self, inputs_embeds: Tensor, position_ids: Tensor | None) -> Tensor:
        """What the first layer gets.

        Args:
            inputs_embeds: Embedded tokens, (rows, tokens, width).
            position_ids: (rows, tokens).
        """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        """Runs the part.

        Args:
            input_ids: (rows, tokens); with a cache only those that are new.
            attention_mask: (rows, tokens), with a cache of the tokens before, too; 0 where there is padding.
            position_ids: (rows, tokens); counted on from the cache when None.
            past_key_values: This part's cache, from an earlier call; it is written to.
            use_cache: Whether to return a cache, a new one if none is given.

        Returns:
            The hidden state, (rows, tokens, width); with use_cache a pair of it and the cache.
        """
        input_ids, attention_mask, position_ids = self._arrived((input_ids, attention_mask, position_ids))
        cache = cache_for(past_key_values, use_cache, (self.start_layer, self.end_layer))
        position_ids = positions(input_ids.shape, input_ids.device, cache) if position_ids is None else position_ids
        hidden = self.apply_position_encoding(self.get_embeddings()(input_ids), position_ids)
        hidden = self._through_blocks(hidden, attention_mask, position_ids, cache, use_cache)
        return (hidden, cache) if use_cache else hidden


class BaseTrunkModel(BaseSplitModel):
    r"""Layers from the middle; a hidden state goes in.

    Args:
        config: Of the whole model.
        start_layer: Index of its first layer.
        end_layer: The index after its last one.

    Example:
        >>> from types import SimpleNamespace
        >>> class MyTrunk(BaseTrunkModel):  # of a family that the library does not know
        ...     def __init__(self, config, start_layer, end_layer):
        ...         super().__init__(config, start_layer, end_layer)
        ...         self.h = nn.ModuleDict({str(n): nn.Linear(2, 2) for n in range(start_layer, end_layer)})
        ...     def get_transformer_blocks(self):
        ...         return self.h.values()
        ...     def prepare_attention_mask(self, attention_mask, hidden_states):
        ...         return None
        ...     def get_layer_name_pattern(self):
        ...         return r"h\.[0-9]+"
        ...     @classmethod
        ...     def from_pretrained_split(cls, full_state_dict, config, start_layer, end_layer):
        ...         part = cls(config, start_layer, end_layer)
        ...         part.load_state_dict({name: full_state_dict[name] for name in part.state_dict()})
        ...         return part
        >>> trunk = MyTrunk(SimpleNamespace(num_hidden_layers=6), 2, 5)
        >>> trunk(torch.zeros(1, 3, 2)).shape, list(trunk.state_dict())[0]
        (torch.Size([1, 3, 2]), 'h.2.weight')
    """

    component = "trunk"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Runs the part.

        Args:
            hidden_states: What the part before returned, (rows, tokens, width).
            attention_mask: As for the Bottom.
            past_key_values: This part's cache.
            use_cache: As for the Bottom.
            position_ids: As for the Bottom.

        Returns:
            The hidden state, (rows, tokens, width); with use_cache a pair of it and the cache.
        """
        hidden, attention_mask, position_ids = self._arrived((hidden_states, attention_mask, position_ids))
        cache = cache_for(past_key_values, use_cache, (self.start_layer, self.end_layer))
        position_ids = positions(hidden.shape, hidden.device, cache) if position_ids is None else position_ids
        hidden = self._through_blocks(hidden, attention_mask, position_ids, cache, use_cache)
        return (hidden, cache) if use_cache else hidden


class BaseTopModel(BaseSplitModel):
    """The last layers, the final norm and the head; logits come out.

    Args:
        config: Of the whole model.
        start_layer: Index of its first layer.

    Example:
        >>> from transformers import GPT2Config
        >>> from torchdistpackage.split.parts import GPT2TopModel
        >>> top = GPT2TopModel(GPT2Config(n_embd=8, n_layer=6, n_head=2, vocab_size=10), start_layer=4)
        >>> out = top(torch.zeros(1, 3, 8), labels=torch.tensor([[1, 2, 3]]))
        >>> out.logits.shape, out.loss.shape
        (torch.Size([1, 3, 10]), torch.Size([]))
    """

    component = "top"

    def __init__(self, config: Any, start_layer: int) -> None:
        super().__init__(config, start_layer, num_layers_of(config))

    @abstractmethod
    def get_final_norm(self) -> nn.Module | None:
        """The norm after the last layer; None where there is none."""

    @abstractmethod
    def get_lm_head(self) -> nn.Module:
        """Hidden state -> logits."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> Any:
        """Runs the part.

        Args:
            hidden_states: What the part before returned, (rows, tokens, width).
            attention_mask: As for the Bottom.
            labels: The token ids, (rows, tokens), -100 where nothing is to be learnt: each is predicted from those
                before it.
            past_key_values: This part's cache.
            use_cache: Whether to give a cache in the result.
            position_ids: As for the Bottom.

        Returns:
            transformers' `CausalLMOutputWithPast`: loss (a mean over predicted tokens), logits (rows, tokens,
            vocabulary), past_key_values.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden, attention_mask, labels, position_ids = self._arrived(
            (hidden_states, attention_mask, labels, position_ids)
        )
        cache = cache_for(past_key_values, use_cache, (self.start_layer, self.end_layer))
        position_ids = positions(hidden.shape, hidden.device, cache) if position_ids is None else position_ids
        hidden = self._through_blocks(hidden, attention_mask, position_ids, cache, use_cache)
        norm = self.get_final_norm()
        logits = self.get_lm_head()(hidden if norm is None else norm(hidden))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
