"""Everything that only a GPU can show, in one command.

    python tests/gpu.py --out FOLDER       # under 9 minutes on one H100 or H200
    python tests/gpu.py --out FOLDER --only correctness scan
    python tests/gpu.py --out FOLDER --dry-run    # the same code at tiny sizes on a CPU, in Triton's interpreter

    correctness    the kernels against float64: types, sizes, strides, poisoned memory, and the modes they run under
    scan           one SS2D scan per backend against its floors
    sweep          the sizes that the kernels are launched with
    model          Swin-Large at 448x576: inference and training steps, eager and compiled
    train          train.py through torchrun, killed, resumed; evaluate.py after it

Each part is a process of its own with a time limit, so that a fault of one, even one of the device, leaves the others
their results. Writes FOLDER/gpu.json after every case, prints the tables for the README at the end. Exit code 1 where
anything failed or ran out of time.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

DRY = "--dry-run" in sys.argv
if DRY:    # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import benchmark
from benchmark import DEVICE, STAGES

import mtmamba
from mtmamba import SS2D, K, selective_scan_2d

LIMITS = {"correctness": 130, "scan": 45, "sweep": 90, "model": 175, "train": 85}    # seconds
BATCHES, N = (8, 1), 16
ODD = [(2, 5, 9, 3, 3), (1, 1, 1, 2, 3), (3, 1, 33, 70, 3), (1, 40, 1, 1, 3), (2, 11, 6, 130, 16), (1, 13, 7, 66, 18)]
TUNABLES = {    # of the kernels, by the batch that each matters to
    8: [dict(), dict(STEPS=4), dict(SEGMENT_MAX=64), dict(SEGMENT_MAX=256), dict(BLOCK_D=32), dict(BLOCK_D_ADJOINT=64),
        dict(REGISTERS={"maxnreg": 128}), dict(REGISTERS={})],
    1: [dict(), dict(SEGMENT_CHANNELS=2 ** 16), dict(SEGMENT_CHANNELS=2 ** 18), dict(SEGMENT_MIN=8)]}
if DRY:
    BATCHES, N, ODD, STAGES, TUNABLES = (1,), 1, [(1, 1, 2, 3, 1)], [(1, 2, 4)], {1: [dict(), dict(STEPS=4)]}
    mtmamba.SEGMENT_MIN, mtmamba.STEPS = 4, 2


class Report:
    """The cases of one part, on the disk after each of them."""

    def __init__(self, path: Path):
        self.path, self.cases = path, []

    def case(self, name: str, run):
        """run() returns the figures of the case; what it raises is noted, and the next case has its turn."""
        start = time.perf_counter()
        try:
            result = {"ok": True, "figures": run()}
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            result = {"ok": False, "error": f"{type(error).__name__}: {error} ({where})"}
        self.cases.append({"case": name, **result, "seconds": round(time.perf_counter() - start, 2)})
        print("ok    " if result["ok"] else "FAILED", name, result.get("error", ""), flush=True)
        self.path.write_text(json.dumps(self.cases, indent=1) + "\n")


def kill(process: subprocess.Popen):
    """At once, with all that it started; torchrun's processes are in sessions of their own."""
    family = [process.pid]
    for pid in family:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            family += map(int, children.read_text().split())
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


# ----------------------------------------------------------------------------------------------------- correctness

def every_other(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t in every other place of a wider tensor, its neighbours NaN."""
    wide = torch.stack([t, torch.full_like(t, torch.nan)], dim + 1).flatten(dim, dim + 1)
    return wide[(slice(None),) * dim + (slice(None, None, 2),)]


LAYOUTS = {    # of x, delta, B and C: (B, H, W, ...)
    "contiguous": lambda t: t,
    "sliced channels": lambda t: F.pad(t, (3, 2), value=torch.nan)[..., 3:-2],    # as of a projection that made several
    "every other channel": lambda t: every_other(t, t.ndim - 1),
    "every other column": lambda t: every_other(t, 2),
    "channels first": lambda t: t.permute(0, *range(3, t.ndim), 1, 2).contiguous().permute(0, -2, -1,
                                                                                             *range(1, t.ndim - 2)),
    "columns first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded pixels": lambda t: t[:1, :1, :1].expand_as(t),
    "expanded rows": lambda t: t[:, :1].expand_as(t),
    "expanded directions": lambda t: t[..., :1, :].expand_as(t),
    "expanded channels": lambda t: t[..., :1].expand_as(t),
}


def random_inputs(batch, H, W, D, N, dtype) -> list[torch.Tensor]:
    """Of selective_scan_2d, as in training; fresh ones at every call."""
    matrix = (batch, H, W, K, N)
    shapes = [(batch, H, W, D), (batch, H, W, K, D), (K, D, N), matrix, matrix, (K, D), (K, D)]
    x, delta, A, B, C, skip, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    return [t.requires_grad_() for t in (x.to(dtype), (delta - 1).to(dtype), -A.exp(), B.to(dtype), C.to(dtype), skip,
                                         bias)]


def values_and_gradients(inputs, grad, backend, layout="contiguous") -> list[torch.Tensor]:
    x, delta, B, C = (LAYOUTS[layout](inputs[i]) for i in (0, 1, 3, 4))
    y = selective_scan_2d(x, delta, inputs[2], B, C, *inputs[5:], backend)
    return [y.detach(), *torch.autograd.grad(y, inputs, LAYOUTS[layout](grad).to(y))]


def worst_error(ours, truth) -> float:
    """The largest of the relative errors of y and the gradients. Raises ValueError on what is not finite."""
    errors = []
    for a, b in zip(ours, truth):
        if not a.isfinite().all():
            raise ValueError(f"{(~a.isfinite()).sum()} of {a.numel()} numbers are not finite, shape {tuple(a.shape)}")
        errors.append(float((a.double() - b).norm() / b.norm().clamp(min=1e-6)))
    return max(errors)


def compare(shape, dtype, truth="loop", layout="contiguous") -> dict:
    """Against `truth` in float64 from the same numbers, and two runs with each other, bit by bit."""
    inputs = random_inputs(*shape, dtype)
    grad = torch.randn(shape[:4], device=DEVICE)
    runs = [values_and_gradients(inputs, grad.to(dtype), "triton", layout) for _ in range(2)]
    if not all(torch.equal(first, second) for first, second in zip(*runs)):
        raise ValueError("two runs differ")
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    error = worst_error(runs[0], values_and_gradients(doubles, grad.to(dtype).double(), truth, layout))
    limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    if not error < limit:
        raise ValueError(f"relative error {error:.1e}, expected less than {limit:.1e}")
    return {"relative error": error}


def modes() -> dict:
    """What SS2D is run under -> a function that checks it against the plain run."""
    torch.manual_seed(0)
    size = (1, 1, 3, 4) if DRY else (2, 20, 28, 192)
    module = SS2D(size[3], d_state=2 if DRY else 16, backend="triton").to(DEVICE)
    x = torch.randn(size, device=DEVICE, requires_grad=True)

    def both(run, x=x):
        y = run(x)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
    plain = both(module)

    def equal(results, expected=plain, tolerance=1e-5):
        error = worst_error(results, [t.double() for t in expected])
        if not error < tolerance:
            raise ValueError(f"differs from the plain run by {error:.1e}")
        return {"relative difference": error}

    def compiled():
        run = torch.compile(module, fullgraph=True, backend="aot_eager" if DRY else "inductor")
        return equal(both(run))

    def checkpointed():
        return equal(both(lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)))

    def autocast():
        with torch.autocast(DEVICE, torch.bfloat16):
            return equal(both(module), tolerance=0.05)

    def inference():
        with torch.inference_mode():
            return equal([module(x)])

    def stream():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            results = both(module)
        torch.cuda.current_stream().wait_stream(side)
        return equal(results)

    def graph():
        fixed = torch.randn_like(x)
        with torch.no_grad():
            module(fixed)    # compiles
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording):
                y = module(fixed)
            fixed.copy_(x)
            recording.replay()
        return equal([y])
    on_cpu = {"torch.compile": compiled, "activation checkpointing": checkpointed, "autocast": autocast,
              "inference_mode": inference}
    return on_cpu if DRY else on_cpu | {"a second stream": stream, "a CUDA graph": graph}


def correctness(report: Report):
    torch.use_deterministic_algorithms(True, warn_only=True)    # fills what torch.empty returns with NaN
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    for shape in ODD:
        for dtype in dtypes if shape[4] == 16 else dtypes[:1]:    # each number of states is a compilation
            report.case(f"{shape} {dtype}", lambda: compare(shape, dtype))
    # The kind of an input's strides, where the map is a single row or column, too.
    for layout in list(LAYOUTS)[4:5] if DRY else LAYOUTS:
        for size in [(1, 2, 1)] if DRY else [(2, 5, 3), (2, 7, 1), (2, 1, 7), (1, 1, 1)]:
            report.case(f"{layout}, {size}", lambda: compare((*size, 4, N), torch.float32, layout=layout))
    for name, check in modes().items():
        report.case(f"under {name}", check)
    # reference would take minutes here. The truth is the backend torch in float64, which the test suite checks to 1e-9.
    for batch in BATCHES:
        for H, W, D in STAGES:
            for dtype in dtypes[1:2] if DRY else dtypes:
                report.case(f"{batch}x{H}x{W}x{D} {dtype}", lambda: compare((batch, H, W, D, N), dtype, "torch"))


# ------------------------------------------------------------------------------------------------------------- speed

def scan(report: Report):
    report.case("rates", lambda: dict(zip(("exponentials per ms", "bytes per ms"), benchmark.rates())))
    for size in [(batch, *stage) for batch in BATCHES for stage in STAGES]:
        report.case(f"{size}", lambda: benchmark.scan(sizes=[size], backends={"triton": 1} if DRY else None, N=N))


def sweep(report: Report):
    """One tunable at a time from what it is. The best set is the one with the least time in the three stages."""
    def run(batch, change):
        before = {name: getattr(mtmamba, name) for name in change}
        vars(mtmamba).update(change)
        try:
            sizes = [(batch, *stage) for stage in STAGES]
            rows = benchmark.scan(sizes=sizes, backends={"triton": 1 if DRY else 10}, N=N)
        finally:
            vars(mtmamba).update(before)
        return {"batch": batch, "change": {name: str(value) for name, value in change.items()},
                "total ms": sum(row["fwd+bwd ms"] for row in rows), "rows": rows}
    for batch, changes in TUNABLES.items():
        for change in changes:
            report.case(f"batch {batch}, {change or 'as it is'}", lambda: run(batch, change))


def model(report: Report):
    settings = dict(backends=["torch"], size=(32, 32), repeats=1) if DRY else dict(backends=["triton"])
    # What is missed least comes last, in case the time runs out.
    cases = [(8, False, False), (8, True, False), (1, False, False), (8, False, True), (1, True, False),
             (8, True, True), (1, False, True), (1, True, True)]
    for batch, compiled, checkpointed in [(1, False, True)] if DRY else cases:
        report.case(f"batch {batch}{', compiled' * compiled}{', activation checkpointing' * checkpointed}",
                    lambda: benchmark.model(batch, compiled, checkpoint=checkpointed, **settings))


# ---------------------------------------------------------------------------------------------------------- train.py

def train(report: Report):
    folder = report.path.parent / "train"
    data, out = folder / "NYUDv2", folder / "run"
    python, torchrun = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                          "--nproc-per-node", "1"]
    iterations, save_every = (3, 1) if DRY else (30, 10)
    arguments = ["train.py", "--dataset", "nyud", "--data-root", data, "--out", out, "--no-pretrained", "--iterations",
                 iterations, "--save-every", save_every, "--log-every", 1, "--eval-every", 0, "--no-compile"]
    if DRY:
        arguments += ["--device", "cpu", "--backend", "torch", "--img-size", 32, 32, "--batch-size", 1, "--workers", 0,
                      "--encoder", "convnext_atto", "--variant", "stm1", "--encoder-kwargs",
                      json.dumps(dict(dims=(8, 16, 16, 16), depths=(1, 1, 1, 1)))]

    def start(command):
        with open(folder / "log.txt", "a") as log:
            return subprocess.Popen(list(map(str, command)), cwd=TESTS.parent, stdout=log, stderr=subprocess.STDOUT)

    def last_lines() -> str:
        return " | ".join((folder / "log.txt").read_text().splitlines()[-3:])

    def finish(command) -> dict:
        begun = time.perf_counter()
        code = start(command).wait()
        if code:
            raise RuntimeError(f"exit code {code}: {last_lines()}")
        return {"seconds": time.perf_counter() - begun}

    def export():
        folder.mkdir(parents=True)
        return finish([*python, "tests/archives.py", "nyud", data, "--count", 2 if DRY else 16,
                       *(["--size", 40, 48] if DRY else [])])

    def killed():
        process = start([*torchrun, *arguments])
        while not (out / "last.pt").exists():
            if process.poll() is not None:
                raise RuntimeError(f"ended before it saved: {last_lines()}")
            time.sleep(0.05)
        kill(process)

    def resumed():
        figures = finish([*torchrun, *arguments, "--resume"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        starts, reached = [line["iteration"] for line in lines if "config" in line], lines[-1].get("iteration")
        if len(starts) < 2 or not 0 < starts[-1] <= iterations or not (out / "results.json").exists():
            raise RuntimeError(f"started at {starts}, expected a start at 0 and one after a saved iteration")
        return figures | {"starts": starts, "last line's iteration": reached}

    report.case("export", export)
    report.case("train.py, killed after its first checkpoint", killed)
    report.case("train.py --resume", resumed)
    report.case("evaluate.py", lambda: finish([
        *python, "evaluate.py", "--checkpoint", out / "last.pt", "--dataset", "nyud", "--data-root", data, "--out",
        folder / "scores", *(["--device", "cpu", "--backend", "torch", "--workers", 0] if DRY else [])]))


# ------------------------------------------------------------------------------------------------------------ tables

def tables(parts: dict) -> str:
    """The rows of the README's tables that were measured, in its own form."""
    def figures(part):
        return [case["figures"] for case in parts.get(part, []) if case["ok"]]
    lines = ["| Stage | D | batch | exponentials, ms | memory, ms: forward | forward + backward | `triton`, ms: "
             "forward | forward + backward | `mamba_ssm`, ms: forward | forward + backward |", "|---" * 10 + "|"]
    for rows in filter(lambda figure: isinstance(figure, list), figures("scan")):
        by_backend = {row["backend"]: row for row in rows}
        batch, H, W, D = rows[0]["size"].split("x")
        cells = [rows[0]["exp ms"], rows[0]["fwd bytes ms"], rows[0]["fwd+bwd bytes ms"]]
        cells += [by_backend.get(backend, {}).get(f"{name} ms") for backend in ("triton", "mamba_ssm")
                  for name in ("fwd", "fwd+bwd")]
        cells = ["" if cell is None else f"{cell:.2f}" for cell in cells]
        lines.append(f"| {H}×{W} | {D} | {batch} | {' | '.join(cells)} |")
    names = ["inference images/s", "inference MiB", "training images/s", "training MiB", "scan's share, %", "graphs",
             "graph breaks"]
    lines += ["", "| Swin-Large, 448×576 | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for case in parts.get("model", []):
        if case["ok"]:
            cells = [case["figures"][0][name] for name in names]
            lines.append(f"| {case['case']} | " + " | ".join("" if c is None else f"{c:.0f}" for c in cells) + " |")
    for batch in TUNABLES:
        swept = [run for run in figures("sweep") if run["batch"] == batch]
        if swept:
            best, usual = min(swept, key=lambda run: run["total ms"]), swept[0]
            lines += ["", f"Sweep, batch {batch}: {usual['total ms']:.2f} ms as it is; the best set "
                          f"{best['change'] or 'is that'}, {best['total ms']:.2f} ms"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written; a new one")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    parser.add_argument("--part", choices=LIMITS, help=argparse.SUPPRESS)    # this process's own
    args = parser.parse_args()
    if args.part:
        globals()[args.part](Report(args.out / f"{args.part}.json"))
        return
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; give a new folder, so that nothing in it is overwritten")
    if DEVICE == "cpu" and not DRY:
        parser.error("there is no GPU here; --dry-run tries the code on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    parts, failed = {}, []
    for part in args.only:
        print(f"--- {part}", flush=True)
        command = [sys.executable, __file__, "--out", args.out, "--part", part, *(["--dry-run"] if DRY else [])]
        process = subprocess.Popen(list(map(str, command)))
        try:
            process.wait(LIMITS[part])
            ended = f"exit code {process.returncode}" if process.returncode else None
        except subprocess.TimeoutExpired:
            kill(process)
            ended = f"out of its {LIMITS[part]} seconds"
        path = args.out / f"{part}.json"
        parts[part] = json.loads(path.read_text()) if path.exists() else []
        failed += [f"{part}: {case['case']}: {case['error']}" for case in parts[part] if not case["ok"]]
        failed += [f"{part}: {ended} after {len(parts[part])} cases"] if ended else []
        result = {"hardware": benchmark.hardware(), "failed": failed, "parts": parts}
        (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{benchmark.hardware()}\n\n{tables(parts)}\n\n" + ("\n".join(["FAILED", *failed]) if failed else "all ok"))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
