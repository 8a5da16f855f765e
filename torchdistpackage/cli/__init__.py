"""The command `torchdistpackage`: plans on the command line. Starts without torch.

torchdistpackage schedule list
torchdistpackage schedule show 1f1b --ranks 4 --microbatches 8
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
