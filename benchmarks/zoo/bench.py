"""Cuts the models of torchvision and timm into stages and compares the stages with the model.

    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/zoo/bench.py                     # what results.csv does not have yet
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/zoo/bench.py --only resnet18     # of these models (or '*vit*')
    OMP_NUM_THREADS=1 nice -n 19 python benchmarks/zoo/bench.py --again failed      # those that failed, or all, again
    python benchmarks/zoo/bench.py --table                                          # the README's tables

Every model runs in a process of its own with a time-out and a limit of memory, so that a crash is one failed row. A row
is written as soon as it is known; the next run goes on where this one was ended.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from checks import Reference, Row, check
from models import CATALOGUE, Entry

_NAMES = [item.name for item in fields(Row)]


def worked(connection: Connection, entry: Entry, stages: list[int], options: argparse.Namespace) -> None:
    """Of one model, in a process of its own: sends its rows."""
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory << 30, options.memory << 30))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        reference = Reference(entry.build(), entry.shape, entry.rows, options.schedule)
    except Exception as error:
        for count in stages:
            reason = f"in one piece: {type(error).__name__}: {error}"[:300]
            connection.send(Row(entry.family, entry.name, count, False, reason=reason))
        return
    for count in stages:
        connection.send(check(reference, entry.family, entry.name, count, options.costs))


def rows_of(entry: Entry, stages: list[int], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one model, as they come, whatever happens to its process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=worked, args=(theirs, entry, stages, options))
    process.start()
    theirs.close()
    reason = ""
    for count in stages:
        if not reason:
            try:
                if ours.poll(options.timeout):
                    yield ours.recv()
                    continue
                reason = f"not finished after {options.timeout:.0f} s"
            except EOFError:
                process.join()
                reason = f"its process ended with code {process.exitcode}"
        process.kill()
        yield Row(entry.family, entry.name, count, False, reason=reason)
    process.join()


def read(path: Path) -> list[dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]], mode: str) -> None:
    """All rows, or some more."""
    new = mode == "w" or not path.exists()
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, _NAMES, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def in_order(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """By family, model and number of stages; of two rows of the same the later one."""
    latest = {(row["family"], row["model"], int(row["stages"])): row for row in rows}
    return [row for _, row in sorted(latest.items())]


def run(options: argparse.Namespace) -> None:
    """What is missing."""
    known = {(row["model"], int(row["stages"])): row["passed"] == "True" for row in in_order(read(options.results))}
    entries = [e for e in CATALOGUE if not options.only or any(fnmatch.fnmatch(e.name, p) for p in options.only)]
    began = time.perf_counter()
    for number, entry in enumerate(entries, start=1):
        missing = [
            count
            for count in options.stages
            if (entry.name, count) not in known
            or options.again == "all"
            or (options.again == "failed" and not known[entry.name, count])
        ]
        for row in rows_of(entry, missing, options) if missing else ():
            write(options.results, [row.as_text()], "a")
            balance = "" if row.balance is None else f"{row.balance:.2f}"
            done, verdict = f"{number:3}/{len(entries)}", "ok" if row.passed else row.reason
            print(
                f"{time.perf_counter() - began:6.0f} s {done} {row.model:48} {row.stages} {balance:4} {verdict}",
                flush=True,
            )
    write(options.results, in_order(read(options.results)), "w")


def beyond(row: dict[str, str]) -> float:
    """How much slower the slowest stage is than that of the best cut of the same pieces."""
    return float(row["balance"]) / float(row["optimum"]) - 1 if row["optimum"] else 0.0


def summary(rows: list[dict[str, str]]) -> list[str]:
    """One line a family and number of stages."""
    lines = [
        "| family | stages | right / all | balance: median | worst | beyond best, worst | s, median | with skips |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, int], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["family"], int(row["stages"])), []).append(row)
    for (family, stages), mine in sorted(groups.items()):
        head, right = f"| {family} | {stages} |", [row for row in mine if row["passed"] == "True"]
        if not right:
            lines.append(f"{head} 0 / {len(mine)} | | | | | |")
            continue
        worst = max(right, key=lambda row: float(row["balance"]))
        balance = statistics.median(float(row["balance"]) for row in right)
        seconds = statistics.median(float(row["seconds"]) for row in right)
        lines.append(
            f"{head} {len(right)} / {len(mine)} | {balance:.2f} | {float(worst['balance']):.2f} (`{worst['model']}`) | "
            f"{max(map(beyond, right)):.1%} | {seconds:.1f} | {sum(row['skips'] != '0' for row in right)} |"
        )
    return lines


def table(rows: list[dict[str, str]]) -> list[str]:
    """The summary, then a line for each model."""
    counts = sorted({row["stages"] for row in rows}, key=int)
    lines = [
        *summary(rows),
        "",
        "| model | input | parameters | " + " | ".join(f"balance, {n} stages" for n in counts) + " | skips |",
        "| --- | --- | --- |" + " --- |" * (len(counts) + 1),
    ]
    models: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        models.setdefault((row["family"], row["model"]), {})[row["stages"]] = row
    for (_, name), mine in sorted(models.items()):
        last = mine[max(mine, key=int)]
        size = f"{int(last['parameters']) / 1e6:.1f} M" if last["parameters"] else ""
        cells = " | ".join(cell_of(mine[count]) if count in mine else "" for count in counts)
        lines.append(f"| `{name}` | {last['input']} | {size} | {cells} | {last['skips']} |")
    return lines


def cell_of(row: dict[str, str]) -> str:
    """The balance of a row; behind it the optimum, if that is less."""
    if row["passed"] != "True":
        return "**no**"
    balance, best = (f"{float(row[name] or row['balance']):.2f}" for name in ("balance", "optimum"))
    return balance if balance == best else f"{balance} ({best})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, or patterns of names")
    parser.add_argument("--again", choices=["failed", "all"], help="what is known already, too")
    parser.add_argument("--table", action="store_true", help="print the tables of results.csv and run nothing")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--costs", choices=["time", "flops", "parameters"], default="time")
    parser.add_argument("--schedule", default="1f1b", help="of the training step; '' runs the stages in turn")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each row")
    parser.add_argument("--memory", type=int, default=14, help="GiB for each model")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    if options.table:
        sys.stdout.write("\n".join(table(in_order(read(options.results)))) + "\n")
        return
    run(options)


if __name__ == "__main__":
    main()
