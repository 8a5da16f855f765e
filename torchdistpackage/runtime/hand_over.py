"""A result that goes on to another stage of the same rank: as it is, without a copy.

The two stages share memory, as the layers of a plain model do. What a stage changes in place after it has handed it on
would reach the next stage changed, if that runs later; autograd refuses that for what it needs, `take` for the rest.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.layout import Layout, leaf_key
from torchdistpackage.runtime.message import Message
from torchdistpackage.runtime.stage import Output

__all__ = ["HandOver", "version_of"]


class HandOver(NamedTuple):
    """A message that waits on this rank.

    Attributes:
        message: What the next stage would have received.
        versions: How often each of its tensors had been changed in place.
    """

    message: Message
    versions: list[int]

    @classmethod
    def of(cls, result: Output | None, rows: int, *, training: bool) -> HandOver:
        """Hands a result on."""
        if result is None:
            return cls(Message(None, [], rows), [])
        keys = tuple(leaf_key(leaf, training=training) for leaf in result.leaves)
        tensors = [leaf.detach() for leaf in result.leaves if isinstance(leaf, Tensor)]
        layout = Layout(result.spec, keys, skips=result.skips)
        return cls(Message(layout, tensors, rows), [version_of(tensor) for tensor in tensors])

    def take(self, source: int, stage: int) -> Message:
        """The message.

        Args:
            source: The stage that it comes from.
            stage: The one that takes it.

        Raises:
            PipelineError: A tensor of it has been changed in place since.
        """
        if [version_of(tensor) for tensor in self.message.tensors] != self.versions:
            raise PipelineError(
                f"stage {source} returned a tensor and changed it in place in a later micro-batch, before stage "
                f"{stage} on the same rank had seen it (or another stage changed it that got it, too); return a clone "
                "of it"
            )
        return self.message


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version
