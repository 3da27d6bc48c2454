"""A hook of mkdocs: pages that are made when the site is built, the navigation, and links that
leave docs/.

The same Markdown is read on GitHub, where a link may lead to any file of the repository. On the
site such a link leads to a page that shows the file, so that the site is whole without a network.
"""

import re
from fnmatch import fnmatch
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

import config_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scmoe.config.fields import Config
from scmoe.config.leaves import leaves

ROOT = Path(__file__).parents[2]
MOVED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
BACK = {there: here for here, there in MOVED.items()}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
# `moe.position` or `moe.position=pos1`, but not as the words of a link
FIELD = re.compile(r"(?<![`\[])(`(\w+\.\w+)(?:=[^`\s]+)?`)(?![`\]])")
FIELDS = {leaf.key for leaf in leaves(Config())}
FENCE = re.compile(r"(```.*?```)", re.DOTALL)
PYTHON = {  # pages of the Python reference: what each package is for
    "schedule": "The schedule as a value, its cost, and the timeline that it gives.",
    "moe": "Router, layout, experts, balance, and the MoE stream in three verbs.",
    "blocks": "Transformer blocks: standard, shared expert, ScMoE, DGMoE.",
    "models": "GPT, LLaMA and SwinV2, and what a model costs.",
    "parallel": ("Ranks: All-to-All, dense weights, checkpoints, stopping and failing together."),
    "planning": "The planner, which measures operators and chooses schedules.",
    "inference": (
        "Generation of text with a cache, and experts that are kept in a file and fetched."
    ),
    "config": "The configuration: fields, rules, loading.",
    "weights": "Weights of other programs, read and written.",
    "lightning": "The Strategy, for Lightning's Trainer.",
    "datamodules": "Text, images and synthetic tokens as Lightning data modules.",
    "training": "LightningModules, callbacks, and how a run is built and run.",
    "predict": (
        "What a training costs, and whether a shortcut would pay on a cluster: counted and"
        " simulated steps."
    ),
    "runs": (
        "What is done with a finished run: generate, evaluate, export, compare, one HTML page."
    ),
    "conform": "Questions to other people's expert-parallel layers.",
    "sweeps": "Sweeps on this machine: files, search, trials; batches of trainings.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/configuration.md": config_reference.page(),
        "reference/scmoe.md": public_names(),
    }
    pages |= {f"reference/{name}.md": package(name, about) for name, about in PYTHON.items()}
    pages |= {there: (ROOT / here).read_text(encoding="utf-8") for there, here in BACK.items()}
    texts = {
        in_repository(file.src_uri): file.content_string for file in files.documentation_pages()
    }
    texts |= {in_repository(name): text for name, text in pages.items()}
    for page, text in texts.items():
        for target in links(text, page):
            if (name := shown_at(target)).startswith("source/"):
                pages[name] = source(target)
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    config.nav = with_all([file.src_uri for file in files.documentation_pages()], config.nav)
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    name = page.file.src_uri
    return markdown if name.startswith(("source/", "reference/")) else rewritten(markdown, name)


def on_post_page(output: str, page: Page, **kwargs: Any) -> None:
    """Raises an error for what a browser would load from the network."""
    loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//[^\s>\"]+", output)
    loaded += [
        tag
        for tag in re.findall(r"<link[^>]+href=\"?(?:https?:)?//[^>]+>", output)
        if "canonical" not in tag
    ]
    if loaded:
        raise ValueError(f"{page.file.src_uri} loads {loaded[0]}, allowed: files of the site only")


def in_repository(name: str) -> str:
    """Return where the text of a page of the site stands in the repository, such as docs/runs.md
    for runs.md."""
    return BACK.get(name, f"docs/{name}")


def shown_at(path: str) -> str:
    """Return the file of the site that shows a file of the repository."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return MOVED.get(path, f"source/{path}.md")


def links(text: str, page: str) -> list[str]:
    """Return the files of the repository, outside fenced blocks, to which a page of the repository
    links."""
    text = FENCE.sub("", text)
    targets = (
        normpath(f"{dirname(page)}/{link}".lstrip("/"))
        for link in LINK.findall(text)
        if ":" not in link
    )
    return [target for target in targets if (ROOT / target).is_file()]


def rewritten(text: str, name: str) -> str:
    """Return a page's text with its links as links to files of the site, and names of fields as
    links to them."""
    page, top = in_repository(name), relpath(".", dirname(name) or ".")

    def link(match: re.Match[str]) -> str:
        target = normpath(f"{dirname(page)}/{match[1]}".lstrip("/"))
        return (
            relpath(shown_at(target), dirname(name) or ".")
            if (ROOT / target).is_file()
            else match[1]
        )

    def field(match: re.Match[str]) -> str:
        return (
            f"[{match[1]}]({top}/reference/configuration.md#{match[2]})"
            if match[2] in FIELDS
            else match[1]
        )

    parts = [
        part if FENCE.match(part) else FIELD.sub(field, LINK.sub(link, part))
        for part in FENCE.split(text)
    ]
    return "".join(parts)


def source(path: str) -> str:
    """Return a page that shows a file of the repository."""
    language = {".py": "python", ".sbatch": "bash", ".yaml": "yaml"}.get(Path(path).suffix, "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return (
        "---\nhide: [toc]\nsearch:\n  exclude: true\n---\n#"
        f" `{path}`\n\n````{language}\n{text}````\n"
    )


def public_names() -> str:
    """Return the page of what `import scmoe` offers."""
    import scmoe

    names = "".join(f"\n::: scmoe.{name}\n" for name in scmoe.__all__)
    return (
        "# scmoe\n\nWhat `import scmoe` offers. [The guide](../strategy.md) shows how to use"
        f" it.\n{names}"
    )


def package(name: str, about: str) -> str:
    """Return the page of a package: each of its modules, in the order of their names."""
    folder = ROOT / "scmoe" / name
    files = [
        path.relative_to(ROOT).with_suffix("")
        for path in sorted(folder.rglob("*.py"))
        if path.stem != "__init__"
    ]
    modules = "".join(f"\n::: {'.'.join(file.parts)}\n" for file in files)
    return f"# scmoe.{name}\n\n{about}\n{modules}"


def with_all(pages: list[str], nav: list[Any]) -> list[Any]:
    """Return the navigation with its patterns (`decisions/*`) filled in, and with the pages that it
    does not name."""
    named = {name for name in strings(nav) if "*" not in name}
    whole = filled(nav, [page for page in pages if page not in named])
    rest = [
        page for page in pages if page not in {*strings(whole)} and not page.startswith("source/")
    ]
    return [*whole, {"Further pages": rest}] if rest else whole


def strings(nav: Any) -> list[str]:
    """Return the pages and patterns of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [
        name for part in (nav.values() if isinstance(nav, dict) else nav) for name in strings(part)
    ]


def filled(nav: list[Any], pages: list[str]) -> list[Any]:
    """Return the navigation with each pattern replaced by the pages that it fits."""
    whole: list[Any] = []
    for entry in nav:
        if isinstance(entry, str):
            whole += [page for page in pages if fnmatch(page, entry)] if "*" in entry else [entry]
        else:
            ((title, part),) = entry.items()
            whole.append({title: filled(part, pages) if isinstance(part, list) else part})
    return whole
