"""Every equation and table of the paper: where it is in the code, which tests hold it, and how closely.

    python tests/audit.py                 # a table; exit code 1 where a row lacks code or a test that holds it
    python tests/audit.py --markdown      # the same for the README, equations that belong together in one row
    python tests/audit.py --no-run        # only whether each row has code and a test

Code is found by the marks "Eq. N" and "Table N" in the source: of an equation the comments inside functions, or else
the docstrings, that name it; of a table the constants whose comments name it. A test is tied to its rows by the mark
`paper`. The marked tests are run, and a figure is what a test has just compared (the fixture `compare` of conftest.py):
of all its comparisons the one that comes nearest to its tolerance.
"""

import argparse
import ast
import contextlib
import io
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("mtmamba.py", "metrics.py", "evaluate.py", "train.py")

# What belongs together, and its rows. MTMamba++ has other equations, so its rows go by the names of their code.
GROUPS = {
    "a state space model in continuous time": {
        "Eq. 1": "h'(t) = A h(t) + B x(t)"},
    "the same in discrete steps": {
        "Eq. 2": "the skip connection D x",
        "Eq. 3": "h_t = A_bar h_(t-1) + B_bar x_t",
        "Eq. 4": "y_t = C h_t",
        "Eq. 5": "A_bar = exp(Delta A), B_bar = Delta B"},
    "S6: B, C and Delta depend on the input": {
        "Eq. 6": "B = Linear(x)",
        "Eq. 7": "C = Linear(x)",
        "Eq. 8": "Delta = softplus(bias + Linear(x))"},
    "the encoder's features": {
        "Eq. 9": "f_1, .., f_4 = encoder(x)"},
    "SS2D: S6 along four directions, summed": {
        "Eq. 10": "z_v = expand(z, v)",
        "Eq. 11": "S6 of each z_v",
        "Eq. 12": "their sum"},
    "MFE": {
        "Eq. 13": "LN . SS2D . SiLU . Conv . Linear"},
    "STM block": {
        "Eq. 14": "z_LN = LN(z)",
        "Eq. 15": "z~ = MFE(z_LN)",
        "Eq. 16": "g = SiLU(Linear(z_LN))",
        "Eq. 17": "z~ * g",
        "Eq. 18": "z + Linear(z~ * g)"},
    "CTM block": {
        "Eq. 19": "z_LN of each task = LN(z)",
        "Eq. 20": "shared z_LN = LN(concat of all tasks' z)",
        "Eq. 21": "z~ of each task = MFE(z_LN)",
        "Eq. 22": "shared z~ = MFE(shared z_LN)",
        "Eq. 23": "g = sigmoid(Linear(z_LN))",
        "Eq. 24": "g * z~ + (1 - g) * shared z~",
        "Eq. 25": "z + Linear(that)"},
    "decoder stage": {
        "Eq. 26": "r = PatchExpand(z)",
        "Eq. 27": "r = Linear(concat(r, f))",
        "Eq. 28": "r = STM(STM(r))",
        "Eq. 29": "z of all tasks = CTM(r of all tasks)"},
    "output head": {
        "Section 3.5": "patch expand by 4, Linear"},
    "results: the metrics, not the figures": {
        "Table 1": "mIoU, maxF, RMSE, mErr, odsF"},
    "variants of the decoder: cost, Delta_m": {
        "Table 2": "STM and CTM against Swin blocks; all costs but single-task",
        "Table 3": "MFE against W-MSA",
        "Table 4": "linear gates against W-MSA"},
    "variants of CTM: what they compute, Delta_m": {
        "Table 5": "g = 0, g = 1"},
    "encoders: their structure": {
        "Table 6": "Swin-Tiny, Small, Base, Large"},
    "MTMamba++: S-CTM block": {
        "SCTM": "Delta, B and C of each task's scan from all tasks' features"},
    "MTMamba++: lite head": {
        "LiteHead": "3x3 convolution, batch norm, ReLU, Linear"},
    "MTMamba++: size of the outputs": {
        "MTMamba.predict": "one bilinear resize"},
}
ROWS = {row: says for rows in GROUPS.values() for row, says in rows.items()}
NO_CODE = {"Eq. 1"}    # continuous; the code has Eq. 3


def named(text: str) -> list[str]:
    """The rows that a text names: "Eq. 6-8 and 10, Table 2" -> Eq. 6, Eq. 7, Eq. 8, Eq. 10, Table 2."""
    rows = re.findall(r"Section \d\.\d", text)
    for kind, numbers in re.findall(r"(Eq\.|Table)s? (\d+(?:(?:-|, | and )\d+)*)", text):
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
            rows += [f"{kind} {n}" for n in range(int(first), int(last or first) + 1)]
    return rows


def definitions(node: ast.AST, prefix: str = ""):
    """(qualified name, node) of the functions and classes below a node, outer ones first."""
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + child.name, child
            inner = f"{prefix}{child.name}."
        yield from definitions(child, inner)


def find_code() -> dict[str, list[tuple[str, str]]]:
    """{row: [("file:line", name of the function, class or constant), ...]}"""
    comments, docstrings, constants = defaultdict(dict), defaultdict(dict), defaultdict(dict)
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        tree, owner = ast.parse(source), {}    # of each line
        found = [(constants, ast.unparse(node.targets[0]), node) for node in tree.body if isinstance(node, ast.Assign)]
        found += [(comments, name, node) for name, node in definitions(tree)]
        for kind, name, node in found:
            owner |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), (kind, name))
        for name, node in definitions(tree):
            for row in [name, *named(ast.get_docstring(node) or "")]:
                docstrings[row][f"{file}:{node.lineno}"] = name
        waiting = []    # rows named by a comment on a line of its own, which speaks of the code below it
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            line = token.start[0]
            if token.type == tokenize.COMMENT:
                waiting += named(token.string)
                if not token.line[:token.start[1]].strip():
                    continue
            elif not token.string.strip():
                continue
            kind, name = owner.get(line, ({}, ""))
            for row in waiting:
                kind[row][f"{file}:{line}"] = name
            waiting = []
    return {row: list((constants[row] if row.startswith("Table") else comments[row] or docstrings[row]).items())
            for row in ROWS}


class Records:
    """A plugin of pytest. held: {row: {(test, against): (difference, tolerance)}}, with None for the figures where the
    tests are only collected; problems: of the marked tests."""

    def __init__(self, run: bool):
        self.run, self.held, self.problems, self.outcomes = run, defaultdict(dict), [], {}

    def pytest_runtest_logreport(self, report):
        if not report.passed:
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session):
        for item in session.items:
            outcome = self.outcomes.get(item.nodeid)
            figures = [value for name, value in item.user_properties if name == "compared"]
            for mark in item.iter_markers("paper"):
                test = (f"{item.path.name}::{item.originalname}", mark.kwargs["against"])
                for row in [row for name in mark.args for row in named(name) or [name]]:
                    if row not in ROWS:
                        self.problems.append(f"{row}: no such row, but {item.nodeid} is marked with it")
                    elif outcome:
                        self.problems.append(f"{row}: {item.nodeid} {outcome}")
                    elif not self.run:
                        self.held[row][test] = None
                    elif not figures:
                        self.problems.append(f"{row}: {item.nodeid} compares nothing; let it use the fixture `compare`")
                    else:
                        self.held[row][test] = max(figures + [self.held[row].get(test, figures[0])], key=closeness)


def closeness(figure: tuple[float, float] | None) -> float:
    difference, tolerance = figure or (0, 0)
    return difference / tolerance if tolerance else 0.0


def run_tests(run: bool) -> Records:
    """Runs the marked tests, or only collects them."""
    records = Records(run)
    options = ["-n", "0", "-q", "-m", "paper", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    if not run:
        options.append("--collect-only")
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*options, str(ROOT / "tests")], plugins=[records])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        records.problems.append(f"pytest ended with code {code}")
    return records


def figure_text(figure: tuple[float, float] | None) -> str:
    if figure is None:
        return "not run"
    difference, tolerance = figure
    return f"{difference:.1g} of {tolerance:.1g}" if tolerance else "equal"


def print_table(code, held):
    print(f"{'':17}{'what it says':64}code (and further places)\n"
          f"{'':17}{'difference of tolerance':25}{'against':39}test")
    for title, rows in GROUPS.items():
        print(f"\n{title}")
        for row, says in rows.items():
            places = [place for place, _ in code[row]] or ["not code" if row in NO_CODE else ""]
            print(f"{row:17}{says:64}{places[0]}" + (f" (+{len(places) - 1})" if places[1:] else ""))
            for (test, against), figure in held[row].items():
                print(f"{'':17}{figure_text(figure):25}{against:39}{test}")
    print("\nThe accuracies in Tables 1-6 are the paper's; none of them is reproduced here.")


def print_markdown(code, held):
    """Names of mtmamba.py stand without it. The tests and tolerances are left to the other table."""
    print("| Paper | What it says | Code | Largest difference from |\n|---|---|---|---|")
    for title, rows in GROUPS.items():
        first, *_, last = [*rows] * 2
        label = first if first == last else f"{first}–{last.split()[1]}"
        names = dict.fromkeys((place.split(".py")[0] + "." + name).removeprefix("mtmamba.")
                              for row in rows for place, name in code[row][:1])
        figures = defaultdict(list)
        for row in rows:
            for (_, against), figure in held[row].items():
                figures[against].append(figure)
        print("|", " | ".join([label, title, ", ".join(f"`{name}`" for name in names) or "not code", "; ".join(
            f"{against} {figure_text(max(found, key=closeness)).split(' of ')[0]}"
            for against, found in figures.items())]), "|")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="as a table for the README")
    parser.add_argument("--no-run", action="store_true", help="only whether each row has code and a test")
    args = parser.parse_args(argv)
    code, records = find_code(), run_tests(not args.no_run)
    (print_markdown if args.markdown else print_table)(code, records.held)
    problems = [*records.problems]
    for row in ROWS:
        if row not in NO_CODE and not code[row]:
            problems.append(f"{row}: no code; nothing in {', '.join(FILES)} is marked with it")
        if row not in NO_CODE and not records.held[row]:
            problems.append(f"{row}: no test that passes; give one the mark paper({row!r}, against=...)")
    for problem in problems:
        print("audit:", problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
