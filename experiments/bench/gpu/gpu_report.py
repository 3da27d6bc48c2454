"""The report of a check: results.json has everything, report.md what a person reads first."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scmoe.experiments.bench.gpu.gpu_parts import Place

FILES, TOTAL_MB = 8, 60  # the most that a check leaves
NAMED = ("torch", "triton", "lightning", "numpy", "matplotlib", "transformers")


def machine(device: str) -> dict[str, Any]:
    """Returns the names and versions under which the numbers hold."""
    facts: dict[str, Any] = {"device": device, "python": platform.python_version(), "torch_cuda": torch.version.cuda}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        facts |= {"streaming_multiprocessors": card.multi_processor_count, "capability": f"{card.major}.{card.minor}"}
    for name in NAMED:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts


def write_report(place: Place, parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Writes results.json and report.md into the folder, and returns which files it removed to keep the limits."""
    facts, removed = machine(place.device), trim(place.out)
    results = {"machine": facts, "tiny": place.tiny, "parts": parts, "removed": removed}
    (place.out / "results.json").write_text(json.dumps(results, indent=1))
    lines = ["# GPU check", "", *bullets(facts), *(f"- removed: {line}" for line in removed), ""]
    if place.tiny:
        lines += ["**A trial at tiny sizes: no number here says anything about speed.**", ""]
    lines += table(
        {name: {key: part[key] for key in ("state", "seconds", "clock_s", "what")} for name, part in parts.items()}
    )
    for name, part in parts.items():
        lines += ["", f"## {name}: {part['what']}"]
        if "why" in part:
            lines += ["", f"{part['state']}:", "", "```text", part["why"], "```"]
        for piece, value in part["pieces"].items():
            lines += ["", f"### {piece}", "", *markdown(value)]
    (place.out / "report.md").write_text("\n".join(lines) + "\n")
    return removed


def trim(folder: Path) -> list[str]:
    """Removes the largest files until the folder, with both reports, keeps to the limits FILES and TOTAL_MB."""
    files = sorted((path for path in folder.iterdir()), key=lambda path: path.stat().st_size)
    removed = []
    while len(files) > FILES - 2 or sum(path.stat().st_size for path in files) > (TOTAL_MB - 5) * 10**6:
        largest = files.pop()
        removed.append(f"{largest.name}, {largest.stat().st_size / 1e6:.1f} MB: over {FILES} files or {TOTAL_MB} MB")
        largest.unlink()
    return removed


def markdown(value: Any) -> list[str]:
    """Returns the lines of a value: its plain entries as a list, and each mapping of mappings as a table."""
    if not isinstance(value, dict):
        return [show(value)]
    if "error" in value:
        return ["```text", value["error"], "```"]
    plain = {key: own for key, own in value.items() if not is_table(own)}
    lines = bullets(plain)
    for key, own in value.items():
        lines += ["", f"{key}:", "", *table(own)] if is_table(own) else []
    return lines


def is_table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(row, dict) for row in value.values())


def bullets(values: Mapping[str, Any]) -> list[str]:
    return [f"- {key}: {show(value)}" for key, value in values.items()]


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a table with a line for each row and a column for each key that a row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
    cells = [[name, *(show(row[key]) if key in row else "" for key in columns)] for name, row in rows.items()]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]


def show(value: Any) -> str:
    """Returns a value on one line; numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(show, value))
    if isinstance(value, dict):
        return "; ".join(f"{key} {show(own)}" for key, own in value.items())
    return str(value).replace("\n", " ")
