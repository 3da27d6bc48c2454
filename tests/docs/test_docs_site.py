"""What docs/hooks/ makes for the site: the page of configuration fields, the navigation, links,
docstrings.

`make docs` builds the whole site, where mkdocs checks every link. These tests need no build.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from scmoe.config.fields import Config
from scmoe.config.leaves import leaves

yaml = pytest.importorskip("mkdocs.utils.yaml", reason="needs mkdocs: pip install -e '.[docs]'")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/hooks"))


def test_the_page_of_fields_has_each_field_once_with_its_default_and_range():
    import config_reference

    rows = re.findall(
        r"^\| `([\w.]+)`\{ #(\S+) \} \| `(.+?)` \| (.*?) \| `(.*?)` \| (.*) \|$",
        config_reference.page(),
        re.M,
    )
    every = {leaf.key: leaf for leaf in leaves(Config())}
    assert [row[0] for row in rows] == [row[1] for row in rows] == list(every)
    for key, _, kind, limits, default, meaning in rows:
        leaf = every[key]
        assert (
            limits == str(leaf.range or "")
            and kind + (f", {limits}" if limits else "") == leaf.allowed
        )
        assert default == {"True": "true", "False": "false", "None": "null"}.get(
            repr(leaf.value), str(leaf.value)
        ), key
        assert meaning and "<" not in meaning and not re.search(r"(?<!\\)\|", meaning), key
    assert set(config_reference.SECTIONS) <= {key.rpartition(".")[0] for key in every}


def test_links_lead_to_pages_of_the_site():
    import pages

    for page, given, made in (
        ("runs.md", "[a](../scmoe/moe/stream.py)", "[a](source/scmoe/moe/stream.py.md)"),
        (
            "decisions/0023-house.md",
            "[a](../../CONTRIBUTING.md#names)",
            "[a](../contributing.md#names)",
        ),
        (
            "contributing.md",
            "[a](docs/tests.md#x) [b](LICENSE)",
            "[a](tests.md#x) [b](source/LICENSE.md)",
        ),
    ):
        assert pages.rewritten(given, page) == made
    for same in (
        "[a](runs.md#metrics)",
        "![a](figures/pair.png)",
        "[a](#below)",
        "[a](https://a.b)",
        "[a](gone.py)",
    ):
        assert pages.rewritten(same, "runs.md") == same, "mkdocs then names what is gone"
    fence, link = "\n```\n`moe.rows`\n```", " `moe.none` [`moe.rows`](runs.md)"
    field = "[`moe.rows=auto`](./reference/configuration.md#moe.rows)"
    assert pages.rewritten(f"`moe.rows=auto`{link}{fence}", "runs.md") == f"{field}{link}{fence}"


def test_every_page_is_in_the_navigation():
    import pages

    nav = yaml.yaml_load((ROOT / "mkdocs.yml").read_text())["nav"]
    own = [
        path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))
    ]
    made = ["reference/configuration.md", "reference/scmoe.md", *pages.BACK]
    whole = pages.with_all([*own, *made, "new.md", "source/LICENSE.md"], nav)
    named = pages.strings(whole)
    assert len(named) == len(set(named)) and set(named) == {*own, *made, "new.md"}
    assert "new.md" in whole[-1]["Further pages"]
    packages = {path.parent.name for path in (ROOT / "scmoe").glob("*/__init__.py")}
    assert set(pages.PYTHON) == packages - {"cli"}


def test_the_search_needs_no_server_and_no_network():
    config = yaml.yaml_load((ROOT / "mkdocs.yml").read_text())
    assert "offline" in config["plugins"] and not config["use_directory_urls"]
    (script,) = config["extra"]["polyfills"]
    assert "iframe-worker" in script, "otherwise the plugin adds one of a CDN"
    assert (ROOT / "docs" / script).is_file()


def test_docstrings_become_markdown():
    import docstrings

    given = (
        "Splits <x>.\n\nx: rows,\nof any width.\ny, z: others.\nRaises ValueError.\n\n    a ->"
        " b: <c>"
    )
    made = (
        "Splits &lt;x>.\n\n- `x`: rows,\n  of any width.\n- `y, z`: others.\n\nRaises"
        " ValueError.\n\n    a -> b: <c>"
    )
    assert docstrings.markdown(given) == made
    assert docstrings.markdown("x: a; b: c. y: d.", ["x", "y"]) == "- `x`: a; b: c.\n- `y`: d."


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://a.b/c.js">',
        "<link rel=stylesheet href=https://a.b/c.css>",
        '<img src="//a.b/c">',
    ],
)
def test_a_page_that_loads_from_the_network_is_refused(tag):
    import pages

    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    pages.on_post_page('<script src="assets/a.js"><a href="https://a.b">', page=page)
    with pytest.raises(ValueError, match=r"page\.md loads .*allowed: files of the site"):
        pages.on_post_page(tag, page=page)
