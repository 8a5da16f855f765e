"""Train a vision transformer the way DeiT's reference loop does, under data x pipeline parallelism.

    python examples/train_deit.py --pp 2                      # starts two processes by itself; digits, 95 % in minutes
    python examples/train_deit.py --pp 1                      # the same loss at every step, in one process
    python examples/train_deit.py --pp 2 --dp 2 --schedule gpipe --amp bf16
    torchrun --nproc-per-node 8 examples/train_deit.py --pp 4 --dp 2 --model deit_base_patch16_224 --img-size 224 \\
        --patch-size 16 --depth 12 --data-path /data/imagenet --batch-size 256 --microbatches 16 --output run
    python examples/train_deit.py --pp 2 --output run --resume   # goes on; any --pp will do
    torchrun --standalone --nproc-per-node 2 --max-restarts 20 examples/train_deit.py --pp 2 --output run --resume \\
        --checkpoint-every 100                                   # goes on by itself when a process dies

The default data are the handwritten digits that come with scikit-learn (1,797 real images, enlarged to 32x32): nothing
is downloaded. `--data-path DIR` takes an ImageFolder, DIR/train and DIR/val. Drop path is 0 by default, so that the
numbers do not depend on how random numbers are spread over ranks.

A process may be killed at any moment: the run goes on from the newest whole checkpoint, and ends with the bits of a run
that nobody disturbed (on GPUs as far as their kernels give the same bits twice).
"""

import argparse
import copy
import math
import os
import sys
import time

import checkpoint_files
import numpy as np
import timm
import torch
import torch.distributed as dist
from digits import NUM_CLASSES, Digits
from rich.console import Console
from rich.table import Table
from timm.data import Mixup, create_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from torchdistpackage import DDP, PipelineGradScaler, clip_grad_norm_, forward_backward, setup_distributed, tpc
from torchdistpackage.parallel import flatten_model, partition_balanced
from torchdistpackage.split import load_whole_model_state_dict, whole_model_names, whole_model_state_dict


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
    train.add_argument("--amp", choices=["no", "bf16", "fp16"], default="no")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps-limit", type=int, help="stop each epoch after this many steps")
    run = p.add_argument_group("run")
    run.add_argument("--threads", type=int, default=1, help="CPU threads a process; the same number, the same bits")
    run.add_argument("--output", help="write checkpoints to this folder, one after every epoch")
    run.add_argument("--checkpoint-every", type=int, default=0, help="and one after so many steps; 0: only the former")
    run.add_argument("--keep", type=int, default=2, help="the newest so many checkpoints stay")
    run.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint, if there is one")
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
            f"--model {args.model}: what is cut here is timm's VisionTransformer, not {type(model).__name__}"
        )
    layers = flatten_model(model, [Embedding(model), "blocks", Head(model)], return_list=True)
    return nn.Sequential(*partition_balanced(layers))


# --- the data: first and last stage load the same rows, so that nothing has to be sent beside activations -------------


def build_datasets(args):
    if not args.data_path:
        train = Digits(train=True, size=args.img_size, augment=True, seed=args.seed)
        return train, Digits(train=False, size=args.img_size), NUM_CLASSES
    shape = (3, args.img_size, args.img_size)
    train = ImageFolder(os.path.join(args.data_path, "train"), create_transform(shape, is_training=True))
    test = ImageFolder(os.path.join(args.data_path, "val"), create_transform(shape))
    return checkpoint_files.RepeatableDataset(train, args.seed), test, len(train.classes)


def build_loaders(args, train, test):
    replica, replicas = tpc.get_dp_rank(), tpc.get_dp_size()
    sampler = checkpoint_files.ResumableSampler(train, replicas, replica, seed=args.seed, drop_last=True)
    mine = Subset(test, range(replica, len(test), replicas))  # every test row once, over all replicas
    # A generator of its own: a loader draws a number whenever it begins, and a resumed run begins more often.
    options = {"num_workers": args.workers, "generator": torch.Generator()}
    loader = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True, **options)
    return loader, DataLoader(mine, args.batch_size, **options)


def rows(loader, skip=0):
    """The loader's batches; on a stage between the first and the last, which needs none, as many empty ones."""
    if tpc.is_first_in_pipeline_group() or tpc.is_last_in_pipeline_group():
        return loader
    return ((None, None) for _ in range(skip, len(loader)))


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


def autocast(args):
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype, enabled=dtype is not None)


def train_one_epoch(args, run, epoch, start):
    """The steps of an epoch from `start` on, with checkpoints on the way."""
    loader, optimizer = run["train"], run["optimizer"]
    steps = min(len(loader), args.steps_limit or len(loader))
    loader.sampler.set_epoch(epoch, skip=start * args.batch_size)
    loader.dataset.set_epoch(epoch)
    run["model"].train()
    options = {"total": steps, "initial": start, "unit": "step", "mininterval": 0.5, "disable": not run["owns_loss"]}
    bar = tqdm(rows(loader, start), f"epoch {epoch}", **options)
    for step, (samples, targets) in enumerate(bar, start):
        if step >= steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, epoch * len(loader) + step, len(loader))
        loss = train_step(args, run, samples, targets, (args.seed, epoch, step))
        run["done"] += 1
        if tpc.is_last_in_pipeline_group():
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {step} of epoch {epoch}")
            run["losses"].append((epoch, step, loss))
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{optimizer.param_groups[0]['lr']:.1e}", refresh=False)
        if args.checkpoint_every and run["done"] % args.checkpoint_every == 0 and step + 1 < steps:
            save_checkpoint(args, run, epoch, step + 1)
    bar.close()


def train_step(args, run, samples, targets, seed):
    """One batch; returns the loss over all replicas, on the ranks of the last stage."""
    optimizer, scaler, last = run["optimizer"], run["scaler"], tpc.is_last_in_pipeline_group()
    if samples is not None:
        samples, targets = samples.to(run["device"]), targets.to(run["device"])
        if run["mixup"]:
            np.random.seed(seed)  # by the step's number: first and last stage mix the same rows by the same amounts
            samples, targets = run["mixup"](samples, targets)

    def fwd_fn(x):
        with autocast(args):
            out = run["model"](x[0] if last else x)
        return run["criterion"](out.float(), x[1]) if last else out

    inputs, m, used = own_inputs(samples, targets), args.microbatches, scaler if scaler.is_enabled() else None
    loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=m, schedule=args.schedule, scaler=used)
    scaler.unscale_(optimizer)  # a scaler that is not enabled does nothing here, and the plain step below
    clip_grad_norm_(run["model"].parameters(), args.clip_grad)
    scaler.step(optimizer)
    scaler.update()
    if not last:
        return None
    if tpc.get_dp_size() > 1:
        dist.all_reduce(loss, group=tpc.get_group("data"))
        loss /= tpc.get_dp_size()
    return loss.item()


def evaluate(args, run):
    """Loss, top-1 and top-5 over the whole test set; on the ranks of the last stage."""
    stage, device, last = run["stage"], run["device"], tpc.is_last_in_pipeline_group()
    stage.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, top-1, top-5
    for samples, targets in rows(run["test"]):
        samples = samples.to(device) if samples is not None else None
        with autocast(args):
            options = {"num_microbatches": args.microbatches, "forward_only": True}
            logits = forward_backward(None, stage, None, own_inputs(samples, None), **options)
        if last:
            targets = targets.to(device)
            hits = logits.topk(5, dim=1).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    if last and tpc.get_dp_size() > 1:
        dist.all_reduce(sums, group=tpc.get_group("data"))
    return (sums / len(run["test"].dataset.dataset)).tolist() if last else None  # the rows of all replicas


# --- checkpoints: a part from each rank, under the names of the whole model, so that any number of stages can go on ---


def save_checkpoint(args, run, epoch, step):
    """Writes all that a run needs to go on with this step of this epoch; it counts once every rank has its part."""
    if not args.output or run["done"] == run["saved"]:
        return  # after no step there is nothing new, and a good checkpoint is never written over
    state = {"epoch": epoch, "rows": step * args.batch_size * args.dp, "layout": [args.pp, args.dp]}
    state |= {"random": checkpoint_files.random_states(), "scaler": run["scaler"].state_dict()}
    if tpc.is_first_in_data_group():  # replicas are equal
        entries = run["optimizer"].state_dict()["state"]
        state["model"] = whole_model_state_dict(run["stage"])
        state["optimizer"] = {run["names"][index]: entry for index, entry in entries.items()}
    if run["owns_loss"]:
        state["log"] = {"losses": torch.tensor(run["losses"], dtype=torch.float64), "table": run["table"]}
    folder = checkpoint_files.step_folder(args.output, run["done"])
    checkpoint_files.write_part(folder, run["parts"][dist.get_rank()], lambda file: torch.save(state, file))
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint_files.finish(folder, run["parts"], args.keep)
    run["saved"] = run["done"]


def load_checkpoint(args, run):
    """Restores the newest whole checkpoint, of any number of stages; returns the epoch and the step to go on with."""
    rank, folder = dist.get_rank(), checkpoint_files.newest_for_all_ranks(args.output, run["device"])
    if folder is None:
        checkpoint_files.seed_all(args.seed, 0, 0, rank)
        return 0, 0
    if not args.resume:
        raise SystemExit(f"{folder} is there from an earlier run: add --resume, or choose another --output")
    parts = checkpoint_files.load_parts(folder)
    whole = {"model": {}, "optimizer": {}, "log": {}}
    for kind, entries in whole.items():
        for part in parts.values():
            entries.update(part.get(kind, {}))
    load_whole_model_state_dict(run["stage"], whole["model"])
    state, known = run["optimizer"].state_dict(), whole["optimizer"]
    state["state"] = {index: known[name] for index, name in enumerate(run["names"]) if name in known}
    run["optimizer"].load_state_dict(state)
    run["losses"] = [(int(epoch), int(step), loss) for epoch, step, loss in whole["log"]["losses"].tolist()]
    run["table"], run["done"] = whole["log"]["table"], checkpoint_files.step_of(folder)
    run["saved"] = run["done"]
    mine = parts.get(run["parts"][rank]) or next(iter(parts.values()))
    if mine["scaler"]:
        run["scaler"].load_state_dict(mine["scaler"])
    epoch, step = mine["epoch"], mine["rows"] // (args.batch_size * args.dp)
    if mine["layout"] == [args.pp, args.dp]:
        checkpoint_files.set_random_states(mine["random"])
    else:  # there are as many states as there were ranks: these ranks begin new ones
        checkpoint_files.seed_all(args.seed, epoch, step, rank)
    if rank == 0:
        print(f"resumed from {folder.name} (epoch {epoch}, step {step})", flush=True)
    return epoch, step


# --- main -------------------------------------------------------------------------------------------------------------


def start_processes(args):
    """One plain `python` call starts as many processes as are asked for, by becoming torchrun."""
    wanted = args.pp * args.dp
    if wanted > 1 and "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(wanted)]
        os.execv(sys.executable, [sys.executable, *launcher, *sys.argv])


def build_run(args):
    """Everything that a run consists of; what changes from step to step is also in its checkpoints."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    train, test, num_classes = build_datasets(args)
    mixes = args.mixup > 0 or args.cutmix > 0
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes) if mixes else None
    stage = build_stage(args, num_classes).to(device)
    # Left alone, DDP changes the order in which three or more replicas are summed after its first step in a process.
    model, names = DDP(stage, find_unused_parameters=args.dp > 2), whole_model_names(stage)
    train_loader, test_loader = build_loaders(args, train, test)
    return {
        "stage": stage,
        "model": model,
        "names": [names[name] for name, _ in stage.named_parameters()],  # in the optimizer's order
        "criterion": SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay),
        "scaler": PipelineGradScaler(device.type, enabled=args.amp == "fp16"),
        "device": device,
        "mixup": mixup,
        "train": train_loader,
        "test": test_loader,
        "parts": [f"stage-{rank % args.pp}-replica-{rank // args.pp}.pt" for rank in range(args.pp * args.dp)],
        "owns_loss": tpc.is_last_in_pipeline_group() and tpc.is_first_in_data_group(),
        "losses": [],  # (epoch, step, loss) of all steps
        "table": [],  # a row an epoch
        "done": 0,  # steps
        "saved": 0,  # of these, by the newest checkpoint
    }


def write_losses(args, run):
    """All losses since the first step, also of those before a restart."""
    if run["owns_loss"] and args.log_losses:
        lines = [f"{epoch} {step} {loss!r}\n" for epoch, step, loss in run["losses"]]
        checkpoint_files.write_text(args.log_losses, "".join(lines))


def main():
    args = get_args()
    start_processes(args)
    torch.set_num_threads(args.threads)
    setup_distributed()
    tpc.setup_process_groups([("data", args.dp), ("pipe", args.pp)])
    run = build_run(args)
    first, step = load_checkpoint(args, run)
    write_losses(args, run)
    for epoch in range(first, min(args.epochs, first + (args.stop_after or args.epochs))):
        began = time.time()
        train_one_epoch(args, run, epoch, step if epoch == first else 0)
        metrics = evaluate(args, run)
        if run["owns_loss"]:
            losses = [loss for of, _, loss in run["losses"] if of == epoch]
            loss, top1, top5 = metrics
            mean, seconds = sum(losses) / max(1, len(losses)), time.time() - began
            run["table"].append(f"{epoch} {mean:.4f} {loss:.4f} {top1:.1%} {top5:.1%} {seconds:.1f}")
        write_losses(args, run)
        save_checkpoint(args, run, epoch + 1, 0)
    if run["owns_loss"]:
        table = Table(title=f"{args.model}, {args.pp} stages x {args.dp} replicas, {args.schedule}")
        for heading in ("epoch", "train loss", "test loss", "top-1", "top-5", "seconds"):
            table.add_column(heading, justify="right")
        for row in run["table"]:
            table.add_row(*row.split())
        Console(width=100).print(table)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
