"""Does an installed torchdistpackage work? Needs the package and torch, nothing else; scripts/package runs it.

python scripts/smoke_test.py                     # one line a check; status 1 and a line that says FAILED if one fails
python scripts/smoke_test.py --without-torch     # what has to work where torch is not installed

Two processes train with gloo, and their losses are compared with those of a plain loop in each of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pipeline's bits are the plain loop's on as many threads
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

GRID = """\
rank 0: 0F0 0F1 0F2 0F3 0B0 0F4 0B1 0F5 0B2 0B3 0B4 0B5
rank 1: 1F0 1F1 1F2 1B0 1F3 1B1 1F4 1B2 1F5 1B3 1B4 1B5
rank 2: 2F0 2F1 2B0 2F2 2B1 2F3 2B2 2F4 2B3 2F5 2B4 2B5
rank 3: 3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3F4 3B4 3F5 3B5
"""
SHOW = ["schedule", "show", "1f1b", "-p", "4", "-m", "6", "--text"]
MICROBATCHES, STEPS, MAX_NORM = 4, 4, 0.5
SECONDS = 300


class SmokeError(Exception):
    """Something does not do what it should."""


def expect(condition: object, what: str) -> None:
    """Raises a SmokeError unless the condition holds."""
    if not condition:
        raise SmokeError(what)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside of any source tree."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)


# ---- without torch ----


def is_installed() -> str:
    """The package comes from this environment, has the version that its metadata says, and ships its types."""
    import torchdistpackage

    place = Path(torchdistpackage.__file__).parent
    expect(place.is_relative_to(sysconfig.get_path("purelib")), f"imported from {place}, which is not installed")
    expect((place / "py.typed").is_file(), f"{place} has no py.typed")
    version = importlib.metadata.version("torchdistpackage")
    expect(
        torchdistpackage.__version__ == version, f"version {torchdistpackage.__version__}, but metadata of {version}"
    )
    return f"torchdistpackage {version} in {place}"


def is_lazy() -> str:
    """The root, the plans and the command line start where importing torch fails."""
    code = "import sys; sys.modules['torch'] = None\n"
    run_here = f"sys.argv = ['torchdistpackage', *{SHOW}]\nfrom torchdistpackage.cli import main\nmain()\n"
    plans = "import torchdistpackage, torchdistpackage.schedule, torchdistpackage.visualize\n"
    done = run(sys.executable, "-c", code + plans + (run_here if has("click") else ""))
    expect(done.returncode == 0, f"does not start without torch:\n{done.stderr}")
    expect(not has("click") or done.stdout == GRID, f"without torch, the command line printed:\n{done.stdout}")
    return "the package, the plans and the command line start without torch"


def command_line_works() -> str:
    """`torchdistpackage schedule show`; without click, one sentence that names the extra."""
    command = Path(sysconfig.get_path("scripts"), "torchdistpackage")
    expect(command.is_file(), f"there is no {command}")
    done = run(str(command), *SHOW)
    if not has("click"):
        expect(done.returncode == 1, "the command line runs without click")
        expect(is_one_sentence(done.stderr, "cli"), f"without click the command line says:\n{done.stderr}")
        return f"the command line says: {done.stderr.strip()}"
    expect((done.returncode, done.stdout) == (0, GRID), f"{' '.join(SHOW)} printed:\n{done.stdout}{done.stderr}")
    return f"torchdistpackage {' '.join(SHOW)}"


def torch_is_asked_for() -> str:
    """A command that needs torch says so where there is none."""
    expect(not has("torch"), "torch is installed here; leave --without-torch out")
    done = run(str(Path(sysconfig.get_path("scripts"), "torchdistpackage")), "comm-check", "--nproc", "2")
    expect(done.returncode == 1, f"comm-check ended with {done.returncode} without torch")
    expect(done.stderr.count("\n") == 1 and "needs torch" in done.stderr, f"without torch it says:\n{done.stderr}")
    return f"comm-check says: {done.stderr.strip()}"


def has(module: str) -> bool:
    """Whether a module is installed."""
    return importlib.util.find_spec(module) is not None


def is_one_sentence(text: str, extra: str) -> bool:
    """Whether a message is one line that names an extra."""
    return f"torchdistpackage[{extra}]" in text and "\n" not in text.strip()


# ---- in one process ----


def names_are_there() -> str:
    """Every public name of the root can be had with torch and nothing else."""
    import torchdistpackage

    for name in torchdistpackage.__all__:
        value = getattr(torchdistpackage, name)
        optional = name.startswith("replace_linear_by_")  # these two are documented to be None without their package
        expect(value is not None or optional, f"torchdistpackage.{name} is None")
    return f"{len(torchdistpackage.__all__)} public names"


def extras_are_named() -> str:
    """What needs an extra that is not installed says so in one sentence."""
    from torch import nn

    from torchdistpackage import ModelFactory, load_safetensors
    from torchdistpackage.schedule import CostModel, build, simulate
    from torchdistpackage.visualize import figure

    def parts() -> None:
        ModelFactory.create_split_models("gpt2", "no-such-directory", split_point_1=1, split_point_2=2)

    def drawn() -> None:
        figure(simulate(build("1f1b", 2, 2), CostModel.uniform(2)))

    calls: list[tuple[str, str, Callable[[], Any]]] = [
        ("transformers", "hf", parts),
        ("safetensors", "hf", lambda: load_safetensors("no-such-directory", nn.Linear(1, 1))),
        ("matplotlib", "viz", drawn),
    ]
    missing = [call for call in calls if not has(call[0])]
    for module, extra, call in missing:
        try:
            call()
        except ModuleNotFoundError as error:
            expect(is_one_sentence(str(error), extra), f"without {module}: {error}")
        else:
            raise SmokeError(f"nothing was said about {module}, which is not installed")
    return f"extras that are asked for by name: {', '.join(module for module, *_ in missing) or 'all are installed'}"


def model_is_cut() -> str:
    """A model that is cut by tracing computes what it did."""
    import torch

    from torchdistpackage import split_model

    model, samples = plain_model(), torch.randn(4, 8)
    pipe = split_model(model, samples, num_stages=2)
    cut = pipe.get_stage_module(1)(pipe.get_stage_module(0)(samples))
    expect(torch.equal(cut, model(samples)), "the traced stages compute something else than the model")
    return "a model is cut by tracing"


# ---- two processes ----


def plain_model() -> Any:
    """Eight layers with the same weights in every process."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.Tanh())])


def batch_of(step: int) -> Any:
    """Samples and targets; ten rows are not a multiple of the micro-batches."""
    import torch

    return torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(step))


def plain_losses() -> list[float]:
    """The loop without this package, over the same micro-batches."""
    import torch
    from torch import nn

    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pieces = [list(torch.tensor_split(half, MICROBATCHES)) for half in batch_of(step)]
        total = 0.0
        for samples, targets in zip(*pieces, strict=True):
            loss = nn.functional.mse_loss(model(samples), targets) * (len(samples) / 10)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        losses.append(total)
    return losses


class Run:
    """This rank's part of the training under one schedule."""

    def __init__(self, schedule: str, chunks: int) -> None:
        import torch

        from torchdistpackage import partition_chunks, tpc

        self.schedule, self.last = schedule, chunks * tpc.get_pp_size() - 1
        self.stages = partition_chunks(plain_model(), schedule)
        self.parameters = [one for stage in self.stages.values() for one in stage.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-2)

    def step(self, number: int) -> float:
        """One step of the optimizer; the loss, on every rank."""
        from torch import nn

        from torchdistpackage import clip_grad_norm_

        stages, last = self.stages, self.last
        functions = [
            (lambda x: nn.functional.mse_loss(stages[last](x[0]), x[1])) if index == last else stage
            for index, stage in stages.items()
        ]
        loss = self._through(functions, number, self.optimizer, broadcast_loss=True)
        clip_grad_norm_(self.parameters, MAX_NORM)
        self.optimizer.step()
        return float(loss)

    def evaluate(self, number: int) -> Any:
        """The model's outputs for a batch; None on ranks without the last stage."""
        return self._through(list(self.stages.values()), number, None, forward_only=True)

    def _through(self, functions: list[Any], number: int, optimizer: Any, **options: Any) -> Any:
        from torchdistpackage import forward_backward

        samples, targets = batch_of(number)
        evaluates = "forward_only" in options
        inputs = [
            samples if index == 0 else [targets] if index == self.last and not evaluates else None
            for index in self.stages
        ]
        one = len(functions) == 1
        return forward_backward(
            optimizer,
            functions[0] if one else functions,
            None,
            inputs[0] if one else inputs,
            MICROBATCHES,
            schedule=self.schedule,
            **options,
        )


def train(schedule: str, chunks: int, folder: str, plain: list[float]) -> None:
    """Losses, clipping, evaluation, and a checkpoint from which the run goes on."""
    import torch

    from torchdistpackage import Checkpointer

    def close(a: float, b: float) -> bool:
        return abs(a - b) <= 1e-6 * abs(b)

    mine = Run(schedule, chunks)
    outputs = mine.evaluate(0)
    if outputs is not None:
        pieces = torch.tensor_split(batch_of(0)[0], MICROBATCHES)
        expected = torch.cat([plain_model()(piece) for piece in pieces])
        expect(torch.equal(outputs, expected), f"{schedule}: the evaluation differs from the plain model")
    losses = [mine.step(number) for number in range(STEPS - 1)]
    with Checkpointer(folder, mine.stages, optimizer=mine.optimizer) as checkpointer:
        checkpointer.save(STEPS - 1)
    losses.append(mine.step(STEPS - 1))
    expect(all(map(close, losses, plain)), f"{schedule}: losses {losses}, the plain loop's are {plain}")
    other = Run(schedule, chunks)
    with Checkpointer(folder, other.stages, optimizer=other.optimizer) as checkpointer:
        loaded = checkpointer.load()
    expect(loaded is not None and loaded.step == STEPS - 1, f"{schedule}: the checkpoint was not loaded: {loaded}")
    again = other.step(STEPS - 1)
    expect(again == losses[-1], f"{schedule}: the loss after loading is {again!r}, and was {losses[-1]!r}")


def rank_main(rank: int, port: int, schedule: str, chunks: int, folder: str, plain: list[float]) -> None:
    """The whole life of one of the two processes."""
    import torch
    import torch.distributed as dist

    from torchdistpackage import setup_distributed, tpc

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    setup_distributed("gloo", timeout=60)
    tpc.setup_process_groups([("pipe", 2)])
    train(schedule, chunks, folder, plain)
    dist.barrier()
    dist.destroy_process_group()


def trains(schedule: str, chunks: int) -> str:
    """Two processes with the losses of the plain loop."""
    import torch

    from torchdistpackage import find_free_port

    torch.set_num_threads(1)
    plain, port = plain_losses(), find_free_port()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = (int(port), schedule, chunks, folder, plain)
        ranks = [context.Process(target=rank_main, args=(rank, *arguments), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
    expect(codes == [0, 0], f"{schedule}: the two processes ended with {codes} (None: not within {SECONDS} s)")
    return f"{schedule}: losses, clipping, evaluation and a checkpoint in two processes, loss {plain[-1]:.6f}"


def versions() -> str:
    """What this environment is."""
    found = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in ("torch", "numpy", "click"):
        if has(name):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def main() -> None:
    """Runs the checks one after the other; ends at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-torch", action="store_true", help="only what works where torch is not installed")
    checks: list[Callable[[], str]] = [versions, is_installed, is_lazy, command_line_works]
    if parser.parse_args().without_torch:
        checks += [torch_is_asked_for] if has("click") else []
    else:
        checks += [names_are_there, extras_are_named, model_is_cut]
        checks += [lambda: trains("1f1b", 1), lambda: trains("zb-v", 2)]
    for check in checks:
        try:
            print(f"ok      {check()}", flush=True)
        except Exception as error:
            if not isinstance(error, SmokeError):
                traceback.print_exc()
            print(f"FAILED  {check.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
