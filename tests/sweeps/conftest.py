"""Sweeps of a file that one test has changed."""

import pytest
import yaml

from scmoe.sweeps.sweep_file import Sweep, read
from tests.support.sweeps import GOOD


@pytest.fixture
def sweep_of(tmp_path):
    def sweep_of(**changes: object) -> Sweep:
        config = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return read(str(tmp_path / "s.yaml"), [f"runs_dir={tmp_path}"])

    return sweep_of
