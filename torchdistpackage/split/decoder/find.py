"""A model -> its layout: the likeliest list of layers whose dry run succeeds."""

from __future__ import annotations

from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split.decoder.dry_run import dry_run
from torchdistpackage.split.decoder.layout import DecoderLayout, layout_by_order, possible_skeletons
from torchdistpackage.split.decoder.twin import make_twin

__all__ = ["find_layout"]

_TRIED = 3  # a model with encoders has as many lists; behind them come lists inside of layers


def find_layout(model: nn.Module) -> DecoderLayout:
    """How a decoder is built.

    Args:
        model: The whole model, on any device; it stays as it is.

    Raises:
        SplitError: It is no decoder with a row of layers; says what is in the way of the likeliest row.
    """
    refusal: SplitError | None = None
    skeletons = possible_skeletons(model)[:_TRIED]
    replaced = [name or "the model" for name in skeletons[0].containers if "forward" in vars(model.get_submodule(name))]
    if replaced:  # a stage would run that, and with it the whole model
        raise SplitError(
            f"the forward of {replaced[0]} was replaced in the object itself, as from_pretrained(device_map=...) and "
            "torch.compile do; cut the model first: load it without device_map, and compile its stages"
        )
    if type(model).forward is nn.Module.forward:
        return layout_by_order(model, skeletons[0])
    for skeleton in skeletons:
        try:
            return dry_run(make_twin(model), skeleton)
        except SplitError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal
