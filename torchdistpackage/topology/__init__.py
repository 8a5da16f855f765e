"""Who is where: which rank shares which groups, how processes start, and whether their links work.

======================  =====================================================================
`rank_table.py`         arithmetic: the groups of every rank, without torch
`process_groups.py`     makes and destroys torch process groups
`connections.py`        ends what waits in a process group, from another thread
`exchange.py`           plain data between the ranks of a group, outside of steps
`same_host.py`          which ranks share a machine, and sockets between them
`pipeline_links.py`     how the ranks of a pipeline, and the replicas of a stage, reach each other
`context.py`            `tpc`, this rank's place in every group
`checkpoint_suffix.py`  a file name of its own for every rank that holds other weights
`launch.py`             `setup_distributed`: torchrun, SLURM or one process
`comm_check.py`         `test_comm`: does every group and link work, and how fast
======================  =====================================================================
"""

from __future__ import annotations

from torchdistpackage.topology.checkpoint_suffix import get_mp_ckpt_suffix
from torchdistpackage.topology.comm_check import CommReport, test_comm
from torchdistpackage.topology.context import ParallelContext, is_using_pp, torch_parallel_context, tpc
from torchdistpackage.topology.launch import find_free_port, setup_distributed
from torchdistpackage.topology.process_groups import setup_node_groups
from torchdistpackage.topology.rank_table import RankTable, rank_table

__all__ = [
    "CommReport",
    "ParallelContext",
    "RankTable",
    "find_free_port",
    "get_mp_ckpt_suffix",
    "is_using_pp",
    "rank_table",
    "setup_distributed",
    "setup_node_groups",
    "test_comm",
    "torch_parallel_context",
    "tpc",
]
