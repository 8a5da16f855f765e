"""Draws the pictures of the documentation with the library: `python docs/pictures.py FOLDER [NAME ...]`.

One picture a schedule, four ranks and eight micro-batches, a full backward twice as long as a forward; `1f1b` and
`zb-v` also stand in `pictures/`, for the README, which is read without being built.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torchdistpackage import schedule
from torchdistpackage.visualize import figure

RANKS, MICROBATCHES = 4, 8


def draw_all(folder: Path, names: tuple[str, ...] = ()) -> None:
    """Draws `name.svg` for each of the schedules, those of the catalogue if none is named."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or schedule.names():
        plan = schedule.build(name, RANKS, MICROBATCHES)
        costs = schedule.CostModel.uniform(plan.placement.num_stages, chunks=plan.placement.num_stages // RANKS)
        figure(schedule.simulate(plan, costs), path=folder / f"{name}.svg")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]), tuple(sys.argv[2:]))
