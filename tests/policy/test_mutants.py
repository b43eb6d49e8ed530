"""The list of mutants fits the files that it mutates."""

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
