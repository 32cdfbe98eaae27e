"""The table of tests/ablation.py, of figures that are made up."""

import json

import ablation
import numpy as np
import torch

from datasets import Synthetic
from metrics import TASKS


def test_table(tmp_path, capsys):
    rng, encoder = np.random.default_rng(0), dict(dims=(8, 16, 16, 16), depths=(1, 1, 1, 1))
    figures = {}    # (row, task): of the seeds
    for row, networks in ablation.NETWORKS.items():
        for name, flags in networks.items():
            tasks = {flags[flags.index("--tasks") + 1]} if "--tasks" in flags else set(TASKS)
            for seed in range(2 if row == "stm3" else 3):    # one run of stm3 is missing
                folder = tmp_path / f"{name}_{seed}"
                folder.mkdir()
                results = {task: {TASKS[task].metrics[0]: rng.uniform(1, 9)} for task in tasks}
                for task, scores in results.items():
                    figures.setdefault((row, task), []).extend(scores.values())
                (folder / "results.json").write_text(json.dumps({"results": results}))
                config = dict(tasks={task: TASKS[task].channels or Synthetic.TASKS[task] for task in sorted(tasks)},
                              encoder="convnext_atto", encoder_kwargs=encoder, variant=flags[1], d_state=1)
                torch.save(dict(model={}, config=config), folder / "last.pt")
    ablation.print_table(tmp_path, 3)
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines["stm3"][0].strip() == "2 of 3 runs" and not "".join(lines["stm3"][1:]).strip()
    for row in ablation.NETWORKS.keys() - {"stm3"}:
        for task, cell in zip(TASKS, lines[row]):
            mean, deviation = map(float, cell.split("±"))
            assert abs(mean - np.mean(figures[row, task])) < 0.051
            assert abs(deviation - np.std(figures[row, task], ddof=1)) < 0.051
        gains = []    # by seed
        for seed in range(3):
            relative = [figures[row, task][seed] / np.mean(figures["single-task", task]) - 1 for task in TASKS]
            gains.append(100 * np.mean([-g if task in ("normal", "depth") else g for g, task in zip(relative, TASKS)]))
        mean, deviation = map(float, lines[row][-2].split("±"))
        assert abs(mean - np.mean(gains)) < 0.051 and abs(deviation - np.std(gains, ddof=1)) < 0.051
    assert float(lines["stm2"][-1]) < float(lines["mtmamba"][-1]) < float(lines["single-task"][-1])
