"""On which device each part goes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from torchdistpackage.errors import SplitError
from torchdistpackage.split.parts.metadata import COMPONENTS

__all__ = ["free_memory", "known_device", "parse_device_map", "place_parts"]


def place_parts(sizes: Mapping[str, int], free: Mapping[str, int], *, spare: float = 0.1) -> dict[str, str]:
    """The placement whose fullest device is the least full; where several are, the one with the fewest devices.

    Args:
        sizes: Part -> bytes.
        free: Device -> bytes that are free, in the order of preference; "cpu" takes what fits nowhere else.
        spare: Share of a device that activations and caches are to have.

    Returns:
        Part -> device.

    Example:
        >>> place_parts({"bottom": 2, "trunk": 9, "top": 3}, {"cuda:0": 10, "cuda:1": 20})
        {'bottom': 'cuda:0', 'trunk': 'cuda:1', 'top': 'cuda:0'}
        >>> place_parts({"bottom": 2, "trunk": 90, "top": 3}, {"cuda:0": 10})
        {'bottom': 'cuda:0', 'trunk': 'cpu', 'top': 'cuda:0'}
    """
    names, limits = list(sizes), {**free, "cpu": float("inf")}
    best: tuple[Any, tuple[str, ...]] | None = None
    for devices in itertools.product(limits, repeat=len(names)):  # 9 devices: 729 ways
        load = dict.fromkeys(devices, 0)
        for name, device in zip(names, devices, strict=True):
            load[device] += sizes[name]
        if any(load[device] > limits[device] * (1 - spare) for device in load):
            continue
        shares = [load[device] / limits[device] for device in load if device != "cpu" and load[device]]
        fullest = max(shares, default=0.0)
        rank = (load.get("cpu", 0), round(fullest, 6), len(load), [list(limits).index(device) for device in devices])
        if best is None or rank < best[0]:
            best = rank, devices
    assert best is not None  # everything on the CPU is always possible
    return dict(zip(names, best[1], strict=True))


def free_memory() -> dict[str, int]:
    """Accelerator -> bytes that are free; nothing on a machine without."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {f"cuda:{index}": torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}


def parse_device_map(device_map: Any, device: Any, sizes: Any) -> dict[str, Any]:
    """Part -> device.

    Args:
        device_map: None, "auto", or a dict with an entry for each part.
        device: For all parts, where device_map is None.
        sizes: Called for "auto": gives part -> bytes.

    Raises:
        SplitError: It is none of these, a part is missing or unknown, or there is no such device.

    Example:
        >>> parse_device_map({"bottom": "cpu", "trunk": "meta", "top": "cpu"}, "cpu", None)
        {'bottom': device(type='cpu'), 'trunk': device(type='meta'), 'top': device(type='cpu')}
    """
    if device_map is None:
        return dict.fromkeys(COMPONENTS, known_device(device, "device"))
    if isinstance(device_map, str) and device_map == "auto":
        return {part: known_device(found, "device_map") for part, found in place_parts(sizes(), free_memory()).items()}
    if not isinstance(device_map, Mapping):
        raise SplitError(
            f"device_map must be None, 'auto' or a dict {{'bottom': ..., 'trunk': ..., 'top': ...}}, got {device_map!r}"
        )
    if set(device_map) != set(COMPONENTS):
        raise SplitError(f"device_map must have the keys {list(COMPONENTS)}, got {list(device_map)}")
    return {part: known_device(device_map[part], f"device_map[{part!r}]") for part in COMPONENTS}


def known_device(value: Any, what: str = "device") -> Any:
    """The device that an argument means.

    Raises:
        SplitError: There is no such device here.
    """
    import torch

    if value is None:
        raise SplitError(f"{what} is None; say 'cpu', 'cuda', 'cuda:1' or another device of torch")
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise SplitError(f"{what} is {value!r}, which is no device of torch: {reason}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise SplitError(f"{what} is {value!r}; this machine has {count} CUDA devices")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each backend has its own way to say that it is not there
        reason = str(error).splitlines()[0]
        raise SplitError(f"{what} is {value!r}, which this machine does not have: {reason}") from error
    return device
