"""What the receiving end does with a peer that does not keep to the rules: it refuses, in words."""

import json
import zlib

import pytest
import torch

from torchdistpackage.errors import TransportError
from torchdistpackage.runtime.edge import MAX_DESCRIPTION
from torchdistpackage.runtime.inlet import report_in
from torchdistpackage.runtime.layout import ALIGNMENT
from torchdistpackage.runtime.loopback import loopback
from torchdistpackage.runtime.message import SPILLED, Header, Kind, write_header

KEPT = {"spec": None, "wire": None, "leaves": [["tensor", [1], [1], "float32", False, False, 2]], "skips": []}


def frame(**fields):
    header = Header(Kind.FORWARD, 0, zlib.crc32(b"test"), 0, 0, 1, 0, 0, ALIGNMENT)
    memory = torch.zeros(ALIGNMENT, dtype=torch.uint8)
    write_header(memory.numpy(), header._replace(**fields))
    return memory


def take_from(frames, *, bulk=()):
    """Hands frames to rank 1 as if rank 0 had sent them, and asks for the first message."""
    a, b = loopback(2, timeout=5.0)
    b.begin_step("test", training=False)
    for memory in frames:
        a.sender(1)(memory)
    for text in bulk:
        a.sender(1, bulk=True)(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return b.inlet(0).take(Kind.FORWARD, 0, 0)


def test_a_description_without_end_is_refused_before_memory_is_set_aside():
    with pytest.raises(TransportError, match=f"a description of {MAX_DESCRIPTION + 1} bytes"):
        take_from([frame(description_bytes=MAX_DESCRIPTION + 1)])


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[]", b"7", b'{"layout": null}'])
def test_a_description_that_is_none_is_refused(text):
    with pytest.raises(TransportError, match="rank 0 describes a message in a way that cannot be read"):
        take_from([frame(description_bytes=len(text))], bulk=[text])


def test_a_message_without_a_layout_is_refused():
    text = json.dumps({"signature": "test", "layout": None}).encode()
    with pytest.raises(TransportError, match="of 64 bytes whose layout it never described"):
        take_from([frame(description_bytes=len(text))], bulk=[text])


def test_a_value_that_was_never_sent_cannot_be_left_out():
    text = json.dumps({"signature": "test", "layout": KEPT}).encode()
    header = frame(description_bytes=len(text), flags=SPILLED)
    with pytest.raises(TransportError, match="rank 0 leaves out a value that it has not sent in this step"):
        take_from([header], bulk=[text, bytes(ALIGNMENT)])


def test_a_message_longer_than_its_slot_is_refused():
    with pytest.raises(TransportError, match="a message of 5000 bytes came for a buffer of 4096"):
        take_from([torch.zeros(5000, dtype=torch.uint8)])


@pytest.mark.parametrize("data", [b"", bytes(63), bytes(64), bytes(frame().tolist())])
def test_what_is_no_report_is_not_taken_for_one(data):
    assert report_in(data) is None
