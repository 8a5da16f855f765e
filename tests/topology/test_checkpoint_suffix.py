"""The end of a checkpoint file's name says which part of the model is in it."""

import pytest
from distributed_harness import run_distributed

from torchdistpackage.topology import setup_distributed, tpc
from torchdistpackage.topology.checkpoint_suffix import get_mp_ckpt_suffix


def suffix(rank, world_size, config):
    setup_distributed()
    assert get_mp_ckpt_suffix() == ".pth"  # tpc is not set up
    tpc.setup_process_groups(config)
    return get_mp_ckpt_suffix()


@pytest.mark.parametrize(
    ("config", "suffixes"),
    [
        ([("pipe", 2), ("tensor", 2)], ["_tp_0_pp_0", "_tp_1_pp_0", "_tp_0_pp_1", "_tp_1_pp_1"]),
        ([("data", 2), ("pipe", 2), ("tensor", 1)], ["_pp_0", "_pp_1", "_pp_0", "_pp_1"]),
        ([("tensor", 2), ("data", 1)], ["_tp_0", "_tp_1"]),
        ([("data", 2)], ["", ""]),
    ],
)
def test_parts_of_modes_with_more_than_one_rank(config, suffixes):
    assert run_distributed(suffix, len(suffixes), config) == [f"{one}.pth" for one in suffixes]


def test_one_process_without_a_set_up():
    assert get_mp_ckpt_suffix() == ".pth"
