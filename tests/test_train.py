"""The sum of the losses, the schedule, a short training run, and the scripts from end to end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metrics import TASKS, brute_force_loss, pixels, random_case, unknown
from torch.utils.data import default_collate

import evaluate
import train
from datasets import Synthetic
from metrics import TASKS as ROWS
from metrics import Labels
from mtmamba import MTMamba, default_backend

ROOT = Path(train.__file__).parent


def few_scenes(images):
    """Synthetic.open, with so few scenes to validate on."""
    def open(cls, split, size, tasks=None, root=None, seed=0):
        return cls(images, size, 2 * seed if split == "train" else 1, tasks)
    return classmethod(open)


@pytest.mark.parametrize("task, channels", TASKS.items())
def test_an_image_without_valid_pixels_has_loss_0_and_no_gradient(task, channels):
    output, target = (torch.as_tensor(array) for array in random_case(task, channels))
    target[0] = unknown(task)
    output.requires_grad_()
    loss = train.task_loss(task, output, target)
    total = train.total_loss({task: loss})
    total.backward()
    assert loss[0] == 0 and loss[1] > 0 and (output.grad[0] == 0).all() and output.grad[1].abs().sum() > 0
    # It counts in the number of images that the total is divided by.
    assert total.item() == pytest.approx((math.log(1e-8) + loss[1:].log().sum().item()) / len(loss), rel=1e-5)


@pytest.mark.parametrize("value", [0, 1])
def test_saliency_of_one_kind_has_loss_0_and_no_gradient(value):
    output = torch.randn(2, 2, 4, 5, requires_grad=True)
    loss = train.task_loss("saliency", output, torch.full((2, 1, 4, 5), value))
    train.total_loss({"saliency": loss}).backward()
    assert (loss == 0).all() and (output.grad == 0).all()


def test_total_is_the_mean_over_images_of_the_sum_of_logarithms():
    losses = {"a": torch.tensor([0.5, 3.0]), "b": torch.tensor([2.0, 0.0])}
    expected = (math.log(0.5) + math.log(2.0) + math.log(3.0) + math.log(1e-8)) / 2
    assert train.total_loss(losses).item() == pytest.approx(expected, rel=1e-5)


def test_weighted_total_has_the_weights_of_the_rows():
    losses = {task: torch.tensor(float(i)) for i, task in enumerate(ROWS, start=1)}
    assert train.total_loss(losses, "weighted").item() == 1 * 1 + 2 * 2 + 3 * 5 + 4 * 10 + 5 * 50 + 6 * 1 + 7 + 8
    rows = Labels({"material": ("parsing", 5), "semseg": 3}).kinds
    losses = {"semseg": torch.tensor(3.0), "material": torch.tensor(7.0)}
    assert train.total_loss(losses, "weighted", rows).item() == 3 + 2 * 7


@pytest.mark.parametrize("script", [train, evaluate])
@pytest.mark.parametrize("given", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"])
def test_spinning_is_limited_unless_the_user_has_set_it(script, given, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"):
        monkeypatch.setenv(name, "7")
        if name != given:
            monkeypatch.delenv(name)
    exec(Path(script.__file__).read_text().partition("import argparse")[0], {})
    assert os.environ.get("GOMP_SPINCOUNT") == {None: "2000", "GOMP_SPINCOUNT": "7"}.get(given)


def test_another_task_has_no_loss():
    output, target = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 1, 4, 5))
    with pytest.raises(ValueError, match="'pose'"):
        train.task_loss("pose", output, target)


def test_polynomial_decay():
    assert train.learning_rate(1e-4, 0, 50_000) == 1e-4
    assert train.learning_rate(1e-4, 25_000, 50_000) == pytest.approx(1e-4 * 0.5 ** 0.9)
    assert 0 < train.learning_rate(1e-4, 49_999, 50_000) < 1e-8


TINY = ["--iterations", "10", "--batch-size", "2", "--img-size", "32", "64", "--workers", "0"]


def test_ten_steps_lower_every_loss(monkeypatch, tmp_path):
    """On the scenes trained on: an average over 10 fresh pairs of scenes would need many more steps to be sure."""
    monkeypatch.setattr(Synthetic, "open", few_scenes(2))
    two_scenes = default_collate([Synthetic(60, (32, 64))[i] for i in range(2)])
    render = Synthetic.__getitem__
    monkeypatch.setattr(Synthetic, "__getitem__", lambda self, i: render(self, i % 2 if i < len(self) else i))
    losses = []

    def record(model, *arguments, evaluate_once=evaluate.evaluate, **options):
        model.eval()
        with torch.no_grad():
            outputs = model(two_scenes["image"])
        losses.append({t: train.task_loss(t, outputs[t], two_scenes[t]).mean().item() for t in outputs})
        return evaluate_once(model, *arguments, **options)
    monkeypatch.setattr(train, "evaluate", record)
    train.main([*TINY, "--out", str(tmp_path)])
    before, after = losses
    assert set(before) == set(Synthetic.TASKS)
    assert all(after[task] < 0.7 * before[task] for task in before), (before, after)


def test_evaluate_repeats_the_figures_of_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Synthetic, "open", few_scenes(5))
    results = train.main([*TINY, "--iterations", "2", "--variant", "stm1", "--out", str(tmp_path)])
    table = capsys.readouterr().out
    (tmp_path / "contact_sheet.png").unlink()
    assert evaluate.main(["--checkpoint", str(tmp_path / "last.pt")]) == results["trained"]
    backend = f"scan backend: {default_backend(torch.device('cpu'))}"
    assert backend in table and backend in capsys.readouterr().out
    for task, metrics in results["trained"].items():
        row = next(line for line in table.splitlines() if line.startswith(task))
        assert f"{metrics[ROWS[task].primary(ROWS[task], metrics)]:.{ROWS[task].digits}f}" in row
    files = tmp_path / "results.json", tmp_path / "evaluation_last/results.json"
    ours, again = (json.loads(path.read_text()) for path in files)
    assert ours.pop("images_per_second") > 0 and again.pop("images_per_second") > 0
    model, _ = evaluate.load_checkpoint(tmp_path / "last.pt", torch.device("cpu"))
    scenes = default_collate([Synthetic(5, (32, 64), 1)[i] for i in range(5)])
    with torch.inference_mode():
        outputs = model(scenes["image"])
    for task, loss in ours.pop("validation_losses").items():
        arrays = outputs[task].numpy(), scenes[task].numpy()
        assert loss == pytest.approx(np.mean([brute_force_loss(task, o[None], t[None]) for o, t in zip(*arrays)
                                              if pixels(o[None], t[None])]), rel=1e-5)
    again.pop("validation_losses")
    assert ours == again and ours["training"]["lr"] == 1e-2
    for task, classes in (("semseg", Synthetic.CLASSES["semseg"]), ("parsing", Synthetic.CLASSES["parsing"])):
        counts = np.zeros((len(classes), len(classes)), int)
        for o, t in pixels(outputs[task].numpy(), scenes[task].numpy()):
            counts[t[0], o.argmax()] += 1
        assert ours["confusion"][task] == dict(classes=list(classes), pixels=counts.tolist())
    assert [ours[key] for key in ("split", "variant", "seed", "iteration")] == ["val", "stm1", 0, 2]
    assert ours["image_size"] == [32, 64]
    assert ours["parameters"] == sum(p.numel() for p in model.parameters())
    assert ours["precision"] == dict(training="float32", scoring="float32")
    assert ours["versions"]["training"]["torch"] == torch.__version__
    picture = evaluate.Image.open(tmp_path / "evaluation_last/contact_sheet.png")
    assert picture.size[0] > 7 * 64 and len(picture.getcolors(2 ** 24)) > 100
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("main, arguments, message", [
    (train.main, ["--dataset", "kitti"], "kitti"),
    (train.main, ["--variant", "stm9"], "stm9"),
    (train.main, ["--encoder", "swan"], "unknown encoder 'swan'"),
    (train.main, ["--encoder", "levit_128"], "or a plain ViT"),
    (train.main, ["--tasks", "pose"], "pose"),
    (train.main, ["--img-size", "16", "64"], "at least 32"),
    (train.main, ["--batch-size", "0"], "--batch-size"),
    (train.main, ["--lr", "-1"], "--lr"),
    (train.main, ["--device", "tpu9"], "tpu9"),
    (evaluate.main, ["--checkpoint", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (evaluate.main, [], "--checkpoint"),
])
def test_bad_input_ends_with_one_line_and_code_2(main, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1, error


def test_a_script_shows_no_traceback(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "train.py", "--encoder", "swan"], capture_output=True, text=True,
                         cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("train.py: unknown encoder 'swan'")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated"),
    (lambda path: torch.save(torch.zeros(3), path), "expected the entries model, config and labels"),
    (lambda path: torch.save({"state_dict": {}}, path), "found ['state_dict']"),
    (lambda path: edit(path, lambda c: c["config"].update(variant="stm3")), "another architecture"),
    (lambda path: edit(path, lambda c: c["config"].update(colour="blue")), "unexpected keyword argument 'colour'"),
    (lambda path: edit(path, lambda c: c["model"].update(extra=torch.zeros(1))), "another architecture"),
])
def test_checkpoints_of_something_else(damage, message, tmp_path, capsys):
    config = dict(tasks={"depth": 1}, img_size=(32, 32), encoder="convnext_atto", variant="stm1", d_state=1,
                  encoder_kwargs=dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)))
    path = tmp_path / "last.pt"
    labels = Labels(config["tasks"]).plain()
    train.save_checkpoint(path, dict(model=MTMamba(**config).state_dict(), config=config, labels=labels))
    damage(path)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--checkpoint", str(path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("script", ["evaluate.py", "train.py"])
@pytest.mark.parametrize("name", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"])
def test_threads_spin_little_unless_the_user_decides(script, name, monkeypatch):
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY"):
        monkeypatch.setenv(variable, "1")    # so that it is as before at the end
        if variable != name:
            monkeypatch.delenv(variable)
    source = (ROOT / script).read_text()
    exec(source[:source.index("import argparse")], {})
    assert os.environ.get("GOMP_SPINCOUNT") == {None: "2000", "GOMP_SPINCOUNT": "1"}.get(name)


def edit(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
