"""THE MACHINE: runs one rank's part of a plan.

::

    executor -> stage -> autograd                           what a micro-batch does on this rank
    executor -> transport -> outlet, inlet -> message       how it gets to the next one
    watchdog                                                looks at the clock beside the step, and at other failures
"""

from torchdistpackage.runtime.executor import Executor
from torchdistpackage.runtime.loopback import LoopbackTransport, loopback
from torchdistpackage.runtime.step import ChunkWork, StepResult
from torchdistpackage.runtime.transport import Transport

__all__ = ["ChunkWork", "Executor", "LoopbackTransport", "StepResult", "Transport", "loopback"]
