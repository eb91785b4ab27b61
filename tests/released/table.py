"""Prints how far this code is from the released, as a table: python tests/released/table.py"""

import contextlib
import io
import sys
from pathlib import Path

import pytest


class Rows:
    """What the tests recorded, row by row: the largest difference, and why there is one."""

    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        for row, (difference, why) in report.user_properties if report.when == "call" else ():
            before, _ = self.found.get(row, (difference, why))
            self.found[row] = max(before, difference), why


if __name__ == "__main__":
    rows = Rows()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        failed = pytest.main([str(Path(__file__).parent)], plugins=[rows])
    if failed:
        print(output.getvalue())
    print(
        "| what | file | largest difference in float64 | where not equal, why |\n|---|---|---|---|"
    )
    for row, (difference, why) in rows.found.items():
        file, what = row.split(": ", 1)
        print(f"| {what} | `{file}.npz` | {difference:.2g} | {why} |")
    sys.exit(failed)
