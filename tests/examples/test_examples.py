"""The examples run as their first lines say, and do not depend on how the model is cut."""

import re

import pytest
from example_runs import run_as_said, run_in_ranks


def losses(path):
    return [float(line.split()[-1]) for line in path.read_text().splitlines()]


def deit(tmp_path, name, pp, *options):
    path = tmp_path / name
    common = ["--steps-limit", 3, "--depth", 2, "--log-losses", path, "--pp", pp, *options]
    run_in_ranks("train_deit.py", *common, processes=pp if pp > 1 else 0)
    return losses(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of two epochs in one process."""
    found = deit(tmp_path_factory.mktemp("deit"), "whole", 1, "--epochs", 2)
    assert len(found) == 6
    return found


def test_deit_has_the_same_losses_however_it_is_cut(whole, tmp_path):
    options = ["--steps-limit", 3, "--depth", 2, "--schedule", "gpipe", "--microbatches", 4]
    run_as_said("train_deit.py", "--pp", 2, *options, "--epochs", 2, "--log-losses", tmp_path / "cut")
    assert losses(tmp_path / "cut") == pytest.approx(whole, abs=1e-5)


def test_deit_goes_on_where_it_stopped_with_another_number_of_stages(whole, tmp_path):
    folder = ["--output", tmp_path / "run", "--resume", "--epochs", 2]
    # The first run ends after one epoch, because the second one is not reached within --stop-after.
    first = deit(tmp_path, "first", 2, *folder, "--stop-after", 1)
    second = deit(tmp_path, "second", 1, *folder)
    assert first == pytest.approx(whole[:3], abs=1e-5)
    assert second == pytest.approx(whole, abs=1e-5)  # the losses so far are in the checkpoint


@pytest.mark.parametrize("options", [["--amp", "bf16"], ["--mixup", 0], ["--model", "deit_tiny_distilled_patch16_224"]])
def test_deit_options(tmp_path, options):
    assert len(deit(tmp_path, "losses", 2, "--epochs", 1, *options)) == 3


def test_deit_on_an_image_folder(tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for label in "abcdefg":
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (40, 40), (ord(label), 10 * number, 0)).save(folder / f"{number}.png")
    found = deit(tmp_path, "losses", 2, "--epochs", 1, "--data-path", tmp_path, "--batch-size", 8)
    assert len(found) == 3


def test_mlp():
    out = run_as_said("train_mlp.py", processes=2)
    assert float(out.splitlines()[-1].split()[-1].rstrip("%")) > 90


def test_resnet_with_two_replicas():
    out = run_in_ranks("train_resnet.py", "--epochs", 1, "--steps", 3, processes=4)
    assert "epoch 0: top-1" in out


def test_schedules(tmp_path):
    curves = []
    for schedule in ("zb-v", "interleaved-1f1b"):
        picture = tmp_path / f"{schedule}.png"
        out = run_in_ranks("train_schedules.py", "--schedule", schedule, "--epochs", 1, "--draw", picture, processes=2)
        assert picture.stat().st_size > 10_000
        assert f"{schedule}, measured:" in out
        curves.append(re.findall(r"epoch 0: loss [0-9.]+, test accuracy [0-9.]+%", out))
    assert len(curves[0]) == 1
    assert curves[0] == curves[1], "the schedule does not change the numbers"


def test_auto_pipeline_learns_to_count_and_is_saved(tmp_path):
    steps = ["--steps", 20, "--save", tmp_path / "model", "--picture", tmp_path / "schedule.png"]
    said = run_in_ranks("finetune_auto_pipeline.py", *steps, processes=2)
    assert "Stage 1 (last)" in said
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    found = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step ")]
    assert found[-1] < found[0] / 2
    again = run_in_ranks("finetune_auto_pipeline.py", "--steps", 1, "--model", tmp_path / "model")
    first = next(float(line.split()[3]) for line in again.splitlines() if line.startswith("step "))
    assert first < found[-1] * 1.2  # it went on from there
