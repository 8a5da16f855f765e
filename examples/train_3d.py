"""Data x pipeline x tensor parallelism around a vision transformer of timm, with the numbers of the plain loop.

torchrun --standalone --nproc-per-node 8 examples/train_3d.py --pp 2 --tp 2            # the picture below
torchrun --standalone --nproc-per-node 4 examples/train_3d.py --pp 2 --tp 2            # 96 % in a minute
torchrun --standalone --nproc-per-node 4 examples/train_3d.py --pp 2 --optimizer ddp --schedule zb-v --save digits.pt
torchrun --standalone --nproc-per-node 8 examples/train_3d.py --pp 2 --tp 2 --check    # beside the plain loop, float64
python examples/train_3d.py                                                            # one process: the same curve

                 half of each block's heads and columns     the other half
    replica 0    rank 0                                     rank 1              stage 0
                 rank 2                                     rank 3              stage 1
    replica 1    rank 4                                     rank 5              stage 0
                 rank 6                                     rank 7              stage 1

A batch has the same rows however many processes there are, and each replica takes its share of them. The optimizer's
state and the average of the weights are divided over the replicas: rank 0 has one half, rank 4 the other.
"""

import argparse
import time

import torch
import torch.distributed as dist
from digits import NUM_CLASSES, Digits
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from torchdistpackage import (
    Bf16ZeroOptimizer,
    NaiveDDP,
    ShardedEMA,
    apply_tensor_parallel,
    clip_grad_norm_,
    forward_backward,
    local_stages,
    setup_distributed,
    split_model,
    tpc,
    whole_model_state_dict,
)
from torchdistpackage.schedule import describe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--pp", type=int, choices=range(1, 9), default=1, help="ranks of a pipeline")
parser.add_argument("--tp", type=int, choices=[1, 2, 4], default=1, help="ranks that share each block, of 4 heads")
parser.add_argument("--optimizer", choices=["zero", "ddp"], default="zero", help="in shards, or whole on each replica")
parser.add_argument("--schedule", default="1f1b", help="torchdistpackage schedule list")
parser.add_argument("--microbatches", type=int, default=2)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=64, help="rows of all replicas together")
parser.add_argument("--save", metavar="FILE", help="write the averaged weights, as a state dict of the whole model")
parser.add_argument("--check", type=int, nargs="?", const=6, metavar="STEPS", help="only compare with the plain loop")
args = parser.parse_args()


def say(text):
    """Prints on the first rank, in one piece."""
    if dist.get_rank() == 0:
        print(f"{text}\n", end="", flush=True)


torch.set_num_threads(1)
_, world_size, *_ = setup_distributed()
replicas, rest = divmod(world_size, args.pp * args.tp)
if rest or args.batch_size % replicas:
    say(f"--pp {args.pp} --tp {args.tp} takes {args.pp * args.tp} processes for each replica, and here are {world_size}"
        f"; the rows of --batch-size {args.batch_size} must divide by the replicas")  # fmt: skip
    dist.barrier()  # not before this is said: when one process ends, torchrun ends the others
    raise SystemExit(2)
tpc.setup_process_groups([("data", replicas), ("pipe", args.pp), ("tensor", args.tp)])
device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
dtype = torch.float64 if args.check else torch.float32


def build_model():
    torch.manual_seed(0)
    options = {"embed_dim": 64, "depth": 4, "num_heads": 4, "class_token": False, "global_pool": "avg"}
    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=NUM_CLASSES, **options)


sets = Digits(train=True, size=8), Digits(train=False, size=8)
(images, labels), (test_images, test_labels) = ((d.images.to(device, dtype), d.labels.to(device)) for d in sets)
count = args.pp * describe(args.schedule).chunks
pipe = split_model(build_model().to(device, dtype), images[:16], num_stages=count, costs="flops")
stages = local_stages(pipe, args.schedule)  # {index: module}, one entry or several
part = apply_tensor_parallel(torch.nn.ModuleList(stages.values()))  # all that this rank has
adamw = torch.optim.AdamW(part.parameters(), lr=2e-3)
optimizer = Bf16ZeroOptimizer(adamw) if args.optimizer == "zero" else adamw  # the former averages gradients, too
modules = stages if args.optimizer == "zero" else {index: NaiveDDP(stage) for index, stage in stages.items()}
ema = ShardedEMA(part)
steps = args.check or args.epochs * (len(labels) // args.batch_size)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def batches(epoch):
    """The rows of each batch, for all replicas; the few that are left over wait for another epoch."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch)).to(device)
    return order[: len(order) // args.batch_size * args.batch_size].split(args.batch_size)


def run(modules, optimizer, images, labels=None):
    """This replica's rows of a batch through its stages: returns the loss, or without labels the logits."""
    mine, end = slice(tpc.get_dp_rank(), None, replicas), None if labels is None else count - 1
    functions = [(lambda x: cross_entropy(modules[end](x[:-1]), x[-1])) if s == end else modules[s] for s in modules]
    inputs = [[*([images[mine]] if s == 0 else []), *([labels[mine]] if s == end else [])] or None for s in modules]
    options = {"forward_only": labels is None, "schedule": args.schedule, "broadcast_loss": True}
    return forward_backward(optimizer, functions, None, inputs, args.microbatches, **options)


def train_step(batch):
    """The loss of this replica, and the norm of the whole model's gradient."""
    loss = run(modules, optimizer, images[batch], labels[batch])
    norm = clip_grad_norm_(part.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    ema.update(part, decay=0.95)
    return loss, norm


def evaluate():
    """The accuracy on this replica's rows, by its share of the rows: the mean over all ranks is that on all rows."""
    part.eval()
    logits = run(stages, None, test_images)
    part.train()
    return (logits.argmax(1) == test_labels[tpc.get_dp_rank() :: replicas]).sum() * replicas / len(test_labels)


def mean_over_ranks(values):
    values = torch.stack([*values]).to(device, torch.float64)
    dist.all_reduce(values)
    return (values / world_size).tolist()


def holdings():
    """A table with a row for each rank. Collective."""
    kinds = part.parameters(), [value for entry in optimizer.state.values() for value in entry.values()]
    own = [sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in kind) / 1024 for kind in kinds]
    row = dist.get_rank(), tpc.get_dp_rank(), str([*stages]), tpc.get_tp_rank(), *own, ema.nbytes / 1024
    rows = [None] * world_size
    dist.all_gather_object(rows, row)
    title = "rank  replica  stages  shard  parameters KiB  optimizer KiB  average KiB"
    return "\n".join([title, *("{:4}  {:7}  {:>6}  {:5}  {:14.1f}  {:13.1f}  {:11.1f}".format(*row) for row in rows)])


def whole_model():
    """The state dict of the uncut model, on every rank. Collective."""
    own, parts = whole_model_state_dict(part), [None] * args.pp
    own = {name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu() for name, t in own.items()}
    dist.all_gather_object(parts, own, group=tpc.get_group("pipe"))
    return {name: tensor for each in parts for name, tensor in each.items()}


def check():
    """Trains the plain model beside the stages, on every rank; whether all found the same loss, norm and weights."""
    plain, worst = build_model().to(device, dtype), torch.zeros(3, dtype=torch.float64)
    adamw = torch.optim.AdamW(plain.parameters(), lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, steps)
    for batch in [batch for epoch in range(steps) for batch in batches(epoch)][:steps]:
        adamw.zero_grad()
        loss = cross_entropy(plain(images[batch]), labels[batch])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        cosine.step()
        found = torch.tensor(mean_over_ranks(train_step(batch)), dtype=torch.float64)
        worst[:2] = worst[:2].maximum((found - torch.stack([loss, norm]).detach().cpu()).abs())
    found, wanted = whole_model(), plain.cpu().state_dict()
    worst[2] = torch.stack([(found[name] - value).abs().max() for name, value in wanted.items()]).max()
    worst = worst.nan_to_num(nan=torch.inf).to(device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    say("largest differences from the plain loop: loss {:.1e}, norm {:.1e}, weights {:.1e}".format(*worst.tolist()))
    return worst.max() <= 1e-6


def train():
    for epoch in range(args.epochs):
        began = time.time()
        losses = [train_step(batch)[0] for batch in batches(epoch)]
        accuracy = evaluate()
        with ema.applied_to(part):
            figures = mean_over_ranks([torch.stack(losses).mean(), accuracy, evaluate()])
        text = "epoch {}: loss {:.4f}, accuracy {:.1%}, of the average {:.1%}, {:.1f} s"
        say(text.format(epoch, *figures, time.time() - began))
    say(holdings())
    if args.save:
        with ema.applied_to(part):
            weights = whole_model()
        if dist.get_rank() == 0:
            torch.save(weights, args.save)
            plain = build_model().to(device).eval()
            plain.load_state_dict(torch.load(args.save))
            right = (plain(test_images).argmax(1) == test_labels).double().mean().item()
            say(f"the averaged weights are in {args.save}: a plain timm model that loads them has {right:.1%}")


say(f"{replicas} replicas x {count} stages on {args.pp} ranks x {args.tp} shards, {args.schedule}, {args.optimizer}")
good = check() if args.check else train() is None
dist.destroy_process_group()
raise SystemExit(0 if good else 1)
