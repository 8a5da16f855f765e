"""Bottom, Trunk and Top in three processes: gradients and text of the whole model, and who is given what."""

import pytest
import torch
from distributed_harness import run_distributed
from distributed_pipeline import start
from language_models import language_model, padded
from torch.utils._pytree import tree_leaves

from torchdistpackage import DDP, PipelineError, clip_grad_norm_, forward_backward, generate, tpc
from torchdistpackage.schedule import describe, names
from torchdistpackage.split import ties_in
from torchdistpackage.split.parts import ModelFactory, share_tied_weights

pytest.importorskip("transformers")
SCHEDULES = [name for name in names() if describe(name).chunks == 1]
COMPONENTS = ("bottom", "trunk", "top")
OPTIONS = {"Mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.1}}
FAMILIES = ("GPT2", "Gemma", "Llama", "Mixtral")
PROMPT = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with a saved model of each family."""
    folder = tmp_path_factory.mktemp("models")
    for family in (*FAMILIES, "Gemma3Text", "Mistral"):
        language_model(family, **OPTIONS.get(family, {})).save_pretrained(folder / family)
    return str(folder)


def own_part(folder, family, *at):
    """This rank's part; all ranks name the same model."""
    rank = tpc.get_pp_rank()
    made = ModelFactory.create_split_models("auto", f"{folder}/{family}", *(at or (2, 3)), parts=[COMPONENTS[rank]])
    assert [part is None for part in made] == [number != rank for number in range(3)]
    return made[rank]


def own_parts(folder):
    """Of all families; before the first step, in which Bottom and Top agree on what is tied."""
    return {family: own_part(folder, family) for family in FAMILIES}


def batch(rows=5, shift=0):
    """Ids, mask and labels: padding and a few more tokens are not to be learnt."""
    ids, mask = padded(rows)
    ids = (ids + shift) % 93 + 3
    labels = ids.masked_fill(mask == 0, -100)
    labels[-1, 5:] = -100
    return ids, mask, labels


def predicted(labels):
    return (labels[:, 1:] != -100).sum()


def step(part, ids, mask, labels, schedule="1f1b", optimizer=None, **options):
    """One step: the mask goes along with the hidden state; what the Trunk is given is noted in it."""
    rank = tpc.get_pp_rank()

    def forward(x):
        entered, seen, *own = x
        if rank == 2:
            loss = part(entered, attention_mask=seen, labels=own[0]).loss
            return loss * (predicted(own[0]) / predicted(labels))
        part.given = x
        return part(entered, attention_mask=seen), seen

    own = [[ids, mask], None, [labels]][rank]
    return forward_backward(
        optimizer, forward, None, own, 3, schedule=schedule, loss_reduction="sum", broadcast_loss=True, **options
    )


def plain_step(whole, ids, mask, labels, weight=1.0):
    """The same in a plain loop over the same micro-batches; router losses are of a micro-batch, too."""
    total = torch.zeros(())
    for x, seen, y in zip(*(tensor.tensor_split(3) for tensor in (ids, mask, labels)), strict=True):
        loss = whole(x, attention_mask=seen, labels=y, use_cache=False).loss * (predicted(y) / predicted(labels))
        (loss * weight).backward()
        total += loss.detach()
    return total


def assert_gradients(part, whole, times=1):
    for name, parameter in part.named_parameters():
        wanted = whole.get_parameter(name).grad
        assert (parameter.grad is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(
                parameter.grad, wanted * times, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}"
            )


def gradients(rank, world, folder, schedule):
    """One step of each family, and a second one that adds to its gradients."""
    start(3)
    ids, mask, labels = batch()
    tied, parts = {}, own_parts(folder)
    for family, part in parts.items():
        part.train()
        whole = language_model(family, **OPTIONS.get(family, {})).train()
        optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
        loss, expected = step(part, ids, mask, labels, schedule, optimizer), plain_step(whole, ids, mask, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        if family != "Mixtral":
            torch.testing.assert_close(loss, whole(ids, attention_mask=mask, labels=labels).loss, rtol=1e-6, atol=0)
        assert_gradients(part, whole)
        step(part, ids, mask, labels, schedule)
        assert_gradients(part, whole, times=2)
        norms = clip_grad_norm_(part.parameters(), 1.0), 2 * torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
        tied[family] = [tie.parameter.grad.tolist() for tie in ties_in(part).values()]
    return tied


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_the_whole_models(models, schedule):
    bottom, trunk, top = run_distributed(gradients, 3, models, schedule, timeout=120)
    assert bottom == top  # a sum of both ends, once, to the bit
    assert {family for family, found in bottom.items() if found} == {"GPT2", "Gemma"}
    assert not any(trunk.values())


def two_replicas(rank, world, folder):
    start(3)
    ids, mask, labels = batch(shift=tpc.get_dp_rank())
    whole, part = language_model("GPT2").train(), own_part(folder, "GPT2").train()
    step(DDP(part), ids, mask, labels)
    for replica in range(2):
        plain_step(whole, *batch(shift=replica), weight=0.5)
    assert_gradients(part, whole)


def test_replicas_of_all_three(models):
    run_distributed(two_replicas, 6, models, timeout=120)


def client_and_server(rank, world, folder):
    """Rank 0 has Bottom and Top, rank 1 the Trunk and, as the third of four stages, nothing."""
    start(2)
    wanted = ["bottom", "top"] if rank == 0 else ["trunk"]
    bottom, trunk, top = ModelFactory.create_split_models("auto", f"{folder}/GPT2", 2, 3, parts=wanted)
    ids, mask, labels = batch()

    def middle(part):
        return lambda x: (part(x[0], attention_mask=x[1]), x[1])

    def last(x):
        return top(x[0], attention_mask=x[1], labels=x[2]).loss * (predicted(x[2]) / predicted(labels))

    if rank == 0:
        share_tied_weights(bottom, top)
    functions = [middle(bottom), last] if rank == 0 else [middle(trunk), tuple]
    own = [[ids, mask], [labels]] if rank == 0 else [None, None]
    forward_backward(None, functions, None, own, 3, schedule="zb-v", loss_reduction="sum")
    whole = language_model("GPT2")
    plain_step(whole, ids, mask, labels)
    for part in (bottom, top) if rank == 0 else (trunk,):
        assert_gradients(part, whole)


def test_a_client_process_with_both_ends(models):
    run_distributed(client_and_server, 2, models, timeout=60)


def an_older_part_on_one_rank(rank, world, folder):
    start(3)
    older = own_part(folder, "GPT2") if rank == 0 else None
    whole, part = language_model("GPT2"), own_part(folder, "GPT2")
    step(part, *batch())
    plain_step(whole, *batch())
    assert_gradients(part, whole)
    return older is None or all(parameter.grad is None for parameter in older.parameters())


def test_a_part_that_does_not_run_is_tied_to_nothing(models):
    assert all(run_distributed(an_older_part_on_one_rank, 3, models, timeout=60))


def frozen_trunk(rank, world, folder, schedule):
    start(3)
    ids, mask, labels = batch()
    whole, part = language_model("GPT2").train(), own_part(folder, "GPT2").train()
    names = [f"transformer.h.2.{name}" for name, _ in whole.transformer.h[2].named_parameters()]
    for name in names:
        whole.get_parameter(name).requires_grad_(False)
    part.requires_grad_(rank != 1)
    step(part, ids, mask, labels, schedule)
    plain_step(whole, ids, mask, labels)
    assert_gradients(part, whole)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_gradients_pass_through_a_frozen_trunk(models, schedule):
    run_distributed(frozen_trunk, 3, models, schedule, timeout=60)


def what_the_trunk_is_given(rank, world, folder):
    start(3)
    ids, mask, labels = batch()
    found = {}
    for family, part in own_parts(folder).items():
        step(part, ids, mask, labels)
        if rank == 1:
            tensors = [x for x in tree_leaves(part.given) if isinstance(x, torch.Tensor)]
            found[family] = [set(x.unique().tolist()) for x in tensors if not x.is_floating_point()]
    return found


def test_the_trunk_is_given_no_ids(models):
    _, found, _ = run_distributed(what_the_trunk_is_given, 3, models, timeout=60)
    assert found.keys() == {*FAMILIES}
    for family, values in found.items():
        assert len(values) == 1, family  # the mask, and in Mixtral no more: what routers have chosen are floats
        assert values[0] <= {0, 1}, family


def write(rank, world, folder):
    start(3)
    ids, mask = padded(tokens=9)
    for family in ("GPT2", "Gemma3Text", "Mistral"):
        expected = language_model(family).generate(ids, attention_mask=mask, **PROMPT)
        part = own_part(folder, family)
        for options in ({}, {"use_cache": False}):
            assert torch.equal(generate({rank: part}, ids, attention_mask=mask, **PROMPT, **options), expected), family


def test_parts_write_the_text_of_the_whole_model(models):
    run_distributed(write, 3, models, timeout=90)


def failing_trunk(rank, world, folder):
    start(3)
    part = own_part(folder, "Llama")
    expected = step(part, *batch())
    heavy = part.register_forward_pre_hook(lambda *_: 1 / 0) if rank == 1 else None
    with pytest.raises(ZeroDivisionError if rank == 1 else PipelineError) as raised:
        step(part, *batch())
    if heavy is not None:
        heavy.remove()
    assert torch.equal(step(part, *batch()), expected)
    return str(raised.value)


def test_an_error_of_the_trunk_is_told_to_all(models):
    bottom, _, top = run_distributed(failing_trunk, 3, models, timeout=60)
    for text in (bottom, top):
        assert "rank 1 of the pipeline" in text
        assert "ZeroDivisionError" in text
