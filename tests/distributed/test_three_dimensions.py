"""Data x pipeline x tensor parallelism at once: the plain loop's gradients, norm and weights on eight processes."""

import copy

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import fully_shards, start
from language_models import language_model, padded
from torch import nn
from torch.distributed.fsdp import fully_shard

from torchdistpackage import (
    Bf16ZeroOptimizer,
    NaiveDDP,
    SplitError,
    apply_tensor_parallel,
    clip_grad_norm_,
    forward_backward,
    generate,
    local_stages,
    partition_causal_lm,
    save_causal_lm,
    split_model,
    tpc,
)
from torchdistpackage.schedule import describe

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")
GRID = [("data", 2), ("pipe", 2), ("tensor", 2)]
cross_entropy = nn.functional.cross_entropy


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def vision_transformer():
    kind = timm.models.vision_transformer.VisionTransformer
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 4, "num_classes": 5}
    return kind(**options, qk_norm=True, init_values=0.1).double()


def vision(schedule):
    """A vision transformer of timm, its stages, its batch for all replicas, and the loss of its output."""
    model = vision_transformer()
    images, labels = torch.randn(6, 3, 16, 16).double(), torch.randint(5, (6,))
    count = 2 * describe(schedule).chunks
    pipe = split_model(copy.deepcopy(model), images[:2], num_stages=count, costs="parameters")
    return model, local_stages(pipe, schedule), (images,), labels, cross_entropy


def language(schedule):
    model = language_model("Llama", layers=4).double().train()
    ids, mask = padded(rows=6)
    parts = partition_causal_lm(copy.deepcopy(model), schedule)
    return model, parts, (ids, mask), ids, lambda logits, target: cross_entropy(logits.flatten(0, 1), target.flatten())


def step(stages, inputs, labels, loss, schedule):
    """One step of this replica; a mask, which every stage takes, comes second."""
    last = 2 * describe(schedule).chunks - 1

    def run(index, stage):
        def forward(x):
            given = list(x) if isinstance(x, (list, tuple)) else [x]
            target = given.pop() if index == last else None
            output = stage(given[0], attention_mask=given[1]) if len(inputs) == 2 else stage(*given)
            return output if target is None else loss(output, target)

        return forward

    own = [[*inputs[index > 0 :], *([labels] if index == last else [])] or None for index in stages]
    functions = [run(index, stage) for index, stage in stages.items()]
    return forward_backward(None, functions, None, own, 2, schedule=schedule, broadcast_loss=True)


def train(rank, world, build, schedule, data_parallel):
    start(2, config=GRID)
    model, stages, inputs, labels, loss = build(schedule)
    for stage in stages.values():
        apply_tensor_parallel(stage)
    wrapped = {index: data_parallel(stage) for index, stage in stages.items()}
    parameters = [p for stage in wrapped.values() for p in stage.parameters()]
    optimizers = torch.optim.AdamW(parameters, lr=0.01), torch.optim.AdamW(model.parameters(), lr=0.01)
    replica = slice(3 * tpc.get_dp_rank(), 3 * tpc.get_dp_rank() + 3)
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(wrapped, tuple(x[replica] for x in inputs), labels[replica], loss, schedule)
        output = model(inputs[0]) if len(inputs) == 1 else model(inputs[0], attention_mask=inputs[1]).logits
        loss(output, labels).backward()
        wanted = dict(model.named_parameters())
        for stage in stages.values():
            for name, parameter in stage.named_parameters():
                torch.testing.assert_close(whole(parameter.grad), wanted[name].grad, msg=lambda t, n=name: f"{n}: {t}")
        norms = clip_grad_norm_(parameters, 0.1), nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(norms[0], norms[1])
        for optimizer in optimizers:
            optimizer.step()
    for stage in stages.values():
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(whole(parameter), wanted[name], msg=lambda t, n=name: f"{n}: {t}")
    return sum(hasattr(p, "full_tensor") for p in parameters)


def naive(stage):
    return NaiveDDP(stage)


def sharded(stage):
    return fully_shard(stage, mesh=tpc.mesh["data"])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved-1f1b", "zb-v"])
@pytest.mark.parametrize("build", [vision, language])
def test_eight_processes_train_as_the_plain_loop(build, schedule):
    assert min(run_distributed(train, 8, build, schedule, naive, timeout=150)) > 0


@fully_shards
def test_fully_sharded_stages_in_three_dimensions():
    assert min(run_distributed(train, 8, language, "1f1b", sharded, timeout=150)) > 0


def fused_and_fully_sharded(rank, world):
    start(1, config=[("data", 2), ("tensor", 2)])
    stage = sharded(apply_tensor_parallel(vision_transformer()))
    with pytest.raises(SplitError, match=r"blocks.0.attn.qkv.weight .* Use NaiveDDP or Bf16ZeroOptimizer"):
        forward_backward(None, lambda x: stage(x).mean(), None, torch.randn(2, 3, 16, 16).double(), 2)
    with pytest.raises(SplitError, match="cuts blocks.0.attn.qkv.weight along"):
        stage.state_dict()


def test_fused_layers_refuse_a_second_cut_that_torch_cannot_name():
    run_distributed(fused_and_fully_sharded, 4)


def train_sharded_optimizer(rank, world, build, schedule):
    start(2, config=GRID)
    model, stages, inputs, labels, loss = build(schedule)
    parameters = [p for stage in stages.values() for p in apply_tensor_parallel(stage).parameters()]
    optimizers = (
        Bf16ZeroOptimizer(torch.optim.AdamW(parameters, lr=0.01)),
        torch.optim.AdamW(model.parameters(), lr=0.01),
    )
    replica = slice(3 * tpc.get_dp_rank(), 3 * tpc.get_dp_rank() + 3)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        step(stages, tuple(x[replica] for x in inputs), labels[replica], loss, schedule)
        output = model(inputs[0]) if len(inputs) == 1 else model(inputs[0], attention_mask=inputs[1]).logits
        loss(output, labels).backward()
        norms = clip_grad_norm_(parameters, 0.1), nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch.testing.assert_close(norms[0], norms[1])
        for optimizer in optimizers:
            optimizer.step()
    wanted = dict(model.named_parameters())
    for stage in stages.values():
        for name, parameter in stage.named_parameters():
            torch.testing.assert_close(whole(parameter), wanted[name], msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("build", [vision, language])
def test_a_sharded_optimizer_in_three_dimensions(build):
    run_distributed(train_sharded_optimizer, 8, build, "zb-v", timeout=150)


def write_and_save(rank, world, folder):
    from transformers import AutoModelForCausalLM

    start(2, config=[("pipe", 2), ("tensor", 2)])
    model, (ids, mask) = language_model("Gemma", layers=4), padded(tokens=9)
    parts = partition_causal_lm(copy.deepcopy(model), "1f1b")
    for part in parts.values():
        apply_tensor_parallel(part)
    options = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    text = generate(parts, ids, attention_mask=mask, **options)
    assert torch.equal(text, model.generate(ids, attention_mask=mask, **options))
    save_causal_lm(parts, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_sharded_stages_write_text_and_files_of_the_whole_model(tmp_path):
    run_distributed(write_and_save, 4, str(tmp_path / "saved"), timeout=90)
