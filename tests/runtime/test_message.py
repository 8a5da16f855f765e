import collections
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.layout import Layout
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.message import SPILLED, Header, Kind, flatten, read_header, write_header

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
DTYPES += [torch.complex64, torch.uint8]


def travel(trees, *, wire_dtype=None, training=True, steps=1):
    """Sends each tree from rank 0 to rank 1, in each of several steps; returns what arrives in the last."""
    a, b = loopback(2)
    for _ in range(steps):
        arrived = []
        for transport in (a, b):
            transport.begin_step("test", training=training, wire_dtype=wire_dtype)
        for number, tree in enumerate(trees):
            b.inlet(0).post()
            a.outlet(1).send(Kind.FORWARD, 0, number, len(trees), *flatten(tree))
            message = b.inlet(0).take(Kind.FORWARD, 0, number)
            arrived.append(message.layout.tree(message.tensors))
        for transport in (a, b):
            transport.finish_step(None, None)
    return arrived


def assert_same(mine, theirs):
    leaves, spec = pytree.tree_flatten(mine)
    others, other_spec = pytree.tree_flatten(theirs)
    assert spec == other_spec
    for a, b in zip(leaves, others, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(a, b)
        else:
            assert a == b


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    tensor = torch.randint(0, 2, shape).to(dtype)
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    if tensor.dim() > 0 and draw(st.booleans()):
        tensor = tensor[..., ::2]
    return tensor


leaves = tensors() | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(st.lists(trees, min_size=1, max_size=4))
def test_any_pytree_arrives_as_it_was(sent):
    for mine, theirs in zip(sent, travel(sent, steps=2), strict=True):
        assert_same(mine, theirs)


def test_ordered_dicts_and_special_values():
    sent = collections.OrderedDict(b=torch.ones(2), a=(float("inf"), 1 + 2j, torch.float16, torch.device("cpu")))
    assert_same(sent, travel([sent])[0])


def test_sizes_and_slices_are_constants():
    sent = [(torch.ones(n), torch.Size([n, 2]), slice(None, n), slice(n, 0, -1)) for n in (1, 2, 2, 3)]
    for mine, theirs in zip(sent, travel(sent, steps=2), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]
        assert [type(value) for value in theirs[1:]] == [torch.Size, slice, slice]


def test_true_and_one_are_not_the_same_constant():
    assert [type(x[0]) for x in travel([[True], [1], [1.0]])] == [bool, int, float]


def test_a_cast_on_the_wire_arrives_in_the_original_dtype():
    x, ids = torch.tensor([1.0, 1 / 3]), torch.tensor([2**40])
    got, got_ids = travel([(x, ids)], wire_dtype=torch.bfloat16)[0]
    assert got.dtype == torch.float32
    assert torch.equal(got, x.bfloat16().float())
    assert torch.equal(got_ids, ids)
    assert torch.equal(travel([x], wire_dtype=torch.float64)[0], x)


def test_what_wants_a_gradient_is_known_on_arrival():
    a, b = loopback(2)
    for training, wants in ((True, [True, False]), (False, [False, False])):
        for transport in (a, b):
            transport.begin_step("test", training=training)
        tree = [torch.ones(2, requires_grad=True), torch.ones(2)]
        a.outlet(1).send(Kind.FORWARD, 0, 0, 2, *flatten(tree))
        layout = b.inlet(0).take(Kind.FORWARD, 0, 0).layout
        assert [tensor.requires_grad for tensor in layout.tensors] == wants


def test_the_sender_may_change_its_tensor_right_after():
    a, b = loopback(2)
    for transport in (a, b):
        transport.begin_step("test", training=False)
    x = torch.ones(3)
    a.outlet(1).send(Kind.FORWARD, 0, 0, 1, [x], None)
    x.zero_()
    assert torch.equal(b.inlet(0).take(Kind.FORWARD, 0, 0).tensors[0], torch.ones(3))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "object, which cannot travel"),
        ([torch.ones(2), {1, 2}], "set, which cannot travel"),
        ([slice(0, 2.5)], "slice, which cannot travel"),
        (torch.eye(2).to_sparse(), "only dense tensors travel"),
        (torch.ones(2, device="meta"), "on the meta device, which has no values; give the stage values first"),
    ],
)
def test_what_cannot_travel_is_refused_by_name(value, reason):
    with pytest.raises(TransportError, match=reason):
        travel([value])


def test_a_container_that_other_ranks_cannot_rebuild_is_refused():
    point = collections.namedtuple("Unregistered", "x y")
    with pytest.raises(
        TransportError, match=r"return tuple\(x\) and make the Unregistered again .*, or register the container"
    ):
        travel([point(torch.ones(1), torch.ones(1))])


def test_foreign_bytes_are_not_taken_for_a_message():
    with pytest.raises(TransportError, match="not a pipeline message"):
        read_header(bytes(64))


def tensor(shape=(2, 3), stride=(3, 1), dtype="float32", grad=False, cuda=False, travel=0):
    leaves = [["tensor", shape, stride, dtype, grad, cuda, travel]]
    return {"spec": None, "wire": None, "leaves": leaves, "skips": []}


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {**tensor(), "leaves": [["tensor", [1]]]},
        {**tensor(), "spec": "x", "leaves": []},
        {**tensor(), "leaves": []},
        {**tensor(), "leaves": tensor()["leaves"] * 2},
        {**tensor(), "wire": "Tensor"},
        tensor(shape=[-1, 3]),
        tensor(shape=[2.0, 3]),
        tensor(stride=[1]),
        tensor(stride=[100, 1]),  # would look at memory behind the message
        tensor(stride=[-3, 1]),
        tensor(shape=[1 << 40], stride=[1]),
        tensor(shape=[1 << 63, 1 << 63], stride=[1 << 63, 1]),
        tensor(dtype="nn"),
        tensor(travel=7),
        {**tensor(), "leaves": [["module", "os"]]},
        {**tensor(), "leaves": [["slice", [0, "end"]]]},
        {**tensor(), "leaves": [["size", [2.5]]]},
        {**tensor(), "skips": [[0, 1]]},
        {**tensor(), "skips": [[0, 1 << 40]]},
        {**tensor(), "skips": [[0]]},
        {**tensor(), "skips": 7},
    ],
)
def test_a_damaged_description_is_an_error(damage):
    with pytest.raises(TransportError, match="cannot be read"):
        Layout.from_description(damage)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("layout", 99, "whose layout it never described"),
        ("payload_bytes", 1 << 60, f"a message of {1 << 60} bytes whose layout needs 128"),
        ("flags", SPILLED, "a message of 64 bytes whose layout needs 128"),
    ],
)
def test_a_header_that_does_not_fit_its_layout_is_refused_before_memory_is_set_aside(field, value, reason):
    a, b = loopback(2)
    for transport in (a, b):
        transport.begin_step("test", training=False)
    a.outlet(1).send(Kind.FORWARD, 0, 0, 1, [torch.ones(3)], None)
    b.inlet(0).take(Kind.FORWARD, 0, 0)
    good = Header(Kind.FORWARD, 0, zlib.crc32(b"test"), 0, 1, 1, 0, 0, 64 if field == "flags" else 128)
    frame = torch.zeros(128, dtype=torch.uint8)
    write_header(frame.numpy(), good._replace(**{field: value}))
    a.sender(1)(frame)
    with pytest.raises(TransportError, match=reason):
        b.inlet(0).take(Kind.FORWARD, 0, 1)
