"""Where a traced model is cut can be said; of a model on the meta device only the wanted stage gets memory."""

import pytest
import torch
import traced_models as models
from torch import nn

from torchdistpackage.errors import SplitError
from torchdistpackage.split import split


def test_where_to_cut_can_be_said():
    model, x = models.Blocks(count=6), torch.randn(2, 6)

    def firsts(pipe):
        return [row.layers[0] for row in pipe.report.rows]

    assert firsts(split(model, x, 3, layout="Et|t*4|tL")) == ["stem", "blocks.1", "blocks.5"]
    assert firsts(split(model, x, 3, sizes=[2, 5, 1])) == ["stem", "blocks.1", "head"]
    together = split(model, x, 2, costs="flops", together=[["stem", "blocks.4"]])
    assert firsts(together) == ["stem", "blocks.5"]
    assert firsts(split(model, x, 2, costs="flops", stage_of={"blocks.1": 1})) == ["stem", "blocks.1"]
    with pytest.raises(SplitError, match="no module 'block'; did you mean 'blocks'"):
        split(model, x, 2, costs="flops", stage_of={"block": 1})
    with pytest.raises(SplitError):
        split(model, x, 2, costs="flops", stage_of={"stem": 1})
    with pytest.raises(SplitError, match="costs"):
        split(model, x, 2, costs="money")


def test_memory_moves_the_cut():
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), torch.randn(2, 64)
    one = 4 * 4 * (64 * 64 + 64)  # parameters in float32, their gradients, and Adam's two moments
    cut = [split(model, x, 2, costs="flops", memory_limit=limit) for limit in (None, [1.5 * one, 1e9])]
    assert [[len(row.layers) for row in pipe.report.rows] for pipe in cut] == [[2, 2], [1, 3]]
    with pytest.raises(SplitError, match="memory"):
        split(model, x, 2, costs="flops", memory_limit=one)


class Initialised(nn.Module):
    """Knows how to fill itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def reset_parameters(self):
        nn.init.ones_(self.scale)

    def forward(self, x):
        return x * self.scale


def test_of_a_meta_model_only_the_wanted_stage_gets_memory():
    with torch.device("meta"):
        model = nn.Sequential(models.Blocks(count=4), nn.Linear(3, 6), Initialised())
    pipe = split(model, torch.randn(2, 6), 3)
    stage = pipe.build_stage(1, "cpu")
    assert not any(tensor.is_meta for tensor in [*stage.parameters(), *stage.buffers()])
    assert all(p.is_meta for i in (0, 2) for p in pipe.get_stage_module(i).parameters())
    last = pipe.build_stage(2, init=lambda stage: [nn.init.zeros_(p) for p in stage.parameters()])
    assert all(not p.any() for p in last.parameters())
    assert last(stage(torch.randn(5, 6))).shape == (5, 6)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.shift = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.a(x) + self.shift


def test_memory_that_nobody_fills_is_named():
    with torch.device("meta"):
        model = Bare()
    with pytest.raises(SplitError, match=r"nobody knows how to fill shift: pass init="):
        split(model, torch.randn(2, 6), 1).build_stage(0)
