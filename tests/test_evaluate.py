"""evaluate.py: tables, sharing over processes, boundary lists, raw maps, published checkpoints, own pictures, costs."""

import argparse
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from constants import score_constants
from PIL import Image, ImageFont
from test_cost import PAPER
from test_model import published_state
from torch.utils.benchmark import Timer

import datasets
import evaluate
import metrics
import train
from archives import export
from conftest import NYUD_TASKS, TINY_SWIN
from metrics import Meter, boundary_counts, delta_m, ods_f
from mtmamba import MTMamba

ROOT = Path(evaluate.__file__).parent
VOC = metrics.Labels({"semseg": 40}).kinds["semseg"].palette
SIZES = {"0001": (48, 64), "0002": (41, 57), "b": (33, 64), "0004": (47, 33), "0005": (40, 50)}    # odd and uneven
CONFIG = dict(tasks=NYUD_TASKS, img_size=(64, 64), encoder="convnext_atto", variant="stm1", d_state=1,
              encoder_kwargs=dict(dims=(12, 12, 12, 12), depths=(1, 1, 1, 1)))


class SmallNYUDv2(datasets.NYUDv2):
    PAPER = {("stm1", "convnext_atto"): datasets.NYUDv2.PAPER["mtmamba", "swin-large"]}    # as if it had such a row

    def __init__(self, root, split, tasks=None, size=None, seed=0):
        super().__init__(root, split, tasks, (48, 64), seed)


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "nyud", SmallNYUDv2)


@pytest.fixture(scope="session")
def nyud(tmp_path_factory):
    """Random images and labels in NYUDv2's files."""
    root, rng = tmp_path_factory.mktemp("NYUDv2"), np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir()
    (root / "gt_sets/val.txt").write_text("\n".join(SIZES))
    for name, (h, w) in SIZES.items():
        blocks = np.kron(rng.integers(0, 41, (h // 8 + 1, w // 8 + 1)), np.ones((8, 8), int))[:h, :w].astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(root / f"images/{name}.png")
        Image.fromarray(blocks).save(root / f"segmentation/{name}.png")
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(root / f"normals/{name}.png")
        Image.fromarray(np.where(blocks % 5 == 0, 255, 0).astype(np.uint8)).save(root / f"edge/{name}.png")
        np.save(root / f"depth/{name}.npy", rng.uniform(0.5, 9, (h, w)).astype(np.float32))
    return root


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "last.pt"
    model = MTMamba(**CONFIG)
    torch.nn.init.normal_(model.heads["boundary"].project.weight, std=3)    # boundaries at every threshold
    labels = metrics.Labels(NYUD_TASKS).plain()
    content = dict(model=model.state_dict(), config=CONFIG, labels=labels, training={"dataset": "nyud"})
    train.save_checkpoint(path, content)
    return path


def arguments(checkpoint, nyud, out, *more):
    return ["--checkpoint", str(checkpoint), "--data-root", str(nyud), "--out", str(out), "--workers", "0",
            "--save-images", "0", "--device", "cpu", *map(str, more)]


def fails(capsys, *argv):
    """The message of a run that ends with one line and code 2."""
    with pytest.raises(SystemExit) as exit:
        evaluate.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1, error
    return error


def score(model, dataset):
    return evaluate.evaluate(model, evaluate.Evaluation(dataset, torch.device("cpu")))


# --------------------------------------------------------------------------------------------------------- scores

def test_table_and_results_json(checkpoint, nyud, tmp_path, capsys):
    results = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    table = capsys.readouterr().out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["results"] == results and stored["dataset"] == "nyud" and stored["images"] == 5
    ours = {task: next(iter(metrics.values())) for task, metrics in results.items()}
    single = {"semseg": 54.32, "depth": 0.5166, "normal": 19.21, "boundary": 77.30}
    assert stored["delta_m"] == delta_m(ours, single)
    assert f"single-task row of Table 2: {stored['delta_m']:+.2f} % (paper: +2.38 %)" in table
    rows = {tuple(line.split()[:2]): line.split()[2:5] for line in table.splitlines() if line}
    for (task, metric), paper, digits in ((("semseg", "mIoU"), 55.82, 2), (("depth", "RMSE"), 0.5066, 4),
                                          (("normal", "mErr"), 18.63, 2), (("boundary", "odsF"), 78.70, 2)):
        value = results[task][metric]
        assert rows[task, metric] == [f"{v:.{digits}f}" for v in (value, paper)] + [f"{value - paper:+.{digits}f}"]
    for metric in ("abs_rel", "log_rmse"):
        assert [metric, f"{results['depth'][metric]:.4f}"] in [line.split() for line in table.splitlines()]
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.png"))


def test_scores_are_those_of_the_outputs(checkpoint, nyud, tmp_path):
    """Each image alone through the model; boundaries cropped to the image's own size and truncated to 8 bits."""
    results = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    dataset, counts = SmallNYUDv2(nyud, "val", None), 0
    meters = {task: Meter(kind) for task, kind in dataset.kinds.items()}
    for i, (h, w) in enumerate(SIZES.values()):
        sample = dataset[i]
        with torch.no_grad():
            outputs = model(sample["image"][None])
        for task, meter in meters.items():
            meter.update(outputs[task], sample[task][None])
        top, left = (48 - h) // 2, (64 - w) // 2
        probability = outputs["boundary"].sigmoid()[0, 0, top:top + h, left:left + w]
        counts += boundary_counts((probability * 255).to(torch.uint8).numpy(), dataset.boundary_truth(i), 0.011)
    for task, meter in meters.items():
        for metric, value in meter.compute().items():
            assert results[task][metric] == pytest.approx(value, rel=1e-6), metric
    assert results["boundary"]["odsF"] == pytest.approx(100 * ods_f(counts), rel=1e-3)
    assert 0 < results["boundary"]["odsF"] < 100


def test_a_distance_without_a_true_map_is_drawn_from_its_least_to_its_largest():
    labels = metrics.Labels({"height": ("depth", 1)}, units={"height": " cm"})
    values = np.float32([[[30, 40], [50, 70]]])
    picture, legend = labels.kinds["height"].picture(values, np.full((1, 4), np.nan, np.float32))
    assert [text for text, _ in legend] == ["30.00 to 70.00 cm", "unknown"]
    assert len({tuple(colour) for colour in picture.reshape(4, 3).tolist()}) == 4


class Edges(datasets.LabelledDataset):
    TASKS, BOUNDARY_TOLERANCE, unknown = {"boundary": 1}, 0.02, None

    def list_names(self):
        return ["a", "b"]

    def read(self, name):
        label = np.zeros((32, 96), np.uint8)
        label[20, :48] = 1
        if self.unknown == "half":
            label[:, 48:] = 255
        return np.zeros((32, 96, 3), np.uint8), {} if self.unknown == "image" and name == "b" else {"boundary": label}


@pytest.mark.parametrize("unknown", ["half", "image"])
def test_boundaries_count_only_where_there_is_a_label(unknown, monkeypatch):
    """The true boundaries are predicted, others where no label is: in half of each image, or in all of the second."""
    class Model(torch.nn.Module):
        output_scale = 1

        def forward(self, images):
            y = torch.full((2, 1, 32, 96), -9.0)
            y[:, :, 20, :48] = 9
            if unknown == "half":
                y[:, :, ::8, 52:] = 9
            else:
                y[1, :, ::8] = 9
            return {"boundary": y}
    without, scores = Edges("val", (32, 96)), []
    monkeypatch.setattr(Edges, "unknown", unknown)
    for data in (without, Edges("val", (32, 96))):
        monkeypatch.setattr(Edges, "unknown", unknown if data is not without else None)
        scores.append((score(Model(), data)["boundary"], score_constants(data)["boundary"]))
    (all_known, constant), (part_known, constant_known) = scores
    for metric in ("odsF", "oisF"):
        assert all_known[metric] < 80 and part_known[metric] > 98
        assert constant_known[metric] >= constant[metric]


def test_scores_are_in_true_float32(checkpoint, nyud, tmp_path, monkeypatch):
    forward, allowed = MTMamba.forward, []
    monkeypatch.setattr(MTMamba, "forward", lambda model, image: (    # "meta": FLOPs are counted
        image.is_meta or allowed.append(tf32()), forward(model, image))[1])

    def tf32():
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)    # PyTorch's default
    evaluate.main(arguments(checkpoint, nyud, tmp_path))
    assert set(allowed) == {(False, False)}
    assert json.loads((tmp_path / "results.json").read_text())["precision"]["scoring"] == "float32"


def test_no_row_of_another_model_is_printed(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SmallNYUDv2, "PAPER", datasets.NYUDv2.PAPER)    # which have none of this variant and encoder
    results = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    printed = capsys.readouterr().out
    assert "55.82" not in printed and "(paper:" not in printed
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["results"] == results and f"single-task row of Table 2: {stored['delta_m']:+.2f} %\n" in printed


def test_baseline(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    results = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    half = {task: {metric: value / 2 for metric, value in metrics.items()} for task, metrics in results.items()}
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps({"dataset": "nyud", "results": half}))
    evaluate.main(arguments(checkpoint, nyud, tmp_path, "--baseline", path))
    assert "delta_m against --baseline: +0.00 %" in capsys.readouterr().out    # two gains and two losses of 100 %
    parts = [tmp_path / f"{task}.json" for task in half]    # of a network per task
    for task, part in zip(half, parts):
        part.write_text(json.dumps({"dataset": "nyud", "results": {task: half[task]}}))
    evaluate.main(arguments(checkpoint, nyud, tmp_path, "--baseline", *parts))
    assert "delta_m against --baseline: +0.00 %" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "evaluate", None)    # what is wrong shows before hours are spent
    assert "none of ['boundary']" in fails(capsys, *arguments(checkpoint, nyud, tmp_path, "--baseline", *parts[:-1]))
    zero = half | {"semseg": {"mIoU": 0}}
    for content, message in (({"dataset": "pascal", "results": half}, "every task of nyud"),
                             ({"dataset": "nyud", "results": zero}, "above 0"),
                             ({"dataset": "nyud", "results": half | {"boundary": {"pixelF": 1.0}}}, "odsF"),
                             ({}, "not a results.json"), ([], "not a results.json")):
        path.write_text(json.dumps(content))
        assert message in fails(capsys, *arguments(checkpoint, nyud, tmp_path, "--baseline", path))
    assert "nowhere.json" in fails(capsys, *arguments(checkpoint, nyud, tmp_path, "--baseline", "nowhere.json"))
    path.write_text(json.dumps({"dataset": "nyud", "results": half | {"boundary": {"pixelF": 1.0}}}))
    without = argparse.Namespace(BOUNDARY_TOLERANCE=None, kinds=metrics.Labels(NYUD_TASKS).kinds)    # of odsF
    assert evaluate.read_baseline([path], "nyud", without, tmp_path)["boundary"] == 1.0
    assert "File exists" in fails(capsys, *arguments(checkpoint, nyud, path))    # --out is a file


def test_classes_are_compared_by_name(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    """Other names or another order are refused; names that one side lacks are told."""
    expected, names = evaluate.main(arguments(checkpoint, nyud, tmp_path)), datasets.NYUDv2.CLASSES["semseg"]
    assert "semseg: only the data set names its classes" in capsys.readouterr().out
    stored, checkpoint = torch.load(checkpoint), tmp_path / "named.pt"
    torch.save(stored | {"labels": datasets.NYUDv2.describe(NYUD_TASKS).plain()}, checkpoint)
    assert evaluate.main(arguments(checkpoint, nyud, tmp_path)) == expected
    assert "names its classes" not in capsys.readouterr().out
    monkeypatch.setattr(SmallNYUDv2, "CLASSES", {"semseg": (*names[:3], names[4], names[3], *names[5:])})
    message = fails(capsys, *arguments(checkpoint, nyud, tmp_path))
    assert f"class 3 of semseg is {names[3]!r} in {checkpoint} and {names[4]!r} in nyud" in message
    monkeypatch.setattr(SmallNYUDv2, "CLASSES", {})
    unnamed = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    assert unnamed["depth"] == expected["depth"] and unnamed["semseg"]["mIoU"] == expected["semseg"]["mIoU"]
    assert "semseg: only the model names its classes" in capsys.readouterr().out
    monkeypatch.setattr(SmallNYUDv2, "LABEL_SCALE", 2)
    assert "the output_scale 2 of nyud's labels" in fails(capsys, *arguments(checkpoint, nyud, tmp_path))
    monkeypatch.setattr(SmallNYUDv2, "LABEL_SCALE", 1)
    # Tasks that differ in weight, unit and scaling alone are scored alike.
    monkeypatch.setattr(SmallNYUDv2, "TASKS", NYUD_TASKS | {"semseg": ("parsing", 40), "depth": ("disparity", 1)})
    assert evaluate.main(arguments(checkpoint, nyud, tmp_path)) == unnamed
    monkeypatch.setattr(SmallNYUDv2, "TASKS", datasets.NYUDv2.TASKS | {"depth": ("values", 1)})
    assert "another --dataset?" in fails(capsys, *arguments(checkpoint, nyud, tmp_path))


def test_no_file_runs_on_a_checkpoints_word(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    """Of its data set or of its kinds, unless the file is in or below the current folder, or is named by the user."""
    (tmp_path / "theirs.py").write_text(
        "from pathlib import Path\nfrom metrics import Values\nimport test_evaluate\n"
        "Path(__file__).with_name('ran').touch()\nclass Theirs(test_evaluate.SmallNYUDv2):\n    pass\n"
        "class Kind(Values):\n    pass\n")
    named, kind = f"{tmp_path}/theirs.py:Theirs", f"{tmp_path}/theirs.py:Kind"
    stored = torch.load(checkpoint)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    torch.save(stored | {"training": {"dataset": named}}, tmp_path / "set.pt")
    torch.save(stored | {"labels": stored["labels"] | {"tasks": {"depth": [kind, 1]}}}, tmp_path / "kind.pt")
    torch.save(stored | {"training": {"dataset": "../theirs.py:Theirs"}}, tmp_path / "up.pt")
    torch.save(stored | {"training": {"dataset": "/nowhere/theirs.py:Theirs"}}, tmp_path / "gone.pt")
    for path in ("set.pt", "kind.pt", "up.pt", "gone.pt"):
        assert "--dataset" in fails(capsys, *arguments(tmp_path / path, nyud, tmp_path))
    assert not (tmp_path / "ran").exists()
    results = evaluate.main(arguments(tmp_path / "set.pt", nyud, tmp_path, "--dataset", named))
    assert (tmp_path / "ran").exists()
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(arguments(tmp_path / "set.pt", nyud, tmp_path)) == results


def test_images_larger_than_the_data_sets_size(checkpoint, nyud, tmp_path):
    """They are padded to the next multiple of 32, a batch of their own, and count as all others."""
    root = shutil.copytree(nyud, tmp_path / "data")
    h, w = 60, 70
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (h, w, 3), np.uint8)).save(root / "images/0002.png")
    Image.fromarray(np.ones((h, w), np.uint8)).save(root / "segmentation/0002.png")
    Image.fromarray(np.full((h, w, 3), (127, 127, 255), np.uint8)).save(root / "normals/0002.png")
    Image.fromarray(np.eye(h, w, dtype=np.uint8) * 255).save(root / "edge/0002.png")
    np.save(root / "depth/0002.npy", np.ones((h, w), np.float32))
    results = evaluate.main(arguments(checkpoint, root, tmp_path, "--save-predictions", tmp_path / "maps"))
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    dataset = SmallNYUDv2(root, "val", None)
    meters = {task: Meter(kind) for task, kind in dataset.kinds.items()}
    assert [tuple(sample["image"].shape[1:]) for sample in dataset] == [
        (48, 64), (64, 96), (48, 64), (48, 64), (48, 64)]
    for sample in dataset:
        with torch.no_grad():
            outputs = model(sample["image"][None])
        for task, meter in meters.items():
            meter.update(outputs[task], sample[task][None])
    for task, meter in meters.items():
        for metric, value in meter.compute().items():
            assert results[task][metric] == pytest.approx(value, rel=1e-6), metric
    assert np.load(tmp_path / "maps/depth/0002.npy").shape == (h, w)


def test_the_table_is_printed_before_anything_is_written(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    """And a folder that cannot be written to is refused before anything is computed."""
    def full(file):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.os, "fsync", full)
        patch.setattr(evaluate, "evaluate", None)
        with pytest.raises(SystemExit, match="1"):
            evaluate.main(arguments(checkpoint, nyud, tmp_path))
        assert f"cannot write to the folder {tmp_path} (No space left" in capsys.readouterr().err
    monkeypatch.setattr(evaluate.os, "replace", lambda *paths: full(None))
    with pytest.raises(SystemExit):
        evaluate.main(arguments(checkpoint, nyud, tmp_path))
    printed = capsys.readouterr()
    assert "odsF" in printed.out and "No space left" in printed.err and not list(tmp_path.iterdir())


def test_a_task_without_labels_is_left_out(checkpoint, nyud, tmp_path, capsys):
    """Its delta_m is that of the other tasks."""
    root = shutil.copytree(nyud, tmp_path / "data")
    for path in (root / "segmentation").iterdir():
        Image.fromarray(np.zeros_like(Image.open(path))).save(path)
    results = evaluate.main(arguments(checkpoint, root, tmp_path))
    printed = capsys.readouterr().out
    assert list(results) == ["depth", "normal", "boundary"] and "no pixel has a label: semseg" in printed
    figures = {"depth": "RMSE", "normal": "mErr", "boundary": "odsF"}
    expected = delta_m({task: results[task][name] for task, name in figures.items()},
                       {task: datasets.NYUDv2.SINGLE_TASK[task] for task in figures})
    assert f"{expected:+.2f} %\n" in printed and "paper: +2.38" not in printed


def test_boundary_list_restricts_odsf_alone(checkpoint, nyud, tmp_path, capsys):
    everything = evaluate.main(arguments(checkpoint, nyud, tmp_path))
    ids = tmp_path / "ids.txt"
    ids.write_text("0002\nb\n")
    capsys.readouterr()
    listed = evaluate.main(arguments(checkpoint, nyud, tmp_path, "--boundary-list", ids))
    assert "odsF on 2 of them" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["boundary_images"] == 2
    for metric in ("odsF", "oisF", "AP"):
        assert listed["boundary"].pop(metric) != everything["boundary"].pop(metric)
    assert listed == everything
    ids.write_text("\n".join(SIZES))
    assert evaluate.main(arguments(checkpoint, nyud, tmp_path, "--boundary-list", ids))["boundary"]["odsF"] == (
        json.loads((tmp_path / "results.json").read_text())["results"]["boundary"]["odsF"])
    ids.write_text("0002\n0003\n")
    assert "1 others ['0003']" in fails(capsys, *arguments(checkpoint, nyud, tmp_path, "--boundary-list", ids))


DRIVER = """
import sys
import datasets, evaluate
from test_evaluate import SmallNYUDv2
if __name__ == "__main__":
    datasets.DATASETS["nyud"] = SmallNYUDv2
    evaluate.EVALUATION_BATCH = 2
    evaluate.main(sys.argv[1:])
"""


def test_two_processes_give_exactly_the_figures_of_one(script, checkpoint, nyud, tmp_path, monkeypatch, capsys):
    """Batches of 2, 2 and 1 images: three images in the first process, two in the second, one for boundaries."""
    monkeypatch.setattr(evaluate, "EVALUATION_BATCH", 2)
    alone = evaluate.main(arguments(checkpoint, nyud, tmp_path / "one", "--save-predictions", tmp_path / "maps1"))
    table = capsys.readouterr().out
    (tmp_path / "driver.py").write_text(DRIVER)
    run = script(tmp_path / "driver.py", *arguments(checkpoint, nyud, tmp_path / "two", "--save-predictions",
                                                    tmp_path / "maps2", "--workers", "1"), processes=2)
    output, error = run.communicate()
    assert run.returncode == 0, error
    assert json.loads((tmp_path / "two/results.json").read_text())["results"] == alone
    output, table = (re.sub(r"[\d.e+]+ per second", "", text) for text in (output, table))
    # One process prints; Gloo of PyTorch 2.8 says before that what it has connected.
    assert output.replace("two/results", "one/results").endswith(table)
    maps = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*.*")) for d in ("maps1", "maps2")]
    assert maps[0] == maps[1] and len(maps[0]) == 4 * 5


def test_sharing_covers_every_image_once(checkpoint, nyud, monkeypatch):
    """More processes than batches: some have nothing to do."""
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    dataset = SmallNYUDv2(nyud, "val", None)
    monkeypatch.setattr(evaluate, "EVALUATION_BATCH", 4)
    alone, sums = score(model, dataset), []
    monkeypatch.setattr(evaluate, "add_up", lambda tensor: sums[-1].append(tensor.clone()) or tensor)
    monkeypatch.setattr(evaluate, "digest_names", lambda dataset: None)
    monkeypatch.setattr(metrics.Meter, "compute", lambda self: {"pixelF": 0.0})
    for rank in range(3):
        sums.append([])
        monkeypatch.setattr(evaluate, "rank_and_world", lambda: (rank, 3))
        score(model, dataset)
    total = [sum(parts) for parts in zip(*sums)]
    assert sums[2][0].sum() == 0 and total[0].sum() == sum((sample["semseg"] != 255).sum() for sample in dataset)
    counts = next(parts for parts in total if parts.shape == (102, 4))
    assert 100 * ods_f(counts.numpy()[:-1]) == alone["boundary"]["odsF"]


@pytest.mark.parametrize("images, pixels, expected", [(8, 2 ** 20, [5]), (8, 2 * 48 * 64, [2, 2, 1]), (8, 1, [1] * 5),
                                                      (3, 2 ** 20, [3, 2])])
def test_batches_hold_few_images_and_few_pixels(images, pixels, expected, checkpoint, nyud, monkeypatch):
    monkeypatch.setattr(evaluate, "EVALUATION_BATCH", images)
    monkeypatch.setattr(evaluate, "EVALUATION_PIXELS", pixels)
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    found = []
    model.register_forward_pre_hook(lambda module, inputs: found.append(len(inputs[0])))
    score(model, SmallNYUDv2(nyud, "val", None))
    assert found == expected


class Blank(datasets.LabelledDataset):
    TASKS = {"depth": 1}

    def list_names(self):
        return [str(i) for i in range(9 if self.size[0] == 32 else 3)]

    def read(self, name):
        return np.zeros((*self.size, 3), np.uint8), {"depth": np.ones(self.size, np.float32)}


@pytest.mark.parametrize("size, expected", [((32, 32), [8, 1]), ((512, 1024), [2, 1])])
def test_usual_size_of_batches(size, expected):
    found = []

    class Model(torch.nn.Module):
        def forward(self, images):
            found.append(len(images))
            return {"depth": images[:, :1]}
    score(Model(), Blank("val", size))
    assert found == expected


@pytest.mark.parametrize("cpus, on_disk, expected", [(40, True, 16), (3, True, 3), (3, False, 0)])
def test_loading_processes_without_workers(cpus, on_disk, expected, checkpoint, nyud, tmp_path, monkeypatch):
    monkeypatch.setattr(SmallNYUDv2, "SHUFFLED", on_disk)
    monkeypatch.setattr(evaluate, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(evaluate, "Evaluation", lambda dataset, device, workers, scored: (
        pytest.fail("as expected") if workers == expected else None))
    argv = arguments(checkpoint, nyud, tmp_path)
    first = argv.index("--workers")
    del argv[first:first + 2]
    with pytest.raises(pytest.fail.Exception, match="as expected"):
        evaluate.main(argv)


def test_predictions_have_the_images_size_and_are_the_models(checkpoint, nyud, tmp_path):
    for folder, more in (("maps", []), ("more", ["--probabilities", "--label-ids"])):
        evaluate.main(arguments(checkpoint, nyud, tmp_path, "--save-predictions", tmp_path / folder, *more))
    model, _ = evaluate.load_checkpoint(str(checkpoint), torch.device("cpu"))
    dataset = SmallNYUDv2(nyud, "val", None)
    for i, (name, (h, w)) in enumerate(SIZES.items()):
        with torch.no_grad():
            outputs = model(dataset[i]["image"][None])
        top, left = (48 - h) // 2, (64 - w) // 2
        semseg, depth, normal, boundary = (outputs[task][0, :, top:top + h, left:left + w] for task in NYUD_TASKS)
        stored = np.asarray(Image.open(tmp_path / f"maps/semseg/{name}.png"))
        assert stored.shape == (h, w) and (stored == semseg.argmax(0).numpy()).mean() > 0.999
        stored = np.asarray(Image.open(tmp_path / f"maps/boundary/{name}.png")).astype(int)
        assert stored.shape == (h, w) and abs(stored - (255 * boundary[0].sigmoid()).int().numpy()).max() <= 1
        np.testing.assert_allclose(np.load(tmp_path / f"maps/depth/{name}.npy"), depth[0].clamp(min=0), atol=1e-4)
        normal = torch.nn.functional.normalize(normal, dim=0)
        np.testing.assert_allclose(np.load(tmp_path / f"maps/normal/{name}.npy"), normal, atol=1e-3)
        classes, shares, edges = (read(tmp_path / f"more/{file}") for read, file in (
            (Image.open, f"semseg/{name}.png"), (np.load, f"semseg/{name}.npz"), (np.load, f"boundary/{name}.npz")))
        assert (np.asarray(classes) == semseg.argmax(0).numpy() + 1).mean() > 0.999    # IDs as in NYUDv2's files
        np.testing.assert_allclose(shares["probability"], semseg.softmax(0), atol=1e-3)
        np.testing.assert_allclose(edges["probability"], boundary.sigmoid(), atol=1e-3)


class Killed(SmallNYUDv2):
    def read(self, name):
        if name == "b" and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name)


def test_a_loading_process_that_the_system_kills_ends_the_evaluation(checkpoint, nyud, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "nyud", Killed)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*arguments(checkpoint, nyud, tmp_path), "--workers", "1"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 1 and "DataLoader worker" in error and "fewer --workers" in error


def test_contact_sheets(checkpoint, nyud, tmp_path):
    evaluate.main(arguments(checkpoint, nyud, tmp_path, "--save-images", "5"))
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["contact_sheet.png", "contact_sheet_2.png"]
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet_2.png"))
    image = np.asarray(Image.open(nyud / "images/0005.png"))
    # Five columns of 1600 / 5 pixels: 40x50 pixels are enlarged six times. Each picture has a line of text above it.
    line, gap, height = evaluate.LINE, evaluate.GAP, 6 * 40
    assert abs(sheet[line:line + height, :300].astype(int) - image.repeat(6, 0).repeat(6, 1)).max() <= 1
    truth = np.asarray(Image.open(nyud / "segmentation/0005.png")) - np.uint8(1)
    below = line + height + gap + line
    shown = sheet[below:below + height, 320:320 + 300]
    np.testing.assert_array_equal(shown, VOC[truth].repeat(6, 0).repeat(6, 1))
    assert len(sheet) >= below + height + gap + 4 * line    # and a legend of each task
    legend = {colour for _, colour in Image.fromarray(sheet[below + height:]).getcolors(2 ** 24)}
    assert legend >= {tuple(colour) for colour in VOC[np.unique(truth)].tolist()}


@pytest.mark.parametrize("size, columns, shown, rows", [
    ((64, 96), 7, (128, 192), 1), ((448, 576), 5, (243, 312), 1), ((400, 600), 7, (208, 312), 2),
    ((1024, 2048), 3, (252, 504), 1), ((900, 30), 9, (338, 11), 1), ((32, 32), 12, (128, 128), 2)])
def test_sheets_are_as_wide_as_a_screen(size, columns, shown, rows):
    """Of pictures of any size: reduced to 300 pixels at least, else the columns go on below."""
    pictures = [Image.new("RGB", size[::-1], (i, 100, 200)) for i in range(1, columns + 1)]
    sheet = evaluate.draw_sheet([[[("title", picture)] for picture in pictures]], [[("text", ())]])
    assert sheet.size == (1600, rows * (24 + shown[0] + 8) + 24)    # title, picture, gap; legend
    counts = {colour: count for count, colour in sheet.getcolors(2 ** 24)}
    areas = [counts[i, 100, 200] for i in range(1, columns + 1)]
    assert set(areas) == {np.prod(shown)}
    assert areas[0] >= (min(300, max(size)) / max(size)) ** 2 * np.prod(size) * 0.98


def test_the_range_of_a_legend_is_that_of_the_truth(monkeypatch):
    """The classes are those of both."""
    monkeypatch.setattr(evaluate, "draw_sheet", lambda blocks, legends: legends)
    maps = [{"depth": [np.float32([[[0, 10]]]), np.float32([[[1, 2]]])]}]    # predicted and true
    for first, text in ((0, "0.00 to 10.00 m"), (1, "1.00 to 2.00 m")):
        (_, (found, _)), = evaluate.draw_maps([[]], metrics.Labels({"depth": 1}), maps, ("", ""), first)
        assert found == text
    maps = [{"semseg": [np.array([[[2, 0]]]), np.array([[[0, 1]]])]}]
    (_, *lines), = evaluate.draw_maps([[]], metrics.Labels({"semseg": 3}), maps, ("", ""), 1)
    assert [name for name, _ in lines] == ["class 0", "class 1", "class 2"]


def test_places_of_a_legends_squares():
    drawn = np.asarray(evaluate.draw_lines([("ab", (255, 0, 0)), ("cd", (0, 0, 255))], 300))
    second = 16 + 4 + round(ImageFont.load_default(16).getlength("ab")) + 16
    for left, colour in ((0, (255, 0, 0)), (second, (0, 0, 255))):
        rows, columns = np.nonzero((drawn == colour).all(2))
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 18, left + 1, left + 15)    # in an outline


def test_letters_of_other_scripts(monkeypatch):
    """Pillow's own font has no Cyrillic letters: they come from a font of the machine; without one they are boxes."""
    fonts = pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf"
    walls, stands = [("стена", ())], [("стенд", ())]
    evaluate.font_of.cache_clear()
    monkeypatch.setattr(evaluate, "FONTS", [])
    boxes = evaluate.draw_lines(walls, 200)
    assert boxes == evaluate.draw_lines(stands, 200)
    evaluate.font_of.cache_clear()
    monkeypatch.setattr(evaluate, "FONTS", [fonts])
    assert evaluate.draw_lines(walls, 200) != evaluate.draw_lines(stands, 200) != boxes
    assert evaluate.font_of("a wall").getname() == ImageFont.load_default(16).getname()
    evaluate.font_of.cache_clear()


def test_pascal_and_the_other_kinds_of_maps(tmp_path, capsys, monkeypatch):
    """Of the tasks that NYUDv2 does not have, too; the images in the form of the data set's files."""
    export("pascal", tmp_path / "data", 1, size=(48, 64))
    config = CONFIG | {"tasks": datasets.PascalContext.TASKS}
    torch.manual_seed(0)
    labels = metrics.Labels(config["tasks"]).plain()
    content = dict(model=MTMamba(**config).state_dict(), config=config, labels=labels, training={"dataset": "pascal"})
    train.save_checkpoint(tmp_path / "last.pt", content)
    row = datasets.PascalContext.PAPER["mtmamba", "swin-large"]
    monkeypatch.setattr(datasets.PascalContext, "PAPER", {("stm1", "convnext_atto"): row})
    results = evaluate.main(["--checkpoint", str(tmp_path / "last.pt"), "--data-root", str(tmp_path / "data"),
                             "--workers", "0", "--device", "cpu", "--save-predictions", str(tmp_path / "maps")])
    printed = capsys.readouterr().out
    assert list(results) == list(datasets.PascalContext.TASKS) and "no delta_m" in printed
    for task, metric, paper in (("parsing", "mIoU", "72.62"), ("saliency", "maxF", "84.14"),
                                ("boundary", "odsF", "78.80"), ("saliency", "maxF_published", "84.14")):
        row = next(line.split() for line in printed.splitlines() if line[:12].strip() in ("", task)
                   and line[12:].split()[:2] == [metric, f"{results[task][metric]:.2f}"])
        assert paper in row
    saliency = np.asarray(Image.open(next(tmp_path.glob("maps/saliency/*.png"))))
    assert saliency.shape == (48, 64) and len(np.unique(saliency)) > 5
    out = tmp_path / "evaluation_last"    # not among what the training wrote
    assert (out / "contact_sheet.png").exists() and (out / "results.json").exists()


def test_published_checkpoint(data, nyud, tmp_path, tiny_model, capsys):
    state = published_state(data("published_nyud_tiny.npz"))
    path = tmp_path / "published.pth"
    torch.save({"model": state}, path)
    options = ["--encoder-kwargs", json.dumps(TINY_SWIN)]
    results = evaluate.main(arguments(path, nyud, tmp_path, *options))
    assert f"loaded {len(state)}/{len(state)} tensors" in capsys.readouterr().out
    model = tiny_model()
    evaluate.load_published_checkpoint(model, state)
    assert score(model, SmallNYUDv2(str(nyud), "val", None)) == results
    torch.save({key.removeprefix("module."): value for key, value in state.items()}, path)    # as saved without DDP
    assert evaluate.main(arguments(path, nyud, tmp_path, *options)) == results
    message = fails(capsys, *arguments(path, nyud, tmp_path, "--encoder", "swin_tiny_patch4_window7_224"))
    assert "does not fit the model" in message and "--encoder" in message
    assert "expected tasks from" in fails(capsys, *arguments(path, nyud, tmp_path, "--dataset", "pascal", *options))
    wrong = "--encoder-kwargs", '{"depths": 1}'
    assert "refuses its arguments" in fails(capsys, *arguments(path, nyud, tmp_path, *wrong))
    torch.save({"model": {"module.final_project.semseg.weight": torch.zeros(18, 12, 1, 1)}}, path)
    assert "{'semseg': 18}" in fails(capsys, *arguments(path, nyud, tmp_path, *options))
    torch.save({"model": {"module.final_project.sky.weight": torch.zeros(1, 12, 1, 1)}}, path)
    assert "sky" in fails(capsys, *arguments(path, nyud, tmp_path, *options))


def test_published_checkpoint_of_another_data_set(data, tmp_path, capsys):
    """Its own heads tell the tasks, which is enough for pictures."""
    state = published_state(data("published_nyud_tiny.npz"))
    for name in ("weight", "bias"):
        state[f"module.final_project.semseg.{name}"] = state[f"module.final_project.semseg.{name}"][:7]
    torch.save({"model": state}, tmp_path / "published.pth")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    options = ["--checkpoint", str(tmp_path / "published.pth"), "--encoder-kwargs", json.dumps(TINY_SWIN)]
    evaluate.main([*options, "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")])
    assert np.asarray(Image.open(tmp_path / "out/photo_semseg.png")).shape == (40, 50, 3)
    assert "not those of one data set" in fails(capsys, *options)


@pytest.mark.parametrize("argv, message", [
    (["--workers", "-1"], "--workers of at least 0"),
    (["--save-images", "-1"], "--save-images"), (["--encoder-kwargs", "3"], "--encoder-kwargs"),
    (["--dataset", "synthetic"], "need no files"),
    (["--dataset", "kitti"], "kitti"),
    (["--data-root", "nowhere"], "no folder nowhere"),
    (["--device", "tpu9"], "tpu9"),
    (["--boundary-list", "nowhere.txt"], "nowhere.txt"),
    (["--encoder", "swin-tiny"], "leave out --encoder"),
    (["--encoder-kwargs", "[1]"], "--encoder-kwargs"),
    (["--encoder-kwargs", "{"], "--encoder-kwargs"),
    (["--features"], "--features"),
    (["--label-ids"], "--label-ids has no effect here"),
    (["--variant", "stm1"], "--variant"),
])
def test_bad_arguments(argv, message, checkpoint, nyud, tmp_path, capsys):
    assert message in fails(capsys, *arguments(checkpoint, nyud, tmp_path), *argv)


def test_broken_file_of_the_data_set(script, checkpoint, nyud, tmp_path):
    """In a worker: its traceback does not reach the user, and the process ends although the worker ignores signals."""
    broken = tmp_path / "data"
    broken.mkdir()
    for folder in nyud.iterdir():
        (broken / folder.name).symlink_to(folder)
    (broken / "depth").unlink()
    (broken / "depth").mkdir()
    run = script(ROOT / "evaluate.py", *arguments(checkpoint, broken, tmp_path, "--workers", "1"))
    _, error = run.communicate(timeout=100)
    assert run.returncode == 2 and "Traceback" not in error and "0001.npy" in error.splitlines()[-1], error


# -------------------------------------------------------------------------------------------------- own pictures

def draw(checkpoint, out, *paths):
    """(files written, exit code)"""
    code = 0
    try:
        evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--out", str(out), "--image",
                       *map(str, paths)])
    except SystemExit as exit:
        code = exit.code
    return {path.name: np.asarray(Image.open(path)) for path in out.glob("*.png")}, code


@pytest.fixture
def picture():
    x, y = np.meshgrid(np.arange(70), np.arange(45))
    return Image.fromarray(np.stack([x * 3, y * 5, (x * y) % 256], axis=-1).astype(np.uint8))


def test_pictures_are_drawn_at_their_own_size(checkpoint, picture, tmp_path, capsys):
    picture.save(tmp_path / "a.png")
    files, code = draw(checkpoint, tmp_path / "out", tmp_path / "a.png", "--features")
    assert code == 0 and set(files) == {"a_sheet.png"} | {f"a_{t}{k}.png" for t in NYUD_TASKS for k in ("", "_feature")}
    assert all(pixels.shape == (45, 70, 3) for name, pixels in files.items() if name != "a_sheet.png")
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    mean, std = np.float32(datasets.IMAGE_MEAN), np.float32(datasets.IMAGE_STD)
    image = torch.from_numpy((np.asarray(picture) / np.float32(255) - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs, features = model(image), model.decode(image)
    np.testing.assert_array_equal(files["a_semseg.png"], VOC[outputs["semseg"][0].argmax(0)])
    normal = torch.nn.functional.normalize(outputs["normal"][0], dim=0).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(files["a_normal.png"], 255 * (normal + 1) / 2, atol=1.1)
    boundary = 255 * outputs["boundary"][0, 0].sigmoid().numpy()
    np.testing.assert_allclose(files["a_boundary.png"], np.repeat(boundary[..., None], 3, axis=2), atol=1.1)
    assert features["depth"].shape == (1, 16, 24, 12)    # 45 x 70, padded to 64 x 96, at stride 4
    heat = torch.nn.functional.interpolate(features["depth"].norm(dim=-1)[None], scale_factor=4, mode="bilinear")
    heat = heat[0, 0, :45, :70].numpy()
    colours = metrics.colour_map(heat, heat.min(), heat.max())
    np.testing.assert_allclose(files["a_depth_feature.png"], 0.4 * np.asarray(picture) + 0.6 * colours, atol=2)


def test_a_features_picture_stands_below_its_map(picture, monkeypatch):
    sheets = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda *sheet: sheets.append(sheet) or picture)
    maps = {"semseg": torch.zeros(1, 45, 70, dtype=torch.long), "depth": torch.rand(1, 45, 70)}
    labels, heat = metrics.Labels({"semseg": 3, "depth": 1}), {"semseg": torch.rand(45, 70)}
    evaluate.draw_prediction("a", picture, maps, heat, labels)
    ((columns,), legends), = sheets
    titles = [[title.partition(":")[0] for title, _ in column] for column in columns]
    assert titles == [["a"], ["semseg", "feature's norm"], ["depth"]] and len(legends) == 2


def test_legend_names_what_occurs():
    label = np.zeros((1, 4, 4), np.int64)
    label[0, 0, 0] = 39
    labels = datasets.NYUDv2.describe(NYUD_TASKS)
    colours, lines = labels.kinds["semseg"].picture(label, label)
    assert [text for text, _ in lines] == ["wall", "other prop"] and (lines[1][1] == VOC[39]).all()
    assert (colours[0, 0] == VOC[39]).all() and colours.shape == (4, 4, 3)
    _, both = labels.kinds["semseg"].picture(label, np.full_like(label, 255))    # of predictions and truth
    assert [text for text, _ in both] == ["wall", "other prop", "unknown"]
    drawn = np.asarray(evaluate.draw_lines(lines, 70))    # in two lines
    assert drawn.shape[:2] == (2 * evaluate.LINE, 70)
    assert (drawn[evaluate.LINE + 10, 2 * evaluate.GAP + 8] == VOC[39]).all()
    for data_set, task, names in ((datasets.PascalContext, "semseg", {0: "background", 15: "person", 20: "tvmonitor"}),
                                  (datasets.PascalContext, "parsing", {1: "head"}),
                                  (datasets.Cityscapes, "semseg", {0: "road", 18: "bicycle"})):
        found = data_set.describe(data_set.TASKS).kinds[task].names
        assert len(found) == data_set.TASKS[task] and all(found[i] == name for i, name in names.items())
    depth = np.linspace(1, 5, 16).reshape(1, 4, 4)
    _, lines = labels.kinds["depth"].picture(depth, depth)
    (text, bar), = lines
    assert text == "1.00 to 5.00 m" and (bar == metrics.COLOUR_MAP).all()
    drawn = np.asarray(evaluate.draw_lines(lines, 300))[evaluate.LINE // 2, :130].astype(int)
    assert (drawn[[0, 128]] == 128).all()    # its outline
    assert abs(drawn[4] - bar[0]).max() < 10 > abs(drawn[-6] - bar[-1]).max() and len(np.unique(drawn, axis=0)) > 50


def test_classes_without_names_get_no_other_data_sets_names():
    """19 classes, as Cityscapes has, of a user's own."""
    labels = datasets.DenseDataset.describe({"semseg": 19})
    label = np.array([[[0, 18, 255]]])
    _, lines = labels.kinds["semseg"].picture(label, label)
    assert [text for text, _ in lines] == ["class 0", "class 18", "unknown"]


def test_exif_rotation(checkpoint, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6    # to be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    upright = np.asarray(evaluate.read_picture(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(upright, np.rot90(np.asarray(picture), k=-1))
    files, code = draw(checkpoint, tmp_path / "out", tmp_path / "a.png")
    assert code == 0 and files["a_semseg.png"].shape == (70, 45, 3)


def test_larger_pictures_are_reduced_for_the_model_and_their_maps_enlarged(checkpoint, picture, tmp_path):
    """Against the model's own maps of the reduced picture: classes by index arithmetic, depth by their order."""
    large = picture.resize((210, 135))
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    maps, heat, shares = evaluate.predict_picture(model, large, torch.device("cpu"), 70, True)
    small, _ = evaluate.predict_picture(model, large.resize((70, 45), Image.Resampling.BICUBIC), torch.device("cpu"))
    y, x = (np.arange(n) // 3 for n in (135, 210))
    assert (maps["semseg"][0].numpy() == small["semseg"][0].numpy()[y][:, x]).all()
    assert all(values.shape[1:] == (135, 210) for values in maps.values()) and heat["depth"].shape == (135, 210)
    np.testing.assert_allclose(maps["depth"][0, 1::3, 1::3], small["depth"][0], atol=1e-5)    # the centres
    assert (maps["normal"].norm(dim=0) - 1).abs().max() < 1e-5
    shares = shares["semseg"]
    assert shares.shape == (40, 135, 210) and (shares.sum(0) - 1).abs().max() < 1e-5
    assert (shares[:, 1::3, 1::3].argmax(0) == small["semseg"][0]).float().mean() > 0.999
    whole, _ = evaluate.predict_picture(model, large, torch.device("cpu"), max_side=300)
    assert torch.equal(whole["depth"], evaluate.predict_picture(model, large, torch.device("cpu"))[0]["depth"])
    assert (whole["depth"] - maps["depth"]).abs().max() > 1e-4
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    thin, _ = evaluate.predict_picture(model, large.resize((640, 40)), torch.device("cpu"), max_side=64)
    assert thin["semseg"].shape == (1, 40, 640) and seen == [(1, 3, 32, 64)]


def test_a_picture_is_reduced_by_the_output_scale(tiny_model):
    """It is halved for the network, and the maps are as large as it is."""
    model = tiny_model(datasets.Cityscapes.TASKS, output_scale=2, variant="mtmamba++").eval()
    model.labels = datasets.Cityscapes.describe(datasets.Cityscapes.TASKS)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 130, 3), dtype=np.uint8))
    maps, heat = evaluate.predict_picture(model, picture, torch.device("cpu"))
    half = datasets.to_tensor(np.array(picture.resize((65, 38), Image.Resampling.BILINEAR)))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (datasets.IMAGE_MEAN, datasets.IMAGE_STD))
    with torch.no_grad():
        outputs = model(((half - mean) / std)[None])
    assert torch.equal(maps["semseg"], outputs["semseg"].argmax(1)[:, :75, :130])
    assert maps["depth"].shape == (1, 75, 130) and heat["depth"].shape == (75, 130)
    with torch.no_grad():
        norm = model.decode(((half - mean) / std)[None])["depth"].norm(dim=-1)
    enlarged = torch.nn.functional.interpolate(norm[:, None], scale_factor=8, mode="bilinear")[0, 0]
    torch.testing.assert_close(heat["depth"], enlarged[:75, :130])
    whole, _ = evaluate.predict_picture(model, picture, torch.device("cpu"), max_side=65)    # of what the network sees
    assert torch.equal(whole["depth"], maps["depth"])
    thin, _ = evaluate.predict_picture(model, picture.resize((640, 40)), torch.device("cpu"), max_side=64)
    assert thin["depth"].shape == (1, 40, 640)


def test_nothing_is_overwritten_unasked_and_inputs_never(checkpoint, picture, tmp_path, capsys):
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir(), out.mkdir()
    picture.save(own / "a.png")
    picture.save(out / "a_depth.png")
    before = (out / "a_depth.png").read_bytes()
    arguments = ["--checkpoint", checkpoint, "--device", "cpu", "--image", own, "--out"]
    assert "a_depth.png would be overwritten, one of 1; add --overwrite" in fails(capsys, *arguments, out)
    assert [path.name for path in out.iterdir()] == ["a_depth.png"] and (out / "a_depth.png").read_bytes() == before
    for folder in (own, tmp_path / "own/../own"):
        assert f"{folder} is read" in fails(capsys, *arguments, folder, "--overwrite")
    assert f"{own} is read" in fails(capsys, *arguments[:-2], own / "a.png", "--out", own, "--overwrite")
    assert f"{own} is read" in fails(capsys, *arguments, tmp_path / "other", "--save-predictions", own)
    (out / "a_depth.png").rename(out / "mine.png")
    assert "states no LABEL_IDS" in fails(capsys, *arguments, out, "--save-predictions", tmp_path / "r", "--label-ids")
    for more in ((), ("--overwrite", "--probabilities")):
        files, code = draw(checkpoint, out, own, "--save-predictions", tmp_path / "raw", *more)
        assert code == 0 and set(files) == {"mine.png", "a_sheet.png", *(f"a_{task}.png" for task in NYUD_TASKS)}
        assert "a_semseg.png" in fails(capsys, *arguments, out)
        assert "semseg/a.png" in fails(capsys, *arguments, tmp_path / "new", "--save-predictions", tmp_path / "raw")
    assert {path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("a.*")} == {
        "semseg/a.png", "depth/a.npy", "normal/a.npy", "boundary/a.png", "semseg/a.npz", "boundary/a.npz"}
    (tmp_path / "probabilities/semseg").mkdir(parents=True)
    shutil.copy(tmp_path / "raw/semseg/a.npz", tmp_path / "probabilities/semseg")
    assert "semseg/a.npz would be overwritten" in fails(capsys, *arguments, tmp_path / "new", "--save-predictions",
                                                        tmp_path / "probabilities", "--probabilities")
    classes, shares = Image.open(tmp_path / "raw/semseg/a.png"), np.load(tmp_path / "raw/semseg/a.npz")["probability"]
    assert shares.shape == (40, 45, 70) and (np.asarray(classes) == shares.argmax(0)).mean() > 0.99    # of 16 bits


def test_raw_maps_never_replace_labels(checkpoint, nyud, tmp_path, capsys):
    root = shutil.copytree(nyud, tmp_path / "data")
    for folder in (root, tmp_path / "data/../data", root / "maps"):
        for more in ((), ("--overwrite",)):
            assert "lies in the data set's folder" in fails(capsys, *arguments(
                checkpoint, root, tmp_path / "out", "--save-predictions", folder, *more))
    assert "lies in the data set's folder" in fails(capsys, *arguments(checkpoint, root, root / "out"))
    assert not (root / "out").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").touch()
    assert "holds a run of train.py" in fails(capsys, *arguments(checkpoint, root, tmp_path / "run"))
    maps = tmp_path / "maps"
    evaluate.main(arguments(checkpoint, root, tmp_path / "out", "--save-predictions", maps))
    again = arguments(checkpoint, root, tmp_path / "out", "--save-predictions", maps)
    assert "add --overwrite" in fails(capsys, *again)
    assert "is read here; write to another place" in fails(capsys, *arguments(
        checkpoint, root, tmp_path / "out", "--baseline", tmp_path / "out/results.json"))
    assert "is read here" in fails(capsys, "--checkpoint", root / "a.pt2", "--export", root / "images/../a.pt2")
    evaluate.main([*again, "--overwrite"])


def test_pictures_go_beside_the_checkpoint_without_out(checkpoint, picture, tmp_path):
    shutil.copy(checkpoint, tmp_path / "last.pt")
    picture.save(tmp_path / "a.png")
    evaluate.main(["--checkpoint", str(tmp_path / "last.pt"), "--device", "cpu", "--image", str(tmp_path / "a.png")])
    assert (tmp_path / "predictions/a_sheet.png").exists() and len(list(tmp_path.iterdir())) == 3


def test_endings_of_phones_and_scanners(checkpoint, picture, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.jfif", "b.ppm"):
        picture.save(folder / name, {"a.jfif": "JPEG", "b.ppm": "PPM"}[name])
    (folder / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Image.fromarray(np.float32(picture.convert("L"))).save(folder / "d.tif")
    files, code = draw(checkpoint, tmp_path / "out", folder)
    assert code == 1 and {name.split("_")[0] for name in files} == {"a", "b"}
    errors = capsys.readouterr().err
    assert "2 of the pictures skipped" in errors and "c.heic" in errors
    assert any("d.tif" in line and "8 bits per channel" in line for line in errors.splitlines())


def test_what_cannot_be_used_is_named_and_skipped(checkpoint, picture, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    picture.save(folder / "good.JPG", "JPEG")
    (folder / "truncated.png").write_bytes((folder / "good.JPG").read_bytes()[:700])
    (folder / "text.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("not looked at")
    picture.crop((0, 0, 40, 31)).save(folder / "small.png")
    picture.save(tmp_path / "good.png")
    files, code = draw(checkpoint, tmp_path / "out", folder, tmp_path / "missing.png", tmp_path / "good.png")
    captured = capsys.readouterr()
    assert code == 1 and "4 of the pictures skipped" in captured.err and "notes" not in captured.err
    for name in ("truncated.png", "text.jpg", "small.png", "missing.png"):
        assert any(line.startswith("skipped ") and name in line for line in captured.err.splitlines())
    assert "32x32" in captured.err
    assert {name.rsplit("_", 1)[0] for name in files} == {"good", "good_2"} and len(files) == 2 * 5
    assert np.abs(files["good_semseg.png"].astype(int) - files["good_2_semseg.png"]).any()    # lossy and lossless


def test_a_picture_too_large_for_the_memory_is_skipped(checkpoint, picture, tmp_path, capsys, monkeypatch):
    for name in ("large", "good"):
        picture.save(tmp_path / f"{name}.png")
    predict, errors = evaluate.predict_picture, [RuntimeError("DefaultCPUAllocator: can't allocate memory")]
    monkeypatch.setattr(evaluate, "predict_picture", lambda *a: raise_or(errors, predict, *a))
    files, code = draw(checkpoint, tmp_path / "out", tmp_path / "large.png", tmp_path / "good.png")
    assert code == 1 and "large.png: DefaultCPUAllocator" in capsys.readouterr().err
    assert {name.rsplit("_", 1)[0] for name in files} == {"good"}
    for error in (MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory")):
        errors.append(error)
        assert draw(checkpoint, tmp_path / "out", tmp_path / "large.png")[1] == 1
        assert re.search(r"large.png: (MemoryError|CUDA out of memory)", capsys.readouterr().err)
    errors.append(TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        draw(checkpoint, tmp_path / "out", tmp_path / "large.png")


def raise_or(errors, function, *arguments):
    if errors:
        raise errors.pop()
    return function(*arguments)


def test_a_broken_picture_does_not_stop_the_other_process(script, checkpoint, picture, tmp_path):
    """The first process has the broken one and is done at once; the second's pictures are drawn all the same."""
    for i in range(4):
        picture.save(tmp_path / f"{i}.png")
    (tmp_path / "0.png").write_bytes(b"")
    run = script(ROOT / "evaluate.py", "--checkpoint", checkpoint, "--device", "cpu", "--out", tmp_path / "out",
                 "--image", *(tmp_path / f"{i}.png" for i in range(4)), processes=2)
    _, error = run.communicate()
    assert run.returncode == 1 and "1 of the pictures skipped" in error
    assert {path.name for path in (tmp_path / "out").glob("*_sheet.png")} == {f"{i}_sheet.png" for i in (1, 2, 3)}


def test_no_two_pictures_have_a_file_in_common():
    paths = [Path(name) for name in ("x.png", "x_coarse.png", "x.jpg", "X.png", "y.png")]
    stems = evaluate.distinct_stems(paths, ["semseg", "coarse_semseg", "sheet"])
    assert stems == ["x", "x_coarse_2", "x_2", "X_3", "y"]
    assert evaluate.distinct_stems([Path("x" * 246 + ".png")], ["sheet"]) == ["x" * 200]


def test_probabilities_change_no_other_file(checkpoint, picture, tmp_path):
    """Also of a picture that the model sees reduced."""
    picture.resize((210, 135)).save(tmp_path / "a.png")
    for name, more in (("plain", ()), ("soft", ("--probabilities",))):
        folder = tmp_path / name
        draw(checkpoint, folder, tmp_path / "a.png", "--max-side", 64, "--save-predictions", folder, *more)
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*")]
    assert len(files) == 5 + 4
    assert all((tmp_path / "plain" / file).read_bytes() == (tmp_path / "soft" / file).read_bytes() for file in files)
    assert len(list((tmp_path / "soft").rglob("*.npz"))) == 2


def test_odd_names_and_paths(checkpoint, picture, tmp_path, capsys, monkeypatch):
    """Names with a line break, of 250 bytes, that are no text; equal stems; ~, a quoted pattern, a pipe, an address."""
    folder = tmp_path / "home" / "photos"
    folder.mkdir(parents=True)
    names = ["a\nb.png", "x" * 246 + ".png", os.fsdecode(b"caf\xe9.png"), "same.png", "same.bmp"]
    for name in names:
        picture.save(folder / name)
    os.mkfifo(folder / "pipe.png")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files, code = draw(checkpoint, tmp_path / "out", "~/photos")
    assert code == 0 and len(files) == 5 * 5 and {"same_sheet.png", "same_2_sheet.png", "a\nb_sheet.png"} <= set(files)
    assert capsys.readouterr().out.count("pictures:") == 5
    files, code = draw(checkpoint, tmp_path / "more", folder / "same.*", folder / "pipe.png", "https://host/a.png")
    error = capsys.readouterr().err
    assert code == 1 and len(files) == 2 * 5 and "pipe.png is a pipe" in error and "no file https:/host/a.png" in error


def test_pictures_of_a_folder_without_any(checkpoint, tmp_path, capsys):
    assert "no pictures" in fails(capsys, "--checkpoint", checkpoint, "--image", tmp_path, "--device", "cpu")


# ----------------------------------------------------------------------------------------------------------- cost

def test_cost_beside_the_papers(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "VARIANTS", ["stm1"])
    assert evaluate.main(["--cost", "--variant", "all"]) == {}
    assert capsys.readouterr().out.splitlines()[-1].split() == ["stm1", "252.5188", "252.51", "354.1305", "354.13"]
    assert evaluate.PAPER_COST == PAPER | {"swin-single-task": (888.77, 1074.79)}


@pytest.fixture
def short_measurements(monkeypatch):
    """A tenth of a second in place of five."""
    def shorter(timer, min_run_time, measure=Timer.blocked_autorange):
        assert min_run_time == 5
        return measure(timer, min_run_time=0.1)
    monkeypatch.setattr(Timer, "blocked_autorange", shorter)


@pytest.mark.parametrize("more, size", [([], (64, 64)), (["--img-size", "32", "96"], (32, 96))])
def test_cost_of_a_checkpoint(more, size, checkpoint, capsys, short_measurements, monkeypatch):
    """Of its own variant, tasks and size, beside no figure of the paper; measured on this machine."""
    forward, measured = MTMamba.forward, []
    monkeypatch.setattr(MTMamba, "forward", lambda model, images: measured.append(images) or forward(model, images))
    evaluate.main(["--cost", "--checkpoint", str(checkpoint), "--device", "cpu", "--batch-size", "2", *more])
    assert {len(images) for images in measured if images.device.type == "cpu"} == {1, 2}
    _, _, _, row, parts, line = capsys.readouterr().out.splitlines()
    model, _ = evaluate.load_checkpoint(checkpoint, torch.device("cpu"))
    parameters, flops = evaluate.count_cost(model, size)
    assert row.split() == ["stm1", f"{parameters / 1e6:.4f}", f"{flops / 1e9:.4f}"]
    count = {name: sum(p.numel() for key, p in model.named_parameters() if key.split(".")[0] == name) / 1e6
             for name in ("encoder", "stages", "heads")}
    assert parts == (f"encoder {count['encoder']:.4f} (convnext_atto), decoder {count['stages']:.4f}, heads "
                     f"{count['heads']:.4f} (semseg, depth, normal, boundary); images of {size[0]}x{size[1]}")
    ms, slow, speed, memory = map(float, re.search(
        r"one image takes ([\d.]+) ms .*; 90 % within ([\d.]+) ms\); 2 at a time, ([\d.]+) images per second; "
        r"peak memory ([\d.]+) GiB", line).groups())
    assert 0.1 < ms * speed / 1000 < 10 and ms <= slow < 100 * ms
    assert memory == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, rel=0.2)


@pytest.mark.parametrize("platform, expected", [("linux", "1024.00 GiB"), ("darwin", "1.00 GiB")])
def test_units_of_the_peak_memory(platform, expected, monkeypatch):
    """It is counted in kibibytes, on macOS in bytes."""
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda process: argparse.Namespace(ru_maxrss=2 ** 30))
    assert evaluate.peak_memory(torch.device("cpu")) == f"{expected} of the process"


def test_flags_that_cost_does_not_use(checkpoint, capsys):
    for flag in ("--variant=stm1", "--dataset=nyud", "--workers=1"):
        assert f"{flag.split('=')[0]} has no effect" in fails(capsys, "--cost", "--checkpoint", checkpoint, flag)
    assert "--batch-size has no effect" in fails(capsys, "--cost", "--variant", "all", "--batch-size", "2")
    assert "--batch-size of at least 1, found 0" in fails(capsys, "--cost", "--batch-size", "0")
    assert "--max-side of at least 32, found 31" in fails(capsys, "--checkpoint", checkpoint, "--image", "a.png",
                                                          "--max-side", "31")


def test_cost_of_a_data_sets_tasks_and_size(capsys, short_measurements):
    evaluate.main(["--cost", "--dataset", "cityscapes", "--variant", "stm1", "--encoder", "swin-tiny", "--img-size",
                   "32", "64", "--encoder-kwargs", json.dumps(TINY_SWIN), "--device", "cpu"])
    printed = capsys.readouterr().out
    for text in ("(swin-tiny), decoder", "(semseg, depth); images of 32x64", "1 at a time"):
        assert text in printed


def test_cost_of_every_variant_with_another_encoder(capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "VARIANTS", ["stm1", "fusion-specific", "fusion-shared"])    # uncounted elsewhere
    evaluate.main(["--cost", "--variant", "all", "--encoder", "swin-tiny", "--encoder-kwargs", json.dumps(TINY_SWIN)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == list(evaluate.VARIANTS) and all(len(row) == 3 for row in rows)
    assert len({row[1] for row in rows}) == len(rows)
