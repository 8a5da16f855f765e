"""The three snippets that users of the original write, as they stand there, device calls apart."""

import copy

import pytest
import torch
import torch.distributed as dist
import torchvision
from distributed_harness import run_distributed
from timm.utils import accuracy
from torch import nn

from torchdistpackage import DDP, setup_distributed, tpc
from torchdistpackage.parallel import flatten_model, partition_uniform
from torchdistpackage.parallel.clip_grad_parallel import clip_grad_norm_
from torchdistpackage.parallel.pipeline_sched import forward_backward

layer_list = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool"]
layer_list = [*layer_list, lambda x: torch.flatten(x, 1), "fc"]


def snippets(rank, world, rows, custom_backward):
    setup_distributed(backend="gloo")
    tpc.setup_process_groups([("data", 2), ("pipe", 2)])
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double()
    reference = copy.deepcopy(model)

    # partition
    flat_model = flatten_model(model, layer_list, return_list=True)
    md_list = partition_uniform(flat_model)
    model = torch.nn.Sequential(*md_list)
    model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    criterion = nn.CrossEntropyLoss()
    max_norm = 0.5
    batches = [(torch.randn(2, n, 3, 64, 64).double(), torch.randint(0, 10, (2, n))) for n in rows]

    # train
    for all_samples, all_targets in batches:
        samples, targets = (t[tpc.get_dp_rank()].clone() for t in (all_samples, all_targets))
        dist.broadcast(samples, tpc.get_ranks_in_group("pipe")[0], tpc.get_group("pipe"))
        dist.broadcast(targets, tpc.get_ranks_in_group("pipe")[0], tpc.get_group("pipe"))
        inputs = []
        if tpc.is_first_in_pipeline_group():
            inputs.append(samples)
        else:
            inputs.append(targets)

        def bwd_fn(output_obj, output_obj_grad):
            if output_obj_grad is None:
                output_obj.backward()
            else:
                output_obj.backward(output_obj_grad)

        def fwd_fn(inputs):
            if tpc.is_first_in_pipeline_group():
                out = model(inputs)
                return out
            out = model(inputs[0])
            loss = criterion(out, inputs[1])
            return loss

        forward_backward(
            optimizer,
            fwd_fn,
            bwd_fn if custom_backward else None,
            inputs,
            num_microbatches=4,
            forward_only=False,
            dtype=torch.double,
            scatter_gather_tensors=False,
        )
        expect_full_batch_gradients(reference, model.module, all_samples, all_targets)
        total_norm = clip_grad_norm_(model.parameters(), max_norm)
        assert torch.allclose(total_norm, nn.utils.clip_grad_norm_(reference.parameters(), max_norm))
        optimizer.step()

    # evaluate
    model.eval()
    whole = copy.deepcopy(reference).eval()
    whole.load_state_dict(reference.state_dict())
    for images, target in [(torch.randn(10, 3, 64, 64).double(), torch.randint(0, 10, (10,)))]:
        dist.broadcast(images, 0)
        dist.broadcast(target, tpc.get_ranks_in_group("pipe")[0], tpc.get_group("pipe"))
        inputs = []
        if tpc.is_first_in_pipeline_group():
            inputs = images
        output = forward_backward(
            None,
            lambda img: model(img),
            None,
            inputs,
            num_microbatches=4,
            forward_only=True,
            dtype=torch.double,
            scatter_gather_tensors=False,
        )
        if tpc.is_last_in_pipeline_group():
            assert output.shape == (10, 10)
            loss = criterion(output, target)
            acc1, acc5 = accuracy(output, target, topk=(1, 5))
            assert 0 <= acc1 <= acc5 <= 100
            assert torch.isfinite(loss)
            assert not output.requires_grad


def expect_full_batch_gradients(reference, stage, all_samples, all_targets):
    """Batch statistics are those of a micro-batch, so the plain loop goes over the same micro-batches."""
    reference.zero_grad()
    criterion = nn.CrossEntropyLoss()
    for samples, targets in zip(all_samples, all_targets, strict=True):
        for x, y in zip(samples.tensor_split(4), targets.tensor_split(4), strict=True):
            if len(x):
                (criterion(reference(x), y) * (len(x) / len(samples)) / 2).backward()
    part = partition_uniform(
        flatten_model(reference, layer_list, return_list=True), num_stages=2, stage=tpc.get_pp_rank()
    )
    for p, q in zip(stage.parameters(), nn.Sequential(*part).parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("custom_backward", [False, True])
def test_the_snippets_with_ddp_uneven_batches_and_a_last_batch_of_few_rows(custom_backward):
    run_distributed(snippets, 4, (4, 6, 3), custom_backward, timeout=120)
