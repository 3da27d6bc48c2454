"""A kept plan that cannot be used here is refused in one line, and measured again."""

from scmoe.planning.plan_file import NO_PLAN, kept_plan


def test_a_plan_that_is_missing_or_damaged_is_not_taken(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert kept_plan(path, {}) == NO_PLAN
    assert capsys.readouterr().err == ""
    path.write_text('{"layers": []')
    assert kept_plan(path, {}) == NO_PLAN
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plan: measured again, because ") and str(path) in line


def test_a_plan_of_other_conditions_is_not_taken(tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text('{"layers": [], "conditions": {"ranks": 2}}')
    assert kept_plan(path, {"ranks": 2})["conditions"] == {"ranks": 2}
    assert kept_plan(path, {"ranks": 4}) == NO_PLAN
    assert f"ranks was 2 in {path} and is 4 now" in capsys.readouterr().err
