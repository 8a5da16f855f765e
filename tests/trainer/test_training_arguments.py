"""What a run's configuration says, what follows from it, and what does not fit."""

import json

import pytest
import torch

from torchdistpackage import ScheduleError, TrainerError
from torchdistpackage.schedule import build, describe, names
from torchdistpackage.trainer import PipelineTrainingArguments


@pytest.mark.parametrize(
    "given", [{"pipeline_chunks": 6}, {"n_microbatches": 6}, {"pipeline_chunks": 6, "n_microbatches": 6}]
)
def test_both_names_of_the_number_of_micro_batches(given):
    args = PipelineTrainingArguments(**given)
    assert (args.pipeline_chunks, args.n_microbatches) == (6, 6)


@pytest.mark.parametrize(
    ("given", "schedule", "chunks"),
    [
        ({}, "1f1b", 1),
        ({"stages_per_rank": 1, "pp_stage_type": "loop"}, "1f1b", 1),
        ({"stages_per_rank": 3}, "interleaved-1f1b", 3),
        ({"pp_stage_type": "v"}, "zb-v", 2),
        ({"schedule": "Interleaved1F1B"}, "interleaved-1f1b", 2),
        ({"schedule": "hanayo", "stages_per_rank": 4, "pp_stage_type": "v"}, "hanayo", 4),
        ({"schedule": "auto", "stages_per_rank": 2}, "auto", 2),
        ({"schedule": "AUTO-V"}, "auto-v", 2),
    ],
)
def test_schedule_and_chunks(given, schedule, chunks):
    args = PipelineTrainingArguments(**given)
    assert (args.resolved_schedule, args.chunks) == (schedule, chunks)


@pytest.mark.parametrize("name", names())
def test_every_schedule_runs_its_own_number_of_chunks(name):
    args = PipelineTrainingArguments(schedule=name, pp_stage_type=describe(name).placement)
    assert (args.resolved_schedule, args.chunks) == (name, describe(name).chunks)


def test_a_plan_says_its_own_sizes(tmp_path):
    plan = build("zb-v", 2, 6)
    (tmp_path / "mine.csv").write_text(plan.to_csv())
    for schedule in (plan, tmp_path / "mine.csv", str(tmp_path / "mine.csv")):
        args = PipelineTrainingArguments(schedule=schedule)
        assert (args.n_microbatches, args.chunks) == (6, 2)
        assert args.resolved_schedule.actions == plan.actions
    with pytest.raises(TrainerError, match=r"n_microbatches: 4, the plan: 6"):
        PipelineTrainingArguments(schedule=plan, n_microbatches=4)
    with pytest.raises(TrainerError, match=r"pipeline_parallel_size=4, but the plan 'zb-v' is made for 2"):
        PipelineTrainingArguments(schedule=plan, pipeline_parallel_size=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pipeline_chunks": 2, "n_microbatches": 3}, r"pipeline_chunks: 2, n_microbatches: 3"),
        ({"schedule": "1f1b", "stages_per_rank": 2}, r"stages_per_rank=2.*interleaved-1f1b"),
        ({"pp_stage_type": "v", "stages_per_rank": 4}, r"'zb-v' \(of pp_stage_type='v'\).*hanayo"),
        ({"pp_stage_type": "v", "schedule": "gpipe"}, r"contradicts schedule 'gpipe'.* in a loop"),
        ({"schedule": 3}, "a name, a Plan or the path of one, got int"),
        ({"bf16": True, "fp16": True}, "choose one"),
        ({"eval_strategy": "often"}, "'no', 'steps', 'epoch'; got 'often'"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"num_train_epochs": 0}, "nothing to train"),
        ({"fuse_optim_with_backward": True}, "every micro-batch"),
        ({"torch_compile_mode": "max-autotune"}, "is not offered"),
        ({"save_on_each_node": True}, "is not offered: a checkpoint is written by all nodes together"),
        ({"save_safetensors": False}, "is not offered"),
        ({"load_best_model_at_end": True}, "got 'no' and 'steps'"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 300}, "got 1000 and 300"),
        ({"default_dtype": "int8"}, "got 'int8'"),
        ({"report_to": "wandb"}, r"report_to=\[lambda: wandb"),
        ({"per_device_train_batch_size": 0}, "at least 1, got 0"),
        ({"per_device_train_batch_size": None}, "at least 1, got None"),
        ({"seed": -2}, "at least -1, got -2"),
        ({"learning_rate": float("nan")}, "at least 0, got nan"),
        ({"adam_beta2": 1.5}, "between 0 and 1, got 1.5"),
        ({"save_steps": 0}, "save_strategy='no' for never"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_num_workers=1"),
        ({"label_names": ()}, "one or more names"),
    ],
)
def test_what_does_not_fit(given, message):
    with pytest.raises(TrainerError, match=message):
        PipelineTrainingArguments(**given)


@pytest.mark.parametrize("schedule", ["unheard-of", "absent.csv"])
def test_unknown_schedules(schedule):
    with pytest.raises(ScheduleError, match=schedule):
        PipelineTrainingArguments(schedule=schedule)


def test_steps_of_the_run():
    assert PipelineTrainingArguments(max_steps=7).train_steps(100) == 7
    assert PipelineTrainingArguments(num_train_epochs=2.5).train_steps(3) == 8
    assert PipelineTrainingArguments(epoch_train_steps=10).train_steps(None) == 10
    with pytest.raises(TrainerError, match="max_steps="):
        PipelineTrainingArguments().train_steps(None)
    with pytest.raises(TrainerError, match="0 steps"):
        PipelineTrainingArguments().train_steps(0)


def test_warm_up():
    assert PipelineTrainingArguments(warmup_steps=5, warmup_ratio=0.5).warmup(100) == 5
    assert PipelineTrainingArguments(warmup_steps=0.05).warmup(101) == 6
    assert PipelineTrainingArguments(warmup_ratio=0.1).warmup(101) == 11
    assert PipelineTrainingArguments().warmup(101) == 0


def test_everything_is_json():
    args = PipelineTrainingArguments(
        default_dtype=torch.bfloat16, schedule=build("1f1b", 2, 4), report_to=[lambda: None, "tensorboard"]
    )
    told = json.loads(args.to_json_string())
    assert told["default_dtype"] == "bfloat16"
    assert told["schedule"] == "plan '1f1b': 2 ranks, 4 micro-batches"
    assert told["report_to"] == ["function", "tensorboard"]


def test_what_follows():
    args = PipelineTrainingArguments(output_dir="out", metric_for_best_model="accuracy", report_to="none")
    assert (args.logging_dir, args.greater_is_better, args.report_to) == ("out/runs", True, ())
    assert PipelineTrainingArguments().greater_is_better is False


def test_words_of_a_command_line_become_arguments():
    args = PipelineTrainingArguments.from_words(["--max-steps=3", "fp16=false", "report_to=[]"], learning_rate=1e-3)
    assert (args.max_steps, args.fp16, args.report_to, args.learning_rate) == (3, False, (), 1e-3)


@pytest.mark.parametrize("word", ["max_step=3", "schedule", "=4"])
def test_a_word_that_is_no_argument_is_named(word):
    with pytest.raises(TrainerError, match=f"'{word}' is no argument"):
        PipelineTrainingArguments.from_words([word])
