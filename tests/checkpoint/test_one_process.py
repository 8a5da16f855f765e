"""Checkpoints in one process without process groups: everything comes back, and what cannot be saved is refused."""

import random
import resource
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import nn

from torchdistpackage import CheckpointError, flatten_model, partition_uniform
from torchdistpackage.checkpoint import Checkpointer, TensorFiles, inspect_checkpoint, list_checkpoints


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 6), nn.BatchNorm1d(6)
        self.body, self.head = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4)), nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        return self.head(self.body(self.norm(self.embed(ids))))


class Training:
    """A model with an optimizer of two groups and a scheduler."""

    def __init__(self, seed=0, make=torch.optim.AdamW, **options):
        torch.manual_seed(seed)
        self.model = Net()
        groups = [{"params": [*self.model.embed.parameters()], "lr": 0.02}]
        known = set(groups[0]["params"])
        groups.append({"params": [p for p in self.model.parameters() if p not in known]})
        self.optimizer = make(groups, lr=0.1, **options)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [2, 4])

    def step(self):
        ids = torch.randint(11, (7,)) + random.randrange(1) + numpy.random.randint(1)
        loss = self.model(ids).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item(), random.random(), numpy.random.normal(), self.optimizer.param_groups[0]["lr"]

    def checkpointer(self, folder, **more):
        return Checkpointer(folder, self.model, optimizer=self.optimizer, scheduler=self.scheduler, **more)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_a_run_goes_on_with_the_same_bits(tmp_path, make, options, asynchronous):
    first = Training(0, make, **options)
    with first.checkpointer(tmp_path, asynchronous=asynchronous) as checkpointer:
        numpy.random.normal()  # leaves a second one for later
        first.step()
        checkpointer.save(1, extra={"epoch": 3})
        expected = [first.step() for _ in range(4)]
    second = Training(1, make, **options)
    with second.checkpointer(tmp_path) as checkpointer:
        loaded = checkpointer.load()
        assert (loaded.step, loaded.extra, loaded.same_layout, loaded.skipped) == (1, {"epoch": 3}, True, ())
    assert [second.step() for _ in range(4)] == expected


def test_no_checkpoint_yet(tmp_path):
    with Checkpointer(tmp_path / "run", nn.Linear(2, 2)) as checkpointer:
        assert checkpointer.load() is None


def test_before_the_first_step_there_is_no_state(tmp_path):
    Training(0).checkpointer(tmp_path).save(0)
    later = Training(1)
    later.step()
    later.checkpointer(tmp_path).load()
    assert not later.optimizer.state


def test_only_the_newest_stay_and_a_step_is_replaced(tmp_path):
    training = Training()
    with training.checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 10):
            checkpointer.save(step)
        (tmp_path / "step-00000002" / "shared.pt").write_bytes(b"torn")
        (tmp_path / "step-00000001.unfinished").mkdir()
        checkpointer.save(10, extra="again")
        assert checkpointer.load().extra == "again"
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
        checkpointer.save(5)
        assert sorted(info.step for info in list_checkpoints(tmp_path)) == [5, 10]  # newer ones are left alone
        assert checkpointer.load(5).step == 5


def test_a_replaced_one_counts_until_the_new_one_is_there(tmp_path):
    training = Training()
    training.checkpointer(tmp_path).save(3, extra="old")
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.replaced")  # killed between two renames
    assert training.checkpointer(tmp_path).load().extra == "old"
    assert training.checkpointer(tmp_path).load(3).extra == "old"
    training.checkpointer(tmp_path).save(3, extra="new")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_ties_load_whether_they_were_seen_or_not(tmp_path):
    plain, tied = Training(0), Training(1)
    plain.model.head.weight.data.copy_(plain.model.embed.weight)
    tied.model.head.weight = tied.model.embed.weight
    Checkpointer(tmp_path / "plain", plain.model).save(1)
    Checkpointer(tmp_path / "tied", tied.model).save(1)
    assert inspect_checkpoint(tmp_path / "tied/step-00000001").aliases == {
        "embed.weight": ("embed.weight", "head.weight")
    }
    expected = tied.model.embed.weight.clone()
    Checkpointer(tmp_path / "tied", plain.model).load()
    assert torch.equal(plain.model.head.weight, expected)
    assert torch.equal(plain.model.embed.weight, expected)
    Checkpointer(tmp_path / "plain", tied.model).load()
    plain.model.head.weight.data.add_(1)
    Checkpointer(tmp_path / "plain", plain.model).save(2)
    with pytest.raises(CheckpointError, match="embed.weight and head.weight are one parameter here, but two"):
        Checkpointer(tmp_path / "plain", tied.model).load()


def test_stages_have_the_names_of_the_model(tmp_path):
    training = Training()
    Checkpointer(tmp_path, training.model).save(1)
    files = TensorFiles(tmp_path / "step-00000001")
    assert torch.equal(files.read_whole("model.body.0.weight"), training.model.body[0].weight)
    layers = flatten_model(Training(3).model, ["embed", "norm", "body", "head"])
    stages = {index: nn.Sequential(*partition_uniform(layers, num_stages=3, stage=index)) for index in range(3)}
    Checkpointer(tmp_path, stages).load()
    assert torch.equal(stages[2][-1].weight, training.model.head.weight)


def test_parameters_in_other_groups_keep_their_options(tmp_path):
    first, second = Training(0), Training(1)
    first.step()
    first.checkpointer(tmp_path).save(1)
    groups = [{"params": [p], "lr": 9.0} for p in second.model.parameters()]
    optimizer = torch.optim.AdamW(groups)
    Checkpointer(tmp_path, second.model, optimizer=optimizer).load()
    assert [group["lr"] for group in optimizer.param_groups][:2] == [0.02, 0.1]
    together = torch.optim.AdamW(second.model.parameters())
    with pytest.raises(CheckpointError, match=r"embed.weight and norm.weight are in one group .*lr 0.02 and 0.1"):
        Checkpointer(tmp_path, second.model, optimizer=together).load()


def test_two_optimizers(tmp_path):
    def make():
        model = Net()
        return model, [torch.optim.SGD(model.embed.parameters(), 0.1, 0.9), torch.optim.Adam(model.head.parameters())]

    model, optimizers = make()
    model(torch.arange(5)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    Checkpointer(tmp_path, model, optimizer=optimizers).save(1)
    other, others = make()
    Checkpointer(tmp_path, other, optimizer=others).load()
    momentum = others[0].state[other.embed.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizers[0].state[model.embed.weight]["momentum_buffer"])
    assert others[1].state[other.head.weight]["step"] == 1
    with pytest.raises(CheckpointError, match="trained by SGD .* in Adam here"):
        Checkpointer(tmp_path, other, optimizer=torch.optim.Adam(other.parameters())).load(strict=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "extra", nn.Linear(2, 2)), "has no extra.weight, extra.bias"),
        (lambda model: setattr(model, "head", nn.Linear(6, 12, bias=False)), r"head.weight is \(11, 6\) .* \(12, 6\)"),
        (lambda model: delattr(model, "head"), "no rank has a place for head.weight"),
    ],
)
def test_another_model_is_named_and_nothing_is_changed(tmp_path, change, message):
    Checkpointer(tmp_path, Net()).save(1)
    model = Net()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, model).load()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_missing_stays_if_that_is_wanted(tmp_path):
    Checkpointer(tmp_path, Net()).save(1)
    model = Net()
    model.extra = nn.Linear(2, 2)
    del model.head
    before = model.extra.weight.clone()
    loaded = Checkpointer(tmp_path, model).load(strict=False)
    assert (loaded.missing, loaded.unexpected) == (("extra.bias", "extra.weight"), ("head.weight",))
    assert torch.equal(model.extra.weight, before)


def test_what_could_not_be_read_back_is_refused(tmp_path):
    class Odd:
        def state_dict(self):
            return {"fine": 1, "odd": [2, random.Random()]}

        def load_state_dict(self, state):
            pass

    model = Net()
    with pytest.raises(CheckpointError, match=r"loader\['odd'\]\[1\] is a Random"):
        Checkpointer(tmp_path, model, objects={"loader": Odd()}).save(1)
    with pytest.raises(CheckpointError, match=r"extra\['x'\] is a Net"):
        Checkpointer(tmp_path, model).save(1, extra={"x": model})
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, "keep must be at least 1"),
        ({"optimizer": 3}, "optimizer must be"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "is not in the stages"),
        ({"data": 3}, "data is a int without state_dict"),
        ({"config": {"x": nn.Linear(2, 2)}}, "JSON cannot say"),
        ({"ema": 3}, "must be a ShardedEMA"),
        ({"objects": {"scaler": 1}, "scaler": 2}, "give it once"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=message):
        Checkpointer(tmp_path, Net(), **arguments)


def test_a_models_configuration_is_beside_it(tmp_path):
    Checkpointer(tmp_path, Net(), config={"width": 6}).save(1)
    assert (tmp_path / "step-00000001" / "config.json").read_text() == '{\n  "width": 6\n}'


def test_a_failed_save_in_the_background_is_raised_by_the_next_call(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run", Net(), asynchronous=True)
    (tmp_path / "run").write_text("a file is in the way")
    checkpointer.save(1)
    with pytest.raises(CheckpointError, match="cannot be made"):
        checkpointer.wait()
    checkpointer.close()


@contextmanager
def files_of_at_most(count):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_full_disk_has_left_does_not_fill_it_for_ever(tmp_path):
    checkpointer = Checkpointer(tmp_path, Net())
    for step in (1, 2):
        with files_of_at_most(1500), pytest.raises(CheckpointError, match="bytes are to be written, and .* are free"):
            checkpointer.save(step)
        assert [path.name for path in tmp_path.iterdir()] == [f"step-0000000{step}.unfinished"]
    checkpointer.save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_an_extra_state_is_not_lost_silently(tmp_path, caplog):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"count": 7}

        def set_extra_state(self, state):
            pass

    Checkpointer(tmp_path, nn.Sequential(nn.ReLU(), Counting(2, 2)))
    assert "the extra state of 1 (1 in all)" in caplog.text
