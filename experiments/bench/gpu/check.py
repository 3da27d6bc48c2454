"""`make gpu-check`: its parts, what it writes, and the tests that need a GPU.

A part measures in its own process (engine/isolated.py). It imports what it needs there, so this
file needs torch only.
"""

import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from experiments.engine.isolated import CheckPart, Pieces, Place, run_parts
from scmoe.config.installation import CHECKOUT
from scmoe.config.leaves import ConfigError
from scmoe.report import bullets, bullets_and_tables, rows_table

FILES, TOTAL_MB = 8, 60  # the most that a check leaves
NAMED = ("torch", "triton", "lightning", "numpy", "matplotlib", "transformers")
HERE = "experiments.bench"
# what the Strategy and the models import
MODELS = ("numpy", "rich", "lightning", "torchmetrics", "safetensors", "greenlet")
CONFIGS = (*MODELS, "omegaconf")
CHECK_PARTS = {
    "tests": CheckPart(
        "The tests that need a GPU",
        f"{HERE}.gpu.check:tests",
        110,
        ("pytest", "hypothesis", *CONFIGS),
    ),
    "layer": CheckPart(
        "The MoE layer over its dense products", f"{HERE}.layer:on_device", 70, MODELS
    ),
    "step": CheckPart(
        "A step's operators and waits of the host", f"{HERE}.gpu.steps:profiled", 50, CONFIGS
    ),
    "overlap-0.52": CheckPart(
        "Overlap, communication share 0.52", f"{HERE}.gpu.steps:overlap", 70, CONFIGS, (0.52,)
    ),
    "overlap-0.15": CheckPart(
        "Overlap, communication share 0.15", f"{HERE}.gpu.steps:overlap", 70, CONFIGS, (0.15,)
    ),
    "gpt2": CheckPart("GPT2-MoE-Small, a training step", f"{HERE}.gpu.steps:gpt2", 45, CONFIGS),
    "training": CheckPart(
        "A short training in bf16", f"{HERE}.gpu.steps:training", 50, (*CONFIGS, "tokenizers")
    ),
    "pictures": CheckPart("Dispatch beside attention", f"{HERE}.gpu.steps:pictures", 45, CONFIGS),
}
ON_ONE_GPU = ("tests/parallel/wire/test_cuda.py", "tests/inference/offload/test_migration.py")
ON_TWO_GPUS = ("tests/parallel/test_two_gpus.py",)  # they skip on a machine with one
MAY_SKIP = re.compile("Skipped: not installed: ")  # a package that the check does not need
OPTIONS = (
    "-m",
    "gpu",
    "-v",
    "--tb=short",
    "--import-mode=importlib",
    "-o",
    "addopts=",
    "-p",
    "no:cacheprovider",
)
OLDEST_TORCH = (2, 10)
LISTED = 10  # tests with another outcome than expected


def check_gpu(device: str, tiny: bool, out: Path | None, parts: Sequence[str] | None) -> int:
    """Run the parts, write the report and print each part's state as JSON. Return 0 if all are ok,
    and otherwise 1.

    out: a new or empty folder, None: runs/gpu-check and the time; parts: None: all. Raises
    ConfigError for a wrong request before anything runs.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise ConfigError(f"torch is {torch.__version__}. Install 2.10 or later")
    if device == "cpu" and not tiny:
        raise ConfigError("--device is cpu, where the sizes of a card take hours. Add --tiny")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and there is no CUDA device here")
    names = parts or list(CHECK_PARTS)
    if unknown := [name for name in names if name not in CHECK_PARTS]:
        raise ConfigError(f"--parts has {unknown[0]}, allowed: {' | '.join(CHECK_PARTS)}")
    out = out or Path("runs/gpu-check", datetime.now().strftime("%Y%m%d-%H%M%S"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise ConfigError(f"--out is {str(out)!r}, which is not empty. Give a new or empty folder")
    setup = Place(device, tiny, out)
    results = run_parts({name: CHECK_PARTS[name] for name in names}, setup)
    write_report(setup, results)
    states = {name: part["state"] for name, part in results.items()}
    print(json.dumps({"out": str(out), "device": device, "tiny": tiny, "parts": states}))
    return 0 if set(states.values()) == {"ok"} else 1


def machine(device: str) -> dict[str, Any]:
    """Return the names and versions under which the numbers hold."""
    facts: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {"card": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        facts |= {
            "streaming_multiprocessors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}",
        }
    for name in NAMED:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "missing"
    return facts


def write_report(place: Place, parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write results.json, which has everything, and report.md, what a person reads first, into the
    folder. Return which files it removed to keep the limits."""
    facts, removed = machine(place.device), trim(place.out)
    results = {"machine": facts, "tiny": place.tiny, "parts": parts, "removed": removed}
    (place.out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    lines = ["# GPU check", "", *bullets(facts), *(f"- removed: {line}" for line in removed), ""]
    if place.tiny:
        lines += ["**A trial at tiny sizes: no number here says anything about speed.**", ""]
    shown = ("state", "seconds", "clock_s", "what")
    lines += rows_table({name: {key: part[key] for key in shown} for name, part in parts.items()})
    for name, part in parts.items():
        lines += ["", f"## {name}: {part['what']}"]
        if "why" in part:
            lines += ["", f"{part['state']}:", "", "```text", part["why"], "```"]
        for piece, value in part["pieces"].items():
            lines += ["", f"### {piece}", "", *bullets_and_tables(value)]
    (place.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return removed


def trim(folder: Path) -> list[str]:
    """Remove the largest files until the folder, with both reports, keeps to the limits FILES and
    TOTAL_MB."""
    files = sorted(folder.iterdir(), key=lambda path: path.stat().st_size)
    removed = []
    while (
        len(files) > FILES - 2
        or sum(path.stat().st_size for path in files) > (TOTAL_MB - 5) * 10**6
    ):
        largest = files.pop()
        removed.append(
            f"{largest.name}, {largest.stat().st_size / 1e6:.1f} MB: over {FILES} files or"
            f" {TOTAL_MB} MB"
        )
        largest.unlink()
    return removed


def tests(place: Place) -> Pieces:
    """Run the tests marked `gpu` and count them. On a machine without a GPU all of them skip."""
    one = "skipped" if place.device == "cpu" else "passed"
    two = one if torch.cuda.device_count() > 1 else "skipped"
    return {
        "gpu tests": lambda: run_tests(ON_ONE_GPU, one),
        "tests of two GPUs": lambda: run_tests(ON_TWO_GPUS, two),
    }


class Outcomes:
    """A plugin of pytest that keeps the report of each test: its outcome, and in `longrepr` why it
    was not passed."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:  # a file that cannot be imported
            self.of[report.nodeid] = report

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report


def run_tests(files: Sequence[str], expected: str) -> dict[str, int]:
    """Return how many tests had which outcome. RuntimeError: some had another one than expected,
    or none ran."""
    import pytest

    outcomes = Outcomes()
    code = pytest.main([*(str(CHECKOUT / file) for file in files), *OPTIONS], plugins=[outcomes])
    counts = Counter(report.outcome for report in outcomes.of.values())
    others = [
        report
        for report in outcomes.of.values()
        if report.outcome != expected
        and not (report.outcome == "skipped" and MAY_SKIP.search(str(report.longrepr)))
    ]
    if code != 0 or others or not counts[expected]:
        lines = [
            f"{report.nodeid}: {str(report.longrepr).splitlines()[-1]}"
            for report in others[:LISTED]
        ]
        raise RuntimeError("\n".join([*lines, f"pytest ended with {int(code)}, {dict(counts)}"]))
    return dict(counts)
