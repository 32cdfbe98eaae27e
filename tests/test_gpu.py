"""tests/gpu.py without a GPU: that it notices, reports and goes on."""

import json
import math
import multiprocessing
import os
import sys
import time
import types

import benchmark
import gpu
import pytest
import torch

import mtmamba
from processes import Forked


def test_a_failure_is_reported_and_the_next_case_runs(tmp_path):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    report = gpu.Report(tmp_path / "part.json", tmp_path)
    report.case("fails", lambda: 1 / 0)
    report.case("too large", run_out)
    report.case("runs", lambda: {"ms": 1.0})
    cases = gpu.read_cases(tmp_path / "part.json")
    assert [case["outcome"] for case in cases] == ["failed", "does not fit", "ok"]
    assert cases[2]["figures"] == {"ms": 1.0}
    assert "ZeroDivisionError" in cases[0]["error"] and "test_gpu.py" in cases[0]["error"]


def test_a_part_that_breaks_off_goes_on_after_the_case_that_broke_it(tmp_path):
    """Played by children of this process, which break off as after a fault of the device, or hang."""
    started = []

    def part(name):
        if name == "cannot start":
            os._exit(4)
        report = gpu.Report(tmp_path / f"{name}.json", tmp_path)
        report.case("first", lambda: 1)
        report.case("breaks", lambda: os._exit(3) if name == "breaks" else time.sleep(1000))
        report.case("last", lambda: 3)

    def outcomes(name):
        return [case["outcome"] for case in gpu.read_cases(tmp_path / f"{name}.json")]

    def start(name):
        started.append(name)
        return Forked(multiprocessing.get_context("fork"), part, name)

    def start_and_wait(name):
        process = start(name)
        while outcomes(name) != ["ok", "failed"]:
            time.sleep(0.01)
        return process
    gpu.run_parts(["breaks", "cannot start"], math.inf, tmp_path, start)
    gpu.run_parts(["hangs"], time.monotonic(), tmp_path, start_and_wait)
    assert started == ["breaks", "cannot start", "breaks", "hangs"]
    assert [outcomes(name) for name in started[1:]] == [["failed"], ["ok", "failed", "ok"], ["ok", "failed"]]


def test_a_kernel_counts_once():
    """A profile of a GPU lists 8 ms of kernels under themselves and under the operators that launched them."""
    def event(key, kind, own, total):
        return types.SimpleNamespace(key=key, device_type=kind, self_device_time_total=own, device_time_total=total,
                                     count=1, is_user_annotation=False)
    CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    share, slowest = benchmark.shares([
        event("mtmamba::selective_scan_2d", CPU, 1000, 2000), event("aten::cat", CPU, 1000, 1000),
        event("aten::mm", CPU, 6000, 6000), event("_triton_outputs", CUDA, 1000, 1000), event("cat", CUDA, 1000, 1000),
        event("gemm", CUDA, 6000, 6000)], "cuda")
    assert share == 0.25 and slowest[0] == {"kernel": "gemm", "ms": 6.0, "calls": 1, "share, %": 75.0}
    assert len(slowest) == 3


def test_memory_equals_what_pytorch_saves(tiny_model):
    """training_memory, by fake tensors, against the tensors that a step on the CPU keeps."""
    model = tiny_model(backend="torch")
    image = torch.randn(2, 3, 64, 96)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sum(output.square().mean() for output in model.train()(image).values())
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)
    with torch.device("meta"):
        held, [fake], [less] = benchmark.training_memory(tiny_model(backend="torch"), (64, 96), (2,), autocast=False)
    assert held == 4 * sum(p.nbytes for p in model.parameters()) / 2 ** 30
    assert fake * 2 ** 30 == pytest.approx(kept, rel=0.02) and less < fake


@pytest.mark.parametrize("spoil, message", [
    (lambda g: g * 1.001, "relative error"), (lambda g: g.index_fill(0, torch.tensor([0], device=g.device), torch.nan),
                                              "not finite|two runs differ"),
    (lambda g: g * (1 + 1e-7 * torch.rand_like(g)), "two runs differ"), (lambda g: g, None)])
def test_compare_notices(spoil, message, monkeypatch):
    """In the gradient of B alone; the kernels are played by the backend torch."""
    run = gpu.values_and_gradients

    def play(inputs, grad, backend, *more, **named):
        results = run(inputs, grad, "torch" if backend == "triton" else backend, *more, **named)
        if backend == "triton":
            results[4] = spoil(results[4])
        return results
    monkeypatch.setattr(gpu, "values_and_gradients", play)
    if message is None:
        assert gpu.compare((1, 2, 3, 2, 2), torch.float32)["relative error"] < 1e-6
    else:
        with pytest.raises(ValueError, match=message):
            gpu.compare((1, 2, 3, 2, 2), torch.float32)


@pytest.mark.skipif(mtmamba.backend_fault("triton"), reason="needs Triton")
def test_dry_run(script, tmp_path, monkeypatch, capsys):
    """Two of its parts; all of them take some minutes."""
    command = list(map(str, [gpu.__file__, "--out", tmp_path / "out", "--dry-run", "--only", "odd", "scan"]))
    run = script(*command)
    output, error = run.communicate()
    assert run.returncode == 0, output + error
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["not ok"] == [] and result["parts"]["odd"][0]["figures"]["relative error"] < 1e-5
    assert result["parts"]["scan"][1]["figures"]["backend"] == "triton"
    assert "| 1×2 | 4 | 1 |" in output and "all ok" in output
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "not empty" in capsys.readouterr().err


def test_the_limits_add_up():
    assert sum(limit for _, _, limit in gpu.SLOTS) == 540 and all(expected <= limit for _, expected, limit in gpu.SLOTS)
    assert sorted(part for parts, _, _ in gpu.SLOTS for part in parts) == sorted(gpu.PARTS)
