"""The audit of the paper holds, and fails where a row lacks code or a test."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import audit

ROOT = Path(__file__).resolve().parents[1]


def test_every_equation_and_table_is_held(capsys):
    """The suite itself runs the tests, and conftest.py sees to it that they compare something."""
    code = audit.main(["--no-run"])
    table, errors = capsys.readouterr()
    assert code == 0, errors
    rows = re.findall(r"^(Eq\. \d+|Table \d) .* (?:(\w+\.py):(\d+)|not code)", table, re.MULTILINE)
    assert [row for row, _, _ in rows] == [f"Eq. {n}" for n in range(1, 30)] + [f"Table {n}" for n in range(1, 7)]
    for row, file, line in rows:
        if row in ("Eq. 14", "Eq. 24", "Eq. 29", "Table 3"):
            above, marked = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 2:int(line)]
            assert f"# {row}" in (above if "Table" in row else marked)


TESTS = '''
import pytest

def mark(*names):
    return pytest.mark.paper(*names, against="nothing")

@mark("Eq. 2-29", "Section 3.5", "Table 1-5", "SCTM", "LiteHead")
@pytest.mark.parametrize("difference", [0.0, 1e-3, 1e-4])
def test_good(record_property, difference):
    record_property("compared", (difference, 1e-2))

@mark("Table 6", "Eq. 30")
def test_bad(record_property):
    record_property("compared", (0.0, 0.0))
    assert False

@mark("Eq. 3 and 4")
def test_skipped():
    pytest.skip()

@mark("Eq. 5")
def test_silent():
    pass

def test_not_marked():
    assert False
'''


def test_what_fails_it(tmp_path):
    """A copy of the code without the marks of Eq. 13, with other tests."""
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/audit.py", tmp_path / "tests")
    (tmp_path / "tests/test_it.py").write_text(TESTS)
    model = tmp_path / "mtmamba.py"
    model.write_text(model.read_text(encoding="utf-8").replace("Eq. 13", ""), encoding="utf-8")
    run = subprocess.run([sys.executable, tmp_path / "tests/audit.py", "--markdown"], capture_output=True, text=True)
    code, table, errors = run.returncode, run.stdout, run.stderr
    place = "tests/test_it.py::test_"
    assert re.findall("^audit: ([^;\n]*)", errors, re.MULTILINE) == [
        f"Table 6: {place}bad failed", f"Eq. 30: no such row, but {place}bad is marked with it",
        f"Eq. 3: {place}skipped skipped", f"Eq. 4: {place}skipped skipped", f"Eq. 5: {place}silent compares nothing",
        "Eq. 13: no code", "Table 6: no test that passes", "MTMamba.predict: no test that passes"]
    assert code == 1
    assert "| Eq. 14–18 | STM block | `STM.forward` | nothing 0.001 |" in table
