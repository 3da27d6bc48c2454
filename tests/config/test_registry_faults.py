"""What a run keeps runs nothing; an extension that cannot be used is named in one line."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import pytest

import scmoe
from experiments.engine.ranks import run_ranks
from scmoe.config.installation import scmoe as scmoe_command
from scmoe.config.leaves import ConfigError
from scmoe.config.load import load_config
from scmoe.config.registry import ARCHITECTURES, CALLBACKS, DATASETS, FAMILIES, OPTIMIZERS
from scmoe.training.assembly.model import build_model_on_meta
from scmoe.training.run.output import open_output
from scmoe.training.run.resume import Resumed
from tests.support.commands import Done, command_here

pytestmark = [pytest.mark.faults, pytest.mark.representative]

TINY = ("configs/debug.yaml", "trainer.max_steps=2", "trainer.progress=false", "trainer.threads=1")
GOOD = """
import os, scmoe
from lightning.pytorch import Callback
open(os.environ["PROOF"], "a").write("imported ")

@scmoe.register_callback("NAME")
class Noted(Callback):
    def __init__(self, every=1):
        open(os.environ["PROOF"], "a").write(f"called with {every} ")
"""


class Modules:
    """A folder of extensions, which a process can import, and what they have done."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.proof, self.names = folder / "modules", folder / "proof", list[str]()
        self.folder.mkdir()

    def write(self, name: str, text: str = GOOD) -> str:
        (self.folder / f"{name}.py").write_text(text.replace("NAME", name))
        self.names.append(name)
        return name

    def forget(self) -> None:
        """Make this process one that has imported no extension."""
        for name in self.names:
            sys.modules.pop(name, None)
        for registry in (ARCHITECTURES, CALLBACKS, DATASETS, FAMILIES, OPTIMIZERS):
            registry.makers = {
                name: make
                for name, make in registry.makers.items()
                if make is not print and name not in self.names
            }
            registry.images = [name for name in registry.images if name in registry.makers]

    def done(self) -> str:
        """Return what was done since the last call."""
        text = self.proof.read_text() if self.proof.exists() else ""
        self.proof.unlink(missing_ok=True)
        return text.strip()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    made = Modules(tmp_path)
    monkeypatch.syspath_prepend(str(made.folder))
    monkeypatch.setenv("PROOF", str(made.proof))
    yield made
    made.forget()


def test_what_a_run_keeps_is_not_imported_and_its_callbacks_do_not_run(tmp_path):
    run_ranks(train_and_use, 1, tmp_path)


def train_and_use(rank: int, world_size: int, folder: Path) -> None:
    def command(verb: str, *arguments: str) -> Done:
        return command_here(rank, world_size, verb, arguments, {"PROOF": str(modules.proof)})

    modules = Modules(folder)
    sys.path.insert(0, str(modules.folder))
    name, done = modules.write("trained_with"), modules.done
    named = (f"extensions=[{name}]", f"callbacks.{name}.every=7")
    trained = command("train", *TINY, f"runs_dir={folder}/runs", *named)
    assert (trained.code, done()) == (0, "imported called with 7"), trained.err
    assert f"trainer.max_steps=4 '{named[0]}' {named[1]}" in trained.err
    run, file = str(folder / "runs/latest"), str(folder / "model.safetensors")
    exported = command("export", run, "--out", file)
    assert (exported.code, done()) == (0, ""), "the program has imported it already"
    resume = (run, "trainer.max_steps=3", "trainer.progress=false")

    modules.forget()
    verbs = [(verb, (run,)) for verb in ("evaluate", "export", "generate")]
    for verb, arguments in (*verbs, ("generate", (file,)), ("resume", resume)):
        refused = command(verb, *arguments)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1), refused.err
        assert f"if you trust {name}, add extensions=[{name}] to the command" in refused.err
    for path in (run, file):
        with pytest.raises(ConfigError, match=r"import it before .* extensions=\[\]"):
            scmoe.load(path)
    assert command("export", run, "--extensions=[]").code == 0
    assert done() == "", "nothing was imported"

    assert command("export", run, named[0]).code == 0 and done() == "imported"
    assert scmoe.load(run) and scmoe.load(file) and done() == "", "this program has imported it now"
    refused = command("resume", *resume)
    assert (
        refused.code == 2
        and f"add {named[1]} to the command, or callbacks={{}} to go on without" in refused.err
    )
    resumed = command("resume", *resume, named[0], f"callbacks.{name}.every=8")
    assert (resumed.code, done()) == (0, "called with 8"), resumed.err
    (checkpoint,) = (folder / "runs/latest/checkpoints").glob("step=3.ckpt")
    config = load_config("configs/debug.yaml", named)
    going_on = Resumed(folder / "runs/latest", checkpoint, None)
    stopped = open_output(config, build_model_on_meta(config), (), going_on)
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as err, stopped:
        raise SystemExit
    assert (
        f"to continue: {scmoe_command('resume', folder / 'runs/latest', *named)}" in err.getvalue()
    )


@pytest.mark.parametrize(
    "kept", ["extensions: [planted]", "extends: planted", "- a", "callbacks: {planted: 3}"]
)
def test_a_config_beside_an_export_is_not_trusted(kept, modules, tmp_path):
    """It imports nothing and extends no other file. All of its callbacks are left out."""
    modules.write("planted")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.yaml").write_text(kept)
    with pytest.raises(ValueError, match=r"you trust|'extends'|a mapping|model\.safetensors"):
        scmoe.load(tmp_path / "model.safetensors")
    assert modules.done() == ""


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, words)
    return str(caught.value)


REGISTERS = "import scmoe\nscmoe.register_{}('{}'{})({})\n"
BAD = {
    "raises": ("x = 1\n1 / 0\n", "ZeroDivisionError: division by zero (", "line 2)"),
    "syntax": ("def f(:\n", "SyntaxError: ", "line 1)"),
    "imports": (
        "import a_module_that_is_not_there\n",
        "No module named 'a_module_that_is_not_there' (",
    ),
    "several": ("raise ValueError('a\\nb')\n", "ValueError: a b ("),
    "built_in": (REGISTERS.format("architecture", "top_k", "", "print"), "TopKBlock has the name"),
    "optimizer": (
        REGISTERS.format("optimizer", "adamw", "", "print"),
        "assembly.model.build_adamw has the name",
    ),
    "twice": (
        2 * REGISTERS.format("dataset", "twice", ", images=True", "print"),
        "builtins.print has the name",
    ),
    "dotted": (REGISTERS.format("family", "a.b", "", "print"), "'a.b' cannot be a name"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_extension_that_cannot_be_used_gives_one_line(case, modules):
    text, *says = BAD[case]
    line = refusal(f"extensions=[{modules.write(f'bad_{case}', text)}]")
    assert line.startswith(f"extensions: bad_{case} cannot be imported: ")
    assert all(word in line for word in says), line
    assert "twice" not in DATASETS.names() or case == "twice"


@pytest.mark.parametrize("name", ["a/b", "../x", ".x", "a b", "os.system(x)", "a.", "-m", "é"])
def test_a_text_that_is_no_name_of_a_module_gives_one_line(name):
    assert "which is no name of a module" in refusal(f"extensions=['{name}']")


def test_a_module_that_is_not_there_gives_one_line():
    line = refusal("extensions=[my_package.my_module]")
    assert line.endswith(
        "there is no module my_package; install its package, or set PYTHONPATH to its folder"
    )
    assert "there is no module tests.nothing" in refusal("extensions=[tests.nothing]")


def test_callbacks_and_options_are_checked_before_anything_starts(modules, monkeypatch):
    monkeypatch.setattr(CALLBACKS, "makers", {})  # another test may have imported an extension
    assert "No callback is registered" in refusal("callbacks.x.every=2")
    name = f"extensions=[{modules.write('checked')}]"
    assert load_config(None, [name, "callbacks={checked: {}}"]).callbacks == {"checked": {}}
    assert load_config(None, [name, "callbacks.checked.every=[1, null]"]).callbacks == {
        "checked": {"every": [1, None]}
    }
    assert "allowed: checked" in refusal(name, "callbacks.chequed={}")
    assert "options of checked must be a mapping" in refusal(name, "callbacks.checked=3")
    assert "unexpected keyword argument 'evry'" in refusal(name, "callbacks.checked.evry=3")
    assert "the sections callbacks, trainer and analysis decides" in refusal(
        "trainer.extra.callbacks=[]"
    )
    assert "options is {'a': 1}, allowed: {}, as only extensions read it" in refusal("options.a=1")
    assert load_config(None, [name, "options.a=1"]).options == {"a": 1}
