"""Read by mypy alone: what type checkers of users' code see."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from typing_extensions import assert_type

import torchdistpackage as tdp
from torchdistpackage.checkpoint import CheckpointInfo, ExportReport, Loaded, export_safetensors, list_checkpoints
from torchdistpackage.schedule import CostModel, Plan, Timeline, build, names, planner, simulate
from torchdistpackage.trainer import TrainOutput

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
assert_type(tdp.NaiveDDP(nn.Linear(2, 2)).reduce_gradients(), None)
assert_type(tdp.apply_tensor_parallel(nn.Linear(2, 2)), nn.Module)
assert_type(tdp.ShardedEMA(nn.Linear(2, 2)).num_updates, int)
assert_type(tdp.fix_rand(), int)
assert_type(tdp.get_mp_ckpt_suffix(), str)
assert_type(tdp.PipelineTrainer(model_init=lambda: nn.Linear(2, 2), train_dataset=[]).train(), TrainOutput)
assert_type(tdp.PipelineTrainer(model=nn.Linear(2, 2), eval_dataset=[]).evaluate(), dict[str, float])
assert_type(tdp.Checkpointer("run", nn.Linear(2, 2)).load(), Loaded | None)
assert_type(list_checkpoints("run"), list[CheckpointInfo])
assert_type(export_safetensors("run", "tuned"), ExportReport)
