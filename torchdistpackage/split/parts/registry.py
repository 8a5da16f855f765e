"""Which classes make the parts of which kind of model.

A kind is a `model_type` as configurations of transformers say it. Families register their three classes under it; every
other kind of decoder-only model that transformers knows is served by the classes of `causal_lm.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, final

from torchdistpackage.errors import SplitError
from torchdistpackage.split.parts.base import BaseSplitModel
from torchdistpackage.split.parts.metadata import COMPONENTS

__all__ = ["ModelRegistry", "UnknownModelError"]

Class = TypeVar("Class", bound=type[BaseSplitModel])

GENERIC = "causal_lm"
"""The name of the family that serves every decoder-only model."""


class UnknownModelError(SplitError, KeyError):
    """Nobody knows how to make the parts of such a model."""

    def __str__(self) -> str:  # a KeyError would quote the sentence
        """The sentence."""
        return str(self.args[0])


@final
class ModelRegistry:
    r"""Kind of model -> classes of its parts.

    Example:
        >>> from torchdistpackage.split.parts import BaseTrunkModel, GPT2BottomModel
        >>> @ModelRegistry.register("my_gpt2", "bottom")
        ... class MyBottom(GPT2BottomModel):
        ...     pass
        >>> ModelRegistry.get_model_info()["my_gpt2"]
        {'bottom': True, 'trunk': False, 'top': False}
        >>> ModelRegistry.get_model_class("my_gpt2", "bottom").__name__
        'MyBottom'
    """

    _classes: ClassVar[dict[str, dict[str, type[BaseSplitModel]]]] = {}

    @classmethod
    def register(cls, model_type: str, part: str) -> Callable[[Class], Class]:
        """A decorator for the class of one part; a second one for the same part takes the place of the first.

        Args:
            model_type: Kind of model.
            part: "bottom", "trunk" or "top".

        Raises:
            SplitError: There is no such part, or the class is not one of a part.
        """
        if part not in COMPONENTS:
            raise SplitError(f"part must be 'bottom', 'trunk' or 'top', got {part!r}")

        def add(made: Class) -> Class:
            if not (isinstance(made, type) and issubclass(made, BaseSplitModel)):
                raise SplitError(
                    f"{getattr(made, '__name__', made)!r} is no part of a model: derive it from "
                    f"Base{part.capitalize()}Model"
                )
            if made.component != part:
                raise SplitError(f"{made.__name__} is a {made.component or 'part of no kind'}, not a {part}")
            if not made.__module__.startswith(f"{__package__}."):
                _families()  # or they would take the place of what a user registers before they are needed
            cls._classes.setdefault(model_type, {})[part] = made
            made._registry_info = {"model_type": model_type, "part": part}  # type: ignore[attr-defined]
            return made

        return add

    @classmethod
    def get_model_class(cls, model_type: str, part: str) -> type[Any]:
        """The class of a part.

        Raises:
            KeyError: Nobody knows the kind, or its family has no such part; an `UnknownModelError`.
        """
        cls.need_known(model_type)
        family = cls._classes.get(model_type) or cls._classes[GENERIC]
        if part not in family:
            raise UnknownModelError(
                f"Model type {model_type!r} has no {part!r} registered; it has {sorted(family) or 'nothing'}"
            )
        return family[part]

    @classmethod
    def list_supported_models(cls) -> list[str]:
        """The kinds that have a family of their own, and `causal_lm`, the family of all others."""
        _families()
        return sorted(cls._classes)

    @classmethod
    def is_model_registered(cls, model_type: str) -> bool:
        """Whether parts of such a model can be made; True for every decoder-only kind that transformers knows."""
        _families()
        return model_type in cls._classes or _known_to_transformers(model_type)

    @classmethod
    def is_complete(cls, model_type: str) -> bool:
        """Whether all three parts can be made."""
        if not cls.is_model_registered(model_type):
            return False
        return len(cls._classes.get(model_type) or cls._classes[GENERIC]) == len(COMPONENTS)

    @classmethod
    def get_model_info(cls) -> dict[str, dict[str, bool]]:
        """Kind -> part -> whether it is registered."""
        _families()
        return {kind: {part: part in family for part in COMPONENTS} for kind, family in sorted(cls._classes.items())}

    @classmethod
    def need_known(cls, model_type: str) -> None:
        """Raises unless the kind is known.

        Raises:
            KeyError: Lists the kinds that are; an `UnknownModelError`.
        """
        if not cls.is_model_registered(model_type):
            raise UnknownModelError(
                f"Model type {model_type!r} not registered. Available models: {cls.list_supported_models()}; "
                f"{GENERIC!r}, or its own model_type, serves every decoder-only model of transformers"
            )

    @classmethod
    def need_complete(cls, model_type: str) -> None:
        """Raises unless all parts of the kind are registered.

        Raises:
            KeyError: Nobody knows the kind.
            SplitError: Says which parts are missing.
        """
        cls.need_known(model_type)
        if not cls.is_complete(model_type):
            info = cls.get_model_info()[model_type]
            missing = [part for part, there in info.items() if not there]
            raise SplitError(
                f"Model {model_type!r} is incomplete: {', '.join(missing)} not registered. Registration status: "
                f"{info}. Decorate the class with @ModelRegistry.register({model_type!r}, {missing[0]!r})"
            )


def _families() -> None:
    """Makes the families that the library brings along register themselves."""
    from torchdistpackage.split.parts import causal_lm, gemma, gpt2, qwen2  # noqa: F401


def _known_to_transformers(model_type: str) -> bool:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS
    except ModuleNotFoundError:
        return False
    return model_type in KINDS or f"{model_type}_text" in KINDS
