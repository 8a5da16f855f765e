"""Stages from any splitter: together they are the model, with the weights that plain construction gives."""

import copy

import pytest
import torch
from torch import nn

from torchdistpackage import PipelineStage, SplitError, create_automatic_splitter, create_manual_causal_lm_splitter
from torchdistpackage.schedule import Placement
from torchdistpackage.split.names import whole_model_names
from torchdistpackage.split.pipe import stages_in_use
from torchdistpackage.split.ties import ties_in
from torchdistpackage.trainer.stages import cut_model

PLACEMENTS = [Placement.loop(1), Placement.loop(2), Placement.v(2), Placement.loop(4)]
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Toy(nn.Module):
    """Built like Llama, with tied embeddings; runs whatever it still has."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleDict({str(number): Layer() for number in range(5)})
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 12, bias=False)
        self.register_buffer("scale", torch.rand(8), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x) if self.embed is not None else x
        for layer in self.layers.values():
            x = layer(x) * self.scale
        return self.head(self.norm(x)) if self.head is not None else x


def made(modules, stage_indices, rank, masks=None):
    mine = stage_indices[rank]
    return modules, [modules[i] for i in mine], [PipelineStage(modules[i], i, len(modules)) for i in mine], masks


def copy_and_prune(model, args, kwargs, stage_indices, train, device, rank, pp_group):
    count = sum(map(len, stage_indices))
    modules = [copy.deepcopy(model) for _ in range(count)]
    for index, part in enumerate(modules):
        for number in range(5):
            if number * count // 5 != index:
                del part.layers[str(number)]
        if index:
            part.embed = None
        if index < count - 1:
            part.norm = part.head = None
    return made(modules, stage_indices, rank, lambda **inputs: None)


def slices(model, args, kwargs, stage_indices, train, device, rank, pp_group):
    """For nn.Sequential: containers of its own around the model's layers, which get other numbers."""
    count = sum(map(len, stage_indices))
    size = len(model) // count
    modules = [nn.Sequential(*list(model)[i * size : None if i == count - 1 else (i + 1) * size]) for i in range(count)]
    return made(modules, stage_indices, rank)


def row():
    return nn.Sequential(*(module for _ in range(4) for module in (nn.Linear(6, 6), nn.BatchNorm1d(6))))


class Net(nn.Module):
    """For the tracer, with all kinds of tensors."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        self.register_buffer("shift", torch.randn(8), persistent=False)
        self.plain = torch.rand(8)

    def forward(self, x):
        for layer in self.body:
            x = layer(x).relu() * self.plain + self.shift
        return x


def llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=16, num_hidden_layers=5, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


def cut_for_all(placement, **options):
    cuts = [cut_model(placement=placement, rank=rank, seed=3, **options) for rank in range(placement.num_ranks)]
    stages = {index: stage for cut in cuts for index, stage in cut.stages.items()}
    return cuts, [stages[index] for index in range(placement.num_stages)]


def run(stages, x):
    for stage in stages:
        x = stage(x)
    return getattr(x, "logits", x)


def built(model_init):
    torch.manual_seed(3)
    return model_init()


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize(
    ("model_init", "splitter", "example"),
    [
        (Toy, copy_and_prune, IDS),
        (row, slices, torch.ones(3, 6)),
        (row, None, torch.ones(3, 6)),
        (Net, None, torch.ones(3, 8)),
        (lambda: llama(tie_word_embeddings=True), None, IDS),
    ],
    ids=["copies", "slices", "default row", "default net", "default llama"],
)
def test_the_stages_together_are_the_plain_model(placement, model_init, splitter, example):
    plain = built(model_init)
    end = torch.get_rng_state()
    cuts, stages = cut_for_all(placement, model_init=model_init, splitter=splitter, example_args=(example,))
    assert torch.equal(torch.get_rng_state(), end)
    assert torch.equal(run(stages, example), getattr(plain(example), "logits", plain(example)))
    expected = dict(plain.named_parameters())
    found = {name: parameter for cut in cuts for name, parameter in cut.names.items()}
    assert {name: tuple(p.shape) for name, p in found.items()} == {n: tuple(p.shape) for n, p in expected.items()}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(cut.num_parameters == sum(p.numel() for p in expected.values()) for cut in cuts)


def test_the_manual_splitter():
    splitter = create_manual_causal_lm_splitter(input_weight=2)
    cuts, stages = cut_for_all(Placement.v(2), model_init=llama, splitter=splitter, example_args=(IDS,))
    assert torch.equal(run(stages, IDS), built(llama)(IDS).logits)
    assert cuts[0].mask_creator(attention_mask=3) == 3


def test_the_automatic_splitter():
    splitter = create_automatic_splitter({"body.2": "beginning", "body.4": "beginning"})
    _, stages = cut_for_all(Placement.loop(3), model_init=Net, splitter=splitter, example_args=(torch.ones(3, 8),))
    assert torch.equal(run(stages, torch.ones(3, 8)), built(Net)(torch.ones(3, 8)))


def test_a_shared_parameter_is_one_on_a_rank_and_known_to_be_shared_across_ranks():
    cuts, stages = cut_for_all(Placement.v(2), model_init=Toy, splitter=copy_and_prune, example_args=(IDS,))
    assert cuts[0].stages[0].embed.weight is cuts[0].stages[3].head.weight
    cuts, stages = cut_for_all(Placement.loop(2), model_init=Toy, splitter=copy_and_prune, example_args=(IDS,))
    ties = [ties_in(stages[0])["embed.weight"], ties_in(stages[1])["head.weight"]]
    assert [(tie.name, tie.stages) for tie in ties] == [("embed.weight", (0, 1))] * 2
    assert {id(stage) for stage in stages} <= {id(stage.module) for stage in stages_in_use()}


def test_stages_have_the_names_of_the_whole_model():
    _, stages = cut_for_all(Placement.loop(2), model_init=row, splitter=slices, example_args=(torch.ones(3, 6),))
    assert whole_model_names(stages[1])["1.running_mean"] == "5.running_mean"


def test_a_model_with_weights_is_cut_as_it_is():
    model = Toy().eval()
    cuts, stages = cut_for_all(Placement.loop(2), model=model, splitter=copy_and_prune, example_args=(IDS,))
    assert torch.equal(run(stages, IDS), model(IDS))
    assert not stages[0].training
    assert cuts[1].mask_creator is not None


def test_built_on_the_cpu_it_is_the_same():
    meta, cpu = (
        cut_model(model_init=Net, placement=Placement.loop(2), rank=1, seed=3, example_args=(torch.ones(3, 8),),
                  construct_on=place)
        for place in ("meta", "cpu")
    )  # fmt: skip
    assert all(torch.equal(meta.names[name], cpu.names[name]) for name in cpu.names)
    assert not meta.is_causal_lm


def test_a_language_model_says_so():
    cut = cut_model(model_init=llama, placement=Placement.loop(2), rank=0, example_args=(IDS,))
    assert cut.is_causal_lm
    assert cut.config.num_hidden_layers == 5


def drop(modules, *rest):
    del modules[1].layers["4"]
    return modules, *rest


def strange(modules, *rest):
    modules[1].extra = nn.Linear(2, 2)
    return modules, *rest


def other_shape(modules, *rest):
    modules[1].layers["4"].up = nn.Linear(8, 4)
    return modules, *rest


class Bare:
    submod = None


WRONG = {
    "must return four values": lambda *made: made[:3],
    "returned a Toy; it must return four": lambda *made: made[1][0],
    "returned 1 modules of all stages, not 2": lambda all_, *rest: (all_[:1], *rest),
    "returned 2 modules of this rank, not 1": lambda all_, mine, *rest: (all_, all_, *rest),
    "returned 0 stages of this rank, not 1": lambda all_, mine, stages, mask: (all_, mine, [], mask),
    "all modules must be torch.nn.Modules; number 1 is a str": lambda all_, *rest: ([all_[0], "x"], *rest),
    "is not the object that is stage 1 of all": lambda all_, mine, *rest: (all_, [copy.deepcopy(mine[0])], *rest),
    "in order: 0 where 1 belongs": lambda all_, mine, s, m: (all_, mine, [PipelineStage(mine[0], 0, 2)], m),
    "the Bare for stage 1 has no stage_index": lambda all_, mine, s, m: (all_, mine, [Bare()], m),
    "the submod of stage 1 is not": lambda all_, mine, s, m: (all_, mine, [PipelineStage(all_[0], 1, 2)], m),
    "one module for several stages": lambda all_, mine, s, m: ([mine[0]] * 2, mine, s, m),
    "called, or None; got 3": lambda all_, mine, stages, mask: (all_, mine, stages, 3),
    "put layers.4.norm.weight, .* on no stage": drop,
    "stage 1 has a parameter 'extra.weight' that the model does not": strange,
    "layers.4.up.weight is \\(4, 8\\) torch.float32, and \\(16, 8\\)": other_shape,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_splitter_returns_is_checked(message):
    def wrong(*args, **kwargs):
        return WRONG[message](*copy_and_prune(*args, **kwargs))

    with pytest.raises(SplitError, match=message):
        cut_model(model_init=Toy, splitter=wrong, placement=Placement.loop(2), rank=1, example_args=(IDS,))


def test_a_splitters_own_exception_keeps_its_type():
    def broken(*args, **kwargs):
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        cut_model(model_init=Toy, splitter=broken, placement=Placement.loop(2), rank=1)
    if hasattr(caught.value, "add_note"):  # Python 3.11
        assert "broken for rank 1, while it cut Toy into 2 stages, [[0], [1]]" in "".join(caught.value.__notes__)


def test_clear_errors():
    placement = Placement.loop(2)
    for given, message in (
        ({}, "neither was given"),
        ({"model": Toy(), "model_init": Toy}, "both was given"),
        ({"model": nn.Linear(2, 2, device="meta")}, r"on the meta device \(weight and 1 more\)"),
        ({"model_init": Toy()}, "a model that exists is passed as model="),
        ({"model_init": Toy, "construct_on": "disk"}, "construct_on='disk'"),
        ({"model_init": Toy, "balance": "time"}, "balances 'parameters' or 'flops'"),
        ({"model_init": lambda: nn.Linear(2, 2)}, "give.* without a splitter, and cannot be cut into 2 stages"),
    ):
        with pytest.raises(SplitError, match=message):
            cut_model(**given, placement=placement, rank=0, example_args=(torch.ones(1, 2),))


class Choosing(nn.Module):
    """Its forward can be traced only where its buffer has values: the shapes depend on them."""

    def __init__(self):
        super().__init__()
        self.body, self.end = nn.Linear(4, 4), nn.Linear(2, 4)
        self.register_buffer("kept", torch.arange(4) > 1)

    def forward(self, x):
        return self.end(self.body(x)[:, self.kept])


def test_what_cannot_be_traced_without_weights_is_traced_with_them():
    example = torch.ones(2, 4)
    _, stages = cut_for_all(Placement.loop(2), model_init=Choosing, example_args=(example,))
    assert torch.equal(run(stages, example), built(Choosing)(example))


def test_a_splitter_that_gives_memory_is_told():
    def filling(model, args, kwargs, stage_indices, train, device, rank, pp_group):
        parts = [part.to_empty(device="cpu") for part in (model[:1], model[1:])]
        mine = [parts[index] for index in stage_indices[rank]]
        return parts, mine, [PipelineStage(parts[i], i, 2) for i in stage_indices[rank]], None

    with pytest.raises(SplitError, match=r"gave memory to 0.weight and \d more"):
        cut_model(
            model_init=lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            splitter=filling,
            placement=Placement.loop(2),
            rank=0,
        )


def test_a_splitter_that_is_no_function_is_refused():
    with pytest.raises(SplitError, match="model_splitter must be a function, got int"):
        cut_model(model=nn.Linear(2, 2), splitter=5, placement=Placement.loop(1), rank=0)
