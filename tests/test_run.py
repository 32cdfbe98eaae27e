"""A training run from launch to end: processes, precision, compilation, interruption, resuming, what it writes."""

import argparse
import contextlib
import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_model import published_state
from test_train import few_scenes
from timm.optim import create_optimizer_v2

import datasets
import evaluate
import mtmamba
import train
from archives import export
from conftest import TINY_SWIN
from datasets import SIGNALS, Synthetic
from metrics import Kind, Labels, delta_m
from mtmamba import MTMamba

ROOT = Path(train.__file__).parent
SMALL = ["--img-size", "32", "64", "--batch-size", "4", "--iterations", "6", "--log-every", "1", "--device", "cpu",
         "--no-references"]
FEW = ["--variant", "stm1", "--tasks", "semseg", "depth"]    # blocks and tasks, where it is not about them
# A Swin, so that stochastic depth acts in the encoder, too.
SWIN = ["--variant", "stm1", "--encoder", "swin-tiny", "--encoder-kwargs", json.dumps(TINY_SWIN), "--no-pretrained"]

DRIVER = """
import functools, os, shutil, sys, time
import torch
import datasets, evaluate, mtmamba, train
if __name__ == "__main__":
    scenes = int(os.environ.get("SCENES", 3))
    def open_few(cls, split, size, tasks=None, root=None, seed=0):
        return cls(3 if split == "train" else scenes, size, 2 * seed if split == "train" else 1, tasks)
    datasets.Synthetic.open = classmethod(open_few)
    if "KEEP" in os.environ:    # the checkpoint of every iteration
        save = train.save_checkpoint
        def save_and_keep(path, content):
            save(path, content)
            shutil.copy(path, path.with_name(f"{content['iteration']}.pt"))
        train.save_checkpoint = save_and_keep
    if "SCENES" in os.environ:    # so many to score, one second each
        evaluate.EVALUATION_BATCH, update = 1, evaluate.Evaluation.update
        evaluate.Evaluation.update = lambda *arguments: time.sleep(1) or update(*arguments)
    if "SLOW" in os.environ:
        step = train.Run.step
        train.Run.step = lambda *arguments: time.sleep(0.25) or step(*arguments)
    if "LEARNED" in os.environ:
        from test_run import Uncertainty
        train.TOTALS["uncertainty"] = Uncertainty
    if "SGD" in os.environ:    # AdamW makes whole steps of gradients that are rounding errors
        torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
        mtmamba.VARIANTS["mtmamba++"]["depth"] = 0    # SCTM alone: less to compile
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        # Small buckets of gradients, at which DDP cuts the compiled graph
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 2 ** 15
        train.DistributedDataParallel = functools.partial(train.DistributedDataParallel, bucket_cap_mb=2 ** -5)
        torch._logging.set_logs(ddp_graphs=True)
    train.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(Synthetic, "open", few_scenes(3))


@pytest.fixture
def driver(script, tmp_path):
    """driver(arguments, processes): starts a run with three images to evaluate on, in processes of its own."""
    (tmp_path / "driver.py").write_text(DRIVER)
    return lambda arguments, processes=1, **environment: script(
        tmp_path / "driver.py", *SMALL, *arguments, processes=processes, **environment)


def run(out, *arguments):
    return train.main([*SMALL, "--out", str(out), *map(str, arguments)])


def fails(capsys, code, out, *arguments):
    """The message of a run that ends with one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(out, *arguments)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == code and error.startswith("train.py: "), error
    return error


def log(out, key):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_state(ours, expected):
    """Bit for bit, through nested dictionaries and lists."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(ours, expected)
    elif isinstance(expected, dict):
        assert list(ours) == list(expected)
        for key in expected:
            assert_same_state(ours[key], expected[key])
    elif isinstance(expected, list):
        for pair in zip(ours, expected, strict=True):
            assert_same_state(*pair)
    else:
        assert ours == expected


def assert_same_training(ours, expected):
    for key in ("model", "learned", "optimizer", "scaler", "iteration", "best"):
        assert_same_state(ours[key], expected[key])


# ----------------------------------------------------------------------------------------------------------- launch

def test_processes_and_parts_change_nothing(tmp_path):
    """Losses of 6 steps and the weights after them, with stochastic depth in the encoder and the decoder; torchrun
    starting an interpreter for each process."""
    arguments = [*SWIN, "--lr", "1e-4"]
    (tmp_path / "driver.py").write_text(DRIVER)
    two = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                            tmp_path / "driver.py", *SMALL, *arguments, "--out", tmp_path / "two processes"], text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for parts in (1, 2, 4):
        run(tmp_path / str(parts), *arguments, "--accumulate", parts)
    _, error = two.communicate()
    assert two.returncode == 0, error
    assert "strides" not in error    # of gradients, of which DDP would warn
    expected, weights = log(tmp_path / "1", "losses"), load(tmp_path / "1/last.pt")["model"]
    scores = [log(tmp_path / name, "validation_losses")[0]["validation_losses"] for name in ("1", "two processes")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-3)
    for name in ("two processes", "2", "4"):
        for ours, line in zip(log(tmp_path / name, "losses"), expected, strict=True):
            assert ours["losses"] == pytest.approx(line["losses"], rel=1e-6)
        content = load(tmp_path / name / "last.pt")["model"]
        assert list(content) == list(weights)    # without prefixes of the wrapper
        for key in weights:
            torch.testing.assert_close(content[key], weights[key], rtol=1e-4, atol=2e-5)    # of 6e-4 that they moved
    assert json.loads((tmp_path / "two processes/log.jsonl").read_text().splitlines()[0])["processes"] == 2


def test_two_processes_equal_one_with_batch_norm(driver, tmp_path):
    """Weights and running statistics after 3 steps of MTMamba++ on a ResNet; compiled and with
    --checkpoint-activations, too. torchrun's single process builds DDP and sums over itself, too."""
    arguments = ["--encoder", "resnet10t", "--encoder-kwargs", '{"channels": [8, 8, 8, 8], "stem_width": 8}',
                 "--variant", "mtmamba++", "--iterations", 3, "--lr", 0.02,
                 "--tasks", "semseg", "boundary"]    # whose losses have no kink, where rounding may turn a gradient
    options = {"one": [], "torchrun": [], "two": [], "two compiled": ["--compile", "--checkpoint-activations"]}
    alone = dict(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="0")    # torchrun's
    for name, more in options.items():
        process = driver([*arguments, *more, "--out", tmp_path / name], 2 if "two" in name else 1, SGD="1",
                         **alone if name == "torchrun" else {})
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert "---submod_2 graph---" in error    # of the compiled run: its graph was cut
    expected = load(tmp_path / "one/last.pt")["model"]
    assert {"heads.boundary.norm.running_var", "encoder.backbone.bn1.running_var"} <= set(expected)
    for name in list(options)[1:]:
        ours = load(tmp_path / name / "last.pt")["model"]
        assert list(ours) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name} {key}: {m}")


class Uncertainty(torch.nn.Module):
    """Kendall, Gal, Cipolla, CVPR 2018: sum over tasks of exp(-s) loss + s, with a learned s."""

    def __init__(self, rows):
        super().__init__()
        self.s = torch.nn.Parameter(torch.zeros(len(rows)))

    def forward(self, losses):
        return sum((-s).exp() * loss + s for s, loss in zip(self.s, losses.values())).mean()


def test_a_total_loss_with_parameters_is_one_row(driver, signals, tmp_path, monkeypatch):
    """They are trained, the same on two processes and in parts, and resumed."""
    monkeypatch.setitem(train.TOTALS, "uncertainty", Uncertainty)
    arguments = [*SWIN, *FEW, "--loss", "uncertainty", "--lr", 1e-3]
    run(tmp_path / "one", *arguments)
    two = driver([*arguments, "--out", tmp_path / "two", "--accumulate", 2], 2, LEARNED="")
    signals(2, signal.SIGTERM)
    assert run(tmp_path / "halves", *arguments) == {}
    run(tmp_path / "halves", *arguments, "--resume")
    _, error = two.communicate(timeout=300)
    assert two.returncode == 0, error
    one, two, halves = (load(tmp_path / name / "last.pt") for name in ("one", "two", "halves"))
    assert one["learned"]["0.s"].abs().min() > 1e-3    # both have moved
    assert_same_training(halves, one)
    torch.testing.assert_close(two["learned"]["0.s"], one["learned"]["0.s"], rtol=1e-4, atol=0)
    assert json.loads((tmp_path / "one/results.json").read_text())["training"]["loss"] == "uncertainty"
    # The first step's losses by hand: all s are 0.
    losses = {"semseg": torch.tensor([1.0, 3.0]), "depth": torch.tensor([0.5, 0.1])}
    assert train.total_loss(losses, "uncertainty", losses).item() == pytest.approx(2.3)


def test_other_optimisers_and_rates(signals, tmp_path, monkeypatch):
    """A group's own rate is scaled; numbers in an optimiser's state survive resuming."""
    def build(self):
        heads = list(self.model.heads.parameters())
        rest = [*self.model.encoder.parameters(), *self.model.stages.parameters()]
        groups = dict(params=rest, lr=1e-3), dict(params=heads, lr=4e-3)
        return create_optimizer_v2(groups, "nadamlegacy")    # keeps a number, m_schedule
    monkeypatch.setattr(train.Run, "build_optimizer", build)
    run(tmp_path / "straight", *FEW)
    signals(3, signal.SIGTERM)
    run(tmp_path / "halves", *FEW)
    state = load(tmp_path / "halves/last.pt")["optimizer"]
    factor = (1 - 3 / 6) ** 0.9
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([1e-3 * factor, 4e-3 * factor])
    assert any(isinstance(value, float) for value in state["state"][0].values())
    run(tmp_path / "halves", *FEW, "--resume")
    assert_same_training(*(load(tmp_path / name / "last.pt") for name in ("halves", "straight")))


def test_every_flag_decides_what_is_computed_or_does_not(tmp_path):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    others = """recipe data_root out resume device workers accumulate backend compile checkpoint_activations save_every
        eval_every log_every baseline no_references tensorboard""".split()
    assert sorted([*train.DECISIVE, *others]) == sorted(vars(parser.parse_args([])))


def test_stochastic_depth_is_a_function_of_seed_and_iteration(tiny_model):
    """Each image keeps each block with its rate, whatever the part that it is computed in."""
    model = tiny_model({"depth": 1, "semseg": 2}, variant="s-ctm-dense", d_state=1)
    rates = torch.tensor([m.drop_prob for m in model.modules() if getattr(m, "drop_prob", 0)])
    depth = train.StochasticDepth(model, 2, torch.device("cpu"))
    paths = [m for m in model.modules() if isinstance(m, train.DrawnDropPath)]
    # Two a block of the encoder but the first; of the decoder, two STM for each task, and the SCTM, but its last.
    assert len(paths) == len(rates) == 2 * 4 + 3 * 2 * 2 + 2 * 2
    kept = torch.stack([depth.draw(0, i, 8) for i in range(400)])
    torch.testing.assert_close(kept.double().mean((0, 2)), 1 - rates.double(), rtol=0, atol=0.03)
    agreeing = (kept[:, :, None] == kept[:, None]).double().mean((0, 3)).fill_diagonal_(0)    # of blocks, by pairs
    assert agreeing.max() < 0.99 and not torch.equal(kept[:, -1], kept[:, -2])    # SCTM of one task and the other
    assert torch.equal(depth.draw(0, 5, 8), kept[5])
    for other in ((1, 5), (0, 6), (5, 0)):
        assert not torch.equal(depth.draw(*other, 8), kept[5])
    depth.kept.copy_(kept[5, :, 4:6])
    for path, row, rate in zip(paths, kept[5, :, 4:6], rates):
        for windows in (1, 3):    # of each image
            x = torch.ones(2 * windows, 1, 2, requires_grad=True)
            expected = (row / (1 - rate)).repeat_interleave(windows).view(-1, 1, 1).expand_as(x)
            torch.testing.assert_close(path(x), expected)
            torch.testing.assert_close(torch.autograd.grad(path(x).sum(), x)[0], expected)
    assert torch.equal(path.eval()(x), x)
    state = torch.get_rng_state()
    model.train()(torch.zeros(2, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_an_encoder_is_told(tmp_path, signals, capsys):
    """Another number of parts draws other numbers then; the same after resuming."""
    dropout = [*FEW, *SWIN[2:4], "--encoder-kwargs", json.dumps(TINY_SWIN | {"proj_drop_rate": 0.5}), "--no-pretrained"]
    run(tmp_path / "straight", *dropout, "--iterations", 2)
    assert capsys.readouterr().out.count("draws random numbers of its own") == 1
    signals(0, signal.SIGTERM)
    run(tmp_path / "halves", *dropout, "--iterations", 2)
    run(tmp_path / "halves", *dropout, "--iterations", 2, "--resume")
    assert_same_training(*(load(tmp_path / name / "last.pt") for name in ("halves", "straight")))
    capsys.readouterr()
    run(tmp_path / "without", *SWIN, *FEW, "--iterations", 1)
    assert "random numbers" not in capsys.readouterr().out


class Numbered(torch.utils.data.Dataset):
    SHUFFLED = True

    def __len__(self):
        return 7


def indices(start, rank=0, world=1, accumulate=1, dataset=None, seed=0):
    args = argparse.Namespace(seed=seed, batch_size=12, accumulate=accumulate, iterations=5)
    return list(train.batch_indices(dataset or Numbered(), args, start, rank, world))


def test_sample_order_does_not_depend_on_processes_parts_or_resuming():
    batches = indices(0)
    assert [len(batch) for batch in batches] == [12] * 5
    drawn = [sample for batch in batches for sample in batch]
    for epoch in range(8):    # each sample once in each epoch, in ever new orders
        assert sorted(drawn[7 * epoch:7 * epoch + 7]) == [(epoch, i) for i in range(7)]
    assert len({tuple(i for _, i in drawn[7 * e:7 * e + 7]) for e in range(8)}) > 5
    assert indices(0, seed=1) != batches
    assert indices(3) == batches[3:]
    for world, accumulate in ((2, 1), (3, 2), (1, 4), (4, 3)):
        parts = [indices(0, rank, world, accumulate) for rank in range(world)]
        together = [sum((parts[rank][p] for rank in range(world)), []) for p in range(5 * accumulate)]
        assert [sum(together[accumulate * i:accumulate * (i + 1)], []) for i in range(5)] == batches
    assert indices(1, dataset=Synthetic(60))[0] == list(range(12, 24))    # a new scene for each position


@pytest.mark.parametrize("arguments, message", [
    (["--accumulate", "3"], "--batch-size 4 cannot be split over 1 processes x --accumulate 3; give a multiple of 3"),
    (["--accumulate", "0"], "--accumulate of at least 1"),
    (["--eval-every", "-1"], "--eval-every of at least 0"),
    (["--val-images", "0"], "--val-images of at least 1"),
    (["--lr", "nan"], "--lr above 0"),
    (["--encoder-kwargs", "3"], "--encoder-kwargs"),
    (["--init-from", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--backend", "mamba_ssm"], "MAMBA_FORCE_BUILD=TRUE pip install"),
])
def test_bad_flags(arguments, message, tmp_path, capsys):
    assert message in fails(capsys, 2, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_the_scan_runs_on_the_backend_asked_for(tmp_path, capsys):
    """The equations step by step give the losses of the default, nearly."""
    for backend in ("loop", "torch"):
        run(tmp_path / backend, *FEW, "--iterations", 2, "--backend", backend)
        assert f"scan backend: {backend}" in capsys.readouterr().out
    expected, ours = (log(tmp_path / backend, "losses")[-1]["losses"] for backend in ("loop", "torch"))
    assert ours == pytest.approx(expected, rel=1e-3) and ours != expected
    scores = evaluate.main(["--checkpoint", str(tmp_path / "torch/last.pt"), "--backend", "loop"])
    assert "scan backend: loop" in capsys.readouterr().out and set(scores) == {"semseg", "depth"}


@pytest.mark.parametrize("error, code, message", [
    (subprocess.CalledProcessError(1, ["gcc", "main.c"]), 1, "python3-dev, or give --no-compile or --backend torch"),
    (RuntimeError("Failed to find C compiler.\nSet CC"), 1, "python3-dev, or give --no-compile or --backend torch"),
    (RuntimeError("no kernel for\nthis device"), 2, "train.py: no kernel for this device"),
])
@pytest.mark.parametrize("backward", [False, True])
def test_a_backend_that_cannot_be_compiled(error, code, message, backward, tmp_path, monkeypatch, capsys):
    """It is tried with the model's N, forward and backward, before the first iteration."""
    def scan(x, A, backend, **others):
        assert A.shape == (4, x.shape[3], 16)
        y = x.clone()
        y.register_hook(fail)
        return y if backward else fail()

    def fail(gradient=None):
        raise error
    monkeypatch.setattr(mtmamba, "selective_scan_2d", scan)
    monkeypatch.setitem(train.SMALL, "d_state", 16)
    mtmamba._scan_reference.cache_clear()
    assert message in fails(capsys, code, tmp_path, *FEW)


def test_accumulation_with_batch_norm_is_told(tmp_path, capsys):
    run(tmp_path, "--variant", "f-ctm-lite", "--tasks", "depth", "--iterations", 1, "--accumulate", 2)
    assert "--accumulate: batch norm sees 2 images of a batch at a time" in capsys.readouterr().out


def test_a_run_in_a_thread(tmp_path, capsys):
    """As in a server or a notebook: signals cannot be handled there, which is said once."""
    thread = threading.Thread(target=run, args=(tmp_path, *FEW, "--no-references"))
    thread.start()
    thread.join()
    assert load(tmp_path / "last.pt")["iteration"] == 6
    assert capsys.readouterr().out.count("not in the main thread") == 1


def test_tensorboard_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "tensorboard" in fails(capsys, 2, tmp_path / "run", "--tensorboard")


def test_tensorboard_gets_losses_and_scores(tmp_path, monkeypatch):
    """With a stand-in for the package, which is optional."""
    calls = []
    writer = types.SimpleNamespace(add_scalar=lambda *call: calls.append(call), flush=lambda: None)
    package = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: calls.append(purge_step) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    run(tmp_path, "--variant", "stm1", "--tensorboard", "--tasks", "depth", "--log-every", 3)
    losses = log(tmp_path, "losses")
    assert calls.pop(0) == 1    # the first iteration whose points are replaced
    assert [call for call in calls if call[0] == "losses/depth"] == [
        ("losses/depth", line["losses"]["depth"], line["iteration"]) for line in losses]
    scores = log(tmp_path, "selection")[0]
    assert ("results/depth/RMSE", scores["results"]["depth"]["RMSE"], 6) in calls
    assert ("validation_losses/depth", scores["validation_losses"]["depth"], 6) in calls


# ------------------------------------------------------------------------------------------------------ interruption

def test_killed_at_random_and_resumed_equals_uninterrupted(driver, tmp_path):
    """SIGKILL anywhere: in a step, in a save, in an evaluation; with a worker, in the midst of accumulating."""
    arguments = [*SWIN, *FEW, "--iterations", 16, "--accumulate", 2, "--save-every", 2, "--eval-every", 5,
                 "--workers", 1]
    run(tmp_path / "straight", *arguments)
    kills = 0
    while kills < 2:
        process = driver([*arguments, "--out", tmp_path / "killed", "--resume"])
        before = (tmp_path / "killed/last.pt").stat().st_mtime if kills else 0
        while process.poll() is None and not (    # it has saved something new
                (tmp_path / "killed/last.pt").exists() and (tmp_path / "killed/last.pt").stat().st_mtime > before):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.communicate()
        kills += 1
    last = driver([*arguments, "--out", tmp_path / "killed", "--resume"])
    output, error = last.communicate()
    assert last.returncode == 0, error
    assert "resuming" in output
    assert_same_training(load(tmp_path / "killed/last.pt"), load(tmp_path / "straight/last.pt"))
    assert_same_training(load(tmp_path / "killed/best.pt"), load(tmp_path / "straight/best.pt"))
    results = [json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("killed", "straight")]
    assert results[0] == results[1]


def test_terminated_by_launcher_and_cluster(driver, tmp_path):
    """SIGTERM to torchrun and its two processes, in every order and twice: the step that runs is the last one, its
    weights are in last.pt, and --resume goes on from there, all bit for bit as without."""
    arguments = [*FEW, "--iterations", 12, "--save-every", 1, "--workers", 1]
    straight = driver([*arguments, "--out", tmp_path / "straight"], 2, KEEP="")    # beside the first of the others
    for case in ("all at once", "processes first", "launcher alone"):
        out = tmp_path / case
        run = driver([*arguments, "--out", out, "--save-every", 100], 2, SLOW="")
        while not (out / "log.jsonl").exists() or len(log(out, "losses")) < 2:
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        before = len(log(out, "losses"))
        for targets, pause in {"all at once": [([run.pid, *workers], 0.1)] * 2,
                               "processes first": [(workers, 0.1), ([run.pid], 0.1)] * 2,
                               "launcher alone": [([run.pid], 0.1)] * 2}[case]:
            for pid in targets:
                with contextlib.suppress(ProcessLookupError):    # it has ended by then
                    os.kill(pid, signal.SIGTERM)
            time.sleep(pause)
        output, error = run.communicate(timeout=300)
        assert run.returncode == 1    # torchrun's own, which ends with the signal
        iteration = load(out / "last.pt")["iteration"]
        assert f"stopped after iteration {iteration} of 12" in output, error
        assert len(log(out, "losses")) == iteration <= before + 2    # one line waits for the next step
        _, error = straight.communicate()
        assert straight.returncode == 0, error
        assert_same_training(load(out / "last.pt"), load(tmp_path / f"straight/{iteration}.pt"))
    resumed = driver([*arguments, "--out", out, "--resume"], 2)
    _, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert_same_training(load(out / "last.pt"), load(tmp_path / "straight/last.pt"))


def test_a_signal_to_one_process_of_an_evaluation_ends_it_in_all(driver, tmp_path):
    """Within a batch, not after the minute that the others would need."""
    run = driver([*FEW, "--iterations", 1, "--out", tmp_path / "run"], 2, SCENES="120")
    while not (tmp_path / "run/last.pt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    time.sleep(2)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGTERM)
    output, error = run.communicate(timeout=40)
    assert run.returncode == 0 and "trained; scoring was interrupted" in output, error


@pytest.fixture
def signals(monkeypatch):
    """signals(iteration, *numbers): sends them to this process, once, in the midst of that iteration's step."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def send(iteration, *numbers, method="step"):
        inner, unsent = getattr(train.Run, method), list(numbers)

        def interrupted(self, *arguments, **options):
            while self.iteration == iteration and unsent:
                os.kill(os.getpid(), unsent.pop(0))
            return inner(self, *arguments, **options)
        monkeypatch.setattr(train.Run, method, interrupted)
    yield send
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_ends_cleanly(number, signals, tmp_path, capsys):
    twice = () if number == signal.SIGINT else (number, signal.SIGTERM)
    signals(3, number, *twice)
    assert run(tmp_path, *FEW) == {}
    assert load(tmp_path / "last.pt")["iteration"] == 4
    assert "stopped after iteration 4 of 6" in capsys.readouterr().out


def test_a_second_interrupt_from_the_keyboard_ends_at_once(signals, tmp_path, capsys):
    signals(3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        run(tmp_path, *FEW)
    assert exit.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()


def test_a_signal_during_an_evaluation(signals, tmp_path):
    """The weights are on the disk then, so it is given up; resumed, the run evaluates anew."""
    arguments = [*FEW, "--eval-every", 3]
    run(tmp_path / "straight", *arguments)
    signals(3, signal.SIGTERM, method="evaluate")
    assert run(tmp_path / "halves", *arguments) == {}
    assert load(tmp_path / "halves/last.pt")["iteration"] == 3 and not (tmp_path / "halves/best.pt").exists()
    run(tmp_path / "halves", *arguments, "--resume")
    assert_same_training(*(load(tmp_path / name / "last.pt") for name in ("halves", "straight")))
    halves, straight = ([{**line, "seconds": None} for line in log(tmp_path / name, "selection")]
                        for name in ("halves", "straight"))
    assert halves == straight


def test_resuming_with_fp16_keeps_the_scaler(tmp_path, signals):
    run(tmp_path / "straight", "--amp", "fp16", *FEW)
    signals(0, signal.SIGTERM)
    assert run(tmp_path / "halves", "--amp", "fp16", *FEW) == {}
    half = load(tmp_path / "halves/last.pt")
    assert half["scaler"]["_growth_tracker"] == half["iteration"] == 1
    run(tmp_path / "halves", "--amp", "fp16", *FEW, "--resume")
    whole = load(tmp_path / "halves/last.pt")
    assert whole["scaler"]["_growth_tracker"] == 6
    assert_same_training(whole, load(tmp_path / "straight/last.pt"))


def test_what_cannot_be_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    run(out, *FEW, "--save-every", 2)
    assert "continue it with --resume" in fails(capsys, 2, out, *FEW)
    message = fails(capsys, 2, out, *FEW, "--resume", "--lr", 1e-4, "--seed", 3)
    assert "--lr 0.01 (now 0.0001), --seed 0 (now 3)" in message
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    assert f"{out / 'last.pt'}" in fails(capsys, 2, out, *FEW, "--resume")
    (out / "last.pt").unlink()
    for more in ((), ("--resume",)):
        assert "which needs its last.pt" in fails(capsys, 2, out, *FEW, *more)


def test_the_untrained_model_is_scored_on_the_first_images(tmp_path, monkeypatch, capsys):
    """The trained one on all three, or as many as a quick trial asks for."""
    monkeypatch.setattr(train, "REFERENCE_IMAGES", 2)
    results = train.main([*SMALL[:-1], *FEW, "--out", str(tmp_path / "two")])
    assert "untrained (2)" in capsys.readouterr().out and list(results) == ["trained", "untrained"]
    assert results["trained"] == evaluate.main(["--checkpoint", str(tmp_path / "two/last.pt")])
    scored = []
    monkeypatch.setattr(train, "evaluate", lambda model, evaluation, **options: scored.append(evaluation.images) or (
        evaluate.evaluate(model, evaluation, **options)))
    without = run(tmp_path / "without", *FEW, "--no-references")
    assert without["trained"] == results["trained"] and list(without) == ["trained"] and scored == [3]
    trial = train.main([*SMALL[:-1], "--variant", "stm1", "--tasks", "semseg", "boundary", "--val-images", "1",
                        "--eval-every", "3", "--out", str(tmp_path / "trial")])
    assert scored[1:] == [1, 1, 1] and "odsF" in trial["untrained"]["boundary"]
    content = json.loads((tmp_path / "trial/results.json").read_text())
    assert content["images"] == content["boundary_images"] == 1
    monkeypatch.setattr(Synthetic, "open", few_scenes(1))
    assert trial["trained"] == evaluate.main(["--checkpoint", str(tmp_path / "trial/last.pt")])


def test_a_run_inside_its_data_is_refused(tmp_path, capsys):
    export("nyud", tmp_path, 2, size=(40, 48))
    assert "lies in the data set's folder" in fails(
        capsys, 2, tmp_path / "depth/run", "--dataset", "nyud", "--data-root", tmp_path, *OWN)
    assert not (tmp_path / "depth/run").exists()


def test_a_second_run_in_the_same_folder_is_refused(driver, tmp_path, capsys):
    """Also with --resume, until the first one has ended, however it ended."""
    first = driver([*FEW, "--out", tmp_path / "run", "--save-every", 1], SLOW="1")
    while not (tmp_path / "run/last.pt").exists():
        assert first.poll() is None
        time.sleep(0.05)
    for more in ((), ("--resume",)):
        assert f"another run writes to {tmp_path / 'run'}" in fails(capsys, 2, tmp_path / "run", *FEW, *more)
    first.kill()
    first.wait()
    run(tmp_path / "run", *FEW, "--save-every", 1, "--resume")
    assert [line["iteration"] for line in log(tmp_path / "run", "losses")] == [1, 2, 3, 4, 5, 6]


def test_lines_of_a_run_that_died_without_a_checkpoint_go(tmp_path):
    """With and without --resume, also a line that is cut off."""
    for more in ((), ("--resume",)):
        out = tmp_path / "run" / "".join(more)
        out.mkdir(parents=True)
        (out / "log.jsonl").write_text('{"config": {"iterations": 50}, "iteration": 0}\n'
                                       '{"iteration": 1, "losses": {}}\n{"iteration": 2, "los')
        run(out, *FEW, *more)
        assert [line["config"]["iterations"] for line in log(out, "config")] == [6]
        assert [line["iteration"] for line in log(out, "losses")] == [1, 2, 3, 4, 5, 6]


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """One warning; only a lock that is held stops a run."""
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES):
        def lockf(*_):
            raise OSError(number, os.strerror(number))    # noqa: B023
        monkeypatch.setattr(train.fcntl, "lockf", lockf)
        if number == errno.EACCES:
            with pytest.raises(ValueError, match="another run writes to"), train.locked(tmp_path / "run"):
                pass
        else:
            with train.locked(tmp_path / "run"):
                assert f"{tmp_path / 'run'} cannot be locked ({os.strerror(number)})" in capsys.readouterr().err


def test_scoring_that_is_interrupted_is_no_interrupted_training(signals, tmp_path, capsys):
    signals(6, signal.SIGTERM, method="evaluate")
    assert run(tmp_path, *FEW) == {}
    printed = capsys.readouterr().out
    assert "stopped after" not in printed
    command = re.search(r"trained; scoring was interrupted. Do it with: python train.py (.*)", printed)[1]
    assert set(train.main(command.split())) == {"trained"} and (tmp_path / "results.json").exists()


@pytest.mark.parametrize("variables, message", [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is set, but not RANK; start with torchrun"),
    ({"RANK": "0"}, "WORLD_SIZE expected, but not set"),
    ({"WORLD_SIZE": "1"}, None)])
def test_variables_of_a_launcher_without_one(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext(), evaluate.start("cpu"):
        assert evaluate.rank_and_world() == (0, 1)


def test_a_process_without_local_rank_takes_the_first_gpu(monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="cannot use --device cuda:0"), evaluate.start("cuda"):
        pass


def test_a_script_without_a_main_guard_is_named_at_the_start(script, tmp_path):
    call = f"train.main({[*SMALL, *FEW, '--iterations', '1', '--workers', '1', '--out', str(tmp_path / 'run')]})\n"
    path = tmp_path / "start.py"
    path.write_text(f"import train\n{call}")
    process = script(path)
    _, error = process.communicate()
    assert process.returncode == 2 and error.startswith(f"train.py: line 2 of {path} starts processes")
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    path.write_text(f'import train\nif 3 > 2 and __name__ == "__main__":\n    {call}')
    process = script(path)
    _, error = process.communicate()
    assert process.returncode == 0, error


def test_the_log_is_cut_back_to_the_checkpoint(signals, tmp_path):
    """After a kill it may have lines of iterations that are done again, and half a line."""
    signals(2, signal.SIGTERM)
    run(tmp_path, *FEW)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps(dict(iteration=4, losses={})) + '\n{"iteration": 5, "los')
    run(tmp_path, *FEW, "--resume")
    assert [line["iteration"] for line in log(tmp_path, "losses")] == [1, 2, 3, 4, 5, 6]
    assert all(line["losses"] for line in log(tmp_path, "losses"))


def test_resuming_needs_no_other_flags(signals, tmp_path, capsys):
    """Not even those that differ from the recipe, or name files."""
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(dict(dataset="synthetic", results={"semseg": {"mIoU": 1}, "depth": {"RMSE": 9}})))
    for name in ("straight", "halves"):
        if name == "halves":
            signals(2, signal.SIGTERM)
        run(tmp_path / name, *FEW, "--lr", 0.003, "--seed", 5, "--baseline", baseline)
    with open(tmp_path / "halves/log.jsonl", "a") as file:
        file.write('{"iteration": 3, "los')    # as a kill may leave it
    capsys.readouterr()
    train.main(["--resume", "--out", str(tmp_path / "halves"), "--device", "cpu"])
    assert "delta_m against --baseline" in capsys.readouterr().out
    assert_same_training(load(tmp_path / "halves/last.pt"), load(tmp_path / "straight/last.pt"))


def test_a_log_makes_no_file_from_elsewhere_run(flats, signals, tmp_path, monkeypatch, capsys):
    """Only one in or below the current folder, or given by hand."""
    signals(1, signal.SIGTERM)
    run(tmp_path / "run", "--dataset", flats, *OWN)
    sys.modules.pop("flats")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    resume = ["--resume", "--out", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        train.main(resume)
    assert "name the data set yourself with --dataset" in capsys.readouterr().err and "flats" not in sys.modules
    train.main([*resume, "--dataset", flats])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/results.json").unlink()
    train.main(resume)
    assert (tmp_path / "run/results.json").exists()


def test_other_images_than_before_cannot_be_resumed(flats, signals, tmp_path, capsys):
    signals(1, signal.SIGTERM)
    run(tmp_path / "run", "--dataset", flats, *OWN, "--iterations", 3)
    path = Path(flats.rpartition(":")[0])
    for old, new, message in (("range(6)", "range(7)", "6 then, 7 now"), ("range(6)", "reversed(range(6))", "order")):
        path.write_text(FLATS.replace(old, new))
        sys.modules.pop("flats")
        assert message in fails(capsys, 2, tmp_path / "run", "--dataset", flats, *OWN, "--iterations", 3, "--resume")


def test_processes_that_list_other_images_are_refused(monkeypatch):
    scenes = Synthetic(3)
    assert evaluate.digest_names(scenes) == [3, 203499351951010]    # as in earlier checkpoints
    monkeypatch.setattr(evaluate, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(evaluate, "add_up", lambda own: 2 * own)
    evaluate.digest_names(scenes)
    monkeypatch.setattr(evaluate, "add_up", lambda own: 2 * own + 1)
    with pytest.raises(ValueError, match="the processes list different images of Synthetic, or another order: 3 here"):
        evaluate.digest_names(scenes)


def test_too_few_open_files_are_lifted_or_refused_before_the_first_iteration(script, tmp_path):
    (tmp_path / "limited.py").write_text("""
import resource, sys
import train
if __name__ == "__main__":
    soft, hard = map(int, sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    train.main(sys.argv[3:])
    print("limits:", *resource.getrlimit(resource.RLIMIT_NOFILE))
""")
    arguments = [*SMALL, *FEW, "--iterations", 1, "--workers", 1, "--out", tmp_path / "run"]
    run = script(tmp_path / "limited.py", 45, 90, *arguments)
    _, error = run.communicate()
    assert run.returncode == 2 and error == ("train.py: expected a limit of at least 96 open files for --workers 1, "
                                             "found 90; raise it (ulimit -n 96) or give fewer --workers\n")
    run = script(tmp_path / "limited.py", 45, 500, *arguments)
    output, error = run.communicate()
    assert run.returncode == 0 and "limits: 96 500\n" in output, error


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    losses, calls = Kind.image_losses, []

    def poisoned(kind, *arguments):
        calls.append(kind.task)
        return losses(kind, *arguments) * (float("nan") if len(calls) == 6 * 4 + 4 else 1)    # normal, in the fifth
    monkeypatch.setattr(Kind, "image_losses", poisoned)
    message = fails(capsys, 1, tmp_path, "--variant", "stm1", "--save-every", 2, "--log-every", 50)
    assert "the loss of normal is nan in iteration 4" in message
    content = load(tmp_path / "last.pt")
    assert content["iteration"] == 4 and all(value.isfinite().all() for value in content["model"].values())


# ------------------------------------------------------------------------------------------- precision, speed, memory

def test_compiled_once(tmp_path, monkeypatch):
    """An evaluation between, which ends with a smaller batch, must not lead to another compilation."""
    compiled = torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    def compile(model, **options):
        assert options == dict(fullgraph=True, dynamic=False)
        return compiled(model, **options, backend=backend)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(evaluate, "EVALUATION_BATCH", 2)
    arguments = [*SWIN, *FEW, "--eval-every", 2]
    run(tmp_path / "compiled", *arguments, "--compile")
    assert len(graphs) == 2    # the scan, which is checked, and the model
    run(tmp_path / "eager", *arguments)
    for a, b in zip(log(tmp_path / "compiled", "losses"), log(tmp_path / "eager", "losses")):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)


def test_activations_are_recomputed_and_change_nothing(tmp_path):
    """The same masks of stochastic depth in both forward passes, so the same weights."""
    run(tmp_path / "kept", *SWIN, *FEW)
    run(tmp_path / "recomputed", *SWIN, *FEW, "--checkpoint-activations")
    assert_same_state(*(load(tmp_path / name / "last.pt")["model"] for name in ("recomputed", "kept")))


def completed(*arguments, device="cpu", data_set=Synthetic):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(arguments)
    train.complete_flags(args, datasets.DATASETS.get(args.dataset, data_set), torch.device(device), 1)
    return args


def test_the_least_values_of_flags():
    least = dict(d_state=1, iterations=1, batch_size=1, accumulate=1, save_every=1, log_every=1, val_images=1,
                 eval_every=0, workers=0, seed=0)
    for name, value in least.items():
        flag = f"--{name.replace('_', '-')}"
        assert getattr(completed(flag, str(value)), name) == value
        with pytest.raises(ValueError, match=f"{flag} of at least {value}, found {value - 1}"):
            completed(flag, str(value - 1))
    assert completed("--weight-decay", "0").weight_decay == 0
    for value in ("-1e-9", "nan", "inf"):
        with pytest.raises(ValueError, match="--weight-decay of at least 0"):
            completed(f"--weight-decay={value}")


def test_loading_processes_share_the_cpus(monkeypatch):
    for cpus, local, expected in ((6, 4, 1), (6, 2, 3), (6, 1, 6), (20, 1, 8), (1, 2, 1)):
        monkeypatch.setattr(train, "usable_cpus", lambda: cpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert completed("--dataset", "nyud").workers == expected
    assert completed("--dataset", "nyud", "--workers", "30").workers == 30


@pytest.mark.parametrize("device, capability, expected", [
    ("cpu", None, "off"), ("cuda", (7, 5), "fp16"), ("cuda", (8, 0), "bf16"), ("cuda", (12, 0), "bf16")])
def test_default_precision(device, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert completed(device=device).amp == expected


def test_float32_is_true_float32():
    """In training and in scores."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with evaluate.start("cpu"):
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_bf16_trains(tmp_path):
    run(tmp_path, *SWIN, *FEW, "--amp", "bf16")
    content = load(tmp_path / "last.pt")
    assert {value.dtype for value in content["model"].values() if value.is_floating_point()} == {torch.float32}
    assert content["scaler"] == {}


# ---------------------------------------------------------------------------------------------------- what is written

def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    """Also where the shell leaves it, as in --out=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    train.main([*SMALL, *FEW, "--iterations", "1", "--out=~/run"])
    assert evaluate.main(["--checkpoint=~/run/last.pt", "--out=~/scores"])
    assert (tmp_path / "scores/results.json").exists()


def test_logs_and_pictures(tmp_path, monkeypatch, capsys):
    results = run(tmp_path, "--variant", "stm1", "--eval-every", 3, "--log-every", 2, "--tasks", "depth", "semseg")
    first = log(tmp_path, "config")[0]
    assert first["config"]["tasks"] == ["depth", "semseg"] and first["config"]["batch_size"] == 4
    assert first["versions"]["torch"] == torch.__version__
    losses = log(tmp_path, "losses")
    assert [line["iteration"] for line in losses] == [2, 4, 6] and list(losses[0]["losses"]) == ["depth", "semseg"]
    assert losses[0]["lr"] == pytest.approx(train.learning_rate(1e-2, 1, 6))
    seconds = losses[1]["time"] - losses[0]["time"]    # with an evaluation
    assert 8 / seconds < losses[1]["images_per_second"] < 8000 / seconds
    scores = log(tmp_path, "selection")
    assert [line["iteration"] for line in scores] == [3, 6] and scores[1]["results"] == results["trained"]
    assert load(tmp_path / "best.pt")["best"] == max(line["selection"] for line in scores)
    assert all(loss > 0 for line in scores for loss in line["validation_losses"].values())
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"000003.png", "000006.png"}
    assert "pip install -e '.[plot]'" in capsys.readouterr().out and not (tmp_path / "curves.png").exists()

    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
    monkeypatch.setattr(figure, "savefig", lambda self, *arguments, save=figure.savefig, **options: (
        drawn.append(self), save(self, *arguments, **options)))
    train.draw_curves(tmp_path, Synthetic(1, tasks=["depth", "semseg"]).labels)
    assert Image.open(tmp_path / "curves.png").size == (1200, 600)
    axes = drawn[0].axes
    assert [a.get_title() for a in axes] == ["depth: losses", "semseg: losses", "lr",
                                             "depth: RMSE m", "semseg: mIoU %", "selection"]
    assert {a.get_xlim() for a in axes} == {axes[2].get_xlim()} and axes[2].get_xlim()[1] > 6
    assert [a.get_ylim()[0] == 0 for a in axes[:3]] == [True, True, False]
    assert all(curve.get_marker() == "." for a in axes for curve in a.lines)    # so one point is seen, too
    curves = [[(curve.get_label(), [*zip(*curve.get_data())]) for curve in a.lines] for a in axes]
    assert curves[0] == [
        ("losses", [(line["iteration"], line["losses"]["depth"]) for line in losses]),
        ("validation_losses", [(line["iteration"], line["validation_losses"]["depth"]) for line in scores])]
    assert curves[3] == [("results", [(line["iteration"], line["results"]["depth"]["RMSE"]) for line in scores])]
    assert curves[2] == [("lr", [(line["iteration"], line["lr"]) for line in losses])]
    assert curves[5] == [("selection", [(line["iteration"], line["selection"]) for line in scores])]


@pytest.mark.parametrize("dataset, size", [("rooms.py:Rooms", (96, 128)), ("nyud", (448, 576))])
def test_the_small_recipe_fits_any_data_set(dataset, size):
    class Own(datasets.LabelledDataset):
        SIZE = (96, 128)
        RECIPE = dict(lr=1e-3, iterations=77)
    flags = ["--dataset", dataset, "--variant", "mtmamba++", "--d-state", "4"]
    args = completed(*flags, "--recipe", "small", data_set=Own)
    assert (args.encoder, args.lr, args.pretrained, args.loss, args.d_state) == ("convnext_atto", 1e-2, False, "log", 4)
    assert args.img_size == size
    if dataset != "nyud":
        args = completed(*flags, "--lr", "0.5", data_set=Own)
        assert (args.lr, args.iterations, args.img_size) == (0.5, 77, size) and "swin_large" in args.encoder
        Own.RECIPE = dict(recipe="small", iterations=5)
        args = completed(*flags, data_set=Own)
        assert (args.encoder, args.iterations, args.lr) == ("convnext_atto", 5, 1e-2)
        Own.RECIPE = dict(pose=3)
        with pytest.raises(ValueError, match="in Own.RECIPE, found {'pose'}"):
            completed(*flags, data_set=Own)


# The published runs, as the papers and their configurations have them; other variants on Cityscapes as these.
PUBLISHED = {("nyud", "mtmamba"): (50_000, 1e-4, 1e-5, "log", (448, 576)),
             ("pascal", "mtmamba"): (50_000, 1e-4, 1e-5, "log", (512, 512)),
             ("nyud", "mtmamba++"): (40_000, 2e-5, 1e-6, "weighted", (448, 576)),
             ("pascal", "mtmamba++"): (40_000, 8e-5, 1e-6, "log", (512, 512)),
             ("cityscapes", "mtmamba"): (40_000, 1e-4, 1e-6, "log", (512, 1024)),
             ("cityscapes", "mtmamba++"): (40_000, 1e-4, 1e-6, "log", (512, 1024))}


@pytest.mark.parametrize("dataset, variant", PUBLISHED)
def test_recipes_are_those_of_the_published_runs(dataset, variant):
    args = completed("--dataset", dataset, "--variant", variant)
    assert (args.iterations, args.lr, args.weight_decay, args.loss, args.img_size) == PUBLISHED[dataset, variant]
    assert args.encoder == "swin_large_patch4_window12_384" and args.encoder_kwargs is None
    assert (args.pretrained, args.d_state, args.batch_size, args.seed) == (True, 16, 8, 0)


def test_the_main_job_is_the_one_in_the_readme(tmp_path):
    """350 iterations of 8 images of 64x96, MTMamba with 3.01 million parameters, most of them by its encoder's widths
    and depths; and the optimiser of all recipes."""
    args = completed()
    assert (args.iterations, args.batch_size, args.img_size) == (350, 8, (64, 96))
    assert (args.lr, args.weight_decay, args.loss, args.d_state, args.pretrained) == (1e-2, 1e-5, "log", 1, False)
    assert (args.save_every, args.log_every, args.eval_every, args.workers) == (100, 10, 0, 0)
    args.out = tmp_path
    with contextlib.ExitStack() as held:
        run = train.Run(args, torch.device("cpu"), held)
    assert [len(m.blocks) for m in run.model.encoder.modules() if hasattr(m, "blocks")] == [1, 1, 3, 2]
    assert sum(p.numel() for p in run.model.parameters()) == pytest.approx(3.01e6, abs=5e3)
    assert not any(getattr(module, "drop_prob", 0) for module in run.model.encoder.modules())
    group, = run.optimizer.param_groups
    assert type(run.optimizer) is torch.optim.AdamW and len(group["params"]) == len(list(run.model.parameters()))
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.9, 0.999), 1e-8, 1e-5, 1e-2)


def test_shared_memory_is_reckoned_for_the_images_that_a_process_computes_at_a_time(tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(datasets, "fit_workers", lambda workers, data, images: parts.append((workers, images)) or 0)
    run(tmp_path, *FEW, "--batch-size", 12, "--accumulate", 3, "--iterations", 1, "--workers", 2)
    assert (2, 4) in parts


def test_encoder_weights_by_hand(tmp_path):
    flags = ["--encoder", "swin-tiny", "--pretrained"]
    weights = timm.create_model("swin_tiny_patch4_window7_224", **TINY_SWIN).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    kwargs = TINY_SWIN | {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    run(tmp_path / "run", *flags, *FEW, "--encoder-kwargs", json.dumps(kwargs), "--iterations", 1, "--lr", 1e-12)
    ours = load(tmp_path / "run/last.pt")["model"]["encoder.backbone.layers_2.blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(ours, weights["layers.2.blocks.1.attn.qkv.weight"], rtol=0, atol=1e-9)


def test_fine_tuning_starts_from_the_weights_alone(tmp_path, monkeypatch):
    run(tmp_path / "first", *FEW)
    started = {}
    step = train.Run.step
    monkeypatch.setattr(train.Run, "step", lambda self, *a: started.setdefault(
        self.iteration, {k: v.clone() for k, v in self.model.state_dict().items()}) and step(self, *a))
    run(tmp_path / "second", *FEW, "--init-from", tmp_path / "first/last.pt", "--seed", 5)
    assert_same_state(started[0], load(tmp_path / "first/last.pt")["model"])


def test_fine_tuning_from_weights_of_other_tasks(tmp_path, capsys):
    """What fits is taken, the rest named; the cross-task blocks only where the tasks and their order are the same."""
    first = tmp_path / "first/last.pt"
    run(tmp_path / "first", "--tasks", "semseg", "depth", "--iterations", 1)
    arguments = ["--tasks", "depth", "semseg", "saliency", "--iterations", 1, "--init-from", first]
    assert "--init-partial" in fails(capsys, 2, tmp_path / "second", *arguments)
    run(tmp_path / "second", *arguments, "--init-partial", "--lr", 1e-12)
    printed = capsys.readouterr().out
    old, new = load(first)["model"], load(tmp_path / "second/last.pt")["model"]
    assert new.pop("_extra_state").numel() > old["_extra_state"].numel()    # it names more tasks
    taken = {key for key in new if key in old and old[key].shape == new[key].shape
             and torch.allclose(new[key], old[key], atol=1e-9)}
    fresh = {key for key in new if ".ctm." in key or "saliency" in key}
    constants = {key for key in fresh if not new[key].is_floating_point() or new[key].unique().numel() == 1}
    assert taken - constants == set(new) - fresh and f"took {len(set(new) - fresh)} tensors of {first}" in printed
    assert "new, not in the file: heads.saliency.expand (3)" in printed
    assert "left in the file: stages.0.ctm (" in printed
    assert "name it with --init-from" in fails(capsys, 2, tmp_path / "third", "--init-partial")


def test_pretrained_weights_first_then_those_that_fit(tmp_path, capsys):
    """Of a checkpoint with another encoder; an encoder with untrained tensors is not frozen."""
    atto = ["--encoder", "convnext_atto", "--encoder-kwargs"]
    dims = dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    torch.manual_seed(5)
    weights = timm.create_model("convnext_atto", **dims).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    kwargs = json.dumps(dims | {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}})
    run(tmp_path / "first", *FEW, *atto, json.dumps(dict(dims=(8, 8, 12, 8), depths=(1, 1, 1, 1))), "--iterations", 1)
    first = tmp_path / "first/last.pt"
    arguments = [*FEW, "--init-from", first, "--init-partial", "--iterations", 1, "--lr", 1e-12]
    run(tmp_path / "second", *arguments, *atto, kwargs, "--pretrained")
    old, new = load(first)["model"], load(tmp_path / "second/last.pt")["model"]
    stem, deep = "stem_0.weight", "stages_2.blocks.0.conv_dw.weight"
    for ours, expected in ((stem, old[f"encoder.backbone.{stem}"]), (deep, weights[deep.replace("_2", ".2")])):
        torch.testing.assert_close(new[f"encoder.backbone.{ours}"], expected, rtol=0, atol=1e-9)
    message = fails(capsys, 2, tmp_path / "third", *arguments, *atto, kwargs, "--freeze-encoder")
    assert "would freeze" in message and "add --pretrained" in message
    run(tmp_path / "third", *FEW, "--init-from", tmp_path / "second/last.pt", "--iterations", 1, *atto, kwargs,
        "--pretrained", "--freeze-encoder")
    assert "--pretrained has no effect" in capsys.readouterr().out


def test_weights_of_tasks_in_another_order_are_refused(tmp_path, capsys):
    run(tmp_path / "first", "--tasks", "semseg", "depth", "--iterations", 1)
    message = fails(capsys, 2, tmp_path / "second", "--tasks", "depth", "semseg", "--init-from",
                    tmp_path / "first/last.pt")
    assert "tasks ['semseg', 'depth'] (here ['depth', 'semseg'])" in message


def test_a_part_of_a_published_checkpoint(data, tmp_path, capsys):
    """Into a model of two of its tasks, one of them with fewer classes."""
    torch.save({"model": published_state(data("published_nyud_tiny.npz"))}, tmp_path / "published.pth")
    torch.manual_seed(1)
    model = MTMamba({"semseg": 13, "depth": 1}, encoder="swin-tiny", encoder_kwargs=TINY_SWIN)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train.load_fitting_weights(model, tmp_path / "published.pth", "swin-large", TINY_SWIN)
    whole, _ = evaluate.load_checkpoint(tmp_path / "published.pth", torch.device("cpu"), encoder_kwargs=TINY_SWIN)
    state, kept = whole.state_dict(), ("heads.semseg.project", ".ctm.", "_extra_state")
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if any(name in key for name in kept) else state[key]), key
    assert "heads.semseg.project (2)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing that fits"):
        other = MTMamba({"saliency": 2}, encoder="convnext_atto", encoder_kwargs=dict(dims=(4,) * 4, depths=(1,) * 4))
        train.load_fitting_weights(other, tmp_path / "published.pth", "swin-large", TINY_SWIN)


class WithoutLabels(Synthetic):
    """Held-out scenes without a label of depth, and with nothing salient."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["depth"].fill_(torch.nan)
        sample["saliency"].zero_()
        return sample


def test_tasks_without_labels_or_with_a_score_of_0_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    few = few_scenes(3).__func__
    monkeypatch.setattr(Synthetic, "open", classmethod(
        lambda cls, split, *arguments, **options: few(cls if split == "train" else WithoutLabels, split, *arguments,
                                                      **options)))
    results = run(tmp_path, "--variant", "stm1", "--tasks", "semseg", "saliency", "depth", "--iterations", 2)
    assert list(results["trained"]) == ["semseg", "saliency"] and results["trained"]["saliency"]["maxF"] == 0
    mean = (math.log(results["trained"]["semseg"]["mIoU"]) + math.log(1e-6)) / 2
    assert load(tmp_path / "best.pt")["best"] == pytest.approx(mean) and "best.pt" in capsys.readouterr().out


def test_the_best_checkpoint_has_the_best_geometric_mean():
    """To first order its logarithm differs as delta_m does, against any baseline."""
    kinds = Labels({"semseg": 3, "albedo": ("values", 2), "boundary": 1}).kinds
    first = {"semseg": {"mIoU": 40.0}, "albedo": {"RMSE": 2.0, "MAE": 1.0}, "boundary": {"odsF": 1.0, "pixelF": 30.0}}
    second = {"semseg": {"mIoU": 40.4}, "albedo": {"RMSE": 1.99, "MAE": 2.0}, "boundary": {"pixelF": 29.97}}
    gain = train.selection_score(second, kinds) - train.selection_score(first, kinds)
    assert gain == pytest.approx((math.log(40.4 / 40) - math.log(1.99 / 2) + math.log(29.97 / 30)) / 3)
    primary = [{task: scores.get("pixelF", next(iter(scores.values()))) for task, scores in results.items()}
               for results in (first, second)]
    assert 100 * gain == pytest.approx(delta_m(primary[1], primary[0], kinds), rel=0.01)


def test_the_mean_of_logged_losses_leaves_out_images_without_a_label(tmp_path, monkeypatch):
    render = Synthetic.__getitem__

    def blank(self, index):
        sample = render(self, index)
        if index % 2:
            sample["semseg"].fill_(datasets.IGNORE)
        sample["depth"].fill_(torch.nan)
        return sample
    monkeypatch.setattr(Synthetic, "__getitem__", blank)
    monkeypatch.setattr(Kind, "image_losses", lambda kind, output, target: torch.where(
        kind.valid(target).flatten(1).any(1), 3 + 0 * output.mean(), 0 * output.mean()))
    run(tmp_path, "--variant", "stm1", "--tasks", "semseg", "depth", "--iterations", 2, "--log-every", 2)
    assert log(tmp_path, "losses")[0]["losses"] == {"semseg": 3.0, "depth": None}


@pytest.mark.parametrize("kind", ["pascal", "nyud"])
def test_a_whole_run_on_files(kind, tmp_path, monkeypatch, capsys, forked_pools):
    """Exported files, training with workers, the table, and evaluate.py with the same figures."""
    root = tmp_path / "data"
    export(kind, root, 4, (96, 120))
    monkeypatch.setattr(datasets.DATASETS[kind], "VAL_SIZE", (96, 128))
    monkeypatch.setitem(datasets.DATASETS[kind].PAPER, ("stm1", "convnext_atto"), {"boundary": 71.5})
    kwargs = json.dumps(dict(dims=(4, 4, 4, 4), depths=(1, 1, 1, 1)))
    results = train.main(["--dataset", kind, "--data-root", str(root), "--encoder", "convnext_atto", "--encoder-kwargs",
                          kwargs, "--no-pretrained", "--variant", "stm1", "--img-size", "64", "64", "--batch-size", "2",
                          "--iterations", "4", "--workers", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    output = capsys.readouterr().out
    assert "odsF" in output and "71.50" in output
    again = evaluate.main(["--checkpoint", str(tmp_path / "run/last.pt"), "--dataset", kind, "--data-root", str(root),
                           "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "again")])
    assert again == results["trained"]
    files = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "again")]
    assert files[0]["results"] == files[1]["results"] and files[0]["delta_m"] == files[1]["delta_m"]


def test_a_damaged_file_ends_the_run_with_its_name(tmp_path, capsys):
    export("pascal", tmp_path / "data", 2, (64, 64))
    name = datasets.PascalContext(tmp_path / "data").names[0]
    (tmp_path / f"data/JPEGImages/{name}.jpg").write_bytes(b"\xff\xd8\xff")
    message = fails(capsys, 2, tmp_path / "run", *SWIN, "--dataset", "pascal", "--data-root", tmp_path / "data",
                    "--workers", 1)
    assert f"JPEGImages/{name}.jpg" in message


OWN = ["--img-size", "64", "64", "--encoder", "convnext_atto", "--encoder-kwargs",
       json.dumps(dict(dims=(12, 12, 12, 12), depths=(1, 1, 1, 1))), "--no-pretrained", "--variant", "stm1",
       "--workers", "0", "--iterations", "2", "--batch-size", "2"]


def test_a_data_set_of_ones_own(tmp_path, monkeypatch):
    """The class in the README, as it stands there."""
    code = re.search(r"```python\n([^`]*class Rooms.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    (tmp_path / "my_rooms.py").write_text(code)    # a module's name is taken once per process
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, shape, kind in (("rgb", (40, 50, 3), np.uint8), ("class", (40, 50), np.uint8),
                                    ("depth", (40, 50), np.uint16)):
            (tmp_path / "rooms" / split / folder).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 12, shape).astype(kind) * (300 if folder == "depth" else 1)
                Image.fromarray(pixels).save(tmp_path / "rooms" / split / folder / f"{i}.png")
    results = train.main(["--dataset", "my_rooms.py:Rooms", *OWN, "--out", "run"])
    assert list(results) == ["trained", "untrained"]
    assert list(results["trained"]) == ["semseg", "depth"]
    assert evaluate.main(["--checkpoint", "run/last.pt", "--dataset", "my_rooms.py:Rooms", "--workers", "0"]) == (
        results["trained"])


FAULTY = """
import numpy as np
from datasets import LabelledDataset
class Plain(LabelledDataset):
    TASKS = {"semseg": 3, "depth": 1}
    def list_names(self):
        return [f"scene {i}" for i in range(20)]
    def read(self, name):
        labels = {"semseg": np.zeros((64, 64), np.uint8), "depth": np.ones((64, 64), np.float32)}
        self.spoil(labels, name)
        return np.zeros((64, 64, 3), np.uint8), labels
    def spoil(self, labels, name):
        if self.split == "train" and name == "scene 18":
            labels["depth"][5, 7] = float("inf")
class TwiceAsLarge(Plain):
    def spoil(self, labels, name):
        labels["semseg"] = np.zeros((128, 128), np.uint8)
class Unvalidated(Plain):
    def list_names(self):
        return super().list_names() if self.split == "train" else []
class FaultyInValidation(Plain):
    def spoil(self, labels, name):
        if self.split == "val" and name == "scene 18":
            labels["depth"][5, 7] = -3
class Unread(LabelledDataset):
    TASKS = {"depth": 1}
    def list_names(self):
        return ["a"]
class Unknown(Plain):
    TASKS = {"pose": 3}
class Derived(dict):
    pass
"""


def test_wrong_labels_of_ones_own_are_named(tmp_path, capsys):
    """At the start, or when they are met: then the run ends."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    for name, expected in (
            ("TwiceAsLarge", "scene 0, semseg: expected"),
            ("Plain", "scene 18, depth: expected"),
            ("FaultyInValidation", "scene 18, depth: expected"),
            ("Unvalidated", "'val'"),
            ("Unread", "Unread"),
            ("Unknown", "'pose'"),
            ("Derived", "LabelledDataset"),
            ("Nothing", "'Nothing'")):
        message = fails(capsys, 2, tmp_path / name, "--dataset", f"{tmp_path / 'faulty.py'}:{name}", *OWN,
                        "--iterations", 10)
        assert expected in message and "--lr" not in message


FLATS = """
import numpy as np
from datasets import LabelledDataset
class Flats(LabelledDataset):
    TASKS = {"semseg": 4, "material": ["semseg", 5], "depth": 1, "height": ("depth", 1), "edge-map": ("boundary", 1)}
    CLASSES = {"material": ("wood", "stone", "glass", "steel", "cloth")}
    BOUNDARY_TOLERANCE = 0.02
    def list_names(self):
        return [f"{self.split} {i}" for i in range(6)]
    def read(self, name):
        rng = np.random.default_rng(sum(name.encode()))
        classes = np.kron(rng.integers(0, 4, (4, 4)), np.ones((16, 16))).astype(np.uint8)
        labels = {"semseg": classes, "material": (classes + 1) % 5, "depth": 1.0 + classes, "height": 3.0 - classes / 2,
                  "edge-map": (classes != np.roll(classes, 1, 1)).astype(np.uint8)}
        if name.endswith(("1", "4")):    # unlabelled
            del labels["material"]
            labels["height"] = labels["edge-map"] = None
        return np.repeat(60 * classes[..., None], 3, 2), labels
"""


@pytest.fixture
def flats(tmp_path):
    """A data set with two tasks of a kind side by side, which some samples lack."""
    (tmp_path / "flats.py").write_text(FLATS)
    return f"{tmp_path / 'flats.py'}:Flats"


def test_tasks_of_other_names_train_and_resume(flats, signals, tmp_path, capsys):
    arguments = ["--dataset", flats, *OWN, "--iterations", 4, "--eval-every", 2, "--loss", "weighted"]
    results = run(tmp_path / "straight", *arguments)["trained"]
    assert {task: list(scores)[0] for task, scores in results.items()} == {
        "semseg": "mIoU", "material": "mIoU", "depth": "RMSE", "height": "RMSE", "edge-map": "odsF"}
    assert "material    mIoU" in capsys.readouterr().out
    assert list(log(tmp_path / "straight", "losses")[0]["losses"]) == list(results)
    signals(2, signal.SIGTERM)
    assert run(tmp_path / "halves", *arguments) == {}
    run(tmp_path / "halves", *arguments, "--resume")
    content = load(tmp_path / "straight/last.pt")
    assert_same_training(load(tmp_path / "halves/last.pt"), content)
    assert content["config"]["tasks"] == {"semseg": 4, "material": 5, "depth": 1, "height": 1, "edge-map": 1}
    assert tuple(content["labels"]["tasks"]["material"]) == ("semseg", 5)
    assert list(content["labels"]["classes"]["material"]) == ["wood", "stone", "glass", "steel", "cloth"]
    # On the data set of the training.
    assert evaluate.main(["--checkpoint", str(tmp_path / "straight/last.pt"), "--workers", "0", "--device",
                          "cpu"]) == results


def test_fine_tuning_to_tasks_of_other_names(flats, tmp_path, capsys):
    arguments = ["--dataset", flats, *OWN, "--iterations", 1]
    run(tmp_path / "first", *arguments, "--tasks", "semseg", "height")
    first = tmp_path / "first/last.pt"
    run(tmp_path / "second", *arguments, "--init-from", first, "--init-partial", "--lr", 1e-12)
    printed = capsys.readouterr().out
    old, new = load(first)["model"], load(tmp_path / "second/last.pt")["model"]
    taken = {key for key in old if key in new and key != "_extra_state"}
    assert any("height" in key for key in taken) and f"took {len(taken)} tensors of {first}" in printed
    for key in taken:
        torch.testing.assert_close(new[key], old[key], rtol=0, atol=1e-9)
    assert "heads.edge-map.expand (" in printed and "heads.material.expand (" in printed
