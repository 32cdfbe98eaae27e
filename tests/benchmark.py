"""Measures speed; asserts nothing.

    python tests/benchmark.py scan         # one SS2D scan on this machine's CPU, against its floor
    python tests/benchmark.py synthetic    # images per second of the synthetic data set, one core
    python tests/benchmark.py data         # training samples per second and core, PASCAL-Context's files
    python tests/benchmark.py boundary     # seconds per image for odsF, one core
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from datasets import PascalContext, Synthetic, export, prepare
from metrics import boundary_counts
from mtmamba import K, selective_scan_2d


def median_ms(run, repeats: int) -> float:
    run()    # warm up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def scan(H: int = 56, W: int = 72, D: int = 192, N: int = 16, repeats: int = 7):
    """The backends at the size that the README quotes: B = 1, 56x72, D = 192, N = 16."""
    torch.manual_seed(0)
    shapes = [(1, H, W, D), (1, H, W, K, D), (K, D, N), (1, H, W, K, N), (1, H, W, K, N), (K, D), (K, D)]
    x, delta, A, B, C, skip, bias = map(torch.randn, shapes)
    inputs = [t.requires_grad_() for t in (x, delta - 3, -A.exp(), B, C, skip, bias)]
    exponents = torch.randn(2 ** 20)    # in the cache: the floor is arithmetic, not memory
    floor = median_ms(lambda: torch.exp(exponents, out=exponents.clone()), 50) * H * W * K * D * N / 2 ** 20
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; floor (exponentials alone) {floor:.0f} ms")
    print(f"{'backend':<12}{'forward ms':>12}{'x floor':>10}{'fwd+bwd ms':>12}{'x floor':>10}")
    for backend, runs in (("torch", repeats), ("reference", 1)):
        def forward():
            with torch.no_grad():
                selective_scan_2d(*inputs, backend=backend)

        def both():
            torch.autograd.grad(selective_scan_2d(*inputs, backend=backend).sum(), inputs)
        times = [median_ms(run, runs) for run in (forward, both)]
        print(f"{backend:<12}" + "".join(f"{t:>12.0f}{t / floor:>10.1f}" for t in times))


def synthetic(size: tuple[int, int] = (128, 160), images: int = 100):
    dataset = Synthetic(images, size)
    start, cpu = time.perf_counter(), time.process_time()
    for i in range(images):
        dataset[i]
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{size[0]}x{size[1]}, all labels, one process: {images / wall:.0f} images/s, {images / cpu:.0f} per CPU second")


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
        prepare(root, workers=1)
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


if __name__ == "__main__":
    benchmarks = {"scan": scan, "synthetic": synthetic, "data": data, "boundary": boundary}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=benchmarks)
    benchmarks[parser.parse_args().benchmark]()
