"""MTMamba++: equality with the published implementation, its parts against plain torch, sizes, training and cost."""

import copy
import operator

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from test_model import published_shapes, published_state
from timm.layers import BatchNormAct2d
from torch._dynamo.backends.common import aot_autograd

import mtmamba
from conftest import NYUD_TASKS, PASCAL_TASKS, TINY_SWIN
from evaluate import count_cost, describe_published, load_checkpoint
from mtmamba import SS2D, BatchNorm, LiteHead, MTMamba, load_published_checkpoint, selective_scan_2d

CITYSCAPES_TASKS = {"semseg": 19, "depth": 1}


@pytest.mark.parametrize("name, variant", [
    pytest.param("published_plus_cityscapes_tiny.npz", "mtmamba++", marks=pytest.mark.paper(
        "SCTM", "LiteHead", "MTMamba.predict", against="published outputs")),
    ("published_cityscapes_tiny.npz", "mtmamba")])
def test_equals_the_published_implementation(data, tmp_path, capsys, compare, name, variant):
    """Every stage, and the outputs at twice the image's size: a grid over all of them, and each pixel of a corner."""
    archive = data(name)
    state = published_state(archive)
    torch.save({"model": state}, tmp_path / "published.pth")
    model, checkpoint = load_checkpoint(tmp_path / "published.pth", torch.device("cpu"), encoder_kwargs=TINY_SWIN)
    config = checkpoint["config"]
    assert f"loaded {len(state)}/{len(state)} tensors" in capsys.readouterr().out
    assert (config["variant"], config["output_scale"], config["tasks"]) == (variant, 2, CITYSCAPES_TASKS)
    stages = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: stages.append(output))
    with torch.no_grad():
        outputs = model(torch.from_numpy(archive["x"]).float())

    def close(ours, key):
        compare(ours, archive[key], rtol=0, atol=1e-4)
    for task, output in outputs.items():
        for i, stage in enumerate(stages):
            close(stage[task].permute(0, 3, 1, 2)[:, :, ::2**i, ::2**i], f"stage/{i}/{task}")
        close(output[:, :, ::4, ::4], f"out/{task}")
        close(output[:, :, -24:, -24:], f"corner/{task}")


@pytest.mark.parametrize("name, tasks, variant, tensors", [
    ("plus_nyud", NYUD_TASKS, "mtmamba++", 951), ("plus_pascal", PASCAL_TASKS, "mtmamba++", 1095),
    ("plus_cityscapes", CITYSCAPES_TASKS, "mtmamba++", 663), ("cityscapes", CITYSCAPES_TASKS, "mtmamba", 673)])
def test_every_published_tensor_has_its_place(request, name, tasks, variant, tensors):
    shapes = published_shapes(request.path.parent / "data" / f"published_keys_{name}.txt")
    config = describe_published(shapes)["config"]
    assert config == dict(tasks=tasks, variant=variant, output_scale=2 if "cityscapes" in name else 1)
    assert list(config["tasks"]) == list(tasks)
    with torch.device("meta"):
        model = MTMamba(**config)
    assert load_published_checkpoint(model, shapes) == len(shapes) == tensors


def test_another_variant_is_named(tiny_model, data):
    state = published_state(data("published_plus_cityscapes_tiny.npz"))
    with pytest.raises(ValueError, match=r"of the variant mtmamba\+\+, does not fit"):
        load_published_checkpoint(tiny_model(CITYSCAPES_TASKS), state)


def test_the_gates_of_sctm_keep_their_sign(tiny_model, data):
    state = published_state(data("published_plus_cityscapes_tiny.npz"))
    model = tiny_model(CITYSCAPES_TASKS, variant="mtmamba++")
    load_published_checkpoint(model, state)
    stacked = state["module.block_ctm.0.0.op.depth.in_proj.weight"]
    ctm = model.stages[0].ctm
    assert torch.equal(stacked, torch.cat([ctm.mfe["depth"].linear.weight, ctm.gate["depth"].weight]))


def test_the_second_map_gives_delta_b_and_c():
    torch.manual_seed(0)
    ss2d = SS2D(8, d_state=3, dt_rank=2)
    x, c = torch.randn(2, 2, 4, 5, 8)
    with torch.no_grad():
        assert torch.equal(ss2d(x, x), ss2d(x))
        low, B, C = torch.einsum("bhwd,kjd->bhwkj", c, ss2d.x_proj_weight).split([2, 3, 3], dim=-1)
        delta = torch.einsum("bhwkr,kdr->bhwkd", low, ss2d.dt_weight)
        expected = selective_scan_2d(x, delta, -ss2d.A_log.exp(), B, C, ss2d.D, ss2d.dt_bias, backend="loop")
        torch.testing.assert_close(ss2d(x, c), expected)


@pytest.mark.paper("LiteHead", against="its layers by hand")
def test_lite_head_by_hand(compare):
    torch.manual_seed(0)
    head = LiteHead(8, 5)
    assert head.conv.weight.shape == (96, 8, 3, 3)
    assert head.conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    z = torch.randn(2, 6, 7, 8)
    with torch.no_grad():
        y = F.conv2d(z.permute(0, 3, 1, 2), head.conv.weight, head.conv.bias, padding=1)
        mean, var = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)

        def rest(y, mean, var):
            y = ((y - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()).relu()
            return F.conv2d(y, head.project.weight[:, :, None, None], head.project.bias).permute(0, 2, 3, 1)
        compare(head(z), rest(y, mean, var), rtol=1e-4, atol=1e-5)
        running = 0.1 * mean, 0.9 + 0.1 * y.var((0, 2, 3))
        torch.testing.assert_close((head.norm.running_mean, head.norm.running_var), running)
        compare(head.eval()(z), rest(y, *running), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["mtmamba", "mtmamba++"])
def test_one_resize_and_then_the_crop(tiny_model, variant):
    """Of outputs whose padded size is four times (lite head) or once (dense head) that of its last layer, times 2."""
    model = tiny_model({"semseg": 5, "depth": 1}, variant=variant, output_scale=2).eval()
    image = torch.randn(1, 3, 40, 70)
    with torch.no_grad():
        outputs, z = model(image), model.decode(image)
        for task, output in outputs.items():
            y = model.heads[task](z[task]).permute(0, 3, 1, 2)
            y = F.interpolate(y, (128, 192), mode="bilinear", align_corners=False)
            assert output.shape == (1, model.tasks[task], 80, 140)
            torch.testing.assert_close(output, y[:, :, :80, :140])


@pytest.mark.parametrize("variant", ["mtmamba", "mtmamba++"])
def test_training_and_its_compilation(tiny_model, variant):
    """Two steps in training mode, without stochastic depth, which draws anew each time."""
    image, target = torch.randn(2, 3, 32, 64), torch.randn(2, 1, 64, 128)
    ends = []
    for compiled in (False, True) if variant == "mtmamba++" else (False,):    # the other is compiled in test_model.py
        model = tiny_model({"depth": 1}, variant=variant, output_scale=2)
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
        for _ in range(2):
            losses.append((run(image)["depth"] - target).square().mean())
            optimizer.zero_grad()
            losses[-1].backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        assert losses[1] < losses[0]
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[-1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_a_resize_is_in_float32(tiny_model):
    model = tiny_model({"depth": 1}, variant="mtmamba++")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.zeros(1, 3, 32, 32))["depth"].dtype == torch.float32
    with torch.no_grad():
        assert model.double()(torch.zeros(1, 3, 32, 32).double())["depth"].dtype == torch.float64


def test_the_heads_width_is_not_the_encoders():
    model = MTMamba({"depth": 1}, (64, 64), "convnext_atto", encoder_kwargs=dict(dims=(8, 16, 24, 40), depths=[1] * 4),
                    variant="mtmamba++", d_state=1)
    assert model.heads["depth"].conv.weight.shape == (96, 8, 3, 3)
    assert model(torch.randn(2, 3, 64, 64))["depth"].shape == (2, 1, 64, 64)


@pytest.mark.parametrize("autocast", [False, True])
def test_batch_norm_in_one_process_is_pytorchs(autocast):
    """Bit for bit. Over two processes: test_run.py."""
    ends = []
    for norm in (BatchNorm(6), torch.nn.BatchNorm2d(6)):
        torch.manual_seed(0)
        x = torch.randn(2, 6, 5, 7, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(x.bfloat16() if autocast else x)
        y.float().square().sum().backward()
        ends.append({"y": y, "gradient": x.grad, "in evaluation": norm.eval()(x), **norm.state_dict()})
    assert list(ends[0]) == list(ends[1])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ends[0].values(), ends[1].values()))


@pytest.fixture
def two_processes(monkeypatch):
    """Two processes that hold the same images."""
    monkeypatch.setattr(mtmamba, "_has_processes", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(2))


@pytest.mark.parametrize("autocast", [False, True])
def test_batch_norm_over_processes_keeps_types_and_precision(autocast, two_processes):
    """With images whose mean is far from 0."""
    x = torch.randn(2, 6, 5, 7) + 1000
    x = x.bfloat16() if autocast else x
    ours, expected = BatchNorm(6), torch.nn.BatchNorm2d(6).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ours(x)
    assert y.dtype == x.dtype
    tolerance = dict(rtol=0, atol=0.05 if autocast else 1e-3)    # of 1000 in float32: 6e-5
    torch.testing.assert_close(y.double(), expected(torch.cat([x, x]).double())[:2], **tolerance)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value.to(ours.state_dict()[key]), rtol=1e-6, atol=0)


class Doubled(torch.nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("build", [
    torch.nn.BatchNorm2d, lambda n: torch.nn.BatchNorm2d(n, affine=False, momentum=None),
    lambda n: torch.nn.BatchNorm2d(n, track_running_stats=False), Doubled,
    lambda n: BatchNormAct2d(n, act_layer="silu")])
def test_any_batch_norm_is_synchronised(build, two_processes):
    """And keeps its names, its activation and its evaluation."""
    ours, expected = torch.nn.Sequential(build(6)), torch.nn.Sequential(build(6)).double()
    names = list(ours.state_dict())
    mtmamba.synchronise_batch_norm(ours)
    ours = copy.deepcopy(ours)
    assert list(ours.state_dict()) == names and isinstance(ours[0], BatchNorm)
    for _ in range(2):
        x = torch.randn(2, 6, 5, 7, requires_grad=True)
        doubles = torch.cat([x, x]).detach().double().requires_grad_()
        y, truth = ours(x), expected(doubles)
        torch.testing.assert_close(y.double(), truth[:2], rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        truth.square().sum().backward()
        torch.testing.assert_close(x.grad.double(), doubles.grad[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.eval()(x).double(), expected.eval()(doubles)[:2], rtol=1e-5, atol=1e-5)


def test_an_encoders_batch_norm_is_synchronised():
    model = MTMamba({"depth": 1}, encoder="mobilenetv3_small_050", variant="stm1", d_state=1)
    norms = [m for m in model.encoder.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 20 and all(isinstance(norm, BatchNorm) for norm in norms)
    plain = timm.create_model("mobilenetv3_small_050", features_only=True)
    assert list(model.encoder.backbone.state_dict()) == list(plain.state_dict())
    image = torch.randn(2, 3, 64, 64)
    plain.load_state_dict(model.encoder.backbone.state_dict())
    with torch.no_grad():
        for ours, expected in zip(model.eval().encoder.backbone(image), plain.eval()(image)):
            assert torch.equal(ours, expected)


def test_the_collectives_of_heads_have_one_order(tiny_model, two_processes, monkeypatch):
    """In the compiled graphs, forward and backward, each takes what the one before has made."""
    monkeypatch.setitem(mtmamba.VARIANTS, "heads alone", dict(depth=0, ctm=None, head="lite"))
    graphs = []

    def keep(graph, inputs):
        summed = torch.ops.mtmamba.sum_over_processes.default
        graphs.append([node for node in graph.graph.nodes if node.target is summed])
        return make_boxed_func(graph.forward)
    encoder = dict(encoder="resnet10t", encoder_kwargs=dict(channels=(12, 12, 12, 12), stem_width=8))
    model = tiny_model({"a": 1, "b": 2, "c": 1}, variant="heads alone", **encoder)
    run = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    sum(output.sum() for output in run(torch.randn(2, 3, 32, 32)).values()).backward()
    norms = sum(isinstance(module, BatchNorm) for module in model.modules())
    assert [len(nodes) for nodes in graphs] == [norms, norms] and norms > 10
    for nodes in graphs:
        for before, node in zip(nodes, nodes[1:]):
            assert node.args[1].target is operator.getitem and node.args[1].args == (before, 1)


@pytest.mark.parametrize("scale", [0, 1.5, -1])
def test_rejects_bad_output_scales(scale):
    with pytest.raises(ValueError, match=f"output_scale to be a whole number from 1 up, found {scale}"):
        MTMamba({"depth": 1}, encoder_kwargs=TINY_SWIN, output_scale=scale)


# Millions of parameters and 1e9 FLOPs with Swin-Large.
SIZES = {"nyud": (NYUD_TASKS, (448, 576), 1), "pascal": (PASCAL_TASKS, (512, 512), 1),
         "cityscapes": (CITYSCAPES_TASKS, (512, 1024), 2)}


@pytest.mark.parametrize("name, variant, expected", [
    ("nyud", "f-ctm-lite", (306.2987, 510.315)), ("nyud", "s-ctm-dense", (316.7217, 554.394)),
    ("pascal", "mtmamba++", (343.2316, 609.550)), ("cityscapes", "mtmamba", (252.2717, 758.018))])
def test_cost(name, variant, expected):
    tasks, size, scale = SIZES[name]
    with torch.device("meta"):
        model = MTMamba(tasks, variant=variant, output_scale=scale)
    parameters, flops = count_cost(model, size)
    assert (round(parameters / 1e6, 4), round(flops / 1e9, 3)) == expected
