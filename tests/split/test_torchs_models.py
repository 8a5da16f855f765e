"""What torch.distributed.pipelining promises of its splitter, for models of the same kind, and what it gets wrong.

The number of stages, names that are the model's, and the model's numbers; on top of that the gradients through the
runtime, with values that skip stages.
"""

import copy

import pytest
import torch
from torch import nn
from traced_training import assert_trains

from torchdistpackage.schedule import describe
from torchdistpackage.split import SplitPoint, pipe_split, pipeline, split

WIDTH = 6
SCHEDULES = ["1f1b", "interleaved-1f1b", "zb-v"]


class Skipping(nn.Module):
    """A skip over stages, a matrix that two stages use, a constant buffer that travels, two inputs."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.last = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.register_buffer("constant", torch.randn(WIDTH))
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        skipped = x = x @ self.shared
        constant = self.constant.clone()
        x = torch.relu(x + y)
        pipe_split()
        x = self.first(x @ self.shared)
        pipe_split()
        x = (torch.relu(x) + skipped + constant) @ self.last
        pipe_split()
        return torch.tanh(self.second(x)) * constant


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Layers(nn.Module):
    """The second input is used at the very end."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three, self.four = Layer(), Layer(), Layer(), Layer()

    def forward(self, x, y):
        x = self.one(x)
        pipe_split()
        x = self.two(x)
        pipe_split()
        x = self.three(x)
        pipe_split()
        return self.four(x) - y


class Aliased(nn.Module):
    """One parameter and one module under two names each, on two stages."""

    def __init__(self):
        super().__init__()
        self.left = self.right = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.inner = self.outer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        x = torch.relu(self.inner(x @ self.left + y))
        pipe_split()
        return torch.relu(self.outer(x @ self.right))


class Marked(nn.Module):
    """A mark inside of a block, which gets a tensor by keyword and adds to its value in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.first, self.act, self.second = nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, constant=None):
        x = self.first(self.conv(x))
        pipe_split()
        x.add_(constant)
        return self.act(self.second(x))


class TwoMarked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.tail = Marked(), Marked()

    def forward(self, x, constant=None):
        x = self.head(x, constant=constant)
        pipe_split()
        return self.tail(x, constant=constant)


class Halves(torch.autograd.Function):
    """Two outputs, and a backward of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = x @ weight
        return y.relu(), -y

    @staticmethod
    def backward(ctx, up, down):
        x, weight = ctx.saved_tensors
        gradient = up * (x @ weight > 0) - down
        return gradient @ weight.T, x.T @ gradient


class Custom(nn.Module):
    """The outputs of custom functions cross the cut, one of them without being used on the next stage."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x, y):
        positive, negative = Halves.apply(x, self.a)
        pipe_split()
        positive, other = Halves.apply(positive, self.b)
        pipe_split()
        return positive + other + negative, y * 2


def rows(n):
    return [torch.randn(n, WIDTH), torch.randn(n, WIDTH)]


def images(n):
    return [torch.randn(n, 2, 5, WIDTH), torch.randn(n, 2, 5, WIDTH)]


MODELS = {Skipping: (4, rows), Layers: (4, rows), Aliased: (2, rows), TwoMarked: (4, images), Custom: (3, rows)}


@pytest.mark.parametrize("kind", MODELS)
def test_as_many_stages_as_marks_and_the_models_names(kind):
    count, example = MODELS[kind]
    model = kind()
    pipe = pipeline(model, tuple(example(3)))
    assert pipe.num_stages == count
    found = [set(pipe.get_stage_module(index).state_dict()) for index in range(count)]
    assert set.union(*found) == set(model.state_dict())
    for n in (3, 1, 8):  # the example's batch size is not part of the stages
        x = example(n)
        mine, theirs = pipe(*copy.deepcopy(x)), model(*x)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


FITTING = [(kind, name) for kind in MODELS for name in SCHEDULES if MODELS[kind][0] % describe(name).chunks == 0]


@pytest.mark.parametrize(("kind", "schedule"), FITTING)
def test_gradients_through_the_runtime(kind, schedule):
    _, example = MODELS[kind]
    model = kind()
    reference = copy.deepcopy(model)
    assert_trains(model, reference, pipeline(model, tuple(example(2))), schedule, example(10))


def transformer():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True)
    return nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("build", [transformer, lambda: nn.Sequential(nn.Sequential(*[Layer() for _ in range(8)]))])
def test_each_layer_is_on_exactly_one_stage(build, schedule):
    model = build()
    layers = [name for name, _ in model.named_modules() if name.count(".") == 1 and name[-1].isdigit()]
    spec = {name: SplitPoint.BEGINNING for name in layers[2::2]}
    reference, example = copy.deepcopy(model), torch.randn(2, 5, WIDTH)
    pipe = pipeline(model, (example,), split_spec=spec)
    held = [name for i in range(4) for name, _ in pipe.get_stage_module(i).named_modules() if name in layers]
    assert held == layers
    torch.manual_seed(0)
    for each in (model, reference):
        each.apply(lambda m: setattr(m, "p", 0.0) if isinstance(m, nn.Dropout) else None)
        for module in each.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
    assert_trains(model, reference, pipe, schedule, [torch.randn(8, 7, WIDTH)])


# Before the first layer, behind the last one, and right behind each other: no empty stage, no gap in the numbers.
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"0": "BEGINNING"}, 1),
        ({"3": "END"}, 1),
        ({"0": "END", "1": "BEGINNING"}, 2),
        ({"0": "BEGINNING", "1": "BEGINNING", "2": "BEGINNING", "3": "BEGINNING", "3.down": "END"}, 4),
    ],
)
def test_stages_are_numbered_without_gaps(spec, expected):
    model = nn.Sequential(Layer(), Layer(), Layer(), Layer())
    pipe = pipeline(model, (torch.randn(2, WIDTH),), split_spec={k: SplitPoint[v] for k, v in spec.items()})
    assert pipe.num_stages == expected
    assert all(list(pipe.get_stage_module(i).parameters()) for i in range(expected))
    with pytest.raises(Exception, match=f"no stage {expected}"):
        pipe.get_stage_module(expected)


def test_no_parameter_is_there_twice_and_every_name_is_the_models():
    model = Aliased()
    pipe = pipeline(model, tuple(rows(2)))
    stages = [pipe.get_stage_module(index) for index in range(2)]
    names = dict(model.named_parameters(remove_duplicate=False))
    for stage in stages:
        assert len(list(stage.parameters())) == 3
        assert all(names[name] is parameter for name, parameter in stage.named_parameters(remove_duplicate=False))
    assert [sorted(tie) for tie in pipe.replicated_params] == [[0, 1]] * 3


class Rotary(nn.Module):
    """A table that is no part of the checkpoint, used twice without gradients, with other work in between."""

    class Angles(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inverse", 1.0 / torch.arange(1, WIDTH + 1), persistent=False)

        def forward(self, x):
            with torch.no_grad():
                turned = torch.outer(torch.arange(x.shape[1], device=x.device).float(), self.inverse)
            return turned.cos() + x.mean(0)

    def __init__(self):
        super().__init__()
        self.rotary, self.layers = self.Angles(), nn.ModuleList([Layer() for _ in range(4)])
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * self.rotary(x)
            pipe_split()
        return self.norm(self.drop(x).transpose(1, 2))


def test_no_grad_in_a_submodule_and_its_table():
    model = Rotary()
    keys, attributes = list(model.state_dict()), {name: set(vars(m)) for name, m in model.named_modules()}
    pipes = [pipeline(model, (torch.randn(2, 4, WIDTH),)) for _ in range(2)]  # a model can be split again
    assert list(model.state_dict()) == keys
    assert {n: {a for a in vars(m) if "torchdist" not in a} for n, m in model.named_modules()} == attributes
    for pipe in pipes:
        stages = [pipe.get_stage_module(i) for i in range(pipe.num_stages)]
        assert {name for stage in stages for name in stage.state_dict()} == set(keys)
        assert any(name == "rotary.inverse" for name, _ in stages[0].named_buffers())
        reference, x = copy.deepcopy(model), torch.randn(8, 7, WIDTH)
        results = []
        for run in (pipe, reference):
            model.zero_grad()
            torch.manual_seed(2)
            results.append(run(x))
            results[-1].square().sum().backward()
            results += [p.grad.clone() for p in (model if run is pipe else reference).parameters()]
        half = len(results) // 2
        assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


def test_evaluation_has_an_effect_on_dropout_and_batch_norm():
    model = Rotary()
    pipe = pipeline(model, (torch.randn(2, 4, WIDTH),))
    pipe(torch.randn(4, 4, WIDTH))
    pipe.eval()
    reference, before = copy.deepcopy(model).eval(), model.norm.running_mean.clone()
    x = torch.randn(1, 3, WIDTH)
    assert torch.equal(pipe(x), pipe(x))
    assert torch.equal(pipe(x), reference(x))
    assert torch.equal(model.norm.running_mean, before)


def test_the_mark_does_nothing_outside():
    pipe_split()
    x = rows(2)
    model = Layers()
    assert torch.equal(model(*x), model.four(model.three(model.two(model.one(x[0])))) - x[1])
    assert split(model, tuple(x), 2, costs="flops").num_stages == 2  # marks are pipeline()'s, not split()'s
    assert torch.equal(split(model, tuple(x), 2, costs="flops")(*x), model(*x))
