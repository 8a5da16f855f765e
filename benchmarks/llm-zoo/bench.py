"""Cuts the language models of transformers into stages and compares the stages with the model.

    python benchmarks/llm-zoo/bench.py                      # all families; takes some minutes on two cores
    python benchmarks/llm-zoo/bench.py llama 'gemma*'       # of these; the other rows of results.csv stay
    python benchmarks/llm-zoo/bench.py --table              # the README's tables

Every family runs in a process of its own with a time-out, so that a crash is one row. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from checks import Reference, Row, check
from models import build, families

_NAMES = [item.name for item in fields(Row)]
LAYERS = 5  # neither 2 nor 4 divide it
VERDICTS = ("WRONG", "not run", "refused", "exact")  # the worst first


def worked(connection: Connection, family: str, stages: list[int], layers: int) -> None:
    """Of one family, in a process of its own: sends its rows."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        reference = Reference(family, build(family, layers))
    except Exception as error:
        reason = " ".join(f"in one piece: {type(error).__name__}: {error}".split())[:400]
        for count in stages:
            connection.send(Row(family, count, verdict="not run", reason=reason))
        return
    for count in stages:
        connection.send(check(reference, count))


def rows_of(family: str, options: argparse.Namespace) -> Iterator[Row]:
    """The rows of one family, as they come, whatever happens to its process."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    arguments = (theirs, family, options.stages, options.layers)
    process = multiprocessing.get_context("fork").Process(target=worked, args=arguments)
    process.start()
    theirs.close()
    reason = ""
    for count in options.stages:
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
        yield Row(family, count, verdict="WRONG", reason=reason)
    process.join()


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows so far."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["family"], row["stages"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[tuple[str, str], dict[str, str]]) -> None:
    """All rows, in the order of the families."""
    order = {name: number for number, name in enumerate(families())}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _NAMES, lineterminator="\n")
        writer.writeheader()
        for key in sorted(rows, key=lambda key: (order.get(key[0], len(order)), int(key[1]))):
            writer.writerow(rows[key])


def run(options: argparse.Namespace) -> bool:
    """What is asked for; whether nothing was wrong."""
    rows, began, good = read(options.results), time.perf_counter(), True
    chosen = [name for name in families() if not options.only or any(fnmatch.fnmatch(name, p) for p in options.only)]
    for number, family in enumerate(chosen, start=1):
        for row in rows_of(family, options):
            rows[row.family, str(row.stages)] = row.as_text()
            write(options.results, rows)
            good &= row.verdict != "WRONG"
            seconds, done = time.perf_counter() - began, f"{number:3}/{len(chosen)}"
            print(f"{seconds:6.0f} s {done} {family:24} {row.stages} {row.verdict:8} {row.reason}", flush=True)
    return good


def table(rows: Iterable[dict[str, str]]) -> list[str]:
    """The counts, a line for each family that was cut, and what the others were told."""
    mine: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        mine.setdefault(row["family"], {})[row["stages"]] = row
    verdicts = [verdict_of(cuts) for cuts in mine.values()]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts))]
    stages = sorted({count for cuts in mine.values() for count in cuts}, key=int)
    heads = [f"{what}, p = {count}" for what in ("logits", "gradients", "cached steps") for count in stages]
    lines = [
        f"{len(mine)} families: {', '.join(counts)}.",
        "",
        f"| family | layers | sent besides the hidden state | {' | '.join(heads)} | 1F1B | verdict |",
        "| --- | --- | --- |" + " --- |" * (len(heads) + 2),
    ]
    for family, cuts in mine.items():
        if verdict_of(cuts) == "refused":
            continue
        cells = [cuts[n][what] if n in cuts else "" for what in ("logits", "gradients", "cache") for n in stages]
        sent = " ".join(dict.fromkeys(word for row in cuts.values() for word in row["sent"].split()))
        layers, runtime = (", ".join(row[what] for row in cuts.values() if row[what]) for what in ("cuts", "runtime"))
        lines.append(f"| `{family}` | {layers} | {sent} | {' | '.join(cells)} | {runtime} | {verdict_of(cuts)} |")
    told = {(family, verdict_of(cuts), row["reason"]): None for family, cuts in mine.items() for row in cuts.values()}
    return [*lines, "", *(f"- `{family}` ({verdict}): {reason}" for family, verdict, reason in told if reason)]


def verdict_of(cuts: dict[str, dict[str, str]]) -> str:
    """Of a family: the worst of its cuts."""
    found = {row["verdict"] for row in cuts.values()}
    return next(verdict for verdict in VERDICTS if verdict in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", metavar="FAMILY", help="these families, or patterns of names")
    parser.add_argument("--table", action="store_true", help="print the tables of results.csv and run nothing")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each row")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.csv"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.table:
        sys.stdout.write("\n".join(table(read(options.results).values())) + "\n")
        return
    if not run(options):
        sys.exit(1)


if __name__ == "__main__":
    main()
