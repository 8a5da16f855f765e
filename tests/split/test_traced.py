"""Any model, cut by tracing: the same numbers, names and modes as the whole model."""

import copy
import gc
import pickle
import weakref
from itertools import pairwise

import pytest
import torch
import torch.utils.checkpoint
import traced_models as models
from torch import nn
from torch.utils._pytree import tree_leaves
from traced_comparison import assert_same

from torchdistpackage.errors import SplitError
from torchdistpackage.split import SplitPoint, pipe_split, pipeline, split

EXAMPLES = {
    "Blocks": lambda n: (torch.randn(n, 6),),
    "UNet": lambda n: (torch.randn(n, 6),),
    "TwoTowers": lambda n: (torch.randn(n, 4), torch.arange(5 * n).view(n, 5) % 11),
    "TiedHead": lambda n: (torch.arange(5 * n).view(n, 5) % 11,),
    "MixtureOfExperts": lambda n: (torch.randn(n, 6),),
    "Marked": lambda n: (torch.randn(n, 6),),
    "InPlace": lambda n: (torch.randn(n, 6),),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_stages_are_the_model(name, num_stages):
    torch.manual_seed(0)
    model = getattr(models, name)()
    pipe = split(model, EXAMPLES[name](4), num_stages, costs="flops")
    assert pipe.num_stages == num_stages
    for rows in (4, 1, 7):
        assert_same(model, pipe, *EXAMPLES[name](rows))
    keys = [key for i in range(num_stages) for key in pipe.get_stage_module(i).state_dict()]
    assert set(keys) == set(model.state_dict())


@pytest.mark.parametrize("point", range(1, 12))
@pytest.mark.parametrize("other", [12, 4])
def test_every_cut_of_in_place_operations_is_right_or_refused(point, other):
    torch.manual_seed(0)
    model, x = models.InPlace(), torch.randn(3, 6)
    count = sum(len(row.layers) for row in split(model, x, 1, costs="flops").report.rows)
    points = sorted({min(point, count - 1), other} & set(range(1, count)))
    sizes = [b - a for a, b in pairwise([0, *points, count])]
    assert_same(model, split(model, x, len(sizes), sizes=sizes), x)


def test_keywords_and_dataclasses():
    model = models.Structured()
    pipe = split(model, torch.randn(2, 6), 3, {"mask": torch.rand(2, 6), "scale": 2.0}, costs="flops")
    assert_same(model, pipe, torch.randn(5, 6), mask=torch.rand(5, 6), scale=2.0)
    with pytest.raises(SplitError, match=r"2\.0.*3\.0|3\.0.*2\.0"):
        pipe(torch.randn(5, 6), mask=torch.rand(5, 6), scale=3.0)
    with pytest.raises(SplitError, match="first stage"):
        pipe(torch.randn(5, 6))


def test_marks_at_any_depth():
    model = models.Marked()
    pipe = pipeline(model, (torch.randn(2, 6),))
    names = [set(pipe.get_stage_module(i).state_dict()) for i in range(pipe.num_stages)]
    assert [{name.rpartition(".")[0] for name in stage} for stage in names] == [
        {"first", "inner.a"},
        {"inner.b"},
        {"last"},
    ]
    assert_same(model, pipe, torch.randn(3, 6))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"stem": "BEGINNING"}, 1),
        ({"stem": "END"}, 2),
        ({"stem": "END", "blocks.0": "BEGINNING"}, 2),
        ({"blocks.1": "BEGINNING", "head": "END"}, 2),
        ({"blocks.1.norm": "END", "head": "BEGINNING"}, 3),
    ],
)
def test_stages_are_numbered_without_gaps(spec, expected):
    model = models.Blocks()
    pipe = pipeline(model, (torch.randn(2, 6),), split_spec={k: SplitPoint[v] for k, v in spec.items()})
    assert pipe.num_stages == expected
    assert all(list(pipe.get_stage_module(i).parameters()) for i in range(expected))
    assert_same(model, pipe, torch.randn(3, 6))


def test_a_policy_puts_the_marks():
    def after_every_block(graph_module):
        for node in graph_module.graph.nodes:
            if str(node.target).startswith("blocks"):
                with graph_module.graph.inserting_after(node):
                    graph_module.graph.call_function(pipe_split)
        return graph_module

    model = models.Blocks()
    pipe = pipeline(model, (torch.randn(2, 6),), split_policy=after_every_block)
    assert pipe.num_stages == 5
    assert_same(model, pipe, torch.randn(3, 6))
    with pytest.raises(ValueError, match="not both"):
        pipeline(model, (torch.randn(2, 6),), split_spec={}, split_policy=after_every_block)


class Modes(nn.Module):
    """Training and evaluation differ in the forward itself."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.auxiliary = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x = nn.functional.dropout(self.norm(self.a(x)), 0.5, self.training)
        extra = self.auxiliary(x) if self.training else None
        x = self.b(x)
        return (x, extra) if self.training else x


@pytest.mark.parametrize("training", [True, False])
def test_both_modes_work_whatever_mode_it_was_split_in(training):
    torch.manual_seed(0)
    model = Modes().train(training)
    pipe = split(model, torch.randn(4, 6), 2, costs="flops")
    assert model.training is training
    assert all(module.training is training for module in pipe.get_stage_module(0).modules())
    reference = copy.deepcopy(model)
    for mode in (True, False, True):
        pipe.train(mode), reference.train(mode)
        x, outputs = torch.randn(5, 6), []
        for run in (pipe, reference):
            torch.manual_seed(3)
            outputs.append(tree_leaves(run(x)))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert torch.equal(model.norm.running_mean, reference.norm.running_mean)


class NoGrad(nn.Module):
    """Blocks without gradients inside of submodules, as rotary embeddings have them."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.register_buffer("table", torch.arange(6.0), persistent=False)

        def forward(self, x):
            with torch.no_grad():
                angles = torch.outer(x.mean(1), self.table)
                turned = self.linear(x).cos()
            return self.linear(x) * angles.cos() + turned

    def __init__(self):
        super().__init__()
        self.inner, self.last = self.Inner(), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.inner(x))


@pytest.mark.parametrize("opened", [(), ("inner",)])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_blocks_without_gradients(opened, num_stages):
    model = NoGrad()
    pipe = split(model, torch.randn(2, 6), num_stages, costs="flops", open_modules=opened)
    assert_same(model, pipe, torch.randn(3, 6))
    names = {name for i in range(num_stages) for name in pipe.get_stage_module(i).state_dict()}
    assert names == set(model.state_dict())  # the table is not persistent, and stays so
    assert any("table" in name for name, _ in pipe.get_stage_module(0).named_buffers())


class Python(nn.Module):
    """Python that looks at sizes, types and structures."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = torch.linspace(0, 1, 6)  # neither parameter nor buffer

    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        rows, columns = x.shape
        x = self.a(x) + self.table + torch.arange(columns, device=x.device, dtype=x.dtype)
        pieces = x.chunk(2, dim=1)
        x = torch.cat([piece * (i + 1) for i, piece in enumerate(pieces)], dim=1)
        if columns % 4:
            x = x + len(pieces) + torch.zeros(rows, 1)
        x[:, 0] = 0.5
        x += torch.ones_like(x)
        return {"out": self.b(x).view(rows, -1), "rows": x.size(0)}


def test_python_that_looks_at_sizes():
    model = Python()
    pipe = split(model, torch.randn(2, 6), 2, costs="flops")
    assert_same(model, pipe, torch.randn(5, 6))
    pipe = split(Wide(), torch.randn(2, 6), 1, costs="flops")
    x = torch.randn(2, 7)
    assert torch.equal(pipe(x), x)
    with pytest.raises(SplitError, match=r"test_traced.py:\d+ gives False, and it gives True"):
        pipe(torch.randn(2, 9))


class Wide(nn.Module):
    def forward(self, x):
        return x[:, :8] if x.shape[1] > 8 else x


class Data(nn.Module):
    """Looks at the numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 0:
            x = x * 2
        return self.b(x)


def test_control_flow_on_numbers_is_refused_in_words():
    with pytest.raises(SplitError, match=r"forward of Data.*test_traced.py:\d+.*leaf_modules.*flatten_model"):
        split(Data(), torch.randn(2, 6), 2, costs="flops")
    model = nn.Sequential(nn.Linear(6, 6), Data(), nn.Linear(6, 6))  # inside of a whole module it does not matter
    assert_same(model, split(model, torch.randn(2, 6), 3, costs="flops"), torch.randn(3, 6))


def test_the_model_is_left_alone_and_can_be_split_again():
    model = models.Blocks()
    keys, attributes = list(model.state_dict()), set(vars(model))
    for stages in (2, 3, 2):
        pipe = split(model, torch.randn(2, 6), stages, costs="flops")
        assert_same(model, pipe, torch.randn(3, 6))
    assert list(model.state_dict()) == keys
    assert {name for name in vars(model) if not name.startswith("_torchdistpackage")} == attributes
    assert not any(tensor.grad_fn for tensor in model.parameters())


def test_a_stage_holds_nothing_of_the_others():
    model = models.TiedHead()
    pipe = split(model, torch.arange(10).view(2, 5), 3, costs="flops")
    stage = pipe.get_stage_module(0)
    mine = {id(parameter) for parameter in stage.parameters()}
    others = [weakref.ref(parameter) for parameter in model.parameters() if id(parameter) not in mine]
    del model, pipe
    gc.collect()
    assert others
    assert not any(other() is not None for other in others)


def test_torch_is_left_alone():
    before = {name: getattr(torch, name) for name in ("zeros", "rand", "arange", "tensor")}
    apply = vars(torch.autograd.Function)["apply"]
    split(models.UNet(), torch.randn(2, 6), 2, costs="flops")
    with pytest.raises(SplitError):
        split(Data(), torch.randn(2, 6), 2, costs="flops")
    assert all(getattr(torch, name) is function for name, function in before.items())
    assert vars(torch.autograd.Function)["apply"] is apply


def test_types_names_and_hooks_stay():
    model, called = models.Blocks(), []
    model.blocks[2].register_forward_hook(lambda *_: called.append(1))
    pipe = split(model, torch.randn(2, 6), 2, costs="flops")
    called.clear()
    pipe(torch.randn(2, 6))
    assert called == [1]
    assert any(module is model.blocks[2] for module in pipe.get_stage_module(1).modules())


def test_a_stage_can_be_copied_and_pickled():
    model, x = models.UNet(), torch.randn(2, 6)
    pipe = split(model, x, 3, costs="flops")
    stage = pipe.get_stage_module(0)
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        mine, theirs = stage(x), other(x)
        assert all(
            torch.equal(a, b) for t in mine.values for a, b in zip(mine.values[t], theirs.values[t], strict=True)
        )
        assert list(other.state_dict()) == list(stage.state_dict())


def test_unused_parameters_go_nowhere_and_shared_ones_everywhere():
    model = models.TiedHead()
    model.unused = nn.Linear(3, 3)
    pipe = split(model, torch.arange(10).view(2, 5), 2, costs="flops")
    assert pipe.replicated_params == [{0: "embedding.weight", 1: "head.weight"}]
    assert not any("unused" in key for i in range(2) for key in pipe.get_stage_module(i).state_dict())


class Aliases(nn.Module):
    """One module under two names, one parameter under two names, a list that a module writes into."""

    class Writer(nn.Module):
        def forward(self, values):
            values[0] = values[0] * 2
            return values[0] + values[1]

    def __init__(self):
        super().__init__()
        self.a, self.writer = nn.Linear(6, 6), self.Writer()
        self.blocks = nn.ModuleList([nn.Sequential(self.a, nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.ReLU())])
        self.shift = nn.Parameter(torch.ones(6))
        self.other = self.shift

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + self.other
        return self.writer([x, x + 1])


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_aliases(num_stages):
    model = Aliases()
    pipe = split(model, torch.randn(2, 6), num_stages, costs="flops")
    assert_same(model, pipe, torch.randn(3, 6))
    assert {key for i in range(num_stages) for key in pipe.get_stage_module(i).state_dict()} == set(model.state_dict())


def test_a_wrong_number_of_values_is_said():
    pipe = split(models.UNet(), torch.randn(2, 6), 2, costs="flops")
    with pytest.raises(SplitError, match=r"stage 1 of 2 takes \d value.*of stage 0.*got 1"):
        pipe.get_stage_module(1)(torch.randn(2, 6))
    with pytest.raises(SplitError, match="there is no stage 2"):
        pipe.get_stage_module(2)
