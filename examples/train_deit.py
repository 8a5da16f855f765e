"""Trains a vision transformer, any of timm's by name, cut into pipeline stages. After DeiT's training loop.

    python examples/train_deit.py --pp 2                      # 2 stages on this machine: digits, CPU or GPUs
    python examples/train_deit.py                             # 1 process: the same losses
    python examples/train_deit.py --pp 2 --dp 2 --amp bf16    # 2 replicas of 2 stages, bfloat16
    python examples/train_deit.py --pp 2 --output runs/a      # writes runs/a/checkpoint.pth after every epoch
    python examples/train_deit.py --pp 4 --resume runs/a/checkpoint.pth --output runs/a     # on, with other stages
    torchrun --nnodes 2 --nproc-per-node 4 ... examples/train_deit.py --pp 8 --data-path IMAGENET --epochs 300 \\
        --model deit_base_patch16_224 --model-kwargs --img-size 224 --batch-size 1024 --amp bf16 --workers 8

Without --data-path the images are the 1,797 handwritten digits of scikit-learn (digits.py). DIR of --data-path has
DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg. The batch size is that of one step, over all replicas.

--pp changes where the model is cut, and no number: every rank builds the same model from the same seed and keeps its
own part. That holds bit for bit on CPU as long as nothing is dropped: --drop and --drop-path, which draw other random
numbers on every rank, are 0 by default. To see it, compare the files of --log-losses.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import NUM_CLASSES, Digits
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from torchdistpackage import DDP, clip_grad_norm_, flatten_model, forward_backward, partition_uniform
from torchdistpackage import load_whole_model_state_dict, setup_distributed, tpc
from torchdistpackage import whole_model_names, whole_model_state_dict

# --- arguments --------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = {"embed_dim": 96, "depth": 8, "num_heads": 3, "class_token": False, "global_pool": "avg"}
    group = parser.add_argument_group("parallelism")
    group.add_argument("--pp", type=int, default=1, help="pipeline stages")
    group.add_argument("--dp", type=int, default=1, help="replicas, each of --pp stages")
    group.add_argument("--microbatches", type=int, default=4, help="parts of a replica's batch")
    group.add_argument("--schedule", default="1f1b", help="1f1b or gpipe")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="deit_tiny_patch16_224", help="a vision transformer of timm")
    group.add_argument("--img-size", type=int, default=32)
    group.add_argument("--model-kwargs", nargs="*", default=small | {"patch_size": 8}, action=ParseKwargs,
                       help="what else the model is built with; the default shrinks it for digits, nothing: as it is")
    group.add_argument("--drop", type=float, default=0.0)
    group.add_argument("--drop-path", type=float, default=0.0)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=20)
    group.add_argument("--batch-size", type=int, default=32)
    group.add_argument("--opt", default="adamw")
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--min-lr", type=float, default=1e-5)
    group.add_argument("--warmup-epochs", type=float, default=2)
    group.add_argument("--weight-decay", type=float, default=0.05)
    group.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of the gradient; 0 for no clipping")
    group.add_argument("--mixup", type=float, default=0.1)
    group.add_argument("--cutmix", type=float, default=0.0)
    group.add_argument("--smoothing", type=float, default=0.1)
    group.add_argument("--amp", choices=["none", "bf16"], default="none")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("data and files")
    group.add_argument("--data-path", type=Path, help="folder of train/ and val/; digits if not given")
    group.add_argument("--workers", type=int, default=0, help="processes that load images, on each rank")
    group.add_argument("--output", type=Path, help="folder for checkpoint.pth")
    group.add_argument("--resume", type=Path, help="a checkpoint.pth")
    group.add_argument("--log-losses", type=Path, help="write the loss of every step, in full precision")
    group.add_argument("--steps-limit", type=int, help="stop after this many steps")
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------------


class SeededImages(Dataset[tuple[Tensor, int]]):
    """An image folder whose augmentation depends on (seed, epoch, index) only, whichever rank or worker loads."""

    def __init__(self, folder: Path, transform: v2.Transform, seed: int) -> None:
        self.images, self.transform, self.seed, self.epoch = ImageFolder(str(folder)), transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 10_000 + self.epoch) * len(self) + index)
            return self.transform(image), label


@dataclass(frozen=True)
class Data:
    train: DataLoader[tuple[Tensor, Tensor]]
    test: DataLoader[tuple[Tensor, Tensor]]
    num_classes: int

    def set_epoch(self, epoch: int) -> None:
        self.train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        self.train.dataset.set_epoch(epoch)  # type: ignore[attr-defined]


def build_data(args: argparse.Namespace) -> Data:
    """This replica's part of the data: every dp-th image. The replicas' batches together are the batch of --dp 1.

    The stages of a replica all iterate over the same loader, in the same order: the first needs the images and the last
    the targets, and what both can read for themselves needs no broadcast.
    """
    if args.data_path is None:
        train: Dataset[tuple[Tensor, Tensor]] = Digits(train=True, size=args.img_size, augment=True, seed=args.seed)
        test, num_classes = Digits(train=False, size=args.img_size), NUM_CLASSES
    else:
        end = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        crop = [v2.RandomResizedCrop(args.img_size, antialias=True), v2.RandomHorizontalFlip(), *end]
        center = [v2.Resize(int(args.img_size / 0.875), antialias=True), v2.CenterCrop(args.img_size), *end]
        train = SeededImages(args.data_path / "train", v2.Compose(crop), args.seed)
        test = SeededImages(args.data_path / "val", v2.Compose(center), args.seed)
        num_classes = len(train.images.classes)
    dp, replica = tpc.get_dp_size(), tpc.get_dp_rank()
    sampler = DistributedSampler(train, dp, replica, shuffle=True, seed=args.seed, drop_last=True)
    options = {"batch_size": args.batch_size // dp, "num_workers": args.workers, "pin_memory": torch.cuda.is_available()}
    return Data(
        DataLoader(train, sampler=sampler, drop_last=True, **options),
        DataLoader(Subset(test, range(replica, len(test), dp)), **options),  # a sampler would repeat images
        num_classes,
    )


def batches(loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The loader's batches; a stage in the middle needs none, and loads none, but takes as many steps."""
    if tpc.is_first_in_pipeline_group() or tpc.is_last_in_pipeline_group():
        yield from loader
    else:
        yield from ((None, None) for _ in range(len(loader)))


def stage_inputs(samples: Tensor | None, targets: Tensor | None, device: torch.device) -> list[Tensor]:
    """What enters at this stage; with one stage that is both."""
    inputs = [samples] if tpc.is_first_in_pipeline_group() else []
    inputs += [targets] if tpc.is_last_in_pipeline_group() else []
    return [tensor.to(device, non_blocking=True) for tensor in inputs]


# --- model ------------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """Everything before the blocks, by the model's own methods: patches, class and other tokens, positions."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = without(vit, "blocks", "norm", "attn_pool", "fc_norm", "head_drop", "head", "head_dist")

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        return self.vit.norm_pre(self.vit.patch_drop(x))


class Head(nn.Module):
    """Everything after the blocks: norm, pooling, classifier."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = without(vit, "blocks", "patch_embed", "pos_drop", "patch_drop", "norm_pre", parameters=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(x))


def without(vit: VisionTransformer, *modules: str, parameters: bool = True) -> VisionTransformer:
    """The same model, sharing its weights, less some modules: a stage holds no memory of another."""
    part = copy.copy(vit)
    part._modules = {name: module for name, module in vit._modules.items() if name not in modules}
    part._parameters = dict(vit._parameters) if parameters else {}
    return part


def build_stage(args: argparse.Namespace, num_classes: int) -> tuple[nn.Sequential, set[str]]:
    """This rank's part of the model, and the whole-model names of parameters that should not decay."""
    torch.manual_seed(args.seed)  # all ranks make the same model, whatever part they keep
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    vit = timm.create_model(args.model, num_classes=num_classes, img_size=args.img_size, **rates, **args.model_kwargs)
    if getattr(type(vit), "forward_features", None) is not VisionTransformer.forward_features:
        raise SystemExit(
            f"--model {args.model} is a {type(vit).__name__}: this example cuts models whose forward is that of timm's "
            "VisionTransformer, for example deit_*, deit3_*, vit_*; see `flatten_model` for how to cut others"
        )
    layers = flatten_model(vit, [Embedding(vit), "blocks", Head(vit)], return_list=True)
    return nn.Sequential(*partition_uniform(layers)), set(vit.no_weight_decay())


def build_optimizer(args: argparse.Namespace, stage: nn.Module, no_decay: set[str]) -> torch.optim.Optimizer:
    here = [local for local, name in whole_model_names(stage).items() if name in no_decay]
    groups = param_groups_weight_decay(stage, args.weight_decay, no_weight_decay_list=here)
    return create_optimizer_v2(groups, opt=args.opt, lr=args.lr)


# --- training and evaluation ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the loop needs at every step."""

    args: argparse.Namespace
    device: torch.device
    data: Data
    stage: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: CosineLRScheduler
    step: int = 0

    @property
    def owns_loss(self) -> bool:
        return tpc.is_last_in_pipeline_group() and tpc.get_dp_rank() == 0

    @property
    def stopped(self) -> bool:
        return self.args.steps_limit is not None and self.step >= self.args.steps_limit

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp == "bf16")


def train_one_epoch(run: Run, model: nn.Module, epoch: int, log: list[float]) -> float:
    """One pass over the training data; returns the mean loss on the last stage."""
    args = run.args
    soft = args.mixup > 0 or args.cutmix > 0
    mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=run.data.num_classes)
    criterion = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(args.smoothing)
    first, last = tpc.is_first_in_pipeline_group(), tpc.is_last_in_pipeline_group()

    def fwd_fn(inputs: Tensor | list[Tensor]) -> Tensor:
        with run.autocast():
            if not last:
                return model(inputs)
            x, targets = inputs
            return criterion(model(x).float(), targets)

    model.train()
    run.data.set_epoch(epoch)
    # Every epoch has a seed of its own, so that a resumed run draws what it would have drawn.
    torch.manual_seed((args.seed * 10_000 + epoch) * dist.get_world_size() + dist.get_rank())
    losses: list[float] = []
    bar = tqdm(batches(run.data.train), f"epoch {epoch + 1:3}", len(run.data.train), unit="step", ncols=100,
               leave=False, disable=None if run.owns_loss else True)  # fmt: skip
    start = time.perf_counter()
    for samples, targets in bar:
        if run.stopped:
            break
        if soft and (first or last):
            np.random.seed((args.seed * 1_000_003 + run.step) % 2**32)  # first and last stage mix in the same way
            samples, targets = mixup(samples, targets)
        run.scheduler.step_update(run.step)
        inputs = stage_inputs(samples, targets, run.device)
        loss = forward_backward(run.optimizer, fwd_fn, None, inputs, args.microbatches, schedule=args.schedule)
        if args.clip_grad > 0:
            clip_grad_norm_(model.parameters(), args.clip_grad)
        run.optimizer.step()
        run.step += 1
        if last:
            losses.append(mean_over_replicas(loss))
            rate = len(losses) * args.batch_size / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {losses[-1]:.4f}, lr {run.optimizer.param_groups[0]['lr']:.1e}, {rate:.0f} img/s")
            if not np.isfinite(losses[-1]):
                raise SystemExit(f"loss is {losses[-1]} at step {run.step}, stopping")
    log += losses
    return float(np.mean(losses)) if losses else float("nan")


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """Loss and accuracy on the test data, of all replicas together; on the last stage, elsewhere nothing."""
    run.stage.eval()
    last = tpc.is_last_in_pipeline_group()

    def fwd_fn(images: Tensor) -> Tensor:
        with run.autocast():
            return run.stage(images)  # not the DDP wrapper: replicas may have different numbers of batches

    sums = torch.zeros(4, dtype=torch.float64, device=run.device)
    for images, targets in batches(run.data.test):
        inputs = images.to(run.device) if tpc.is_first_in_pipeline_group() else None
        output = forward_backward(None, fwd_fn, None, inputs, run.args.microbatches, forward_only=True)
        if last:
            targets = targets.to(run.device)
            best = output.topk(min(5, output.shape[1])).indices == targets[:, None]
            loss = F.cross_entropy(output.float(), targets, reduction="sum")
            sums += torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(targets), device=run.device)])
    if not last:
        return {}
    dist.all_reduce(sums, group=tpc.get_group("data"))
    loss, top1, top5 = (sums[:3] / sums[3]).tolist()
    return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def mean_over_replicas(loss: Tensor) -> float:
    loss = loss.double()
    dist.all_reduce(loss, group=tpc.get_group("data"))
    return loss.item() / tpc.get_dp_size()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, epoch: int) -> None:
    """One file for the whole model under its own names, so that any number of stages can read it."""
    if tpc.get_dp_rank() != 0:
        return  # replicas are equal
    names = optimizer_names(run)
    state = {names[i]: value for i, value in run.optimizer.state_dict()["state"].items()}
    part = {"model": whole_model_state_dict(run.stage), "optimizer": state}
    parts = [None] * tpc.get_pp_size() if tpc.is_first_in_pipeline_group() else None
    first = tpc.get_ranks_in_group("pipe")[0]
    dist.gather_object(to_cpu(part), parts, dst=first, group=tpc.get_control_group("pipe"))
    if parts is None:
        return
    whole = {key: {name: value for p in parts for name, value in p[key].items()} for key in part}
    whole |= {"scheduler": run.scheduler.state_dict(), "epoch": epoch, "step": run.step, "pp": tpc.get_pp_size()}
    run.args.output.mkdir(parents=True, exist_ok=True)
    torch.save(whole, run.args.output / "checkpoint.tmp")
    os.replace(run.args.output / "checkpoint.tmp", run.args.output / "checkpoint.pth")  # the old one or the new one


def load_checkpoint(run: Run) -> int:
    """Continue where a checkpoint was written; returns the next epoch."""
    whole = torch.load(run.args.resume, map_location="cpu", weights_only=True)
    load_whole_model_state_dict(run.stage, whole["model"])
    state = {i: whole["optimizer"][name] for i, name in enumerate(optimizer_names(run)) if name in whole["optimizer"]}
    run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.scheduler.load_state_dict(whole["scheduler"])
    run.step = whole["step"]
    return whole["epoch"] + 1


def optimizer_names(run: Run) -> list[str]:
    """The whole-model name of every parameter, in the order in which the optimizer counts them."""
    names = whole_model_names(run.stage)
    name_of = {parameter: names[local] for local, parameter in run.stage.named_parameters()}
    return [name_of[parameter] for group in run.optimizer.param_groups for parameter in group["params"]]


def to_cpu(tree: dict) -> dict:
    return torch.utils._pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, tree)


# --- main -------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    setup_distributed()
    tpc.setup_process_groups([("data", args.dp), ("pipe", args.pp)])
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    data = build_data(args)
    stage, no_decay = build_stage(args, data.num_classes)
    stage.to(device)
    model = DDP(stage)
    optimizer = build_optimizer(args, stage, no_decay)
    steps = len(data.train)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs * steps, lr_min=args.min_lr, t_in_epochs=False,
                                  warmup_t=int(args.warmup_epochs * steps), warmup_lr_init=1e-6)  # fmt: skip
    run = Run(args, device, data, stage, optimizer, scheduler)
    epoch = load_checkpoint(run) if args.resume else 0

    if run.owns_loss:
        print(f"{args.model} on {'digits' if args.data_path is None else args.data_path}: {args.dp} replica(s) x "
              f"{args.pp} stage(s), {args.microbatches} micro-batches, {args.schedule}, {device.type}")  # fmt: skip
        print("epoch   train loss   test loss    top-1    top-5   seconds")
    log: list[float] = []
    begin = time.perf_counter()
    while epoch < args.epochs and not run.stopped:
        start = time.perf_counter()
        train_loss = train_one_epoch(run, model, epoch, log)
        test = evaluate(run)
        if run.owns_loss:
            print(f"{epoch + 1:5} {train_loss:12.4f} {test['loss']:11.4f} {test['top1']:7.2f}% {test['top5']:7.2f}% "
                  f"{time.perf_counter() - start:9.1f}", flush=True)  # fmt: skip
        if args.output and run.step == (epoch + 1) * steps:
            save_checkpoint(run, epoch)
        epoch += 1
    if run.owns_loss:
        if args.log_losses:
            args.log_losses.write_text("".join(f"{loss!r}\n" for loss in log))
        print(f"{run.step} steps in all, {time.perf_counter() - begin:.1f} seconds")
    dist.destroy_process_group()


if __name__ == "__main__":
    args = parse_args()
    ranks = args.pp * args.dp
    if ranks > 1 and not {"RANK", "SLURM_PROCID"} & set(os.environ):  # a plain `python`: start the ranks ourselves
        import sys

        from torch.distributed.run import main as torchrun

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        torchrun(["--standalone", f"--nproc-per-node={ranks}", *sys.argv])
    else:
        main(args)
