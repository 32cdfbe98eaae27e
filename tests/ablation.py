"""The paper's ablation in miniature: trains rows of Tables 2 and 5, and MTMamba++, with the main job's recipe.

    python tests/ablation.py --seeds 3                               # 45 trainings, one per core at a time; hours
    python tests/ablation.py --seeds 3 --table                       # prints the table of what is there
    python tests/ablation.py --networks stm2 mtmamba --seeds 1       # some rows alone

Every run writes to a folder of its own below runs/ablation, as train.py does. The same command continues after an
interruption: finished runs are kept, others resumed. A folder of a run with other flags is refused. The single-task
baseline is a network per task with the decoder of stm2, which has no cross-task block.
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

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train
from datasets import Parser, Synthetic, usable_cpus
from metrics import Labels, delta_m

MULTI_TASK = ["stm1", "stm2", "stm3", "fusion-specific", "fusion-shared", "mtmamba", "mtmamba++", "s-ctm-dense",
              "f-ctm-lite"]
# By row of the table, the flags of its networks by the name of their runs.
NETWORKS = {"single-task": {f"single-{task}": ["--variant", "stm2", "--tasks", task] for task in Synthetic.TASKS},
            **{variant: {variant: ["--variant", variant]} for variant in MULTI_TASK}}


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where a run failed, 2 where a folder has a run with other flags."""
    parser = Parser("ablation.py", __doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME",
                        help=f"rows of the table: {', '.join(NETWORKS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--jobs", type=int, default=usable_cpus(), help="runs at a time, of one thread each (default: "
                        "one per core)")
    parser.add_argument("--iterations", type=int, help="fewer than the recipe's, to try this script")
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    with parser.told():
        more = ["--iterations", str(args.iterations)] if args.iterations else []
        flags = {row: {f"{name}_{seed}": [*own, "--seed", str(seed), *more] for name, own in networks.items()
                       for seed in range(args.seeds)} for row, networks in NETWORKS.items()}
        for name, own in [run for row in ("single-task", *args.networks) for run in flags[row].items()]:
            check_flags(args.out / name, own)
        failed = [] if args.table else train_all(
            args, {name: own for row in args.networks for name, own in flags[row].items()})
        print_table(args)
    for name in failed:
        print(f"{name} failed; its output is in {args.out / name}.txt", file=sys.stderr)
    return int(bool(failed))


def check_flags(folder: Path, argv: list[str]):
    """Raises ValueError where the folder holds a run with other flags, finished or not."""
    found = [line["config"] for line in train.read_log(folder / "log.jsonl") if "config" in line]
    if (folder / "results.json").exists():
        found.append(json.loads((folder / "results.json").read_text()).get("training") or {})
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(argv)
    train.complete_flags(args, Synthetic, torch.device("cpu"), 1)
    wanted = json.loads(json.dumps({name: getattr(args, name) for name in train.DECISIVE}, default=str))
    different = [f"--{name.replace('_', '-')} {flags.get(name)} (here {value})" for flags in found[-1:]
                 for name, value in wanted.items() if flags.get(name) != value]
    if different:
        raise ValueError(f"{folder} holds a run with {', '.join(different)}; give the same flags, or another --out")


def train_all(args: argparse.Namespace, flags: dict[str, list[str]]) -> list[str]:
    """All runs that are not finished. flags: by the run's name. Returns the names of those that failed."""
    waiting = {name: own for name, own in flags.items() if not (args.out / name / "results.json").exists()}
    args.out.mkdir(parents=True, exist_ok=True)
    running, failed = {}, []
    with tqdm(total=len(flags), initial=len(flags) - len(waiting), unit="run") as bar, contextlib.ExitStack() as stack:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    name = next(iter(waiting))
                    output = stack.enter_context(open(args.out / f"{name}.txt", "w"))
                    running[name] = subprocess.Popen(
                        [sys.executable, "train.py", *waiting.pop(name), "--no-references", "--device", "cpu",
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


def print_table(args: argparse.Namespace):
    """Mean and standard deviation of the primary metrics over the seeds, delta_m against the single-task means and the
    parameters of a row's networks, as Markdown. A row without all of its runs says how many there are, and without all
    single-task runs there is no delta_m."""
    kinds = Labels(Synthetic.TASKS).kinds
    heads = [f"{kind.title} {kind.metrics[0]} {'↓' if kind.lower_is_better else '↑'}" for kind in kinds.values()]
    print(f"\n| Network | {' | '.join(heads)} | Δm % | #Param (M) |\n|{'---|' * (len(heads) + 3)}")
    results = {row: [read_results(args.out / f"{name}_{seed}") for name in networks for seed in range(args.seeds)]
               for row, networks in NETWORKS.items()}
    baseline = None
    if all(results["single-task"]):
        baseline = {task: statistics.mean(values) for task, values in by_seed(results["single-task"], kinds).items()}
    for row in args.networks:
        runs = list(filter(None, results[row]))
        if len(runs) < len(results[row]):
            print(f"| {row} | {len(runs)} of {len(results[row])} runs" + " |" * (len(heads) + 2))
            continue
        figures = by_seed(runs, kinds)
        cells = [spread(values, kinds[task].digits // 2) for task, values in figures.items()]
        gains = [delta_m(dict(zip(figures, values)), baseline, kinds) for values in zip(*figures.values()) if baseline]
        parameters = sum(run["parameters"] for run in runs) / args.seeds / 1e6
        print(f"| {row} | {' | '.join(cells)} | {spread(gains, 1) if gains else ''} | {parameters:.2f} |")


def read_results(folder: Path) -> dict | None:
    path = folder / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def by_seed(runs: list[dict], kinds: dict) -> dict[str, list[float]]:
    """The primary metrics by task, of the seeds."""
    return {task: [run["results"][task][kind.metrics[0]] for run in runs if task in run["results"]]
            for task, kind in kinds.items()}


def spread(values: list[float], digits: int) -> str:
    deviation = f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = round(statistics.mean(values), digits) + 0.0    # not -0.0
    return f"{mean:.{digits}f}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
