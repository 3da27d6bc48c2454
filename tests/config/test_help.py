"""The configuration's help fits its width, has every field and a catalogue, and does not import
torch."""

import subprocess
import sys

from scmoe.command_line import call
from scmoe.config.fields import Config
from scmoe.config.help import catalogue, help_text
from scmoe.config.leaves import leaves


def test_help_fits_its_width_and_has_every_field():
    lines = help_text().splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert {leaf.key for leaf in leaves(Config())} <= {line.split(" ")[0] for line in lines}
    assert "pos1 | pos2 | pos3" in help_text()


def test_catalogue_has_files_and_choices():
    found = catalogue()
    assert (
        "configs/model/gpt2_moe_small.yaml",
        "Overlay: GPT2-MoE-Small of Table 8, 323M parameters.",
    ) in (found["Configurations"])
    assert "configs/sweep/smoke.yaml" in dict(found["Sweeps"])
    assert ("moe.architecture=scmoe", "") in found["Architectures"]
    assert ("model.family=gpt", "") in found["Model families"]


def test_help_and_refusals_do_not_import_torch():
    modules = [
        "config.help",
        "config.load",
        "parallel.checkpoint.durable",
        "training.run.directory",
    ]
    code = "import sys\n" + "".join(f"import scmoe.{name}\n" for name in modules)
    code += "assert not {'torch', 'lightning', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_brackets_of_a_comment_are_listed_as_they_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_text("# Sizes of [/data/a], [no gate]\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert call("list") == 0
    assert "Sizes of [/data/a], [no gate]" in " ".join(capsys.readouterr().out.split())


def test_a_config_that_cannot_be_read_does_not_end_the_list(tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_bytes("# Größe\n".encode("latin-1"))
    (tmp_path / "configs/gone.yaml").symlink_to("nowhere.yaml")
    monkeypatch.chdir(tmp_path)
    assert call("list") == 0
    listed = capsys.readouterr().out
    assert "configs/mine.yaml" in listed and "gone.yaml" not in listed
