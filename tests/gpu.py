"""Everything that only a GPU can show, in one command.

    python tests/gpu.py --out FOLDER       # under 9 minutes on one H100 or H200, the most telling first
    python tests/gpu.py --out FOLDER --only bfloat16-8 scan
    python tests/gpu.py --out FOLDER --dry-run    # the same code at tiny sizes on a CPU, in Triton's interpreter

SLOTS, below, lists the parts with the seconds that they should take. Each part is a process of its own and reports case
by case. A case that fails, even by ending its process, leaves the others their results; one that does not fit into the
GPU's memory is no failure. All caches are empty at the start. Writes FOLDER/gpu.json after every slot, prints the
README's tables at the end. Exit code 1 where anything failed or ran out of time.
"""

import argparse
import contextlib
import copy
import functools
import gc
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

DRY = "--dry-run" in sys.argv
if DRY:    # before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch
import torch.nn.functional as F

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import benchmark
from benchmark import DEVICE, STAGES

import mtmamba
from mtmamba import SS2D, K, selective_scan_2d

# What runs at the same time, then the seconds on an H100 that we expect (a process takes 5 to start), and that it may
# take, 540 in all. What a slot leaves of these is for those after it.
SLOTS = [
    (["odd", "states", "layouts", "modes", "data", *(f"{dtype}-{batch}" for batch in (1, 8)
                                                     for dtype in ("bfloat16", "float32", "float16"))], 50, 70),
    # Three numbers of states, or two lengths of segments, are three or two times 9 s of Triton's compiler; float64.
    (["scan"], 20, 30),                   # 5 + 12 sizes and backends, 1 s each
    (["train"], 115, 130),                # 10 + 35 Dynamo and AOTAutograd, 30 Inductor, 25 the scan's kernels, 15 steps
    (["torchrun"], 100, 110),             # 2 x (10 + 5 + 35 compilation, of which PyTorch caches no ordered operators)
    (["evaluate"], 30, 40),               # 15 the command, 5 + 10 here
    (["swin-large-1"], 15, 20),           # 5 + 3 the model, 5 steps
    (["swin-large-8"], 30, 35),           # 5 + 3 the model, 15 steps, twice; the profile
    (["swin-large-compiled"], 105, 105),  # 5 + 45 Dynamo and AOTAutograd, 40 Inductor, 10 steps
]
BATCHES, N = (8, 1), 16
ODD = [(2, 5, 9, 3, 3), (1, 1, 1, 2, 3), (3, 1, 33, 70, 3), (1, 40, 1, 1, 3)]    # of odd sizes
STATES = [(2, 5, 4, 16, 1), (1, 13, 7, 66, 18), (1, 3, 5, 66, 64)]              # each N is compiled anew
if DRY:
    BATCHES, N, ODD, STATES, STAGES = (1,), 1, [(1, 1, 2, 3, 1)], [(1, 1, 2, 3, 2)], [(1, 2, 4)]
    mtmamba.SEGMENTS, mtmamba.STEPS = (4, *mtmamba.SEGMENTS), 2
    torch.set_num_threads(1)


class Report:
    """The cases of one part, on the disk before and after each of them."""

    def __init__(self, path: Path, work: Path):
        """path: where; the cases that it has are done. work: a folder that all parts share and nobody keeps."""
        self.path, self.work, self.cases = path, work, read_cases(path)

    def case(self, name: str, run):
        """run() returns the figures of the case; what it raises is noted, and the next case has its turn."""
        if any(case["case"] == name for case in self.cases):
            return
        self.cases.append({"case": name, "outcome": "failed", "error": "its process ended, or its time"})
        self.write()
        start = time.perf_counter()
        try:
            result = {"outcome": "ok", "figures": run()}
        except Exception as error:
            fits = not re.search("CUDA.*out of memory", str(error))
            frame = traceback.extract_tb(error.__traceback__)[-1]
            result = {"outcome": "failed" if fits else "does not fit",
                      "error": f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"}
        self.cases[-1] = {"case": name, **result, "seconds": round(time.perf_counter() - start, 2)}
        self.write()
        print(f"{result['outcome']:<13}{name} {result.get('error', '')}", flush=True)
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.synchronize()    # raises where the case broke the device for this process; another one goes on

    def write(self):
        """The file is whole at any time: others read it, and this process may be killed."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.cases, indent=1) + "\n")
        part.replace(self.path)


def read_cases(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


def run_parts(parts: list[str], until: float, out: Path, start):
    """Runs parts at the same time, start(part) each, until that time at most. One that breaks off is started again as
    long as it has come further."""
    def path(part):
        return out / f"{part}.json"
    running = {part: (start(part), 0) for part in parts}
    while running and time.monotonic() < until:
        time.sleep(0.05)
        for part, (process, before) in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[part]
            if code:
                cases = read_cases(path(part))
                if len(cases) > before:
                    running[part] = start(part), len(cases)
                else:
                    cases.append({"case": "start", "outcome": "failed", "error": f"exit code {code}"})
                    path(part).write_text(json.dumps(cases, indent=1) + "\n")
    for process, _ in running.values():
        kill(process)


def kill(process):
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


def random_inputs(batch, H, W, D, N, dtype, rank=None) -> list[torch.Tensor]:
    """Of selective_scan_2d, as in training; fresh ones at every call. rank: of delta, with dt_weight as the last."""
    matrix = (batch, H, W, K, N)
    shapes = [(batch, H, W, D), (batch, H, W, K, rank or D), (K, D, N), matrix, matrix, (K, D), (K, D)]
    x, delta, A, B, C, skip, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
    inputs = [x.to(dtype), (delta - 1).to(dtype), -A.exp(), B.to(dtype), C.to(dtype), skip, bias]
    inputs += [torch.randn(K, D, rank, device=DEVICE) / math.sqrt(rank)] if rank else []
    return [t.requires_grad_() for t in inputs]


def values_and_gradients(inputs, grad, backend, layout="contiguous", images=None) -> list[torch.Tensor]:
    """images: so many at a time, all by default."""
    split = [LAYOUTS[layout](inputs[i]).split(images or len(grad)) for i in (0, 1, 3, 4)]
    y = torch.cat([selective_scan_2d(x, delta, inputs[2], B, C, *inputs[5:7], backend, *inputs[7:])
                   for x, delta, B, C in zip(*split)])
    return [y.detach(), *torch.autograd.grad(y, inputs, LAYOUTS[layout](grad).to(y))]


def worst_error(ours, truth) -> float:
    """The largest of the relative errors of y and the gradients. Raises ValueError on what is not finite."""
    errors = []
    for a, b in zip(ours, truth):
        if not a.isfinite().all():
            raise ValueError(f"{(~a.isfinite()).sum()} of {a.numel()} numbers are not finite, shape {tuple(a.shape)}")
        errors.append(float((a.double() - b).norm() / b.norm().clamp(min=1e-6)))
    return max(errors)


def compare(shape, dtype, truth="loop", layout="contiguous", rank=None) -> dict:
    """Against `truth` in float64 from the same numbers, and two runs with each other, bit by bit."""
    inputs = random_inputs(*shape, dtype, rank)
    grad = torch.randn(shape[:4], device=DEVICE)
    runs = [values_and_gradients(inputs, grad.to(dtype), "triton", layout) for _ in range(2)]
    if not all(torch.equal(first, second) for first, second in zip(*runs)):
        raise ValueError("two runs differ")
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    error = worst_error(runs[0], values_and_gradients(doubles, grad.to(dtype).double(), truth, layout, images=1))
    limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    if not error < limit:
        raise ValueError(f"relative error {error:.1e}, expected less than {limit:.1e}")
    return {"relative error": error}


def real_sizes(report: Report, dtype: torch.dtype, batch: int):
    """Swin-Large's stages, as SS2D calls the scan. reference would take minutes here. The truth is the backend torch in
    float64, which the test suite checks to 1e-9."""
    if batch == 1:
        shape = (1, 1, 2, 3, N) if DRY else (2, 11, 6, 130, N)
        report.case(f"{shape}", lambda: compare(shape, dtype))
    for H, W, D in STAGES:
        report.case(f"{batch}x{H}x{W}x{D}", lambda: compare((batch, H, W, D, N), dtype, "torch",
                                                           rank=math.ceil(D / 32)))


def shapes(report: Report, sizes: list):
    for size in sizes:
        report.case(f"{size}", lambda: compare(size, torch.float32))


def layouts(report: Report):
    """The kind of an input's strides, where the map is a single row or column, too."""
    for layout in list(LAYOUTS)[4:5] if DRY else LAYOUTS:
        for size in [(1, 2, 1)] if DRY else [(2, 5, 3), (2, 7, 1), (2, 1, 7), (1, 1, 1)]:
            report.case(f"{layout}, {size}", lambda: compare((*size, 4, N), torch.float32, layout=layout))


def modes(report: Report):
    """What SS2D is run under, against float64."""
    torch.manual_seed(0)
    size = (1, 1, 3, 4) if DRY else (2, 20, 28, 192)
    module = SS2D(size[3], d_state=2 if DRY else 16, backend="triton").to(DEVICE)
    x = torch.randn(size, device=DEVICE, requires_grad=True)
    doubles, x64 = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    doubles.backend = "torch"

    def both(run, x=x, module=module):
        y = run(x)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
    truth = both(doubles, x64, doubles)

    def equal(results, tolerance=1e-5):
        error = worst_error(results, truth)
        if not error < tolerance:
            raise ValueError(f"relative error {error:.1e}, expected less than {tolerance:.0e}")
        return {"relative error": error}

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
    report.case("plain", lambda: equal(both(module)))
    for run in [checkpointed, autocast, inference, compiled, *([] if DRY else [stream, graph])]:
        report.case(run.__name__, run)


# ------------------------------------------------------------------------------------------------------------- speed

def scan(report: Report):
    """Against its bounds, and the backends against each other."""
    report.case("rates", lambda: dict(zip(("exponentials per ms", "bytes per ms"), benchmark.rates())))
    others = [] if DRY else benchmark.usable("mamba_ssm")
    repeats = {"triton": 1 if DRY else 20} | dict.fromkeys(others, 20) | {"torch": 1}
    for backend, each in repeats.items():
        for size in [(batch, *stage) for batch in BATCHES for stage in STAGES]:
            report.case(f"{backend}, {size}", lambda: benchmark.scan(sizes=[size], backends={backend: each}, N=N)[0])


def swin_large(report: Report, batch: int, compiled: bool = False):
    settings = dict(backends=["torch"], size=(32, 32), repeats=1) if DRY else dict(backends=["triton"])
    modes = ("training",) if compiled else ("inference", "training")
    for checkpoint in (False, True) if batch > 1 and not compiled else (False,):
        title = f"{batch} images{', compiled' * compiled}{', activation checkpointing' * checkpoint}"
        report.case(title, lambda: benchmark.model(1 if DRY else batch, compiled and not DRY, checkpoint=checkpoint,
                                                   modes=modes, **settings)[0])


# ------------------------------------------------------------------------------------- the scripts, as users start them

SMALL = ["--device", "cpu", "--img-size", 32, 32, "--batch-size", 2, "--workers", 0, "--encoder", "convnext_atto",
         "--variant", "stm1", "--encoder-kwargs", json.dumps(dict(dims=(8, 16, 16, 16), depths=(1, 1, 1, 1)))]


def start_script(report: Report, *command, **environment) -> subprocess.Popen:
    with open(report.path.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, *map(str, command)], cwd=TESTS.parent, stdout=log,
                                stderr=subprocess.STDOUT, env=os.environ | environment)


def finish(report: Report, process: subprocess.Popen, expected: int = 0) -> dict:
    begun = time.perf_counter()
    if process.wait() != expected:
        text = report.path.with_suffix(".log").read_text()
        memory = re.search("CUDA.*out of memory", text)    # torchrun's own last lines say nothing
        raise RuntimeError(f"exit code {process.returncode}: {memory[0] if memory else text.splitlines()[-3:]}")
    return {"seconds": time.perf_counter() - begun}


def read_log(out: Path) -> list[dict]:
    """The whole lines of its log; the last one may be being written."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def data(report: Report):
    """NYUDv2's files, for train and evaluate."""
    size = ["--count", 4, "--size", 40, 48] if DRY else ["--count", 128]
    report.case("data", lambda: finish(report, start_script(report, "tests/archives.py", "nyud", report.work / "NYUDv2",
                                                            *size)))


def train(report: Report):
    """train.py as it is by default, but for the smaller encoder and its random weights: one GPU, compiled, bfloat16."""
    out, steps, every = report.work / "run", 3 if DRY else 60, 1 if DRY else 10

    def run():
        figures = finish(report, start_script(
            report, "train.py", "--dataset", "nyud", "--data-root", report.work / "NYUDv2", "--out", out, "--encoder",
            "swin-tiny", "--no-pretrained", "--iterations", steps, "--log-every", every, "--eval-every", 0,
            *(SMALL if DRY else []), TRITON_CACHE_DIR=str(report.work / "cold")))    # the scan's kernels anew, too
        lines = read_log(out)
        images = every * lines[0]["config"]["batch_size"]
        first, *others = (line for line in lines if "losses" in line)
        speed = statistics.median(line["images_per_second"] for line in others)
        return figures | {"images/s": speed, "compilation, s": images / first["images_per_second"] - images / speed,
                          "peak memory, GiB": others[-1]["peak_memory_gib"]}
    report.case("train.py", run)


def torchrun(report: Report):
    """20 steps of MTMamba++, whose batch norm is over all processes; stopped by SIGTERM, then resumed. With one GPU,
    too, train.py builds DDP under torchrun and makes all collectives, of its one process."""
    out, processes = report.work / "stopped", 2 if DRY else min(2, torch.cuda.device_count())
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "train.py", "--out", out,
               "--tasks", "semseg", "depth", "--iterations", 20, "--log-every", 1, "--no-references",
               *(SMALL if DRY else []), "--variant", "mtmamba++"]

    def stop():
        process = start_script(report, *command)
        while not any("losses" in line for line in read_log(out)):
            if process.poll() is not None:
                finish(report, process)
                raise RuntimeError("ended before it had made a step")
            time.sleep(0.02)
        process.terminate()
        return finish(report, process, expected=1)    # torchrun's after a signal

    def resume():
        figures = finish(report, start_script(report, *command, "--resume"))
        lines = read_log(out)
        starts = [line["iteration"] for line in lines if "config" in line]
        steps = [line["iteration"] for line in lines if "losses" in line]
        if len(starts) != 2 or not 0 < starts[1] < 20 or steps != list(range(1, 21)):
            raise RuntimeError(f"expected a start at 0, one between and steps 1 to 20; found {starts}, {steps}")
        return figures | {"processes": processes, "stopped after": starts[1]}
    report.case("SIGTERM", stop)
    report.case("--resume", resume)


def evaluate(report: Report):
    """evaluate.py, and its speed without its start."""
    checkpoint, root = report.work / "run" / "last.pt", report.work / "NYUDv2"

    def speed():
        from datasets import DATASETS
        from evaluate import Evaluation, evaluate, load_checkpoint
        device = torch.device(DEVICE)
        model, stored = load_checkpoint(checkpoint, device)
        config = stored["config"]
        data_set = DATASETS["nyud"].open("val", config["img_size"], list(config["tasks"]), root)
        seconds = []
        for _ in range(2):    # the first one compiles
            start = time.perf_counter()
            evaluate(model, Evaluation(data_set, device, 0 if DRY else 8, scored=()))
            seconds.append(time.perf_counter() - start)
        return {"images": len(data_set), "images/s": len(data_set) / seconds[1]}
    report.case("evaluate.py", lambda: finish(report, start_script(
        report, "evaluate.py", "--checkpoint", checkpoint, "--dataset", "nyud", "--data-root", root, "--out",
        report.work / "scores", *(["--device", "cpu", "--workers", 0] if DRY else []))))
    report.case("images/s", speed)


PARTS = {"odd": functools.partial(shapes, sizes=ODD), "states": functools.partial(shapes, sizes=STATES),
         "layouts": layouts, "modes": modes, "data": data, "scan": scan, "train": train, "torchrun": torchrun,
         "evaluate": evaluate, "swin-large-1": functools.partial(swin_large, batch=1),
         "swin-large-8": functools.partial(swin_large, batch=8),
         "swin-large-compiled": functools.partial(swin_large, batch=8, compiled=True)}
PARTS |= {f"{dtype}-{batch}": functools.partial(real_sizes, dtype=getattr(torch, dtype), batch=1 if DRY else batch)
          for dtype in ("float32", "bfloat16", "float16") for batch in (1, 8)}


def run_part(part: str, out: Path, work: Path):
    torch.use_deterministic_algorithms(part in SLOTS[0][0], warn_only=True)    # fills what torch.empty returns with NaN
    PARTS[part](Report(out / f"{part}.json", work))


# ------------------------------------------------------------------------------------------------------------ tables

def tables(parts: dict) -> str:
    """The rows of the README's tables that were measured, in its own form; then everything else that has figures."""
    def figures(part):
        return {case["case"]: case["figures"] for case in parts.get(part, []) if case["outcome"] == "ok"}
    lines = ["| Stage | D | batch | exponentials, ms | memory, ms: forward | forward + backward | `triton`, ms: "
             "forward | forward + backward | `mamba_ssm`, ms: forward | forward + backward | `torch`, ms: forward | "
             "forward + backward |", "|---" * 12 + "|"]
    by_size = {}
    for row in figures("scan").values():
        if "backend" in row:
            by_size.setdefault(row["size"], {})[row["backend"]] = row
    for size, rows in by_size.items():
        batch, H, W, D = size.split("x")
        row = next(iter(rows.values()))
        cells = [row["fwd exp ms"], row["fwd bytes ms"], row["fwd+bwd bytes ms"]]
        cells += [rows.get(backend, {}).get(f"{name} ms") for backend in ("triton", "mamba_ssm", "torch")
                  for name in ("fwd", "fwd+bwd")]
        lines.append(f"| {H}×{W} | {D} | {batch} | {' | '.join('' if c is None else f'{c:.2f}' for c in cells)} |")
    names = ["inference images/s", "inference MiB", "training images/s", "training MiB", "scan's share, %",
             "training, first, s"]
    lines += ["", "| Swin-Large, 448×576 | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    models = [part for part in parts if part.startswith("swin-large")]
    for title, row in (item for part in models for item in figures(part).items()):
        cells = [row.get(name) for name in names]
        lines.append(f"| {title} | " + " | ".join("" if c is None else f"{c:.0f}" for c in cells) + " |")
    for title, row in figures("swin-large-8").items():
        lines += ["", f"{title}, slowest kernels:", *(f"{kernel['ms']:9.2f} ms {kernel['share, %']:5.1f} % "
                                                     f"{kernel['calls']:5} x {kernel['kernel'][:90]}"
                                                     for kernel in row["slowest kernels"])]
    lines += ["", *(f"{part}, {title}: {row}" for part in ("train", "torchrun", "evaluate")
                    for title, row in figures(part).items())]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is kept; a new one")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)    # this process's own, and the shared folder
    args = parser.parse_args()
    if args.part:
        run_part(args.part[0], args.out, Path(args.part[1]))
        return
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"{args.out} is not empty; give a new folder, so that nothing in it is overwritten")
    if DEVICE == "cpu" and not DRY:
        parser.error("there is no GPU here; --dry-run tries the code on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    begun = until = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        os.environ |= {"TRITON_CACHE_DIR": f"{work}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{work}/inductor"}

        def start(part):
            if DRY:    # forked, as importing takes longer than all the rest
                from processes import Forked
                return Forked(multiprocessing.get_context("fork"), run_part, part, args.out, Path(work))
            return subprocess.Popen([sys.executable, __file__, "--out", args.out, "--part", part, work])
        parts = {}
        for names, expected, limit in SLOTS:
            until += 10 * limit if DRY else limit
            names = [part for part in names if part in args.only]
            if not names:
                continue
            print(f"--- {' '.join(names)}: about {expected} s", flush=True)
            slot = time.monotonic()
            run_parts(names, until, args.out, start)
            print(f"--- {time.monotonic() - slot:.0f} s", flush=True)
            parts |= {part: read_cases(args.out / f"{part}.json") for part in names}
            other = [f"{case['outcome']}: {part}, {case['case']}: {case['error']}" for part, cases in parts.items()
                     for case in cases if case["outcome"] != "ok"]
            result = {"hardware": benchmark.hardware(), "seconds": time.monotonic() - begun, "not ok": other,
                      "parts": parts}
            (args.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(["", benchmark.hardware(), "", tables(parts), "", *(other or ["all ok"])]))
    sys.exit(any(line.startswith("failed") for line in other))


if __name__ == "__main__":
    main()
