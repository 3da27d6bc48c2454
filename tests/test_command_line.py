"""Every verb of the command line answers --help and refuses what it does not know, before torch is
imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.bench.other_settings import InferenceSetting
from scmoe import __version__, command_line
from scmoe.cli.generate import Options as GenerateOptions
from scmoe.command_line import LABORATORY, VERBS, build_app, call, numbers_of, verb_module
from scmoe.config import installation
from scmoe.config.installation import scmoe

ROOT = Path(__file__).parents[1]
SUBVERBS = [
    *(("bench", what) for what in ("layer", "overlap", "train", "inference", "timeline", "gpu")),
    ("simulate", "testbed"),
]
HEAVY = ("torch", "matplotlib", "wandb", "lightning", "scipy", "optuna")
# This program makes calls of `scmoe`, and prints for each one the exit code, what was printed, and
# which heavy packages were imported by then.
WALK = f"""
import contextlib, io, json, sys
sys.path.insert(0, {str(ROOT)!r})
from scmoe import command_line
from scmoe.command_line import call

for words in json.loads(sys.argv[1]):
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = call(*words)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(json.dumps([words, code, out.getvalue(), err.getvalue(), heavy]))
"""


def answers_to(calls: list[list[str]], folder: Path) -> list[list[Any]]:
    """Return words, exit code, standard output, standard error and heavy imports of each call."""
    program = [sys.executable, "-B", "-c", WALK, json.dumps(calls)]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=120)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(calls), done.stderr
    return answers


def test_every_verb_shows_its_help_and_refuses_a_wrong_option_without_torch(tmp_path):
    verbs = [[verb] for verb in VERBS] + [[*words] for words in SUBVERBS]
    calls = [[*words, last] for words in verbs for last in ("--help", "--no-such-option")]
    for (*words, last), code, out, err, heavy in answers_to(calls, tmp_path):
        assert heavy == [], words
        if last == "--help":
            assert (code, err) == (0, "") and out.startswith(f"Usage: scmoe {' '.join(words)}"), (
                words,
                out,
                err,
            )
        else:
            assert (code, out, err.count("\n")) == (2, "", 1), (words, out, err)
            assert err.startswith("error: ") and last in err, (words, err)
    assert not list(tmp_path.iterdir())


WRONG_NAMES = (  # calls that name something that does not exist
    "advise nowhere cluster=8xA30-PCIe",
    "advise nowhere cluster=measure",
    "advise quickstart cluster=nowhere",
    "check-data nowhere",
    "check-data quickstart data.name=text data.path=nowhere",
    "estimate nowhere",
    "train nowhere",
    *(f"{verb} nowhere" for verb in ("evaluate", "export", "generate", "resume")),
    *(f"evaluate run {option} nowhere" for option in ("--text", "--data")),
    "generate run --prompts nowhere --out texts.jsonl",
)


def test_a_name_of_nothing_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "run/checkpoints/step=1.ckpt").mkdir(parents=True)
    calls = [words.split() for words in WRONG_NAMES]
    for words, code, out, err, heavy in answers_to(calls, tmp_path):
        assert (code, out, err.count("\n")) == (2, "", 1), (words, out, err)
        assert "nowhere" in err and heavy == [], (words, err, heavy)


def test_scmoe_lists_its_verbs_and_says_its_version(capsys):
    assert call() == 0
    listed = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")
    ]
    assert [name for name in listed if not name.startswith("-")] == list(VERBS)
    assert call("--version") == 0
    assert capsys.readouterr().out == f"scmoe {__version__}\n"


@pytest.mark.parametrize(
    "words, says",
    [
        *(("tarin", "tarin"), ("bench", "BENCH"), ("bench lier", "lier"), ("runs a b", "b")),
        *(("figure 2", "2"), ("--verison", "--verison")),
        ("bench train --rows top2 data.seq_len=64", "Write key=value before --rows"),
        *(
            (verb, "runs/latest") for verb in ("generate", "evaluate", "export", "resume")
        ),  # a missing run, by example
    ],
)
def test_what_no_verb_can_mean_is_refused_in_one_line(words, says, capsys):
    assert call(*words.split()) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1) and says.upper() in said.err.upper()


@pytest.mark.parametrize("words", [("table", "table3"), ("table", "all")])
def test_a_scale_that_no_table_has_is_refused_before_packages_are_imported(
    words, capsys, monkeypatch
):
    monkeypatch.setattr(f"experiments.{words[0]}.require", None)
    assert call(*words, "--scale", "nonsense") == 2
    assert "--scale is 'nonsense'" in capsys.readouterr().err


OF_GENERATE = f"options={GenerateOptions(prompt='-x', stop=['x', 'y'])}"
OF_INFERENCE = f"setting={InferenceSetting(batch=3, loads=('a', 'b'))}"
OF_TABLE = "options=TableOptions(scale='small', jobs=3, seeds=None, to=None)"


@pytest.mark.parametrize(
    "words, given",
    [
        ("train c.yaml optim.lr=-1 --seed=2", ("c.yaml", "optim.lr=-1", "--seed=2")),
        ("evaluate r a=1 --which best b=2 --limit=3", ("r", "a=1", "b=2", "which=best", "limit=3")),
        ("sweep s.yaml a=1 --local --b=2", ("s.yaml", "a=1", "--b=2", "local=True")),
        ("generate r --stop x a=1 --stop y --prompt -x", ("r", "a=1", OF_GENERATE)),
        (
            "table t --scale smoke a=1 --jobs 3 --scale small",
            ("t", "a=1", OF_TABLE),
        ),  # the last one counts
        ("bench gpu --tiny --parts layer gpt2", ("tiny=True", "parts=['layer', 'gpt2']")),
        ("bench inference --load a --batch 3 --load b", (OF_INFERENCE,)),
    ],
)
def test_overrides_and_options_may_be_mixed(words, given):
    _, bound, _ = build_app(words.split()[0]).parse_args(
        words.split(), exit_on_error=False, print_error=False
    )
    assert (
        *map(str, bound.args),
        *(f"{name}={value}" for name, value in bound.kwargs.items()),
    ) == given


def test_the_next_command_is_named_as_it_works_here(monkeypatch, tmp_path):
    program = tmp_path / "my venv/bin/scmoe"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    # test_extras.py tests which one that is
    monkeypatch.setattr(installation, "own_program", lambda: program)
    monkeypatch.setenv("PATH", "/usr/bin")
    assert scmoe("runs", "a b") == f"'{program}' runs 'a b'"
    monkeypatch.chdir(tmp_path)
    assert scmoe("runs") == "'my venv/bin/scmoe' runs"
    monkeypatch.setenv("PATH", str(program.parent))
    assert scmoe("runs") == "scmoe runs"
    monkeypatch.setattr(installation, "own_program", lambda: None)
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    assert scmoe("runs") == "'my venv/bin/python' -m scmoe runs"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_completes_every_verb(shell):
    script = build_app().generate_completion(shell=shell)
    assert [verb for verb in [*VERBS, *(what for _, what in SUBVERBS)] if verb not in script] == []
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_every_module_of_a_verb_is_a_verb():
    """A verb of the laboratory is also a script: `python -m experiments.VERB` is `scmoe VERB`."""
    modules = {path.stem for path in (ROOT / "scmoe/cli").glob("*.py")} - {"__init__"}
    assert modules == {verb.replace("-", "_") for verb in VERBS if verb not in LABORATORY}
    for verb in LABORATORY:
        script = ROOT / f"{verb_module(verb).replace('.', '/')}.py"
        assert (
            script.read_text(encoding="utf-8").splitlines()[-1]
            == f'    sys.exit(call("{verb}", *sys.argv[1:]))'
        )


def test_a_verb_of_the_laboratory_needs_this_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "CHECKOUT", tmp_path)
    assert call("bench", "layer") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkout" in said
    (tmp_path / "experiments").mkdir()  # another one than Python finds
    assert call("bench", "layer") == 2
    assert "experiments" in capsys.readouterr().err


def test_a_number_may_have_hyphens_as_other_words_may():
    assert numbers_of(["--ep=2", "dp=3", "--optim.lr=1"], ("ep", "dp")) == (
        {"ep": 2, "dp": 3},
        ["--optim.lr=1"],
    )


def test_a_bench_refuses_a_folder_that_cannot_be_written_before_it_measures(
    tmp_path, monkeypatch, capsys
):
    measured = []
    bench = "experiments.bench.overlap.speedups.bench_overlap"
    monkeypatch.setattr(bench, lambda *_: measured.append(1) or {})
    out = tmp_path / "report.json"
    out.touch()
    assert call("bench", "overlap", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --out") and said.count("\n") == 1 and not measured
