"""Where parts go: by size and free memory, or as they are told."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdistpackage import SplitError
from torchdistpackage.split.parts import place_parts
from torchdistpackage.split.parts.devices import known_device, parse_device_map
from torchdistpackage.split.parts.metadata import COMPONENTS

SIZES = st.fixed_dictionaries(dict.fromkeys(COMPONENTS, st.integers(0, 100)))
FREE = st.lists(st.integers(0, 200), max_size=3).map(lambda free: {f"cuda:{i}": size for i, size in enumerate(free)})


def loads(sizes: dict[str, int], placed: dict[str, str]) -> dict[str, int]:
    return {device: sum(sizes[part] for part in placed if placed[part] == device) for device in placed.values()}


@given(SIZES, FREE)
def test_no_device_gets_more_than_it_has(sizes: dict[str, int], free: dict[str, int]) -> None:
    placed = place_parts(sizes, free)
    assert list(placed) == list(sizes)
    assert all(device == "cpu" or load <= 0.9 * free[device] for device, load in loads(sizes, placed).items())


@given(SIZES, FREE)
def test_the_cpu_takes_only_what_fits_nowhere_else(sizes: dict[str, int], free: dict[str, int]) -> None:
    found = loads(sizes, place_parts(sizes, free)).get("cpu", 0)
    for devices in itertools.product([*free, "cpu"], repeat=3):
        load = loads(sizes, dict(zip(sizes, devices, strict=True)))
        if all(device == "cpu" or taken <= 0.9 * free[device] for device, taken in load.items()):
            assert found <= load.get("cpu", 0)


@given(SIZES, FREE)
def test_the_fullest_device_is_the_least_full(sizes: dict[str, int], free: dict[str, int]) -> None:
    def fullest(load: dict[str, int]) -> float:
        return max((taken / free[device] for device, taken in load.items() if device != "cpu" and taken), default=0)

    found = loads(sizes, place_parts(sizes, free))
    for devices in itertools.product([*free, "cpu"], repeat=3):
        load = loads(sizes, dict(zip(sizes, devices, strict=True)))
        fits = all(device == "cpu" or taken <= 0.9 * free[device] for device, taken in load.items())
        if fits and load.get("cpu", 0) == found.get("cpu", 0):
            assert fullest(found) <= fullest(load) + 1e-5


def test_equal_parts_on_equal_devices_are_spread() -> None:
    free = {"cuda:0": 100, "cuda:1": 100, "cuda:2": 100}
    assert set(place_parts(dict.fromkeys(COMPONENTS, 50), free).values()) == {*free}
    sizes = {"bottom": 1, "trunk": 8, "top": 1}
    assert place_parts(sizes, free) == {"bottom": "cuda:0", "trunk": "cuda:1", "top": "cuda:0"}


def test_spare_memory_is_left() -> None:
    sizes = {"bottom": 0, "trunk": 80, "top": 0}
    assert place_parts(sizes, {"cuda:0": 100}, spare=0.2)["trunk"] == "cuda:0"
    assert place_parts(sizes, {"cuda:0": 100}, spare=0.3)["trunk"] == "cpu"


def test_one_device_for_all() -> None:
    assert {str(device) for device in parse_device_map(None, "meta", None).values()} == {"meta"}


def test_a_map_may_be_in_any_order() -> None:
    found = parse_device_map({"top": "cpu", "bottom": "meta", "trunk": "cpu"}, "cpu", None)
    assert {part: str(device) for part, device in found.items()} == {"bottom": "meta", "trunk": "cpu", "top": "cpu"}


def test_auto_asks_for_sizes() -> None:
    import torch

    found = parse_device_map("auto", "cpu", lambda: {"bottom": 1, "trunk": 2, "top": 1})
    assert list(found) == list(COMPONENTS)
    assert torch.cuda.is_available() or {str(device) for device in found.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ("balanced", r"None, 'auto' or a dict .* got 'balanced'"),
        (3, r"None, 'auto' or a dict .* got 3"),
        ({}, r"the keys \['bottom', 'trunk', 'top'\], got \[\]"),
        ({"bottom": "cpu", "top": "cpu"}, r"got \['bottom', 'top'\]"),
        ({"bottom": "cpu", "trunk": "cpu", "top": "cpu", "head": "cpu"}, "'head'"),
        ({"bottom": "cpu", "trunk": "cpu", "top": "moon"}, r"device_map\['top'\] is 'moon', which is no device"),
        ({"bottom": "cpu", "trunk": None, "top": "cpu"}, r"device_map\['trunk'\] is None"),
    ],
)
def test_what_is_no_map_is_refused(device_map: Any, says: str) -> None:
    with pytest.raises(SplitError, match=says):
        parse_device_map(device_map, "cpu", None)


@pytest.mark.parametrize("device", ["cuda:99", "hpu", "moon", None, -1, 1.5])
def test_devices_that_are_not_there_are_refused(device: Any) -> None:
    with pytest.raises(SplitError, match=f"device is {device!r}"):
        known_device(device)
