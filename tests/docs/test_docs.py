"""Whatever README and docs name exists: paths, links, names in files, modules, make targets, keys.

What a user may copy from a page is right: YAML loads, and scmoe takes the words of each command.
tests/docs/test_readme.py runs them.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import filter as matching
from pathlib import Path

import pytest
import yaml
from cyclopts import CycloptsError

import docs.examples.my_architecture  # noqa: F401  else the fixture would forget what it registers
from experiments.tables.table_file import load_table
from scmoe.command_line import VERBS, build_app, numbers_of
from scmoe.config.fields import Config
from scmoe.config.leaves import ConfigError, leaves
from scmoe.config.load import load_config
from scmoe.config.registry import ARCHITECTURES
from scmoe.predict.cluster import parse_profile, read_profile
from scmoe.predict.costs import load_for
from scmoe.sweeps.sweep_file import read
from tests.support.pages import GUIDES, ROOT, all_commands, blocks, program_of

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
HISTORY = [ROOT / "CHANGELOG.md", ROOT / "docs/log.md"]  # these may name things that were removed
TOP = ("scmoe", "datamodules", "experiments", "tests", "configs", "docs")
PACKAGES = tuple(  # runs/ in a page is the folder of a user's runs
    f"{path.name}/"
    for path in (ROOT / "scmoe").iterdir()
    if (path / "__init__.py").exists() and path.name != "runs"
)
FILES = {path.name for top in TOP for path in (ROOT / top).rglob("*.*")}
BELOW_TESTS = tuple(
    f"{path.name}/" for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "runs"
)


def without_fences(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def code(page: Path) -> list[str]:
    """Return the texts between backticks, outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", without_fences(page))


def commands(page: Path) -> str:
    return "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))


def named_paths(page: Path) -> Iterator[str]:
    """Yield the repository's paths in backticks, and in the commands of fenced blocks."""
    for text in code(page):
        in_a_package = text.startswith(PACKAGES + BELOW_TESTS) and re.fullmatch(
            r"[\w.*/-]+(/|\.\w+)", text
        )
        if in_a_package or re.fullmatch(r"[\w*]+\.(py|sbatch)", text):
            yield text
    text = commands(page) + "\n" + "\n".join(code(page))
    yield from re.findall(rf"(?<![\w/])(?:{'|'.join(TOP)})/[\w./*-]+", text)


def exists(name: str, page: Path) -> bool:
    """Look in the root, the page's folder, scmoe/, tests/, and everywhere for a bare file name.
    Globs are allowed."""
    name = name.removesuffix("/")
    if "/" not in name and "." in name:
        return bool(matching(FILES, name))
    return any(
        next(folder.glob(name), None)
        for folder in (ROOT, page.parent, ROOT / "scmoe", ROOT / "tests")
    )


def anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return [re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts]


def missing_paths(page: Path) -> list[str]:
    return sorted({name for name in named_paths(page) if not exists(name, page)})


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", without_fences(page)):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    return broken


def missing_names(page: Path) -> list[str]:
    """Return the names in backticks after a file that are not in it: `moe/stream.py`
    `MoEStream.forward`, `begin`."""
    missing = []
    for file, names in re.findall(
        r"`([\w/]+\.py)`((?:,? `[A-Za-z_][\w.]*`)+)", without_fences(page)
    ):
        found = [base / file for base in (ROOT, ROOT / "scmoe") if (base / file).exists()]
        words = set(re.findall(r"\w+", found[0].read_text(encoding="utf-8"))) if found else set()
        for name in re.findall(r"`([\w.]+)`", names):
            missing += [f"{file} {name}"] if found and not set(name.split(".")) <= words else []
    return missing


def missing_commands(page: Path) -> list[str]:
    """Return what does not exist of the names in `python -m MODULE`, `make TARGET` and `scmoe
    VERB`."""
    text = "\n".join([*code(page), commands(page)])
    modules = set(re.findall(r"-m ((?:experiments|tests)(?:\.\w+)+)", text))
    targets = set(re.findall(r"^make ([a-z0-9-]+)", text, re.M))
    verbs = set(re.findall(r"^(?:\.venv/bin/)?scmoe ([a-z][\w-]*)", text, re.M))
    places = [
        ROOT / f"{name.replace('.', '/')}{end}"
        for name in modules
        for end in (".py", "/__main__.py")
    ]
    known = {
        ".".join(place.relative_to(ROOT).with_suffix("").parts)
        for place in places
        if place.exists()
    }
    modules -= {name.removesuffix(".__main__") for name in known}
    targets -= set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    verbs -= {name.replace("_", "-") for name in VERBS}
    return [*modules, *targets, *verbs]


def missing_keys(page: Path) -> list[str]:
    keys = {leaf.key for leaf in leaves(Config())}
    sections = "|".join(sorted({key.split(".")[0] for key in keys if "." in key}))
    named = {
        key
        for text in code(page)
        for key in re.findall(rf"(?<![\w./])(?:{sections})\.\w+(?=[= ]|$)", text)
    }
    return sorted(key for key in named if key not in keys and not key.endswith((".py", ".yaml")))


NAMED = (missing_paths, missing_names, missing_commands, missing_keys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_everything_that_a_page_names_exists(page):
    assert broken_links(page) == []
    for missing in NAMED if page not in HISTORY else ():
        assert missing(page) == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_tree_has_every_folder_of_the_library():
    (tree,) = [block for block in blocks("README.md", "text") if "scmoe/  " in block]
    inside = tree.partition("\nscmoe/ ")[2] or tree
    named = re.findall(r"^  (\w+/)", re.split(r"\n(?=\S)", inside)[0], re.M)
    folders = {f"{path.parent.name}/" for path in (ROOT / "scmoe").glob("*/__init__.py")}
    assert sorted(named) == sorted(folders - {"datamodules/"})


def test_readme_leads_to_every_page():
    targets = re.findall(r"\]\(([^)#]*)", (ROOT / "README.md").read_text())
    pages = {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/log.md"}
    assert pages - {(ROOT / target).resolve() for target in targets} == set()


def test_a_wrong_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`moe/none.py`, `scmoe/*.txt`, `gone.py`, [a](none.md), `python -m experiments.none`,"
        " `moe.none=1`, `moe/stream.py` `NoSuchName`\n"
    )
    assert missing_paths(page) == ["gone.py", "moe/none.py", "scmoe/*.txt"]
    assert broken_links(page) == ["none.md"]
    assert missing_names(page) == ["moe/stream.py NoSuchName"]
    assert missing_commands(page) == ["experiments.none"]
    assert missing_keys(page) == ["moe.none"]


def test_workflows_name_the_commits_of_their_actions():
    """A tag can be moved to other code."""
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    used = [word for file in files for word in re.findall(r"uses: (\S+)", file.read_text())]
    assert used and not [word for word in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", word)]


# ---------------------------------------------------------------------- what a user copies

COMMANDS = list(dict.fromkeys(command for page in GUIDES for command in all_commands(page)))
INLINE = {
    text for page in GUIDES for text in code(page) if re.match(r"(make|scmoe) [a-z-]+ .*\w", text)
}
NO_VERB = re.compile(r"make (setup|test|docs|wheel-test)\b|.*docs/examples/")
# words of a verb
NO_FIELD = ("ep", "dp", "ranks", "samples", "step", "stage_layers", "tensor_parallel")
OF_ADVISE = r"(cluster|load|measured\w*|copies|wire|prefill|repeat_transfers|top1)[.=]"
TAKES_A_CONFIG = ("train", "estimate", "advise", "check-data")
FREE = ("options.", "callbacks.", "schedule")  # mappings, and schedule=auto
MINE = """
import scmoe

@scmoe.register_architecture("mine")
def mine(config, wire, parts):
    return []
"""


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if blocks(page, "yaml")], ids=lambda page: page.stem
)
def test_yaml_can_be_copied(page, tmp_path, monkeypatch):
    """A block is a sweep, table, cluster or configuration; after a table, the one beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(ARCHITECTURES, "makers", dict(ARCHITECTURES.makers))
    (tmp_path / "my_module.py").write_text(MINE)
    folder, table = tmp_path / "configs/experiment/mine", None
    folder.mkdir(parents=True)
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if "rows" in tree:
            (folder / "table.yaml").write_text(block)
            (scale,) = tree["scales"].values()
            table = folder / scale["config"]
        elif "method" in tree:
            (tmp_path / "my-sweep.yaml").write_text(block)
            assert read("my-sweep.yaml").axes.keys() == tree["parameters"].keys()
        elif "peak_tflops" in tree:
            assert parse_profile(block, str(page), "mine").ranks == tree["ranks"]
        else:
            (table or tmp_path / "my.yaml").write_text(block)
            assert load_config(table or "my.yaml").name == tree.get("name", "debug")
    if table is not None:
        for row in load_table("mine").rows:
            load_config(table, row.overrides)
    sys.modules.pop("my_module", None)


def refused(command: str) -> str | None:
    """Return why scmoe would refuse the words of a command; None if it takes them."""
    try:
        words = program_of(command)
        if not words:
            return None if NO_VERB.match(command) else "it starts no verb of scmoe"
        verb, *arguments = words
        build_app(verb).parse_args(words, exit_on_error=False, print_error=False)
        given = [word for word in arguments[1:] if re.match(r"[a-z_.]+=(?!\.\.\.)", word)]
        if verb == "advise":
            given = [word.partition(",")[0] for word in given]  # of several values, the first
        numbers, given = numbers_of(given, NO_FIELD)
        if verb == "advise":
            of_cluster = [word for word in given if word.startswith(("cluster.", "cluster="))]
            given = [word for word in given if not re.match(OF_ADVISE, word)]
            (name, *values) = sorted(of_cluster, key=lambda word: word.startswith("cluster."))
            name = name.partition("=")[2]
            if name not in ("NAME", "measure", "mine.yaml"):
                read_profile(name, values)
        if verb in TAKES_A_CONFIG and arguments[0] != "--help":
            config = "quickstart" if arguments[0] in ("my.yaml", "...") else arguments[0]
            if "ranks" in numbers:
                load_for(config, numbers["ranks"], 1, given)
            else:
                load_config(config, given)
        fields = {word.partition("=")[0] for word in given} - {
            leaf.key for leaf in leaves(Config())
        }
        unknown = {field for field in fields if not field.startswith(FREE)}
        return f"unknown: {unknown}" if unknown else None
    except (CycloptsError, ConfigError, subprocess.CalledProcessError) as error:
        return str(error)


@pytest.mark.parametrize("command", [*COMMANDS, *sorted(INLINE)])
def test_a_command_can_be_copied(command):
    assert refused(command) is None


@pytest.mark.parametrize(
    "command",
    [
        "make none",
        "make train CONFIG=none",
        "scmoe generate runs/a --none 1",
        "scmoe export runs/a moe.none=1",
    ],
)
def test_a_wrong_command_is_found(command):
    assert refused(command)


def test_every_block_names_its_language_and_those_to_copy_are_tested():
    fences = {
        page: re.findall(r"^ *```(\w*)", page.read_text(encoding="utf-8"), re.M)[::2]
        for page in PAGES
    }
    used = {language for found in fences.values() for language in found}
    assert used <= {"bash", "yaml", "python", "text", "json", "bibtex"}
    assert {page for page, found in fences.items() if {"bash", "yaml", "python"} & {*found}} <= {
        *GUIDES
    }
