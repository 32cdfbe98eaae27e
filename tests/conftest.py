"""What several tests share: a model small enough to run in a fraction of a second."""

import gc
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"    # there is a process of the suite for each core
os.fsync = lambda file: None    # no test is about a loss of power, and a disk may take its time
sys.modules["matplotlib.figure"] = None    # as if it were not installed: curves.png takes each run two seconds
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""    # they would crowd a GPU; with -n 0, the scan's tests run on it

import pytest

# A Swin with widths 12, 24, 48, 96, which every variant's numbers of heads divide.
TINY_SWIN = dict(embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)
NYUD_TASKS = {"semseg": 40, "depth": 1, "normal": 3, "boundary": 1}
PASCAL_TASKS = {"semseg": 21, "parsing": 7, "saliency": 2, "normal": 3, "boundary": 1}
COSTS, SCENES = {}, {}


def pytest_collectstart():
    """In each process that runs tests. The one that hands them out does not wait seconds for PyTorch, so this file
    imports it in functions alone."""
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # Triton's kernels run in its interpreter then, on the CPU. It has to know before they are defined.
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """Python looks for garbage less often, and not among what has been imported. That took tests that compile an eighth
    of their time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    if item.get_closest_marker("paper"):
        assert any(name == "compared" for name, _ in item.user_properties), "marked `paper`, but compares nothing"
    return result


@pytest.fixture(autouse=True)
def fresh_compiler():
    """torch.compile gives up on code that it has compiled for many models, as the tests together do."""
    import torch

    torch.compiler.reset()


@pytest.fixture(autouse=True)
def costs_counted_once(monkeypatch):
    """Every run counts its model's cost, which takes half a second, and most tests train one of the same few models."""
    import evaluate

    def count(model, size):
        key = str(model), str([(name, t.shape) for name, t in model.state_dict().items()]), tuple(size)
        if key not in COSTS:
            COSTS[key] = count_cost(model, size)
        return COSTS[key]
    count_cost = evaluate.count_cost
    monkeypatch.setattr(evaluate, "count_cost", count)


@pytest.fixture(autouse=True)
def scenes_rendered_once(request, monkeypatch):
    """Most runs are trained on the same few scenes. The tests of the renderer render them anew."""
    import datasets

    def keep(self, index):
        key = self.seed, index, *self.size
        if key not in SCENES:
            SCENES[key] = render(self, index)
        return SCENES[key]
    render = datasets.Synthetic.render
    if request.path.stem != "test_synthetic":
        monkeypatch.setattr(datasets.Synthetic, "render", keep)


@pytest.fixture(autouse=True)
def imports(tmp_path, monkeypatch):
    """A process loads one file of a name; here several tests do."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def tiny_model():
    """tiny_model(tasks, **arguments of MTMamba), seeded."""
    import torch

    from mtmamba import MTMamba

    def build(tasks=NYUD_TASKS, **kwargs):
        torch.manual_seed(0)
        return MTMamba(tasks, **{"img_size": (64, 96), "encoder_kwargs": TINY_SWIN, **kwargs})
    return build


@pytest.fixture
def script(tmp_path):
    """script(path, *arguments, processes=1, **environment): a script in a process of its own, with torchrun in more."""
    from processes import Script

    started = []

    def start(*command, processes=1, **environment):
        files = [tmp_path / f"process {len(started)} {name}" for name in ("output", "error")]
        started.append(Script(files, os.environ | environment, processes, list(map(str, command))))
        return started[-1]
    yield start
    for process in started:
        process.kill()


@pytest.fixture
def forked_pools(monkeypatch):
    """The processes that match boundaries need not import anything, except on Windows, which cannot fork."""
    if hasattr(os, "fork"):
        import datasets
        from processes import server
        monkeypatch.setattr(datasets, "get_context", lambda method: server())


@pytest.fixture
def data(request):
    """data(name): an array archive of tests/data."""
    import numpy as np

    return lambda name: np.load(request.path.parent / "data" / name)


@pytest.fixture
def compare(record_property):
    """compare(ours, expected, rtol, atol): asserts that they are close, as torch.testing.assert_close, and notes for
    audit.py the difference that comes nearest to its tolerance, and that tolerance."""
    import torch

    def compare(ours, expected, rtol, atol):
        ours, expected = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (ours, expected))
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)
        difference, tolerance = (ours - expected).abs().flatten(), (atol + rtol * expected.abs()).flatten()
        worst = torch.where(tolerance > 0, difference / tolerance, 0).argmax()
        record_property("compared", (difference[worst].item(), tolerance[worst].item()))
    return compare
