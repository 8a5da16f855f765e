"""Order and levels of the table."""

from torchdistpackage.tools import ModelProfile, ModuleCost


def cost(forward=0.001, kept=0, freed=0):
    return ModuleCost("Module", calls=1, forward=forward, kept=kept, freed=freed)


def levels(profile):
    """The names in the table by level."""
    found = {}
    for line in str(profile).splitlines()[2:-1]:
        if line.startswith("level "):
            found[int(line.split()[1])] = names = []
        else:
            names.append(line.split()[0])
    return found


def test_numbers_are_no_levels():
    names = ["root", "layer1", "layer1.0", "layer1.10", "layer1.0.conv1", "0", "0.12", "0.fc", "a.1.b.2.c"]
    profile = ModelProfile({name: cost(kept=1) for name in names}, sort=False)
    assert levels(profile) == {
        0: ["root"],
        1: ["layer1", "layer1.0", "layer1.10", "0", "0.12"],
        2: ["layer1.0.conv1", "0.fc"],
        3: ["a.1.b.2.c"],
    }


def test_what_frees_most_for_its_time_comes_first():
    costs = {
        "root": cost(),
        "slow": cost(0.010, kept=60_000_000, freed=50_000_000),
        "quick": cost(0.001, kept=60_000_000, freed=20_000_000),
        "useless": cost(0.001, kept=90_000_000),
        "small": cost(0.001, kept=49_000_000, freed=49_000_000),
    }
    assert levels(ModelProfile(costs))[1] == ["quick", "slow", "useless"]
    assert levels(ModelProfile(costs, min_mem=0, topn=2))[1] == ["small", "quick"]
    assert levels(ModelProfile(costs, sort=False, topn=1))[1] == ["slow", "quick", "useless", "small"]
    assert len(levels(ModelProfile(costs, topn=-1, min_mem=0))[1]) == 4


def test_rows_are_aligned_and_small_numbers_are_not_nothing():
    profile = ModelProfile({"root": cost(kept=10**9), "a": cost(kept=10), "b": cost(kept=0)}, min_mem=0)
    header, units, *rows = str(profile).splitlines()
    end = header.index("kept") + len("kept")
    assert units[:end].endswith("[GB]")
    assert [row[:end].split()[-1] for row in rows if not row.startswith(("level", "kept"))] == ["1.00", "<0.01", "0.00"]
    assert str(ModelProfile()).splitlines()[0].startswith("module")
