"""Every command: that it is there, that it starts without torch, and what it prints."""

import json
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from torchdistpackage import schedule
from torchdistpackage.cli.commands import torchdistpackage

COMMANDS = ["", "schedule", "comm-check"]
COMMANDS += [f"schedule {name}" for name in ("list", "show", "verify", "simulate", "trace", "plan")]


def run(*arguments, **options):
    return CliRunner(env={"COLUMNS": "100"}).invoke(torchdistpackage, arguments, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "\n  torchdistpackage " in result.output
    assert "\b" not in result.output


def test_list_has_a_line_for_each_schedule():
    lines = run("schedule", "list").output.splitlines()
    assert lines[0].split() == ["name", "chunks", "placement", "split", "bubble", "memory", "source"]
    assert [line.split()[0] for line in lines[1:-3]] == list(schedule.names())
    (line,) = [line for line in lines if line.startswith("zb-h1")]
    assert " ".join(line.split()) == "zb-h1 1 loop yes (p-1)(F+I-W) p Qi et al. 2023, Zero Bubble Pipeline Parallelism"


def test_show_draws_the_grid():
    assert run("schedule", "show", "1F1B", "-p", "2", "-m", "2", "--width", "36").output.splitlines() == [
        "1f1b: makespan 9 (F = I = W = 1, B = 2), bubble 33.3%",
        "time    0              5",
        "rank 0  F0 F1       B0---    B1---",
        "rank 1     F0 B0--- F1 B1---",
        "",
        "F forward   B backward   empty: idle",
    ]


def test_show_lists_actions():
    shown = run("schedule", "show", "1f1b", "-p", "2", "-m", "2", "--text").output
    assert shown == "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n"
    assert "0SEND_F0" in run("schedule", "show", "gpipe", "--communication").output
    assert (
        run("schedule", "show", "1f1b", "-m", "2", "-p", "1", "--text", "--forward-only").output == "rank 0: 0F0 0F1\n"
    )


@pytest.mark.parametrize("communication", [(), ("--communication",)])
@pytest.mark.parametrize("name", schedule.names())
def test_csv_goes_round(tmp_path, name, communication):
    text = run("schedule", "show", name, "--csv", *communication).output
    path = tmp_path / "mine.csv"
    path.write_text(text)
    assert run("schedule", "show", str(path), "--csv", *communication).output == text
    assert run("schedule", "verify", str(path)).output == run("schedule", "verify", "-", input=text).output.replace(
        "stdin:", "mine:"
    )


def test_verify_says_what_was_proved():
    result = run("schedule", "verify", "-", input="0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "stdin: proved as a training step: 2 ranks, 2 stages, 2 micro-batches, 8 actions, 4 messages (added)",
        "rank  stages  actions  peak activations",
        "   0  0             4                 2",
        "   1  1             4                 1",
    ]


def test_verify_marks_what_is_wrong():
    result = run("schedule", "verify", "-", input="0B0,0F0\n")
    assert result.exit_code == 1
    assert result.stderr.endswith("rank 0: >>0B0<< 0F0\n")
    assert result.stdout == ""


def test_simulate_has_a_row_for_each_rank():
    result = run("schedule", "simulate", "1f1b", "-p", "2", "-m", "2", "--hop", "0.5", "--weight-grad", "0")
    assert result.output.splitlines()[0] == "1f1b: makespan 7, bubble 42.9%"
    assert result.output.splitlines()[-3:] == [
        "rank  busy  bubble  share  peak held",
        "   0     4       3  42.9%          2",
        "   1     4       3  42.9%          1",
    ]


def test_a_head_makes_the_last_stage_longer():
    plain, headed = (
        run("schedule", "simulate", "zb-v", "-p", "2", "-m", "4", *head).output for head in ((), ("--head", "0.5"))
    )
    assert "zb-v: makespan 12.5" in plain
    assert [row.split()[1] for row in headed.splitlines()[-2:]] == ["18", "12"]  # rank 0 has both ends of the v


def test_costs_come_from_a_file(tmp_path):
    path = tmp_path / "costs.json"
    costs = {
        "forward": [0.01, 0.02],
        "input_grad": [0.01, 0.02],
        "weight_grad": [0.01, 0.02],
        "hop": 0.001,
        "unit": "s",
    }
    path.write_text(json.dumps({**costs, "activation_bytes": [1e9, 2e9]}))
    result = run("schedule", "simulate", "1f1b", "-p", "2", "-m", "1", "--costs", str(path))
    assert result.output.startswith("1f1b: makespan 92 ms")
    assert result.output.splitlines()[-2].split() == ["0", "30", "ms", "62", "ms", "67.4%", "953.7", "MiB"]


def test_pictures_and_traces_are_written(tmp_path):
    picture, trace = tmp_path / "plan.svg", tmp_path / "plan.json"
    result = run("schedule", "show", "1f1b", "-p", "2", "-m", "2", "--figure", str(picture))
    assert result.stderr == f"wrote {picture}\n"
    assert picture.read_text().startswith("<?xml")
    assert run("schedule", "trace", "1f1b", "-p", "2", "-m", "2", "-o", str(trace)).exit_code == 0
    assert len(json.loads(trace.read_text())["traceEvents"]) > 8


def test_plan_finds_one_and_writes_it(tmp_path):
    path = tmp_path / "best.csv"
    result = run("schedule", "plan", "-p", "2", "-m", "4", "--hop", "0.1", "--memory-limit", "2", "-o", str(path))
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["candidate", "makespan", "peak", "held"]
    assert ["gpipe", "-", "4", "over", "the", "limit"] in lines
    names = [line.split("  ")[0] for line in result.stdout.splitlines()[1:-2]]
    assert len(names) == len(set(names)) > 10
    chosen = re.search(r"makespan ([\d.]+), lower bound ([\d.]+), ratio ([\d.]+)$", result.stdout.strip())
    makespan, bound, ratio = map(float, chosen.groups())
    assert makespan == float(lines[1][1]) == pytest.approx(bound * ratio, rel=1e-3)
    timed = run("schedule", "simulate", str(path), "--hop", "0.1")
    assert f"makespan {makespan:g}" in timed.output


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("show zigzag", 1, "known schedules: 1f1b, "),
        ("show no.csv", 1, "cannot read no.csv: No such file or directory"),
        ("show 1f1b --chunks 3", 1, "schedules that can"),
        ("show 1f1b -m 0", 2, "0 is not in the range"),
        ("show 1f1b --csv --text", 2, "choose one"),
        ("show 1f1b --figure plan.jpg", 1, "end the path in .png, .svg, .pdf"),
        ("simulate 1f1b --hop -1", 1, "hop[0] is -1.0"),
        ("simulate 1f1b --costs x.json --hop 1", 2, "leave --hop out"),
        ("simulate 1f1b --costs x.json", 1, "cannot read x.json"),
        ("simulate 1f1b --forward 0 --input-grad 0 --weight-grad 0", 1, "nothing to see"),
        ("trace 1f1b -o no/such/folder.json", 1, "No such file or directory"),
        ("plan -p 4 --chunks 2 --costs {costs}", 2, "2 chunks on 4 ranks, but the costs are those of 2 stages"),
        ("plan --memory-limit 0.1", 1, "no schedule fits memory_limit=0.1"),
        ("simulate 1f1b --costs {costs}", 1, "the costs are those of 2 stages"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(tmp_path, arguments, code, says):
    path = tmp_path / "costs.json"
    path.write_text('{"forward": [1, 1], "input_grad": [1, 1], "weight_grad": [1, 1]}')
    result = run("schedule", *arguments.format(costs=path).split())
    assert result.exit_code == code
    assert says in result.stderr
    assert result.stderr.startswith("Error: ") == (code == 1)
    assert result.stdout == ""


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"forward": [1]}', '{"forward": 1, "input_grad": [1], "weight_grad": [1]}']
)
def test_costs_that_are_none(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text)
    result = run("schedule", "simulate", "1f1b", "-p", "1", "--costs", str(path))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "costs.json" in result.stderr


def test_a_file_has_its_own_sizes():
    result = run("schedule", "show", "-", "-p", "3", input="0F0,0B0\n")
    assert result.exit_code == 2
    assert "--ranks is 3, but - has 1" in result.stderr


@pytest.mark.parametrize("command", ["list", "show 1f1b", "simulate zb-v --hop 0.1", "verify --help", "plan --help"])
def test_commands_start_without_what_they_do_not_need(command):
    code = f"import sys; sys.argv = ['torchdistpackage', 'schedule', *{command.split()}]\n"
    code += "from torchdistpackage.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    assert not {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("command", ["comm-check --nproc 2", "split timm:some_model -p 2 -i 4x3x8x8"])
def test_a_command_says_that_it_needs_torch_where_there_is_none(command):
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['torchdistpackage', *{command.split()}]\n"
    code += "from torchdistpackage.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: this command needs torch: pip install torch\n"
