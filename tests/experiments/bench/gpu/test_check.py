"""The GPU check runs with tiny sizes on a CPU, and a part that fails, hangs, crashes or lacks a
package costs no other.

What a card measures is not tested here: its streams, kernels and clocks.
"""

import gzip
import json
import signal
import time

import pytest

from experiments.bench.gpu.check import CHECK_PARTS
from scmoe.command_line import call
from scmoe.parallel.checkpoint.durable import process_start
from tests.support.commands import run, running

pytestmark = [pytest.mark.smoke, pytest.mark.ranks]
FILES = {
    *(
        "report.md",
        "results.json",
        "overlap-0.52.png",
        "overlap-0.15.png",
        "forward.png",
        "backward.png",
    ),
    *("pair.json.gz", "step.json.gz"),
}
MISUSED = ("wandb", "timm", "scipy", "optuna")  # packages that the check must not need


@pytest.mark.faults
def test_all_parts_run_on_a_cpu_without_some_packages_and_leave_eight_files(tmp_path):
    out, packages = tmp_path / "out", tmp_path / "packages"
    for name in MISUSED:
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(f"raise ImportError('{name} is not needed')\n")
    script = f"import sys; sys.path.insert(0, {str(packages)!r})\n"
    script += "from scmoe.command_line import call\n"
    script += f"sys.exit(call('bench', 'gpu', '--device', 'cpu', '--tiny', '--out', {str(out)!r}))"
    done = run("-c", script)
    assert done.summary["parts"] == dict.fromkeys(CHECK_PARTS, "ok"), done.err
    assert {path.name for path in out.iterdir()} == FILES
    parts = json.loads((out / "results.json").read_text())["parts"]
    pieces = {name: part["pieces"] for name, part in parts.items()}
    assert (
        pieces["tests"]["gpu tests"]["skipped"] > 20
        and pieces["tests"]["tests of two GPUs"]["skipped"] >= 4
    )
    assert len(pieces["layer"]) == 4 and all(
        len(cell["variants"]) >= 5 for cell in pieces["layer"].values()
    )
    for cell in pieces["layer"].values():
        assert all(
            cell["variants"][name]["train_ratio"] > 0
            for name in ("layer, fixed capacity", "layer, dropless")
        )
    operators = {
        "route",
        "encode",
        "dispatch",
        "experts",
        "combine",
        "decode",
        "attention",
        "mlp",
        "shared_expert",
    }
    assert pieces["step"]["fixed capacity"]["operators_forward_ms"].keys() == operators
    for share in ("0.52", "0.15"):
        report = pieces[f"overlap-{share}"]["rows"]
        assert report["bus_rate"] > 0 and {row["links"] for row in report["rows"].values()} == {
            "bus"
        }
    assert 0.5 < pieces["gpt2"]["training step"]["peak_over_estimate"] < 2
    training = pieces["training"]["training"]
    assert training["loss_last_tenth"] < training["loss_first_tenth"] - 0.5
    for direction in ("forward", "backward"):
        assert all(
            0 <= row["beside"] <= 1 for row in pieces["pictures"]["timelines"][direction].values()
        )
    trace = json.loads(gzip.decompress((out / "pair.json.gz").read_bytes()))
    assert "scmoe/attention" in {event.get("name") for event in trace["traceEvents"]}


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.faults), signal.SIGTERM]
)
def test_a_part_ends_with_the_check(number, tmp_path):
    pid_file = tmp_path / "pid"
    what = f"'tests.support.check_parts:pieces', 300, (), ('hang', {str(pid_file)!r})"
    part = f"CheckPart('Hangs', {what})"
    # a server that runs already imports nothing of what `run_parts` asks for: this part needs none
    code = (
        "from multiprocessing import forkserver; forkserver.ensure_running()\n"
        f"from experiments.engine.isolated import *; run_parts({{'a': {part}}}, Place('cpu', True,"
        " Path()))"
    )
    with running("-c", code) as check:
        while not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.1)
        check.send_signal(number)
        assert check.wait(60) != 0
    while process_start(int(pid_file.read_text())) is not None:
        time.sleep(0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--device cpu", "--device is cpu"),
        ("--device cpu --tiny --parts nothing", "--parts has nothing, allowed: tests | layer"),
        ("--device cpu --tiny --out tests", "--out is 'tests', which is not empty"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, message, capsys):
    assert call("bench", "gpu", *options.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
