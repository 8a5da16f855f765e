"""Draws the pictures of the documentation with the library: `python docs/pictures.py [FOLDER]`.

One picture a schedule, four ranks and eight micro-batches, a full backward twice as long as a forward; and 1F1B above
ZB-V, for the README. They lie in `pictures/`, because pages are also read where nobody builds them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from torchdistpackage import schedule
from torchdistpackage.schedule import Timeline
from torchdistpackage.visualize import figure

HERE = Path(__file__).parent
RANKS, MICROBATCHES = 4, 8


def timeline(name: str) -> Timeline:
    """A simulated step of the schedule."""
    plan = schedule.build(name, RANKS, MICROBATCHES)
    stages = plan.placement.num_stages
    return schedule.simulate(plan, schedule.CostModel.uniform(stages, chunks=stages // RANKS))


def draw_all(folder: Path) -> None:
    """Draws `name.svg` for each schedule of the catalogue, and `1f1b-and-zb-v.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    small = {"svg.fonttype": "none", "svg.hashsalt": "torchdistpackage"}  # text as text; the same ids each time
    with matplotlib.rc_context(small):
        for name in schedule.names():
            figure(timeline(name), path=folder / f"{name}.svg")
        figure(timeline("1f1b"), measured=timeline("zb-v"), path=folder / "1f1b-and-zb-v.svg")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if sys.argv[1:] else HERE / "pictures")
