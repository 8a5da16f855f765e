"""`AutoPipeline` over gloo with real processes: what its steps leave is what the plain loop leaves."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from decoders import batch, cross_entropy, decoder
from distributed_harness import run_distributed
from distributed_pipeline import fully_shards
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from torchdistpackage import DDP, PipelineError, TopologyError, schedule, setup_distributed, tpc
from torchdistpackage.split import materialize_stages
from torchdistpackage.trainer import AutoPipeline, scale_grads_and_clip_grad_norm

MULTI = ("Interleaved1F1B", "InterleavedZeroBubble", "LoopedBFS", "ZBVZeroBubble", "DualPipeV")


def start(*sizes, names=("pp",)):
    setup_distributed(backend="gloo")
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def pipeline(mesh, model, parallelize_fn=None, loss_fn=cross_entropy, **options):
    options = {"pp_batch_size": 4, "device": "cpu", **options}
    return AutoPipeline(world_mesh=mesh, **options).build(model, loss_fn=loss_fn, parallelize_fn=parallelize_fn)


def ends(ap, ids, target):
    """What each rank has of a batch: the first one the ids, the last one the target."""
    first, last = ap.info.has_first_stage, ap.info.has_last_stage
    return {"model_input": ids if first else None, "target": target if last else None}


def plain_step(model, ids, target, size=1, mean=False, **kwargs):
    """The loop that a step stands for; returns the loss and those of the micro-batches."""
    model.zero_grad()
    losses = []
    for at in range(0, len(ids), size):
        rows = slice(at, at + size)
        logits = model(ids[rows], **{name: value[rows] for name, value in kwargs.items()}).logits
        losses.append(cross_entropy(logits, target[rows]) * (len(ids[rows]) / len(ids) if mean else 1))
        losses[-1].backward()
    return sum(losses).detach(), [loss.detach() for loss in losses]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_same_gradients(ap, reference):
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    for part in ap.parts:
        for name, parameter in part.named_parameters():
            assert torch.allclose(whole(parameter.grad), wanted[name.removeprefix("module.")].grad), name


def steps(rank, world, names, tied):
    mesh = start()
    for name in names:
        several_batches(mesh, name, tied, mean=name in ("GPipe", "LoopedBFS", "1F1B"))


def several_batches(mesh, name, tied, mean):
    model = decoder(tied=tied).double()
    reference = copy.deepcopy(model)
    ap = pipeline(mesh, model, pp_schedule=name, scale_grads_in_schedule=mean)
    for rows in (4, 3, 7):  # the usual batch, a short one, a long one
        ids, mask = batch(rows)
        loss, each = plain_step(reference, ids, ids, mean=mean, attention_mask=mask)
        for parameter in ap.parameters():
            parameter.grad = None
        losses = []
        result = ap.step(**ends(ap, ids, ids), losses=losses, attention_mask=mask)
        if ap.info.has_last_stage:
            assert torch.allclose(result, loss)
            assert torch.allclose(torch.stack(losses), torch.stack(each) * (rows if mean else 1))
        else:
            assert result is None
            assert losses == []
        assert_same_gradients(ap, reference)
        ap.scale_grads_by_divisor(2)
        norm = ap.clip_grad_norm(max_norm=0.05)
        assert torch.allclose(2 * norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.05))
        assert_same_gradients(ap, reference)
        logits, value = ap.eval(ids, attention_mask=mask), ap.evaluate(**ends(ap, ids, ids), attention_mask=mask)
        if ap.info.has_last_stage:
            assert torch.allclose(logits, reference(ids, attention_mask=mask).logits)
            assert not logits.requires_grad
            assert torch.allclose(value, loss)
    assert ap.get_total_param_count() == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_steps_with_one_stage_a_rank(tied):
    run_distributed(steps, 2, ["1f1b", "GPipe", "zb-h1"], tied)


@pytest.mark.parametrize("tied", [False, True])
def test_steps_with_several_stages_a_rank(tied):
    run_distributed(steps, 2, MULTI, tied)


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_numbers_of_ranks(ranks):
    run_distributed(steps, ranks, ["1f1b", "1F1B"], True)


def replicas(rank, world, how, cases):
    mesh = start(2, 2, names=("dp", "pp"))
    for name, tied in cases:
        trained_replicas(mesh, name, tied, how)


def trained_replicas(mesh, name, tied, how):
    from torch.distributed.fsdp import fully_shard

    def sharded(part, world_mesh, moe_mesh, *, dp_axis_names, **axes):
        for layer in part.model.layers.values():
            fully_shard(layer, mesh=world_mesh[dp_axis_names[0]])
        fully_shard(part, mesh=world_mesh[dp_axis_names[0]])

    model = decoder(tied=tied).double()
    reference = copy.deepcopy(model)
    function = sharded if how == "fully_shard" else lambda part, *_, **axes: DDP(part)
    ap = pipeline(mesh, model, function, pp_schedule=name, scale_grads_in_schedule=True)
    assert (tpc.get_pp_size(), tpc.get_dp_size()) == (2, 2)
    optimizers = [torch.optim.SGD(p, lr=0.1) for p in (ap.parameters(), reference.parameters())]
    for rows in (4, 3):
        ids = batch(2 * rows)[0]
        plain_step(reference, ids, ids, size=2 * rows)
        optimizers[0].zero_grad()
        mine = ids.chunk(2)[mesh["dp"].get_local_rank()]
        ap.step(**ends(ap, mine, mine))
        assert_same_gradients(ap, reference)
        norm = whole(ap.clip_grad_norm(0.1))
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
        for optimizer in optimizers:
            optimizer.step()
        logits = ap.eval(mine)
        assert logits is None or torch.allclose(logits, reference(mine).logits)


@pytest.mark.parametrize("how", ["ddp", pytest.param("fully_shard", marks=fully_shards)])
def test_replicas_are_reduced_once(how):
    cases = [("1f1b", True), ("Interleaved1F1B", True), ("Interleaved1F1B", False)]
    # What a split backward leaves to be reduced, fully_shard cannot be told of by every torch.
    split = how == "ddp" or hasattr(torch.distributed.fsdp.FSDPModule, "set_manual_backward_finalization")
    run_distributed(replicas, 4, how, cases + [("zb-h1", True)] * split, timeout=120)


def test_replicas_that_share_a_parameter_between_chunks():
    run_distributed(replicas, 4, "ddp", [("zb-v", True)], timeout=120)


def from_a_file(rank, world, path):
    mesh, model = start(), decoder().double()
    reference = copy.deepcopy(model)
    ap = pipeline(mesh, model, pp_schedule=None, pp_schedule_csv=path)
    assert ap.info.schedule.name == "mine"
    assert len(ap.parts) == 2
    ids = batch(6)[0]
    loss, _ = plain_step(reference, ids, ids, size=2)
    first = plain_step(reference, ids[:4], ids[:4])[0], ap.step(**ends(ap, ids[:4], ids[:4]))
    assert first[1] is None or torch.allclose(*first)
    assert_same_gradients(ap, reference)
    loss = ap.eval(**ends(ap, ids, ids))  # a plan of one's own has its number of micro-batches: 2, 2, 1, 1 rows
    assert loss is None or loss.isfinite()


def test_a_schedule_from_a_csv_file(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(schedule.outline("zb-v", 2, 4).to_csv())
    run_distributed(from_a_file, 2, str(path))


class TransposedPositions(nn.Module):
    """Takes positions as (tokens, rows), and says so."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, position_ids, **kwargs):
        return self.module(x, position_ids=position_ids.T, **kwargs)

    def get_pipeline_kwargs_chunk_dims(self, kwargs):
        return {"position_ids": 1}


def transposed_positions(part, *_, **axes):
    return TransposedPositions(part)


def arguments(rank, world):
    mesh, model = start(), decoder().double()
    reference = copy.deepcopy(model)
    ids, mask = batch(5)
    positions = torch.stack([torch.arange(6) + row for row in range(5)])
    loss, _ = plain_step(reference, ids, ids, 5, position_ids=positions, attention_mask=mask)
    ap = pipeline(mesh, model, transposed_positions, pp_microbatch_size=2, scale_grads_in_schedule=True)
    losses = []
    value = ap.step(**ends(ap, ids, ids), losses=losses, position_ids=positions.T, attention_mask=mask)
    assert value is None or (torch.allclose(value, loss) and len(losses) == 3)
    assert_same_gradients(ap, reference)
    ap = pipeline(mesh, model, pp_microbatch_size=2, scale_grads_in_schedule=True)
    one = torch.arange(6)[None] + 3  # one row of positions for all
    logits = ap.eval(ids, position_ids=one)
    assert logits is None or torch.allclose(logits, reference(ids, position_ids=one).logits)
    own = ap.eval(input_ids=ids, labels=ids)  # the model's own loss
    expected = [reference(input_ids=x, labels=x).loss * len(x) / 5 for x in ids.split([2, 2, 1])]
    assert own is None or torch.allclose(own, sum(expected))


def test_arguments_are_cut_with_the_batch():
    run_distributed(arguments, 2)


def wrong_use(rank, world):
    mesh, model = start(), decoder()
    ap = pipeline(mesh, model)
    ids = batch(4)[0]
    with pytest.raises(PipelineError, match="the first stage got no input"):
        ap.step(target=ids)
    with pytest.raises(PipelineError, match="the last stage got no target"):
        ap.step(ids)
    with pytest.raises(PipelineError, match="target and labels are both given"):
        ap.step(ids, target=ids, labels=ids)
    with pytest.raises(PipelineError, match="4 rows on the first stage"):
        ap.step(ids, target=ids[:3])
    with pytest.raises(PipelineError, match="was given (attention_mask|no keyword arguments), and rank 0"):
        ap.step(ids, target=ids, attention_mask=torch.ones_like(ids) if rank else None)
    ap.parts[0].get_pipeline_kwargs_chunk_dims = lambda kwargs: {"nothing": 1} if rank else {}
    with pytest.raises((ValueError, PipelineError), match=r"unknown kwarg\(s\) nothing"):
        ap.step(ids, target=ids)
    del ap.parts[0].get_pipeline_kwargs_chunk_dims
    assert (ap.step(ids, target=ids) is None) == (rank == 0)  # after all of that the next step works
    with pytest.raises(TopologyError, match=r"has no axis 'stages', only \['pp'\]"):
        AutoPipeline(world_mesh=mesh, pp_axis_name="stages")
    tpc.setup_process_groups([("data", 2)])
    with pytest.raises(TopologyError, match=r"'pipe' group \[0, 1\] of 2 rank\(s\), but tpc is set up with \[\d\]"):
        pipeline(mesh, model)


def test_wrong_use_is_one_error_on_every_rank():
    run_distributed(wrong_use, 2)


def built_twice(rank, world):
    """The same model under another placement: embedding and head are on two ranks, then on one, then on two."""
    mesh, model = start(), decoder(tied=True).double()
    reference = copy.deepcopy(model)
    ids = batch(4)[0]
    for name in ("1f1b", "zb-v", "1f1b"):
        ap = pipeline(mesh, model, pp_schedule=name)
        model.zero_grad()
        plain_step(reference, ids, ids)
        ap.step(**ends(ap, ids, ids))
        assert_same_gradients(ap, reference)


def test_a_model_may_be_cut_again():
    run_distributed(built_twice, 2)


def from_meta(rank, world):
    mesh, reference = start(), decoder().double()
    with torch.device("meta"):
        model = decoder().double()
    ap = pipeline(mesh, model)
    ids = batch(4)[0]
    with pytest.raises(PipelineError, match="on the meta device: call materialize_stages"):
        ap.step(ids, target=ids)
    materialize_stages(dict(enumerate(ap.parts)))
    for part in ap.parts:
        part.load_state_dict({name: reference.state_dict()[name] for name in part.state_dict()})
    plain_step(reference, ids, ids)
    ap.step(ids, target=ids)
    assert_same_gradients(ap, reference)
    tokens = ids.numel()
    norm = scale_grads_and_clip_grad_norm(0.1, ap.parts, pp_enabled=True, num_label_tokens=tokens, dp_group_size=1)
    expected = nn.utils.get_total_norm([p.grad / tokens for p in reference.parameters()])
    assert torch.allclose(norm, expected)


def test_a_model_on_the_meta_device():
    run_distributed(from_meta, 2)


def data_axes(rank, world):
    mesh = start(2, 1, 2, names=("dp_replicate", "dp_shard", "pp"))
    pipeline(mesh, decoder(), dp_axis_names=("dp_replicate", "dp_shard", "dp_cp"))
    assert (tpc.get_ranks_in_group("data"), tpc.get_ranks_in_group("pipe")) == (
        [rank % 2, rank % 2 + 2],
        [rank // 2 * 2, rank // 2 * 2 + 1],
    )
    pipeline(mesh, decoder(), dp_axis_names=("dp_replicate", "dp_shard"))  # what is there says the same
    apart = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp_replicate", "pp", "dp_shard"))
    tpc.reset()
    with pytest.raises(TopologyError, match="do not lie side by side"):
        pipeline(apart, decoder(), dp_axis_names=("dp_replicate", "dp_shard"))


def test_the_topology_comes_from_the_mesh():
    run_distributed(data_axes, 4)
