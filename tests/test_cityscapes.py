"""Cityscapes: the recorded data, losses and scores of the published implementation, files, training and evaluation."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import archives
import datasets
import evaluate
import metrics
import train
from datasets import IGNORE, Cityscapes
from metrics import make_meters
from train import task_loss, total_loss

SIZE = (48, 96)    # of the recorded images as the network gets them


@pytest.fixture(scope="module")
def recorded(request):
    return np.load(request.path.parent / "data" / "published_cityscapes_data.npz")


@pytest.fixture
def root(recorded, tmp_path):
    """The recorded files where the archives have them, in the split "val"."""
    for name in recorded["names"]:
        for kind, folder, suffix in (("rgb", "leftImg8bit", "leftImg8bit"), ("labelIds", "gtFine", "gtFine_labelIds"),
                                     ("disparity", "disparity", "disparity")):
            path = tmp_path / folder / "val" / name.split("_")[0] / f"{name}_{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(recorded[f"file/{name}/{kind}"]).save(path)
    return tmp_path


def test_targets_equal_the_published_loaders(recorded, root):
    data = Cityscapes(root, "val", size=SIZE)
    assert [sample["name"] for sample in data] == sorted(recorded["names"])
    for sample in data:
        for key, dtype in (("image", torch.float32), ("semseg", torch.int64), ("depth", torch.float32)):
            expected = recorded[f"target/{sample['name']}/{key}"]
            assert sample[key].dtype == dtype
            np.testing.assert_array_equal(sample[key], expected.reshape(sample[key].shape))
        assert sample["size"] == SIZE and sample["depth"].shape == (1, 96, 192)


def test_losses_and_scores_equal_the_published_ones(recorded, root):
    samples = {sample["name"]: sample for sample in Cityscapes(root, "val", size=SIZE)}
    targets = {task: torch.stack([samples[name][task] for name in recorded["names"]]) for task in Cityscapes.TASKS}
    outputs = {task: torch.from_numpy(recorded[f"pred/{task}"]).float() for task in Cityscapes.TASKS}
    # The recorded losses are of all pixels together: of one tall image.
    one_image = {task: [torch.cat([*maps], dim=1)[None] for maps in (outputs[task], targets[task])] for task in targets}
    losses = {task: task_loss(task, *maps) for task, maps in one_image.items()}
    for task, loss in [*losses.items(), ("total", total_loss(losses))]:
        assert loss.item() == pytest.approx(float(recorded[f"loss/{task}"]), rel=1e-6)
    meters = make_meters(Cityscapes.TASKS, Cityscapes.DEPTH_RANGE)
    for task, meter in meters.items():
        meter.update(outputs[task], targets[task])
    assert meters["semseg"].compute()["mIoU"] == pytest.approx(float(recorded["score/mIoU_published"]), rel=1e-6)
    scores = meters["depth"].compute()
    for ours, theirs in (("RMSE", "rmse"), ("abs_rel", "abs_rel"), ("sq_rel", "sq_rel"), ("log_rmse", "log_rmse")):
        assert scores[ours] == pytest.approx(float(recorded[f"score/{theirs}"]), rel=1e-6)
    assert meters["depth"].sums[0] == recorded["score/valid_depth_pixels"]


def test_invalid_disparity_may_be_masked(root):
    for plain, masked in zip(*(Cityscapes(root, "val", size=SIZE, mask_invalid=mask) for mask in (False, True))):
        assert (plain["depth"] == -1).any() and (plain["depth"] == 0).any()
        np.testing.assert_array_equal(masked["depth"], torch.where(plain["depth"] == -1, torch.nan, plain["depth"]))


def test_a_split_is_what_lies_in_its_folder(root, recorded):
    stem = str(recorded["names"][0])
    added = root / "leftImg8bit/val/zurich/zurich_000002_000019_leftImg8bit.png"
    added.parent.mkdir()
    added.write_bytes((root / f"leftImg8bit/val/{stem.split('_')[0]}/{stem}_leftImg8bit.png").read_bytes())
    (added.parent / "notes.txt").touch()
    data = Cityscapes(root, "val", ["semseg"], SIZE)
    assert data.names == [*sorted(recorded["names"]), "zurich_000002_000019"]
    with pytest.raises(FileNotFoundError, match="zurich_000002_000019_gtFine_labelIds.png"):
        data[2]
    with pytest.raises(ValueError, match="leftImg8bit/train: expected names of images, found none"):
        Cityscapes(root, "train", size=SIZE)


@pytest.mark.parametrize("folder, suffix, damage, message", [
    ("leftImg8bit", "leftImg8bit", lambda image: image.resize((96, 48)),
     r"image of the size \(96, 192\), .* found \(48, 96\); give half"),
    ("gtFine", "gtFine_labelIds", lambda image: image.resize((96, 48)),
     r"labelIds.png: expected the image's size \(96, 192\), found \(48, 96\)"),
    ("gtFine", "gtFine_labelIds", lambda image: image.point(lambda v: v + 100), "values in 0..33, found"),
    ("disparity", "disparity", lambda image: Image.new("L", image.size), "16 bits per pixel, found 8"),
])
def test_other_files_are_refused_by_name(root, recorded, folder, suffix, damage, message):
    stem = sorted(recorded["names"])[0]
    path = root / folder / "val" / stem.split("_")[0] / f"{stem}_{suffix}.png"
    damage(Image.open(path)).save(path)
    with pytest.raises(ValueError, match=message) as error:
        Cityscapes(root, "val", size=SIZE)[0]
    assert str(path) in str(error.value)
    assert Cityscapes(root, "val", size=SIZE)[1]


def test_colours_of_pictures():
    labels = Cityscapes.describe(Cityscapes.TASKS)
    semseg, depth = labels.kinds["semseg"], labels.kinds["depth"]
    assert depth.title == "disparity" and depth.unit == " px"

    label = np.array([[[0, 13, IGNORE]]])
    pixels, legend = semseg.picture(label, label)
    assert pixels.tolist() == [[[128, 64, 128], [0, 0, 142], [224, 224, 192]]]
    assert [line[0] for line in legend] == ["road", "car", "unknown"]
    disparity = np.array([[[-1.0, 0.0, 2.0, np.nan]]])
    pixels, legend = depth.picture(disparity, disparity)
    grey, ends = [224, 224, 192], metrics.COLOUR_MAP[[0, -1]].tolist()
    assert pixels.tolist() == [[grey, *ends, grey]]
    assert [line[0] for line in legend] == ["0.00 to 2.00 px", "unknown"]


ARGUMENTS = ["--dataset", "cityscapes", "--img-size", "32", "64", "--encoder", "convnext_atto", "--encoder-kwargs",
             '{"dims": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}', "--no-pretrained", "--batch-size", "2", "--device",
             "cpu", "--iterations", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "Cityscapes"
    archives.export("cityscapes", root, 4, (64, 128))
    return root


def test_exported_files(exported, capsys):
    files = sorted(str(path.relative_to(exported)) for path in exported.rglob("*.png"))
    assert len(files) == 18 and files[0] == "disparity/train/synthetic/synthetic_000000_000019_disparity.png"
    command = ["check", "--dataset", "cityscapes", "--root", str(exported), "--workers", "1"]
    assert datasets.main([*command, "--img-size", "32", "64"]) == 0
    assert capsys.readouterr().out.startswith("train: 4 images; published: 2975\n")
    scene = datasets.Synthetic(4, (64, 128), seed=0).render(0)
    sample = Cityscapes(exported, "train", size=(32, 64))[0]
    seen = ~np.isnan(scene["depth"])
    np.testing.assert_allclose(sample["depth"][seen], 100 / scene["depth"][seen], atol=1 / 256)
    assert (sample["depth"][~seen] == -1).all() and (sample["semseg"][~seen] == 10).all()    # sky
    assert datasets.main(command) == 1
    assert "an image of the size (1024, 2048), twice that of the network's input, found (64, 128); give half" in (
        capsys.readouterr().out)


def test_train_ids_in_place_of_label_ids_are_named(exported, tmp_path, capsys):
    """With 255 made 0, no single file shows it."""
    root = shutil.copytree(exported, tmp_path / "copy")
    command = ["check", "--dataset", "cityscapes", "--root", str(root), "--workers", "1", "--img-size", "32", "64"]
    for path in sorted((root / "gtFine/val").rglob("*_labelIds.png")):
        ids = datasets.CLASS_BY_ID[np.array(Image.open(path))]
        Image.fromarray(np.where(ids == IGNORE, 0, ids).astype(np.uint8)).save(path)
    assert datasets.main(command) == 1
    printed = capsys.readouterr().out
    assert "gtFine/val: expected label IDs up to 33, found none above 18" in printed and "\n1 problems" in printed


def test_equal_names_of_different_files_are_no_problem(exported, tmp_path, capsys):
    root = shutil.copytree(exported, tmp_path / "copy")
    for folder in ("leftImg8bit", "gtFine", "disparity"):
        shutil.copytree(root / folder / "train", root / folder / "val", dirs_exist_ok=True)
    command = ["check", "--dataset", "cityscapes", "--root", str(root), "--workers", "1", "--img-size", "32", "64"]
    assert datasets.main(command) == 0
    names = Cityscapes(root).names
    assert f"look at the names: {len(names)} occur in train, too, first {names[0]}" in capsys.readouterr().out


def run(exported, out, *arguments):
    return train.main([*ARGUMENTS, "--data-root", str(exported), "--out", str(out), *arguments])["trained"]


def score(exported, checkpoint, *arguments):
    return evaluate.main(["--checkpoint", str(checkpoint), "--data-root", str(exported), "--device", "cpu",
                          "--workers", "0", "--save-images", "1", *arguments])


def test_training_and_evaluation(exported, tmp_path, capsys):
    """From the exported files to scores, pictures and maps."""
    results = run(exported, tmp_path, "--variant", "mtmamba++", "--checkpoint-activations")
    table = capsys.readouterr().out
    assert "\ndisparity   RMSE " in table and "\ndepth" not in table
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    assert saved["config"]["output_scale"] == 2 and saved["training"]["weight_decay"] == 1e-6
    assert saved["model"]["heads.depth.norm.num_batches_tracked"] == 2    # one per iteration

    assert score(exported, tmp_path / "last.pt", "--save-predictions", str(tmp_path / "maps")) == results
    errors = []
    for sample in Cityscapes(exported, "val", size=(32, 64)):
        predicted, disparity = np.load(tmp_path / f"maps/depth/{sample['name']}.npy"), sample["depth"][0].numpy()
        errors.append((predicted - disparity)[(disparity > 0) & (disparity < 80)])
        assert Image.open(tmp_path / f"maps/semseg/{sample['name']}.png").size == (128, 64)
    assert results["depth"]["RMSE"] == pytest.approx(np.sqrt(np.mean(np.concatenate(errors) ** 2)), rel=1e-5)


def test_two_processes(script, exported, tmp_path):
    """mtmamba is the same as in one. Batch norm is of each process here; what is scored is what is saved."""
    (tmp_path / "driver.py").write_text("""
import sys, train
if __name__ == "__main__":
    train.dist.destroy_process_group = lambda: None    # one serves both
    for variant in ("mtmamba", "mtmamba++"):
        train.main([*sys.argv[2:], "--variant", variant, "--out", f"{sys.argv[1]}/{variant}"])
""")
    two = script(tmp_path / "driver.py", tmp_path, *ARGUMENTS, "--data-root", exported, processes=2)
    assert two.wait() == 0, two.communicate()
    run(exported, tmp_path / "one")
    one, two = (torch.load(tmp_path / out / "last.pt", weights_only=True)["model"] for out in ("one", "mtmamba"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)
    scored = json.loads((tmp_path / "mtmamba++/results.json").read_text())["results"]
    assert score(exported, tmp_path / "mtmamba++/last.pt") == scored
