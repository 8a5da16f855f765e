"""One small model in any layout of four processes: what the tests of checkpoints train, save, load and compare."""

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from torchdistpackage import DDP, Bf16ZeroOptimizer, forward_backward, partition_chunks, setup_distributed, tpc
from torchdistpackage.checkpoint import Checkpointer
from torchdistpackage.schedule import describe

WIDTH, ROWS = 6, 8
KINDS = ("ddp", "zero", "zero1", "zero-whole", "fsdp")
if torch.__version__ < "2.8":  # before that, what fully_shard was applied to did not run on CPUs
    KINDS = KINDS[:-1]


@dataclass(frozen=True)
class Layout:
    """Stages, how they are cut, and what replicas do."""

    pipe: int
    schedule: str = "1f1b"
    policy: str = "uniform"
    kind: str = "ddp"


def with_known_kind(layout):
    return layout if layout.kind in KINDS else Layout(layout.pipe, layout.schedule, layout.policy, "zero")


class Block(nn.Module):
    """Unequal blocks, so that uniform and balanced cuts differ."""

    def __init__(self, hidden, dropout=0.0):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(WIDTH)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        return self.norm(x + self.scale * self.dropout(self.down(torch.tanh(self.up(x)))))


def make_model(dtype=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(hidden, dropout) for hidden in (3, 17, 5, 4, 9, 3, 4, 5)]).to(dtype)


def batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)


def plain_losses(steps, dtype=torch.float64):
    """The undisturbed run, in one process without stages."""
    model, losses = make_model(dtype), []
    optimizer = adamw(model.parameters())
    for step in range(steps):
        x, y = batch(step, dtype)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Run:
    """The model in a layout, on this rank."""

    def __init__(self, layout, seed=0, **model):
        setup_distributed(backend="gloo")
        world = dist.get_world_size()
        tpc.setup_process_groups([("data", world // layout.pipe), ("pipe", layout.pipe)])
        self.layout, self.dtype = layout, model.get("dtype", torch.float64)
        whole = make_model(**model)
        torch.manual_seed(100 + seed + dist.get_rank())
        if seed:
            for parameter in whole.parameters():  # what is loaded must not be what was there
                nn.init.constant_(parameter, 0.3)
        self.stages = partition_chunks(copy.deepcopy(whole), layout.schedule, policy=layout.policy)
        self.last = layout.pipe * describe(layout.schedule).chunks - 1
        if layout.kind == "ddp":
            self.stages = {index: DDP(stage) for index, stage in self.stages.items()}
        if layout.kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for stage in self.stages.values():
                fully_shard(stage, mesh=tpc.mesh["data"])
        self.optimizer = adamw([p for stage in self.stages.values() for p in stage.parameters()])
        if layout.kind.startswith("zero"):
            partition = "parameters" if layout.kind == "zero-whole" else "elements"
            stage = 1 if layout.kind == "zero1" else 2
            self.optimizer = Bf16ZeroOptimizer(self.optimizer, stage=stage, partition=partition, bucket_size=100)
        self.scheduler = torch.optim.lr_scheduler.StepLR(getattr(self.optimizer, "optim", self.optimizer), 100)

    def checkpointer(self, folder, **more):
        return Checkpointer(folder, self.stages, optimizer=self.optimizer, scheduler=self.scheduler, **more)

    def step(self, number):
        """One step; the loss of the whole batch."""
        replicas, replica = tpc.get_dp_size(), tpc.get_dp_rank()
        mine = slice(replica * ROWS // replicas, (replica + 1) * ROWS // replicas)
        x, y = (one[mine] for one in batch(number, self.dtype))

        def forward(index, stage):
            if index == self.last:
                return lambda given: nn.functional.mse_loss(stage(given[0]), given[1])
            return lambda given: stage(given[0] if isinstance(given, list | tuple) else given)

        functions = [forward(index, stage) for index, stage in self.stages.items()]
        inputs = [([x] if s == 0 else []) + ([y] if s == self.last else []) or None for s in self.stages]
        self.optimizer.zero_grad()
        loss = forward_backward(
            self.optimizer, functions, None, inputs, 2, schedule=self.layout.schedule, broadcast_loss=True
        )
        self.optimizer.step()
        self.scheduler.step()
        total = loss.detach().double().clone()
        dist.all_reduce(total)
        return (total / dist.get_world_size()).item()
