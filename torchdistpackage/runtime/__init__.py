"""THE MACHINE: runs one rank's part of a plan.

executor -> stage -> autograd                    what a micro-batch does on this rank
executor -> transport -> edge -> message         how it gets to the next one
"""

from torchdistpackage.runtime.executor import ChunkWork, Executor, StepResult
from torchdistpackage.runtime.loopback import LoopbackTransport, loopback
from torchdistpackage.runtime.transport import Transport

__all__ = ["ChunkWork", "Executor", "LoopbackTransport", "StepResult", "Transport", "loopback"]
