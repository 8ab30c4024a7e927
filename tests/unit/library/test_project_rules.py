"""The file that says how much projects may store, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryofleet.errors import FailedPrecondition, InvalidArgument
from cryofleet.project_rules import ProjectRules, Rules, read_rules

GIB = 2**30


def test_a_project_has_its_own_rules_and_else_those_of_all_others(tmp_path: Path) -> None:
    path = tmp_path / "projects.yaml"
    path.write_text('"*": {quota_gib: 2, keep_days: 90}\nlarge: {quota_gib: 4.5}\nkept: {keep_days: 0}\n')
    rules = ProjectRules(path)
    assert rules.of("any") == Rules(2 * GIB, 90)
    assert rules.of("large") == Rules(4 * GIB + GIB // 2, 90)
    assert rules.of("kept") == Rules(2 * GIB, 0)
    assert ProjectRules(None).of("any") == Rules()
    assert read_rules("") == {"*": Rules()}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "not YAML"),
        ("- a", "must map projects"),
        ("Not_A_Project: {}", "'Not_A_Project' must match"),
        ("a: 5", "a: its rules must be as"),
        ("a: {quota: 5}", "a: there is no rule 'quota'; there are quota_gib, keep_days"),
        ("a: {quota_gib: -1}", "a: quota_gib is -1"),
        ("a: {quota_gib: much}", "a: quota_gib is 'much'"),
        ("a: {keep_days: .nan}", "a: keep_days is nan"),
        ("a: {keep_days: 0.5}", "a: keep_days is 0.5; it must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument, match=complaint.replace("(", r"\(")):
        read_rules(text)


def test_the_file_is_read_anew_and_a_slip_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "projects.yaml"
    with pytest.raises(FailedPrecondition, match=r"cannot read the projects' rules .*projects.yaml"):
        ProjectRules(path)
    path.write_text("a: {quota_gib: 1}\n")
    rules = ProjectRules(path)
    path.write_text("a: {quota_gib: 12}\n")
    assert rules.of("a").quota_bytes == 12 * GIB
    path.write_text("a: {quota_gib: twelve}\n")
    assert rules.of("a").quota_bytes == 12 * GIB
    path.unlink()
    assert rules.of("a").quota_bytes == 12 * GIB
    assert rules.of("a").quota_bytes == 12 * GIB
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2, "each slip is logged once"
    assert "'twelve'" in messages[0]
    assert "No such file" in messages[1]
    path.write_text("a: {quota_gib: 1}\n")
    assert rules.of("a").quota_bytes == GIB
