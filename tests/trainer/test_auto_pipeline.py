"""What `build` makes of a model on each rank, seen without processes: a mesh here is two numbers."""

import logging

import pytest
import torch
from decoders import cross_entropy, decoder
from test_auto_pipeline_config import mesh
from torch import nn

from torchdistpackage import PipelineError, ScheduleError, SplitError
from torchdistpackage.split.causal_lm_names import generate_hf_model_fqn_per_model_part
from torchdistpackage.trainer import AutoPipeline, pipeline_model, split_model_into_stages


def built(model, rank=0, ranks=2, parallelize_fn=None, **options):
    options = {"pp_batch_size": 4, "device": "cpu", **options}
    ap = AutoPipeline(world_mesh=mesh(size=ranks, rank=rank), **options)
    assert ap.build(model, loss_fn=cross_entropy, parallelize_fn=parallelize_fn) is ap
    return ap


def held(ap):
    return [(stage.stage_index, sorted(map(int, stage.submod.model.layers))) for stage in ap.info.stages]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0: [(0, [0, 1, 2])], 1: [(1, [3, 4])]}),
        ({"pp_schedule": "ZBVZeroBubble"}, {0: [(0, [0, 1]), (3, [4])], 1: [(1, [2]), (2, [3])]}),
        ({"pp_schedule": "DualPipeV"}, {0: [(0, [0, 1]), (3, [4])], 1: [(1, [2]), (2, [3])]}),
        ({"pp_schedule": "Interleaved1F1B"}, {0: [(0, [0, 1]), (2, [3])], 1: [(1, [2]), (3, [4])]}),
        ({"layers_per_stage": 3}, {0: [(0, [0, 1, 2])], 1: [(1, [3, 4])]}),
        (
            {"pp_schedule": "looped-bfs", "layers_per_stage": 1, "round_virtual_stages_to_pp_multiple": "down"},
            {0: [(0, [0, 1]), (2, [3])], 1: [(1, [2]), (3, [4])]},
        ),
    ],
    ids=str,
)
def test_where_layers_go(options, expected):
    assert {rank: held(built(decoder(5), rank, **options)) for rank in range(2)} == expected


def test_parts_are_the_models_own_and_pruned():
    model = decoder()
    first, last = (built(model, rank).parts[0] for rank in range(2))
    assert isinstance(first.model.layers, nn.ModuleDict)
    assert list(last.model.layers) == ["2", "3"]
    assert first.model.norm is first.lm_head is last.model.embed_tokens is None
    assert first.model.rotary_emb is not None
    assert last.model.rotary_emb is not None
    assert first.model.layers["0"] is model.model.layers[0]
    assert last.lm_head is model.lm_head
    assert {**first.state_dict(), **last.state_dict()}.keys() == model.state_dict().keys()


def test_names_decide():
    names = generate_hf_model_fqn_per_model_part(num_stages=4, num_layers=4)
    ap = built(decoder(), pp_schedule="interleaved-1f1b", module_fqns_per_model_part=names)
    assert held(ap) == [(0, [0]), (2, [2])]
    uneven = [["model.embed_tokens", "model.layers.0"], [f"model.layers.{i}" for i in (1, 2, 3)]]
    uneven[1] += ["model.norm", "lm_head"]
    assert held(built(decoder(), 1, module_fqns_per_model_part=uneven)) == [(1, [1, 2, 3])]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda names: names[0].remove("model.layers.1"), "model.layers.1"),
        (lambda names: names[1].append("model.layers.1"), "model.layers.1"),
        (lambda names: names[1].append("model.layrs.1"), "model.layrs.1"),
        (lambda names: names[1].remove("lm_head"), "lm_head"),
    ],
    ids=["missing", "twice", "unknown", "no head"],
)
def test_names_that_are_wrong_are_named(change, name):
    names = generate_hf_model_fqn_per_model_part(2, 4)
    change(names)
    with pytest.raises(SplitError, match=name.replace(".", r"\.")):
        built(decoder(), module_fqns_per_model_part=names)


def test_two_stages_a_rank_need_a_schedule_for_them():
    names = generate_hf_model_fqn_per_model_part(4, 4)
    stages, parts = split_model_into_stages(decoder(), mesh()["pp"], "pp", "1f1b", "cpu", names)
    assert [stage.stage_index for stage in stages] == [0, 2]
    assert len(parts) == 2
    with pytest.raises(ScheduleError, match=r"'1f1b' runs 1 stage\(s\) a rank, but this rank has 2 of 4"):
        built(decoder(), module_fqns_per_model_part=names)
    with pytest.raises(ScheduleError, match="3 stages cannot be dealt out to 2 ranks"):
        built(decoder(), module_fqns_per_model_part=generate_hf_model_fqn_per_model_part(3, 4))


def test_the_pieces_one_by_one():
    made = pipeline_model(decoder(), mesh(rank=1), None, loss_fn=cross_entropy, local_batch_size=4, device="cpu")
    schedule, parts, has_first, has_last, stages = made
    assert (schedule.n_microbatches, has_first, has_last) == (4, False, True)
    assert parts == [stage.submod for stage in stages]


def test_counts_are_the_whole_models_on_every_rank():
    model = decoder(tied=True)
    model.model.layers[0].mlp.requires_grad_(False)
    whole = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    aps = [built(model, rank) for rank in range(2)]
    assert [ap.get_total_param_count() for ap in aps] == [whole, whole]
    assert [ap.get_total_param_count(trainable_only=True) for ap in aps] == [whole - frozen] * 2
    tied = model.lm_head.weight.numel()
    assert sum(count for ap in aps for count in ap.get_stage_param_counts()) == whole + tied
    v = built(model, pp_schedule="zb-v")
    assert len(list(v.parameters())) == len({id(p) for part in v.parts for p in part.parameters()})


def test_what_people_read(caplog):
    ap = built(decoder(), 1)
    assert ap.pretty_print_stages().splitlines()[0] == f"Stage 1 (last): params={ap.get_stage_param_counts()[0]:,}"
    assert "  - model.layers.3" in ap.pretty_print_stages()
    assert ap.pretty_print_stages(max_modules_per_stage=1).splitlines()[1:] == ["  - model.layers.2", "  - ..."]
    for line in ("PP degree: 2", "Local stages: 1", "Schedule: 1f1b", "n_microbatches: 4", "Total params: 11,408"):
        assert line in ap.debug_summary()
    (names,) = ap.list_stage_modules()
    assert {"lm_head", "model.norm", "model.layers.2", "model.layers.3"} < set(names)
    assert not {"model.embed_tokens", "model.layers.0"} & set(names)
    with caplog.at_level(logging.INFO):
        ap.log_debug_summary()
    assert "Stage 1 (last)" in caplog.text


def test_the_schedule_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    ap = built(decoder(), pp_schedule="zb-v")
    ap.visualize_current_schedule(str(tmp_path / "schedule.png"))
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["schedule.png"]
    assert ap.visualize_current_schedule() is not None


def test_a_module_inside_of_what_is_kept_stays():
    model = decoder()
    model.model.norm = nn.Sequential(model.model.norm, nn.Identity())
    model.lm_head = nn.Sequential(model.lm_head)
    last = built(model, 1).parts[0]
    assert len(last.model.norm) == 2
    assert isinstance(last.lm_head[0], nn.Linear)


def test_families_that_are_called_otherwise():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=3, n_head=2, n_positions=16)
    part = built(transformers.AutoModelForCausalLM.from_config(config)).parts[0]
    assert list(part.transformer.h) == ["0", "1"]
    assert part.transformer.wpe is not None


def test_the_function_that_makes_stages_parallel():
    seen = []

    def wrap(part, world_mesh, moe_mesh, *, pp_enabled, **axes):
        seen.append((part, pp_enabled, axes))
        return nn.Sequential(part) if len(seen) == 1 else None

    axes = {"ep_axis_name": "ep", "ep_shard_axis_names": ("ep_shard",), "tp_axis_name": "tp", "cp_axis_name": "cp"}
    ap = built(decoder(), parallelize_fn=wrap, pp_schedule="zb-v", dp_axis_names=("a", "b"), **axes)
    assert [entry[0] for entry in seen] == [ap.parts[0][0], ap.parts[1]]
    assert all(enabled for _, enabled, _ in seen)
    assert seen[0][2] == {"dp_axis_names": ("a", "b"), **axes}
    assert [stage.submod for stage in ap.info.stages] == ap.parts


def test_dtype_and_meta():
    assert {p.dtype for p in built(decoder(), dtype=torch.bfloat16).parts[0].parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        model = decoder()
    ap = built(model)
    assert all(p.is_meta for p in ap.parts[0].parameters())
    with pytest.raises(PipelineError, match="on the meta device: call materialize_stages"):
        ap.info.schedule._check_stages()


def test_a_shared_parameter_that_has_become_two():
    def split(part, *_, **axes):
        if part.lm_head is not None:
            part.lm_head.weight = nn.Parameter(part.lm_head.weight.detach().clone())

    with pytest.raises(PipelineError, match=r"lm_head\.weight were one parameter.* and are two now"):
        built(decoder(tied=True), parallelize_fn=split, pp_schedule="zb-v")
