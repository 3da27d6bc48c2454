"""A copy of this repository's tree, for what leaves files in it or changes them."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def copy_tree(target: Path) -> Path:
    """Copy the files that git tracks or would add, as they are in the tree now, and return the
    target."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        listed, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for file in (ROOT / name for name in names if name):
        if file.exists():  # a file may have been deleted and not yet committed
            copy = target / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy, follow_symlinks=False)
    return target
