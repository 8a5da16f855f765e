"""Splitters of users on several ranks: the step is the plain one, shared parameters included, and nobody waits."""

import copy

import torch
from distributed_harness import run_distributed
from torch import nn
from torch.distributed.pipelining import PipelineStage as TorchStage

from torchdistpackage import PipelineStage, SplitError, forward_backward, setup_distributed, tpc
from torchdistpackage.schedule import Placement
from torchdistpackage.trainer.stages import cut_model

IDS = torch.arange(8).view(4, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.layers = nn.ModuleDict({str(number): nn.Linear(8, 8) for number in range(4)})
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x).tanh()
        return self.head(x) if self.head is not None else x


def pruned(model, count):
    modules = [copy.deepcopy(model) for _ in range(count)]
    for index, part in enumerate(modules):
        for number in range(4):
            if number * count // 4 != index:
                del part.layers[str(number)]
        if index:
            part.embed = None
        if index < count - 1:
            part.head = None
    return modules


def with_torchs_stages(model, args, kwargs, stage_indices, train, device, rank, pp_group):
    modules = pruned(model, sum(map(len, stage_indices)))
    mine = stage_indices[rank]
    stages = [TorchStage(modules[i], i, len(modules), torch.device("cpu"), group=pp_group) for i in mine]
    return modules, [modules[i] for i in mine], stages, None


def broken_on_the_last_rank(model, args, kwargs, stage_indices, train, device, rank, pp_group):
    if rank == len(stage_indices) - 1:
        raise KeyError("lost")
    modules = pruned(model, sum(map(len, stage_indices)))
    mine = stage_indices[rank]
    return modules, [modules[i] for i in mine], [PipelineStage(modules[i], i, len(modules)) for i in mine], None


def loss_of(logits):
    return logits.float().logsumexp(-1).sum()


def with_loss(stage):
    return lambda x: loss_of(stage(x))


def train(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("pipe", world_size)])
    found = {}
    for schedule, placement in (("1f1b", Placement.loop(world_size)), ("zb-v", Placement.v(world_size))):
        cut = cut_model(
            model_init=Tied, splitter=with_torchs_stages, placement=placement, rank=rank, group=tpc.get_group("pipe"),
            example_args=(IDS[:1],), seed=0,
        )  # fmt: skip
        last = placement.num_stages - 1
        functions = [with_loss(stage) if i == last else stage for i, stage in cut.stages.items()]
        inputs = [IDS if index == 0 else None for index in cut.stages]
        optimizer = torch.optim.SGD(cut.names.values(), lr=0.1)
        for _ in range(2):
            forward_backward(
                optimizer, fwd_fn=functions, inputs=inputs, num_microbatches=4, schedule=schedule, loss_reduction="sum"
            )
            optimizer.step()
        found[schedule] = {name: parameter.detach() for name, parameter in cut.names.items()}
    try:
        cut_model(model_init=Tied, splitter=broken_on_the_last_rank, placement=Placement.loop(world_size), rank=rank)
    except (KeyError, SplitError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def test_shared_parameters_and_torchs_stages_and_a_rank_that_fails() -> None:
    torch.manual_seed(0)
    plain = Tied()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for row in IDS.split(1):
            loss_of(plain(row)).backward()
        optimizer.step()
    results = run_distributed(train, 2, timeout=120)
    expected = dict(plain.named_parameters())
    for schedule in ("1f1b", "zb-v"):
        for found in results:
            for name, parameter in found[schedule].items():
                torch.testing.assert_close(parameter, expected[name].detach(), rtol=1e-6, atol=1e-7)
        assert {name for found in results for name in found[schedule]} == expected.keys()
    assert results[1]["error"] == "KeyError: 'lost'"
    assert results[0]["error"] == "SplitError: global rank 1 could not cut the model: 'lost'"
