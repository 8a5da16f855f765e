"""The batch cut into micro-batches and put together again: what is cut, what is not, and what does not fit."""

import numpy as np
import pytest
import torch

from torchdistpackage.errors import PipelineError
from torchdistpackage.runtime.microbatch import merge_outputs, slice_inputs


def test_a_pytree_is_one_argument_and_only_its_rows_are_cut():
    cut = slice_inputs({"x": torch.arange(3), "scale": torch.tensor(2.0), "note": "all"}, 2)
    assert cut.rows == 3
    [[first], [second]] = cut.microbatches
    assert (first["x"].tolist(), second["x"].tolist()) == ([0, 1], [2])
    assert first["note"] == second["note"] == "all"
    assert first["scale"] is second["scale"]


def test_inputs_without_a_tensor_go_to_every_micro_batch():
    cut = slice_inputs(["note", 3], 2)
    assert (cut.rows, cut.microbatches) == (None, [["note", 3], ["note", 3]])
    assert slice_inputs(None, 2).microbatches == [[], []]


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ([torch.ones(4, 2), torch.ones(3)], r"rows; got shapes \(4, 2\), \(3,\). .* used inside of fwd_fn"),
        (torch.ones(0, 2), "inputs have 0 rows"),
        ([np.ones(4)], "hold a ndarray, which would reach every micro-batch whole; convert it with torch.as_tensor"),
    ],
)
def test_inputs_that_cannot_be_cut_are_refused(inputs, reason):
    with pytest.raises(PipelineError, match=reason):
        slice_inputs(inputs, 2)


def test_every_kind_of_output_is_put_together_in_its_way():
    outputs = [
        {"rows": torch.tensor([[1], [2]]), "loss": torch.tensor(3.0), "count": torch.tensor(2), "same": "a", "each": 0},
        {"rows": torch.tensor([[3]]), "loss": torch.tensor(6.0), "count": torch.tensor(1), "same": "a", "each": 1},
    ]
    merged = merge_outputs(outputs, [2 / 3, 1 / 3])
    assert merged["rows"].tolist() == [[1], [2], [3]]
    assert merged["loss"].item() == pytest.approx(4.0)
    assert merged["count"].tolist() == [2, 1]
    assert (merged["same"], merged["each"]) == ("a", [0, 1])
    assert merge_outputs([torch.tensor(7)], [1.0]).item() == 7


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([(torch.ones(1), 1), [torch.ones(1), 1]], r"micro-batch 1 returned the structure TreeSpec\(list, "),
        ([torch.ones(2), "none"], "different types for different micro-batches: Tensor, str"),
        ([torch.ones(2, 3), torch.ones(2, 4)], r"rows of different shapes .*: \(3,\), \(4,\); return them in a list"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused(outputs, reason):
    with pytest.raises(PipelineError, match=reason):
        merge_outputs(outputs, [0.5, 0.5])
