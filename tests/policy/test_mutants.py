"""The list of mutants fits the files that it mutates."""

import csv
import shlex
from collections import Counter

from tests import mutants


def test_each_old_text_occurs_once():
    listed = mutants.read()
    assert len(listed) >= 40
    assert max(Counter(mutant.name for mutant in listed).values()) == 1
    for mutant in listed:
        text = (mutants.ROOT / mutant.file).read_text()
        changed = mutant.apply(text)
        assert changed != text
        compile(changed, mutant.file, "exec")


def test_each_target_is_there():
    """A missing path would end the run half-way."""
    for mutant in mutants.read():
        files = [word for word in shlex.split(mutant.target) if "/" in word]
        assert files and all((mutants.ROOT / file).exists() for file in files), mutant


def test_written_rows_stay_beside_others(tmp_path, monkeypatch):
    """What ran replaces its row; what didn't stays; what left the list goes."""
    first, second, third, *_ = mutants.read()
    monkeypatch.setattr(mutants, "TABLE", tmp_path / "mutants.csv")
    mutants.TABLE.write_text(
        "file,mutant,noticed_by,date\n"
        f"moved.py,{second.name},test_old,2000-01-01\n"
        f"{first.file},{first.name},survived,2000-01-01\n"
        "a.py,no mutant of the list,test_old,2000-01-01\n"
    )
    mutants.write({first.name: "test_new", third.name: mutants.SURVIVED})
    with mutants.TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mutant"] for row in rows] == [first.name, second.name, third.name]
    assert [row["file"] for row in rows] == [first.file, second.file, third.file]
    assert [row["noticed_by"] for row in rows] == ["test_new", "test_old", "survived"]
    assert rows[1]["date"] == "2000-01-01" != rows[0]["date"] == rows[2]["date"]
