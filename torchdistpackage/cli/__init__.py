"""The command `torchdistpackage`: plans on the command line, and a test of the network. Starts without torch.

::

    torchdistpackage schedule list
    torchdistpackage schedule show 1f1b -p 4 -m 8
    torchdistpackage split torchvision:resnet50 -p 4 -i 4x3x224x224
    torchdistpackage split ./Llama-3.1-8B --at 2,30 --out ./parts
    torchdistpackage checkpoint export run out
    torchdistpackage comm-check --nproc 2

One file a group of commands::

    commands.py    the root
    schedules.py   schedule list, show, verify          planning.py            schedule simulate, trace, plan
    splitting.py   split, by tracing                    parts.py               split, of a directory of weights
    checkpoint.py  checkpoint inspect, verify, export   checkpoint_facts.py    what inspect says
    comm_check.py  comm-check                           inputs.py              plans and costs, from options and files
                                                        output.py              tables, pictures, errors in one line
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Runs the command line; needs the extra `cli`."""
    try:
        from torchdistpackage.cli.commands import torchdistpackage
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        raise SystemExit("the command line needs click: pip install 'torchdistpackage[cli]'") from None
    torchdistpackage()
