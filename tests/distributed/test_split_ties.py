"""Weights that Bottom and Top have a copy each of: tied when both run in one pipeline, whatever else there is."""

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import start
from language_models import language_model, padded
from torch import nn

from torchdistpackage import SplitError, check_parts, forward_backward, tpc
from torchdistpackage.split import ties_in
from torchdistpackage.split.parts import ModelFactory

pytest.importorskip("transformers")
COMPONENTS = ("bottom", "trunk", "top")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for family, layers in (("GPT2", 4), ("Gemma", 4), ("Llama", 4)):
        language_model(family, layers).save_pretrained(home / family)
    return str(home)


def own_part(folder, family, at=(1, 3)):
    made = ModelFactory.create_split_models("auto", f"{folder}/{family}", *at, parts=COMPONENTS[tpc.get_pp_rank()])
    return made[tpc.get_pp_rank()]


def step(part, optimizer=None):
    ids, _ = padded()
    last = tpc.get_pp_rank() == 2
    own = [ids, None, [ids]][tpc.get_pp_rank()]
    return forward_backward(optimizer, (lambda x: part(x[0], labels=x[1]).loss) if last else part, None, own, 2)


def tied(part):
    return next((tie.parameter for tie in ties_in(part).values()), None)


def models_in_turn(rank, world, folder):
    """The second one is made after the first step; the Top is then made anew."""
    start(3)
    sums = []
    for family in ("GPT2", "Llama", "Gemma"):
        part = own_part(folder, family)
        step(part)
        sums.append(None if tied(part) is None else tied(part).grad.sum().item())
    if rank == 2:
        part = own_part(folder, "Gemma")
    part.zero_grad()
    step(part)
    return [*sums, None if tied(part) is None else tied(part).grad.sum().item()]


def test_models_may_be_made_when_others_have_run(folder):
    bottom, trunk, top = run_distributed(models_in_turn, 3, folder, timeout=60)
    assert bottom == top
    assert bottom[1] is None
    assert bottom[2] == bottom[3] != 0
    assert trunk == [None] * 4


def another_end(rank, world, folder):
    """The Bottom is of a tied model, and the last stage a classifier."""
    start(3)
    part = nn.Linear(32, 3) if rank == 2 else own_part(folder, "GPT2")
    forward = (lambda x: part(x[0]).square().mean()) if rank == 2 else part
    own = [padded()[0], None, [padded()[0]]][rank]
    for _ in range(2):
        forward_backward(None, forward, None, own, 2)
    return all(parameter.grad is not None for parameter in part.parameters())


def test_another_last_stage_needs_no_tie(folder):
    assert all(run_distributed(another_end, 3, folder, timeout=60))


def refused(rank, world, folder, change):
    start(3)
    part = own_part(folder, "GPT2")
    with torch.no_grad():
        if change == "frozen" and rank == 0:
            part.requires_grad_(False)
        elif change == "value" and rank == 2:
            tied(part).add_(1)
    with pytest.raises(Exception, match="transformer.wte.weight is one parameter in the whole model") as raised:
        step(part)
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize(("change", "reason"), [("frozen", "both ends or none"), ("value", "from one model")])
def test_ends_that_are_not_one_are_an_error_everywhere(folder, change, reason):
    found = run_distributed(refused, 3, folder, change, timeout=60)
    assert all(reason in text for _, text in found)
    assert [name for name, _ in found] == ["SplitError", "PipelineError", "SplitError"]


def frozen_ends(rank, world, folder):
    start(3)
    part = own_part(folder, "GPT2").requires_grad_(rank == 1)
    step(part)
    return all((parameter.grad is None) == (rank != 1) for parameter in part.parameters())


def test_both_ends_may_be_frozen(folder):
    assert all(run_distributed(frozen_ends, 3, folder, timeout=60))


def checked(rank, world, folder):
    start(3)
    check_parts(own_part(folder, "GPT2"))
    wrong = {
        "do not join": own_part(folder, "GPT2", (1, 3) if rank else (2, 3)),
        "different models": own_part(folder, "Llama" if rank == 1 else "GPT2"),
    }
    texts = []
    for reason, part in wrong.items():
        with pytest.raises(SplitError, match=reason) as raised:
            check_parts(part)
        texts.append(str(raised.value))
    return texts


def test_parts_that_do_not_belong_together(folder):
    first, *others = run_distributed(checked, 3, folder, timeout=60)
    assert all(texts == first for texts in others)
    assert "bottom 0..1, trunk 1..2, top 3..3" in first[0]
