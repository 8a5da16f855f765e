import pytest

from torchdistpackage.cli.inputs import load_costs
from torchdistpackage.errors import ScheduleError
from torchdistpackage.schedule import CostModel


def test_costs_with_skips_are_read_as_they_were_written(tmp_path):
    costs = CostModel((1.0,) * 3, (1.0,) * 3, (1.0,) * 3, hop=(0.1, 0.2), skip_hop=((0, 2, 0.5),))
    (tmp_path / "costs.json").write_text(costs.to_json())
    assert load_costs({"costs": str(tmp_path / "costs.json")}, 3, 3) == costs


@pytest.mark.parametrize("entry", ["[0, 2]", '[0, 2, "x"]', "[0, 1, 0.5]", "7"])
def test_a_skip_that_is_none_is_refused(tmp_path, entry):
    text = '{"forward": [1, 1, 1], "input_grad": [1, 1, 1], "weight_grad": [1, 1, 1], "skip_hop": [%s]}'
    (tmp_path / "costs.json").write_text(text % entry)
    with pytest.raises(ScheduleError, match="skip_hop"):
        load_costs({"costs": str(tmp_path / "costs.json")}, 3, 3)
