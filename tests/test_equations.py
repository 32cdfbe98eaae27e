"""Eq. 2-29, the head and S-CTM written out in numpy, the scan pixel by pixel, against modules of the same weights.

All in float64 but A, which the modules compute in float32.
"""

import numpy as np
import pytest
import torch
from test_scan import PATHS

NUMPY = "numpy"


def array(t):
    return t.detach().double().numpy()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def linear(z, m):
    return z @ array(m.weight).T + (0 if m.bias is None else array(m.bias))


def layer_norm(z, m):
    deviation = np.sqrt(z.var(-1, keepdims=True) + 1e-5)
    return (z - z.mean(-1, keepdims=True)) / deviation * array(m.weight) + array(m.bias)


def conv(z, m):
    """3x3, zeros outside."""
    weight, (_, H, W, C) = array(m.weight), z.shape
    if m.groups == C:    # each channel by itself
        weight = np.eye(C)[:, :, None, None] * weight
    z = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return array(m.bias) + sum(z[:, i:i + H, j:j + W] @ weight[:, :, i, j].T for i in range(3) for j in range(3))


def ss2d(z, m, c=None):
    """c: what MTMamba++ has Delta, B and C depend on; in MTMamba it is z."""
    c = z if c is None else c
    R, N, A = m.dt_rank, m.d_state, array(-torch.exp(m.A_log.float()))
    X, V, bias, D = map(array, (m.x_proj_weight, m.dt_weight, m.dt_bias, m.D))
    y = np.zeros_like(z)
    for v, path in PATHS.items():                                                    # Eq. 10
        h = np.zeros((len(z), *A[v].shape))
        for i, j in path(*z.shape[1:3]):                                             # Eq. 11
            x = z[:, i, j]
            low_rank, B, C = np.split(c[:, i, j] @ X[v].T, [R, R + N], axis=1)       # Eq. 6, 7
            delta = np.log1p(np.exp(bias[v] + low_rank @ V[v].T))[:, :, None]        # Eq. 8
            A_bar, B_bar = np.exp(delta * A[v]), delta * B[:, None]                  # Eq. 5
            h = A_bar * h + B_bar * x[:, :, None]                                    # Eq. 3
            y[:, i, j] += (h * C[:, None]).sum(2) + D[v] * x                         # Eq. 4, 2, 12
    return y


def mfe(z, m, c=None):
    return layer_norm(ss2d(silu(conv(linear(z, m.linear), m.conv)), m.ss2d, c), m.norm)    # Eq. 13


def stm(z, m):
    z_ln = layer_norm(z, m.norm)                                                     # Eq. 14
    z_tilde = mfe(z_ln, m.mfe)                                                       # Eq. 15
    g = silu(linear(z_ln, m.gate))                                                   # Eq. 16
    return z + linear(z_tilde * g, m.out)                                            # Eq. 17, 18


def ctm(z, m):
    shared = layer_norm(np.concatenate([*z.values()], axis=-1), m.norm_shared)       # Eq. 20
    shared, out = mfe(shared, m.mfe_shared), {}                                      # Eq. 22
    for t in z:
        z_ln = layer_norm(z[t], m.norm[t])                                           # Eq. 19
        z_tilde = mfe(z_ln, m.mfe[t])                                                # Eq. 21
        g = sigmoid(linear(z_ln, m.gate[t]))                                         # Eq. 23
        z_tilde = g * z_tilde + (1 - g) * shared                                     # Eq. 24
        out[t] = z[t] + linear(z_tilde, m.out[t])                                    # Eq. 25
    return out


def sctm(z, m):
    s = layer_norm(np.concatenate([*z.values()], axis=-1), m.norm_shared)
    s, out = conv(linear(s, m.linear_shared), m.conv_shared), {}
    for t in z:
        u = layer_norm(z[t], m.norm[t])
        y = mfe(u, m.mfe[t], linear(s, m.cross[t])) * silu(linear(u, m.gate[t]))
        out[t] = z[t] + linear(y, m.out[t])
    return out


def patch_expand(z, m, factor):
    z, (B, H, W, _) = linear(z, m.linear), z.shape
    parts = iter(np.split(z, factor ** 2, axis=-1))    # rows of pixels, from the top left
    out = np.zeros((B, factor * H, factor * W, z.shape[-1] // factor ** 2))
    for i in range(factor):
        for j in range(factor):
            out[:, i::factor, j::factor] = next(parts)
    return layer_norm(out, m.norm)


def stage(z, f, m):
    r = {t: patch_expand(z[t], m.expand[t], factor=2) for t in z}                    # Eq. 26
    r = {t: linear(np.concatenate([r[t], f[t]], axis=-1), m.fuse[t]) for t in z}     # Eq. 27
    r = {t: stm(stm(r[t], m.blocks[t][0]), m.blocks[t][1]) for t in z}               # Eq. 28
    return ctm(r, m.ctm)                                                             # Eq. 29


@pytest.fixture
def model(tiny_model):
    """Every parameter random, so that none can be left out."""
    def build(variant="mtmamba", backend=None):
        model = tiny_model({"a": 2, "b": 3}, variant=variant, backend=backend, d_state=3).double().eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        return model
    return build


@pytest.fixture
def check(compare):
    """check(module, function, input, ...): a task's map, or a dictionary of them by task."""
    def check(module, function, *inputs, **arguments):
        def each(x, convert):
            return {t: convert(z) for t, z in x.items()} if isinstance(x, dict) else convert(x)
        with torch.no_grad():
            ours = module(*inputs)
        expected = function(*(each(x, array) for x in inputs), module, **arguments)
        for t in ours if isinstance(ours, dict) else [...]:
            compare(ours[t], expected[t], rtol=1e-9, atol=1e-9)
    return check


def maps(H, W, C):
    return {t: torch.randn(2, H, W, C, dtype=torch.float64) for t in "ab"}


@pytest.mark.paper("Eq. 6-8, 10-12", against=NUMPY)
@pytest.mark.parametrize("backend", ["loop", "torch"])
def test_ss2d(model, check, backend):
    check(model(backend=backend).stages[2].ctm.mfe_shared.ss2d, ss2d, maps(4, 5, 24)["a"])


@pytest.mark.paper("Eq. 13", against=NUMPY)
def test_mfe(model, check):
    check(model().stages[2].ctm.mfe_shared, mfe, maps(4, 5, 24)["a"])


@pytest.mark.paper("Eq. 14-18", against=NUMPY)
def test_stm(model, check):
    check(model().stages[2].blocks["a"][0], stm, maps(4, 5, 12)["a"])


@pytest.mark.paper("Eq. 19-25", against=NUMPY)
def test_ctm(model, check):
    check(model().stages[2].ctm, ctm, maps(4, 5, 12))


@pytest.mark.paper("Eq. 26-29", against=NUMPY)
def test_stage(model, check):
    check(model().stages[2], stage, maps(2, 3, 24), maps(4, 6, 12))


@pytest.mark.paper("Section 3.5", against=NUMPY)
def test_head(model, check):
    check(model().heads["b"], lambda z, m: linear(patch_expand(z, m.expand, factor=4), m.project), maps(2, 3, 12)["b"])


@pytest.mark.paper("SCTM", against="numpy")
def test_sctm(model, check):
    check(model("mtmamba++").stages[2].ctm, sctm, maps(4, 5, 12))
