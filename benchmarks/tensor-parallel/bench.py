"""Shards language models of transformers and vision models of timm over a tensor group, and compares with the model.

    python benchmarks/tensor-parallel/bench.py                      # all; about five minutes on two cores
    python benchmarks/tensor-parallel/bench.py llama 'timm:vit*'    # of these

Every model runs in processes of its own, one a rank, with a time-out: a crash is one row. Models are those of
`benchmarks/llm-zoo/models.py`, in three layers, and vision transformers of timm, in two blocks.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import multiprocessing
import sys
import tempfile
import warnings
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "llm-zoo"))

import timm
import torch
import torch.distributed as dist
import transformers
from models import build, families
from torch import Tensor, nn

from torchdistpackage import SplitError, clip_grad_norm_, tpc
from torchdistpackage.parallel.tensor_parallel import apply_tensor_parallel

TOLERANCE = 1e-5
LAYERS = 3
VISION = (
    "vit_small_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 vit_small_patch14_dinov2 "
    "vit_small_patch16_rope_224 beit_base_patch16_224 swin_tiny_patch4_window7_224 cait_xxs24_224 "
    "eva02_tiny_patch14_224 vit_small_plus_patch16_dinov3 mixer_s16_224 xcit_nano_12_p16_224 convnext_atto resnet18"
)


@dataclass(frozen=True)
class Row:
    """One model: what came of it; differences are in units of the largest value of what is compared."""

    model: str
    verdict: str
    dtype: str = ""
    sharded: str = ""
    output: str = ""
    gradients: str = ""
    norm: str = ""
    reason: str = ""


class Case:
    """A model and a way to run it; in float64 where it can, because rounding alone differs by 1e-5 in float32."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        if name.startswith("timm:"):
            options: dict[str, Any] = (
                {"depth": 2} if any(word in name for word in ("vit", "deit", "beit", "eva")) else {}
            )
            self.model: nn.Module = timm.create_model(name.removeprefix("timm:"), num_classes=7, **options).eval()
            size = self.model.pretrained_cfg["input_size"]
            self.model.double()
            self._arguments: dict[str, Tensor] = {"x": torch.randn(1, *size).double()}
            with torch.no_grad():  # as made, heads and scaled layers are next to nothing, and would hide everything
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        else:
            self.model = build(name, LAYERS).eval().double()
            words = self.model.config.get_text_config().vocab_size
            ids, mask = torch.randint(3, min(60, words), (2, 8)), torch.ones(2, 8, dtype=torch.long)
            mask[0, -2:] = 0
            self._arguments = {"input_ids": ids, "attention_mask": mask}
            try:
                self.run(self.model)
            except Exception:  # what is made for half precision, such as grouped products of experts
                self.model.float()

    def run(self, model: nn.Module) -> Tensor:
        if "x" in self._arguments:
            return model(self._arguments["x"])
        out = model(**self._arguments, use_cache=False)
        return out.logits if hasattr(out, "logits") else out[0]


def compared(name: str) -> Row:
    """Of one model, on one rank."""
    try:
        case = Case(name)
    except Exception as error:
        return Row(name, "not run", reason=" ".join(f"{type(error).__name__}: {error}".split())[:200])
    if not name.startswith("timm:") and not getattr(case.model, "_tp_plan", None):
        return Row(name, "no plan")
    model = case.model
    sharded = copy.deepcopy(model)
    try:
        apply_tensor_parallel(sharded)
    except SplitError as error:
        return Row(name, "refused", reason=str(error))
    outputs = [case.run(each) for each in (model, sharded)]
    for output in outputs:
        output.square().mean().backward()
    wanted = dict(model.named_parameters())
    gradients = [(whole(p.grad), wanted[key].grad, key) for key, p in sharded.named_parameters()]
    lost = [key for mine, theirs, key in gradients if (mine is None) != (theirs is None)]
    # A key's bias has no effect: its gradient is rounding. So small gradients count in units of the model's largest.
    least = 0.1 * max(float(theirs.abs().max()) for _, theirs, _ in gradients if theirs is not None)
    worst = max(
        ((gap(mine, theirs, least), key) for mine, theirs, key in gradients if theirs is not None), default=(0.0, "")
    )
    norms = [nn.utils.clip_grad_norm_(model.parameters(), 1.0), clip_grad_norm_(sharded.parameters(), 1.0)]
    gaps = gap(outputs[1], outputs[0]), worst[0], gap(norms[1], norms[0])
    verdict, reason = "exact", ""
    if max(gaps) > TOLERANCE or lost:
        verdict, reason = "WRONG", f"gradients of {', '.join(lost) or worst[1]}"
        if not lost and outputs[0].dtype is torch.float32 and max(gaps) <= (own := noise(case)):
            verdict, reason = (
                "rounding",
                f"{max(gaps):.1g}; of the whole model, rounded parameters change it by {own:.1g}",
            )
    share = sum(p.numel() for p in sharded.parameters() if hasattr(p, "full_tensor"))
    share = share / sum(p.numel() for p in model.parameters())
    dtype = str(outputs[0].dtype).removeprefix("torch.")
    return Row(name, verdict, dtype, f"{share:.0%}", *(f"{value:.1g}" for value in gaps), reason)


def noise(case: Case) -> float:
    """By how much the whole model's gradients change if every parameter is changed by half a unit in its last place.

    What differs by less cannot be told from rounding: a control for models that only run in float32.
    """
    found = []
    for seed in range(5):
        model = copy.deepcopy(case.model)
        model.zero_grad()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters() if seed else ():
                parameter.mul_(1 + (torch.rand_like(parameter) - 0.5) * 2**-23)
        case.run(model).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    least = 0.1 * max(float(gradient.abs().max()) for gradient in found[0].values())
    return max(gap(other[name], found[0][name], least) for other in found[1:] for name in found[0])


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gap(mine: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The largest difference, in units of the largest value, or of `least` where all are smaller."""
    return float((mine - wanted).abs().max() / wanted.abs().max().clamp(min=max(least, 1e-12)))


def work(connection: Connection, name: str, rank: int, ranks: int, store: str) -> None:
    """One rank, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    tpc.setup_process_groups([("tensor", ranks)])
    try:
        row = compared(name)
    except Exception as error:
        row = Row(name, "WRONG", reason=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    connection.send(row)
    connection.recv()  # all leave together


def row_of(name: str, ranks: int, timeout: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        pairs = [multiprocessing.Pipe() for _ in range(ranks)]
        workers = [
            context.Process(target=work, args=(theirs, name, rank, ranks, f"{folder}/store"))
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for worker in workers:
            worker.start()
        row = Row(name, "WRONG", reason=f"not finished after {timeout:.0f} s")
        try:
            for ours, _ in pairs:
                if not wait([ours], timeout):
                    return row
                row = ours.recv()
            return row
        except EOFError:
            return Row(name, "WRONG", reason="a process has died")
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def table(rows: list[Row]) -> str:
    counts = [
        f"{sum(row.verdict == kind for row in rows)} {kind}"
        for kind in ("exact", "rounding", "WRONG", "refused", "no plan", "not run")
    ]
    lines = [
        f"{len(rows)} models: {', '.join(counts)}.",
        "",
        "| model | dtype | sharded parameters | output | gradients | norm | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            "| " + " | ".join([f"`{row.model}`", *astuple(row)[2:6], row.norm, row.verdict]) + " |"
            for row in rows
            if row.verdict in ("exact", "rounding", "WRONG")
        ),
        "",
        *(f"- `{row.model}` ({row.verdict}): {row.reason}" for row in rows if row.reason),
        "- no plan: " + ", ".join(f"`{row.model}`" for row in rows if row.verdict == "no plan"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="MODEL", help="these, or patterns of names")
    parser.add_argument("--ranks", type=int, default=2, help="size of the tensor group")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for each model")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    names = [*families(), *(f"timm:{name}" for name in VISION.split())]
    chosen = [name for name in names if not options.only or any(fnmatch.fnmatch(name, p) for p in options.only)]
    rows = []
    for name in chosen:
        rows.append(row_of(name, options.ranks, options.timeout))
        print(f"{rows[-1].verdict:8} {name:30} {rows[-1].sharded:5} {rows[-1].reason}", file=sys.stderr, flush=True)
    print(table(rows))
    sys.exit(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    main()
