"""What is asked of a language model that was cut: the numbers of the model in one piece, trained and generating."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from running import over_the_runtime, plain_loop
from torch import Tensor, nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.causal_lm import new_cache, split_causal_lm
from torchdistpackage.split.decoder.cache import is_cache
from torchdistpackage.split.decoder.dry_run import switches
from torchdistpackage.split.decoder.stage_forward import STAGE

__all__ = ["Reference", "Row", "check"]

TOLERANCE = 1e-6  # absolute; of gradients in units of the parameter's largest one where that is more than 1
ROWS, TOKENS, PREFILL = 4, 12, 6
PADDED = (5, 2, 0, 3)  # tokens of each row that are padding
SIDES = ("none", "right", "left")
CACHES = ("past_key_values", "cache_params")


class Wrong(Exception):
    """The stages do not compute what the model computes."""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        family: Model type.
        stages: How many.
        cuts: Layers of each stage.
        sent: What travels besides the hidden state.
        logits: Worst difference, over the three kinds of padding.
        gradients: Worst difference, for each parameter in units of its largest gradient if that is above 1.
        cache: Worst difference of the cached steps, or why there are none.
        runtime: Worst difference of the gradients that one step of 1F1B leaves.
        verdict: exact, refused or WRONG.
        reason: In words, unless exact.
    """

    family: str
    stages: int
    cuts: str = ""
    sent: str = ""
    logits: float | None = None
    gradients: float | None = None
    cache: float | str | None = None
    runtime: float | None = None
    verdict: str = "exact"
    reason: str = ""

    def as_text(self) -> dict[str, str]:
        """For a file."""
        return {
            name: "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class Trained:
    """One forward and backward."""

    logits: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Stepped:
    """Cached steps of the model.

    Attributes:
        logits: Of the last token, of the prefill and of each step.
        whole_rows: Whether each step takes all tokens so far.
    """

    logits: list[Tensor]
    whole_rows: bool


def batch(side: str) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of what is padded: nothing, or some of each row on one side."""
    ids = torch.randint(3, 96, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDED):
        hidden = {"none": slice(0), "right": slice(TOKENS - count, None), "left": slice(count)}[side]
        mask[row, hidden] = 0
    return ids * mask, mask


def in_turn(parts: Mapping[int, nn.Module], ids: Tensor, kwargs: list[dict[str, Any]]) -> Any:
    """The stages one after the other."""
    x: Any = ids
    for part, mine in zip(parts.values(), kwargs, strict=True):
        x = part(x, **mine)
    return x


def trained(model: nn.Module, run: Callable[[], Tensor], seen: Tensor) -> Trained:
    """The logits that are not padding, and the gradient of a random sum of them for each parameter."""
    model.zero_grad()
    logits = run()
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weights)[seen].sum().backward()
    gradients = gradients_of(model)
    return Trained(logits[seen].detach(), gradients)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Takes the gradients from the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()  # sets them to None: those in hand stay
    return found


def gap(mine: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite where only one of the two is a number."""
    both = mine.isnan() & wanted.isnan()
    differences = torch.where(both | (mine == wanted), 0.0, mine - wanted).abs().nan_to_num(torch.inf)
    return float(differences.max()) if wanted.numel() else 0.0


def gradient_gap(mine: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, for each parameter in units of its largest gradient if that is above 1.

    Raises:
        Wrong: A gradient is there that should not be, or the other way round.
    """
    if unlike := sorted(mine.keys() ^ wanted.keys()):
        raise Wrong(f"{unlike[0]} has {'a' if unlike[0] in mine else 'no'} gradient, unlike in the model")
    found = [0.0]
    for name, gradient in wanted.items():
        largest = float(gradient.abs().nan_to_num(0.0, posinf=0.0).max()) if gradient.numel() else 0.0
        found.append(gap(mine[name], gradient) / max(1.0, largest))
    return max(found)


def not_finite(side: str, trained: Trained) -> str:
    """Says how much of what the model computes itself is no number: there the stages have none, either."""
    bad = sum(not gradient.isfinite().all() for gradient in trained.gradients.values())
    if not trained.logits.isfinite().all():
        return f"padding {side}: the model's own logits are not all finite"
    return f"padding {side}: {bad} of the model's own {len(trained.gradients)} gradients are not finite" if bad else ""


class Reference:
    """A model in one piece, with what it computes: made once, compared with every cut.

    Args:
        family: Its name.
        model: The model, in evaluation mode.
    """

    def __init__(self, family: str, model: nn.Module) -> None:
        self.family, self.model = family, model
        self.names = set(inspect.signature(model.forward).parameters)
        try:
            self._trained("none", self._whole("none"))
        except AssertionError:  # reformer keeps what backward needs in training only
            model.train()
        self.trained = {side: self._trained(side, self._whole(side)) for side in SIDES}
        self.stepped = self._own_steps()
        notes = [not_finite(side, self.trained[side]) for side in SIDES]
        if self.stepped and not all(logits.isfinite().all() for logits in self.stepped.logits):
            notes.append("the logits of the model's own cached steps are not all finite")
        self.note = "; ".join(filter(None, notes))
        ids, mask = batch("right")
        plain_loop(self._call, ids, mask)
        self.summed = gradients_of(model)

    def options(self, mask: Tensor | None, *, use_cache: bool = False) -> dict[str, Any]:
        """Keyword arguments, as far as the family has them."""
        options: dict[str, Any] = {"use_cache": use_cache} if "use_cache" in switches(self.model) else {}
        return options if mask is None or "attention_mask" not in self.names else options | {"attention_mask": mask}

    def _call(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, **self.options(mask)).logits
        return logits

    def _whole(self, side: str) -> Callable[[], Tensor]:
        ids, mask = batch(side)
        return lambda: self._call(ids, None if side == "none" else mask)

    def _trained(self, side: str, run: Callable[[], Tensor]) -> Trained:
        return trained(self.model, run, batch(side)[1].bool())

    def _own_steps(self) -> Stepped | None:
        """What the model's own generation computes; None if it has no cache of transformers.

        A few families take all tokens in every step, and skip those that are in the cache.
        """
        training = self.model.training
        self.model.eval()
        try:
            return self._steps(whole_rows=False)
        except RuntimeError:
            return self._steps(whole_rows=True)
        finally:
            self.model.train(training)

    @torch.no_grad()
    def _steps(self, whole_rows: bool) -> Stepped | None:
        ids, mask = batch("left")
        found: list[Tensor] = []
        cache: dict[str, Any] = {}
        for begin, end in steps(whole_rows):
            kwargs = self.options(mask[:, :end], use_cache=True) | cache
            output = self.model(input_ids=ids[:, begin:end], **kwargs)
            found.append(output.logits[:, -1])
            name = next((name for name in CACHES if is_cache(getattr(output, name, None))), None)
            if name is None:
                return None
            cache = {name: getattr(output, name)}
        return Stepped(found, whole_rows)

    def compare(self, parts: dict[int, nn.Module], facts: dict[str, Any]) -> None:
        """All that is asked of a cut; notes what is found.

        Raises:
            Wrong: Something is not as it should be.
            SplitError: A cache is refused.
        """
        for side in SIDES:
            ids, mask = batch(side)
            kwargs = [self.options(None if side == "none" else mask)] * len(parts)
            found = self._trained(side, lambda i=ids, k=kwargs: in_turn(parts, i, k))
            wanted = self.trained[side]
            _note(facts, "logits", gap(found.logits, wanted.logits), side)
            _note(facts, "gradients", gradient_gap(found.gradients, wanted.gradients), side)
        facts["cache"] = self._cache_gap(parts)
        if len(parts) == 2:
            ids, mask = batch("right")
            over_the_runtime(parts, ids, mask, "attention_mask" in self.names)
            _note(facts, "runtime", gradient_gap(gradients_of(self.model), self.summed), "1f1b")

    @torch.no_grad()
    def _cache_gap(self, parts: dict[int, nn.Module]) -> float | str:
        if self.stepped is None:
            return "no cache"
        ids, mask = batch("left")
        caches = [new_cache(part) for part in parts.values()]
        worst = 0.0
        for (begin, end), wanted in zip(steps(self.stepped.whole_rows), self.stepped.logits, strict=True):
            kwargs = [self.options(mask[:, :end], use_cache=True) | {"past_key_values": cache} for cache in caches]
            worst = max(worst, gap(in_turn(parts, ids[:, begin:end], kwargs)[:, -1], wanted))
        if worst > TOLERANCE:
            raise Wrong(f"cached steps differ by {worst:.2g}")
        return worst


def steps(whole_rows: bool) -> list[tuple[int, int]]:
    """First and last tokens of the prefill, then of steps of one token, or of all tokens so far."""
    return [(0, PREFILL), *((0 if whole_rows else at, at + 1) for at in range(PREFILL, TOKENS))]


def _note(facts: dict[str, Any], what: str, figure: float, where: str) -> None:
    facts[what] = max(facts.get(what) or 0.0, figure)
    if not figure <= TOLERANCE:
        raise Wrong(f"{what} ({where}) differ by {figure:.2g}")


def check(reference: Reference, stages: int) -> Row:
    """Splits the model and compares.

    Args:
        reference: The model in one piece.
        stages: How many.
    """
    facts: dict[str, Any] = {"family": reference.family, "stages": stages}
    try:
        parts = split_causal_lm(reference.model, stages)
        layout = vars(parts[0])[STAGE].layout
        bounds = [min(vars(part)[STAGE].start, layout.num_layers) for part in parts.values()] + [layout.num_layers]
        facts["cuts"] = "+".join(str(after - before) for before, after in itertools.pairwise(bounds))
        facts["sent"] = sent(parts, batch("none")[0])
        reference.compare(parts, facts)
    except SplitError as error:
        return Row(**facts, verdict="refused", reason=str(error))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(**facts, verdict="WRONG", reason=reason[:400])
    return Row(**facts, reason=reference.note)


@torch.no_grad()
def sent(parts: dict[int, nn.Module], ids: Tensor) -> str:
    """What travels besides the hidden state, over all cuts: the names of arguments of layers."""
    found: dict[str, None] = {}
    x: Any = ids
    for part in list(parts.values())[:-1]:
        x = part(x)
        stage = vars(part)[STAGE]
        if isinstance(x, dict):
            names = [*x.get("names", ()), *(key for key in x if key not in ("hidden_states", "values", "names"))]
            found |= dict.fromkeys(_argument(stage, name) for name in names)
    return " ".join(found)


def _argument(stage: Any, name: str) -> str:
    """place.argument.number -> the argument's name."""
    pieces = name.split(".")
    if not pieces[0].isdigit():
        return pieces[-1]
    if not pieces[1].isdigit():
        return pieces[1]
    module = stage.twin.get_submodule(stage.layout.row[int(pieces[0])])
    return list(inspect.signature(type(module).forward).parameters)[1 + int(pieces[1])]
