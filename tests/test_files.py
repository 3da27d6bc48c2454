"""Keys are known by their names, and redacted."""

from __future__ import annotations

import pytest

from scmoe.config.load import load_config
from scmoe.files import redacted

pytestmark = [pytest.mark.faults]


@pytest.mark.representative
@pytest.mark.parametrize(
    ("name", "holds_a_key"),
    [
        *[
            (name, True)
            for name in ("A_TOKEN", "DB_PASSWD", "db_pwd", "MY_CREDENTIALS", "AWS_ACCESS_KEY_ID")
        ],
        *[(name, False) for name in ("PWD", "OLDPWD", "A_KEYBOARD")],
    ],
)
def test_a_variable_that_holds_a_key_is_known_by_its_name(name, holds_a_key):
    assert redacted("/data/work", {name: "/data/work"}) == (
        "*****" if holds_a_key else "/data/work"
    )


def test_text_that_is_no_key_is_not_redacted():
    """Such texts are a snapshot's folder, a commit's short name, a short value, a variable that
    holds no key."""
    for text in (
        "/hub/snapshots/" + "0123456789" * 4 + "/model",
        "0123456789abcdef",
        "a short word",
        "hf_hub",
    ):
        assert redacted(text, {"A_KEY": "short", "HOME": text}) == text
    given = {"a": ["xx 12345678", 3, None], "b": ("12345678",)}
    assert redacted(given, {"A_KEY": "12345678"}) == {"a": ["xx *****", 3, None], "b": ("*****",)}
    assert redacted(load_config(None, []), {}) == load_config(None, [])
