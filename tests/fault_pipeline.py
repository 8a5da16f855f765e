"""A small pipeline with a fault planted on one rank: what the tests of failures share."""

import os
import signal
import sys
import time

import torch
from distributed_pipeline import mse
from torch import nn

from torchdistpackage import PipelineError, clip_grad_norm_, forward_backward, setup_distributed, tpc
from torchdistpackage.schedule import build

ROWS, WIDTH, MICROBATCHES = 8, 4, 4


class Planted(Exception):
    pass


class _BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise Planted("planted in a backward")


def _raise(*_):
    raise Planted("planted")


def _kill(x):
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(x):
    os.kill(os.getpid(), signal.SIGSTOP)
    return x


def _sleep(x):
    time.sleep(1000)


def _late(x):
    time.sleep(9)
    return x


def _hooked(x):
    handle = torch.nn.modules.module.register_module_forward_pre_hook(_raise)
    try:
        nn.Identity()(x)
    finally:
        handle.remove()


OUTPUT_FAULTS = {  # what becomes of a stage's output
    "forward": _raise,
    "hook": _hooked,
    "backward": _BadBackward.apply,
    "output": lambda x: object(),
    "dtype": lambda x: x.double(),
    "shape": lambda x: x[..., :-1] if x.dim() else x.reshape(1, 1),
    "nan": lambda x: x * float("nan"),
    "killed": _kill,
    "stopped": _stop,
    "stuck": _sleep,
    "late": _late,
    "exit": lambda x: sys.exit(3),
    "gone": lambda x: os._exit(0),
}


class FaultyPipeline:
    """One rank of a pipeline of Linear stages, and the steps that it runs.

    A fault happens at the second micro-batch that the bad rank's last stage sees.
    """

    def __init__(self, schedule, forward_only=False, *, pipe=3, **settings):
        setup_distributed(backend="gloo")
        world = int(os.environ["WORLD_SIZE"])
        tpc.setup_process_groups([("data", world // pipe), ("pipe", pipe)], **settings)
        torch.manual_seed(0)
        self.schedule, self.forward_only, self.rank = schedule, forward_only, tpc.get_pp_rank()
        placement = build(schedule, pipe, MICROBATCHES).placement
        layers = [nn.Linear(WIDTH, WIDTH) for _ in placement.owners]
        self.stages = {s: layers[s] for s in placement.local_stages(self.rank)}
        self.last_stage = len(layers) - 1
        self.x, self.y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)

    def step(self, fault=None):
        """One step; a fault is planted in this rank's last stage."""
        victim = max(self.stages)
        functions = [self._function(s, fault if s == victim else None) for s in self.stages]
        inputs = [self.x if s == 0 else [self.y] if s == self.last_stage else None for s in self.stages]
        backwards = [_raise if s == victim else None for s in self.stages] if fault == "bwd_fn" else None
        for stage in self.stages.values():
            stage.zero_grad()
        options = {"schedule": self.schedule, "forward_only": self.forward_only, "broadcast_loss": True}
        loss = forward_backward(None, functions, backwards, inputs, MICROBATCHES, **options)
        if not self.forward_only:
            parameters = [p for stage in self.stages.values() for p in stage.parameters()]
            clip_grad_norm_(parameters, 1e9, error_if_nonfinite=True)
        return loss

    def gradients(self):
        return [p.grad.clone() for stage in self.stages.values() for p in stage.parameters() if p.grad is not None]

    def _function(self, index, fault):
        stage, calls = self.stages[index], []

        def fwd_fn(arguments):
            calls.append(1)
            bad = fault is not None and len(calls) == 2
            x, *targets = arguments if isinstance(arguments, list) else [arguments]
            if bad and fault == "detached":
                x = x.detach()
                with torch.no_grad():
                    out = stage(x)
            else:
                out = stage(x)
            if targets and not self.forward_only:
                out = mse(out, targets[0])
            return OUTPUT_FAULTS[fault](out) if bad and fault in OUTPUT_FAULTS else out

        return fwd_fn


def outcome(function, *arguments):
    """What a call came to: the exception's type, text and place, and seconds."""
    began = time.monotonic()
    try:
        function(*arguments)
    except BaseException as error:
        place = {}
        if isinstance(error, PipelineError):
            place = {name: getattr(error, name) for name in ("global_rank", "stage", "action", "microbatch")}
        notes = "".join(getattr(error, "__notes__", []))
        return type(error).__name__, str(error), place, notes, time.monotonic() - began
    return "ok", "", {}, "", time.monotonic() - began
