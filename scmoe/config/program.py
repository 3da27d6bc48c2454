"""How a user calls `scmoe` on this machine, for messages that name the next command."""

import shlex
import shutil
import sys
from pathlib import Path


def scmoe(*words: object) -> str:
    """Return the command `scmoe WORDS`, ready to copy in the working directory.

    Where PATH does not find this Python's `scmoe`, such as in a checkout used through `make`, it is named by its path.
    """
    beside = Path(sys.executable).with_name("scmoe")
    if not beside.exists() or shutil.which("scmoe") == str(beside):
        program = Path("scmoe")
    else:
        program = beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside
    return shlex.join(map(str, (program, *words)))
