"""The scan: s6 against the closed form of the recurrence, every backend against s6 along explicit index lists."""

import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch

import mtmamba
from mtmamba import K, SS2D, s6, scan_orders, selective_scan_2d

# (batch, H, W, D, N): one chunk or several, lengths that the chunk divides or not, single pixels, rows and columns.
SHAPES = [(2, 5, 9, 3, 4), (1, 8, 8, 5, 16), (1, 1, 1, 2, 1), (3, 1, 33, 2, 3), (1, 40, 1, 1, 2), (2, 11, 6, 4, 16)]


def random_inputs(batch, H, W, D, N, dtype=torch.float64):
    torch.manual_seed(0)
    matrix = (batch, H, W, K, N)
    shapes = [(batch, H, W, D), (batch, H, W, K, D), (K, D, N), matrix, matrix, (K, D), (K, D)]
    x, delta, A, B, C, skip, bias = (torch.randn(s, dtype=dtype) for s in shapes)
    return [t.requires_grad_() for t in (x, delta, -A.exp(), B, C, skip, bias)]


def test_s6_equals_the_closed_form():
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
    np.testing.assert_allclose(ours.numpy(), y, rtol=1e-12, atol=1e-12)


def test_scan_orders():
    assert scan_orders(2, 3).tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5],
                                          [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


PATHS = {    # the (row, column) pairs that each direction visits in turn
    0: lambda H, W: [(i, j) for i in range(H) for j in range(W)],
    1: lambda H, W: [(i, j) for j in range(W) for i in range(H)],
    2: lambda H, W: [(i, j) for i in reversed(range(H)) for j in reversed(range(W))],
    3: lambda H, W: [(i, j) for j in reversed(range(W)) for i in reversed(range(H))],
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("direction", range(K))
def test_each_direction_alone_follows_its_path(direction, backend):
    x, delta, A, B, C, skip, bias = (t.detach() for t in random_inputs(2, 5, 8, 3, 4))
    C, skip = C.clone(), skip.clone()
    for other in set(range(K)) - {direction}:    # C = D = 0 silences a direction
        C[:, :, :, other], skip[other] = 0, 0
    path = PATHS[direction](5, 8)
    along = [torch.stack([t[:, i, j] for i, j in path], dim=1) for t in (x, delta, B, C)]
    u, delta_k, B_k, C_k = along[0], *(t[:, :, direction] for t in along[1:])
    y = s6(u, delta_k, A[direction], B_k, C_k, skip[direction], bias[direction])
    ours = selective_scan_2d(x, delta, A, B, C, skip, bias, backend)
    for step, (i, j) in enumerate(path):
        torch.testing.assert_close(ours[:, i, j], y[:, step], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_reference(shape):
    inputs = random_inputs(*shape)
    y, y_reference = (selective_scan_2d(*inputs, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(y, y_reference, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(y)
    for ours, reference in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(y_reference, inputs, grad)):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_strong_decay_stays_finite():
    """Decays that underflow to 0 must give the last input alone, not inf - inf."""
    x, delta, A, B, C, skip, bias = (t.detach().float() for t in random_inputs(1, 8, 9, 2, 3))
    inputs = [t.requires_grad_() for t in (x, delta + 20, A * 100, B, C, skip, bias)]
    y, y_reference = (selective_scan_2d(*inputs, backend=backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(y, y_reference, rtol=1e-4, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), inputs))


def test_gradcheck():
    inputs = random_inputs(1, 5, 7, 2, 2)    # 35 steps: two chunks
    assert torch.autograd.gradcheck(lambda *t: selective_scan_2d(*t, backend="torch"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    inputs = random_inputs(2, 5, 7, 3, 2, dtype)
    torch.library.opcheck(torch.ops.mtmamba.selective_scan_2d, inputs)


def test_computes_in_float32_under_autocast():
    x, *parameters = (t.detach().float() for t in random_inputs(1, 6, 7, 4, 8))
    expected = selective_scan_2d(x.bfloat16().float(), *parameters, backend="torch")
    for backend in ("torch", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            y = selective_scan_2d(x.bfloat16(), *parameters, backend=backend)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected.bfloat16())


def test_training_memory_does_not_hold_the_states():
    """Saved for the backward pass: the inputs and a state per chunk, far less than B L K D N."""
    batch, H, W, D, N = 1, 32, 32, 64, 16
    inputs = random_inputs(batch, H, W, D, N, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        selective_scan_2d(*inputs, backend="torch")
    steps = batch * H * W * K * D
    assert sum(saved) <= sum(t.numel() for t in inputs) + steps * N // mtmamba.CHUNK
    assert sum(saved) < 2.5 * steps


def test_ss2d_compiles_without_a_graph_break():
    torch.manual_seed(0)
    module = SS2D(8, d_state=4)
    x = torch.randn(1, 6, 7, 8, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), module(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)))


def test_ss2d_initialisation():
    torch.manual_seed(0)
    module = SS2D(64, d_state=16)
    assert module.dt_rank == 2
    torch.testing.assert_close(-module.A_log.exp(), -torch.arange(1.0, 17).expand(K, 64, 16))
    step = torch.nn.functional.softplus(module.dt_bias)
    assert 0.001 * 0.999 <= step.min() < 0.002 and 0.05 < step.max() <= 0.1 * 1.001
    assert 0.5 * 2 ** -0.5 < module.dt_weight.abs().max() <= 2 ** -0.5
    assert (module.D == 1).all()


def test_rejects_what_does_not_fit():
    x, delta, A, B, C, skip, bias = random_inputs(1, 4, 5, 3, 2, torch.float32)
    with pytest.raises(ValueError, match=r"expected delta of shape \(1, 4, 5, 4, 3\)"):
        selective_scan_2d(x, delta[:, :3], A, B, C, skip, bias)
    with pytest.raises(ValueError, match="nothing to scan"):
        selective_scan_2d(x[:, :0], delta[:, :0], A, B[:, :0], C[:, :0], skip, bias)
    with pytest.raises(ValueError, match="choose from reference, torch, mamba_ssm"):
        selective_scan_2d(x, delta, A, B, C, skip, bias, backend="cuda")


def test_mamba_ssm_is_never_replaced_silently(monkeypatch):
    inputs = random_inputs(1, 4, 5, 3, 2, torch.float32)
    monkeypatch.setattr(mtmamba, "has_mamba_ssm", lambda: False)
    with pytest.raises(RuntimeError, match="pip install"):
        selective_scan_2d(*inputs, backend="mamba_ssm")
    monkeypatch.setattr(mtmamba, "has_mamba_ssm", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA tensors"):
        selective_scan_2d(*inputs, backend="mamba_ssm")
    assert mtmamba.default_backend(torch.device("cuda")) == "mamba_ssm"
    assert mtmamba.default_backend(torch.device("cuda"), torch.float64) == "torch"
    assert mtmamba.default_backend(torch.device("cpu")) == "torch"


def test_mamba_ssm_needs_its_kernel_too(monkeypatch):
    for name, installed in [("mamba_ssm", True), ("selective_scan_cuda", False)]:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        if installed:
            monkeypatch.setitem(sys.modules, name, module)
    assert not mtmamba.has_mamba_ssm()
    kernel = types.ModuleType("selective_scan_cuda")
    kernel.__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", kernel)
    assert mtmamba.has_mamba_ssm()


def test_mamba_ssm_gets_its_arguments_in_its_layout(monkeypatch):
    """The package's interface, played by s6: u, delta (B, D, L); A (D, N); B, C (B, groups, N, L); D, bias (D,)."""
    def selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus):
        assert delta_softplus and all(t.is_contiguous() for t in (u, delta, A, B, C, D, delta_bias))
        B, C = (t.repeat_interleave(len(A) // t.shape[1], dim=1) for t in (B, C))    # (B, D, N, L)
        y = [s6(u[:, d:d + 1].mT, delta[:, d:d + 1].mT, A[d:d + 1], B[:, d].mT, C[:, d].mT, D[d], delta_bias[d])
             for d in range(len(A))]
        return torch.cat(y, dim=2).mT

    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    inputs = [t.detach() for t in random_inputs(2, 4, 7, 3, 5, torch.float32)]
    torch.testing.assert_close(mtmamba._run_mamba_ssm(*inputs), selective_scan_2d(*inputs, backend="reference"))
