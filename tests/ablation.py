"""The paper's ablation in miniature: trains rows of Tables 2 and 5, and MTMamba++, with the main job's recipe.

    python tests/ablation.py --seeds 3               # 45 trainings, one per core at a time; hours on a laptop
    python tests/ablation.py --seeds 3 --table       # prints the table of what is there

Every run writes to a folder of its own below runs/ablation, as train.py does. The same command continues after an
interruption: finished runs are kept, others resumed. The single-task baseline is a network per task with the decoder of
stm2, which has no cross-task block.
"""

# Order: what is trained; main; the runs; the table.

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from datasets import Synthetic, usable_cpus
from evaluate import read_checkpoint
from metrics import TASKS, delta_m
from mtmamba import MTMamba

MULTI_TASK = ["stm1", "stm2", "stm3", "fusion-specific", "fusion-shared", "mtmamba", "mtmamba++", "s-ctm-dense",
              "f-ctm-lite"]
# By row of the table, the flags of its networks by the name of their runs.
NETWORKS = {"single-task": {f"single-{task}": ["--variant", "stm2", "--tasks", task] for task in Synthetic.TASKS},
            **{variant: {variant: ["--variant", variant]} for variant in MULTI_TASK}}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="runs at a time, of one thread each (default: "
                        "one per core)")
    parser.add_argument("--iterations", type=int, help="fewer than the recipe's, to try this script")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    failed = [] if args.table else train(args)
    print_table(args.out, args.seeds)
    for name in failed:
        print(f"{name} failed; its output is in {args.out / name}.txt", file=sys.stderr)
    return int(bool(failed))


def train(args: argparse.Namespace) -> list[str]:
    """All runs that are not finished. Returns the names of those that failed."""
    flags = {f"{name}_{seed}": [*own, "--seed", str(seed)] for seed in range(args.seeds)
             for networks in NETWORKS.values() for name, own in networks.items()}
    waiting = {name: own for name, own in flags.items() if not (args.out / name / "results.json").exists()}
    args.out.mkdir(parents=True, exist_ok=True)
    running, failed = {}, []
    with tqdm(total=len(flags), initial=len(flags) - len(waiting), unit="run") as bar, contextlib.ExitStack() as stack:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    name = next(iter(waiting))
                    more = ["--iterations", str(args.iterations)] if args.iterations else []
                    output = stack.enter_context(open(args.out / f"{name}.txt", "w"))
                    running[name] = subprocess.Popen(
                        [sys.executable, "train.py", *waiting.pop(name), *more, "--no-references", "--device", "cpu",
                         "--out", args.out.resolve() / name, "--resume"], cwd=ROOT, stdout=output, stderr=output,
                        env=os.environ | {"OMP_NUM_THREADS": "1"})
                time.sleep(0.2)
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        failed += [name] * (not (args.out / name / "results.json").exists())
                        bar.update()
        finally:    # after Ctrl-C, train.py finishes its step and saves
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed


def print_table(out: Path, seeds: int):
    """Mean and standard deviation of the primary metrics over the seeds, delta_m against the single-task means and the
    parameters of a row's networks, as Markdown. A row without all of its runs says how many there are."""
    heads = [f"{task} {row.metrics[0]} {'↓' if row.lower_is_better else '↑'}" for task, row in TASKS.items()]
    print(f"\n| Network | {' | '.join(heads)} | Δm % | #Param (M) |\n|{'---|' * (len(heads) + 3)}")
    baseline = None
    for row, networks in NETWORKS.items():
        files = {name: [path for seed in range(seeds) if (path := out / f"{name}_{seed}" / "results.json").exists()]
                 for name in networks}
        if min(map(len, files.values())) < seeds:
            print(f"| {row} | {sum(map(len, files.values()))} of {seeds * len(files)} runs" + " |" * (len(heads) + 2))
            continue
        figures = {task: [] for task in TASKS}    # by seed
        for path in (path for paths in files.values() for path in paths):
            for task, scores in json.loads(path.read_text())["results"].items():
                figures[task].append(scores[TASKS[task].metrics[0]])
        baseline = baseline or {task: statistics.mean(values) for task, values in figures.items()}
        gains = [delta_m(dict(zip(figures, values)), baseline) for values in zip(*figures.values())]
        with contextlib.redirect_stdout(None):
            models = [MTMamba(**read_checkpoint(paths[0].with_name("last.pt"))["config"]) for paths in files.values()]
        parameters = sum(p.numel() for model in models for p in model.parameters()) / 1e6
        cells = [spread(values, 2 if task == "depth" else 1) for task, values in figures.items()]
        print(f"| {row} | {' | '.join(cells)} | {spread(gains, 1)} | {parameters:.2f} |")


def spread(values: list[float], digits: int) -> str:
    deviation = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = round(statistics.mean(values), digits) + 0.0    # not -0.0
    return f"{mean:.{digits}f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
