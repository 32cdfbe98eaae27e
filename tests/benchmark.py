"""Measures speed; asserts nothing.

    python tests/benchmark.py scan         # one SS2D scan per backend against its floors, on the GPU where there is one
    python tests/benchmark.py scan --full  # on a CPU, too, the three decoder stages of Swin-Large
    python tests/benchmark.py model        # inference and training steps of the whole network; on a GPU also --compile
    python tests/benchmark.py model --size 512 512    # on a CPU: of PASCAL-Context's size and tasks, minutes
    python tests/benchmark.py synthetic    # images per second of the synthetic data set, one core
    python tests/benchmark.py data         # training samples per second and core, PASCAL-Context's files
    python tests/benchmark.py boundary     # seconds per image for odsF, one core
    python tests/benchmark.py busy         # the main job, alone and beside one busy process per core, 15 minutes
"""

import argparse
import ctypes
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from archives import export
from datasets import PascalContext, Pool, Synthetic, prepare
from metrics import boundary_counts
from mtmamba import HAS_NUMBA, K, MTMamba, has_mamba_ssm, has_triton, selective_scan_2d, triton

if triton:
    import triton.language as tl

    @triton.jit
    def exponentials_kernel(out, repeats):
        """Nothing but exponentials: repeats of them per number."""
        x = tl.arange(0, 1024) / 1024
        for _ in range(repeats):
            x = tl.exp2(-x)
        tl.store(out + tl.program_id(0) * 1024 + tl.arange(0, 1024), x)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = [(28, 36, 1536), (56, 72, 768), (112, 144, 384)]    # H, W, D of Swin-Large's decoder at 448x576


def time_ms(run) -> float:
    if DEVICE == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def median_ms(run, repeats: int) -> float:
    return medians_ms({None: run}, {None: repeats})[None]


def medians_ms(runs: dict, repeats: dict) -> dict:
    """Of each run its median, measured in turns: what else the machine does then slows all of them."""
    for name, run in runs.items():
        if repeats[name] > 1:    # else it is slow enough to need no warm-up
            run()
    times = {name: [] for name in runs}
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn < repeats[name]:
                times[name].append(time_ms(run))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_mib(run) -> float | None:
    """Memory of the device that run() needs at its peak beyond what is held before. On CPUs, Linux alone tells."""
    if DEVICE == "cpu":
        if sys.platform != "linux":
            return None
        ctypes.CDLL("libc.so.6").malloc_trim(0)          # freed memory goes back to the system
        Path("/proc/self/clear_refs").write_text("5")    # the peak is now what is held
        before = resident_mib("VmRSS")
        run()
        return resident_mib("VmHWM") - before
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def resident_mib(field: str) -> float:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2 ** 10


def rates() -> tuple[float | None, float]:
    """(exponentials, bytes of memory) per ms of this machine."""
    exponents = torch.randn(2 ** 20)    # in the cache: the floor is arithmetic, not memory
    exponentials = None
    if DEVICE == "cpu":
        exponentials = 2 ** 20 / median_ms(lambda: torch.exp(exponents, out=exponents.clone()), 50)
    elif triton:
        out = torch.empty(2 ** 20, device=DEVICE)
        ms = median_ms(lambda: exponentials_kernel[1024,](out, 2 ** 12), 10)
        exponentials = 2 ** 20 * 2 ** 12 / ms
    source = torch.ones(2 ** 28 if DEVICE == "cuda" else 2 ** 25, device=DEVICE)
    target = torch.empty_like(source)
    return exponentials, 2 * source.nbytes / median_ms(lambda: target.copy_(source), 5)


def hardware() -> str:
    if DEVICE == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    versions = f"torch {torch.__version__}, " + (f"Triton {triton.__version__}" if triton else "no Triton")
    return f"{torch.cuda.get_device_name()}, {versions}"


def report(rows: list[dict], path: Path | None):
    """Prints the rows as a table, without columns that nobody measured; all of them as JSON into a file."""
    def cell(value):
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 100 else (
            f"{value:.0f}" if isinstance(value, float) else str(value))
    keys = [key for key in rows[0] if any(row[key] is not None for row in rows)]
    lines = [keys] + [[cell(row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    if path:
        path.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


def scan(full: bool = False, dtype: str | None = None, json_file: Path | None = None, sizes: list | None = None,
         backends: dict[str, int] | None = None, N: int = 16) -> list[dict]:
    """The scan from the expanded step size.

    sizes: (batch, H, W, D) of each; backends: the repeats of each; by default what fits the machine.

    Floors: B K D L N exponentials, computed once (a backward pass that does not store all states needs them a second
    time); and every input read and every output and gradient written once. "x floor" is the time over the larger one,
    "x the slowest" the speed, forward and backward, over that of the slowest backend.
    """
    dtype = getattr(torch, dtype or ("bfloat16" if DEVICE == "cuda" else "float32"))
    sizes = sizes or ([(batch, *stage) for stage in STAGES for batch in (1, 8)] if DEVICE == "cuda" else
                      [(1, *stage) for stage in STAGES] if full else [(1, 56, 72, 192)])
    if DEVICE == "cpu":
        backends = backends or dict.fromkeys(["numba"] * HAS_NUMBA + ["torch"], 11) | {"loop": 1}
    else:
        fast = ["triton"] * has_triton() + ["mamba_ssm"] * has_mamba_ssm()
        backends = backends or dict.fromkeys(fast, 20) | {"torch": 3}
    exponentials, bandwidth = rates()
    rate = "not measured, no Triton" if exponentials is None else f"{exponentials / 1e6:.2f} per ns"
    print(f"{hardware()}, {str(dtype)[6:]}\nexponentials {rate}, memory {bandwidth / 1e6:.0f} GB/s")
    rows = []
    for batch, H, W, D in sizes:
        torch.manual_seed(0)
        steps = batch * H * W * K
        matrix = (batch, H, W, K, N)
        shapes = [(batch, H, W, D), (batch, H, W, K, D), (K, D, N), matrix, matrix, (K, D), (K, D)]
        x, delta, A, B, C, skip, bias = (torch.randn(shape, device=DEVICE) for shape in shapes)
        inputs = [t.requires_grad_() for t in (x.to(dtype), (delta - 3).to(dtype), -A.exp(), B.to(dtype), C.to(dtype),
                                               skip, bias)]
        read = steps * (D + D // K + 2 * N) * dtype.itemsize      # delta, x, B, C
        y = steps * D // K * dtype.itemsize
        floor_exp = None if exponentials is None else steps * D * N / exponentials
        floor_bytes = [(read + y) / bandwidth, (3 * read + 2 * y) / bandwidth]    # forward; forward and backward

        def forward(backend):
            with torch.no_grad():
                selective_scan_2d(*inputs, backend=backend)

        def both(backend):
            y = selective_scan_2d(*inputs, backend=backend)
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        size_rows = [{"size": f"{batch}x{H}x{W}x{D}", "backend": name, "exp ms": floor_exp} for name in backends]
        for name, run, floor in (("fwd", forward, floor_bytes[0]), ("fwd+bwd", both, floor_bytes[1])):
            medians = medians_ms({backend: functools.partial(run, backend) for backend in backends}, backends)
            for row, (backend, ms) in zip(size_rows, medians.items()):
                row |= {f"{name} bytes ms": floor, f"{name} ms": ms, f"{name} x floor": ms / max(floor, floor_exp or 0),
                        f"{name} MiB": peak_mib(functools.partial(run, backend))}
        slowest = max(row["fwd+bwd ms"] for row in size_rows)
        rows += [row | {"x the slowest": slowest / row["fwd+bwd ms"]} for row in size_rows]
    report(rows, json_file)
    return rows


def model(batch: int | None = None, compile: bool = False, json_file: Path | None = None, checkpoint: bool = False,
          backends: list[str] | None = None, size: tuple[int, int] | None = None,
          repeats: int | None = None) -> list[dict]:
    """Inference and training steps (AdamW, mean square of the outputs as the loss) of mtmamba, NYUDv2's tasks.

    On CUDA Swin-Large, 448x576, batch 8, autocast to bfloat16; on a CPU Swin-Tiny, 128x160, batch 1, float32. With
    another size (512x512 on a CPU takes a minute), PASCAL-Context's five tasks.
    checkpoint: keeps only the inputs of blocks for the backward pass. The scan's share is that of a training step.
    Compiled, two graphs are expected, one per mode; more are recompilations.
    """
    encoder, usual_size = ("swin-large", (448, 576)) if DEVICE == "cuda" else ("swin-tiny", (128, 160))
    tasks = ({"semseg": 21, "parsing": 7, "saliency": 2, "normal": 3, "boundary": 1} if size else
             {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1})
    size, batch = size or usual_size, batch or (8 if DEVICE == "cuda" else 1)
    if backends is None:
        backends = (["triton"] * has_triton() + ["mamba_ssm"] * has_mamba_ssm() if DEVICE == "cuda" else
                    ["numba"] * HAS_NUMBA) + ["torch"]
    print(f"{hardware()}, {encoder}, {size[0]}x{size[1]}, batch {batch}{', compiled' if compile else ''}")
    rows = []
    for backend in backends:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        network = MTMamba(tasks, size, encoder, backend=backend)
        network.to(DEVICE)
        if checkpoint:
            network.set_grad_checkpointing()
        run_network = torch.compile(network) if compile else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        image = torch.randn(batch, 3, *size, device=DEVICE)

        def infer():
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                return run_network(image)

        def train():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                outputs = run_network(image)
            optimizer.zero_grad()
            sum(output.float().square().mean() for output in outputs.values()).backward()
            optimizer.step()
        row = {"backend": backend}
        for name, run in (("inference", infer), ("training", train)):
            network.train(name == "training")
            ms = median_ms(run, repeats or (10 if DEVICE == "cuda" else 3))
            row |= {f"{name} ms": ms, f"{name} images/s": 1000 * batch / ms, f"{name} MiB": peak_mib(run)}
        counters = torch._dynamo.utils.counters
        row |= {"scan's share, %": 100 * scan_share(train), "graphs": counters["stats"]["unique_graphs"] or None,
                "graph breaks": sum(counters["graph_break"].values()) if compile else None}
        rows.append(row)
    report(rows, json_file)
    return rows


def scan_share(run) -> float:
    """The part of run()'s time, on the device where there is one, that goes to the scan's operators."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    events = profile.key_averages()
    total, own = ("device_time_total", "self_device_time_total") if DEVICE == "cuda" else ("cpu_time_total",
                                                                                          "self_cpu_time_total")
    scan = sum(getattr(event, total) for event in events if re.fullmatch(r"mtmamba::selective_scan_2d(_backward)?",
                                                                         event.key))
    return scan / sum(getattr(event, own) for event in events)


def synthetic(size: tuple[int, int] = (128, 160), images: int = 100):
    dataset = Synthetic(images, size)
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(images):
        dataset[i]
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{size[0]}x{size[1]}, all labels, one process: {images / wall:.0f} images/s, {images / cpu:.0f} per CPU "
          "second")


def data(images: int = 24, epochs: int = 2):
    """Training samples of exported PASCAL-Context files: 375x500 JPEG to 512x512 augmented, five tasks, one core."""
    torch.set_num_threads(1)    # as in a worker of the loader
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "PASCALContext"
        export("pascal", root, images)
        dataset = PascalContext(root)

        def rate() -> float:
            """Per second of this process's CPU time, which other processes on the machine do not lengthen much."""
            dataset[0]    # warm up
            start = time.process_time()
            for epoch in range(epochs):
                for i in range(images):
                    dataset[epoch, i]
            return epochs * images / (time.process_time() - start)

        originals = rate()
        with Pool(0) as pool:
            prepare(root, pool)
        print(f"training samples per CPU second: {originals:.0f} from the originals, {rate():.0f} prepared")


def boundary(size: tuple[int, int] = (321, 481)):
    """All 101 thresholds of an image, from the test images continued by their mirror images to 321x481."""
    archive = np.load(Path(__file__).parent / "data" / "boundary_chain.npz")
    for protocol, max_dist in (("pascal", 0.0075), ("nyud", 0.011)):
        for i in "01":
            prediction, truth = (np.pad(a, [(0, n - m) for n, m in zip(size, a.shape)], mode="symmetric")
                                 for a in (archive[f"{i}_pred_u8"], archive[f"{i}_gt_{protocol}"]))
            seconds = median_ms(lambda: boundary_counts(prediction, truth, max_dist), 3) / 1000
            print(f"{protocol:<7} image {i}, {size[0]}x{size[1]}: {seconds:.2f} s")


def busy(starts: int = 3, iterations: int = 12, images: int = 36, patience: int = 60):
    """Images per second of the main job, training and evaluation, alone and beside one busy process per core, with
    libgomp's waiting threads as they are, with their spinning bounded to several values, and with one thread.

    Every figure is the median of several starts, taken in turns: threads that spin make a process's speed differ from
    start to start. A start that takes longer than `patience` seconds counts as 0.
    """
    job = f"""
import time
import datasets, evaluate, train    # before torch: they bound the spinning
import torch
opened = datasets.Synthetic.open    # fewer scenes to evaluate
datasets.Synthetic.open = lambda split, size, *more, **named: (
    opened(split, size, *more, **named) if split == "train" else datasets.Synthetic({images}, size, 1))
train.main(["--device", "cpu", "--iterations", "{iterations}", "--log-every", "1", "--out", OUT])
lines = [train.json.loads(line) for line in open(OUT + "/log.jsonl")]
times = [line["time"] for line in lines if "losses" in line]
model, _ = evaluate.load_checkpoint(train.Path(OUT) / "last.pt", torch.device("cpu"))
data = datasets.Synthetic.open("val", (64, 96))
evaluate.evaluate(model, data, torch.device("cpu"))    # warm
start = time.perf_counter()
evaluate.evaluate(model, data, torch.device("cpu"))
images = train.PRESETS["synthetic"]["batch_size"] * (len(times) - 2)    # of which the times are known
print("RATES", images / (times[-1] - times[1]), {images} / (time.perf_counter() - start))
"""
    root = Path(__file__).parents[1]
    settings = {"as it is": {"GOMP_SPINCOUNT": "300000"},    # libgomp's own value
                "4000": {"GOMP_SPINCOUNT": "4000"}, "2000 (ours)": {}, "1000": {"GOMP_SPINCOUNT": "1000"},
                "one thread": {"OMP_NUM_THREADS": "1"}}
    given = {"GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    cores = len(os.sched_getaffinity(0))
    print(f"{hardware()}, {cores} cores; images/s in training / evaluation, median of {starts} starts")
    for load in (0, cores):
        rates = {name: [] for name in settings}
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
        try:
            for _ in range(starts):
                for name, changes in settings.items():
                    environment = {key: value for key, value in os.environ.items() if key not in given} | changes
                    with tempfile.TemporaryDirectory() as folder:
                        code = job.replace("OUT", repr(str(Path(folder) / "run")))
                        try:
                            run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, text=True,
                                                 capture_output=True, check=True, timeout=patience)
                            rates[name].append([float(rate) for rate in run.stdout.split("RATES")[1].split()])
                        except subprocess.TimeoutExpired:
                            rates[name].append([0.0, 0.0])
        finally:
            for process in others:
                process.kill()
        for name, found in rates.items():
            training, evaluation = (statistics.median(column) for column in zip(*found))
            others = f"beside {load} busy processes" if load else "idle"
            print(f"{others:<25}{name:<12}{training:>8.1f}{evaluation:>8.1f}", flush=True)


if __name__ == "__main__":
    benchmarks = {"scan": scan, "model": model, "synthetic": synthetic, "data": data, "boundary": boundary,
                  "busy": busy}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    options = {name: commands.add_parser(name) for name in benchmarks}
    options["scan"].add_argument("--full", action="store_true", help="on a CPU: the stages of Swin-Large, minutes")
    options["scan"].add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    options["model"].add_argument("--batch", type=int)
    options["model"].add_argument("--size", type=int, nargs=2, metavar=("H", "W"))
    options["model"].add_argument("--compile", action="store_true")
    options["model"].add_argument("--checkpoint", action="store_true", help="activations")
    for name in ("scan", "model"):
        options[name].add_argument("--json", dest="json_file", type=Path, metavar="FILE")
    args = vars(parser.parse_args())
    benchmarks[args.pop("benchmark")](**args)
