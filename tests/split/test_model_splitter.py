"""Splitters that a trainer is given: eight arguments in, four values out."""

from functools import partial

import pytest
import torch
from language_models import language_model, padded
from torch import nn

from torchdistpackage import (
    ModelSplitter,
    PipelineStage,
    SplitError,
    SplitPoint,
    create_automatic_splitter,
    create_manual_causal_lm_splitter,
)

pytest.importorskip("transformers")


def split(splitter, model, indices=((0, 3), (1, 2)), rank=0):
    ids, _ = padded()
    return splitter(model, (ids,), {}, indices, True, device="cpu", rank=rank, pp_group=None)


def run(modules, ids, **kwargs):
    for module in modules:
        ids = module(ids, **kwargs)
    return ids


def test_the_manual_splitter_gives_all_modules_and_the_stages_of_a_rank():
    model = language_model("Gemma3Text")
    splitter = create_manual_causal_lm_splitter(num_layers=None, input_weight=1, output_weight=1)
    assert isinstance(splitter, ModelSplitter)
    modules, mine, stages, make_mask = split(splitter, model, rank=1)
    assert [modules[1], modules[2]] == mine
    assert [(stage.stage_index, stage.num_stages, stage.submod) for stage in stages] == [
        (1, 4, mine[0]),
        (2, 4, mine[1]),
    ]
    ids, mask = padded()
    made = make_mask(input_ids=ids, attention_mask=mask, position_ids=None)
    assert torch.equal(run(modules, ids, attention_mask=made), model(ids, attention_mask=mask).logits)


def test_it_may_hide_its_configuration_in_a_partial():
    splitter = partial(create_manual_causal_lm_splitter, input_weight=2, output_weight=2)()
    modules, *_ = split(splitter, language_model("Llama", layers=8))
    assert [len(module.model.layers) for module in modules] == [1, 3, 3, 1]


def test_it_asks_a_model_for_its_own_masks():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = language_model("Llama").config
            self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

        def forward(self, input_ids):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return x

        def get_attn_mask_fn(self):
            return lambda **inputs: "its mask"

    assert split(create_manual_causal_lm_splitter(), Own())[-1]() == "its mask"


def test_it_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="Cannot auto-detect num_layers"):
        split(create_manual_causal_lm_splitter(), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(SplitError, match=r"num_layers is 7, but model.layers of the model has 5"):
        split(create_manual_causal_lm_splitter(num_layers=7), language_model("Llama"))
    with pytest.raises(SplitError, match=r"every stage to one rank"):
        split(create_manual_causal_lm_splitter(), language_model("Llama"), indices=((0, 1), (1, 2)))


@pytest.mark.parametrize("point", [SplitPoint.BEGINNING, "beginning", "BEGINNING"])
def test_the_automatic_splitter_cuts_at_names(point):
    model = language_model("Llama")
    splitter = create_automatic_splitter({"model.layers.2": point})
    ids, _ = padded()
    modules, mine, stages, make_mask = splitter(
        model, (ids,), {"use_cache": False}, [(0,), (1,)], True, device="cpu", rank=1, pp_group=None
    )
    assert make_mask is None
    assert [type(stage) for stage in stages] == [PipelineStage]
    assert mine == [modules[1]]
    assert "model.layers.2.mlp.up_proj.weight" in mine[0].state_dict()
    assert "model.layers.1.mlp.up_proj.weight" in modules[0].state_dict()


def test_the_automatic_splitter_says_what_does_not_fit():
    with pytest.raises(SplitError, match=r"split_spec\['model.layers.2'\] must be a SplitPoint"):
        create_automatic_splitter({"model.layers.2": "middle"})
    splitter = create_automatic_splitter({"model.layers.2": "end"})
    ids, _ = padded()
    with pytest.raises(SplitError, match="into 2 stages, but the ranks have 3"):
        splitter(language_model("Llama"), (ids,), None, [(0,), (1,), (2,)], True, device=None, rank=0, pp_group=None)


def test_a_splitter_of_ones_own_fits_the_protocol():
    def mine(model, example_args, example_kwargs, stage_indices, train, device, rank, pp_group):
        return [model], [model], [PipelineStage(model, 0, 1, device, pp_group)], None

    assert isinstance(mine, ModelSplitter)
    assert split(mine, nn.Linear(2, 2))[2][0].is_last
