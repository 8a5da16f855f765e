"""Draws the pictures of the documentation with the library: `python docs/pictures.py` draws that of the README.

One picture a schedule, four ranks and eight micro-batches, a full backward twice as long as a forward. They are drawn
while the pages are built; the README is read without being built, so its picture lies in `pictures/`.
"""

from __future__ import annotations

from pathlib import Path

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
    """Draws `name.svg` for each schedule of the catalogue."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in schedule.names():
        figure(timeline(name), path=folder / f"{name}.svg")


def draw_readme(folder: Path) -> None:
    """Draws 1F1B above ZB-V, on one axis."""
    folder.mkdir(parents=True, exist_ok=True)
    figure(timeline("1f1b"), measured=timeline("zb-v"), path=folder / "1f1b-and-zb-v.svg")


if __name__ == "__main__":
    draw_readme(HERE / "pictures")
