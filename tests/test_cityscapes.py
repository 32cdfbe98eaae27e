"""Cityscapes: the recorded data, losses and scores of the published implementation, files, training and evaluation."""

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
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
    assert meters["depth"].sums[-1] == recorded["score/valid_depth_pixels"]
