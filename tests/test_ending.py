"""How the scripts end early, on a full disk and by signals to all their processes: what they say, what they leave."""

import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import train
from archives import export, save_file
from processes import descendants

TINY = ["--encoder", "convnext_atto", "--encoder-kwargs", json.dumps(dict(dims=(4, 4, 4, 4), depths=(1, 1, 1, 1))),
        "--no-pretrained", "--variant", "stm1", "--tasks", "semseg", "boundary", "--img-size", "64", "64",
        "--batch-size", "2", "--iterations", "1", "--device", "cpu", "--no-references"]
FULL = "No space left on device"


@pytest.fixture
def full_disk():
    """full_disk(path): a file that can be opened and not written to."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    def put(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")
    return put


@pytest.fixture
def small_files():
    """A limit on the size of files, by which an operating system cuts them as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def nyud(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "NYUDv2"
    export("nyud", root, 8, (64, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.NYUDv2, "VAL_SIZE", (64, 64))
        yield root


@pytest.fixture(scope="module")
def trained(nyud, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train.main([*TINY, "--dataset", "nyud", "--data-root", str(nyud), "--workers", "0", "--out", str(out)])
    return out / "last.pt"


def ends(capsys, main, *arguments):
    """(exit code, what was printed, the last line of the errors)"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return exit.value.code, printed.out, printed.err.splitlines()[-1]


# -------------------------------------------------------------------------------------------------------- full disk

@pytest.mark.parametrize("name", ["log.jsonl", "last.pt", "best.pt", "pictures/000001.png", "results.json",
                                  "contact_sheet.png"])
def test_training_names_the_file_and_can_be_resumed(name, full_disk, nyud, tmp_path, capsys):
    path = tmp_path / name
    temporary = path if name == "log.jsonl" else path.with_suffix(".tmp")
    full_disk(temporary)
    arguments = [*TINY, "--dataset", "nyud", "--data-root", nyud, "--workers", 0, "--out", tmp_path]
    code, output, error = ends(capsys, train.main, *arguments)
    assert code == 1 and error == (f"train.py: cannot write {path}: {FULL}; earlier checkpoints are unchanged; "
                                   "make room, then continue with --resume")
    assert not list(tmp_path.rglob("*.tmp"))
    assert ("odsF" in output) == (name not in ("log.jsonl", "last.pt"))    # the table, before what may fail
    temporary.unlink(missing_ok=True)
    train.main([*map(str, arguments), "--resume"])
    assert path.exists() and (tmp_path / "results.json").exists()


def test_old_files_stay_where_a_part_of_the_new_ones_fits(small_files, tmp_path):
    train.save_checkpoint(tmp_path / "last.pt", {"iteration": 1})
    train.append(tmp_path / "log", "line\n")
    with pytest.raises(Exception) as raised:    # PyTorch's own
        train.save_checkpoint(tmp_path / "last.pt", {"weights": torch.zeros(10 ** 6)})
    assert any(str(e) == f"[Errno 27] File too large: '{tmp_path}/last.pt'" for e in datasets.causes(raised.value))
    with pytest.raises(OSError, match=rf"{FULL}: '.*log'"):
        train.append(tmp_path / "log", "x" * 200_000)
    assert torch.load(tmp_path / "last.pt") == {"iteration": 1} and (tmp_path / "log").read_text() == "line\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log"]


def test_a_file_that_cannot_be_replaced_is_named(tmp_path):
    with pytest.raises(KeyError), datasets.replacing(tmp_path / "a"):
        raise KeyError
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="Is a directory: '.*/folder'"), datasets.replacing(tmp_path / "folder"):
        pass
    with pytest.raises(OSError, match="No such file or directory: '.*/nowhere/a'"):
        with datasets.replacing(tmp_path / "nowhere/a"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("name", ["results.json", "contact_sheet.png", "maps/semseg/synthetic_val_00001.png"])
def test_evaluation_names_the_file(name, full_disk, nyud, trained, tmp_path, capsys):
    full_disk((tmp_path / name).with_suffix(".tmp"))
    code, output, error = ends(capsys, evaluate.main, "--checkpoint", trained, "--data-root", nyud, "--dataset", "nyud",
                               "--out", tmp_path, "--workers", 0, "--save-predictions", tmp_path / "maps")
    assert code == 1 and error == (f"evaluate.py: cannot write {tmp_path / name}: {FULL}; make room, or name another "
                                   "folder with --out")
    assert not list(tmp_path.rglob("*.tmp")) and ("odsF" in output) == ("maps" not in name)


def test_pictures_and_exports_name_their_file(small_files, trained, tmp_path, capsys, monkeypatch):
    of_a_layer = torch.export.export(torch.nn.Linear(200, 200), (torch.zeros(200),))    # sooner than of a model
    monkeypatch.setattr(torch.export, "export", lambda *arguments: of_a_layer)
    rows = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(rows).resize((512, 384)).save(tmp_path / "photos/a.jpg")
    command = "--checkpoint", trained, "--device", "cpu"
    for arguments, file in ((["--image", tmp_path / "photos", "--out", tmp_path / "out"], r"out/\w+.png"),
                            (["--export", tmp_path / "model.pt2"], r"\w+/model.pt2")):
        code, _, error = ends(capsys, evaluate.main, *command, *arguments)
        assert code == 1 and re.search(f"cannot write {tmp_path}/{file}: File too large; make room", error), error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.jpg", "out", "photos"]


def test_an_archive_names_the_file(full_disk, tmp_path):
    with pytest.raises(OSError, match=f"{FULL}: '.*a.mat'"):
        full_disk(tmp_path / "a.tmp")
        save_file(tmp_path / "a.mat", {"LabelMap": np.zeros((3, 3))})


# ---------------------------------------------------------------------------------------------------------- signals

SLOW = """
import multiprocessing, os, sys, time
import datasets, evaluate, metrics, train
if "SPAWN" in os.environ:    # as without the tests, which fork them
    datasets.get_context = multiprocessing.get_context
evaluate.EVALUATION_BATCH = 1
datasets.NYUDv2.VAL_SIZE = 64, 64
own_area, suppress, check = evaluate.own_area, metrics.suppress_non_maxima, datasets.PascalContext.check
evaluate.own_area = lambda *arguments: time.sleep(1.5) or own_area(*arguments)
metrics.suppress_non_maxima = lambda prediction: time.sleep(1.5) or suppress(prediction)
datasets.PascalContext.check = lambda *arguments: time.sleep(0.2) or check(*arguments)
if __name__ == "__main__":
    {"train": train, "evaluate": evaluate, "datasets": datasets}[sys.argv[1]].main(sys.argv[2:])
"""


@pytest.fixture
def slowly(script, tmp_path):
    """slowly(name, *arguments, processes): a script that has as many processes beside it now, at work."""
    (tmp_path / "slowly.py").write_text(SLOW)

    def start(*command, processes, marker, **environment):
        run = script(tmp_path / "slowly.py", *command, **environment)
        errors = run.files[1]
        while not errors.exists() or marker not in errors.read_text() or len(descendants(run.pid)) < processes:
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        time.sleep(0.5)
        return run, descendants(run.pid)
    return start


def end(run, others, *numbers):
    """Signals to it and all of its processes. Returns (exit code, output, errors) once all have ended."""
    for number in numbers:
        for pid in (run.pid, *others):
            os.kill(pid, number)
    output, error = run.communicate(timeout=60)
    deadline = time.time() + 20
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in others):
        assert time.time() < deadline, "processes are left"
        time.sleep(0.05)
    assert "Traceback" not in error, error
    return run.poll(), output, error.splitlines()[-1]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_signals_to_all_processes_of_a_final_evaluation(slowly, nyud, tmp_path):
    """Those that load and those that match boundaries, here one that has just been started, leave it to the main one
    what the signals mean."""
    run, others = slowly("train", *TINY, "--dataset", "nyud", "--data-root", nyud, "--workers", 1, "--out",
                         tmp_path / "run", processes=2, marker="evaluating", SPAWN="")
    code, output, _ = end(run, others, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    assert code == 0 and "trained; scoring was interrupted. Do it with: python train.py --resume" in output
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"last.pt", "log.jsonl", ".lock"}


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("numbers", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_signals_to_all_processes_end_a_script_in_one_line(numbers, slowly, nyud, trained, tmp_path):
    run, others = slowly("evaluate", "--checkpoint", trained, "--data-root", nyud, "--dataset", "nyud", "--out",
                         tmp_path / "out", "--workers", 1, processes=2, marker="evaluating")
    assert end(run, others, *numbers)[::2] == (130, "evaluate.py: interrupted")
    assert not list((tmp_path / "out").iterdir())

    root = tmp_path / "data"
    export("pascal", root, 60, (40, 48))
    run, others = slowly("datasets", "check", "--dataset", "pascal", "--root", root, "--workers", 2, processes=2,
                         marker="checking")
    assert end(run, others, *numbers)[::2] == (130, "datasets.py: interrupted")


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
def test_no_process_outlives_a_main_one_that_is_killed(slowly, nyud, trained, tmp_path):
    run, others = slowly("evaluate", "--checkpoint", trained, "--data-root", nyud, "--dataset", "nyud", "--out",
                         tmp_path, "--workers", 1, processes=2, marker="evaluating")
    run.kill()
    end(run, others)
    export("pascal", tmp_path / "data", 60, (40, 48))
    run, others = slowly("datasets", "check", "--dataset", "pascal", "--root", tmp_path / "data", "--workers", 2,
                         processes=2, marker="checking")
    run.kill()
    end(run, others)
