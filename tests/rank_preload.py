"""What the fork server of `distributed_harness` imports once, so that no rank has to: a rank's imports take 0.5 s else.

Nothing here may start a thread, a process group or a CUDA context: ranks are forks of this process. A module that
cannot be imported is left out; the rank that needs it says so itself.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
from importlib.util import find_spec
from pathlib import Path

_OTHERS = [
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.tensor.parallel",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "timm",
    "pytest",
    "hypothesis",
]
"""What several test files use in their ranks."""


def _modules_of(package: str) -> list[str]:
    """All modules of `package`; found by their files, for importing a package does not import what it holds."""
    spec = find_spec(package)
    [folder] = map(Path, (spec.submodule_search_locations or []) if spec else [])
    files = (file.relative_to(folder.parent).with_suffix("") for file in sorted(folder.rglob("*.py")))
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def _is_free(module: str) -> bool:
    """Whether importing it changes nothing: once `split.parts` is imported, pipelines ask for Bottoms and Tops."""
    return not module.startswith(("torchdistpackage.split.parts", "torchdistpackage.cli", "torchdistpackage.__main__"))


for _name in [*_OTHERS, *filter(_is_free, _modules_of("torchdistpackage"))]:
    with contextlib.suppress(Exception):
        importlib.import_module(_name)
gc.freeze()  # a rank's collector passes over what is here, so it neither reads nor copies these pages
atexit.register(gc.unfreeze)  # else extension modules complain about leaks at the end of the fork server
