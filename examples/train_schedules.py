"""Any schedule of the catalogue on real images, with several chunks a rank where it has them.

torchrun --standalone --nproc-per-node 2 examples/train_schedules.py --schedule zb-v
torchrun --standalone --nproc-per-node 2 examples/train_schedules.py --schedule interleaved-1f1b --chunks 3
torchrun --standalone --nproc-per-node 2 examples/train_schedules.py --schedule zb-v --draw step.png

The losses are the same for every schedule; the last line says how the measured step was spent.
"""

import argparse

import torch
from digits import Digits
from torch import nn
from torch.utils.data import DataLoader

from torchdistpackage import (
    clip_grad_norm_,
    draw_last_step,
    forward_backward,
    last_timeline,
    partition_chunks,
    setup_distributed,
    tpc,
)
from torchdistpackage.schedule import describe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--schedule", default="zb-v", help="torchdistpackage schedule list")
parser.add_argument("--chunks", type=int, help="stages of a rank, where the schedule leaves the choice")
parser.add_argument("--microbatches", type=int, default=8)
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--draw", help="draw the last step, measured beside simulated, to this .png, .svg or .json")
args = parser.parse_args()

torch.set_num_threads(1)
_, world_size, *_ = setup_distributed()
tpc.setup_process_groups([("pipe", world_size)])
facts = describe(args.schedule)
placement = facts.place(world_size, args.chunks or facts.chunks)
last = placement.num_stages - 1

torch.manual_seed(0)
hidden = [layer for _ in range(7) for layer in (nn.Linear(256, 256), nn.ReLU())]
layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), *hidden, nn.Linear(256, 10)]
stages = partition_chunks(layers, placement)  # {global index of the stage: its layers}
parameters = [p for module in stages.values() for p in module.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
criterion = nn.CrossEntropyLoss()


def fwd_fn_of(stage, training):
    """What one stage does with one micro-batch: all but the last hand on, the last one computes the loss."""
    if training and stage == last:
        return lambda x: criterion(stages[stage](x[0]), x[1])
    return stages[stage]


def inputs_of(stage, images, labels):
    """Images enter on the first stage, labels on the last."""
    own = ([images] if stage == 0 else []) + ([labels] if stage == last and labels is not None else [])
    return own or None


train = DataLoader(Digits(train=True), batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(0))
test = DataLoader(Digits(train=False), batch_size=120)

for epoch in range(args.epochs):
    for number, (images, labels) in enumerate(train):
        final = epoch == args.epochs - 1 and number == len(train) - 1
        loss = forward_backward(
            optimizer,
            [fwd_fn_of(stage, training=True) for stage in stages],
            None,
            [inputs_of(stage, images, labels) for stage in stages],
            args.microbatches,
            schedule=args.schedule,
            record_timeline=final,
        )
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    correct = 0
    for images, labels in test:
        functions = [fwd_fn_of(stage, training=False) for stage in stages]
        inputs = [inputs_of(stage, images, None) for stage in stages]
        logits = forward_backward(
            None, functions, None, inputs, args.microbatches, forward_only=True, schedule=args.schedule
        )
        if logits is not None:
            correct += (logits.argmax(1) == labels).sum().item()
    if loss is not None:  # the rank of the last stage: under a v placement that is rank 0
        print(f"epoch {epoch}: loss {loss.item():.4f}, test accuracy {correct / len(test.dataset):.1%}", flush=True)

timeline = last_timeline()
if timeline is not None and tpc.get_pp_rank() == 0:
    print(f"{timeline.name}: {1e3 * timeline.makespan:.1f} ms, idle {timeline.bubble_share:.0%} of the time")
    if args.draw:
        draw_last_step(args.draw)
