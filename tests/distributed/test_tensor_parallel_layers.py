"""Tensor-parallel layers over gloo equal the dense ones: outputs, input gradients, and every parameter's gradient."""

import copy
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from distributed_harness import run_distributed
from tensor_comparison import assert_equal_steps, assert_same_parameters, cut, dense_like, drawn, near, setup, zeroed
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchdistpackage import PipelineError, SplitError, forward_backward, tpc
from torchdistpackage.parallel.tensor_parallel.attn import Attention, TpAttention
from torchdistpackage.parallel.tensor_parallel.group import get_tp_group, set_tp_group, tensor_mesh
from torchdistpackage.parallel.tensor_parallel.layers import ColParallelLinear, RowParallelLinear, TpLinear
from torchdistpackage.parallel.tensor_parallel.mlp import Mlp, TpMlp
from torchdistpackage.parallel.tensor_parallel.regions import (
    gather_from_sequence_parallel_region,
    get_tensor_model_parallel_world_size,
    is_sequence_parallel_tensor,
    is_squence_parallel_tensor,
    maybe_gather_from_sequence_parallel,
    maybe_split_into_sequence_parallel,
    reduce_scatter_to_sequence_parallel_region,
    set_sequence_parallel_attr,
)
from torchdistpackage.parallel.tensor_parallel.transformer import Block, ParallelBlock, Transformer

SHAPES = [(8, 12), (3, 4, 12), (2, 3, 4, 12)]


def linears():
    for shape, bias, sequence in [(s, b, q) for s in SHAPES for b in (True, False) for q in (True, False)]:
        dense = TpLinear(12, 24, bias).double()
        column = ColParallelLinear(12, 24, bias, sequence_parallel=sequence).double()
        column.init_weight_from_full(dense.weight, dense.bias)
        dense.load_state_dict({k.removeprefix("linear."): v.full_tensor() for k, v in column.state_dict().items()})
        assert_equal_steps(dense, column, drawn(*shape), -2 if sequence else None, -1)
        row = RowParallelLinear(12, 24, bias, sequence).double()
        dense = TpLinear(12, 24, bias).double()
        row.init_weight_from_full(dense.weight, dense.bias)
        dense.load_state_dict({k.removeprefix("linear."): v.full_tensor() for k, v in row.state_dict().items()})
        assert_equal_steps(dense, row, drawn(*shape), -1, -2 if sequence else None)


def pairs():
    for sequence in (False, True):
        dim = -2 if sequence else None
        for bias in (False, True):
            dense = dense_like(Attention, 16, 4, bias)
            attention = TpAttention(16, 4, bias, sequence_parallel=sequence).double()
            attention.init_from_full(dense)
            assert_equal_steps(dense, attention, drawn(2, 8, 16), dim, dim)
            assert_equal_steps(zeroed(dense), zeroed(attention), drawn(2, 3, 8, 16), dim, dim)
        for shape in SHAPES:
            dense = dense_like(Mlp, 12, 24, 16)
            mlp = TpMlp(12, 24, 16, sequence_parallel=sequence).double()
            mlp.init_from_full(dense)
            assert_equal_steps(dense, mlp, drawn(*shape), dim, dim)


def stacks():
    for sequence in (False, True):
        dim, dense = -2 if sequence else None, dense_like(Block, 16, 2, 4)
        block = ParallelBlock(16, 2, 4, sequence).double()
        block.init_from_full(dense)
        for run in (None, partial(checkpoint, block, use_reentrant=False)):
            assert_equal_steps(zeroed(dense), zeroed(block), drawn(2, 8, 16), dim, dim, run=run)
        with torch.no_grad():
            assert near(
                block(cut(drawn(2, 8, 16), dim, tensor_mesh())), cut(dense(drawn(2, 8, 16)), dim, tensor_mesh())
            )
        dense = dense_like(partial(Transformer, tensor_parallel=False), 16, 2, 4, 2)
        model = Transformer(16, 2, 4, 2, sequence_parallel=sequence).double()
        for own, whole in zip(model.blocks, dense.blocks, strict=True):
            own.init_from_full(whole)
        assert_equal_steps(dense, model, drawn(2, 8, 16))


def layers(rank, world):
    setup(world)
    linears()
    pairs()
    stacks()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers(world):
    run_distributed(layers, world)


def different_seeds(rank, world):
    setup(world)
    torch.manual_seed(0)
    dense = Transformer(16, 2, 4, 2, tensor_parallel=False)
    torch.manual_seed(rank)
    model = Transformer(16, 2, 4, 2)
    assert_same_parameters(model, dense, within=torch.equal)  # the first rank's numbers, as without the others
    column = ColParallelLinear(8, 8)
    torch.manual_seed(10 + rank)
    column.linear.reset_parameters()
    torch.manual_seed(10)
    assert_same_parameters(column, TpLinear(8, 8), within=torch.equal)
    torch.manual_seed(20 + rank)
    before = copy.deepcopy(own := Block(8, 2, 2))
    nn.init.normal_(own.ln_1.weight)
    taken = ParallelBlock(8, 2, 2)
    taken.init_from_full(own)  # the first rank's, and the others keep what they gave
    assert all(torch.equal(a, b) for a, b in zip(own.mlp.parameters(), before.mlp.parameters(), strict=True))
    firsts = [own if rank == 0 else None]
    dist.broadcast_object_list(firsts)
    assert_same_parameters(taken, firsts[0], within=torch.equal)


def test_all_ranks_start_from_the_first_ranks_numbers():
    run_distributed(different_seeds, 2)


def from_meta(rank, world):
    setup(world)
    with torch.device("meta"):
        block = ParallelBlock(16, 2, 4)
    assert all(p.is_meta for p in block.parameters())
    block.to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    whole = {name: p.full_tensor() for name, p in block.named_parameters()}
    for value in whole.values():
        everyone = [torch.empty_like(value) for _ in range(world)]
        dist.all_gather(everyone, value.contiguous())
        assert all(torch.equal(value, other) for other in everyone)
    assert 0.2 < whole["attn.qkv.linear.weight"].max() < 0.25
    assert torch.equal(whole["ln_1.weight"], torch.ones(16))
    block(torch.randn(2, 3, 16)).sum().backward()


def test_meta_device():
    run_distributed(from_meta, 2)


def groups(rank, world):
    setup(2)
    assert dist.get_process_group_ranks(get_tp_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    dense = dense_like(Block, 8, 2, 2)
    for chosen in (None, [0, 2], [1, 3]):
        group = None if chosen is None else dist.new_group(chosen)
        if chosen is None or rank in chosen:
            set_tp_group(group)
            block = ParallelBlock(8, 2, 2, True).double()
            block.init_from_full(dense)
            assert get_tensor_model_parallel_world_size() == 2
            assert_equal_steps(zeroed(dense), block, drawn(2, 4, 8, seed=rank % 2 if group else rank // 2), -2, -2)
    given = TpMlp(8, tp_group=tpc.get_group("data")).double()
    given.init_from_full(dense := dense_like(Mlp, 8))
    assert dist.get_process_group_ranks(given.mesh.get_group()) == [rank % 2, rank % 2 + 2]
    assert_equal_steps(dense, given, drawn(3, 8), mesh=given.mesh)


def test_several_tensor_groups():
    run_distributed(groups, 4)


def fused_qkv(rank, world):
    setup(world)
    dense = dense_like(Attention, 8, 2, True).qkv
    for parts in (1, 3):
        qkv = ColParallelLinear(8, 24, parts=parts).double()
        qkv.init_weight_from_full_attn(dense.weight, dense.bias)
        local = torch.cat([part.chunk(world, -1)[rank] for part in dense(drawn(2, 8)).chunk(3, -1)], -1)
        assert near(qkv(drawn(2, 8)), local)
        assert_same_parameters(qkv, dense, within=torch.equal)
        qkv.init_weight_from_full_attn(torch.zeros(8, 24))
        assert torch.equal(qkv.linear.bias.full_tensor().flatten(), dense.bias)


def test_fused_qkv():
    run_distributed(fused_qkv, 2)


def copies(rank, world):
    setup(world)
    block = ParallelBlock(8, 2, 2, True).double()
    twin, other = copy.deepcopy(block), ParallelBlock(8, 2, 2, True).double()
    other.load_state_dict(block.state_dict())
    x = cut(drawn(2, 4, 8), -2, tensor_mesh())
    for model in (twin, other):
        assert torch.equal(model(x), block(x))
        model(x).sum().backward()
    block.mlp.requires_grad_(False)
    block(x).sum().backward()
    assert block.mlp.fc1.linear.weight.grad is None
    assert near(block.ln_1.weight.grad.full_tensor(), twin.ln_1.weight.grad.full_tensor())


def test_copies():
    run_distributed(copies, 2)


def autocast(rank, world):
    setup(world)
    for sequence in (False, True):
        dense, dim = dense_like(Block, 16, 2, 4).float(), -2 if sequence else None
        block = ParallelBlock(16, 2, 4, sequence)
        block.init_from_full(dense)
        x = drawn(2, 8, 16).float()
        with torch.autocast("cpu", torch.bfloat16):
            found, wanted = block(cut(x, dim, tensor_mesh())), cut(dense(x), dim, tensor_mesh())
            assert block.mlp(found).dtype == dense.mlp(found).dtype == torch.bfloat16
        assert torch.allclose(found, wanted, atol=0.02)
        found.sum().backward()
        wanted.sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_autocast():
    run_distributed(autocast, 2)


def errors(rank, world):
    setup(world)
    cases = [
        (lambda: ColParallelLinear(4, 7), r"7 outputs \(fout\) cannot be shared equally by the 2 ranks"),
        (lambda: ColParallelLinear(4, 8, parts=3), "8 outputs .* in 3 parts .* multiple of 6"),
        (lambda: RowParallelLinear(7, 4), r"7 inputs \(fin\) cannot be shared equally by the 2 ranks"),
        (lambda: TpMlp(8, 9), "9 outputs"),
        (lambda: TpAttention(9, 3), "3 heads cannot be shared equally by the 2 ranks"),
        (lambda: Attention(10, 3), "3 heads cannot share 10 features"),
        (lambda: Transformer(8, 2, 2, 1)(torch.zeros(2, 3, 8)), "has 3 positions, which the 2 ranks .* pad it to 4"),
        (lambda: RowParallelLinear(8, 4)(torch.zeros(2, 8)), r"has 4 of the 8 inputs of this layer, and got 8"),
        (lambda: RowParallelLinear(8, 4).init_weight_from_full(torch.zeros(4, 8)), "transposed"),
        (lambda: ColParallelLinear(8, 4).init_weight_from_full(torch.zeros(8, 4), torch.zeros(3)), r"shape \(4,\)"),
        (lambda: ColParallelLinear(8, 4, False).init_weight_from_full(torch.zeros(8, 4), torch.zeros(4)), "bias=True"),
    ]
    for call, message in cases:
        with pytest.raises(SplitError, match=message):
            call()


def test_errors():
    run_distributed(errors, 2)


def masks(rank, world):
    setup(world, seed_by_rank=False)
    x = torch.ones(4, 16, 8)
    for sequence in (False, True):
        layers = TpMlp(8, drop=0.5, sequence_parallel=sequence), TpAttention(8, 2, proj_drop=0.5, attn_drop=0.5)
        assert same_on_all(layers[0](x) == 0) is not sequence
        assert same_on_all(layers[1](x))  # whole: the same on every rank
        assert same_on_all(torch.rand(3))  # and the generators stand at the same place
        grads = []
        for run in (layers[0], partial(checkpoint, layers[0], use_reentrant=False)):
            torch.manual_seed(3)
            run(leaf := x.clone().requires_grad_()).sum().backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)
    attention = TpAttention(8, 2, attn_drop=0.5)
    nn.init.ones_(attention.qkv.linear.weight)  # all heads alike
    attention.proj = nn.Identity()
    assert not same_on_all(attention(x))  # but for their masks
    assert same_on_all(attention.eval()(x))


def same_on_all(t):
    found = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(found, t.contiguous())
    return torch.equal(*found)


def test_dropout():
    run_distributed(masks, 2)


def regions(rank, world):
    setup(world)
    mesh = tensor_mesh()
    whole = drawn(2, 4, 3)
    part = maybe_split_into_sequence_parallel(whole)
    assert torch.equal(part, whole.chunk(2, 1)[rank])
    assert is_sequence_parallel_tensor(part)
    assert is_squence_parallel_tensor(part)
    assert maybe_split_into_sequence_parallel(part) is part
    assert maybe_gather_from_sequence_parallel(whole) is whole
    again = maybe_gather_from_sequence_parallel(part)
    assert torch.equal(again, whole)
    assert not is_sequence_parallel_tensor(again)
    assert maybe_split_into_sequence_parallel(set_sequence_parallel_attr(whole)) is whole
    for dim in (0, 1, -1):
        leaf = drawn(2, 4, 6).requires_grad_()
        cut(reduce_scatter_to_sequence_parallel_region(leaf, dim=dim), None, mesh).sum().backward()
        assert torch.equal(leaf.grad, torch.ones(2, 4, 6))
        for tensor_parallel, slope in ((True, 3.0), (False, rank + 1.0)):  # ranks add 1 and 2, or each keeps its own
            leaf = drawn(2, 4, 6).requires_grad_()
            gathered = gather_from_sequence_parallel_region(leaf, tensor_parallel, dim=dim, group=mesh)
            (gathered * (rank + 1)).sum().backward()
            assert torch.equal(leaf.grad, torch.full((2, 4, 6), slope))


def test_regions():
    run_distributed(regions, 2)


def a_rank_dies(rank, world):
    setup(world)
    TpMlp(8)
    if rank == 1:
        os._exit(1)
    with pytest.raises(PipelineError, match="rank 1 of the tensor group .* the weights of a tensor-parallel layer"):
        TpMlp(8)


def test_a_rank_that_dies_meanwhile_is_named():
    run_distributed(a_rank_dies, 2, may_die=[1])


def a_rank_fails_in_a_step(rank, world):
    setup(world)
    mlp = TpMlp(8)

    def fwd_fn(x):
        if rank == 1:
            raise ValueError("before its part of the layer")
        return mlp(x).mean()

    with pytest.raises((ValueError, PipelineError), match="before its part of the layer"):
        forward_backward(fwd_fn=fwd_fn, inputs=torch.randn(4, 8), num_microbatches=2)


def test_a_rank_that_fails_in_a_step_is_named():
    run_distributed(a_rank_fails_in_a_step, 2)
