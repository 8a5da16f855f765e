"""Any model, cut in any way: what each splitter cuts trains to one curve, and what is saved loads elsewhere."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.distributed_harness import run_distributed
from tests.trainer_runs import Pictures, Rows, losses_of, make_trainer, tiny_llama, token_loss, trained
from torchdistpackage.errors import SplitError
from torchdistpackage.split import PipelineStage, create_automatic_splitter, create_manual_causal_lm_splitter

STEPS = {"max_steps": 4}


class Decoder(nn.Module):
    """A language model of the user's: dropout, a frozen part, a shared embedding."""

    def __init__(self, frozen: tuple[str, ...] = (), dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Dropout(dropout)) for _ in range(4))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen) if frozen else True)

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


class Part(nn.Module):
    """A stage of a `Decoder`, cut by hand."""

    def __init__(self, model, layers, first, last):
        super().__init__()
        self.embed = model.embed if first else None
        self.layers = nn.ModuleList(layers)
        self.head = model.head if last else None

    def forward(self, hidden):
        hidden = hidden if self.embed is None else self.embed(hidden)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden if self.head is None else self.head(hidden)


def by_hand(model, example_args, example_kwargs, stage_indices, train, device, rank, pp_group):
    """The signature of the interface, and four values."""
    count = sum(map(len, stage_indices))
    size = len(model.layers) // count
    every = [Part(model, model.layers[at * size : at * size + size], at == 0, at == count - 1) for at in range(count)]
    mine = [every[at] for at in stage_indices[rank]]
    stages = [PipelineStage(every[at], at, count, device, pp_group) for at in stage_indices[rank]]
    return every, mine, stages, None


def copying(model, *args, **kwargs):
    """The same, of deep copies."""
    return by_hand(copy.deepcopy(model), *args, **kwargs)


def three_values(*args, **kwargs):
    return by_hand(*args, **kwargs)[:3]


def one_too_few(*args, **kwargs):
    every, mine, stages, masks = by_hand(*args, **kwargs)
    return every[:-1], mine, stages, masks


def loses_a_layer(model, *args, **kwargs):
    every, mine, stages, masks = by_hand(model, *args, **kwargs)
    every[0].layers = nn.ModuleList(list(every[0].layers)[:-1])
    return every, mine, stages, masks


def splitters(rank, world, output):
    """Curves of one model under several splitters, and what is said of wrong ones."""
    llama = {"compute_loss_func": token_loss, **STEPS}
    own = {"model_init": Decoder, **llama}
    good = [
        {**own, "model_splitter": by_hand},
        {**own, "model_splitter": copying},
        {**own, "model_splitter": by_hand, "stages_per_rank": 2},
        {**own, "model_splitter": create_automatic_splitter({"layers.2": "beginning"})},
        own,
        {**own, "model_init": None, "model": seeded(Decoder)},
    ]
    language = [llama, {**llama, "model_splitter": create_manual_causal_lm_splitter(input_weight=2)}]
    said = []
    for wrong in (three_values, one_too_few, loses_a_layer):
        with pytest.raises(SplitError) as caught:
            make_trainer(output, **own, model_splitter=wrong)
        said.append(str(caught.value))
    found = [[losses_of(trained(output, **clean(run))) for run in runs] for runs in (good, language)]
    return *found, said


def clean(run):
    return {name: value for name, value in run.items() if value is not None}


def seeded(make):
    torch.manual_seed(42)
    return make().eval()


def plain(make, steps=4, loss=token_loss, rows=None, max_norm=1.0):
    """A plain loop over the first rows, in their order."""
    torch.manual_seed(42)
    model, losses = make(), []
    optimizer = torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=1e-2, weight_decay=0.0
    )
    for step, (inputs, labels) in enumerate(rows):
        optimizer.param_groups[0]["lr"] = 1e-2 * (steps - step) / steps
        optimizer.zero_grad()
        value = loss(model(inputs), labels)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.timeout(100)
def test_every_splitter_trains_and_wrong_ones_are_told(tmp_path):
    pytest.importorskip("transformers")
    for own, language, said in run_distributed(splitters, 2, str(tmp_path), timeout=90):
        for curve in own[1:]:
            torch.testing.assert_close(curve, own[0], rtol=0, atol=2e-6)
        assert language[0] == language[1]
        assert "must return four values" in said[0]
        assert "1 modules of all stages, not 2" in said[1]
        assert "layers.1.0.weight" in said[2]


def batches(count, rows=8):
    every = [Rows()[index] for index in range(count * rows)]
    return [
        (torch.stack([each["input_ids"] for each in every[at : at + rows]]),
         torch.stack([each["labels"] for each in every[at : at + rows]]))
        for at in range(0, count * rows, rows)
    ]  # fmt: skip


def frozen_and_dropping(rank, world, output, options):
    loader = torch.utils.data.DataLoader(Rows(32), 8)
    common = {"compute_loss_func": token_loss, "train_dataset": loader, **STEPS, **options}
    cases = [partial(Decoder, frozen=("embed",)), partial(Decoder, frozen=("layers.0", "layers.1"))]
    cases += [partial(Decoder, frozen=("embed", "layers.0", "layers.1"))]
    found = [(losses_of(trained(output, **common, model_init=case)), plain(case, rows=batches(4))) for case in cases]
    drops = partial(Decoder, dropout=0.3)
    one = {**common, "n_microbatches": 1, "max_grad_norm": None}
    return found, (losses_of(trained(output, **one, model_init=drops)), plain(drops, rows=batches(4), max_norm=1e9))


@pytest.mark.slow
@pytest.mark.timeout(140)
def test_frozen_parameters_stay_and_dropout_has_the_bits_of_the_plain_loop(tmp_path):
    one = run_distributed(frozen_and_dropping, 1, str(tmp_path), {}, timeout=60)
    assert one[0][1][0] == one[0][1][1]
    for cases, _ in one + run_distributed(frozen_and_dropping, 2, str(tmp_path), {}, timeout=70):
        for found, wanted in cases:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def pictures(rank, world, output):
    """A net with buffers and a transformer of timm: curves, metrics, and files."""
    import timm
    from safetensors.torch import load_file

    vit = partial(
        timm.create_model, "vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=5, depth=4, embed_dim=24
    )
    common = {"train_dataset": torch.utils.data.DataLoader(Pictures(), 8), "max_steps": 3, "eval_dataset": Pictures(7)}
    kinds = [nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=torch.arange(1.0, 6.0)), None]
    found = [losses_of(trained(output, **common, model_init=vit, compute_loss_func=kind)) for kind in kinds]
    common |= {"n_microbatches": 1, "compute_metrics": lambda each: {"rows": len(each.predictions.argmax(1))}}
    trainer = trained(output, **common, model_init=convolutions)
    metrics = trainer.evaluate()
    trainer.save_model(f"{output}/files")
    torch.distributed.barrier()
    model = convolutions()
    files = sorted(Path(output, "files").glob("*.safetensors"))
    model.load_state_dict({name: tensor for file in files for name, tensor in load_file(file).items()})
    with torch.no_grad():
        rows = [Pictures()[index] for index in range(7)]
        logits = model.eval()(torch.stack([picture for picture, _ in rows]))
        loss = functional.cross_entropy(logits, torch.tensor([label for _, label in rows]))
    return found, losses_of(trainer), metrics["eval_loss"] - float(loss), metrics["eval_rows"]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_pictures_train_as_in_one_process(tmp_path):
    pytest.importorskip("timm")
    [one] = run_distributed(pictures, 1, str(tmp_path / "1"), timeout=70)
    for found in run_distributed(pictures, 2, str(tmp_path / "2"), timeout=70):
        for mine, wanted in zip([*found[0], found[1]], [*one[0], one[1]], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-5)
        assert abs(found[2]) < 1e-6
        assert found[3] == 7


def saved(rank, world, output, layouts):
    """The logits that Hugging Face computes of what was saved, and the loss that the trainer finds."""
    from transformers import AutoModelForCausalLM

    differences = []
    for number, layout in enumerate(layouts):
        trainer = trained(output, **layout, max_steps=2, eval_dataset=Rows(5), model_init=tiny_llama)
        mine = trainer.evaluate()["eval_loss"]
        trainer.save_model(f"{output}/{number}")
        torch.distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(f"{output}/{number}")
        rows = [Rows()[index] for index in range(5)]
        with torch.no_grad():
            logits = model(torch.stack([row["input_ids"] for row in rows])).logits
        differences.append(mine - float(token_loss(logits, torch.stack([row["labels"] for row in rows]))))
    return differences


@pytest.mark.slow
@pytest.mark.timeout(80)
def test_what_is_saved_is_what_was_trained(tmp_path):
    pytest.importorskip("transformers")
    layouts = [{}, {"schedule": "zb-v"}, {"data_parallel_size": 2, "data_parallel": "fsdp2"}]
    for differences in run_distributed(saved, 2, str(tmp_path), layouts, timeout=70):
        assert max(map(abs, differences)) < 1e-6
