"""The root of the command line. Each command is a few lines around one function of the library.

What a command alone needs (torch, matplotlib, rich) is imported when it runs: help and errors come at once.
"""

from __future__ import annotations

import click

from torchdistpackage import __version__
from torchdistpackage.cli.checkpoint import export, inspect, verify
from torchdistpackage.cli.comm_check import comm_check
from torchdistpackage.cli.planning import plan_schedule, simulate_schedule, trace_schedule
from torchdistpackage.cli.schedules import list_schedules, show, verify_file
from torchdistpackage.cli.splitting import split_model

__all__ = ["torchdistpackage"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def torchdistpackage() -> None:
    """Pipeline-parallel training in PyTorch, inside the user's own loop.

    \b
    torchdistpackage schedule list
    torchdistpackage schedule show zb-v -p 4 -m 8
    torchdistpackage split torchvision:resnet50 -p 4 -i 4x3x224x224
    torchdistpackage checkpoint inspect run
    torchdistpackage comm-check --nproc 2
    """  # noqa: D301


@torchdistpackage.group("schedule")
def schedule_group() -> None:
    """Look at schedules, prove, time and draw them: a plan is data.

    \b
    torchdistpackage schedule show 1f1b -p 4 -m 8
    torchdistpackage schedule show interleaved-1f1b --chunks 4 --csv > mine.csv
    torchdistpackage schedule verify mine.csv
    torchdistpackage schedule simulate mine.csv --weight-grad 0.8 --hop 0.05
    """  # noqa: D301


@torchdistpackage.group("checkpoint")
def checkpoint_group() -> None:
    """Look into checkpoints, see whether they are whole, and write their weights as safetensors.

    \b
    torchdistpackage checkpoint inspect run
    torchdistpackage checkpoint verify run
    torchdistpackage checkpoint export run/step-00000120 out --dtype bfloat16
    """  # noqa: D301


for command in (list_schedules, show, verify_file, simulate_schedule, trace_schedule, plan_schedule):
    schedule_group.add_command(command)
for command in (inspect, verify, export):
    checkpoint_group.add_command(command)
torchdistpackage.add_command(split_model)
torchdistpackage.add_command(comm_check)
