"""Bottom, Trunk and Top of one pipeline: do they belong together? `split/parts/` makes them, one process at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from torchdistpackage.errors import SplitError
from torchdistpackage.parallel.pipeline_state import guarded
from torchdistpackage.split.parts.base import BaseSplitModel
from torchdistpackage.split.parts.configuration import num_layers_of
from torchdistpackage.topology import tpc
from torchdistpackage.topology.exchange import gather_json

__all__ = ["check_parts"]

_OF_THE_COPY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def check_parts(parts: BaseSplitModel | Mapping[int, BaseSplitModel]) -> None:
    """Raises, on every rank, unless the parts of a pipeline are of one model and hold each of its layers once.

    Nothing else would notice a layer that is missing, or a Top of another model. Collective over the pipeline group.

    Args:
        parts: This rank's part, or {index of the stage: part} where it has several.

    Raises:
        SplitError: They do not join, do not begin with a Bottom or end with a Top, or their configurations differ.
        PipelineError: Another rank has failed.

    Example:
        On each of three ranks::

            part = ModelFactory.create_split_models("gpt2", directory, 4, 8, parts=[name])[name]  # "bottom", ...
            check_parts(part)
            loss = forward_backward(optimizer, fwd_fn, None, inputs, num_microbatches=4)
    """
    own = parts if isinstance(parts, Mapping) else {tpc.get_pp_rank(): parts}
    with guarded("check_parts"):
        facts = [[index, *_facts(part)] for index, part in own.items()]
        everyone = gather_json(facts, tpc.get_control_group("pipe")) if tpc.get_pp_size() > 1 else [facts]
    found = sorted(fact for theirs in everyone for fact in theirs)
    held = ", ".join(f"{component} {start}..{end - 1}" for _, component, start, end, *_ in found)
    total = found[0][4] if found else 0
    if [index for index, *_ in found] != list(range(len(found))):
        raise SplitError(f"the ranks have parts for the stages {[index for index, *_ in found]}: {held}")
    if any(one[3] != other[2] for one, other in itertools.pairwise(found)):
        raise SplitError(
            f"the layers of the parts do not join: {held}; cut one model once, and load what belongs together"
        )
    if not found or found[0][2] != 0 or found[-1][3] != total:
        raise SplitError(f"the parts are not all of a model of {total} layers: {held or 'none'}")
    if len({digest for *_, digest in found}) > 1:
        raise SplitError(f"the parts are of different models, their configurations differ: {held}")


def _facts(part: BaseSplitModel) -> list[Any]:
    config = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(vars(part.config))
    same = {name: value for name, value in config.items() if name not in _OF_THE_COPY}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
    return [part.component, part.start_layer, part.end_layer, num_layers_of(part.config), digest]
