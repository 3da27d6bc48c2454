"""Checks of the simulator predict reports, and name what is not measured."""

import json

from experiments.simulate.testbed_checks import CHECKS
from scmoe.command_line import build_app, call


def test_what_is_not_measured_is_named_with_its_command(tmp_path, capsys):
    assert call("simulate", "testbed", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert [*report["not_measured"]] == [check.name for check in CHECKS]
    for check in CHECKS:
        for command in check.commands:
            assert command in err
    assert call("simulate", "testbed", str(tmp_path / "missing")) == 2


def test_commands_of_the_checks_are_ones_that_the_bench_takes():
    for check in CHECKS:
        for command in check.commands:
            words = command.split()[1:]
            build_app("bench").parse_args(words, exit_on_error=False, print_error=False)
