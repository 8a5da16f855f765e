"""Names and numbers of stages of decoders: the values that configurations written for NeMo AutoModel rely on."""

import pytest

from torchdistpackage import SplitError
from torchdistpackage.split.causal_lm_names import (
    MULTIMODAL_SUFFIXES,
    calculate_virtual_stages,
    generate_hf_model_fqn_per_model_part,
    stage_ids_this_rank,
)
from torchdistpackage.split.pipeline_stage import PipelineStage


def test_stages_of_a_rank():
    assert [stage_ids_this_rank(rank, 4, 4) for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [stage_ids_this_rank(rank, 4, 8, "loop") for rank in range(4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [stage_ids_this_rank(rank, 4, 8, "v") for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


@pytest.mark.parametrize("wrong", [(0, 4, 5, "loop"), (0, 4, 12, "v"), (4, 4, 4, "loop"), (0, 4, 4, "w"), (0, 2, 0)])
def test_stages_that_cannot_be_dealt_out_are_both_kinds_of_error(wrong):
    for kind in (AssertionError, SplitError, ValueError):
        with pytest.raises(kind):
            stage_ids_this_rank(*wrong)


def layers(names):
    return [name for name in names if "layers." in name]


def test_names_in_their_order():
    first, last = generate_hf_model_fqn_per_model_part(2, 3, include_multimodal_encoders=False)
    assert first == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.rotary_emb"]
    assert last == ["model.layers.2", "model.norm", "lm_head", "model.rotary_emb"]


@pytest.mark.parametrize(("stages", "count", "sizes"), [(3, 10, [4, 3, 3]), (4, 8, [2] * 4), (1, 4, [4])])
def test_layers_are_even_and_the_first_stages_get_what_is_left(stages, count, sizes):
    parts = generate_hf_model_fqn_per_model_part(stages, count)
    assert [len(layers(names)) for names in parts] == sizes
    assert [name for names in parts for name in layers(names)] == [f"model.layers.{i}" for i in range(count)]


def test_what_is_left_out_and_what_is_added():
    bare = generate_hf_model_fqn_per_model_part(2, 4, False, False, False, include_multimodal_encoders=False)
    assert bare == [["model.layers.0", "model.layers.1"], ["model.layers.2", "model.layers.3", "model.norm"]]
    more = generate_hf_model_fqn_per_model_part(2, 4, fqn_prefix="a.", extra_module_fqns=["x.y"], lm_head_fqn="b.head")
    assert "x.y" in more[0]
    assert "x.y" not in more[1]
    assert {f"a.{suffix}" for suffix in MULTIMODAL_SUFFIXES} < set(more[0])
    assert "b.head" in more[1]
    assert "lm_head" not in more[1]
    assert "a.norm" in more[1]


def test_too_few_stages_or_layers():
    with pytest.raises(ValueError, match="Number of stages must be at least 1"):
        generate_hf_model_fqn_per_model_part(0, 4)
    with pytest.raises(ValueError, match=r"cannot exceed number of layers \(4\)"):
        generate_hf_model_fqn_per_model_part(5, 4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32, 32, 4, True, "up"), (4, 1)),
        ((32, 8, 4, True), (4, 1)),  # a ceiling, and nothing added to it
        ((32, 4, 4, False, "down"), (8, 2)),
        ((32, 5, 4, False, "up"), (8, 2)),
        ((32, 3, 4, False, "down"), (8, 2)),
        ((12, 3, 2, False), (4, 2)),
        ((32, None, 4, True), (4, 1)),
        ((32, None, 4, False), (8, 2)),
    ],
)
def test_virtual_stages(arguments, expected):
    assert calculate_virtual_stages(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((32, 7, 4, False, "invalid"), "Invalid value for round_to_pp_multiple"),
        ((32, 7, 4, False, None), "must be divisible by"),
        ((32, 6, 4, True, "up"), "Single stage schedule requires exactly 1 stage"),
        ((32, 16, 2, False), "Multi-stage schedule requires at least 2 stages"),
        ((32, 32, 4, True, "down"), "none at all; round 'up'"),
        ((32, 0, 4, True), "layers_per_stage must be at least 1"),
    ],
)
def test_wrong_numbers_of_virtual_stages(arguments, text):
    with pytest.raises(ValueError, match=text):
        calculate_virtual_stages(*arguments)


def test_the_record_of_a_stage():
    stage = PipelineStage(None, 0, 2, "cpu", group=None)
    assert (stage.submod, stage.stage_index, stage.num_stages, stage.device) == (None, 0, 2, "cpu")
    assert stage.is_first
    assert not stage.is_last
    with pytest.raises(SplitError, match="there is no stage 2"):
        PipelineStage(None, 2, 2)
