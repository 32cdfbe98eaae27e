"""The scan: s6 against the closed form of the recurrence, every backend against s6 along explicit index lists."""

import errno
import functools
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import LAYOUTS
from test_export import save_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import mtmamba
import train
from mtmamba import SS2D, K, expand, merge, s6, selective_scan_2d

# (batch, H, W, D, N): one chunk or several, lengths that the chunk divides or not, single pixels, rows and columns; for
# "numba", one block of channels or two, full or not.
SHAPES = [(2, 5, 9, 3, 4), (1, 8, 8, 64, 16), (1, 1, 1, 2, 1), (3, 1, 33, 2, 3), (1, 40, 1, 1, 2), (2, 11, 6, 4, 16),
          (1, 6, 6, 70, 1), (8, 3, 2, 3, 64)]

# The same for the kernels, in segments of 4 steps by 2 and blocks of 64 channels.
# Several images, segments and chunks, some cut short; rows, columns, a pixel; two blocks of channels or of 16 states.
TRITON_SHAPES = [(2, 3, 3, 3, 3), (1, 1, 1, 2, 1), (1, 1, 7, 66, 2), (1, 10, 1, 1, 2), (1, 1, 2, 2, 18)]
needs_triton = pytest.mark.skipif(bool(mtmamba.backend_fault("triton")), reason="needs Triton")
needs_numba = pytest.mark.skipif(bool(mtmamba.backend_fault("numba")), reason="needs Numba")
NUMBA, TRITON = pytest.param("numba", marks=needs_numba), pytest.param("triton", marks=needs_triton)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"    # conftest.py has the interpreter stand in for the GPU


def device_of(backend):
    return DEVICE if backend == "triton" else "cpu"


@pytest.fixture
def small_blocks(monkeypatch):
    """The interpreter takes milliseconds per step. A GPU's warps need the real sizes."""
    if DEVICE == "cpu":
        for name, value in dict(SEGMENTS=(4, 8), STEPS=2).items():
            monkeypatch.setattr(mtmamba, name, value)


def random_inputs(batch, H, W, D, N, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    matrix = (batch, H, W, K, N)
    shapes = [(batch, H, W, D), (batch, H, W, K, D), (K, D, N), matrix, matrix, (K, D), (K, D)]
    x, delta, A, B, C, skip, bias = (torch.randn(s, dtype=dtype).to(device) for s in shapes)
    return [t.requires_grad_() for t in (x, delta, -A.exp(), B, C, skip, bias)]


@pytest.mark.paper("Eq. 2-5, 8", against="closed form")
def test_s6_equals_the_closed_form(compare):
    rng = np.random.default_rng(0)
    batch, L, D, N = 2, 7, 3, 4
    shapes = [(batch, L, D), (batch, L, D), (batch, L, N), (batch, L, N), (D,), (D,)]
    u, delta, B, C, skip, bias = map(rng.standard_normal, shapes)
    A = -rng.uniform(0.1, 3, (D, N))
    step = np.log1p(np.exp(delta + bias))
    y = u * skip
    for t in range(L):
        for s in range(t + 1):    # what entered at step s has decayed by A over the steps s+1 .. t
            decay = np.exp(step[:, s + 1:t + 1].sum(1)[..., None] * A)                        # (batch, D, N)
            y[:, t] += np.einsum("bn,bdn,bd,bn->bd", C[:, t], decay, step[:, s] * u[:, s], B[:, s])
    ours = s6(*map(torch.tensor, (u, delta, A, B, C, skip, bias)))
    compare(ours, y, rtol=1e-12, atol=1e-12)


def test_scan_orders():
    pixels = torch.arange(6).view(2, 3)
    orders = [expand(pixels, k) for k in range(K)]
    assert [order.tolist() for order in orders] == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5],
                                                    [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert all(torch.equal(merge(order, k, 2, 3), pixels) for k, order in enumerate(orders))


PATHS = {    # the (row, column) pairs that each direction visits in turn
    0: lambda H, W: [(i, j) for i in range(H) for j in range(W)],
    1: lambda H, W: [(i, j) for j in range(W) for i in range(H)],
    2: lambda H, W: [(i, j) for i in reversed(range(H)) for j in reversed(range(W))],
    3: lambda H, W: [(i, j) for j in reversed(range(W)) for i in reversed(range(H))],
}


@pytest.mark.parametrize("backend", ["loop", "torch", NUMBA, TRITON])
@pytest.mark.parametrize("direction", range(K))
def test_each_direction_alone_follows_its_path(direction, backend, small_blocks):
    x, delta, A, B, C, skip, bias = (t.detach() for t in random_inputs(1, 3, 4, 3, 2))
    dtype, tolerance = (torch.float32, 1e-5) if backend in ("numba", "triton") else (torch.float64, 1e-10)
    C, skip = C.clone(), skip.clone()
    for other in set(range(K)) - {direction}:    # C = D = 0 silences a direction
        C[:, :, :, other], skip[other] = 0, 0
    path = PATHS[direction](3, 4)
    along = [torch.stack([t[:, i, j] for i, j in path], dim=1) for t in (x, delta, B, C)]
    u, delta_k, B_k, C_k = along[0], *(t[:, :, direction] for t in along[1:])
    y = s6(u, delta_k, A[direction], B_k, C_k, skip[direction], bias[direction])
    inputs = (t.to(device_of(backend), dtype) for t in (x, delta, A, B, C, skip, bias))
    ours = selective_scan_2d(*inputs, backend).cpu().double()
    for step, (i, j) in enumerate(path):
        torch.testing.assert_close(ours[:, i, j], y[:, step], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_reference(shape):
    inputs = random_inputs(*shape)
    y, y_reference = (selective_scan_2d(*inputs, backend=backend) for backend in ("torch", "loop"))
    torch.testing.assert_close(y, y_reference, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(y_reference, inputs, grad)):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.fixture
def poisoned():
    """Fills what torch.empty returns with NaN, which shows wherever an output was not written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(ours, reference):
    assert ours.isfinite().all()
    return (ours.cpu().double() - reference).norm() / reference.norm().clamp(min=1e-6)


@needs_triton
@pytest.mark.parametrize("dtype, shape", [(torch.float32, shape) for shape in TRITON_SHAPES] + [
    (torch.bfloat16, (1, 3, 3, 3, 2)), (torch.float16, (1, 2, 3, 2, 2))])
def test_triton_equals_reference(dtype, shape, small_blocks, poisoned):
    check_in_float32("triton", dtype, shape)


@needs_triton
def test_triton_equals_reference_in_its_own_sizes(poisoned):
    """Two segments, the second of a chunk and a half."""
    check_in_float32("triton", torch.float32, (1, 4, 7, 2, 1))


@needs_numba
@pytest.mark.parametrize("dtype, shape", [(torch.float32, shape) for shape in SHAPES] + [
    (torch.bfloat16, SHAPES[0]), (torch.float16, SHAPES[2])])
def test_numba_equals_reference(dtype, shape, poisoned):
    check_in_float32("numba", dtype, shape)


def check_in_float32(backend, dtype, shape):
    """In float32 to its rounding; from half-precision inputs, to the rounding of the outputs."""
    inputs = random_inputs(*shape, dtype, device_of(backend))
    doubles = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y, y_reference = selective_scan_2d(*inputs, backend=backend), selective_scan_2d(*doubles, backend="loop")
    grad = torch.randn_like(y)
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert y.dtype == dtype and relative_error(y, y_reference) < tolerance
    references = torch.autograd.grad(y_reference, doubles, grad.cpu().double())
    for ours, reference in zip(torch.autograd.grad(y, inputs, grad), references):
        assert ours.dtype == dtype and relative_error(ours, reference) < tolerance


@needs_numba
def test_numba_is_deterministic_for_any_number_of_threads():
    inputs, runs = random_inputs(3, 5, 9, 70, 3, torch.float32), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y = selective_scan_2d(*inputs, backend="numba")
            runs.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first, other) for run in runs[1:] for first, other in zip(runs[0], run))


def scan_and_gradients(inputs):
    torch.set_num_threads(2)
    y = selective_scan_2d(*inputs, backend="numba")
    result = [t.detach().numpy() for t in (y, *torch.autograd.grad(y.sum(), inputs))]
    torch.set_num_threads(1)
    return result


def run_operators(inputs, queue):
    """Without autograd, which PyTorch does not support after a fork."""
    torch.set_num_threads(2)
    x, delta, A, B, C, *others = (t.detach() for t in inputs)
    inputs = [x, delta, A, torch.cat([B, C], dim=-1), *others, None, "numba"]
    y, states = mtmamba._scan_op(*inputs)
    gBC, g_parameters, gx, g_delta = mtmamba._scan_backward_op(torch.ones_like(y), states, *inputs)
    queue.put([t.numpy() for t in (y, gx, g_delta, g_parameters[:-2].permute(1, 2, 0), *gBC, *g_parameters[-2:])])


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_numba_survives_a_fork():
    """A thread pool does not: a child that used its parent's would wait for ever."""
    inputs, context = random_inputs(2, 3, 3, 3, 2, torch.float32), multiprocessing.get_context("fork")
    expected, queue = scan_and_gradients(inputs), context.Queue()
    child = context.Process(target=run_operators, args=(inputs, queue), daemon=True)
    child.start()
    for ours, theirs in zip(queue.get(timeout=60), expected):
        np.testing.assert_array_equal(ours, theirs)
    child.join()


@needs_numba
@pytest.mark.parametrize("method, error", [("load", EOFError()), ("save", OSError(errno.ENOSPC, "full"))])
def test_numba_runs_where_its_stored_code_is_damaged_or_the_disk_is_full(method, error, monkeypatch):
    from numba.core.caching import IndexDataCacheFile

    def fail(*_):
        raise error
    inputs = [t.detach() for t in random_inputs(1, 2, 3, 3, 2, torch.float32)]
    expected = selective_scan_2d(*inputs, backend="numba")
    monkeypatch.setattr(IndexDataCacheFile, "load", lambda *_: None)
    monkeypatch.setattr(IndexDataCacheFile, method, fail)
    mtmamba._numba_kernels.cache_clear()
    assert torch.equal(selective_scan_2d(*inputs, backend="numba"), expected)
    assert mtmamba._numba_kernels(stored=True)["forward"] is mtmamba._numba_kernels(stored=False)["forward"]
    mtmamba._numba_kernels.cache_clear()


@needs_numba
def test_numba_in_threads_of_one_process():
    inputs = [[t.detach().requires_grad_() for t in random_inputs(1, 4, 4, 3, n, torch.float32)] for n in (1, 2, 3)]
    expected = [scan_and_gradients(each) for each in inputs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            for ours, theirs in zip(pool.map(scan_and_gradients, inputs), expected):
                for first, second in zip(ours, theirs):
                    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("backend", ["torch", NUMBA])
@pytest.mark.parametrize("i", range(7))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_input_gives_no_finite_output(backend, i, value):
    """Where "loop" gives NaN or infinity, so does the backend, in values and gradients."""
    inputs = [t.detach().float() for t in random_inputs(1, 2, 2, 2, 2)]
    inputs[i].flatten()[0] = -value if i == 2 else value
    inputs = [t.requires_grad_() for t in inputs]
    results = []
    for name in (backend, "loop"):
        y = selective_scan_2d(*inputs, backend=name)
        results.append((y, *torch.autograd.grad(y.sum(), inputs)))
    for ours, expected in zip(*results):
        assert not ours[~expected.isfinite()].isfinite().any()


@needs_numba
def test_numba_refuses_what_it_cannot_run():
    with pytest.raises(RuntimeError, match="found torch.float64 on cpu; use the backend torch"):
        selective_scan_2d(*random_inputs(1, 4, 5, 3, 2), backend="numba")


@pytest.fixture
def fresh_faults():
    """What cannot be imported is looked for once per process."""
    yield
    mtmamba._find_fault.cache_clear()


BROKEN = {"needs NumPy 2.4 or less": "raise ImportError('Numba needs NumPy 2.4 or less')",
          "no libllvmlite.so": "raise OSError('no libllvmlite.so')",
          "NUMBA_DISABLE_JIT is set": "import types; config = types.SimpleNamespace(DISABLE_JIT=1)"}


@pytest.mark.parametrize("reason", BROKEN)
def test_numba_that_is_installed_and_cannot_run(reason, tmp_path, monkeypatch, fresh_faults):
    """Another backend, and one warning, also while the scan is compiled."""
    (tmp_path / "numba.py").write_text(BROKEN[reason])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    mtmamba._find_fault.cache_clear()
    module, x = SS2D(4, d_state=2), torch.randn(1, 2, 3, 4)
    with pytest.warns(UserWarning, match=reason) as warned:
        y = [module(x), torch.compile(module, fullgraph=True, backend="eager")(x), module(x)]
    assert torch.equal(y[0], y[2]) and sum("numba cannot be used" in str(each.message) for each in warned) == 1
    assert mtmamba.default_backend(torch.device("cpu")) == "torch"
    with pytest.raises(RuntimeError, match=f"the scan backend numba runs on CPU.*{reason}; use the backend torch"):
        SS2D(4, backend="numba")(x)


def test_default_backends(monkeypatch):
    cpu, cuda, mps = map(torch.device, ("cpu", "cuda", "mps"))
    for has_numba, has_triton in ((True, True), (False, False)):
        faults = {"numba": not has_numba, "triton": not has_triton}
        monkeypatch.setattr(mtmamba, "backend_fault", faults.get)
        for dtype in (torch.float32, torch.bfloat16):
            assert mtmamba.default_backend(cpu, dtype) == ("numba" if has_numba else "torch")
            assert mtmamba.default_backend(cuda, dtype) == ("triton" if has_triton else "torch")
        assert {mtmamba.default_backend(d, torch.float64) for d in (cpu, cuda, mps)} == {"torch"}
        assert mtmamba.default_backend(mps) == "torch"


@pytest.mark.parametrize("backend", ["torch", NUMBA, "mamba_ssm", TRITON])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, backend, small_blocks, poisoned, monkeypatch):
    """Values and gradients, also where the map is a single column, row or pixel: its strides then mean nothing."""
    if backend == "mamba_ssm":
        play_mamba_ssm(monkeypatch)
    def run(inputs, backend):
        x, delta, B, C = (LAYOUTS[layout](inputs[i]) for i in (0, 1, 3, 4))
        y = selective_scan_2d(x, delta, inputs[2], B, C, *inputs[5:], backend)
        return y, *torch.autograd.grad(y, inputs, LAYOUTS[layout](grad).to(y))
    interpreted = backend == "triton" and DEVICE == "cpu"
    D = mtmamba.BLOCK if backend == "numba" else 2    # a whole block is not copied
    for size in ((1, 2, 2), (1, 2, 1)) if interpreted else ((2, 2, 2), (2, 3, 1), (2, 1, 3), (1, 1, 1)):
        inputs = random_inputs(*size, D, 1 if interpreted else 3, torch.float32, device_of(backend))
        doubles = [t.detach().cpu().double().requires_grad_() for t in inputs]
        grad = torch.randn(*size, D)
        for ours, reference in zip(run(inputs, backend), run(doubles, "loop")):
            assert relative_error(ours, reference) < 2e-6


@needs_triton
def test_triton_is_deterministic(small_blocks):
    inputs = random_inputs(1, 1, 5, 3, 1, torch.float32, DEVICE)
    runs = [torch.autograd.grad(selective_scan_2d(*inputs, backend="triton").square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs))


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel on a GPU: all but views and what only allocates memory."""
    VIEWS = ("empty", "new_empty", "empty_like", "view", "detach", "permute", "transpose", "unsqueeze", "squeeze",
             "expand", "select", "slice", "unbind", "_unsafe_view", "as_strided")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.__name__.partition(".")[0]
        if name not in self.VIEWS:
            self.names.append(name)
        return operator(*args, **kwargs or {})


@needs_triton
@pytest.mark.parametrize("mixed", [False, True])
def test_triton_launches(mixed, monkeypatch):
    """Kernels of a forward and a backward pass of the scan, with what SS2D gives it."""
    for name in ("segments", "combine", "outputs", "gradients"):
        monkeypatch.setattr(mtmamba, f"_triton_{name}", RecordedKernel())
    monkeypatch.setattr(mtmamba.triton, "JITFunction", type(None))    # pass for the interpreter
    inputs, operator = [], mtmamba._scan_op._init_fn    # the function itself, as a mode does not see into operators
    monkeypatch.setattr(mtmamba, "_scan_op", lambda *given: inputs.extend(given) or given)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        x = torch.randn(1, 2, 3, 6)
        mtmamba.SS2D(6, 4, 2, "triton")(x.bfloat16() if mixed else x)
    with Launches() as launches:
        y, states = operator(*inputs)
        mtmamba._scan_backward_op._init_fn(y, states, *inputs)
    kernels = RecordedKernel.launches
    RecordedKernel.launches = 0
    assert kernels == 6 and kernels + len(launches.names) == 15, launches.names


class RecordedKernel:
    launches = 0

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            RecordedKernel.launches += 1
        return launch


@needs_triton
@pytest.mark.parametrize("d, n, delta_pixel, largest", [(64, 1, 256, 256), (1, 64, 4, 512), (2, 1, 1024, 1024)])
def test_triton_refuses_maps_whose_pixels_32_bits_cannot_count(d, n, delta_pixel, largest):
    """largest: numbers per pixel of delta, of B and C, and of what delta is a part of."""
    def arguments(columns):
        map = functools.partial(torch.empty, 1, 2 ** 11, columns, device="meta")
        delta = map(delta_pixel)[..., :K * d].unflatten(-1, (K, d))
        A, bias = torch.empty(K, d, n, device="meta"), torch.empty(K, d, device="meta")
        return mtmamba._triton_arguments(map(d), delta, A, map(K, 2, n), bias, 1)
    arguments(2 ** 20 // largest - 1)
    with pytest.raises(ValueError, match="too large"):
        arguments(2 ** 20 // largest)


@needs_triton
def test_triton_refuses_what_it_cannot_run(monkeypatch, fresh_faults):
    inputs = random_inputs(1, 4, 5, 3, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="found torch.float64"):
        selective_scan_2d(*inputs, backend="triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    mtmamba._find_fault.cache_clear()
    with pytest.raises(RuntimeError, match="found ModuleNotFoundError: .*triton.*; use the backend torch"):
        selective_scan_2d(*inputs, backend="triton")


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA GPUs comes with its Linux wheels")
def test_triton_compiles_for_gpus():
    """In a process without the interpreter, each type and each compute capability once; bfloat16 on 8.0 costs most. And
    CPU tensors are refused."""
    code = """if True:
        import compile_kernels, mtmamba, torch
        try:
            mtmamba.SS2D(4, backend="triton")(torch.randn(1, 3, 3, 4))
        except RuntimeError as error:
            assert "CUDA tensors" in str(error), error
        else:
            raise SystemExit("ran on CPU tensors")
        compile_kernels.main([(torch.bfloat16, 80), (torch.float32, 90)])"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parent)


def test_works_without_triton_and_numba():
    code = """if True:
        import importlib.util, sys, torch
        import mtmamba
        assert "numba" not in sys.modules    # importing it takes a moment, and only a scan needs it
        sys.modules["triton"] = sys.modules["numba"] = None
        find_spec = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *args: None if name == "numba" else find_spec(name, *args)
        del sys.modules["mtmamba"]
        import mtmamba
        assert mtmamba.triton is None and mtmamba.default_backend(torch.device("cpu")) == "torch"
        mtmamba.SS2D(4)(torch.randn(1, 3, 3, 4))"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(mtmamba.__file__).parent)


@pytest.mark.parametrize("backend", ["torch", NUMBA, TRITON])
def test_ss2d_equals_reference(backend, poisoned, small_blocks):
    """With the low-rank step size that the operator expands itself: values and the gradients of all parameters."""
    torch.manual_seed(0)
    module = SS2D(6, d_state=3, dt_rank=2, backend=backend).to(device_of(backend))
    reference = SS2D(6, d_state=3, dt_rank=2, backend="loop").double()
    reference.load_state_dict(module.state_dict())
    x = torch.randn(1, 3, 4, 6)
    y, y_reference = module(x.to(device_of(backend))), reference(x.double())
    assert relative_error(y, y_reference) < 2e-6
    y.square().sum().backward()
    y_reference.square().sum().backward()
    for ours, theirs in zip(module.parameters(), reference.parameters()):
        assert relative_error(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize("backend", ["torch", NUMBA, TRITON])
def test_strong_decay_stays_finite(backend, small_blocks):
    """Decays that underflow to 0 must give the last input alone, not inf - inf."""
    device = device_of(backend)
    x, delta, A, B, C, skip, bias = (t.detach().float() for t in random_inputs(1, 2, 3, 2, 2, device=device))
    inputs = [t.requires_grad_() for t in (x, delta + 20, A * 100, B, C, skip, bias)]
    y, y_reference = (selective_scan_2d(*inputs, backend=name) for name in (backend, "loop"))
    torch.testing.assert_close(y, y_reference, rtol=1e-4, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("backend", ["torch", NUMBA, TRITON])
def test_decays_of_every_size(backend, small_blocks):
    """exp(-decay) from 1 down to where float32 ends, at 87.3 and below."""
    x, delta = torch.zeros(1, 1, 2, 480, device=device_of(backend)), math.log(math.e - 1)    # whose softplus is 1
    x[:, :, 0] = 1
    decay = torch.linspace(0, 120, 480)
    A, ones = -decay.expand(K, 1, 480).mT, x.new_ones(1, 1, 2, K, 1)
    zeros = x.new_zeros(K, 480)
    y = selective_scan_2d(x, x.new_full((1, 1, 2, K, 480), delta), A.to(x), ones, ones, zeros, zeros, backend)
    assert y[0, 0, 0].sub(4).abs().max() < 1e-5
    torch.testing.assert_close(y[0, 0, 1].cpu(), 2 * torch.exp(-decay.double()).float(), rtol=5e-5, atol=2.4e-38)


@pytest.mark.paper("Eq. 10-12", against="finite differences")
def test_gradcheck(compare):
    inputs = random_inputs(1, 5, 7, 2, 2)    # 35 steps: two chunks
    scan = functools.partial(selective_scan_2d, backend="torch")
    assert torch.autograd.gradcheck(scan, inputs)
    weight, step = torch.randn(1, 5, 7, 2, dtype=torch.float64), 1e-6    # and with figures: along a line per input
    for i, grad in enumerate(torch.autograd.grad(scan(*inputs), inputs, weight)):
        line = torch.randn_like(grad)
        ends = [(scan(*inputs[:i], inputs[i] + s * line, *inputs[i + 1:]) * weight).sum() for s in (step, -step)]
        compare((grad * line).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)


def test_loop_has_every_kind_of_derivative():
    inputs = random_inputs(1, 2, 3, 2, 2)
    scan = functools.partial(selective_scan_2d, backend="loop")
    assert torch.autograd.gradcheck(scan, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scan, inputs)
    x, *others = (t.detach() for t in inputs)
    gradient = torch.func.grad(lambda x: scan(x, *others).square().sum())(x)
    torch.testing.assert_close(gradient, torch.autograd.grad(scan(*inputs).square().sum(), inputs[0])[0])


def forward_mode(scan, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return scan(torch.autograd.forward_ad.make_dual(x, tangent))


DERIVATIVES = {
    "jvp": lambda scan, x: torch.func.jvp(scan, (x,), (x,)),
    "jvp of a parameter's gradient": lambda scan, x: torch.func.jvp(scan, (x.clone().requires_grad_(),), (x,)),
    "forward mode": lambda scan, x: forward_mode(scan, x, x),
    "func.grad": lambda scan, x: torch.func.grad(lambda x: scan(x).sum())(x),
    "func.vjp": lambda scan, x: torch.func.vjp(scan, x),
    "jacfwd": lambda scan, x: torch.func.jacfwd(scan)(x),
    "compiled jvp": lambda scan, x: torch.compile(lambda x: torch.func.jvp(scan, (x,), (x,)), backend="eager")(x)}


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_a_derivative_that_a_backend_lacks_raises(kind):
    """Custom operators drop tangents in silence."""
    x, *others = (t.detach() for t in random_inputs(1, 2, 3, 2, 2))
    with pytest.raises(RuntimeError, match="use the backend loop"):
        DERIVATIVES[kind](lambda x: selective_scan_2d(x, *others, backend="torch"), x)


def test_second_derivatives_raise():
    x, *others = random_inputs(1, 2, 3, 2, 2)
    gradient, = torch.autograd.grad(selective_scan_2d(x, *others, backend="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives; use the backend loop"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend, dtype, rank", [
    ("torch", torch.float32, 2), ("torch", torch.float64, None), ("torch", torch.bfloat16, None),
    pytest.param("numba", torch.float32, None, marks=needs_numba),
    pytest.param("numba", torch.bfloat16, 2, marks=needs_numba),
    pytest.param("triton", torch.bfloat16, 2, marks=needs_triton)])
def test_opcheck(backend, dtype, rank, small_blocks):
    sizes, device = (1, 1, 2, 3, 1) if backend == "triton" else (2, 1, 5, 3, 2), device_of(backend)
    inputs = random_inputs(*sizes, dtype, device)
    dt_weight = None
    if rank:
        inputs[1] = inputs[1].detach()[..., :rank].requires_grad_()
        dt_weight = torch.randn(K, 3, rank, dtype=dtype, device=device, requires_grad=True)
    x, delta, A, B, C, *others = inputs
    BC = torch.cat([B, C], dim=-1).detach().to(mtmamba._compute_dtype(x)).requires_grad_()
    torch.library.opcheck(torch.ops.mtmamba.selective_scan_2d, (x, delta, A, BC, *others, dt_weight, backend))


def test_computes_in_float32_under_autocast():
    x, *parameters = (t.detach().float() for t in random_inputs(1, 6, 7, 4, 8))
    expected = selective_scan_2d(x.bfloat16().float(), *parameters, backend="torch")
    for backend in ("torch", "loop", "numba")[:3 - bool(mtmamba.backend_fault("numba"))]:
        with torch.autocast("cpu", torch.bfloat16):
            y = selective_scan_2d(x.bfloat16(), *parameters, backend=backend)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16())


def stored_bytes(run) -> int:
    """What autograd keeps for the backward pass of run(), each storage counted once."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
        run()
    return sum(saved.values())


@pytest.mark.parametrize("backend", ["torch", NUMBA])
def test_training_memory_does_not_hold_the_states(backend):
    """Saved for the backward pass: the inputs and a state per chunk, far less than B L K D N."""
    inputs = random_inputs(1, 32, 32, 64, 16, torch.float32)
    numbers = stored_bytes(lambda: selective_scan_2d(*inputs, backend=backend)) // 4
    steps = 32 * 32 * K * 64
    assert numbers <= sum(t.numel() for t in inputs) + steps * 16 // mtmamba.CHUNK
    assert numbers < 2.5 * steps


@pytest.mark.parametrize("backend", ["torch", NUMBA, TRITON])
def test_ss2d_does_not_store_the_expanded_step_size(backend):
    """At most 3 times x, beside the projection (low-rank step size, B, C), the states and the parameters."""
    module = SS2D(64, d_state=1, backend=backend).to(device_of(backend))
    x = torch.randn(1, 4, 8, 64, device=device_of(backend))
    states = K * 1 * 64 * (4 * 8 // (mtmamba.SEGMENTS[0] if backend == "triton" else mtmamba.CHUNK))
    projected = 4 * 8 * K * (module.dt_rank + 2)
    parameters = 2 * sum(p.numel() for p in module.parameters())    # A is stored beside A_log
    assert stored_bytes(lambda: module(x)) // 4 <= 3 * x.numel() + projected + states + parameters


@pytest.mark.parametrize("backend", ["torch", None, "mamba_ssm", TRITON])
def test_ss2d_compiles_without_a_graph_break(backend, small_blocks, monkeypatch):
    if backend == "mamba_ssm":
        play_mamba_ssm(monkeypatch)
    torch.manual_seed(0)
    module = SS2D(8, d_state=2, backend=backend).to(device_of(backend))
    x = torch.randn(1, 1, 3, 8, device=device_of(backend), requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


def test_compiles_where_dynamo_takes_every_call_for_an_export(monkeypatch):
    """PyTorch 2.7 to 2.11."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: torch.compiler.is_dynamo_compiling())
    module, x = SS2D(4, backend="torch"), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_flops_of_a_scan():
    """PyTorch's counter knows the operator: 2 per multiply-add, 9 N + 1 + R per pixel, direction and channel, and twice
    that in the backward pass; the projection beside it by hand."""
    module, x = SS2D(8, d_state=4, dt_rank=2, backend="torch"), torch.randn(1, 3, 5, 8)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
        forward = counter.get_total_flops()
        y.sum().backward()
    scan, projection = 2 * 15 * 4 * 8 * (9 * 4 + 1 + 2), 2 * 15 * 8 * 4 * (2 + 2 * 4)
    assert forward == scan + projection
    assert counter.get_total_flops() == 3 * scan + 2 * projection    # x needs no gradient


def test_compiled_loop_has_gradients():
    torch.manual_seed(0)
    ss2d, x, gradients = SS2D(4, d_state=2, backend="loop"), torch.randn(2, 3, 5, 4, requires_grad=True), []
    for network in (ss2d, torch.compile(ss2d, fullgraph=True, dynamic=False, backend="aot_eager")):
        gradients.append(torch.autograd.grad(network(x).square().sum(), [x, *ss2d.parameters()]))
    for eager, compiled in zip(*gradients):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4 * eager.abs().max().item())


@pytest.fixture
def compiled_quickly(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("backend", ["torch", "loop", NUMBA, TRITON])
def test_the_scan_proves_itself(backend, monkeypatch, compiled_quickly):
    interpreted = backend == "triton" and DEVICE == "cpu"    # a step takes milliseconds
    if interpreted:
        for name, value in dict(SEGMENTS=(4,), STEPS=2, CHECKED=(1, 1, 5, 2)).items():
            monkeypatch.setattr(mtmamba, name, value)
    mtmamba._scan_reference.cache_clear()
    module = SS2D(4, d_state=1 if interpreted else 3, backend=backend).to(device_of(backend))
    before = torch.get_rng_state()
    for dtype in (torch.float32,) if interpreted else (torch.bfloat16, torch.float16):
        with torch.inference_mode():
            mtmamba.check_scan(module, dtype, compiled=backend != "loop" and dtype != torch.float16)
    assert torch.equal(torch.get_rng_state(), before)
    mtmamba._scan_reference.cache_clear()


def spoil(monkeypatch, backend, part):
    """A backend that is off by 1e-3 in one number: of y, or of a gradient."""
    functions = dict(zip(("forward", "backward"), mtmamba._SCANS[backend]))

    def spoilt(*operands):
        results = functions[part](*operands)
        wrong = results[3] if part == "backward" else results    # the gradients of the parameters, or y
        wrong[-1].flatten()[wrong[-1].abs().argmax()] *= 1.001
        return results
    monkeypatch.setitem(mtmamba._SCANS, backend, tuple((functions | {part: spoilt}).values()))


@pytest.mark.parametrize("part, named", [("forward", "y"), ("backward", "the gradient of delta_bias")])
def test_a_scan_that_computes_something_else_ends_a_run_before_it_starts(part, named, tmp_path, monkeypatch, capsys):
    """Training in either part, scoring in the forward one."""
    checkpoint, out = save_checkpoint(tmp_path / "last.pt", "stm1"), str(tmp_path / "out")
    spoil(monkeypatch, "torch", part)
    for main, flags in [(train.main, ["--iterations", "1", "--img-size", "32", "32", "--no-references"]),
                        (evaluate.main, ["--checkpoint", str(checkpoint), "--image", str(tmp_path)])]:
        if part == "forward" or main is train.main:
            with pytest.raises(SystemExit) as exit:
                main([*flags, "--device", "cpu", "--backend", "torch", "--out", out])
            error = capsys.readouterr().err.splitlines()[-1]
            assert exit.value.code == 2 and not (tmp_path / "out").exists()
            assert re.search(rf"the scan backend torch computes .*: {named} is off by .*e-0[34] of its largest value, "
                             rf"more than 1e-04 \(torch.float32, .*cpu, .*torch.*\); give --backend loop", error), error


@needs_numba
def test_a_wrong_scan_names_its_gpu_and_versions(monkeypatch):
    mtmamba.check_scan(module := SS2D(4, d_state=2, backend="numba").eval())
    reference = mtmamba._scan_reference(2)
    monkeypatch.setattr(mtmamba, "_scan_results", lambda *case: {"y": reference["y"] * 1.01})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.raises(RuntimeError, match="y is off by 1.0e-02.*, cpu, .*'torch': '2.*'numba': '0.*--backend torch"):
        mtmamba.check_scan(module)
    with pytest.raises(RuntimeError, match="NVIDIA H100, "):
        mtmamba._scan_compare("numba", 2, torch.device("cuda:0"), torch.float32, False, False)


def test_scoring_notices_only_what_it_computes(monkeypatch):
    """In eval mode nothing is differentiated. A difference behind torch.compile names --no-compile, too."""
    module, plain = SS2D(4, d_state=2, backend="torch").eval(), mtmamba._scan_compare
    spoil(monkeypatch, "torch", "backward")
    mtmamba.check_scan(module)
    with pytest.raises(RuntimeError, match="the gradient of"):
        mtmamba.check_scan(module.train())
    monkeypatch.setattr(mtmamba, "_scan_compare", lambda *case: plain(*case) if case[-1] else None)
    monkeypatch.setattr(torch, "compile", lambda scan, **_: lambda **inputs: scan(**inputs) * 1.001)
    mtmamba.check_scan(module.eval())
    with pytest.raises(RuntimeError, match="compiled.*give --no-compile or --backend loop"):
        mtmamba.check_scan(module, compiled=True)


@needs_triton
@pytest.mark.parametrize("adjoint", [False, True])
def test_triton_combines_more_segments_than_it_reads_at_a_time(adjoint):
    """Upwards in directions 0 and 1, downwards in 2 and 3; against the walk for gradients."""
    torch.manual_seed(0)
    batch, segments, N, D = 2, 11, 2, 3
    ends, totals = torch.randn(2, batch, 2, segments, N, D), torch.rand(2, batch, 2, segments, D)
    A, expected = -torch.rand(K, N, D), torch.empty_like(ends)
    for pair, sample, walk in np.ndindex(2, batch, 2):
        h = torch.zeros(N, D)
        for i in range(segments)[::1 if walk == adjoint else -1]:
            expected[pair, sample, walk, i] = h
            h = torch.exp(totals[pair, sample, walk, i] * A[pair + 2 * walk]) * h + ends[pair, sample, walk, i]
    ends, totals, A = (t.to(DEVICE) for t in (ends, totals, A))
    mtmamba._triton_combine[N * K * batch,](ends, totals, A, batch, segments, D, N=N, BLOCK=mtmamba.BLOCK_D, AHEAD=8,
                                            ADJOINT=adjoint, num_warps=1)
    torch.testing.assert_close(ends.cpu(), expected)


def test_triton_segments_fill_a_gpu():
    """The longest of which there are enough for 128 multiprocessors with 32 warps of 32 channels each."""
    for images, pixels, expected in ((1, 1, 16), (2, 2 ** 14 - 1, 16), (1, 2 ** 15, 32), (2, 2 ** 14, 32),
                                     (2, 2 ** 15 - 1, 32), (2, 2 ** 15, 64), (1, 2 ** 17, 128), (9, 2 ** 20, 128)):
        assert mtmamba._triton_segment(images, pixels, 128) == expected


def test_triton_proves_segments_of_each_length(monkeypatch):
    with torch.device("meta"):
        model = mtmamba.MTMamba({"depth": 1}, encoder="swin-large", variant="stm1", backend="triton")
    cases = []
    monkeypatch.setattr(mtmamba, "_scan_compare", lambda backend, N, device, kind, gradients, compiled: cases.append(
        (kind, mtmamba.SEGMENTS, gradients, compiled)))
    usual = mtmamba.SEGMENTS
    mtmamba.check_scan(model, torch.bfloat16, True)
    assert sorted(cases, key=str) == sorted([
        (kind, (length,), True, False) for kind in (torch.float32, torch.bfloat16)
        for length in (16, 32, 64, 128)] + [(torch.bfloat16, usual, True, True)], key=str)
    assert mtmamba.SEGMENTS == usual == (16, 32, 64, 128)


def test_ss2d_initialisation():
    torch.manual_seed(0)
    module = SS2D(256)
    assert module.dt_rank == 8
    torch.testing.assert_close(-module.A_log.exp(), -torch.arange(1.0, 17).expand(K, 256, 16))
    step = torch.nn.functional.softplus(module.dt_bias)
    assert 0.001 * 0.999 <= step.min() < 0.00102 and 0.098 < step.max() <= 0.1 * 1.001
    for weight, inputs in ((module.x_proj_weight, 256), (module.dt_weight, 8)):
        limits = torch.tensor([-1, 1]) * inputs ** -0.5
        torch.testing.assert_close(torch.stack(weight.aminmax()), limits, rtol=0.01, atol=0)
        assert weight.abs().max() <= limits[1]
    assert (module.D == 1).all()


def test_rejects_what_does_not_fit():
    x, delta, A, B, C, skip, bias = random_inputs(1, 4, 5, 3, 2, torch.float32)
    with pytest.raises(ValueError, match=r"expected delta of shape \(1, 4, 5, 4, 3\)"):
        selective_scan_2d(x, delta[:, :3], A, B, C, skip, bias)
    for backend in mtmamba.BACKENDS:
        with pytest.raises(ValueError, match="nothing to scan"):
            selective_scan_2d(x[:, :0], delta[:, :0], A, B[:, :0], C[:, :0], skip, bias, backend)
    with pytest.raises(ValueError, match="choose from loop, torch, numba, triton"):
        selective_scan_2d(x, delta, A, B, C, skip, bias, backend="cuda")


def test_mamba_ssm_is_never_replaced_silently(monkeypatch, fresh_faults):
    """It is not installed, or without its kernel, or for another PyTorch; or it is given CPU tensors."""
    inputs = random_inputs(1, 4, 5, 3, 2, torch.float32)

    def refused(reason):
        mtmamba._find_fault.cache_clear()
        with pytest.raises(RuntimeError, match=reason):
            selective_scan_2d(*inputs, backend="mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", types.ModuleType("interface"))
    for kernel in (None, "raise ImportError('undefined symbol: _ZN3c10')"):
        monkeypatch.setattr(importlib, "import_module", lambda name: exec(kernel or f"import {name}"))
        refused(f"found .*{'undefined symbol' if kernel else 'No module named'}(.|\n)*pip install")
        assert mtmamba.backend_fault("mamba_ssm")
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    refused("CUDA tensors")
    assert mtmamba.backend_fault("mamba_ssm") is None


def play_mamba_ssm(monkeypatch):
    """The package's interface, played by s6: u, delta (B, D, L); A (D, N); B, C (B, groups, N, L); D, bias (D,)."""
    def scan(u, delta, A, B, C, D, delta_bias):
        B, C = (t.repeat_interleave(len(A) // t.shape[1], dim=1) for t in (B, C))    # (B, D, N, L)
        y = [s6(u[:, d:d + 1].mT, delta[:, d:d + 1].mT, A[d:d + 1], B[:, d].mT, C[:, d].mT, D[d], delta_bias[d])
             for d in range(len(A))]
        return torch.cat(y, dim=2).mT

    class Scan(torch.autograd.Function):    # as in the package: with a backward pass that autograd does not see into
        @staticmethod
        def forward(ctx, *inputs):
            assert all(t.is_contiguous() for t in inputs)
            ctx.save_for_backward(*inputs)
            return scan(*inputs)

        @staticmethod
        def backward(ctx, grad):
            def run():
                inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                return torch.autograd.grad(scan(*inputs), inputs, grad)
            with ThreadPoolExecutor(1) as pool:    # inside an operator, autograd is off in this thread
                return pool.submit(run).result()

    def selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus):
        assert delta_softplus
        return Scan.apply(u, delta, A, B, C, D, delta_bias)

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setattr(mtmamba, "_expect_backend", lambda backend, x: None)


def test_mamba_ssm_equals_reference(monkeypatch):
    play_mamba_ssm(monkeypatch)
    inputs = random_inputs(2, 4, 7, 3, 5, torch.float32)
    with torch.inference_mode():    # after which training must still be possible
        selective_scan_2d(*inputs, backend="mamba_ssm")
    results = [(y := selective_scan_2d(*inputs, backend=backend),
                *torch.autograd.grad(y.square().sum(), inputs)) for backend in ("mamba_ssm", "loop")]
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
