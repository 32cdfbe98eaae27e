"""The table of tests/ablation.py, of figures that are made up, and the folders that it refuses."""

import argparse
import json

import ablation
import numpy as np
import pytest
import torch

import train
from datasets import Synthetic
from metrics import TASKS


@pytest.fixture
def runs(tmp_path):
    """Folders of finished runs with three seeds; the figures by (row, task)."""
    rng, figures = np.random.default_rng(0), {}
    for row, networks in ablation.NETWORKS.items():
        for i, (name, flags) in enumerate(networks.items()):
            tasks = {flags[flags.index("--tasks") + 1]} if "--tasks" in flags else set(Synthetic.TASKS)
            for seed in range(3):
                parser = argparse.ArgumentParser()
                train.add_arguments(parser)
                args = parser.parse_args([*flags, "--seed", str(seed)])
                train.complete_flags(args, Synthetic, torch.device("cpu"), 1)
                results = {task: {TASKS[task].metrics[0]: rng.uniform(1, 9)} for task in tasks}
                for task, scores in results.items():
                    figures.setdefault((row, task), []).extend(scores.values())
                content = dict(results=results, parameters=1_250_000 + 500_000 * i,
                               training={name: getattr(args, name) for name in train.DECISIVE})
                (tmp_path / f"{name}_{seed}").mkdir()
                (tmp_path / f"{name}_{seed}/results.json").write_text(json.dumps(content))
    return figures


def table(capsys, *arguments):
    assert ablation.main(["--table", *map(str, arguments)]) == 0
    return {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in capsys.readouterr().out.splitlines()[1:]}


def test_table(runs, tmp_path, capsys):
    (tmp_path / "stm3_2/results.json").unlink()
    lines = table(capsys, "--out", tmp_path)
    assert lines["stm3"][0] == "2 of 3 runs" and not "".join(lines["stm3"][1:])
    assert [head.split()[0] for head in lines["Network"][:-2]] == list(Synthetic.TASKS)
    for row in ablation.NETWORKS.keys() - {"stm3"}:
        for task, cell in zip(Synthetic.TASKS, lines[row]):
            mean, deviation = map(float, cell.split("±"))
            assert abs(mean - np.mean(runs[row, task])) < 0.051
            assert abs(deviation - np.std(runs[row, task], ddof=1)) < 0.051
        gains, baseline = [], {task: np.mean(runs["single-task", task]) for task in Synthetic.TASKS}
        for seed in range(3):
            relative = {task: runs[row, task][seed] / baseline[task] - 1 for task in Synthetic.TASKS}
            gains.append(100 * np.mean([-g if task in ("normal", "depth") else g for task, g in relative.items()]))
        mean, deviation = map(float, lines[row][-2].split("±"))
        assert abs(mean - np.mean(gains)) < 0.051 and abs(deviation - np.std(gains, ddof=1)) < 0.051
    assert lines["mtmamba"][-1] == "1.25" and lines["single-task"][-1] == "15.00"    # 6 * 1.25 + 0.5 * (1 + ... + 5)


def test_no_delta_m_without_a_complete_baseline(runs, tmp_path, capsys):
    some = "--out", tmp_path, "--networks", "stm2", "mtmamba"
    whole = table(capsys, *some)
    assert list(whole)[2:] == ["stm2", "mtmamba"] and all(whole[row][-2] for row in ("stm2", "mtmamba"))
    (tmp_path / "single-depth_1/results.json").unlink()
    lines = table(capsys, *some)
    assert lines["mtmamba"] == [*whole["mtmamba"][:-2], "", whole["mtmamba"][-1]]
    assert table(capsys, "--out", tmp_path)["single-task"][0] == "17 of 18 runs"


@pytest.mark.parametrize("file, content", [
    ("results.json", dict(results={}, training={})),
    ("log.jsonl", dict(iteration=0, config=dict(lr=0.01, iterations=9)))])
def test_folders_of_other_runs_are_refused(file, content, runs, tmp_path, capsys):
    first, other = tmp_path / "single-semseg_0", tmp_path / "stm1_1"
    for arguments, message in (
            (["--iterations", "9"], f"{first} holds a run with --iterations 350 (here 9); give the same flags"),
            ([], f"{other} holds a run with --dataset None (here synthetic)")):
        if not arguments:
            (other / "results.json").unlink()
            (other / file).write_text(json.dumps(content))
        with pytest.raises(SystemExit) as exit:
            ablation.main(["--out", str(tmp_path), *arguments])
        assert exit.value.code == 2 and f"ablation.py: {message}" in capsys.readouterr().err
