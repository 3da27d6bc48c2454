"""Prompts of a file are read line by line."""

import json

import pytest

from scmoe.inference import prompts as prompts_file

pytestmark = pytest.mark.inference


def test_a_prompt_of_a_file_may_have_any_character_within_its_line(tmp_path):
    texts = ["one\u2028two\u0085three", "four"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\r\n" for text in texts]
    (tmp_path / "prompts.jsonl").write_text("".join(lines), encoding="utf-8", newline="")
    assert prompts_file.read_prompts(tmp_path / "prompts.jsonl", 7) == [
        (texts[0], 7),
        (texts[1], 8),
    ]
