"""tests/gpu.py without a GPU: that it notices, reports and goes on."""

import json
import sys

import gpu
import pytest
import torch

import mtmamba


def test_a_failure_is_reported_and_the_next_case_runs(tmp_path):
    report = gpu.Report(tmp_path / "part.json")
    report.case("fails", lambda: 1 / 0)
    report.case("runs", lambda: {"ms": 1.0})
    cases = json.loads((tmp_path / "part.json").read_text())
    assert [case["ok"] for case in cases] == [False, True] and cases[1]["figures"] == {"ms": 1.0}
    assert "ZeroDivisionError" in cases[0]["error"] and "test_gpu.py" in cases[0]["error"]


@pytest.mark.parametrize("spoil, message", [
    (lambda g: g * 1.001, "relative error"), (lambda g: g.index_fill(0, torch.tensor([0], device=g.device), torch.nan),
                                              "not finite|two runs differ"),
    (lambda g: g * (1 + 1e-7 * torch.rand_like(g)), "two runs differ"), (lambda g: g, None)])
def test_compare_notices(spoil, message, monkeypatch):
    """In the gradient of B alone; the kernels are played by the backend torch."""
    run = gpu.values_and_gradients

    def play(inputs, grad, backend, layout):
        results = run(inputs, grad, "torch" if backend == "triton" else backend, layout)
        if backend == "triton":
            results[4] = spoil(results[4])
        return results
    monkeypatch.setattr(gpu, "values_and_gradients", play)
    if message is None:
        assert gpu.compare((1, 2, 3, 2, 2), torch.float32)["relative error"] < 1e-6
    else:
        with pytest.raises(ValueError, match=message):
            gpu.compare((1, 2, 3, 2, 2), torch.float32)


@pytest.mark.skipif(not mtmamba.has_triton(), reason=f"needs Triton {mtmamba.OLDEST_TRITON} or newer")
def test_dry_run(script, tmp_path, monkeypatch, capsys):
    """One of its parts; all five take some minutes."""
    command = list(map(str, [gpu.__file__, "--out", tmp_path / "out", "--dry-run", "--only", "scan"]))
    run = script(*command)
    output, error = run.communicate()
    assert run.returncode == 0, output + error
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert result["failed"] == [] and result["parts"]["scan"][1]["figures"][0]["backend"] == "triton"
    assert "| 1×2 | 4 | 1 |" in output and "all ok" in output
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "not empty" in capsys.readouterr().err
