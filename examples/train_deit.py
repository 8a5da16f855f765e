"""Train a vision transformer the way DeiT's reference loop does, under data x pipeline parallelism.

    python examples/train_deit.py --pp 2                      # starts two processes by itself; digits, 95 % in minutes
    python examples/train_deit.py --pp 1                      # the same loss at every step, in one process
    python examples/train_deit.py --pp 2 --dp 2 --schedule gpipe --amp bf16
    torchrun --nproc-per-node 8 examples/train_deit.py --pp 4 --dp 2 --model deit_base_patch16_224 --img-size 224 \\
        --patch-size 16 --depth 12 --data-path /data/imagenet --batch-size 256 --microbatches 16 --output run
    python examples/train_deit.py --pp 2 --output run --resume   # goes on; any --pp will do

The default data are the handwritten digits that come with scikit-learn (1,797 real images, enlarged to 32x32): nothing
is downloaded. `--data-path DIR` takes an ImageFolder, DIR/train and DIR/val. Drop path is 0 by default, so that the
numbers do not depend on how random numbers are spread over ranks.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from digits import NUM_CLASSES, Digits
from rich.console import Console
from rich.table import Table
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from tqdm import tqdm

from torchdistpackage import (
    DDP,
    clip_grad_norm_,
    flatten_model,
    forward_backward,
    load_whole_model_state_dict,
    partition_balanced,
    setup_distributed,
    tpc,
    whole_model_names,
    whole_model_state_dict,
)


def get_args():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parallel = p.add_argument_group("parallelism")
    parallel.add_argument("--pp", type=int, default=2, help="pipeline stages")
    parallel.add_argument("--dp", type=int, default=1, help="replicas")
    parallel.add_argument("--microbatches", type=int, default=4)
    parallel.add_argument("--schedule", default="1f1b", help="auto, or one with one chunk a rank: gpipe, zb-h1")
    model = p.add_argument_group("model")
    model.add_argument("--model", default="deit_tiny_patch16_224", help="any vision transformer of timm, by name")
    model.add_argument("--img-size", type=int, default=32)
    model.add_argument("--patch-size", type=int, default=8)
    model.add_argument("--depth", type=int, default=4)
    model.add_argument("--drop-path", type=float, default=0.0)
    data = p.add_argument_group("data")
    data.add_argument("--data-path", help="an ImageFolder with train/ and val/; default: digits")
    data.add_argument("--workers", type=int, default=0)
    data.add_argument("--mixup", type=float, default=0.1)
    data.add_argument("--cutmix", type=float, default=0.0)
    data.add_argument("--smoothing", type=float, default=0.1)
    train = p.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=25)
    train.add_argument("--batch-size", type=int, default=32, help="rows of each replica")
    train.add_argument("--lr", type=float, default=5e-4)
    train.add_argument("--warmup-epochs", type=float, default=2.5)
    train.add_argument("--weight-decay", type=float, default=0.05)
    train.add_argument("--clip-grad", type=float, default=1.0)
    train.add_argument("--amp", choices=["no", "bf16"], default="no")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps-limit", type=int, help="stop each epoch after this many steps")
    run = p.add_argument_group("run")
    run.add_argument("--threads", type=int, default=1, help="CPU threads a process; the same number, the same bits")
    run.add_argument("--output", help="write a checkpoint here after every epoch")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if there is one")
    run.add_argument("--stop-after", type=int, help="stop after this many epochs, as if the time were up")
    run.add_argument("--log-losses", help="write the loss of every step, in full precision, to this file")
    return p.parse_args()


# --- the model: a list of layers that together are the timm model, so that it can be cut between any two --------------

EMBEDDING = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")


class Embedding(nn.Module):
    """Everything before the first block, by the model's own methods; pixels -> tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = part_of(model, keep=EMBEDDING, parameters=True)

    def forward(self, x):
        m = self.model
        return m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(x))))


class Head(nn.Module):
    """Everything after the last block; tokens -> logits."""

    def __init__(self, model):
        super().__init__()
        later = [name for name, _ in model.named_children() if name not in (*EMBEDDING, "blocks")]
        self.model = part_of(model, keep=later, parameters=False)

    def forward(self, x):
        return self.model.forward_head(self.model.norm(x))


def part_of(model, keep, parameters):
    """A shallow copy that shares the kept children, and the parameters of its own, with the model."""
    part = copy.copy(model)
    part._modules = {name: child if name in keep else nn.Identity() for name, child in model._modules.items()}
    part._parameters = dict(model._parameters) if parameters else {}
    return part


def build_stage(args, num_classes):
    """This rank's layers. Every rank builds the same model from the same seed, and keeps its part."""
    torch.manual_seed(args.seed)
    options = {"img_size": args.img_size, "patch_size": args.patch_size, "depth": args.depth}
    model = timm.create_model(args.model, num_classes=num_classes, drop_path_rate=args.drop_path, **options)
    if getattr(type(model), "forward_features", None) is not VisionTransformer.forward_features:
        raise SystemExit(
            f"--model {args.model}: this example cuts timm's VisionTransformer, not {type(model).__name__}"
        )
    layers = flatten_model(model, [Embedding(model), "blocks", Head(model)], return_list=True)
    return nn.Sequential(*partition_balanced(layers))


# --- the data: first and last stage load the same rows, so that nothing has to be sent beside activations -------------


def build_datasets(args):
    if not args.data_path:
        train = Digits(train=True, size=args.img_size, augment=True, seed=args.seed)
        return train, Digits(train=False, size=args.img_size), NUM_CLASSES
    shape = (3, args.img_size, args.img_size)
    folders = [
        torchvision.datasets.ImageFolder(
            str(Path(args.data_path) / part), create_transform(shape, is_training=part == "train")
        )
        for part in ("train", "val")
    ]
    return *folders, len(folders[0].classes)


def build_loaders(args, train, test):
    replica, replicas = tpc.get_dp_rank(), tpc.get_dp_size()
    sampler = DistributedSampler(train, replicas, replica, seed=args.seed, drop_last=True)
    loader = DataLoader(train, args.batch_size, sampler=sampler, num_workers=args.workers, drop_last=True)
    mine = Subset(test, range(replica, len(test), replicas))  # every test row once, over all replicas
    return loader, DataLoader(mine, args.batch_size, num_workers=args.workers)


def build_mixup(args, num_classes):
    if args.mixup <= 0 and args.cutmix <= 0:
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


def rows(loader):
    """The loader's batches; on a stage between the first and the last, which needs none, as many empty ones."""
    if tpc.is_first_in_pipeline_group() or tpc.is_last_in_pipeline_group():
        return loader
    return ((None, None) for _ in range(len(loader)))


def own_inputs(samples, targets):
    """What enters the pipeline on this rank: samples on the first stage, targets on the last."""
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()
    return ([samples] if first else []) + ([targets] if last and targets is not None else [])


# --- the loop ---------------------------------------------------------------------------------------------------------


def learning_rate(args, step, steps_per_epoch):
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def train_one_epoch(args, run, epoch):
    model, optimizer, device = run["model"], run["optimizer"], run["device"]
    mixup, last = run["mixup"], tpc.is_last_in_pipeline_group()
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing)
    steps = min(len(run["train"]), args.steps_limit or len(run["train"]))
    run["train"].sampler.set_epoch(epoch)
    if hasattr(run["train"].dataset, "set_epoch"):
        run["train"].dataset.set_epoch(epoch)
    torch.manual_seed(args.seed + 1000 * epoch + tpc.get_pp_rank())  # a resumed run draws what an undisturbed one does
    model.train()

    def fwd_fn(x):
        with torch.autocast(device.type, torch.bfloat16) if args.amp == "bf16" else nullcontext():
            out = model(x[0] if last else x)
        return criterion(out.float(), x[1]) if last else out

    losses = []
    bar = tqdm(
        rows(run["train"]), f"epoch {epoch}", total=steps, unit="step", mininterval=0.5, disable=not run["owns_loss"]
    )
    for step, (samples, targets) in enumerate(bar):
        if step == steps:
            break
        if samples is not None:
            samples, targets = samples.to(device), targets.to(device)
            if mixup:
                # Drawn from the step's number: first and last stage mix the same rows by the same amounts.
                np.random.seed((args.seed, epoch, step))
                samples, targets = mixup(samples, targets)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch * len(run["train"]) + step, len(run["train"]))
        loss = forward_backward(
            optimizer,
            fwd_fn,
            None,
            own_inputs(samples, targets),
            num_microbatches=args.microbatches,
            schedule=args.schedule,
        )
        clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        if last:
            if tpc.get_dp_size() > 1:
                dist.all_reduce(loss, group=tpc.get_group("data"))
                loss /= tpc.get_dp_size()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss is {losses[-1]} at step {step} of epoch {epoch}")
            rate = optimizer.param_groups[0]["lr"]
            bar.set_postfix(loss=f"{losses[-1]:.4f}", lr=f"{rate:.1e}", refresh=False)
    bar.close()
    return losses


def evaluate(args, run):
    """Loss, top-1 and top-5 over the whole test set; on the ranks of the last stage."""
    stage, device, last = run["stage"], run["device"], tpc.is_last_in_pipeline_group()
    stage.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # rows, loss, top-1, top-5
    for samples, targets in rows(run["test"]):
        samples = samples.to(device) if samples is not None else None
        with torch.autocast(device.type, torch.bfloat16) if args.amp == "bf16" else nullcontext():
            logits = forward_backward(
                None, stage, None, own_inputs(samples, None), num_microbatches=args.microbatches, forward_only=True
            )
        if last:
            targets = targets.to(device)
            hits = logits.topk(5, dim=1).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            sums += torch.stack(
                [hits.new_tensor(len(targets), dtype=torch.float64), loss, hits[:, 0].sum(), hits.sum()]
            )
    if last and tpc.get_dp_size() > 1:
        dist.all_reduce(sums, group=tpc.get_group("data"))
    count, *totals = sums.tolist()
    return [total / count for total in totals] if last else None


# --- checkpoints: one file a stage, under the names of the whole model, so that any number of stages can go on --------


def save_checkpoint(args, run, epoch):
    folder = Path(args.output) / f"epoch-{epoch:04d}"
    if tpc.is_first_in_data_group():
        names, optimizer = list(whole_model_names(run["stage"]).values()), run["optimizer"].state_dict()
        state = {"model": whole_model_state_dict(run["stage"]), "epoch": epoch}
        state["optimizer"] = {names[index]: entry for index, entry in optimizer["state"].items()}
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"stage-{tpc.get_pp_rank()}.pt"
        torch.save(state, part.with_suffix(".tmp"))
        os.replace(part.with_suffix(".tmp"), part)
    dist.barrier()
    if dist.get_rank() == 0:  # all parts are there: only now the checkpoint counts
        pointer = Path(args.output) / "latest.tmp"
        pointer.write_text(json.dumps({"folder": folder.name, "stages": tpc.get_pp_size()}))
        os.replace(pointer, Path(args.output) / "latest.json")


def load_checkpoint(args, run):
    """Restores this rank's stage from a checkpoint of any number of stages; returns the epoch to go on with."""
    pointer = Path(args.output or "") / "latest.json"
    if not (args.resume and args.output and pointer.exists()):
        return 0
    latest = json.loads(pointer.read_text())
    files = [pointer.parent / latest["folder"] / f"stage-{number}.pt" for number in range(latest["stages"])]
    parts = [torch.load(file, map_location=run["device"], weights_only=True) for file in files]
    load_whole_model_state_dict(run["stage"], {name: value for part in parts for name, value in part["model"].items()})
    known = {name: entry for part in parts for name, entry in part["optimizer"].items()}
    names = list(whole_model_names(run["stage"]).values())
    state = run["optimizer"].state_dict()
    state["state"] = {index: known[name] for index, name in enumerate(names) if name in known}
    run["optimizer"].load_state_dict(state)
    return parts[0]["epoch"] + 1


# --- main -------------------------------------------------------------------------------------------------------------


def start_processes(args):
    """One plain `python` call starts as many processes as are asked for, by becoming torchrun."""
    wanted = args.pp * args.dp
    if wanted > 1 and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(wanted)]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def main():
    args = get_args()
    start_processes(args)
    torch.set_num_threads(args.threads)
    setup_distributed()
    tpc.setup_process_groups([("data", args.dp), ("pipe", args.pp)])
    cuda = torch.cuda.is_available()
    train, test, num_classes = build_datasets(args)
    stage = build_stage(args, num_classes).to("cuda" if cuda else "cpu")
    model = DDP(stage)
    loaders = build_loaders(args, train, test)
    run = {
        "stage": stage,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay),
        "device": torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
        "mixup": build_mixup(args, num_classes),
        "train": loaders[0],
        "test": loaders[1],
        "owns_loss": tpc.is_last_in_pipeline_group() and tpc.is_first_in_data_group(),
    }
    table = Table(title=f"{args.model}, {args.pp} stages x {args.dp} replicas, {args.schedule}")
    for heading in ("epoch", "train loss", "test loss", "top-1", "top-5", "seconds"):
        table.add_column(heading, justify="right")
    start = load_checkpoint(args, run)
    if run["owns_loss"] and args.log_losses and not start:
        open(args.log_losses, "w").close()  # a new run, a new file; a resumed one goes on with its own
    for epoch in range(start, min(args.epochs, start + (args.stop_after or args.epochs))):
        began = time.time()
        losses = train_one_epoch(args, run, epoch)
        metrics = evaluate(args, run)
        if args.output:
            save_checkpoint(args, run, epoch)
        if run["owns_loss"]:
            loss, top1, top5 = metrics
            mean = sum(losses) / max(1, len(losses))
            cells = f"{epoch} {mean:.4f} {loss:.4f} {top1:.1%} {top5:.1%} {time.time() - began:.1f}"
            table.add_row(*cells.split())
            if args.log_losses:
                with open(args.log_losses, "a") as file:
                    file.writelines(f"{epoch} {step} {value!r}\n" for step, value in enumerate(losses))
    if run["owns_loss"]:
        Console(width=100).print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
