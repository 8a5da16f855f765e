"""THE PLAN: schedules as data. Plain Python; this room never imports torch.

::

    recipe (compute order) -> lowering (messages, reductions) -> verify (proof) -> runtime, pictures, files
"""

from torchdistpackage.schedule import planner
from torchdistpackage.schedule.action import Action, Op
from torchdistpackage.schedule.bounds import lower_bound
from torchdistpackage.schedule.building import build, complete, outline
from torchdistpackage.schedule.costs import CostModel
from torchdistpackage.schedule.lowering import (
    add_communication,
    add_reduce_grad,
    forward_only,
    merge_backwards,
    split_backwards,
    without_communication,
)
from torchdistpackage.schedule.placement import Placement
from torchdistpackage.schedule.plan import Plan
from torchdistpackage.schedule.registry import ScheduleFacts, canonical_name, describe, names
from torchdistpackage.schedule.routing import Routed
from torchdistpackage.schedule.simulate import simulate
from torchdistpackage.schedule.timeline import Span, Timeline
from torchdistpackage.schedule.verify import peak_activations, verify

__all__ = [
    "Action",
    "CostModel",
    "Op",
    "Placement",
    "Plan",
    "Routed",
    "ScheduleFacts",
    "Span",
    "Timeline",
    "add_communication",
    "add_reduce_grad",
    "build",
    "canonical_name",
    "complete",
    "describe",
    "forward_only",
    "lower_bound",
    "merge_backwards",
    "names",
    "outline",
    "peak_activations",
    "planner",
    "simulate",
    "split_backwards",
    "verify",
    "without_communication",
]
