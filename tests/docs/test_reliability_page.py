"""docs/reliability.md gives the counts that the suite measured, and names tests that are there."""

from tests.faults.table import BEGIN, END, PAGE, PROMISES, REPOSITORY, read, table_text


def test_the_page_has_the_counts_of_the_results():
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == table_text(), "python -m tests.faults.table"


def test_every_promise_has_a_test_that_counts_its_doors():
    for promise, test, doors in PROMISES:
        text = (REPOSITORY / "tests" / "faults" / test).read_text()
        assert all(f'"{door}"' in text for door in doors), promise


def test_nothing_that_was_tried_failed():
    """But for a process that Gloo aborts when process 0 is killed, which the page says is not promised."""
    assert [row[:2] for row in read() if row[3]] in ([], [["one of four processes", "kill"]])
    assert "process 0's end is named" in PAGE.read_text().partition("## What is not promised")[2]
