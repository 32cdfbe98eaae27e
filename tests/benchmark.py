"""Measures speed; asserts nothing.

    python tests/benchmark.py scan         # one SS2D scan per backend against its floors, on the GPU where there is one
    python tests/benchmark.py scan --full  # on a CPU, too, the three decoder stages of Swin-Large
    python tests/benchmark.py model        # inference and training steps of the whole network; on a GPU also --compile
    python tests/benchmark.py model --size 512 512    # on a CPU: of PASCAL-Context's size and tasks, minutes
    python tests/benchmark.py memory       # what training the recipes needs on a GPU, computed without one, minutes
    python tests/benchmark.py synthetic    # images per second of the synthetic data set, one core
    python tests/benchmark.py data         # training samples per second and core, PASCAL-Context's files
    python tests/benchmark.py boundary     # seconds per image for odsF, one core
    python tests/benchmark.py exported     # one image by an exported file in onnxruntime and by PyTorch, one thread
    python tests/benchmark.py busy         # the main job, alone and beside one busy process per core, 10 minutes
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from archives import export
from conftest import TINY_SWIN
from datasets import DATASETS, PascalContext, Synthetic
from evaluate import write_onnx
from metrics import Labels, boundary_counts
from mtmamba import (
    CTM,
    SCTM,
    SS2D,
    STM,
    DenseHead,
    K,
    MTMamba,
    SwinTransformerBlock,
    backend_fault,
    selective_scan_2d,
    set_backend,
    triton,
)

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


def exponentials(count: int):
    """A run of about so many exponentials on a CPU, in its cache: what it takes is arithmetic, not memory."""
    exponents = -torch.rand(2 ** 18)
    results = torch.empty_like(exponents)

    def run():
        for _ in range(round(count / len(exponents))):
            torch.exp(exponents, out=results)
    return run


@functools.cache
def rates() -> tuple[float | None, float]:
    """(exponentials, bytes of memory) per ms of this machine."""
    rate = None
    if DEVICE == "cpu":
        rate = 2 ** 24 / median_ms(exponentials(2 ** 24), 5)
    elif triton:
        out = torch.empty(2 ** 20, device=DEVICE)
        rate = 2 ** 20 * 2 ** 12 / median_ms(lambda: exponentials_kernel[1024,](out, 2 ** 12), 10)
    source = torch.ones(2 ** 28 if DEVICE == "cuda" else 2 ** 25, device=DEVICE)
    target = torch.empty_like(source)
    return rate, 2 * source.nbytes / median_ms(lambda: target.copy_(source), 5)


def hardware() -> str:
    if DEVICE == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    versions = f"torch {torch.__version__}, " + (f"Triton {triton.__version__}" if triton else "no Triton")
    return f"{torch.cuda.get_device_name()}, {versions}"


def report(rows: list[dict], path: Path | None):
    """Prints the rows as a table, without lists and columns that nobody measured; all of them as JSON into a file."""
    def cell(value):
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) and value < 100 else (
            f"{value:.0f}" if isinstance(value, float) else str(value))
    keys = [key for key in rows[0] if any(row[key] is not None and not isinstance(row[key], list) for row in rows)]
    lines = [keys] + [[cell(row[key]) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths)))
    if path:
        path.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


def usable(*backends: str) -> list[str]:
    return [backend for backend in backends if not backend_fault(backend)]


def scan(full: bool = False, dtype: str | None = None, json_file: Path | None = None, sizes: list | None = None,
         backends: dict[str, int] | None = None, N: int = 16) -> list[dict]:
    """The scan from the expanded step size.

    sizes: (batch, H, W, D) of each; backends: the repeats of each; by default what fits the machine.

    Floors: B K D L N exponentials, computed once (a backward pass that does not store all states needs them a second
    time); and every input read and every output and gradient written once. "x floor" is the time over the larger one,
    "x the slowest" the speed, forward and backward, over that of the slowest backend. On a CPU the exponentials and the
    backends are measured in turns, on a GPU the exponentials' rate beforehand.
    """
    dtype = getattr(torch, dtype or ("bfloat16" if DEVICE == "cuda" else "float32"))
    sizes = sizes or ([(batch, *stage) for stage in STAGES for batch in (1, 8)] if DEVICE == "cuda" else
                      [(1, *stage) for stage in STAGES] if full else [(1, 56, 72, 192)])
    if DEVICE == "cpu":
        backends = backends or dict.fromkeys(usable("numba") + ["torch"], 11) | {"loop": 1}
    else:
        fast = usable("triton", "mamba_ssm")
        backends = backends or dict.fromkeys(fast, 20) | {"torch": 3}
    rate, bandwidth = rates()
    speed = "not measured, no Triton" if rate is None else f"{rate / 1e6:.2f} per ns"
    print(f"{hardware()}, {str(dtype)[6:]}\nexponentials {speed}, memory {bandwidth / 1e6:.0f} GB/s")
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
        floor_exp = None if rate is None else steps * D * N / rate
        floor_bytes = [(read + y) / bandwidth, (3 * read + 2 * y) / bandwidth]    # forward; forward and backward

        def forward(backend):
            with torch.no_grad():
                selective_scan_2d(*inputs, backend=backend)

        def both(backend):
            y = selective_scan_2d(*inputs, backend=backend)
            torch.autograd.grad(y, inputs, torch.ones_like(y))
        size_rows = [{"size": f"{batch}x{H}x{W}x{D}", "backend": name} for name in backends]
        for name, run, floor in (("fwd", forward, floor_bytes[0]), ("fwd+bwd", both, floor_bytes[1])):
            runs, repeats = {backend: functools.partial(run, backend) for backend in backends}, dict(backends)
            if DEVICE == "cpu":
                runs[None], repeats[None] = exponentials(steps * D * N), max(repeats.values())
            medians = medians_ms(runs, repeats)
            floor_exp = medians.pop(None, floor_exp)
            for row, (backend, ms) in zip(size_rows, medians.items()):
                row |= {f"{name} exp ms": floor_exp, f"{name} bytes ms": floor, f"{name} ms": ms,
                        f"{name} x floor": ms / max(floor, floor_exp or 0), f"{name} MiB": peak_mib(runs[backend])}
        slowest = max(row["fwd+bwd ms"] for row in size_rows)
        rows += [row | {"x the slowest": slowest / row["fwd+bwd ms"]} for row in size_rows]
    report(rows, json_file)
    return rows


def model(batch: int | None = None, compile: bool = False, json_file: Path | None = None, checkpoint: bool = False,
          backends: list[str] | None = None, size: tuple[int, int] | None = None, repeats: int | None = None,
          modes: tuple[str, ...] = ("inference", "training")) -> list[dict]:
    """Inference and training steps (AdamW, mean square of the outputs as the loss) of mtmamba, NYUDv2's tasks.

    On CUDA Swin-Large, 448x576, batch 8, autocast to bfloat16; on a CPU Swin-Tiny, 128x160, batch 1, float32. With
    another size (512x512 on a CPU takes a minute), PASCAL-Context's five tasks.
    checkpoint: keeps only the inputs of blocks for the backward pass. MiB: the peak, with parameters and, in training,
    gradients and AdamW's averages. "x exp": the time over that of the scans' exponentials of one forward pass, on a CPU
    measured in turns. The scan's share and the slowest kernels (JSON only) are those of the last mode.
    Compiled, one graph per mode is expected; more are recompilations.
    """
    encoder, usual_size = ("swin-large", (448, 576)) if DEVICE == "cuda" else ("swin-tiny", (128, 160))
    tasks = ({"semseg": 21, "parsing": 7, "saliency": 2, "normal": 3, "boundary": 1} if size else
             {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1})
    size, batch = size or usual_size, batch or (8 if DEVICE == "cuda" else 1)
    if backends is None:
        backends = [*(usable("triton", "mamba_ssm") if DEVICE == "cuda" else usable("numba")), "torch"]
    print(f"{hardware()}, {encoder}, {size[0]}x{size[1]}, batch {batch}{', compiled' if compile else ''}")
    rows = []
    for backend in backends:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        with torch.device(DEVICE):    # hundreds of millions of random numbers take a CPU seconds
            network = MTMamba(tasks, size, encoder, backend=backend)
        if checkpoint:
            network.set_grad_checkpointing()
        run_network = torch.compile(network, fullgraph=True, dynamic=False) if compile else network
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        image = torch.randn(batch, 3, *size, device=DEVICE)
        scanned = []    # exponentials
        hooks = [module.register_forward_pre_hook(lambda scan, x: scanned.append(x[0].numel() * K * scan.d_state))
                 for module in network.modules() if isinstance(module, SS2D)]
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            network.eval()(image)
        for hook in hooks:
            hook.remove()

        def infer():
            with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                return run_network(image)

        def train():
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
                outputs = run_network(image)
            sum(output.float().square().mean() for output in outputs.values()).backward()
            optimizer.step()
        row = {"backend": backend, "exponentials": float(sum(scanned))}
        for name in modes:
            run = {"inference": infer, "training": train}[name]
            network.train(name == "training")
            each = repeats or (10 if DEVICE == "cuda" else 3)
            if compile:
                start = time.perf_counter()
                run()
                row[f"{name}, first, s"] = time.perf_counter() - start
            if DEVICE == "cpu":
                medians = medians_ms({name: run, "exp": exponentials(sum(scanned))}, {name: each, "exp": each})
                ms, exp_ms = medians[name], medians["exp"]
            else:
                ms, exp_ms = median_ms(run, each), rates()[0] and sum(scanned) / rates()[0]
            row |= {f"{name} ms": ms, f"{name} images/s": 1000 * batch / ms, f"{name} x exp": exp_ms and ms / exp_ms,
                    f"{name} MiB": whole_peak_mib(run, optimizer)}
        counters = torch._dynamo.utils.counters
        share, slowest = where_time_goes(run)
        row |= {"scan's share, %": 100 * share, "graphs": counters["stats"]["unique_graphs"] or None,
                "graph breaks": sum(counters["graph_break"].values()) if compile else None, "slowest kernels": slowest}
        rows.append(row)
    report(rows, json_file)
    return rows


def whole_peak_mib(run, optimizer: torch.optim.Optimizer) -> float | None:
    """peak_mib with what is held before: parameters, their gradients and the optimizer's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = tree_leaves([parameters, [p.grad for p in parameters], list(optimizer.state.values())])
    held, peak = sum(t.nbytes for t in tensors if t is not None), peak_mib(run)
    return None if peak is None else held / 2 ** 20 + peak


def where_time_goes(run) -> tuple[float, list[dict]]:
    """The part of run()'s time that goes to the scan's operators, and its 15 slowest kernels; on a CPU, operators."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return shares(profile.key_averages(), DEVICE)


def shares(events, device: str) -> tuple[float, list[dict]]:
    """Of a profile's averages. A GPU's time is listed twice, under its kernels and under the operators that launch
    them: the kernels count, and the scan's are those that its operators launch."""
    total, own = (("device_time_total", "self_device_time_total") if device == "cuda" else
                  ("cpu_time_total", "self_cpu_time_total"))
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    kernels = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    everything = sum(getattr(event, own) for event in kernels)
    scan = sum(getattr(event, total) for event in events if event.device_type == torch.autograd.DeviceType.CPU
               and re.fullmatch(r"mtmamba::selective_scan_2d(_backward)?", event.key))
    slowest = sorted(kernels, key=lambda event: -getattr(event, own))[:15]
    return scan / everything, [{"kernel": event.key, "ms": getattr(event, own) / 1000, "calls": event.count,
                                "share, %": 100 * getattr(event, own) / everything} for event in slowest]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, by their storages."""

    def __init__(self):
        super().__init__()
        self.bytes, self.storages = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = tensor.untyped_storage()
                self.storages.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return result

    def free(self, key: int, size: int):
        self.storages.discard(key)
        self.bytes -= size


def training_memory(network: MTMamba, size: tuple[int, int], images: tuple[int, ...],
                    autocast: bool = True) -> tuple[float, list, list]:
    """GiB of a GPU that need not exist, by fake tensors: of parameters, gradients and Adam's averages; for each number
    of images, what a training step keeps for its backward pass; the same with set_grad_checkpointing, and with what the
    largest block keeps while it is computed again.

    network: on the device "meta". Differs from a GPU: attention is PyTorch's plain one, as no other is at hand, and
    autocast is to float16, which takes as much as bfloat16 and does not ask the GPU.
    """
    blocks = [module for module in network.modules()
              if isinstance(module, (SwinTransformerBlock, STM, CTM, SCTM, DenseHead))]
    with (mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
          FakeTensorMode(allow_non_fake_inputs=True), Live() as live):
        network.to_empty(device="cuda").train()
        own = live.bytes    # with buffers

        def kept(batch):
            gc.collect()
            with torch.autocast("cuda", torch.float16, enabled=autocast):
                outputs = network(torch.empty(batch, 3, *size, device="cuda"))
            loss = sum(output.float().square().mean() for output in outputs.values())
            gib = (live.bytes - own) / 2 ** 30
            del loss    # it holds the graph until here
            return gib

        before, everything, less = {}, [], []
        for batch in images:
            by_block = []
            hooks = [block.register_forward_pre_hook(lambda block, _: before.update({block: live.bytes}))
                     for block in blocks]
            hooks += [block.register_forward_hook(lambda block, *_: by_block.append(live.bytes - before[block]))
                      for block in blocks]
            everything.append(kept(batch))
            for hook in hooks:
                hook.remove()
            network.set_grad_checkpointing()
            less.append(kept(batch) + max(by_block) / 2 ** 30)
            network.set_grad_checkpointing(False)
    return 4 * sum(p.nbytes for p in network.parameters()) / 2 ** 30, everything, less


def memory(images: tuple[int, ...] = (1, 2, 4, 8), cards: tuple[int, ...] = (24, 40, 80)):
    """Prints the README's table of a GPU's memory: Swin-Large, by the images that a GPU computes at a time.

    What fits: the sum, and a tenth of the card for CUDA, work space and fragments.
    """
    columns = ["GiB", "parameters, gradients, Adam", f"kept for the backward pass, {listed(images)} images",
               "with `--checkpoint-activations`", f"images that fit on {listed(cards)} GB", "with it"]
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    for name, variant in (("nyud", "mtmamba"), ("pascal", "mtmamba"), ("cityscapes", "mtmamba++")):
        data_set, size = DATASETS[name], DATASETS[name].SIZE
        channels = {task: kind.channels for task, kind in Labels(data_set.TASKS).kinds.items()}
        with torch.device("meta"):
            network = MTMamba(channels, size, variant=variant,
                              output_scale=data_set.LABEL_SCALE, backend="triton")
        held, *both = training_memory(network, size, images)
        fits = [[max((batch for batch, each in zip(images, kept) if held + each < 0.9 * card), default=0)
                 for card in cards] for kept in both]
        cells = [f"{name}, `{variant}`", f"{held:.1f}", *map(listed, both), *map(listed, fits)]
        print(f"| {' | '.join(cells)} |", flush=True)


def listed(numbers) -> str:
    return " / ".join(f"{number:.1f}" if isinstance(number, float) else str(number) for number in numbers)


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

        print(f"training samples per CPU second: {rate():.0f}")


def boundary(size: tuple[int, int] = (321, 481)):
    """All 101 thresholds of an image, from the test images continued by their mirror images to 321x481."""
    archive = np.load(Path(__file__).parent / "data" / "boundary_chain.npz")
    for protocol, max_dist in (("pascal", 0.0075), ("nyud", 0.011)):
        for i in "01":
            prediction, truth = (np.pad(a, [(0, n - m) for n, m in zip(size, a.shape)], mode="symmetric")
                                 for a in (archive[f"{i}_pred_u8"], archive[f"{i}_gt_{protocol}"]))
            seconds = median_ms(lambda: boundary_counts(prediction, truth, max_dist), 3) / 1000
            print(f"{protocol:<7} image {i}, {size[0]}x{size[1]}: {seconds:.2f} s")


def exported(size: tuple[int, int] = (448, 576), repeats: int = 5):
    """A small Swin, one STM per stage, NYUDv2's tasks, N = 16."""
    import onnxruntime
    torch.set_num_threads(1)
    tasks = {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1}
    network = MTMamba(tasks, size, variant="stm1", encoder_kwargs=TINY_SWIN).eval()
    image, options = torch.randn(1, 3, *size), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder, "model.onnx")
        set_backend(network, "loop")
        write_onnx(network, image, path, {"tasks": tasks})
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        set_backend(network, None)
        times = medians_ms({"onnxruntime": lambda: session.run(None, {"image": image.numpy()}),
                            "PyTorch": lambda: network(image)}, dict.fromkeys(("onnxruntime", "PyTorch"), repeats))
        print(f"{size[0]}x{size[1]} on {hardware()}, one thread: "
              + ", ".join(f"{name} {ms:.0f} ms" for name, ms in times.items())
              + f"; a file of {path.stat().st_size / 1e6:.1f} MB")


def busy(starts: int = 3, iterations: int = 8, images: int = 24, patience: int = 120):
    """Images per second of the main job, training and evaluation, alone and beside one busy process per core, with
    libgomp's waiting threads as they are, with their spinning limited as our scripts do, and with one thread.

    Every figure is the median of several starts, taken in turns: threads that spin make a process's speed differ from
    start to start. A start that takes longer than `patience` seconds counts as 0.
    """
    job = f"""
import time
import evaluate, train, datasets    # in this order: evaluate bounds the spinning before it imports torch
import torch
opened = datasets.Synthetic.open    # fewer scenes to evaluate
datasets.Synthetic.open = lambda split, size, *more, **named: (
    opened(split, size, *more, **named) if split == "train" else datasets.Synthetic({images}, size, 1))
train.main(["--device", "cpu", "--iterations", "{iterations}", "--log-every", "1", "--out", OUT])
lines = [train.json.loads(line) for line in open(OUT + "/log.jsonl")]
times = [line["time"] for line in lines if "losses" in line]
model, _ = evaluate.load_checkpoint(train.Path(OUT) / "last.pt", torch.device("cpu"))
data = datasets.Synthetic.open("val", (64, 96))
evaluate.evaluate(model, evaluate.Evaluation(data, torch.device("cpu")))    # warm
start = time.perf_counter()
evaluate.evaluate(model, evaluate.Evaluation(data, torch.device("cpu")))
images = train.SMALL["batch_size"] * (len(times) - 2)    # of which the times are known
print("RATES", images / (times[-1] - times[1]), {images} / (time.perf_counter() - start))
"""
    root = Path(__file__).parents[1]
    settings = {"as it is": {"GOMP_SPINCOUNT": "300000"},    # libgomp's own value
                "2000 (ours)": {}, "one thread": {"OMP_NUM_THREADS": "1"}}
    given = {"GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    cores = len(os.sched_getaffinity(0))
    print(f"{hardware()}, {cores} cores; images/s in training / evaluation, median of {starts} starts")
    for load in (0, cores):
        rates = {name: [] for name in settings}
        # They end with this process, however it ends.
        loop = f"import os\nwhile os.getppid() == {os.getpid()}:\n    for _ in range(10 ** 6): pass"
        others = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(load)]
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
            beside = f"beside {load} busy processes" if load else "idle"
            print(f"{beside:<25}{name:<12}{training:>8.1f}{evaluation:>8.1f}", flush=True)


if __name__ == "__main__":
    benchmarks = {"scan": scan, "model": model, "synthetic": synthetic, "data": data, "boundary": boundary,
                  "busy": busy, "memory": memory, "exported": exported}
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
