"""The loss of a batch out of the losses of its micro-batches, each weighted by what it counts.

A mean of means is wrong where micro-batches count different numbers of tokens. The plain loop's loss is one mean over
all tokens that count, on all replicas and in all batches that are accumulated::

    micro-batch   tokens that count   its mean      its share
    0             100                 2.0           2.0 * 100 / 140
    1              40                 3.0           3.0 *  40 / 140
                  140, on all replicas              sum of shares = the mean over 140 tokens

`steps.py` asks how much a batch counts, has the replicas add it up, and gives the total to every micro-batch's loss.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from torchdistpackage.errors import TrainerError
from torchdistpackage.trainer.batch_arguments import count_rows

__all__ = ["WeightedLoss", "causal_lm_loss", "classification_loss"]

IGNORED = -100
"""The label that does not count, torch's and Hugging Face's."""

_log = logging.getLogger(__name__)


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, in nats, of every token but the first, in float32.

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), not shifted; -100 does not count.

    Example:
        >>> round(causal_lm_loss(torch.zeros(1, 3, 8), torch.tensor([[5, 1, -100]])).exp().item(), 3)
        8.0
    """
    wanted = labels[..., 1:].reshape(-1).to(logits.device)
    return functional.cross_entropy(logits[..., :-1, :].flatten(0, -2).float(), wanted, ignore_index=IGNORED)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, in nats, in float32; labels are classes, or a probability for each class.

    Args:
        logits: (rows, classes, ...), as torch has it, or (rows, ..., classes), as taggers of tokens have it.
        labels: (rows, ...) classes, or of the logits' shape.

    Example:
        >>> round(classification_loss(torch.zeros(2, 4), torch.tensor([3, 1])).exp().item(), 3)
        4.0
    """
    if logits.dim() > 2 and labels.shape == logits.shape[:-1] != (*logits.shape[:1], *logits.shape[2:]):
        logits = logits.movedim(-1, 1)
    return functional.cross_entropy(logits.float(), labels.to(logits.device))


def _classifier_loss(output: Any, labels: Tensor) -> Tensor:
    return classification_loss(_logits(output), labels)


def _logits(output: Any) -> Tensor:
    """The logits, of a model that returns them or an object with them."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TrainerError(
            f"the model returned a {type(output).__name__} without logits: pass compute_loss_func=..., a function "
            "(output, labels) -> mean loss"
        )
    return found


def _causal_loss(output: Any, labels: Tensor) -> Tensor:
    logits = _logits(output)
    if logits.dim() == 3 and labels.dim() == 2 and not labels.is_floating_point():
        return causal_lm_loss(logits, labels)
    return classification_loss(logits, labels)


@final
class WeightedLoss:
    """A loss function with what it counts.

    Args:
        function: `function(output, labels)`, the mean over what counts, or with `reduction="sum"` the sum; or as
            Hugging Face's `compute_loss_func(outputs, labels, num_items_in_batch)`, the sum over what counts divided
            by that number. None for the loss of a causal language model, or of a classifier.
        is_causal_lm: Whether the model predicts the next token.
        vocabulary: Its size. A function of the user's that gets a label a token is asked once whether it shifts them,
            with logits of this size; one that then raises is taken for one that does not.
        device: Where losses are computed: a loss module with tensors elsewhere, such as class weights, is copied there.

    Raises:
        TrainerError: The function cannot be called.

    Example:
        >>> loss = WeightedLoss(nn.CrossEntropyLoss())
        >>> loss.count(torch.tensor([1, -100, 2]))
        2.0
    """

    def __init__(
        self,
        function: Callable[..., Any] | None = None,
        is_causal_lm: bool = False,
        *,
        vocabulary: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:
        if function is not None and not callable(function):
            raise TrainerError(
                f"compute_loss_func must be a function (logits, labels) -> mean loss, got {type(function).__name__}"
            )
        self._causal, self._vocabulary = is_causal_lm, vocabulary
        default = _causal_loss if is_causal_lm else _classifier_loss
        self.function: Callable[..., Any] = default if function is None else _on(function, torch.device(device))
        self._takes_count = _has_parameter(self.function, "num_items_in_batch")
        self._is_sum = getattr(self.function, "reduction", "mean") == "sum"
        ignored = getattr(self.function, "ignore_index", IGNORED)
        self._ignored: int = ignored if isinstance(ignored, int) else IGNORED
        self._shifts = is_causal_lm and (self._takes_count or self.function is _causal_loss)
        self._asked = function is None or self._shifts
        weighs = isinstance(self.function, (nn.CrossEntropyLoss, nn.NLLLoss))
        weights = getattr(self.function, "weight", None) if weighs else None
        self._weights = None if weights is None else weights.detach().double().cpu()

    def count(self, labels: Any) -> float:
        """What the loss of these labels is a mean over: tokens or pixels that are not ignored, or rows."""
        if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0:
            if not self._asked and labels.dim() == 2:
                function = partial(self.function, num_items_in_batch=1.0) if self._takes_count else self.function
                self._shifts, self._asked = _shifts(function, self._ignored, self._vocabulary), True
            counted = labels[..., 1:] if self._shifts and labels.dim() > 1 else labels
            real = counted != self._ignored
            return float(real.sum() if self._weights is None else self._weights[counted[real].cpu()].sum())
        return float(count_rows(labels) or 0)

    def share(
        self, output: Any, labels: Any, total: float, replicas: int = 1, *, counted: float | None = None
    ) -> Tensor:
        """A micro-batch's share of the batch's loss, times what data parallelism is going to divide by.

        Args:
            output: What the model has returned for the micro-batch.
            labels: Its labels.
            total: What the whole batch counts, on all replicas.
            replicas: Their number: gradients are averaged over them.
            counted: What the labels count, if it is known: to ask labels on a GPU is to wait for it.

        Raises:
            TrainerError: The loss is not a tensor of one element.
        """
        counted = self.count(labels) if counted is None else counted
        if not counted:  # a mean over nothing would be a NaN
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            zero = torch.stack([leaf.sum(dtype=torch.float32) for leaf in leaves]).sum() if leaves else torch.zeros(())
            return torch.nan_to_num(zero) * 0.0
        if self._takes_count:
            value, factor = self.function(self._packed(output), labels, num_items_in_batch=total), float(replicas)
        else:
            value = self.function(output, labels)
            factor = float(replicas) if self._is_sum else counted / total * replicas
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            raise TrainerError(
                f"compute_loss_func returned a {type(value).__name__}{f' of shape {shape}' if shape else ''}; it must "
                "return the mean loss of a micro-batch as a tensor of one element"
            )
        return value.reshape(()) if factor == 1.0 else value.reshape(()) * factor

    def summed(self, output: Any, labels: Any, *, counted: float | None = None) -> Tensor:
        """The loss of a micro-batch times what it counts, for evaluation; in float64."""
        counted = self.count(labels) if counted is None else counted
        if not counted:
            return torch.zeros((), dtype=torch.float64)
        value = self.share(output, labels, counted, counted=counted).double()
        return value if self._is_sum else value * counted

    def _packed(self, output: Any) -> Any:
        """What Hugging Face's loss functions take: an object with `logits`."""
        if not self._causal or not isinstance(output, Tensor):
            return output
        try:
            from transformers.modeling_outputs import CausalLMOutput
        except ModuleNotFoundError:
            return SimpleNamespace(logits=output)
        return CausalLMOutput(logits=output)


def _on(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """A loss module on the device: a copy, where its tensors are elsewhere."""
    if not isinstance(function, nn.Module):
        return function
    tensors = [*function.parameters(), *function.buffers()]
    return function if all(each.device.type == device.type for each in tensors) else copy.deepcopy(function).to(device)


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        return name in inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False


@torch.no_grad()
def _shifts(function: Callable[..., Any], ignored: int, vocabulary: int) -> bool:
    """Whether a user's loss leaves the first label of each row out: asked with a row in which only that one counts."""
    try:
        value = float(function(torch.zeros(1, 2, vocabulary), torch.tensor([[1, ignored]])))
    except Exception as error:  # it is made for other inputs; what it then counts is what it is given
        _log.debug("compute_loss_func was asked whether it shifts labels, and raised %r", error)
        return False
    return not value > 0
