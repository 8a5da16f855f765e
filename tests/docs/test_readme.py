"""What the README and the catalogue show is so: snippets train like the plain loop, commands print what is shown."""

import importlib.util
import re
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_harness import run_distributed
from page_session import ROOT, Session, fences, is_run
from torch import nn

from torchdistpackage import schedule
from torchdistpackage.schedule import Op

README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_THE_LOOP, IN_CHUNKS = (fence.text for fence in fences(README) if fence.language == "python")
CRITERION = nn.CrossEntropyLoss()


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(10, 6, generator=generator), torch.arange(10) % 6) for _ in range(3)]


def plain_losses() -> list[float]:
    model, losses = nn.Sequential(*layers()), []
    optimizer = torch.optim.AdamW(model.parameters())
    for samples, targets in batches():
        optimizer.zero_grad()
        losses.append(CRITERION(model(samples), targets))
        losses[-1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return [loss.item() for loss in losses]


def noted(names: dict[str, Any], losses: list[float]) -> Callable[..., Any]:
    """`forward_backward` as the snippet has imported it, with the losses written down beside."""
    from torchdistpackage import forward_backward

    def call(*args: Any, **kwargs: Any) -> Any:
        loss = forward_backward(*args, **kwargs)
        losses.append(None if loss is None else loss.item())
        return loss

    names["forward_backward"] = call
    return call


def in_the_loop(rank: int, world: int) -> list[float | None]:
    names: dict[str, Any] = {"torch": torch, "layers": layers(), "loader": batches(), "criterion": CRITERION}
    losses: list[float] = []
    imports, body = IN_THE_LOOP.split("\n\n", 1)
    exec(imports, names)
    noted(names, losses)
    exec(body, names)
    return losses


def in_chunks(rank: int, world: int) -> float | None:
    from torchdistpackage import forward_backward, partition_chunks, setup_distributed, tpc

    setup_distributed()
    tpc.setup_process_groups([("pipe", world)])
    (samples, targets), *_ = batches()

    def make_fwd_fn(module: nn.Module, is_last: bool) -> Callable[..., Any]:
        return (lambda x: CRITERION(module(x[0]), x[1])) if is_last else module

    names = {"partition_chunks": partition_chunks, "forward_backward": forward_backward, "make_fwd_fn": make_fwd_fn}
    names |= {"layers": layers(), "samples": samples, "targets": targets, "optimizer": None}
    exec(IN_CHUNKS, names)
    return None if names["loss"] is None else names["loss"].item()


def test_the_loop_has_the_losses_of_the_plain_loop() -> None:
    first, last = run_distributed(in_the_loop, 2)
    assert first == [None] * 3
    assert last == pytest.approx(plain_losses(), rel=1e-6)


def test_chunks_have_the_loss_of_the_plain_loop() -> None:
    first, last = run_distributed(in_chunks, 2)
    assert first == pytest.approx(plain_losses()[0], rel=1e-6)  # in a v the first rank has the last stage
    assert last is None


def test_commands_print_what_stands_there(tmp_path: Path) -> None:
    session = Session("README.md", tmp_path)
    shown = [fence for fence in fences(README) if fence.language == "console" and is_run(fence)]
    assert len(shown) >= 2
    for fence in shown:
        assert session.run(fence)


def rows() -> dict[str, list[str]]:
    """The table of schedules: name -> the other cells."""
    found = re.findall(r"^\| `([\w-]+)` \| (.*) \|$", README, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in found if name in schedule.names()}


def test_the_table_has_every_schedule() -> None:
    assert sorted(rows()) == sorted(schedule.names())


@pytest.mark.parametrize("name", schedule.names())
def test_the_table_has_the_facts_of_the_schedule(name: str) -> None:
    _, bubble, memory, messages = rows()[name]
    facts = schedule.describe(name)
    assert memory == facts.memory
    assert bubble.replace("`1f1b`", "1F1B").replace("hides the hops", "hides hops") == facts.bubble
    p, m = 4, 8
    plan = schedule.build(name, p, m)
    sent = sum(action.op in (Op.SEND_F, Op.SEND_B) for row in plan.actions for action in row)
    formula = re.sub(r"(?<=[0-9a-z])(?=[a-z(])", "*", messages)
    assert eval(formula, {"p": p, "m": m, "v": plan.placement.num_stages // p}) == sent


def test_the_catalogue_has_the_facts_of_every_schedule() -> None:
    page = (ROOT / "docs" / "concepts" / "catalogue.md").read_text(encoding="utf-8")
    for name in schedule.names():
        facts = schedule.describe(name)
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert f"Bubble {facts.bubble}; memory {facts.memory}. {facts.source}.\n" in section
        assert f"(../pictures/{name}.svg)" in section


def test_every_file_has_its_line() -> None:
    loader = SourceFileLoader("tree", str(ROOT / "scripts" / "tree"))
    tree = importlib.util.module_from_spec(importlib.util.spec_from_loader("tree", loader))
    loader.exec_module(tree)
    assert tree.with_tree(README) == README, "run scripts/tree --write"


def test_pictures_and_pages_that_it_refers_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", README):
        assert (ROOT / target).exists(), target
    for path in re.findall(r"`((?:examples|docs|benchmarks|tests|scripts)/[\w/.-]+)`", README):
        assert (ROOT / path).exists(), path
