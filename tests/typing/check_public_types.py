"""Read by mypy alone: what type checkers of users' code see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor.parallel.style import ParallelStyle
from typing_extensions import assert_type

import torchdistpackage as tdp
from torchdistpackage import checkpoint, split
from torchdistpackage.checkpoint import CheckpointInfo, ExportReport, Loaded, export_safetensors, list_checkpoints
from torchdistpackage.runtime import Executor, LoopbackTransport, StepResult, loopback
from torchdistpackage.schedule import (
    CostModel,
    Plan,
    ScheduleFacts,
    Timeline,
    build,
    complete,
    describe,
    lower_bound,
    names,
    outline,
    peak_activations,
    planner,
    simulate,
)
from torchdistpackage.split import parts
from torchdistpackage.tools import ModelProfile, NanFinder
from torchdistpackage.topology import CommReport, RankTable, rank_table
from torchdistpackage.trainer import TrainOutput
from torchdistpackage.visualize import chrome_trace, text_grid, unit_timeline

assert_type(build("1f1b", 2, 4), Plan)
assert_type(names(), tuple[str, ...])
assert_type(tdp.clip_grad_norm_([], 1.0), torch.Tensor)
assert_type(tdp.flatten_model(nn.Linear(2, 2), [], True), list[nn.Module])
assert_type(tdp.flatten_model(nn.Linear(2, 2), []), nn.Sequential)
assert_type(tdp.partition_uniform([nn.Linear(2, 2)]), list[nn.Module])
assert_type(tdp.forward_backward(fwd_fn=lambda x: x, inputs=None), Any)
assert_type(tdp.tpc.get_pp_rank(), int)
assert_type(tdp.partition_chunks([nn.Linear(2, 2)], "zb-v"), dict[int, nn.Sequential])
assert_type(tdp.forward_backward(fwd_fn=[lambda x: x], inputs=[None], schedule=build("zb-v", 1, 2)), Any)
assert_type(tdp.last_timeline(), Timeline | None)
assert_type(tdp.profile_stage_costs(lambda x: x), CostModel)
assert_type(simulate(build("1f1b", 2, 4), CostModel.uniform(2)), Timeline)
assert_type(planner.plan(CostModel.uniform(2), 2, 4).plan, Plan)
assert_type(planner.plan(CostModel.uniform(2), 2, 4).candidates, tuple[planner.Candidate, ...])
assert_type(outline("1f1b", 2, 4), Plan)
assert_type(complete(Plan.from_csv("0F0,0B0")), Plan)
assert_type(describe("1f1b"), ScheduleFacts)
assert_type(lower_bound(CostModel.uniform(2), build("1f1b", 2, 4).placement, 4), float)
assert_type(peak_activations(build("1f1b", 2, 4)), tuple[int, ...])
assert_type(text_grid(unit_timeline(build("1f1b", 2, 4))), str)
assert_type(chrome_trace(unit_timeline(build("1f1b", 2, 4))), dict[str, Any])
assert_type(loopback(2), list[LoopbackTransport])
assert_type(Executor(build("1f1b", 1, 4), loopback(1)[0]).run([]), StepResult)
assert_type(rank_table(4, [("pipe", 4)]), RankTable)
assert_type(tdp.setup_distributed().world_size, int)
assert_type(tdp.setup_node_groups(8), ProcessGroup | None)
assert_type(tdp.find_free_port(), str)
assert_type(tdp.test_comm(), CommReport)
assert_type(tdp.is_using_pp(), bool)
assert_type(tdp.tpc.get_group("pipe"), ProcessGroup)
assert_type(tdp.tpc.get_group("global"), None)
assert_type(tdp.torch_parallel_context, tdp.ParallelContext)
assert_type(tdp.torch_parallel_context.all_ranks("data"), list[list[int]])
assert_type(tdp.PipelineError().microbatch, int | None)
assert_type(tdp.NonFiniteError().module, str | None)
assert_type(tdp.Routed({1: ()}).skips, tuple[tuple[int, int], ...])
assert_type(tdp.NaiveDDP(nn.Linear(2, 2)).reduce_gradients(), None)
assert_type(tdp.MoEDP([nn.Parameter(torch.ones(2))]).expert_params, dict[str, torch.Tensor])
assert_type(tdp.create_moe_dp_hooks([nn.Parameter(torch.ones(2))]), tdp.MoEDP)
assert_type(tdp.moe_dp_iter_step(), None)
assert_type(tdp.Bf16ZeroOptimizer(torch.optim.SGD([], lr=0.1)).state_dict(), dict[str, Any])
assert_type(tdp.PipelineGradScaler("cpu").get_scale(), float)
assert_type(tdp.forward_eval(lambda x: x), Any)
assert_type(tdp.partition_balanced([nn.Linear(2, 2)]), list[nn.Module])
assert_type(tdp.flat_and_partition(nn.Sequential()), list[nn.Module])
assert_type(tdp.partition_causal_lm(nn.Linear(2, 2)), dict[int, nn.Module])
assert_type(tdp.load_causal_lm("whole"), dict[int, nn.Module])
assert_type(tdp.save_causal_lm({}, "whole"), None)
assert_type(tdp.generate({}, torch.ones(1, 1)), Any)
assert_type(tdp.split_model(nn.Linear(2, 2), torch.ones(1, 2)), tdp.Pipe)
assert_type(tdp.last_plan(), Plan | None)
assert_type(tdp.draw_last_step("step.png"), None)
assert_type(tdp.tie_parameters("weight", None), None)
assert_type(tdp.tensor_parallel_plan(nn.Linear(2, 2)), dict[str, ParallelStyle])
assert_type(tdp.find_nan(nn.Linear(2, 2)), NanFinder)
assert_type(tdp.get_model_profile(nn.Linear(2, 2)), ModelProfile)
assert_type(tdp.register_profile_hooks(nn.Linear(2, 2)), ModelProfile)
assert_type(tdp.report_prof({}), ModelProfile)
assert_type(tdp.replace_all_module(nn.Linear(2, 2), lambda n, m: False, lambda n, m: m), nn.Linear)
assert_type(tdp.AutoPipeline(world_mesh=None).build(nn.Linear(2, 2)), tdp.AutoPipeline)
assert_type(tdp.AutoPipeline(world_mesh=None).info, tdp.PipelineInfo)
assert_type(tdp.AutoPipelineConfig().validate(), None)
assert_type(tdp.PipelineTrainingArguments().train_steps(3), int)
assert_type(tdp.apply_tensor_parallel(nn.Linear(2, 2)), nn.Module)
assert_type(tdp.ShardedEMA(nn.Linear(2, 2)).num_updates, int)
assert_type(tdp.fix_rand(), int)
assert_type(tdp.get_mp_ckpt_suffix(), str)
assert_type(tdp.PipelineTrainer(model_init=lambda: nn.Linear(2, 2), train_dataset=[]).train(), TrainOutput)
assert_type(tdp.PipelineTrainer(model=nn.Linear(2, 2), eval_dataset=[]).evaluate(), dict[str, float])
assert_type(tdp.Checkpointer("run", nn.Linear(2, 2)).load(), Loaded | None)
assert_type(list_checkpoints("run"), list[CheckpointInfo])
assert_type(export_safetensors("run", "tuned"), ExportReport)

# split/
assert_type(split.balanced_boundaries([1, 2], 2), tuple[int, ...])
assert_type(split.load_balance([1, 2], (0, 1, 2)), split.LoadBalance)
assert_type(split.layout_boundaries("Et|tL", before=1, blocks=2, after=1), tuple[int, ...])
assert_type(split.call_cost(nn.Linear(2, 2), (torch.zeros(1, 2),)), split.CallCost)
assert_type(split.pipeline(nn.Linear(2, 2), (torch.zeros(1, 2),)), split.Pipe)
assert_type(split.pipeline(nn.Linear(2, 2), (torch.zeros(1, 2),)).get_stage_module(0), split.TracedStage)
assert_type(tdp.pipe_split(), None)
assert_type(tdp.split_causal_lm(nn.Linear(2, 2), 2), dict[int, nn.Module])
assert_type(tdp.create_manual_causal_lm_splitter(), split.ModelSplitter)
assert_type(tdp.create_automatic_splitter({"layers.2": "beginning"}), split.ModelSplitter)
assert_type(split.record_init(lambda: nn.Linear(2, 2)), split.RecordedInit)
assert_type(split.ties_of(nn.Parameter(torch.zeros(1))), split.TiedParameter | None)
assert_type(split.whole_model_state_dict(nn.Linear(2, 2)), dict[str, torch.Tensor])
assert_type(split.load_stages("model", 4, [2]), dict[int, nn.Module])
assert_type(split.save_stage(nn.Linear(2, 2), "tuned", 0, 1), split.StageFiles | None)
assert_type(tdp.load_split_model("parts/top.safetensors"), Any)
assert_type(parts.split_checkpoint("model", [2, 10], "parts"), list[parts.PartFile])
assert_type(parts.place_parts({"bottom": 1}, {"cuda:0": 2}), dict[str, str])

# checkpoint/
assert_type(checkpoint.inspect_checkpoint("run/step-00000120"), checkpoint.Manifest)
assert_type(checkpoint.verify_checkpoint("run/step-00000120"), str | None)
assert_type(checkpoint.load_safetensors("trained", nn.Linear(2, 2)), checkpoint.LoadedNames)
assert_type(checkpoint.save_safetensors(nn.Linear(2, 2), "trained"), ExportReport)
assert_type(checkpoint.ResumableSampler(range(3)).state_dict(), dict[str, int])
