"""What a rank's checkpoint file is called, when every rank of a model-parallel group writes its own."""

from __future__ import annotations

from torchdistpackage.topology.context import tpc

__all__ = ["get_mp_ckpt_suffix"]


def get_mp_ckpt_suffix() -> str:
    """The end of the name of this rank's checkpoint file: its place in the tensor and the pipeline group.

    A part is there only if its mode has more than one rank, so that one process and plain replicas write ".pth".
    Data-parallel replicas get the same name: let the first one write (`tpc.is_first_in_data_group()`).

    Returns:
        "_tp_1_pp_2.pth" on rank 1 of the tensor group and rank 2 of the pipeline; "_pp_2.pth" without tensor
        parallelism; ".pth" with neither, and before `tpc` is set up.

    Example:
        >>> get_mp_ckpt_suffix()
        '.pth'
        >>> torch.save(model.state_dict(), "model" + get_mp_ckpt_suffix())  # doctest: +SKIP
    """
    modes = (("tensor", "tp"), ("pipe", "pp"))
    return "".join(f"_{tag}_{tpc.get_group_rank(mode)}" for mode, tag in modes if tpc.is_mode_inited(mode)) + ".pth"
