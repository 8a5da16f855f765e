"""The load-balancing loss of mixtures of experts, whose layers are on several stages.

The loss (Switch Transformer, arXiv:2101.03961, equations 4 to 6) multiplies, for each expert, the share of tokens that
it got by the mean probability that it was given, both over the tokens of *all* layers. Sums over layers can be taken
stage by stage, and that is what travels: (choices + 1) x experts numbers, with their gradient, instead of a probability
for each token, layer and expert::

    stage 0   layers 0 1   -> shares, probabilities ----+
    stage 1   layers 2 3   -> shares, probabilities ----+-> loss = E * sum(shares * probabilities) / layers^2
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from torchdistpackage.errors import SplitError

__all__ = ["RouterLoss"]

_SENT = "router"
_checked: set[str] = set()


@final
@dataclass
class RouterLoss:
    """The router loss of one forward of one stage; does nothing where nobody asked for it.

    Attributes:
        part: The stage.
        wanted: Whether the model was asked for it, by its configuration or by `output_router_logits`.
        logits: What the routers of this stage returned, (tokens, experts) each.
    """

    part: Any
    wanted: bool
    logits: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, part: Any, kwargs: dict[str, Any], has_switch: bool) -> RouterLoss:
        """Reads and switches off `output_router_logits`: the model would take this stage's layers for all.

        Args:
            part: The stage.
            kwargs: The arguments of its forward; changed.
            has_switch: Whether the model knows `output_router_logits`.

        Raises:
            SplitError: The family has a loss of its own.
        """
        if not has_switch:
            return cls(part, False)
        asked = kwargs.pop("output_router_logits", None)
        wanted = bool(getattr(part.config, "output_router_logits", False) if asked is None else asked)
        kwargs["output_router_logits"] = False
        if wanted:
            _check_formula(part)
        return cls(part, wanted)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what routers return is noted."""
        routers = _routers(self.part) if self.wanted else ()
        handles = [module.register_forward_hook(self._note(recorder)) for recorder, module in routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, recorder: Any) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.logits.append(output[recorder.index] if isinstance(output, (tuple, list)) else output)

        return after

    def add(self, travelling: dict[str, Any], carried: Mapping[str, Any], mask: Tensor | None) -> None:
        """Adds this stage's sums to those that came in, for the next stage."""
        if self.wanted:
            travelling[_SENT] = self._sums(carried, mask)

    def added_to(self, loss: Tensor, carried: Mapping[str, Any], mask: Tensor | None) -> Tensor:
        """On the last stage: the model's loss with the router loss, weighted as the model does."""
        if not self.wanted:
            return loss
        sums = self._sums(carried, mask)
        weight: float = self.part.router_aux_loss_coef
        return loss + weight * _loss(sums).to(loss.device)

    def _sums(self, carried: Mapping[str, Any], mask: Tensor | None) -> list[Any]:
        """[number of layers, shares (choices, experts), probabilities (experts)], summed over the layers so far."""
        count, shares, probabilities = carried.get(_SENT, (0, None, None))
        for logits in self.logits:
            share, probability = _statistics(logits, self.part.num_experts_per_tok, mask)
            shares = share if shares is None else shares + share
            probabilities = probability if probabilities is None else probabilities + probability
            count += 1
        return [count, shares, probabilities]


def _statistics(logits: Tensor, choices: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of one layer: the share of tokens that chose each expert, by choice, and the experts' mean probabilities."""
    weights = torch.softmax(logits, dim=-1)
    _, chosen = torch.topk(weights, choices, dim=-1)
    one_hot = nn.functional.one_hot(chosen, logits.shape[-1]).float()  # (tokens, choices, experts)
    if mask is None or mask.ndim != 2:
        return one_hot.mean(0), weights.mean(0)
    counts = mask.reshape(-1).to(weights)
    total = counts.sum()
    return (one_hot * counts[:, None, None]).sum(0) / total, (weights * counts[:, None]).sum(0) / total


def _loss(sums: list[Any]) -> Tensor:
    count, shares, probabilities = sums
    loss: Tensor = (shares / count * (probabilities / count)[None]).sum() * probabilities.shape[-1]
    return loss


def _routers(part: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """The modules whose outputs the family calls router logits."""
    for container in part.modules():
        recorders = (getattr(container, "_can_record_outputs", None) or {}).get("router_logits")
        if recorders is None:
            continue
        for recorder in recorders if isinstance(recorders, (list, tuple)) else [recorders]:
            target: Any = getattr(recorder, "target_class", recorder)
            wanted = getattr(recorder, "layer_name", None)
            for name, module in container.named_modules():
                if isinstance(module, target) and (wanted is None or wanted in name):
                    yield recorder, module
        return


def _check_formula(part: Any) -> None:
    """Compares with the family's own function on a few numbers, once."""
    name = type(part).__name__
    if name in _checked:
        return
    own = getattr(sys.modules.get(type(part).__module__), "load_balancing_loss_func", None)
    if own is None or not hasattr(part, "router_aux_loss_coef") or not hasattr(part, "num_experts_per_tok"):
        raise SplitError(
            f"{name} was asked for router logits, and how its load-balancing loss is made over several stages is not "
            "known; switch output_router_logits off"
        )
    generator = torch.Generator().manual_seed(0)
    experts = part.num_experts
    layers = [torch.randn(6, experts, generator=generator) for _ in range(3)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for given in (None, mask):
        found = RouterLoss(part, True, layers)._sums({}, given)
        if not torch.allclose(_loss(found), own(tuple(layers), experts, part.num_experts_per_tok, given), atol=1e-5):
            raise SplitError(f"{name} has a load-balancing loss of its own, which is not known over several stages")
    _checked.add(name)
