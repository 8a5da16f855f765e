"""What can be wrong before a model is there."""

import types

import pytest
import torch
from torch import nn

from torchdistpackage import PipelineError, ScheduleError, SplitError, trainer
from torchdistpackage.split.pipeline_stage import PipelineStage
from torchdistpackage.trainer import (
    AutoPipeline,
    AutoPipelineConfig,
    build_pipeline_schedule,
    get_schedule_class,
    pipeline_model,
    validate_hf_model_for_pipeline_support,
)
from torchdistpackage.trainer.parallelize import parallelized


class Axis:
    def __init__(self, size=2, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def get_local_rank(self):
        return self._rank

    def get_group(self):
        return None


def mesh(**sizes):
    return {"pp": Axis(**sizes)}


def test_every_name_of_the_room_is_there():
    assert all(hasattr(trainer, name) for name in trainer.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trainer.nonsense


def test_a_configuration_as_an_object_and_by_name():
    config = AutoPipelineConfig(world_mesh=mesh(), pp_batch_size=4, device="cpu")
    for ap in (AutoPipeline(config), AutoPipeline(world_mesh=config.world_mesh, pp_batch_size=4, device="cpu")):
        assert ap.world_mesh is config.world_mesh
        assert (ap.pp_schedule, ap.pp_batch_size, ap.pp_axis_name) == ("1f1b", 4, "pp")
        assert ap.device == torch.device("cpu")
        assert ap.pp_mesh.size() == 2
    with pytest.raises(TypeError, match="pp_batch_size"):
        AutoPipeline(config, pp_batch_size=8)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ap.nonsense


def test_what_later_versions_add_is_accepted():
    more = {"patch_stage_backward_maybe_with_nosync": True, "defer_fsdp_grad_sync": False, "pp_seq_len": 128}
    ap = AutoPipeline(world_mesh=mesh(), ep_shard_axis_names=("ep",), moe_mesh=None, **more)
    assert ap.update_seq_len(64) is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"world_mesh": None}, "world_mesh must be provided"),
        ({"pp_schedule": None}, "Either pipeline_parallel_schedule or pipeline_parallel_schedule_csv must be provided"),
        ({"pp_microbatch_size": 3, "pp_batch_size": 4}, "local_batch_size must be divisible by microbatch_size"),
        ({"pp_microbatch_size": 0}, "at least 1 row"),
        ({"round_virtual_stages_to_pp_multiple": "sideways"}, "'up', 'down' or None"),
    ],
)
def test_configurations_that_cannot_work(options, text):
    with pytest.raises(ValueError, match=text):
        AutoPipeline(**{"world_mesh": mesh(), **options})


def test_a_csv_file_needs_no_name():
    AutoPipelineConfig(pp_schedule=None, pp_schedule_csv="mine.csv").validate()


def test_before_build():
    ap = AutoPipeline(world_mesh=mesh(), device="cpu")
    assert not ap.info.enabled
    assert ap.info.schedule is ap.info.model_parts is ap.info.stages is None
    assert ap.list_stage_modules() == ap.get_stage_param_counts() == []
    assert ap.get_total_param_count() == ap.get_total_param_count(trainable_only=True) == 0
    assert ap.pretty_print_stages() == "<no stages>"
    for line in ("PP degree: 2", "Local stages: 0", "Schedule: None", "n_microbatches: None"):
        assert line in ap.debug_summary()
    for call in (ap.step, ap.eval, ap.visualize_current_schedule, lambda: ap.parts, lambda: ap.clip_grad_norm(1.0)):
        with pytest.raises(RuntimeError, match=r"Autopipeline not built. Call build\(\) first."):
            call()
    with pytest.raises(RuntimeError, match="not built"):
        ap.scale_grads_by_divisor(2)


def test_build_needs_a_model_and_a_loss():
    ap = AutoPipeline(world_mesh=mesh(), device="cpu")
    with pytest.raises(AssertionError, match="loss_fn must be provided"):
        ap.build(nn.Linear(2, 2), loss_fn=None)
    with pytest.raises(AssertionError, match="model must be a PyTorch module"):
        ap.build("model", loss_fn=print)


def test_parameters_are_counted():
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 1, bias=False))
    assert AutoPipeline._count_parameters(model) == 60
    model[0].weight.requires_grad_(False)
    assert AutoPipeline._count_parameters(model, trainable_only=True) == 10


def test_torchs_names_of_schedules():
    torchs = {
        "1F1B": "1f1b",
        "GPipe": "gpipe",
        "ScheduleGPipe": "gpipe",
        "Interleaved1F1B": "interleaved-1f1b",
        "interleavedzerobubble": "interleaved-zb",
        "LoopedBFS": "looped-bfs",
        "ZBVZeroBubble": "zb-v",
        "DualPipeV": "dualpipe-v",
    }
    assert {name: get_schedule_class(name).name for name in torchs} == torchs
    with pytest.raises(ScheduleError, match="known schedules"):
        get_schedule_class("PipeDream9")


def stages(*indices, count):
    return [PipelineStage(nn.Linear(2, 2), index, count) for index in indices]


def test_a_schedule_is_bound_to_stages(tmp_path):
    schedule = build_pipeline_schedule(None, "1F1B", 2, 8, stages(0, count=2), print)
    assert (schedule.name, schedule.n_microbatches, schedule.loss_fn) == ("1f1b", 4, print)
    assert schedule.plan.placement.num_ranks == 2
    path = tmp_path / "mine.csv"
    path.write_text("0F0,0F1,,0B0,0B1\n,1F0,1F1,1B0,1B1\n")
    read = build_pipeline_schedule(str(path), None, 1, 2, stages(1, count=2), print)
    assert (read.name, read.plan.num_microbatches) == ("mine", 2)
    with pytest.raises(ValueError, match=r"2 stages and 2 micro-batches, but .* 2 stages and a batch into 4"):
        build_pipeline_schedule(str(path), None, 1, 4, stages(1, count=2), print)


def test_schedules_that_do_not_fit_the_stages():
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        build_pipeline_schedule("nowhere.csv", None, 1, 4, stages(0, count=2), print)
    with pytest.raises(ValueError, match="must be divisible by"):
        build_pipeline_schedule(None, "1f1b", 3, 8, stages(0, count=2), print)
    with pytest.raises(ValueError, match=r"'1f1b' runs 1 stage\(s\) a rank, but this rank has 2 of 4"):
        build_pipeline_schedule(None, "1f1b", 1, 4, stages(0, 2, count=4), print)
    with pytest.raises(ScheduleError, match=r"'zb-v' runs 2 stage\(s\)"):
        build_pipeline_schedule(None, "ZBVZeroBubble", 1, 4, stages(0, count=2), print)
    with pytest.raises(ScheduleError, match="no schedule is given"):
        build_pipeline_schedule(None, None, 1, 4, stages(0, count=2), print)


def test_one_rank_is_no_pipeline_model():
    with pytest.raises(AssertionError, match="Pipeline parallelism is not enabled"):
        pipeline_model(nn.Linear(2, 2), mesh(size=1), None, loss_fn=print)


def test_encoder_decoders_are_refused_and_tied_embeddings_are_not():
    model = nn.Linear(2, 2)
    model.config = types.SimpleNamespace(is_encoder_decoder=False, tie_word_embeddings=True)
    validate_hf_model_for_pipeline_support(model)
    model.config.is_encoder_decoder = True
    with pytest.raises(SplitError, match="is_encoder_decoder"):
        validate_hf_model_for_pipeline_support(model)


def test_what_a_parallelize_fn_gets_and_gives():
    stage, seen = nn.Linear(2, 2), []

    def with_flag(model, world, moe, *, pp_enabled, dp_axis_names):
        seen.append((world, moe, pp_enabled, dp_axis_names))

    def without_flag(model, world, moe, *, dp_axis_names):
        return nn.Sequential(model)

    assert parallelized(stage, with_flag, 1, 2, {"dp_axis_names": ("dp",)}) is stage
    assert seen == [(1, 2, True, ("dp",))]
    assert parallelized(stage, without_flag, 1, 2, {"dp_axis_names": ()})[0] is stage
    assert issubclass(PipelineError, RuntimeError)
