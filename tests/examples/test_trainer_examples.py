"""The examples of the trainer: two processes print the losses of one, and TensorBoard has every number."""

import contextlib
import importlib.util
import io
import re
import sys

import pytest
from distributed_harness import run_distributed
from example_runs import EXAMPLES

pytest.importorskip("tensorboard")

SHORT = {
    "trainer_vision": ["max_steps=3", "per_device_train_batch_size=8", "eval_strategy=no", "logging_steps=1"],
    "trainer_language": [
        "max_steps=3", "per_device_train_batch_size=4", "logging_steps=1", "eval_steps=3", "max_eval_steps=2",
    ],
}  # fmt: skip


def example(rank, world, name, words):
    """What the example prints here; torchrun is not needed for it."""
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [name, *words]
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return shown.getvalue()


def scalars(folder):
    """Every number of TensorBoard's files: tag -> values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", [pytest.param("trainer_vision", marks=pytest.mark.slow), "trainer_language"])
def test_two_processes_show_the_numbers_of_one(name, tmp_path):
    if name == "trainer_vision":
        pytest.importorskip("timm")
    else:
        pytest.importorskip("transformers")
    found = []
    for world in (1, 2):
        words = [*SHORT[name], f"output_dir={tmp_path / str(world)}"]
        texts = run_distributed(example, world, name, words, timeout=70)
        [shown] = [text for text in texts if "step 3/3" in text]
        assert re.search(r"lr .*grad norm .*bubble [0-9.]+%.*memory", shown), shown
        found.append(scalars(tmp_path / str(world) / "runs"))
        assert (tmp_path / str(world) / "step-00000003" / "manifest.json").is_file() or name == "trainer_vision"
    for tag in ("train/loss", "train/learning_rate", "train/grad_norm"):
        assert len(found[0][tag]) == 3
        assert found[1][tag] == pytest.approx(found[0][tag], rel=1e-4)
    speed = {"trainer_vision": "train/samples_per_second", "trainer_language": "train/tokens_per_second"}[name]
    assert {speed, "train/bubble_share", "train/peak_memory_bytes"} <= found[1].keys()


def test_the_examples_are_short():
    for name in SHORT:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40
