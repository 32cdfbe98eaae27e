"""The model: equality with the published implementation, its variants, encoders, input sizes and errors, weights that
are not its own, and what people change in it."""

import argparse
import copy
import functools
import inspect
import json
import pickle
import re

import pytest
import timm
import torch
from test_export import ATTO, build
from torch._dynamo.testing import CompileCounterWithBackend

from conftest import NYUD_TASKS, PASCAL_TASKS, TINY_SWIN
from evaluate import count_cost
from mtmamba import (
    CTM,
    MFE,
    PUBLISHED_TASKS,
    SCTM,
    SS2D,
    STM,
    VARIANTS,
    DecoderConfig,
    MTMamba,
    PatchExpand,
    load_published_checkpoint,
)

PUBLISHED_NAMES = {ours: published for published, ours in PUBLISHED_TASKS.items()}


def published_state(archive):
    return {key[3:]: torch.from_numpy(archive[key]).float() for key in archive.files if key.startswith("sd/")}


def published_shapes(path):
    """A file of key, shape, type lines -> the state_dict on the meta device."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {key: torch.empty([int(n) for n in re.findall(r"\d+", shape)], device="meta") for key, shape, _ in rows}


@pytest.mark.paper("Eq. 2-29", "Section 3.5", against="published outputs")
def test_equals_the_published_implementation(tiny_model, data, compare):
    archive = data("published_nyud_tiny.npz")
    model = tiny_model().eval()
    state = published_state(archive)
    assert load_published_checkpoint(model, {"model": state}) == len(state)
    x = torch.from_numpy(archive["x"]).float()
    with torch.no_grad():
        features, outputs = model.encoder(x), model(x)
    for i, step in enumerate([4, 2, 1, 1]):
        ours = features[i].permute(0, 3, 1, 2)[:, :, ::step, ::step]
        compare(ours, archive[f"feat/{i}"], rtol=0, atol=1e-4)
    for task, output in outputs.items():
        compare(output[:, :, ::4, ::4], archive[f"out/{PUBLISHED_NAMES.get(task, task)}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, tasks, tensors", [("nyud", NYUD_TASKS, 953), ("pascal", PASCAL_TASKS, 1093)])
def test_every_published_tensor_has_its_place(request, name, tasks, tensors):
    with torch.device("meta"):
        model = MTMamba(tasks)
    shapes = published_shapes(request.path.parent / "data" / f"published_keys_{name}.txt")
    assert load_published_checkpoint(model, shapes) == len(shapes) == tensors


def test_defaults():
    """NYUDv2's size, the paper's encoder, variant and N, labels of the image's size, three channels of colour."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(MTMamba).parameters.items()}
    assert defaults == dict(
        tasks=inspect.Parameter.empty, img_size=(448, 576), encoder="swin_large_patch4_window12_384", pretrained=False,
        encoder_kwargs=None, variant="mtmamba", output_scale=1, d_state=16, backend=None, in_chans=3)


def test_published_checkpoint_from_a_file(tiny_model, data, tmp_path):
    state = published_state(data("published_nyud_tiny.npz"))
    torch.save({"model": state}, tmp_path / "published.pth")
    assert load_published_checkpoint(tiny_model(), tmp_path / "published.pth") == len(state)


def test_published_checkpoint_of_tasks_in_another_order(tiny_model, data):
    """Every shape fits, and the outputs would be wrong."""
    model = tiny_model({task: NYUD_TASKS[task] for task in sorted(NYUD_TASKS)})
    with pytest.raises(ValueError, match="another order"):
        load_published_checkpoint(model, published_state(data("published_nyud_tiny.npz")))


def test_published_checkpoint_that_does_not_fit_changes_nothing(tiny_model, data):
    state = published_state(data("published_nyud_tiny.npz"))
    state["module.extra"] = torch.zeros(1)
    del state["module.final_project.depth.bias"]
    state["module.final_project.semseg.bias"] = torch.zeros(21)
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_published_checkpoint(model, state)
    for line in ("heads.depth.project.bias: expected (1,), found nothing", "extra: expected nothing, found (1,)",
                 "heads.semseg.project.bias: expected (40,), found (21,)"):
        assert line in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_swin_pads_before_the_shift():
    """Moving zeros in from the bottom and right must equal padding the input of the attention oneself."""
    with torch.device("cpu"):
        torch.manual_seed(0)
        model = MTMamba({"depth": 1}, encoder_kwargs=TINY_SWIN)
    block = model.encoder.backbone.layers_2.blocks[1]    # shifted
    assert any(block.shift_size)
    x = torch.randn(1, 6, 7, 48)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2))    # to 8x8, whole windows of 4
    with torch.no_grad():
        torch.testing.assert_close(block._attn(x), block._attn(padded)[:, :6, :7])
        timm_way = type(block)._attn(block, x)
    assert (timm_way - block._attn(x)).abs().max() > 1e-3


def test_copies_use_their_own_weights(tiny_model):
    """Also where a block's method is replaced: by the padding of Swin's, and by checkpointing."""
    model, image = tiny_model({"depth": 1}, variant="stm1").eval(), torch.randn(1, 3, 32, 64)
    model.set_grad_checkpointing()
    for duplicate_of in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        duplicate = duplicate_of(model)
        expected = model(image)["depth"]
        assert torch.equal(duplicate(image)["depth"], expected)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        assert torch.equal(duplicate(image)["depth"], expected) and not torch.equal(model(image)["depth"], expected)
        model(image)["depth"].sum().backward()
        assert all(weight.grad is None for weight in duplicate.parameters())


CONVNEXT = dict(encoder="convnext_atto", encoder_kwargs=dict(dims=(12, 24, 48, 96), depths=(1, 1, 1, 1)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_trains_and_compiles(tiny_model, variant):
    tasks = {"semseg": 5, "depth": 1}
    # Swin takes longest to capture, so it is in one of the variants alone.
    model = tiny_model(tasks, variant=variant, **({} if variant == "mtmamba" else CONVNEXT))
    model.eval()    # without stochastic depth, which draws anew each time
    image = torch.randn(2, 3, 64, 64)
    # Dynamo's own backend runs the captured graph as it is: cheap, and a graph break is an error all the same. All
    # blocks and heads of the other variants are captured here or in test_plus.py.
    captured = variant in ("mtmamba", "swin-multi-task", "gate-wmsa")
    run = torch.compile(model, fullgraph=True, backend="eager") if captured else model
    outputs = run(image)
    for task, expected in model(image).items():
        assert outputs[task].shape == (2, tasks[task], 64, 64)
        torch.testing.assert_close(outputs[task], expected)
    sum(output.square().mean() for output in outputs.values()).backward()
    # Every parameter takes part, or DistributedDataParallel would wait for its gradient.
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("variant, encoder, compiled", [
    ("stm1", CONVNEXT, True), ("mtmamba", {}, False), ("mtmamba++", CONVNEXT, False), ("swin-single-task", {}, False),
    ("stm1", dict(encoder="resnet10t", encoder_kwargs=None), False)])
def test_checkpointing_changes_no_gradient(tiny_model, variant, encoder, compiled):
    tasks = {"depth": 1} if compiled else {"semseg": 5, "depth": 1}
    model = tiny_model(tasks, variant=variant, d_state=2, **encoder).train()
    image, kept, gradients = torch.randn(2, 3, 64, 64), [], []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if variant == "stm1":    # a block of one's own is recomputed, too
        model.stages[1].blocks["depth"][0] = OwnBlock(model.stages[1].blocks["depth"][0])
        state = {key: value.clone() for key, value in model.state_dict().items()}
    for enable in (False, True, False):
        model.set_grad_checkpointing(enable)
        runs = [model, torch.compile(model, fullgraph=True, backend="aot_eager")] if enable and compiled else [model]
        for run in runs:
            model.load_state_dict(state)
            torch.manual_seed(1)
            stored = {}
            with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.update({id(t): t}) or t, lambda t: t):
                loss = sum(output.square().mean() for output in run(image).values())
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
            if run is model:
                kept.append(sum(t.numel() for t in stored.values()))
                # Batch norm's statistics, too: no batch is counted twice.
                gradients[-1] += tuple(t.clone() for t in model.buffers())
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert kept[1] < (0.9 if "resnet" in str(encoder) else 0.6) * kept[0] and kept[2] == kept[0]


def test_a_batch_norm_of_ones_own_counts_a_batch_once(tiny_model):
    model, norm = tiny_model({"depth": 1}, variant="stm1", d_state=1).train(), torch.nn.BatchNorm2d(8)
    model.heads["depth"] = torch.nn.Sequential(norm, torch.nn.Linear(12, 1))    # of a map with 8 rows
    model.heads["depth"].recomputed = True
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32))["depth"].sum().backward()
    assert norm.num_batches_tracked == 1


def test_heads_are_computed_again_if_they_ask_for_it(tiny_model):
    calls, model = [], tiny_model({"depth": 1}, variant="stm1", d_state=1).train()
    published, own = model.heads["depth"], torch.nn.Sequential(torch.nn.Linear(12, 1))
    for head, recomputed, expected in ((published, True, 2), (own, False, 1), (own, True, 2)):
        assert head is own or head.recomputed
        model.heads["depth"], head.recomputed = head, recomputed
        hook = next(head.children()).register_forward_pre_hook(lambda *_: calls.append(1))
        model.set_grad_checkpointing()
        model(torch.randn(1, 3, 32, 32))["depth"].sum().backward()
        assert len(calls) == expected
        hook.remove()
        calls.clear()


class OwnBlock(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, z):
        return torch.tanh(self.inner(z))


def test_blocks_alone():
    """With the paper's N, and with other arguments of their own."""
    z = torch.randn(1, 5, 6, 32)
    assert MFE(32, 32)(z).shape == (1, 5, 6, 64)
    for make in (STM, functools.partial(CTM, ["a", "b"]), functools.partial(SCTM, ["a"])):
        for own, N, backend in (({}, 16, None), (dict(d_state=3, backend="loop"), 3, "loop"),
                                (dict(config=DecoderConfig(d_state=5)), 5, None)):
            block = make(32, **own)
            scans = [module for module in block.modules() if isinstance(module, SS2D)]
            assert {(scan.A_log.shape, scan.d_state, scan.backend) for scan in scans} == {((4, 64, N), N, backend)}
        output = block(z) if make is STM else block({task: z for task in block.out})
        assert all(y.shape == z.shape for y in ([output] if make is STM else output.values()))


def test_the_figures_of_the_paper():
    """N, the stochastic depth of Swin-Large's 24 blocks, the stages' depths, heads and windows."""
    with torch.device("meta"):
        model, swin = MTMamba(NYUD_TASKS), MTMamba({"depth": 1}, variant="swin-multi-task")
    assert {m.A_log.shape[2] for m in model.modules() if isinstance(m, SS2D)} == {16}
    assert model.stages[0].blocks["depth"][0].mfe.ss2d.dt_weight.shape == (4, 2 * 768, 48)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for i in range(4)
             for block in model.encoder.backbone[f"layers_{i}"].blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 24))
    blocks = [block for stage in swin.stages for block in stage.blocks["depth"]]
    assert [block.attn.num_heads for block in blocks] == [24, 24, 12, 12, 6, 6]
    assert [block.shift_size for block in blocks] == 3 * [(0, 0), (6, 6)]
    assert {block.attn.window_size for block in blocks} == {(12, 12)}
    torch.testing.assert_close(torch.tensor([getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]),
                               torch.linspace(0.2, 0, 6))
    assert all(norm.eps == 1e-5 for norm in model.encoder.norms)


ARITHMETIC = {
    "mean": lambda a, b: {key: (a[key] + b[key]) / 2 for key in a},
    "moving average": lambda a, b: {key: a[key].lerp_(b[key], 0.25) for key in a},
    "half": lambda a, b: {key: value.half() for key, value in a.items()},
    "bfloat16, by a factor": lambda a, b: {key: value.bfloat16().mul_(0.7) for key, value in a.items()},
    "by a factor": lambda a, b: {key: value.mul_(0.3) for key, value in a.items()},
    "moving average in steps": lambda a, b: [
        [a[key].mul_(0.9).add_(b[key], alpha=0.1) for key in a] for _ in range(50)] and a,
    "difference": lambda a, b: {key: a[key] - b[key] for key in a}}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_over_a_state_dict(tiny_model, name):
    """Its description survives: the same model takes the result, one of other tasks or windows does not."""
    states = [{key: value.clone() for key, value in tiny_model({"a": 2, "b": 2}, d_state=1).state_dict().items()}
              for _ in range(2)]
    state = ARITHMETIC[name](*states)
    model = tiny_model({"a": 2, "b": 2}, d_state=1)
    model.load_state_dict(state)
    assert torch.equal(model.heads["a"].project.weight, state["heads.a.project.weight"].float())
    if name != "difference":
        with pytest.raises(ValueError, match=r"tasks \['a', 'b'\] .here \['b', 'a'\].; nothing was loaded"):
            tiny_model({"b": 2, "a": 2}, d_state=1).load_state_dict(state)
    other = tiny_model({"b": 2, "a": 2}, d_state=1).state_dict()
    with pytest.raises(ValueError, match=r"tasks of several models .here \['a', 'b'\]"):
        model.load_state_dict({key: value + 0.7 * other[key] for key, value in model.state_dict().items()})


def test_nothing_is_fetched_without_pretrained(monkeypatch):
    """Whatever a checkpoint says of its encoder."""
    def build(name, **arguments):
        assert not {"pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir"} & arguments.keys()
        return create(name, **arguments)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", build)
    MTMamba({"depth": 1}, variant="stm1", encoder="swin-tiny", encoder_kwargs=TINY_SWIN | dict(
        pretrained=True, pretrained_cfg=dict(url="http://localhost:1/x"), checkpoint_path="/x", cache_dir="/y"))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*arguments, **options):
        raise ConnectionError("no route\nto host")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", offline)
    with pytest.raises(ValueError) as error:
        MTMamba({"depth": 1}, encoder="swin-tiny", pretrained=True)
    for part in ("(ConnectionError: no route to host)", "--no-pretrained", '{"pretrained_cfg_overlay": {"file": ',
                 "https://huggingface.co/timm/swin_tiny_patch4_window7_224.ms_in1k"):
        assert part in str(error.value)


def test_a_head_that_does_not_fit_is_named(tiny_model):
    model = tiny_model({"semseg": 5, "depth": 1}, variant="stm1").eval()
    image, head = torch.randn(1, 3, 33, 64), torch.nn.Linear(12, 1)
    model.heads["depth"] = head
    assert model(image)["depth"].shape == (1, 1, 33, 64)
    class Permuted(torch.nn.Linear):
        def forward(self, z):
            return super().forward(z).permute(0, 3, 1, 2)
    for wrong, found in ((torch.nn.Linear(12, 2), "(1, 16, 16, 2)"), (torch.nn.Identity(), "(1, 16, 16, 12)"),
                         (Permuted(12, 1), "(1, 1, 16, 16)"), (torch.nn.Flatten(2), "(1, 16, 192)")):
        model.heads["depth"] = wrong
        with pytest.raises(ValueError, match=f"the head of depth to make .B, n h, n w, 1.*found {re.escape(found)}"):
            model(image)
    model.heads["depth"], model.heads["extra"] = head, head
    with pytest.raises(ValueError, match="has no task 'extra'; choose from semseg, depth"):
        model(image)


def test_stochastic_depth_falls_linearly(tiny_model):
    model = tiny_model({"depth": 1})
    rates = [p for stage in model.stages for p in
             [*(block.drop_path.drop_prob for block in stage.blocks["depth"]), stage.ctm.drop_path["depth"].drop_prob]]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0.2, 0, 9))
    image = torch.randn(8, 3, 64, 64)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(image)["depth"], model(image)["depth"])


def test_patch_expand_puts_channels_into_rows_and_columns():
    expand = PatchExpand(1, 2, factor=2)
    with torch.no_grad():
        expand.linear.weight.copy_(torch.arange(8.0).view(8, 1))
        expand.norm = torch.nn.Identity()
        y = expand(torch.ones(1, 1, 1, 1))
    assert y[0].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]    # channel = (row, column, c)


@pytest.mark.paper("Table 5", against="Eq. 24 with a saturated gate")
@pytest.mark.parametrize("fusion, weight", [("specific", 1e4), ("shared", -1e4)])
def test_fusion_is_the_limit_of_the_gate(fusion, weight, compare):
    """Table 5's rows are Eq. 24 with g = 1 and g = 0 there: a saturated gate must give the same outputs."""
    torch.manual_seed(0)
    adaptive, limit = (CTM(["a", "b"], dim=8, config=DecoderConfig(fusion=kind, d_state=4))
                       for kind in ("adaptive", fusion))
    limit.load_state_dict({key: value for key, value in adaptive.state_dict().items() if key in limit.state_dict()})
    for gate in adaptive.gate.values():
        torch.nn.init.constant_(gate.weight, weight)
    for norm in adaptive.norm.values():
        torch.nn.init.ones_(norm.bias)    # a positive sum of the gate's inputs
    if fusion == "specific":
        for norm in limit.norm.values():
            torch.nn.init.ones_(norm.bias)
    z = {task: torch.randn(1, 4, 5, 8) for task in "ab"}
    with torch.no_grad():
        for task, expected in adaptive(z).items():
            compare(limit(z)[task], expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("H, W", [(32, 32), (33, 65), (70, 47)])
def test_any_input_size(tiny_model, H, W):
    model = tiny_model({"semseg": 5, "depth": 1}).eval()
    image = torch.randn(1, 3, H, W)
    padded = torch.nn.functional.pad(image, (0, -W % 32, 0, -H % 32))
    with torch.no_grad():
        outputs, expected = model(image), model(padded)
    for task, output in outputs.items():
        assert output.shape == (1, model.tasks[task], H, W)
        torch.testing.assert_close(output, expected[task][:, :, :H, :W])


@pytest.mark.parametrize("encoder, kwargs", [
    ("convnext_atto", dict(dims=(8, 16, 24, 40), depths=(1, 1, 1, 1))),                   # channels first
    ("mambaout_femto", dict(dims=(8, 16, 24, 40), depths=(1, 1, 1, 1))),                  # channels last
    ("resnet10t", None),                                                                  # a fifth feature, at stride 2
    ("swinv2_tiny_window8_256", dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)),
])
def test_other_encoders(encoder, kwargs):
    model = MTMamba({"depth": 1}, img_size=(64, 64), encoder=encoder, encoder_kwargs=kwargs, d_state=1)
    assert model(torch.randn(2, 3, 64, 64))["depth"].shape == (2, 1, 64, 64)


TINY_VIT = dict(embed_dim=24, depth=3, num_heads=2)


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224.augreg_in21k", "vit_small_patch14_dinov2",
                                     "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_plain_vits(encoder, tmp_path):
    """From a file of weights to tokens equal to timm's own, maps at the four strides, cost, and a compiled training."""
    torch.manual_seed(1)
    img_size, patch = (64, 96), 14 if "patch14" in encoder else 16
    fixed = dict(img_size=img_size) if "beit" in encoder else {}
    torch.save(timm.create_model(encoder, **TINY_VIT).state_dict(), tmp_path / "weights.pth")    # of timm's own size
    # custom_load: before 1.0.31, timm takes the file for a .npz where the model's own weights are one.
    kwargs = dict(TINY_VIT, pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth"), custom_load=False))
    model = MTMamba({"depth": 1}, img_size, encoder, pretrained=True, encoder_kwargs=kwargs, variant="stm1", d_state=1)
    own = timm.create_model(encoder, pretrained=True, **kwargs, **fixed or dict(dynamic_img_size=True)).eval()
    tokens = []
    model.eval().encoder.pyramid.register_forward_pre_hook(lambda module, inputs: tokens.extend(inputs))
    image = torch.randn(1, 3, 60 if not fixed else 64, 96)
    with torch.no_grad():
        output = model(image)["depth"]
        padded = torch.nn.functional.pad(image, (0, 0, 0, 64 - image.shape[2]))
        padded = torch.nn.functional.interpolate(padded, (4 * patch, 6 * patch), mode="bilinear")
        expected = own.forward_intermediates(padded, intermediates_only=True, norm=False)[-1]
        torch.testing.assert_close(tokens[0], expected)
        maps = model.encoder(torch.zeros(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 24, 6), (8, 12, 12), (4, 6, 24), (2, 3, 24)]
    counted, _ = count_cost(model, img_size)
    assert counted == sum(p.numel() for p in model.parameters())
    copied = MTMamba({"depth": 1}, img_size, encoder, encoder_kwargs=TINY_VIT, variant="stm1", d_state=1).eval()
    copied.load_state_dict(model.state_dict())
    copied.set_grad_checkpointing()
    run = torch.compile(copied, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(image)["depth"], output)
    run(image)["depth"].sum().backward()
    assert all(p.grad is not None for p in copied.parameters())


class OwnEncoder(torch.nn.Module):
    def __init__(self, channels, output_fmt="NCHW"):
        super().__init__()
        self.channels, self.output_fmt = channels, output_fmt
        self.convolutions = torch.nn.ModuleList(torch.nn.Conv2d(3, c, s, s) for c, s in zip(channels, (4, 8, 16, 32)))

    def forward(self, image):
        maps = tuple(convolution(image) for convolution in self.convolutions)
        return tuple(f.permute(0, 2, 3, 1) for f in maps) if self.output_fmt == "NHWC" else maps


def test_an_encoder_of_ones_own():
    first, second = OwnEncoder([6, 12, 24, 48]), OwnEncoder([6, 12, 24, 48], "NHWC")
    models = [MTMamba({"a": 1, "b": 1}, encoder=encoder, variant="stm1", d_state=1) for encoder in (first, second)]
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(1, 3, 40, 64)
    outputs = [model.eval()(image)["a"] for model in models]
    assert torch.equal(*outputs) and models[0].encoder.backbone is first
    models[0].set_grad_checkpointing()
    assert torch.equal(models[0](image)["a"], outputs[0])
    single = MTMamba({"a": 1, "b": 1}, encoder=first, variant="swin-single-task", d_state=1).encoder
    assert single["a"].backbone is not single["b"].backbone
    first.channels = [6, 12, 24, 49]
    with pytest.raises(ValueError, match=r"\(2, 2, 49\)\] of OwnEncoder.* 64x64.*\(2, 2, 48\)\]"):
        MTMamba({"a": 1}, encoder=first, variant="stm1", d_state=1)(image)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_encoder_stays_as_it_is(tiny_model, compiled):
    """In training, with dropped blocks, batch norm and checkpointing, too."""
    model = tiny_model({"depth": 1}, variant="stm1", encoder="resnet10t", encoder_kwargs=None).eval()
    assert model.encoder.train().backbone.training
    model.freeze_encoder()
    model.set_grad_checkpointing()
    before = {key: value.clone() for key, value in model.encoder.backbone.state_dict().items()}
    run = torch.compile(model.train(), fullgraph=True, backend="aot_eager") if compiled else model.train()
    run(torch.randn(2, 3, 32, 64))["depth"].sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"encoder.backbone.{name}" for name, _ in model.encoder.backbone.named_parameters()}
    for key, value in model.encoder.backbone.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.paper("Table 6", against="Swin's parameters, counted by hand")
@pytest.mark.parametrize("encoder, C, depths, window", [
    ("swin-tiny", 96, (2, 2, 6, 2), 7), ("swin-small", 96, (2, 2, 18, 2), 7),
    ("swin-base", 128, (2, 2, 18, 2), 12), ("swin-large", 192, (2, 2, 18, 2), 12)])
def test_encoders_of_table_6(encoder, C, depths, window, compare):
    with torch.device("meta"):
        backbone = MTMamba({"depth": 1}, encoder=encoder, variant="stm1").encoder.backbone
    count = 48 * C + 3 * C                                                           # 4x4 patches and their norm
    for i, depth in enumerate(depths):
        width = C * 2 ** i
        # Two norms, attention with its table of relative positions (a head has 32 channels), and the MLP, 4 times wide.
        count += depth * (12 * width ** 2 + 13 * width + (2 * window - 1) ** 2 * width // 32)
        count += 0 if i == 3 else 4 * width * 2 * width + 8 * width                  # patch merging and its norm
    compare(sum(p.numel() for p in backbone.parameters()), count, rtol=0, atol=0)


def save_classifier(path, **drop):
    torch.manual_seed(1)
    classifier = timm.create_model("swin_tiny_patch4_window7_224", **TINY_SWIN)
    torch.save({k: v for k, v in classifier.state_dict().items() if k not in drop.get("keys", ())}, path)
    return classifier


def test_pretrained_weights_load_through_timm(tmp_path):
    classifier = save_classifier(tmp_path / "weights.pth")
    kwargs = {**TINY_SWIN, "pretrained_cfg_overlay": dict(file=str(tmp_path / "weights.pth"))}
    model = MTMamba({"depth": 1}, encoder="swin-tiny", encoder_kwargs=kwargs, pretrained=True)
    flat = {k.replace(".", "_"): v for k, v in classifier.state_dict().items()}
    backbone = model.encoder.backbone.state_dict()
    assert len(backbone) == len(flat) - 4    # without the classifier's norm and head
    for key, value in backbone.items():
        assert torch.equal(value, flat[key.replace(".", "_")]), key


def test_partial_pretrained_weights_are_an_error(tmp_path):
    save_classifier(tmp_path / "weights.pth", keys=["layers.1.blocks.0.mlp.fc1.weight"])
    kwargs = {**TINY_SWIN, "pretrained_cfg_overlay": dict(file=str(tmp_path / "weights.pth"))}
    with pytest.raises(ValueError, match="layers.1.blocks.0.mlp.fc1.weight"):
        MTMamba({"depth": 1}, encoder="swin-tiny", encoder_kwargs=kwargs, pretrained=True)


@pytest.mark.parametrize("image, message", [
    (torch.zeros(1, 3, 31, 64), "at least 32x32"),
    (torch.zeros(1, 4, 64, 64), r"found \(1, 4, 64, 64\)"),
    (torch.zeros(3, 64, 64), r"\(B, 3, H, W\)"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
    (torch.zeros(0, 3, 64, 64), "at least one image"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.float64), "type torch.float32, or autocast, found .* torch.float64"),
])
def test_rejects_bad_images(tiny_model, image, message):
    for autocast in (False, True):
        with pytest.raises(ValueError, match=message), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tiny_model({"depth": 1})(image)


@pytest.mark.parametrize("arguments, message", [
    (dict(variant="stm9"), "unknown variant 'stm9'; choose from mtmamba"),
    (dict(encoder="swan-large"), "unknown encoder 'swan-large'"),
    (dict(encoder="levit_128"), r"or a plain ViT; found 'levit_128' with \(16, 32, 64\)"),
    (dict(encoder=torch.nn.Conv2d(3, 3, 1)), r"its attribute `channels`.*found Conv2d with \(\)"),
    (dict(encoder=OwnEncoder([6, 12, 24, 48]), pretrained=True), "without pretrained"),
    (dict(tasks=["a", "b"]), r"channels by task, .'semseg': 40.*found \['a', 'b'\]"),
    (dict(encoder="convnext_atto", encoder_kwargs=dict(dims=(8, 16, 24, 40)), variant="gate-wmsa"), "6 heads"),
    (dict(tasks={}), "1 or more output channels"),
    (dict(tasks={"depth": 0}), "1 or more output channels"),
])
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MTMamba(**{"tasks": {"depth": 1}, **arguments})


def test_an_encoder_without_stochastic_depth():
    model = MTMamba({"depth": 1}, encoder="vgg11_bn", variant="stm1", d_state=1)
    assert model(torch.zeros(1, 3, 32, 32))["depth"].shape == (1, 1, 32, 32)


@pytest.mark.parametrize("encoder, kwargs", [
    ("maxvit_tiny_rw_224", dict(embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=8)),
    ("coatnet_0_rw_224", dict(embed_dim=(32, 32, 32, 32), depths=(1, 1, 1, 1), stem_width=8)),
    ("hiera_tiny_224", dict(embed_dim=8, stages=(1, 1, 1, 1)))])
def test_an_encoder_for_one_image_size_says_so(encoder, kwargs):
    model = MTMamba({"depth": 1}, (60, 64), encoder, encoder_kwargs=kwargs, variant="stm1", d_state=1).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 60, 64))["depth"].shape == (1, 1, 60, 64)
        with pytest.raises(ValueError, match=r"was built for images \(64, 64\), found \(64, 96\): "):
            model(torch.zeros(1, 3, 60, 90))
    model.encoder.backbone.register_forward_pre_hook(lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="size of tensor"):    # not because of the image's size
        model(torch.zeros(1, 3, 60, 64))


def test_swin_v2_takes_any_size():
    model = MTMamba({"depth": 1}, (60, 64), encoder="swinv2_tiny_window8_256", variant="stm1", d_state=1,
                    encoder_kwargs=TINY_SWIN).eval()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for run, size in ((model, (60, 64)), (model, (60, 90)), (compiled, (60, 90))):
            assert run(torch.zeros(1, 3, *size))["depth"].shape == (1, 1, *size)


def test_files_that_are_no_checkpoint(tiny_model, tmp_path):
    model, path = tiny_model({"depth": 1}), tmp_path / "file.pth"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_published_checkpoint(model, path)
    for wrong in ([torch.zeros(1)], torch.zeros(1), {"model": 3}, {"epoch": 3}, {0: torch.zeros(1)}):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="expected a published checkpoint"):
            load_published_checkpoint(model, path)
    path.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_published_checkpoint(model, path)
    torch.save({"model": {"weight": torch.zeros(1)}, "args": argparse.Namespace()}, path)
    with pytest.raises(ValueError, match="other than tensors .argparse.Namespace"):
        load_published_checkpoint(model, path)


# --------------------------------------------------------------------------------------------- weights of another model

TWO = {"semseg": 3, "depth": 1}


@pytest.mark.parametrize("variant", ["mtmamba", "mtmamba++", "fusion-shared"])
def test_weights_of_tasks_in_another_order_are_refused(variant):
    """Also of those that went through a file, a copy of the dictionary, or JSON, which may sort keys."""
    source = build(TWO, variant=variant)
    other = build(json.loads(json.dumps(TWO, sort_keys=True)), variant=variant)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"tasks \['semseg', 'depth'\] \(here \['depth', 'semseg'\]\)"):
            other.load_state_dict({**source.state_dict()}, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    build(TWO, variant=variant).load_state_dict(source.state_dict())


def test_the_order_of_tasks_that_exchange_nothing_is_free():
    source, other = build(TWO), build(dict(reversed(TWO.items())))
    other.load_state_dict(source.state_dict())
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(image), source(image), rtol=0, atol=0)


@pytest.mark.parametrize("first, second, named", [
    ({}, {"output_scale": 2}, "output_scale 1"),
    (dict(encoder="resnet18", encoder_kwargs={}), {"encoder": "resnetblur18"}, "encoder resnet18 "),
    (dict(encoder="swinv2_cr_tiny_224", encoder_kwargs=dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
                                                            window_size=4)),
     {"encoder_kwargs": dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=8)}, "windows")])
def test_weights_of_a_model_that_computes_something_else_are_refused(first, second, named):
    """Every tensor fits by name and shape."""
    source, other = (build({"depth": 1}, img_size=(256, 256), **first | change) for change in ({}, second))
    shapes = [{key: value.shape for key, value in model.state_dict().items() if key != "_extra_state"}
              for model in (source, other)]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match=named):
        other.load_state_dict(source.state_dict())


# ---------------------------------------------------------------------------------------------------- in other projects

@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_head_of_ones_own(stride):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.ConvTranspose2d(8, 1, 4 // stride, 4 // stride)

        def forward(self, z):
            return self.convolution(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    model = build({"depth": 1})
    model.heads["depth"] = Head()
    assert model(torch.randn(2, 3, 40, 72))["depth"].shape == (2, 1, 40, 72)


def test_images_of_four_channels():
    earlier = build({"depth": 1}, encoder_kwargs=dict(ATTO["encoder_kwargs"], in_chans=4))
    model = build({"depth": 1}, in_chans=4)
    image = torch.randn(1, 4, 32, 32)
    assert torch.equal(model(image)["depth"], earlier(image)["depth"])
    assert count_cost(model, (32, 32))[0] == count_cost(build({"depth": 1}), (32, 32))[0] + 8 * 16
    with pytest.raises(ValueError, match=r"expected a batch \(B, 4, H, W\).*in_chans"):
        model(torch.randn(1, 3, 32, 32))


def test_some_of_the_tasks(tiny_model):
    model, image = tiny_model(variant="mtmamba").eval(), torch.randn(1, 3, 32, 64)
    whole, some = model(image), model(image, tasks=["normal", "semseg"])
    assert list(some) == ["normal", "semseg"] and list(whole) == list(NYUD_TASKS)
    assert all(torch.equal(some[task], whole[task]) for task in some)
    with pytest.raises(ValueError, match="no task 'sky'; choose from semseg, depth, normal, boundary"):
        model(image, tasks=["sky"])


def test_compiled_at_a_second_size(tiny_model):
    """With dynamic=False, as the README has it: once per size, and exactly the eager outputs."""
    counter = CompileCounterWithBackend("eager")
    model = tiny_model({"depth": 1}, variant="stm1").eval()
    network = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    with torch.no_grad():
        for i, size in enumerate([(64, 96), (96, 64), (64, 96)]):
            image = torch.randn(1, 3, *size)
            torch.testing.assert_close(network(image)["depth"], model(image)["depth"])
            assert counter.frame_count == min(i + 1, 2)
