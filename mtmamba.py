"""MTMamba and MTMamba++: multi-task dense scene understanding with a Mamba-based decoder, in plain PyTorch.

    Lin, Jiang, Chen, Zhang, Liu, Chen. MTMamba: Enhancing Multi-Task Dense Scene Understanding by
    Mamba-Based Decoders. ECCV 2024. https://arxiv.org/abs/2407.02228
    Lin, Jiang, Chen, Zhang, Liu, Chen. MTMamba++: Enhancing Multi-Task Dense Scene Understanding via
    Mamba-Based Decoders. IEEE TPAMI 47, 2025. https://arxiv.org/abs/2408.15101

To use it elsewhere, copy this file. It needs torch and timm; numba makes it several times faster on CPUs.

    model = MTMamba({"semseg": 40, "depth": 1, "normal": 3, "boundary": 1})
    outputs = model(torch.randn(1, 3, 448, 576))         # {"semseg": (1, 40, 448, 576), "depth": ...}

Symbols of the paper, their names here and their shapes; every feature map is channels last:

    x        image          (B, 3, H, W)           RGB, normalised with ImageNet's mean and deviation
    f_1..f_4 features       (B, H/s, W/s, C_s)     encoder outputs at strides s = 4, 8, 16, 32    Eq. 9
    z^t, r^t z[t], r[t]     (B, H, W, C)           feature of task t inside a decoder stage       Eq. 26-29
    g^t      g              (B, H, W, D)           gate                                           Eq. 16, 23
    T        len(tasks)                            number of tasks
    alpha    EXPANSION                             D = alpha * C, the inner width
    N        d_state                               state size
    R        dt_rank                               rank of the step size's projection, ceil(C / 16)
    K        K                                     scan directions, 4                             Eq. 10
    Delta    delta          (B, H, W, K, D)        step size                                      Eq. 8
    A        A              (K, D, N)              state matrix, diagonal, negative               Eq. 5
    B, C     B, C           (B, H, W, K, N)        input and output matrices                      Eq. 6, 7
    D        D              (K, D)                 skip connection                                Eq. 2

Equations, tables and figures are those of the ECCV paper. The order is top-down: MTMamba, decoder stage, CTM, STM, MFE,
SS2D, the scan, patch expand and head, what MTMamba++ changes, window attention (for the paper's ablations), encoder.
The appendix has the fast scans, for CPUs and GPUs, published checkpoints, and batch norm over processes.
"""

import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath, LayerNorm2d, to_2tuple
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention, window_partition, window_reverse
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, shape_wrapper

try:    # comes with PyTorch for CUDA; macOS and Windows have none
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:
    triton = constexpr = None

EXPANSION = 2                    # alpha of Eq. 13
K = 4                            # scan directions of Eq. 10
ENCODER_STRIDES = (4, 8, 16, 32)
ENCODER_DROP_PATH = 0.1          # stochastic depth of the encoder
DECODER_DROP_PATH = 0.2          # of the decoder's first block; falls linearly to 0 at its last one

# Table 6.
ENCODERS = {
    "swin-tiny": "swin_tiny_patch4_window7_224",
    "swin-small": "swin_small_patch4_window7_224",
    "swin-base": "swin_base_patch4_window12_384",
    "swin-large": "swin_large_patch4_window12_384",
}


@dataclass(frozen=True)
class DecoderConfig:
    """What all parts of a decoder have in common; the defaults are the paper's."""

    block: str = "stm"               # of each task in a stage: "stm" or "swin"
    depth: int = 2                   # number of these blocks
    ctm: str | None = "feature"      # cross-task block that ends a stage: "feature" (CTM), "semantic" (SCTM) or none
    fusion: str = "adaptive"         # what CTM hands on to a task: "adaptive", "specific" or "shared"
    mfe: str = "ss2d"                # what MFE is made of: "ss2d" or "wmsa"
    gate: str = "linear"             # what the gates are made of: "linear" or "wmsa"
    head: str = "dense"              # "dense" or "lite"
    shared_encoder: bool = True      # one encoder for all tasks, or one per task
    d_state: int = 16                # N


PAPER = DecoderConfig()
VARIANTS = {    # arguments of DecoderConfig
    "mtmamba": {},
    # The successor, then each of its two changes alone
    "mtmamba++": dict(ctm="semantic", head="lite"),
    "s-ctm-dense": dict(ctm="semantic"),
    "f-ctm-lite": dict(head="lite"),
    # Table 2. The paper names the Swin rows, and the W-MSA rows below, but does not describe them. The structures here
    # are inferred: they are the ones whose parameters and FLOPs both equal the paper's (tests/test_cost.py).
    "stm1": dict(depth=1, ctm=None),
    "stm2": dict(ctm=None),
    "stm3": dict(depth=3, ctm=None),
    "swin-multi-task": dict(block="swin", ctm=None),
    "swin-single-task": dict(block="swin", ctm=None, shared_encoder=False),
    # Table 3
    "mfe-wmsa": dict(mfe="wmsa"),
    # Table 4
    "gate-wmsa": dict(gate="wmsa"),
    # Table 5
    "fusion-specific": dict(fusion="specific"),
    "fusion-shared": dict(fusion="shared"),
}


class MTMamba(nn.Module):
    """Figure 1: a shared encoder, three decoder stages, a head per task.

    tasks: output channels by task name, e.g. {"semseg": 40, "depth": 1}. CTM concatenates the tasks' features in this
        order (Eq. 20). PyTorchModelHubMixin sorts a dict's keys: let your class take pairs and hand on dict(pairs).
    img_size: (height, width) for encoders whose weights depend on it. Swin's do not.
    encoder: a key of ENCODERS; any timm model with features at strides 4, 8, 16 and 32, or a plain ViT; or a module of
        your own, see Encoder. train.py knows encoders by name, so a module is for Python alone.
    pretrained: load timm's pretrained encoder weights. Raises where timm has none or they do not fit.
    encoder_kwargs: more arguments of timm.create_model. variant: a key of VARIANTS. d_state: N.
    output_scale: size of the outputs divided by the image's, a whole number; 2 for Cityscapes, with halved images.
    backend: of the scan, see selective_scan_2d. in_chans: channels of the images.
    An entry of `heads` may be replaced by any module (B, h, w, C_1) -> (B, n h, n w, C_t) with a whole number n:
    predict checks its output and resizes it.
    """

    def __init__(self, tasks: dict[str, int], img_size: tuple[int, int] = (448, 576),
                 encoder: str | nn.Module = "swin_large_patch4_window12_384", pretrained: bool = False,
                 encoder_kwargs: dict | None = None, variant: str = "mtmamba", output_scale: int = 1,
                 d_state: int = 16, backend: str | None = None, in_chans: int = 3):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}")
        if not tasks or not isinstance(tasks, dict) or any(channels < 1 for channels in tasks.values()):
            raise ValueError(f"expected 1 or more output channels by task, {{'semseg': 40, 'depth': 1}}, found {tasks}")
        if not isinstance(output_scale, int) or output_scale < 1:
            raise ValueError(f"expected output_scale to be a whole number from 1 up, found {output_scale!r}")
        config = DecoderConfig(**VARIANTS[variant], d_state=d_state)
        self.shared_encoder = config.shared_encoder
        self.tasks, self.output_scale = dict(tasks), output_scale
        encoder_kwargs = dict(encoder_kwargs or {})
        self.in_chans = encoder_kwargs.setdefault("in_chans", in_chans)

        arguments = img_size, pretrained, encoder_kwargs
        self.encoder = (Encoder(encoder, *arguments) if self.shared_encoder
                        else per_task(tasks, lambda: Encoder(copy.deepcopy(encoder), *arguments)))
        c = self.encoders()[0].channels
        self.stages = nn.ModuleList(DecoderStage(list(tasks), c[3 - i], c[2 - i], i, config) for i in range(3))
        build_head = DenseHead if config.head == "dense" else LiteHead
        self.heads = nn.ModuleDict({t: build_head(c[0], channels) for t, channels in tasks.items()})
        synchronise_batch_norm(self)
        set_backend(self, backend)

    def forward(self, image: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {task: (B, C_t, s H, s W)}, raw outputs (logits, metres, unnormalised normals).

        s is output_scale. H and W are 32 or more. The image is padded inside (zeros) and the outputs are cropped back.
        tasks: run the heads of these tasks only. The decoder always runs for all, because tasks exchange features.
        Under autocast, any float type but float64 is accepted.
        """
        global _last_sum
        _last_sum = image.new_zeros((), dtype=torch.float64) if _has_processes() else None
        outputs = self.predict(self.decode(image), image.shape[2:], tasks)
        _last_sum = None
        return outputs

    def decode(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the final decoder features (Figure 3), {task: (B, H'/4, W'/4, C_1)}: H', W' are H, W padded
        to multiples of 32."""
        stride, types = ENCODER_STRIDES[-1], [next(self.stages.parameters()).dtype]
        if image.dtype != types[0] and torch.is_autocast_enabled(image.device.type):
            types += [torch.float32, torch.bfloat16, torch.float16]
        if image.ndim != 4 or image.shape[1] != self.in_chans or 0 in image.shape or image.dtype not in types:
            raise ValueError(f"expected a batch (B, {self.in_chans}, H, W) of at least one image, of the weights' type "
                             f"{types[0]}, or autocast, found {tuple(image.shape)} {image.dtype} (for other channels: "
                             "MTMamba(..., in_chans=4))")
        H, W = image.shape[2:]
        if H < stride or W < stride:
            raise ValueError(f"expected an image of at least {stride}x{stride} pixels, found {H}x{W}; enlarge it")
        image = F.pad(image, (0, round_up(W, stride) - W, 0, round_up(H, stride) - H))

        features = (dict.fromkeys(self.tasks, self.encoder(image)) if self.shared_encoder
                    else {t: self.encoder[t](image) for t in self.tasks})        # Eq. 9
        z = {t: f[3] for t, f in features.items()}                               # (B, H'/32, W'/32, C_4)
        for i, stage in enumerate(self.stages):
            z = stage(z, {t: f[2 - i] for t, f in features.items()})             # (B, H'/16.., W'/16.., C_3..)
        return z

    def predict(self, z: dict[str, Tensor], size: tuple[int, int],
                tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The heads on the features of decode -> {task: (B, C_t, s H, s W)}; size: (H, W) of the image."""
        H, W = (self.output_scale * n for n in size)
        outputs = {}
        for t in self.heads if tasks is None else tasks:
            if t not in self.tasks:
                raise ValueError(f"the model has no task {t!r}; choose from {', '.join(self.tasks)}")
            y = self.heads[t](z[t])                                  # (B, n H'/4, n W'/4, C_t)
            b, h, w, _ = z[t].shape
            n = y.shape[1] // h if y.ndim == 4 else 1
            if y.shape != (b, n * h, n * w, self.tasks[t]):
                raise ValueError(f"expected the head of {t} to make (B, n h, n w, {self.tasks[t]}) of (B, h, w, C), "
                                 f"{tuple(z[t].shape)}, found {tuple(y.shape)}")
            y = y.permute(0, 3, 1, 2)
            padded = [4 * self.output_scale * n for n in (h, w)]
            if list(y.shape[2:]) != padded:
                # In float32: the gradients are sums over many pixels, and CUDA would add them in y's type.
                y = F.interpolate(y.to(_compute_dtype(y)), padded, mode="bilinear")
            outputs[t] = y[:, :, :H, :W]                             # without decode's padding
        return outputs

    def encoders(self) -> list["Encoder"]:
        """The shared one, or one per task."""
        return [self.encoder] if self.shared_encoder else list(self.encoder.values())

    def freeze_encoder(self):
        """The backbone gets no gradient, and stays in eval mode also after train(). The LayerNorms on its features and
        a ViT's pyramid start untrained, so they are trained all the same."""
        for encoder in self.encoders():
            encoder.frozen = True
            encoder.backbone.requires_grad_(False)
            encoder.train(encoder.training)

    def set_grad_checkpointing(self, enable: bool = True):
        """Training keeps only the inputs of each block (of the encoder and the stages, cross-task blocks, heads with
        the attribute `recomputed`) and computes it again in the backward pass: less memory, more time, equal gradients.
        What has a batch norm is not computed again: its statistics would count the batch twice."""
        for encoder in self.encoders():
            encoder.set_grad_checkpointing(enable)
        blocks = [block for stage in self.stages for blocks in stage.blocks.values() for block in blocks]
        blocks += [stage.ctm for stage in self.stages if stage.ctm]
        blocks += [head for head in self.heads.values() if getattr(head, "recomputed", False)]
        for block in blocks:
            block.__dict__.pop("forward", None)    # of an earlier call
            if enable and not has_batch_norm(block):
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)

    def get_extra_state(self) -> Tensor:
        """Part of every state_dict: what its tensors' names and shapes do not show, as the bits of a JSON object. They
        are floats, so they bear what people do with all of a state_dict: means, moving averages, other types."""
        shown = self.encoders()[0]
        hidden = dict(tasks=list(self.tasks) if self.stages[0].ctm else sorted(self.tasks),
                      output_scale=self.output_scale, encoder=shown.name.partition(".")[0], img_size=shown.built_for,
                      windows=sorted({to_2tuple(m.window_size) for m in shown.modules() if hasattr(m, "window_size")}))
        bits = [byte >> i & 1 for byte in json.dumps(hidden).encode() for i in range(8)]
        return torch.tensor(bits, dtype=torch.float32, device="cpu")

    def set_extra_state(self, state: Tensor):
        """Raises ValueError, before anything is loaded, if the same tensors would compute something else here, for
        example because the cross-task blocks concatenate the tasks in another order."""
        def read(state):    # the first bit is 1, so it shows the factor of a weighted sum
            bits = state.double().cpu() / state[0].item()
            numbers = bits.round().view(-1, 8) @ 2 ** torch.arange(8.0).double()
            return json.loads(bytes(numbers.int().tolist())) if (bits - bits.round()).abs().max() < 0.1 else {}
        if not state.any():    # of a difference, which describes no model
            return
        found, own = read(state), read(self.get_extra_state())
        different = [f"{key} {found.get(key, 'of several models')} (here {own[key]})" for key in own
                     if found.get(key) != own[key]]
        if different:
            raise ValueError(f"these weights are of another model, with {'; '.join(different)}; nothing was loaded")


def round_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple    # a form that torch.compile simplifies for a symbolic n


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def set_backend(module: nn.Module, backend: str | None):
    """Of all scans in a module, see selective_scan_2d."""
    for scan in module.modules():
        if isinstance(scan, SS2D):
            scan.backend = backend


def per_task(tasks: Iterable[str], build, *arguments) -> nn.ModuleDict:
    return nn.ModuleDict({t: build(*arguments) for t in tasks})


class DecoderStage(nn.Module):
    """Eq. 26-29: every task's feature is upsampled, fused with the encoder's, refined, and exchanged with the others.

    index: 0 for the deepest stage, to 2. It gives the blocks' stochastic depth, and the heads of Table 2's Swin rows.
    """

    def __init__(self, tasks: list[str], dim_in: int, dim: int, index: int, config: DecoderConfig):
        super().__init__()
        blocks = config.depth + (config.ctm is not None)

        def drop_path(i):
            return DECODER_DROP_PATH * (1 - (index * blocks + i) / (3 * blocks - 1))

        def build_block(i):
            if config.block == "swin":
                return decoder_swin_block(dim, heads=(24, 12, 6)[index], shift=i % 2 * 6, drop_path=drop_path(i))
            return STM(dim, drop_path(i), config)
        self.expand = per_task(tasks, PatchExpand, dim_in, dim, 2)
        self.fuse = per_task(tasks, nn.Linear, 2 * dim, dim)
        self.blocks = per_task(tasks, lambda: nn.Sequential(*map(build_block, range(config.depth))))
        build_ctm = {"feature": CTM, "semantic": SCTM}.get(config.ctm)
        self.ctm = build_ctm and build_ctm(tasks, dim, drop_path(config.depth), config)

    def forward(self, z: dict[str, Tensor], f: dict[str, Tensor]) -> dict[str, Tensor]:
        """z: {task: (B, H, W, C_in)}, f: {task: (B, 2H, 2W, C)}, the encoder's feature -> {task: (B, 2H, 2W, C)}"""
        r = {}
        for t in z:
            r_t = self.expand[t](z[t])                                # Eq. 26   (B, 2H, 2W, C)
            r_t = self.fuse[t](torch.cat([r_t, f[t]], dim=-1))        # Eq. 27
            r[t] = self.blocks[t](r_t)                                # Eq. 28
        return self.ctm(r) if self.ctm else r                         # Eq. 29


class CTM(nn.Module):
    """Cross-task Mamba block, Figure 2(b), Eq. 19-25.

    config.fusion: "adaptive" is Eq. 24. Table 5: "specific" hands on the task's own feature, "shared" the shared one.
    Differs from the published implementation, where g^t multiplies the shared feature: as sigma(-a) = 1 - sigma(a) and
    the gate has no bias, load_published_checkpoint negates its weight.
    d_state, backend: N, if it is not config's, and the scans' backend.
    """

    def __init__(self, tasks: list[str], dim: int, drop_path: float = 0.0, config: DecoderConfig = PAPER,
                 d_state: int | None = None, backend: str | None = None):
        super().__init__()
        self.fusion = fusion = config.fusion
        if fusion != "shared":
            self.norm = per_task(tasks, nn.LayerNorm, dim)
            self.mfe = per_task(tasks, MFE, dim, dim, config, d_state)
        if fusion != "specific":
            self.norm_shared = nn.LayerNorm(len(tasks) * dim)
            self.mfe_shared = MFE(len(tasks) * dim, dim, config, d_state)
        if fusion == "adaptive":
            self.gate = per_task(tasks, build_gate, dim, config)
        self.out = per_task(tasks, nn.Linear, EXPANSION * dim, dim, False)    # no bias
        self.drop_path = per_task(tasks, DropPath, drop_path)
        set_backend(self, backend)

    def forward(self, z: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: (B, H, W, C)} -> {task: (B, H, W, C)}"""
        if self.fusion != "specific":
            z_shared = self.norm_shared(torch.cat(list(z.values()), dim=-1))    # Eq. 20   (B, H, W, TC)
            z_shared = self.mfe_shared(z_shared)                                # Eq. 22   (B, H, W, D)
        out = {}
        for t, z_t in z.items():
            if self.fusion == "shared":
                fused = z_shared
            else:
                z_ln = self.norm[t](z_t)                                        # Eq. 19   (B, H, W, C)
                fused = self.mfe[t](z_ln)                                       # Eq. 21   (B, H, W, D)
                if self.fusion == "adaptive":
                    g = torch.sigmoid(self.gate[t](z_ln))                       # Eq. 23   (B, H, W, D)
                    fused = g * fused + (1 - g) * z_shared                      # Eq. 24
            out[t] = z_t + self.drop_path[t](self.out[t](fused))                # Eq. 25   (B, H, W, C)
        return out


class STM(nn.Module):
    """Self-task Mamba block, Figure 2(a), Eq. 14-18. d_state, backend: as in CTM."""

    def __init__(self, dim: int, drop_path: float = 0.0, config: DecoderConfig = PAPER, d_state: int | None = None,
                 backend: str | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mfe = MFE(dim, dim, config, d_state)
        self.gate = build_gate(dim, config)
        self.out = nn.Linear(EXPANSION * dim, dim, bias=False)
        self.drop_path = DropPath(drop_path)
        set_backend(self, backend)

    def forward(self, z: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)"""
        z_ln = self.norm(z)                                     # Eq. 14
        z_mfe = self.mfe(z_ln)                                  # Eq. 15   (B, H, W, D)
        g = F.silu(self.gate(z_ln))                             # Eq. 16   (B, H, W, D)
        return z + self.drop_path(self.out(z_mfe * g))          # Eq. 17, 18   (B, H, W, C)


def build_gate(dim: int, config: DecoderConfig) -> nn.Module:
    """(B, H, W, C) -> (B, H, W, D): the linear map of Eq. 16 and 23; in Table 4's row, window attention before it."""
    linear = nn.Linear(dim, EXPANSION * dim, bias=False)
    return linear if config.gate == "linear" else nn.Sequential(WindowMSA(dim), linear)


class MFE(nn.Module):
    """Mamba-based feature extractor, Eq. 13: LN . SS2D . SiLU . Conv . Linear.

    dim_in: input channels. dim: C of the decoder stage, which sets D and R also where dim_in is T * C (Eq. 22).
    In Table 3's row "wmsa", one window attention replaces all that follows the linear map.
    """

    def __init__(self, dim_in: int, dim: int, config: DecoderConfig = PAPER, d_state: int | None = None):
        super().__init__()
        d_inner = EXPANSION * dim
        self.linear = nn.Linear(dim_in, d_inner, bias=False)
        self.wmsa = WindowMSA(d_inner) if config.mfe == "wmsa" else None
        if not self.wmsa:
            self.conv = nn.Conv2d(d_inner, d_inner, kernel_size=3, padding=1, groups=d_inner)
            self.ss2d = SS2D(d_inner, d_state or config.d_state)
            self.norm = nn.LayerNorm(d_inner)

    def forward(self, z: Tensor, c: Tensor | None = None) -> Tensor:
        """z: (B, H, W, C_in), c: SS2D's second map, if any -> (B, H, W, D)"""
        z = self.linear(z)                                               # (B, H, W, D)
        if self.wmsa:
            return self.wmsa(z)
        z = self.conv(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)         # depthwise; the permutes move no data
        return self.norm(self.ss2d(F.silu(z), c))


class SS2D(nn.Module):
    """2D selective scan, Eq. 6-8 and 10-12: projects the map to Delta, B and C per direction, then scans. In
    MTMamba++'s cross SS2D they are projected from a second map; all else is equal.

    No outer projections, no LayerNorm. The projections act on each pixel alone, so one map serves all directions.
    dt_rank: R; None takes ceil(d_inner / (16 alpha)), which is ceil(C / 16).
    Differs: the paper gives A the shape L x C; that of Mamba and of the published weights is D x N, per direction.
    """

    def __init__(self, d_inner: int, d_state: int = 16, dt_rank: int | None = None, backend: str | None = None):
        super().__init__()
        self.d_state, self.dt_rank = d_state, dt_rank or math.ceil(d_inner / (16 * EXPANSION))
        self.backend = backend
        self.x_proj_weight = nn.Parameter(torch.empty(K, self.dt_rank + 2 * d_state, d_inner))    # rows: Delta, B, C
        self.dt_weight = nn.Parameter(torch.empty(K, d_inner, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(K, d_inner))
        self.A_log = nn.Parameter(torch.empty(K, d_inner, d_state))
        self.D = nn.Parameter(torch.empty(K, d_inner))
        self.reset_parameters()

    def reset_parameters(self):
        """Mamba's initialisation. The other modules keep the default of PyTorch or timm, but for LiteHead's conv."""
        for weight in (self.x_proj_weight, self.dt_weight):    # keeps the variance of the inputs
            nn.init.uniform_(weight, -weight.shape[-1] ** -0.5, weight.shape[-1] ** -0.5)
        with torch.no_grad():
            # softplus(bias) is log-uniform in [0.001, 0.1], so that channels forget at different rates from the start.
            dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)))
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))    # the inverse of softplus
            # A = -(1, 2, ..., N): the real part of S4D's initialisation. The logarithm keeps A negative.
            self.A_log.copy_(torch.log(torch.arange(1, self.d_state + 1)))
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """x: (B, H, W, D). c: the map for Delta, B and C if it is not x. Returns (B, H, W, D)."""
        R, N = self.dt_rank, self.d_state
        projected = F.linear(x if c is None else c, self.x_proj_weight.flatten(0, 1))
        projected = projected.unflatten(-1, (K, R + 2 * N))                   # (B, H, W, K, R + 2N)
        delta, B, C = projected.split([R, N, N], dim=-1)                      # Eq. 6, 7
        delta = delta.contiguous()    # a copy, so that autograd does not keep all of `projected`
        A = -torch.exp(self.A_log.float().mT.contiguous()).mT    # channels last in memory, as the fast scans read it
        # The scan expands delta to D channels itself. So autograd does not store the result, 4 times as large as x.
        return selective_scan_2d(x, delta, A, B, C, self.D, self.dt_bias, self.backend, self.dt_weight)


# ------------------------------------------------------------------------------------------------------- the scan

def s6(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """The selective state space model S6, Eq. 3-8, step by step; any float type.

    u, delta: (..., L, D), delta before bias and softplus. A: (..., D, N). B, C: (..., L, N). D, delta_bias: (D,) or
    (..., 1, D). Returns (..., L, D).
    """
    delta = F.softplus(delta + delta_bias)                                      # Eq. 8

    def steps(h, delta, delta_u, B, C, A):    # T steps; h (1, ..., N, D), delta (T, ..., 1, D), B (T, ..., N, 1)
        A_bar, B_bar_u = torch.exp(delta * A), B * delta_u                      # Eq. 5, with u
        H = []
        for A_bar_t, B_bar_u_t in zip(A_bar.split(1), B_bar_u.split(1)):
            h = A_bar_t * h + B_bar_u_t                                         # Eq. 3
            H.append(h)
        return h, C @ torch.cat(H)                                              # Eq. 4
    h = u.new_zeros(1, *u.shape[:-2], *A.mT.shape[-2:])
    sequences = delta[..., None, :], (delta * u)[..., None, :], B[..., None], C[..., None, :]
    y = _run_steps(steps, h, [t.movedim(-3, 0) for t in sequences], A.mT.contiguous())
    return y.squeeze(-2).movedim(0, -2) + D * u                                 # the skip of Eq. 2


def _run_steps(steps, h: Tensor, sequences: list[Tensor], A: Tensor) -> Tensor:
    """Runs all steps and returns their outputs (L, ...): in a Python loop or, while a model is compiled or exported,
    with PyTorch's scan operator. That is one node for any L, and exported files run without this project. A turn takes
    T steps, as many as a CPU's cache has room for. The operator's last turn is filled up with zeros: a Delta of 0
    leaves the state as it is. In an export for any size, whose L is not a number, T is 1."""
    L = sequences[0].shape[0]
    T = min(16, max(1, 2 ** 15 // A.numel())) if isinstance(L, int) else 1
    if not torch.compiler.is_compiling():
        y = []
        for now in zip(*(t.split(T) for t in sequences)):
            h, y_now = steps(h, *now, A)
            y.append(y_now)
        return torch.cat(y)
    chunks = [F.pad(t, (0, 0) * (t.ndim - 1) + (0, -L % T)).unflatten(0, (-1, T)) for t in sequences]
    from torch._higher_order_ops.scan import scan, scan_op
    if torch.compiler.is_dynamo_compiling():
        # PyTorch 2.11 hands no gradient from step to step unless the first state needs one. Here it is 0, of A.
        h = A.expand_as(h).masked_fill(torch.ones((), dtype=torch.bool, device=h.device), 0)
        y = scan(lambda h, now: steps(h, *now, A), h, chunks)[1]
    else:    # the same operator, without compiling each step function
        y = scan_op(steps, [h], chunks, (A,))[1]
    return y.flatten(0, 1)[:L]


def expand(t: Tensor, k: int) -> Tensor:
    """expand(., v) of Eq. 10: (H, W, ...) -> (L, ...), the pixels in the order in which direction k visits them.

    Row-major, column-major, and both reversed, the order of the published implementation's parameters. Transposes and
    flips, because index lists would make most of an exported file.
    """
    t = (t.transpose(0, 1) if k % 2 else t).flatten(0, 1)
    return t.flip(0) if k >= 2 else t


def merge(y: Tensor, k: int, H: int, W: int) -> Tensor:
    """Eq. 12 for one direction, the inverse of expand: (L, ...) -> (H, W, ...)."""
    y = y.flip(0) if k >= 2 else y
    return y.unflatten(0, (W, H)).transpose(0, 1) if k % 2 else y.unflatten(0, (H, W))


def selective_scan_2d(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor,
                      backend: str | None = None, dt_weight: Tensor | None = None) -> Tensor:
    """Eq. 10-12: S6 along four directions of the feature map, put back in place and summed.

    x: (B, H, W, D). delta: (B, H, W, K, D), before bias and softplus. A: (K, D, N). B, C: (B, H, W, K, N).
    D, delta_bias: (K, D). Returns (B, H, W, D) in x's type; computed in float32 whatever the types of the inputs and
    autocast (float64 where x is), because the state sums over thousands of steps.
    dt_weight: (K, D, R). If it is given, delta is (B, H, W, K, R), and this weight expands it to D channels.

    backend: "loop": s6 along the four orders; for reading, tests, exports and any kind of derivative.
        "torch": plain PyTorch in chunks, with a backward pass of its own; runs everywhere.
        "numba": this file's loops for CPUs, compiled by the package numba; float32.
        "triton": this file's GPU kernels. "mamba_ssm": the CUDA kernel of the package mamba-ssm.
        None: default_backend's choice.
    """
    (*pixels, d), n = x.shape, A.shape[-1]
    rank = d if dt_weight is None else dt_weight.shape[-1]
    shapes = {"delta": (delta, (*pixels, K, rank)), "A": (A, (K, d, n)), "B": (B, (*pixels, K, n)),
              "C": (C, (*pixels, K, n)), "D": (D, (K, d)), "delta_bias": (delta_bias, (K, d))}
    for name, (tensor, expected) in shapes.items():
        if tensor.shape != expected:
            raise ValueError(f"x {tuple(x.shape)}: expected {name} of shape {expected}, found {tuple(tensor.shape)}")
    if 0 in (*x.shape, n):
        raise ValueError(f"nothing to scan in x {tuple(x.shape)} with state size {n}; expected 1 or more of each")
    backend = backend or default_backend(x.device, x.dtype)
    if backend not in BACKENDS:
        raise ValueError(f"unknown scan backend {backend!r}; choose from {', '.join(BACKENDS)}")
    # The flag is what torch.compiler.is_exporting() returns; Dynamo of PyTorch 2.7 to 2.11 takes that call for True.
    if backend != "loop" and (getattr(torch.compiler, "_is_exporting_flag", False) or torch.onnx.is_in_onnx_export()):
        raise RuntimeError(f"the scan backend {backend} cannot be exported; use backend='loop' for exports")
    if backend == "loop":
        # Autocast would change the type of products. A .pt2 file cannot hold this context, so it is for autocast alone.
        mixed = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if mixed else contextlib.nullcontext():
            return _scan_loop(x, delta, A, B, C, D, delta_bias, dt_weight)
    BC = torch.cat([B, C], dim=-1).to(_compute_dtype(x))    # as the GPU kernels read them
    inputs = (x, delta, A, BC, D, delta_bias, None if dt_weight is None else dt_weight.to(delta.dtype))
    if any(t is not None and _is_transformed(t) for t in inputs):
        raise RuntimeError(f"the scan backend {backend} knows backward() alone, not torch.func; use the backend loop")
    return _scan_op(*inputs, backend)[0]


def default_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that selective_scan_2d picks: "triton" on CUDA and "numba" on CPUs, where they are installed;
    elsewhere, and in float64, "torch"."""
    fast = {"cuda": "triton", "cpu": "numba"}.get(device.type)
    return fast if fast and dtype != torch.float64 and not backend_fault(fast) else "torch"


def _compute_dtype(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scan_loop(x, delta, A, B, C, D, delta_bias, dt_weight):
    maps = torch.stack([x] * K, 3), delta, B, C    # ordered in one go: an exported scan has 76 nodes, not 128
    sequences = _to_sequences(torch.cat(maps, -1).to(_compute_dtype(x)))           # Eq. 10
    u, delta, B, C = sequences.permute(1, 2, 0, 3).split([t.shape[-1] for t in maps], -1)    # (B, K, L, .)
    A, D, delta_bias = A.to(u), D[:, None].to(u), delta_bias[:, None].to(u)
    if dt_weight is not None:
        delta = delta @ dt_weight.to(u.dtype).mT                                   # (B, K, L, D)
    y = s6(u, delta, A, B, C, D, delta_bias)                                       # Eq. 11   (B, K, L, D)
    y = _from_sequences(y.permute(2, 0, 1, 3), *x.shape[1:3])                      # (B, H, W, K, D)
    return y.sum(3).to(x.dtype)                                                    # Eq. 12


# -------------------------------------------------------------------------------------------- patch expand and head

class PatchExpand(nn.Module):
    """Linear map, depth to space, LayerNorm: factor times the resolution (Eq. 26; with factor 4 in the head).

    (B, H, W, C_in) -> (B, factor H, factor W, C_out). With Swin, C_out is C_in / 2, so the linear map is C -> 2C.
    """

    def __init__(self, dim_in: int, dim_out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(dim_in, factor ** 2 * dim_out, bias=False)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, z: Tensor) -> Tensor:
        z = self.linear(z).unflatten(-1, (self.factor, self.factor, -1))     # channels are (row, column, c)
        z = z.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)          # (B, pH, pW, C_out)
        return self.norm(z)


class DenseHead(nn.Module):
    """Section 3.5: patch expand by 4 and a linear map, (B, H, W, C) -> (B, 4H, 4W, channels)."""
    recomputed = True    # with activation checkpointing

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.expand = PatchExpand(dim, dim, factor=4)
        self.project = nn.Linear(dim, channels)

    def forward(self, z: Tensor) -> Tensor:
        return self.project(self.expand(z))


# ------------------------------------------------------------------------------------------------------- MTMamba++
# Two changes, which follow the published implementation: SCTM in place of CTM, and LiteHead in place of DenseHead.

class SCTM(nn.Module):
    """S-CTM, the semantic cross-task Mamba block: the tasks' fused features control how each task's own are filtered.

        s     = Conv3x3(Linear(LN(concat_t z^t)))         once                                   TC -> C -> C
        u^t   = LN(z^t)                                   then per task
        x^t   = SiLU(DWConv3x3(W_x^t u^t))                                                       C -> D
        c^t   = W_c^t s                                                                          C -> D
        y^t   = LN(SS2D(x^t; c^t))                        Delta, B and C from c^t, the sequence and D's skip from x^t
        out^t = z^t + W_o^t (y^t * SiLU(W_g^t u^t))                                              D -> C

    In s, no activation or norm follows the linear map and the convolution. These two and the depthwise convolution have
    a bias; the W have none. CTM (F-CTM in MTMamba++'s paper) mixes features. Here the other tasks only influence the
    step sizes and matrices of a task's own scan. d_state, backend: as in CTM.
    """

    def __init__(self, tasks: list[str], dim: int, drop_path: float = 0.0, config: DecoderConfig = PAPER,
                 d_state: int | None = None, backend: str | None = None):
        super().__init__()
        d_inner = EXPANSION * dim
        self.norm_shared = nn.LayerNorm(len(tasks) * dim)
        self.linear_shared = nn.Linear(len(tasks) * dim, dim)
        self.conv_shared = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.norm = per_task(tasks, nn.LayerNorm, dim)
        self.mfe = per_task(tasks, MFE, dim, dim, config, d_state)
        self.cross = per_task(tasks, nn.Linear, dim, d_inner, False)    # no bias, nor in the next two
        self.gate = per_task(tasks, nn.Linear, dim, d_inner, False)
        self.out = per_task(tasks, nn.Linear, d_inner, dim, False)
        self.drop_path = per_task(tasks, DropPath, drop_path)
        set_backend(self, backend)

    def forward(self, z: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: (B, H, W, C)} -> {task: (B, H, W, C)}"""
        s = self.linear_shared(self.norm_shared(torch.cat(list(z.values()), dim=-1)))    # (B, H, W, C)
        s = self.conv_shared(s.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out = {}
        for t, z_t in z.items():
            u = self.norm[t](z_t)                                                        # (B, H, W, C)
            y = self.mfe[t](u, self.cross[t](s))                                         # (B, H, W, D)
            g = F.silu(self.gate[t](u))                                                  # (B, H, W, D)
            out[t] = z_t + self.drop_path[t](self.out[t](y * g))                         # (B, H, W, C)
        return out


class BatchNorm(nn.BatchNorm2d):
    """In training, normalises over the images of all processes. nn.SyncBatchNorm needs CUDA and cannot be compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.synchronised(x) if self.training and _has_processes() else super().forward(x)

    def synchronised(self, x: Tensor) -> Tensor:
        mean, var, n = _batch_statistics(x)                                                  # (C,), (C,), ()
        if self.track_running_stats:
            with torch.no_grad():    # with detach() instead, the second compiled step fails (PyTorch 2.14)
                self.num_batches_tracked.add_(1)
                rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean.to(self.running_mean), rate)
                self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), rate)
        scale = (var + self.eps).rsqrt() * (self.weight if self.affine else 1)
        shift = (self.bias if self.affine else 0) - mean * scale
        scale, shift = (t.to(_compute_dtype(x))[:, None, None] for t in (scale, shift))
        return torch.addcmul(shift, x, scale).to(x.dtype)


class BatchNormAct(BatchNorm, BatchNormAct2d):
    """timm's batch norm with an activation inside."""

    def synchronised(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().synchronised(x)))


def synchronise_batch_norm(module: nn.Module):
    """Makes each batch norm in a module one over all processes. What a class of its own does besides, it still does."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d) and not isinstance(norm, BatchNorm):
            known = {nn.BatchNorm2d: BatchNorm, BatchNormAct2d: BatchNormAct}
            # In another class, super().forward becomes BatchNorm's.
            norm.__class__ = known.get(type(norm)) or type(type(norm).__name__, (type(norm), BatchNorm), {})


class LiteHead(nn.Module):
    """3x3 convolution, batch norm, ReLU, linear map, (B, H, W, C) -> (B, H, W, channels); MTMamba.predict resizes.

    It has 96 channels with every encoder. In training, an image's outputs depend on its whole batch.
    """

    def __init__(self, dim: int, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, 96, kernel_size=3, padding=1)
        self.norm = BatchNorm(96)
        self.project = nn.Linear(96, channels)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)    # as published; all else keeps PyTorch's default

    def forward(self, z: Tensor) -> Tensor:
        z = F.relu(self.norm(self.conv(z.permute(0, 3, 1, 2))))          # (B, 96, H, W)
        return self.project(z.permute(0, 2, 3, 1))


# -------------------------------------------------------------------------------------- window attention and encoder

class WindowMSA(nn.Module):
    """Swin's W-MSA as Tables 3 and 4 use it: windows of 12x12, 6 heads, relative position bias, no shift.

    (B, H, W, C) -> (B, H, W, C), padded to whole windows inside; 6 divides C.
    """
    WINDOW, HEADS = (12, 12), 6

    def __init__(self, dim: int):
        super().__init__()
        check_heads(dim, self.HEADS)
        self.attn = WindowAttention(dim, self.HEADS, window_size=self.WINDOW)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        x = pad_to_windows(x, self.WINDOW)
        windows = self.attn(window_partition(x, self.WINDOW).flatten(1, 2)).unflatten(1, self.WINDOW)
        return window_reverse(windows, self.WINDOW, *x.shape[1:3])[:, :H, :W]


def pad_to_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C), zeros at the bottom and right."""
    H, W = (round_up(n, w) for n, w in zip(x.shape[1:3], window))
    return F.pad(x, (0, 0, 0, W - x.shape[2], 0, H - x.shape[1]))


def check_heads(dim: int, heads: int):
    if dim % heads:
        raise ValueError(f"expected a width that {heads} heads divide, found {dim}; choose an encoder such as Swin")


def pad_before_shift(module: nn.Module) -> nn.Module:
    """Makes timm's Swin blocks in a module pad the map to whole windows before the cyclic shift. Returns the module.

    Differs from timm, which first shifts: that puts the padding into the middle of the shifted map. Swin for dense
    prediction pads first, and so do all published MTMamba weights.
    """
    for block in module.modules():
        if isinstance(block, SwinTransformerBlock):
            block._attn = functools.partial(_padded_attention, block)
    return module


def _padded_attention(block, x):
    return type(block)._attn(block, pad_to_windows(x, block.window_size))[:, :x.shape[1], :x.shape[2]]


def decoder_swin_block(dim: int, heads: int, shift: int, drop_path: float) -> nn.Module:
    """A block of Table 2's Swin baselines: window 12, MLP ratio 4."""
    check_heads(dim, heads)
    # The window stays 12, the mask is made for each input's size, so the resolution given here plays no part.
    return pad_before_shift(SwinTransformerBlock(
        dim, input_resolution=(12, 12), num_heads=heads, window_size=12, shift_size=shift, drop_path=drop_path,
        always_partition=True, dynamic_mask=True))


class Encoder(nn.Module):
    """Section 3.3, Eq. 9: a backbone's features at strides 4, 8, 16, 32, each through its own LayerNorm.

    (B, 3, H, W), H and W multiples of 32 -> four features (B, H/s, W/s, C_s). `channels` holds the four C_s.
    encoder: as in MTMamba. A module returns the four maps, in a list or tuple. Its attribute `channels` tells their
        channels. They are NCHW, unless its attribute `output_fmt` is "NHWC".
    Some of timm's models take images of one size alone, which is img_size padded to multiples of 32.
    """

    def __init__(self, encoder: str | nn.Module, img_size: tuple[int, int], pretrained: bool, kwargs: dict):
        super().__init__()
        self.built_for = None    # the size, where the weights depend on it
        self.frozen, self.pyramid, self.indices = False, None, range(4)
        if isinstance(encoder, nn.Module):
            self.name, self.backbone, self.channels = type(encoder).__name__, encoder, getattr(encoder, "channels", ())
            if len(self.channels) != 4 or pretrained or kwargs.keys() - {"in_chans"}:
                raise ValueError("expected a module with four numbers in its attribute `channels`, without pretrained "
                                 f"and encoder_kwargs, found {self.name} with {self.channels}")
        else:
            self.name = ENCODERS.get(encoder, encoder)
            self.backbone, kwargs = create_backbone(self.name, img_size, kwargs)
            if "img_size" in kwargs and not self.name.startswith("swin_"):
                self.built_for = tuple(to_2tuple(kwargs["img_size"]))
            if pretrained:
                load_pretrained_backbone(self.backbone, self.name, kwargs)
            pad_before_shift(self.backbone)
            strides, channels = self.backbone.feature_info.reduction(), self.backbone.feature_info.channels()
            if len(set(strides)) == 1:
                self.pyramid = FeaturePyramid(channels[-1], patch=strides[-1])
                self.channels = self.pyramid.channels
            elif set(ENCODER_STRIDES) <= set(strides):
                self.indices = [strides.index(stride) for stride in ENCODER_STRIDES]
                self.channels = [channels[i] for i in self.indices]
            else:
                raise ValueError(f"expected features at strides {ENCODER_STRIDES}, or a plain ViT; found {self.name!r} "
                                 f"with {tuple(strides)}")
        self.channels_last = str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC")
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        H, W = image.shape[2:]
        try:
            features = self.backbone(self.pyramid.resize(image) if self.pyramid else image)
        except (AssertionError, RuntimeError) as error:
            if self.built_for in (None, (H, W)):
                raise
            raise ValueError(f"{self.name} was built for images {self.built_for}, found {H, W}: {error}") from error
        features = self.pyramid(features[-1]) if self.pyramid else [features[i] for i in self.indices]
        if not self.channels_last:
            features = [f.permute(0, 2, 3, 1) for f in features]
        expected = [(H // stride, W // stride, c) for stride, c in zip(ENCODER_STRIDES, self.channels)]
        found = [tuple(f.shape[1:]) for f in features]
        if found != expected:
            raise ValueError(f"expected maps (h, w, channels) {expected} of {self.name} for an image of {H}x{W}, "
                             f"found {found}; try multiples of 64 or another encoder")
        return [norm(f) for norm, f in zip(self.norms, features)]

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def set_grad_checkpointing(self, enable: bool):
        """timm's own, switched on in each stage: it recomputes a block at a time. The backbone's would take a stage."""
        stages = [m for m in self.backbone.modules() if m is not self.backbone and hasattr(m, "grad_checkpointing")]
        for module in stages or [self.backbone]:
            module.grad_checkpointing = enable and not has_batch_norm(module)


class FeaturePyramid(nn.Module):
    """Four maps from the tokens of a plain ViT, the simple feature pyramid of ViTDet (https://arxiv.org/abs/2203.16527):
    tokens (B, C, H/16, W/16) -> (B, C_s, H/s, W/s) with C/4, C/2, C and C channels.

    Differs from ViTDet: its last two convolutions, to 256 channels, are left out, as the decoder takes any widths.
    """

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.patch, self.channels = patch, [dim // 4, dim // 2, dim, dim]
        double = functools.partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        self.maps = nn.ModuleList([
            nn.Sequential(double(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), double(dim // 2, dim // 4)),
            double(dim, dim // 2), nn.Identity(), nn.MaxPool2d(2)])

    def resize(self, image: Tensor) -> Tensor:
        """Resizes (B, 3, H, W) so that there are H/16 x W/16 patches: to 14/16 of the size for patches of 14 pixels."""
        size = [n * self.patch // 16 for n in image.shape[2:]]
        return image if self.patch == 16 else F.interpolate(image, size, mode="bilinear")

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return [make(tokens) for make in self.maps]


def create_backbone(name: str, img_size: tuple[int, int], kwargs: dict) -> tuple[nn.Module, dict]:
    """timm's features_only model and its arguments: with stochastic depth, unless the model has none. Arguments that
    fetch or read files count in load_pretrained_backbone alone, so nothing is fetched on a checkpoint's word."""
    if not timm.is_model(name):
        raise ValueError(f"unknown encoder {name!r}; choose from {', '.join(ENCODERS)} or timm.list_models()")
    fixed = timm.models.get_pretrained_cfg_value(name, "fixed_input_size")
    size = {"img_size": tuple(round_up(n, ENCODER_STRIDES[-1]) for n in img_size)} if fixed else {}
    # Swin: any input size, windows keep theirs. Others: windows for each image, or position embeddings resized to it.
    windows = {"strict_img_size": False} | ({"always_partition": True} if name.startswith("swin_") else {})
    sizes = size | windows, {"dynamic_img_size": True}, size
    plain = {key: value for key, value in kwargs.items()
             if not key.startswith(("pretrained", "checkpoint", "cache", "hf_hub"))}
    for added in [size | rate for size in sizes for rate in ({"drop_path_rate": ENCODER_DROP_PATH}, {})]:
        try:
            return timm.create_model(name, features_only=True, **added | plain), added | kwargs
        except TypeError as error:    # an argument that this model does not have
            refused = error
    raise ValueError(f"the encoder {name} refuses its arguments {kwargs}: {refused}") from refused


def load_pretrained_backbone(backbone: nn.Module, name: str, kwargs: dict):
    """Copies timm's pretrained weights from the whole classifier, of which alone timm reports that one is missing."""
    try:
        source = timm.create_model(name, pretrained=True, **kwargs).state_dict()
    except Exception as error:    # of what kind depends on the library that downloads
        reason, address = " ".join(str(error).split())[:300], timm.models.get_pretrained_cfg_value(name, "hf_hub_id")
        raise ValueError(f"cannot load timm's weights of {name} ({type(error).__name__}: {reason}); train without, "
                         f"--no-pretrained, or give a file of https://huggingface.co/{address} with --encoder-kwargs "
                         """'{"pretrained_cfg_overlay": {"file": "model.safetensors"}}'""") from error
    # timm joins the names of the first two levels with "_" (layers.0 becomes layers_0), or puts "model." in front.
    flat = {key.replace(".", "_"): value for key, value in source.items()}
    names = {key: key.removeprefix("model.").replace(".", "_") for key in backbone.state_dict()}
    backbone.load_state_dict({key: flat[name] for key, name in names.items() if name in flat})


# --------------------------------------------------------------------------------------------- appendix: the scan, fast
#
# All backends but "loop" are one operator, into which torch.compile does not look, with a backward pass of its own. The
# inputs and some of the states are saved for it; it computes the other states again.

_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor BC, Tensor D, Tensor delta_bias, Tensor? dt_weight, str backend"


@torch.library.custom_op("mtmamba::selective_scan_2d", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)")
def _scan_op(*inputs):
    """y (B, H, W, D) and the states to be saved. BC (B, H, W, K, 2N) holds B and C, in float32 or float64."""
    x, _, A, *_, backend = inputs
    _expect_backend(backend, x)
    forward, _ = _SCANS[backend]
    states = _scan_states(x, A, backend)
    with torch.autocast(x.device.type, enabled=False):
        return forward(states, *_scan_operands(*inputs)).to(x.dtype), states


def _scan_states(x, A, backend):
    """Memory for the states at the starts of chunks or segments."""
    (batch, H, W, d), n = x.shape, A.shape[-1]
    steps = _triton_segment(batch, H * W, d) if backend == "triton" else CHUNK
    chunks = (H * W + steps - 1) // steps
    shapes = {"torch": (chunks, batch, K, n, d), "numba": (batch, K, chunks, n, round_up(d, BLOCK)),
              "triton": (2, batch, 2, chunks, n, d), "mamba_ssm": (0,)}
    return x.new_empty(shapes[backend], dtype=_compute_dtype(x))


_scan_op.register_fake(lambda x, delta, A, *others: (x.new_empty(x.shape), _scan_states(x, A, others[-1])))


@torch.library.custom_op("mtmamba::selective_scan_2d_backward", mutates_args=(),
                         schema=f"(Tensor grad_y, Tensor states, {_INPUTS}) -> Tensor[]")
def _scan_backward_op(grad_y, states, *inputs):
    """Gradients of B and C (2, B, H, W, K, N); of the parameters (N + 2, K, D), N rows of A, one of D and one of
    delta_bias, in float32 or float64; of x and delta; and of dt_weight, if there is one."""
    x, delta, *_, dt_weight, backend = inputs
    _, backward = _SCANS[backend]
    with torch.autocast(x.device.type, enabled=False):
        operands = _scan_operands(*inputs)
        gx, g_delta, gBC, g_parameters = backward(grad_y.to(operands[0].dtype), states, *operands)
        grads = [gBC, g_parameters, gx.to(x.dtype), g_delta.to(delta.dtype)]
        if dt_weight is not None:
            low_rank, weight = delta.to(g_delta.dtype), dt_weight.to(g_delta.dtype)
            grads[3] = torch.einsum("bhwkd,kdr->bhwkr", g_delta, weight).to(delta.dtype)
            grads.append(torch.einsum("bhwkd,bhwkr->kdr", g_delta, low_rank).to(dt_weight.dtype))
    return [g.contiguous() for g in grads]


@_scan_backward_op.register_fake
def _scan_backward_fake(grad_y, states, x, delta, A, BC, D, delta_bias, dt_weight, backend):
    n, like = A.shape[2], [t for t in (x, delta, dt_weight) if t is not None]
    return [BC.new_empty(2, *BC.shape[:4], n), BC.new_empty(n + 2, *A.shape[:2]), *(t.new_empty(t.shape) for t in like)]


def _scan_setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *tensors)


def _scan_autograd(ctx, grad_y, grad_states):
    if grad_y is None:    # gradcheck tries it; grad_states is None always, as the states are only saved
        return (None,) * 8
    gBC, g_parameters, gx, g_delta, *g_weight = _scan_backward_op(grad_y, *ctx.saved_tensors, ctx.backend)
    gA, gD, g_bias = g_parameters[:-2].permute(1, 2, 0), g_parameters[-2], g_parameters[-1]
    return gx, g_delta, gA, torch.cat([*gBC], dim=-1), gD, g_bias, *(g_weight or [None]), None


def _scan_second_derivative(ctx, *grads):
    raise RuntimeError("this scan backend has no second derivatives; use the backend loop, which has them")


_scan_op.register_autograd(_scan_autograd, setup_context=_scan_setup_context)
_scan_backward_op.register_autograd(_scan_second_derivative)


def _scan_flops(x, delta, A, BC, D, delta_bias, dt_weight, *_, **__):
    """Of the forward operator, from its shapes, for PyTorch's FlopCounterMode: 2 per multiply-add, of which there are
    9 N + 1 per step and channel, as in the paper's counts, and R to expand delta."""
    return 2 * math.prod(x) * A[0] * (9 * A[-1] + 1 + (0 if dt_weight is None else dt_weight[-1]))


flop_registry[torch.ops.mtmamba.selective_scan_2d] = shape_wrapper(_scan_flops)
flop_registry[torch.ops.mtmamba.selective_scan_2d_backward] = shape_wrapper(
    lambda grad_y, states, *shapes, **_: 2 * _scan_flops(*shapes))


def _scan_operands(x, delta, A, BC, D, delta_bias, dt_weight, backend):
    """The operator's inputs in the type that we compute in, with delta expanded to (B, H, W, K, D)."""
    dtype = _compute_dtype(x)
    if backend != "triton":    # whose kernels read these in any type
        x, delta = x.to(dtype), delta.to(dtype)
    if dt_weight is not None:
        delta = torch.einsum("bhwkr,kdr->bhwkd", delta, dt_weight.to(delta.dtype))
    return x, delta, A.to(dtype), BC, D.to(dtype), delta_bias.to(dtype)


def _parameter_gradients(gA, gD, g_bias):
    """(K, N, D), (K, D), (K, D) -> (N + 2, K, D)"""
    return torch.cat([gA.transpose(0, 1), gD[None], g_bias[None]])


def _is_transformed(t):
    """Whether jvp or torch.func.grad differentiates t. A custom operator would drop jvp's tangents in silence."""
    if torch.compiler.is_dynamo_compiling():    # Dynamo knows it of the program, not of a tensor
        return forward_ad._current_level >= 0
    return torch._C._functorch.is_gradtrackingtensor(t) or forward_ad.unpack_dual(t).tangent is not None


def _to_sequences(t: Tensor) -> Tensor:
    """A map (B, H, W, K or 1, X) -> sequences (L, B, K, X), each direction in its order. 1: all read the same."""
    return torch.stack([expand(t[:, :, :, k % t.shape[3]].movedim(0, 2), k) for k in range(K)], dim=2)


def _from_sequences(t: Tensor, H: int, W: int) -> Tensor:
    """(L, B, K, X) -> (B, H, W, K, X), every direction's steps back in place: the inverse of _to_sequences."""
    return torch.stack([merge(t[:, :, k], k, H, W) for k in range(K)], dim=3).movedim(2, 0)


@torch.inference_mode(False)
def check_scan(model: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False):
    """Runs the scan of a model's SS2Ds on its device and compares y and, in training mode, all gradients with `loop` in
    float64 on the CPU, "triton" with segments of each length. Raises RuntimeError where they differ. PyTorch's random
    numbers are untouched. dtype: of autocast, compared beside float32. compiled: the scan behind torch.compile, too.
    """
    global SEGMENTS
    usual = SEGMENTS
    for ss2d in {m.d_state: m for m in model.modules() if isinstance(m, SS2D)}.values():
        backend = ss2d.backend or default_backend(ss2d.D.device)
        lengths = [(length,) for length in usual] if backend == "triton" else [usual]
        cases = [(kind, segments, False) for kind in {torch.float32, dtype} for segments in lengths]
        try:
            for kind, segments, behind_compile in cases + [(dtype, usual, True)] * compiled:
                SEGMENTS = segments
                _scan_compare(backend, ss2d.d_state, ss2d.D.device, kind, ss2d.training, behind_compile)
        finally:
            SEGMENTS = usual


def _scan_compare(backend, N, device, kind, gradients, compiled):
    tolerance = 1e-4 if kind == torch.float32 else 8 * torch.finfo(kind).eps
    for name, result in _scan_results(backend, N, device, kind, gradients, compiled).items():
        expected = _scan_reference(N)[name]
        difference = ((result - expected).abs().max() / expected.abs().max()).item()
        if not difference <= tolerance:
            other = "loop" if backend == "torch" else "torch"
            machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device
            versions = {name: sys.modules[name].__version__ for name in ("torch", backend) if name in sys.modules}
            raise RuntimeError(f"the scan backend {backend} computes something else than in float64 on the CPU: {name} "
                               f"is off by {difference:.1e} of its largest value, more than {tolerance:.0e} ({kind}, "
                               f"{'compiled, ' * compiled}segments {SEGMENTS}, {machine}, {versions}); "
                               f"give {'--no-compile or ' * compiled}--backend {other}")


CHECKED = (2, 9, 31, 70)    # (B, H, W, D): several chunks or segments and a part of one, as of blocks of channels


def _scan_results(backend, N, device, dtype, gradients, compiled):
    """Of fixed inputs: y and, if asked for, gradients, as float64 on the CPU. dtype: of x, delta and autocast."""
    generator, (*pixels, D) = torch.Generator().manual_seed(0), CHECKED

    def normal(*shape):    # numbers that are the same in each float type
        return torch.randn(shape, generator=generator).bfloat16().double()
    inputs = dict(x=normal(*CHECKED), delta=normal(*pixels, K, 3), A=-torch.arange(1, N + 1) * normal(K, D, N).exp(),
                  B=normal(*pixels, K, N), C=normal(*pixels, K, N), D=normal(K, D), dt_weight=normal(K, D, 3),
                  delta_bias=normal(K, D) - 4)    # softplus(-4) = 0.02, as at the start of training
    half = dtype.itemsize == 2
    leaves = {name: t.to(device, torch.float32 if half and name not in ("x", "delta") else dtype, copy=True)
              .requires_grad_(gradients) for name, t in inputs.items()}
    scan = torch.compile(selective_scan_2d, fullgraph=True, dynamic=False) if compiled else selective_scan_2d
    with torch.autocast(device.type, dtype, enabled=half), torch.set_grad_enabled(gradients):
        results = {"y": scan(**leaves, backend=backend)}
        if gradients:
            grads = torch.autograd.grad(results["y"], [*leaves.values()], normal(*CHECKED).to(results["y"]))
            results |= {f"the gradient of {name}": g for name, g in zip(leaves, grads)}
    return {name: t.detach().cpu().double() for name, t in results.items()}


@functools.cache
def _scan_reference(N):
    return _scan_results("loop", N, torch.device("cpu"), torch.float64, gradients=True, compiled=False)


# The backend "torch". Sequences are cut into chunks. Inside a chunk, everything but the recurrence itself is done for
# all steps at once, so that a step costs a single multiply-add. The forward pass keeps the state at each chunk's start.
# Shapes inside are (steps, B, K, N, D): each step is a contiguous block, wide enough for vector instructions.
CHUNK = 32    # steps; also of the backend "numba"


def _torch_forward(states, x, delta, A, BC, D, delta_bias):
    u, z, A, B, C, chunks = _torch_inputs(x, delta, A, BC, delta_bias)
    step, y = F.softplus(z), D * u
    h = torch.zeros_like(states[0])
    for i, now in enumerate(chunks):
        states[i] = h
        _, H = _torch_chunk(h, step[now], u[now], A, B[now])
        y[now] += (C[now].unsqueeze(3) @ H[1:]).squeeze(3)                                      # Eq. 4
        h = H[-1]
    return _from_sequences(y, *x.shape[1:3]).sum(3)                                             # Eq. 12


def _torch_backward(grad_y, states, x, delta, A, BC, D, delta_bias):
    u, z, A, B, C, chunks = _torch_inputs(x, delta, A, BC, delta_bias)
    step, gy = F.softplus(z), _to_sequences(grad_y.unsqueeze(3))
    step_u = step * u
    g_step, g_step_u, gB, gC = (torch.empty_like(t) for t in (u, u, B, C))
    gA, g_next = torch.zeros_like(A), torch.zeros_like(states[0])
    for i, now in reversed([*enumerate(chunks)]):
        A_bar, H = _torch_chunk(states[i], step[now], u[now], A, B[now])
        # G[t]: gradient of the state after step t. Eq. 4 gives gy C; Eq. 3 adds A_bar of the next step times its G.
        G = gy[now].unsqueeze(3) * C[now].unsqueeze(4)
        G[-1] += g_next
        for t in reversed(range(len(G) - 1)):
            G[t].addcmul_(A_bar[t + 1], G[t + 1])
        g_next = A_bar[0] * G[0]
        gC[now] = (H[1:] @ gy[now].unsqueeze(4)).squeeze(4)
        gB[now] = (G @ step_u[now].unsqueeze(4)).squeeze(4)
        g_step_u[now] = (B[now].unsqueeze(3) @ G).squeeze(3)
        G.mul_(A_bar).mul_(H[:-1])    # from here on of the exponent Delta A in Eq. 5
        g_step[now] = (G * A).sum(3)
        gA += (G * step[now].unsqueeze(3)).sum((0, 1))
    g_delta = (g_step + g_step_u * u) * z.sigmoid()
    gx, g_delta, gB, gC = (_from_sequences(g, *x.shape[1:3]) for g in (g_step_u * step + gy * D, g_delta, gB, gC))
    return (gx.sum(3), g_delta, torch.stack([gB, gC]),
            _parameter_gradients(gA, (gy * u).sum((0, 1)), g_delta.sum((0, 1, 2))))


def _torch_inputs(x, delta, A, BC, delta_bias):
    """u, Delta before softplus, A (K, N, D), B, C as sequences (L, B, K, .), and the chunks of steps."""
    delta, B, C, u = (_to_sequences(t) for t in (delta + delta_bias, *BC.chunk(2, dim=-1), x.unsqueeze(3)))
    chunks = [slice(start, start + CHUNK) for start in range(0, len(u), CHUNK)]
    return u, delta, A.transpose(1, 2).contiguous(), B, C, chunks


def _torch_chunk(h, step, u, A, B):
    """From state h on: A_bar of each step (T, B, K, N, D), Eq. 5, and the states (T + 1, ...), [t] before step t."""
    A_bar = (step.unsqueeze(3) * A).exp_()
    H = torch.cat([h[None], (step * u).unsqueeze(3) * B.unsqueeze(4)])                          # B_bar x
    for a, before, after in zip(A_bar, H, H[1:]):
        after.addcmul_(a, before)                                                               # Eq. 3
    return A_bar, H


# The backend "numba", for CPUs. A unit of work is one image, one direction and BLOCK channels; PyTorch's number of
# threads share the units. The maps stay in place: the pixel is computed from the step. A unit works on CHUNK steps at
# a time, for one of the N states after the other, so that all it reads and writes inside fits into the L1 cache.
# The units, and so all sums, are the same for any number of threads: equal inputs give equal bits.
BLOCK = 64    # channels, whose loops become vector instructions


@functools.cache
def _numba_kernels(stored):
    """The functions forward and backward, by name. Each does the units first, .., last - 1. Each is compiled when it is
    first called, in one to two seconds, and `stored` for later processes in __pycache__ or the user's cache.

    x (B, L, D), delta (B, L, K, D), B, C (B, L, K, N), bias (K, D). A (K, N, D) comes multiplied by log2(e), for exp2.
    states (B, K, chunks, N, D): at the chunks' starts, zeros before the first.
    """
    # Numba cannot reload stored code that uses closures. So what the kernels use is global.
    global single, integer, log2_e, ln_2, shift, stack, wide_vectors, power_of_2, exp2, softplus, pixel
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    single, integer = types.float32, types.int64
    log2_e, ln_2 = single(math.log2(math.e)), single(math.log(2))
    shift = single(1.5 * 2 ** 23 + 127)    # added to z, it rounds z and leaves 127 + the integer in the lowest bits
    # Vector instructions add up sums in another order, which `reassoc` permits. exp2 needs the order as written.
    jit = njit(nogil=True, fastmath={"contract", "reassoc", "nsz"})
    strict = njit(nogil=True, fastmath={"contract"})

    @intrinsic
    def stack(typing_context, kind):
        """Memory for CHUNK x BLOCK numbers. No array overlaps it, so vector instructions need no checks."""
        def generate(context, builder, signature, arguments):
            pointer = cgutils.alloca_once(builder, context.get_value_type(kind.dtype), CHUNK * BLOCK)
            pointer.align = 64
            return pointer
        return types.CPointer(kind.dtype)(kind), generate

    @intrinsic
    def wide_vectors(typing_context):
        """Allows vectors of 512 bits in a function: a fifth less time. LLVM avoids them, as programs that use few of
        them get slower. `backward` does without, so that its sums have the same bits as on CPUs with 256 bits."""
        def generate(context, builder, signature, arguments):
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')    # attributes.add accepts few names
            return context.get_dummy_value()
        return types.none(), generate

    @intrinsic
    def power_of_2(typing_context, shifted):
        """z + shift -> 2 ** (z rounded): its lowest bits become the exponent of a float32."""
        def generate(context, builder, signature, arguments):
            bits = builder.bitcast(arguments[0], context.get_value_type(types.int32))
            return builder.bitcast(builder.shl(bits, bits.type(23)), arguments[0].type)
        return types.float32(types.float32), generate

    @strict
    def exp2(z):
        """2 ** z for z <= 127, error 1e-7; 0 below -127, NaN for NaN. The polynomial is for -0.5 <= f <= 0.5."""
        z = single(-127) if z < single(-127) else z
        shifted = z + shift
        f = z - (shifted - shift)
        p = single(0.00961802560) + f * (single(0.00134004322) + f * single(0.000154697320))
        p = single(0.693147207) + f * (single(0.240226512) + f * (single(0.0555032721) + f * p))
        return (single(1) + f * p) * power_of_2(shifted)

    @strict
    def softplus(z):
        """Delta, Eq. 8; the series is that of _triton_softplus."""
        e = exp2(abs(z) * -log2_e)
        p = single(-0.107681731) + e * (single(0.0440896391) + e * single(-0.0085392092))
        p = single(0.3327548) + e * (single(-0.244954639) + e * (single(0.177452434) + e * p))
        return max(z, single(0)) + e * (single(0.999999806) + e * (single(-0.499974054) + e * p))

    @strict
    def pixel(t, k, H, W):
        t = t if k < 2 else H * W - 1 - t
        return t if k % 2 == 0 else t % H * W + t // H

    @jit
    def forward(first, last, x, delta, A, B, C, bias, states, y, H, W):
        """Fills y (K, B, L, D), without the skip of Eq. 2, and the states."""
        wide_vectors()
        blocks, N, L = x.shape[2] // BLOCK, A.shape[1], H * W
        pixels, A_n, h = stack(integer), stack(single), stack(single)
        step, step_u, y_chunk = stack(single), stack(single), stack(single)
        for unit in range(first, last):
            b, k, d = unit // (K * blocks), unit // blocks % K, unit % blocks * BLOCK    # d: the first channel
            own = slice(d, d + BLOCK)    # d + i as an index would be slower: Numba checks whether it is negative
            for chunk in range(states.shape[2]):
                steps = min(CHUNK, L - chunk * CHUNK)
                for t in range(steps):
                    pixels[t] = p = pixel(chunk * CHUNK + t, k, H, W)
                    u, z, bias_k = x[b, p, own], delta[b, p, k, own], bias[k, own]
                    for i in range(BLOCK):
                        j = t * BLOCK + i
                        step[j] = s = softplus(z[i] + bias_k[i])
                        step_u[j] = s * u[i]
                        y_chunk[j] = 0
                for n in range(N):
                    A_row, before = A[k, n, own], states[b, k, chunk, n, own]
                    for i in range(BLOCK):
                        A_n[i], h[i] = A_row[i], before[i]
                    for t in range(steps):
                        B_t, C_t = B[b, pixels[t], k, n], C[b, pixels[t], k, n]
                        for i in range(BLOCK):
                            j = t * BLOCK + i
                            h[i] = now = exp2(step[j] * A_n[i]) * h[i] + B_t * step_u[j]          # Eq. 5, 3
                            y_chunk[j] += C_t * now                                             # Eq. 4
                    if chunk + 1 < states.shape[2]:
                        after = states[b, k, chunk + 1, n, own]
                        for i in range(BLOCK):
                            after[i] = h[i]
                for t in range(steps):
                    y_row = y[k, b, pixels[t], own]
                    for i in range(BLOCK):
                        y_row[i] = y_chunk[t * BLOCK + i]

    @jit
    def backward(first, last, x, delta, A, B, C, bias, states, gy, g_next, gx, g_delta, gA, gB, gC, H, W):
        """Fills gx (K, B, L, D), without the skip, g_delta (B, L, K, D) and gB, gC (blocks, B, L, K, N). Adds to gA
        (B, K, N, D). g_next, of the same shape, carries the gradients of the states from chunk to chunk; 0 at first."""
        blocks, N = x.shape[2] // BLOCK, A.shape[1]
        pixels, A_n, h, g, gA_n = stack(integer), stack(single), stack(single), stack(single), stack(single)
        step, step_u, gy_chunk, A_bar = stack(single), stack(single), stack(single), stack(single)
        before, g_step, g_step_u = stack(single), stack(single), stack(single)
        for unit in range(first, last):
            b, k, d = unit // (K * blocks), unit // blocks % K, unit % blocks * BLOCK
            own = slice(d, d + BLOCK)
            for chunk in range(states.shape[2] - 1, -1, -1):
                steps = min(CHUNK, H * W - chunk * CHUNK)
                for t in range(steps):
                    pixels[t] = p = pixel(chunk * CHUNK + t, k, H, W)
                    u, z, bias_k, gy_row = x[b, p, own], delta[b, p, k, own], bias[k, own], gy[b, p, own]
                    for i in range(BLOCK):
                        j = t * BLOCK + i
                        step[j] = s = softplus(z[i] + bias_k[i])
                        step_u[j], gy_chunk[j] = s * u[i], gy_row[i]
                        g_step[j] = g_step_u[j] = 0
                for n in range(N):
                    A_row, start = A[k, n, own], states[b, k, chunk, n, own]
                    g_row, gA_row = g_next[b, k, n, own], gA[b, k, n, own]
                    for i in range(BLOCK):
                        A_n[i], h[i], g[i], gA_n[i] = A_row[i], start[i], g_row[i], gA_row[i]
                    for t in range(steps):
                        B_t, gC_t = B[b, pixels[t], k, n], single(0)
                        for i in range(BLOCK):
                            j = t * BLOCK + i
                            A_bar[j] = decay = exp2(step[j] * A_n[i])
                            before[j] = h[i]
                            h[i] = now = decay * h[i] + B_t * step_u[j]
                            gC_t += gy_chunk[j] * now
                        gC[d // BLOCK, b, pixels[t], k, n] = gC_t
                    for t in range(steps - 1, -1, -1):
                        B_t, C_t, gB_t = B[b, pixels[t], k, n], C[b, pixels[t], k, n], single(0)
                        for i in range(BLOCK):
                            j = t * BLOCK + i
                            after = g[i] + C_t * gy_chunk[j]     # of the state after step t, Eq. 4 and 3
                            gB_t += after * step_u[j]
                            g_step_u[j] += after * B_t
                            g[i] = now = after * A_bar[j]        # of the state before
                            exponent = now * before[j]           # of Delta A in Eq. 5
                            g_step[j] += exponent * A_n[i]
                            gA_n[i] += exponent * step[j]
                        gB[d // BLOCK, b, pixels[t], k, n] = gB_t
                    for i in range(BLOCK):
                        g_row[i], gA_row[i] = g[i], gA_n[i]
                for t in range(steps):
                    p = pixels[t]
                    u, z, bias_k = x[b, p, own], delta[b, p, k, own], bias[k, own]
                    gx_row, g_z = gx[k, b, p, own], g_delta[b, p, k, own]
                    for i in range(BLOCK):
                        j = t * BLOCK + i
                        derivative = exp2((z[i] + bias_k[i] - step[j]) * log2_e)    # of softplus: exp(z - Delta)
                        g_z[i] = (g_step[j] * ln_2 + g_step_u[j] * u[i]) * derivative
                        gx_row[i] = g_step_u[j] * step[j]

    if stored:
        with contextlib.suppress(RuntimeError):    # no folder to write to
            forward.enable_caching()
            backward.enable_caching()
    return {"forward": forward, "backward": backward}


def _numba_forward(states, x, delta, A, BC, D, delta_bias):
    inputs = _numba_inputs(x, delta, A, BC, delta_bias)
    y = x.new_empty(K, *inputs[0].shape)
    states[:, :, 0] = 0
    _numba_run("forward", x, *inputs, states, y)
    return y.sum(0)[..., :x.shape[3]].reshape(x.shape) + x * D.sum(0)                           # Eq. 12


def _numba_backward(grad_y, states, x, delta, A, BC, D, delta_bias):
    inputs = _numba_inputs(x, delta, A, BC, delta_bias)
    batch, L, d = inputs[0].shape
    g_next, gA = x.new_zeros(2, batch, K, A.shape[-1], d)
    gx, g_delta = x.new_empty(K, batch, L, d), x.new_empty(batch, L, K, d)
    gBC = x.new_empty(2, d // BLOCK, batch, L, K, A.shape[-1])
    _numba_run("backward", x, *inputs, states, _numba_blocks(grad_y.flatten(1, 2)), g_next, gx, g_delta, gA, *gBC)
    gx, gA, g_delta = (g[..., :x.shape[3]] for g in (gx.sum(0), gA.sum(0), g_delta))
    gD = (grad_y * x).sum((0, 1, 2)).expand(K, -1)
    return (gx.reshape(x.shape) + grad_y * D.sum(0), g_delta.reshape(delta.shape),
            gBC.sum(1).unflatten(2, x.shape[1:3]), _parameter_gradients(gA, gD, g_delta.sum((0, 1))))


def _numba_inputs(x, delta, A, BC, delta_bias):
    x, delta, B, C = (t.flatten(1, 2) for t in (x, delta, *BC.chunk(2, dim=-1)))
    x, delta, A, delta_bias = map(_numba_blocks, (x, delta, A.transpose(1, 2) * math.log2(math.e), delta_bias))
    # A copy of the one parameter: FSDP resizes its memory, and numpy() would forbid that.
    return x, delta, A, B.contiguous(), C.contiguous(), delta_bias.clone()


def _numba_blocks(t):
    """Its last dimension filled up to whole blocks of channels, with zeros."""
    missing = -t.shape[-1] % BLOCK
    return (F.pad(t, (0, missing)) if missing else t).contiguous()


def _numba_run(name, x, *tensors):
    """Runs one of _numba_kernels on all units, in several parts per thread, as some threads are slower."""
    kernels, arrays = _numba_kernels(stored=True), [t.detach().numpy() for t in tensors]
    threads, units = torch.get_num_threads(), len(x) * K * (tensors[0].shape[2] // BLOCK)
    parts = min(units, 4 * threads)

    def run(part):
        arguments = units * part // parts, units * (part + 1) // parts, *arrays, *x.shape[1:3]
        try:
            kernels[name](*arguments)
        except Exception:    # before it ran: stored code is damaged, or the disk is full
            kernels[name] = _numba_kernels(stored=False)[name]
            kernels[name](*arguments)
    share = _pool(threads, os.getpid()).map if threads > 1 else map
    list(share(run, range(parts)))


@functools.cache
def _pool(threads, process):
    """One per process, because a fork does not copy threads. Its threads do not spin."""
    return ThreadPoolExecutor(threads, "mtmamba")


def _run_mamba_ssm(x, delta, A, BC, D, delta_bias, grad):
    """The kernel's inputs and y. The kernel has channels first, (B, K D, L); the directions are its groups."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    maps = x.unsqueeze(3), delta, *BC.chunk(2, dim=-1)
    u, delta, B, C = (_to_sequences(t).permute(1, 2, 3, 0) for t in maps)                             # (B, K, ., L)
    read = [t.detach().contiguous().requires_grad_(grad) for t in (
        u.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), B, C, D.flatten(), delta_bias.flatten())]
    with torch.set_grad_enabled(grad):
        return read, selective_scan_fn(*read[:6], delta_bias=read[6], delta_softplus=True)


def _mamba_ssm_forward(states, x, *operands):
    _, y = _run_mamba_ssm(x, *operands, grad=False)
    return _from_sequences(y.unflatten(1, (K, -1)).permute(3, 0, 1, 2), *x.shape[1:3]).sum(3)         # Eq. 12


def _mamba_ssm_backward(grad_y, states, x, *operands):
    read, y = _run_mamba_ssm(x, *operands, grad=True)
    grad_y = _to_sequences(grad_y.unsqueeze(3)).permute(1, 2, 3, 0).flatten(1, 2)
    gu, g_delta, gA, gB, gC, gD, g_bias = torch.autograd.grad(y, read, grad_y)
    maps = gu.unflatten(1, (K, -1)), g_delta.unflatten(1, (K, -1)), gB, gC
    gu, g_delta, gB, gC = (_from_sequences(g.permute(3, 0, 1, 2), *x.shape[1:3]) for g in maps)
    return (gu.sum(3), g_delta, torch.stack([gB, gC]),
            _parameter_gradients(gA.unflatten(0, (K, -1)).mT, gD.view(K, -1), g_bias.view(K, -1)))


# The backend "triton". The map stays in place: directions k and k + 2, a pair, share an order of the pixels (row-major
# or column-major), which one walks upwards, the other downwards. That order is cut into segments, which programs work
# on in parallel. A state is linear in an earlier one: a segment turns its start state h into exp(A sum(Delta)) h + e,
# where e is its end state for h = 0. Three passes: e of all segments (_triton_segments), their start states
# (_triton_combine), the outputs (_triton_outputs). The backward pass does the same with the gradients of the states,
# against the walk (_triton_gradients), and computes the states again from the start states, which were saved.
#
# - All arithmetic is in float32. No sum depends on the order in which programs run: equal inputs give equal bits.
# - A program is a single warp. Its tiles are (state, channel), neighbouring channels in neighbouring lanes and up to
#   TILE_N states of a channel in one thread, where the sum over states of Eq. 4 costs nothing. Lanes exchange data in
#   _triton_gradients alone: B and C, which it keeps one state per lane, and the sums over channels in their gradients.
# - A program reads back only what it has written itself (y, gx, g_ends, gA), after a barrier.
# - Lanes beyond the last channel work on zeros and write nothing.
# - tests/test_scan.py runs them in Triton's interpreter, tests/compile_kernels.py compiles them and counts what they
#   cost, tests/gpu.py checks and measures them on a GPU.
SEGMENTS = (16, 32, 64, 128)          # steps; at 128 and N = 16 the saved states are as large as x in bfloat16
SEGMENT_CHANNELS = 2 ** 17            # of all programs: fills 128 multiprocessors with 32 warps each
STEPS = 8                             # whose decays and states are held in registers; a power of 2, divides SEGMENTS
TILE_N = 16                           # states at a time: with more, a thread's tiles do not fit into its registers
BLOCK_D = 64                          # channels of a program, 2 per thread
BLOCK_D_ADJOINT = 32                  # where four tiles are live
LOG2_E = constexpr and constexpr(math.log2(math.e))


def _jit(kernel):
    # Where Triton knows that 16 divides D or a stride, it hands several neighbouring channels to a thread, and not the
    # same ones for every tensor. Kernels read back what they have stored, so each channel must stay with its thread.
    sizes = "D delta_pixel delta_k H W segments batch".split()
    return triton.jit(kernel, do_not_specialize=sizes) if triton else kernel


@_jit
def _triton_program(segments, D, BLOCK: constexpr):
    """What the program works on: channels (BLOCK,), segment, and the rest of its number."""
    program, blocks = tl.program_id(0), tl.cdiv(D, BLOCK)
    d = program % blocks * BLOCK + tl.arange(0, BLOCK)
    program = program // blocks
    return d, program % segments, program // segments


@_jit
def _triton_walk(segment, k, H, W, SEGMENT: constexpr, done):
    """Direction k through a segment: its pixel after `done` steps, how far on the next one is, and the number of its
    steps, fewer in the last segment."""
    start = segment * SEGMENT
    steps = tl.minimum(SEGMENT, H * W - start)
    place = start + tl.where(k < 2, done, steps - 1 - done)
    pixel = tl.where(k % 2 == 0, place, place % H * W + place // H)
    return pixel, tl.where(k < 2, 1, -1) * tl.where(k % 2 == 0, 1, W), steps


@_jit
def _triton_next(pixel, ahead, pixels, more):
    """The pixel after this one, with the turn at the end of a column; the same one where there is no more."""
    next_one = pixel + ahead
    next_one += tl.where(next_one < 0, pixels - 1, 0) - tl.where(next_one >= pixels, pixels - 1, 0)
    return tl.where(more, next_one, pixel)


@_jit
def _triton_softplus(z):
    """Delta, Eq. 8: max(z, 0) + log(1 + e) with e = exp(-|z|), and log(1 + e) / e as a polynomial with a relative error
    of at most 2e-7. So the small Delta at the start of training are accurate, too."""
    e = tl.exp2(tl.abs(z) * -LOG2_E)
    series = -0.107681731 + e * (0.0440896391 + e * -0.0085392092)
    series = 0.999999806 + e * (-0.499974054 + e * (0.3327548 + e * (-0.244954639 + e * (0.177452434 + e * series))))
    return tl.maximum(z, 0) + e * series


@_jit
def _triton_segments(x, delta, A, BC, bias, H, W, D, segments, delta_pixel, delta_k, batch,
                     ends, totals, gy, starts, chunk_states,
                     N: constexpr, TILE_N: constexpr, SEGMENT: constexpr, BLOCK: constexpr, STEPS: constexpr,
                     ADJOINT: constexpr):
    """Per segment (pair, B, 2, segments): the end state from 0 (N, D) and the sum of Delta (D,). A program has TILE_N
    of the states.

    ADJOINT: instead of the end state, what the segment's own outputs give to the gradient of its start state, by Eq. 4
    sum_t (A_bar_1 .. A_bar_t) C_t gy_t; and the states before each STEPS steps (SEGMENT / STEPS, N, D).
    """
    d, segment, program = _triton_program(segments, D, BLOCK)
    tiles = tl.cdiv(N, TILE_N)
    block_n, program = program % tiles * TILE_N, program // tiles
    k, sample = program // (2 * batch) + program % 2 * 2, (program // 2 % batch).to(tl.int64) * H * W
    n = block_n + tl.arange(0, TILE_N)
    in_D, in_N = d < D, n < N
    tile, in_tile = n[:, None] * D + d[None, :], in_N[:, None] & in_D[None, :]
    sequence = program.to(tl.int64) * segments + segment
    A_k = tl.load(A + k * N * D + tile, in_tile, 0) * LOG2_E    # for exp2
    bias_k = tl.load(bias + k * D + d, in_D, 0)
    total, h = tl.zeros((BLOCK,), tl.float32), tl.zeros((TILE_N, BLOCK), tl.float32)
    pixel, ahead, steps = _triton_walk(segment, k, H, W, SEGMENT, 0)
    x, delta = x + sample * D + d, delta + sample * delta_pixel + k.to(tl.int64) * delta_k + d
    BC += (sample * 4 + k) * 2 * N + n
    u_next, z_next = tl.load(x + pixel * D, in_D, 0), tl.load(delta + pixel * delta_pixel, in_D, 0)
    if ADJOINT:
        gy += sample * D + d
        gy_next = tl.load(gy + pixel * D, in_D, 0)
        h = tl.load(starts + sequence * N * D + tile, in_tile, 0)
        decay, g = tl.full((TILE_N, BLOCK), 1, tl.float32), tl.zeros((TILE_N, BLOCK), tl.float32)
    for chunk in range(0, steps, STEPS if ADJOINT else SEGMENT):
        if ADJOINT:
            tl.store(chunk_states + (sequence * (SEGMENT // STEPS) + chunk // STEPS) * N * D + tile, h, in_tile)
        for t in range(chunk, tl.minimum(chunk + STEPS, steps) if ADJOINT else steps):
            B_t = tl.load(BC + pixel * 8 * N, in_N, 0)
            if ADJOINT:
                C_t = tl.load(BC + pixel * 8 * N + N, in_N, 0)
                gy_t = gy_next.to(tl.float32)
            u, step = u_next.to(tl.float32), _triton_softplus(z_next.to(tl.float32) + bias_k)
            pixel = _triton_next(pixel, ahead, H * W, t + 1 < steps)
            u_next = tl.load(x + pixel * D, in_D, 0)    # a step ahead, as loads are slow
            z_next = tl.load(delta + pixel * delta_pixel, in_D, 0)
            A_bar = tl.exp2(step[None, :] * A_k)                                               # Eq. 5
            h = A_bar * h + B_t[:, None] * (step * u)[None, :]                                 # Eq. 3
            total += step
            if ADJOINT:
                gy_next = tl.load(gy + pixel * D, in_D, 0)
                decay *= A_bar
                g += decay * (C_t[:, None] * gy_t[None, :])
    tl.store(ends + sequence * N * D + tile, g if ADJOINT else h, in_tile)
    tl.store(totals + sequence * D + d, total, d < tl.where(block_n > 0, 0, D))


@_jit
def _triton_combine(ends, totals, A, batch, segments, D, N: constexpr, BLOCK: constexpr, AHEAD: constexpr,
                    ADJOINT: constexpr):
    """Turns, in place, the ends (pair, B, 2, segments, N, D) of _triton_segments into what enters each segment: its
    start state, or the gradient of its end state. AHEAD segments are read at a time, as reading takes longest."""
    d, n, program = _triton_program(N, D, BLOCK)
    k, in_D = program // (2 * batch) + program % 2 * 2, d < D
    A_k = tl.load(A + (k * N + n) * D + d, in_D, 0) * LOG2_E
    h = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, segments, AHEAD):
        places, masks, e, total = (), (), (), ()
        for i in tl.static_range(AHEAD):
            segment = tl.where((k < 2) != ADJOINT, first + i, segments - 1 - first - i)
            sequence = program.to(tl.int64) * segments + segment
            mask = in_D & (first + i < segments)
            places += (ends + (sequence * N + n) * D + d,)
            masks += (mask,)
            e += (tl.load(places[i], mask, 0),)
            total += (tl.load(totals + sequence * D + d, mask, 0),)
        for i in tl.static_range(AHEAD):
            tl.store(places[i], h, masks[i])
            h = tl.exp2(total[i] * A_k) * h + e[i]


@_jit
def _triton_outputs(x, delta, A, BC, bias, H, W, D, segments, delta_pixel, delta_k, batch,
                    skip, starts, y, N: constexpr, TILE_N: constexpr, SEGMENT: constexpr, BLOCK: constexpr):
    """y (2, B, H, W, D) in float32 from the start states: per pair the sum of its two directions."""
    d, segment, program = _triton_program(segments, D, BLOCK)
    sample = (program % batch).to(tl.int64) * H * W
    x, y, delta = x + sample * D, y + program.to(tl.int64) * H * W * D, delta + sample * delta_pixel
    BC += sample * 8 * N
    in_D = d < D
    for walk in range(2):
        k = program // batch + walk * 2
        delta_walk, BC_walk = delta + k.to(tl.int64) * delta_k, BC + k * 2 * N
        sequence = (program * 2 + walk).to(tl.int64) * segments + segment
        bias_k = tl.load(bias + k * D + d, in_D, 0)
        for block_n in range(0, N, TILE_N):
            n = block_n + tl.arange(0, TILE_N)
            in_N = n < N
            tile, in_tile = n[:, None] * D + d[None, :], in_N[:, None] & in_D[None, :]
            A_k = tl.load(A + k * N * D + tile, in_tile, 0) * LOG2_E    # for exp2
            # Added once, with the first states. (The mask has no `&`, for which Triton 3.3 lacks a type.)
            skip_k = tl.load(skip + k * D + d, d < tl.where(block_n > 0, 0, D), 0)
            h = tl.load(starts + sequence * N * D + tile, in_tile, 0)
            pixel, ahead, steps = _triton_walk(segment, k, H, W, SEGMENT, 0)
            u_next = tl.load(x + pixel * D + d, in_D, 0)
            z_next = tl.load(delta_walk + pixel * delta_pixel + d, in_D, 0)
            for t in range(steps):
                B_t = tl.load(BC_walk + pixel * 8 * N + n, in_N, 0)
                C_t = tl.load(BC_walk + pixel * 8 * N + N + n, in_N, 0)
                y_place = y + pixel * D + d
                y_other = tl.load(y_place, d < tl.where(walk + block_n > 0, D, 0), 0)
                u, step = u_next.to(tl.float32), _triton_softplus(z_next.to(tl.float32) + bias_k)
                pixel = _triton_next(pixel, ahead, H * W, t + 1 < steps)
                u_next = tl.load(x + pixel * D + d, in_D, 0)    # a step ahead, as loads are slow
                z_next = tl.load(delta_walk + pixel * delta_pixel + d, in_D, 0)
                h = tl.exp2(step[None, :] * A_k) * h + B_t[:, None] * (step * u)[None, :]      # Eq. 5, 3
                y_t = tl.sum(h * C_t[:, None], 0) + skip_k * u                                 # Eq. 4, 2
                tl.store(y_place, y_other + y_t, in_D)                                   # Eq. 12
            tl.debug_barrier()    # what comes next reads y back


@_jit
def _triton_scatter_sums(values, lane):
    """Sums 2^m values (32,) over the lanes: lane l gets the sum of value l % 2^m. In each round a lane hands half of
    its values to a partner, for the other half of the partner's: fewer exchanges than a sum of every value."""
    for bit in tl.static_range(5):
        upper, partner, summed = (lane >> bit) % 2 == 1, lane ^ (1 << bit), ()
        for i in tl.static_range(0, len(values), 2):
            first, second = values[i], values[(i + 1) % len(values)]
            summed += (tl.where(upper, second, first) + tl.gather(tl.where(upper, first, second), partner, 0),)
        values = summed
    return values[0]


@_jit
def _triton_gradients(x, delta, A, BC, bias, H, W, D, segments, delta_pixel, delta_k, batch,
                      skip, gy, chunk_states, g_ends, gx, g_delta, gBC, g_parameters,
                      N: constexpr, SEGMENT: constexpr, BLOCK: constexpr, STEPS: constexpr):
    """All gradients but dt_weight's, walking backwards by STEPS steps from the gradients of the end states, g_ends.

    gx (pair, B, H, W, D): to be summed over pairs. g_delta (B, H, W, K, D). gBC (blocks, 2, B, H, W, K, N): over blocks
    of channels. g_parameters (N + 2, K, B, segments, D), of A, D and the bias: over batch and segments.
    Channels are (BLOCK / 32, 32) here. Lane 16 b + i holds state i of B (b = 0) or C (b = 1), of 16 states at a time;
    lane 2 t + b (and that plus 2 STEPS and so on) writes their gradient at step t of STEPS.
    """
    _, segment, program = _triton_program(segments, D, BLOCK)
    sample = program % batch
    block, lane = tl.program_id(0) % tl.cdiv(D, BLOCK), tl.arange(0, 32)
    d = block * BLOCK + tl.arange(0, BLOCK // 32)[:, None] * 32 + lane[None, :]
    gBC += ((block * 2 + lane % 2) * batch + sample).to(tl.int64) * H * W * 4 * N
    first = sample.to(tl.int64) * H * W
    x, gy, g_delta, gx = x + first * D, gy + first * D, g_delta + first * 4 * D, gx + program.to(tl.int64) * H * W * D
    delta, BC = delta + first * delta_pixel, BC + first * 8 * N
    in_D, zeros = d < D, tl.zeros((BLOCK // 32, 32), tl.float32)
    for walk in range(2):
        k = program // batch + walk * 2
        delta_walk = delta + k.to(tl.int64) * delta_k
        sequence = (program * 2 + walk).to(tl.int64) * segments + segment
        g_walk = g_parameters + ((k * batch + sample).to(tl.int64) * segments + segment) * D
        g_row = batch.to(tl.int64) * segments * 4 * D    # from one row to the next
        bias_k, skip_k = tl.load(bias + k * D + d, in_D, 0), tl.load(skip + k * D + d, in_D, 0)
        g_skip_k, g_bias_k = zeros, zeros
        pixel, ahead, steps = _triton_walk(segment, k, H, W, SEGMENT, 0)
        chunks = tl.cdiv(steps, STEPS)
        for i in range(chunks):
            chunk = chunks - 1 - i
            done = chunk * STEPS
            pixel = _triton_walk(segment, k, H, W, SEGMENT, done)[0]
            at, step, step_u, gy_t, g_u, g_step = (), (), (), (), (), ()
            summed_at = tl.zeros((32,), tl.int32)
            for t in tl.static_range(STEPS):
                exists = done + t < steps
                u = tl.load(x + pixel * D + d, in_D, 0).to(tl.float32)
                z = tl.load(delta_walk + pixel * delta_pixel + d, in_D, 0).to(tl.float32) + bias_k
                step_t = tl.where(exists, _triton_softplus(z), 0)    # where there is no step, the state stays as it is
                at, step, step_u = at + (pixel,), step + (step_t,), step_u + (step_t * u,)
                gy_t += (tl.where(exists, tl.load(gy + pixel * D + d, in_D, 0).to(tl.float32), 0),)
                g_u, g_step = g_u + (zeros,), g_step + (zeros,)    # gradients of Delta u and Delta, summed over states
                summed_at = tl.where(lane // 2 % STEPS == t, pixel, summed_at)
                pixel = _triton_next(pixel, ahead, H * W, done + t + 1 < steps)
            sums = gBC + (summed_at * 4 + k) * N
            writes = (lane < 2 * STEPS) & (done + lane // 2 < steps)
            for block_n in range(0, N, 16):
                BC_n = ()
                for t in tl.static_range(STEPS):
                    state = block_n + lane % 16
                    BC_n += (tl.load(BC + ((at[t] * 4 + k) * 2 + lane // 16) * N + state, state < N, 0),)
                row, gA = (sequence * N + block_n) * D, g_walk + block_n * g_row
                start_row = ((sequence * (SEGMENT // STEPS) + chunk) * N + block_n) * D
                for n in range(block_n, tl.minimum(block_n + 16, N)):
                    A_n = tl.load(A + (k * N + n) * D + d, in_D, 0) * LOG2_E
                    h = tl.load(chunk_states + start_row + d, in_D, 0)
                    g = tl.load(g_ends + row + d, in_D, 0)
                    gA_n = tl.load(gA + d, d < tl.where(i > 0, D, 0), 0)
                    B_lane = tl.zeros((32,), tl.int32) + n % 16
                    A_bar, before, B_n, gC_n, gBC_n = (), (), (), (), ()
                    for t in tl.static_range(STEPS):
                        a = tl.exp2(step[t] * A_n)                                             # Eq. 5
                        B_t = tl.gather(BC_n[t], B_lane, 0)[None, :]
                        A_bar, before, B_n = A_bar + (a,), before + (h,), B_n + (B_t,)
                        h = a * h + B_t * step_u[t]                                             # Eq. 3
                        gC_n += (tl.sum(gy_t[t] * h, 0),)
                    g_u_n, g_step_n = (), ()
                    for t in tl.static_range(STEPS - 1, -1, -1):
                        # Gradient of the state after step t, Eq. 4 and 3.
                        g += tl.gather(BC_n[t], B_lane + 16, 0)[None, :] * gy_t[t]
                        gBC_n = (tl.sum(g * step_u[t], 0), gC_n[t]) + gBC_n
                        g_u_n = (g_u[t] + g * B_n[t],) + g_u_n
                        g *= A_bar[t]                          # of the state before
                        exponent = g * before[t]               # of Delta A in Eq. 5
                        g_step_n = (g_step[t] + exponent * A_n,) + g_step_n
                        gA_n += exponent * step[t]
                    g_u, g_step = g_u_n, g_step_n
                    tl.store(sums + n, _triton_scatter_sums(gBC_n, lane), writes)
                    tl.store(g_ends + row + d, g, in_D)
                    tl.store(gA + d, gA_n, in_D)
                    row += D
                    gA += g_row
                    start_row += D
            for t in tl.static_range(STEPS):
                mask = in_D & (done + t < steps)
                # Read and computed again, as registers are scarce.
                pixel_t = tl.sum(tl.where(lane == 2 * t, summed_at, 0), 0)
                u = tl.load(x + pixel_t * D + d, in_D, 0).to(tl.float32)
                z = tl.load(delta_walk + pixel_t * delta_pixel + d, in_D, 0).to(tl.float32) + bias_k
                # A_n was multiplied by log2(e), for exp2. The softplus has the derivative sigmoid(z) = exp(z - Delta).
                g_z = (g_u[t] * u + g_step[t] / LOG2_E) * tl.exp2((z - step[t]) * LOG2_E)
                tl.store(g_delta + (pixel_t * 4 + k) * D + d, g_z, mask)
                gx_other = tl.load(gx + pixel_t * D + d, d < tl.where(walk > 0, D, 0), 0)
                tl.store(gx + pixel_t * D + d, gx_other + g_u[t] * step[t] + gy_t[t] * skip_k, mask)
                g_skip_k += gy_t[t] * u
                g_bias_k += tl.where(done + t < steps, g_z, 0)
            tl.debug_barrier()    # the next chunk reads g_ends and gA back, the next walk gx
        tl.store(g_walk + N * g_row + d, g_skip_k, in_D)
        tl.store(g_walk + (N + 1) * g_row + d, g_bias_k, in_D)


def _triton_segment(batch, L, D):
    """Steps per segment: long ones save memory, short ones give more programs to a small map."""
    return max([s for s in SEGMENTS if SEGMENT_CHANNELS * s <= batch * L * D], default=SEGMENTS[0])


def _triton_arguments(x, delta, A, BC, delta_bias, segments):
    """The first arguments of the kernels that walk; the constants of those with tiles of states, and of the last."""
    (batch, H, W, d), n = x.shape, A.shape[-1]
    delta = delta.flatten(0, 2)    # a copy only where pixels are not evenly spaced
    if delta.stride(2) != 1 and d > 1:
        delta = delta.contiguous()
    if H * W * max(K * d, K * 2 * n, delta.stride(0)) >= 2 ** 31:
        raise ValueError(f"the map {tuple(x.shape)} is too large for the scan backend triton; use the backend torch")
    x, A, BC, delta_bias = (t.contiguous() for t in (x, A.mT, BC, delta_bias))
    arguments = x, delta, A, BC, delta_bias, H, W, d, segments, *delta.stride()[:2], batch
    sizes = dict(N=n, SEGMENT=_triton_segment(batch, H * W, d), num_warps=1)
    tiled = dict(sizes, TILE_N=min(TILE_N, triton.next_power_of_2(n)))
    if n <= TILE_N and not torch.version.hip:    # AMD's compiler has no such option
        tiled["maxnreg"] = 168    # per thread: 12 programs fit on a multiprocessor. With more states it would spill.
    return arguments, tiled, sizes


def _triton_enter(walk, tiled, ends, BLOCK, gy=None, starts=None, chunk_states=None):
    """The first two passes: fills ends with what enters each segment, see _triton_combine."""
    _, batch, _, segments, n, d = ends.shape
    totals, adjoint = ends.new_empty(*ends.shape[:4], d), gy is not None
    _triton_segments[triton.cdiv(d, BLOCK) * segments * triton.cdiv(n, tiled["TILE_N"]) * K * batch,](
        *walk, ends, totals, gy, starts, chunk_states, **tiled, BLOCK=BLOCK, STEPS=STEPS, ADJOINT=adjoint)
    _triton_combine[triton.cdiv(d, BLOCK_D) * n * K * batch,](
        ends, totals, walk[2], batch, segments, d, N=n, BLOCK=BLOCK_D, AHEAD=8, ADJOINT=adjoint, num_warps=1)


def _triton_forward(states, x, delta, A, BC, D, delta_bias):
    _, batch, _, segments, _, d = states.shape
    walk, tiled, _ = _triton_arguments(x, delta, A, BC, delta_bias, segments)
    y = states.new_empty(2, *x.shape)    # in float32
    with torch.cuda.device_of(x):
        _triton_enter(walk, tiled, states, BLOCK_D)
        _triton_outputs[triton.cdiv(d, BLOCK_D) * segments * 2 * batch,](
            *walk, D.contiguous(), states, y, **tiled, BLOCK=BLOCK_D)
    return torch.add(*y, out=x.new_empty(x.shape))


def _triton_backward(grad_y, states, x, delta, A, BC, D, delta_bias):
    _, batch, _, segments, n, d = states.shape
    walk, tiled, sizes = _triton_arguments(x, delta, A, BC, delta_bias, segments)
    block = BLOCK_D if n <= TILE_N else BLOCK_D_ADJOINT    # with more states there are more pointers in registers
    grad_y = grad_y.contiguous()

    empty = states.new_empty    # in float32
    gx, gBC = empty(2, *x.shape), empty(triton.cdiv(d, block), 2, *x.shape[:3], K, n)
    g_delta, g_parameters = delta.new_empty(delta.shape), empty(n + 2, K, batch, segments, d)
    g_ends, chunk_states = empty(states.shape), empty(*states.shape[:4], sizes["SEGMENT"] // STEPS, n, d)
    with torch.cuda.device_of(x):
        _triton_enter(walk, tiled, g_ends, BLOCK_D_ADJOINT, grad_y, states, chunk_states)
        _triton_gradients[triton.cdiv(d, block) * segments * 2 * batch,](
            *walk, D.contiguous(), grad_y, chunk_states, g_ends, gx, g_delta, gBC, g_parameters, **sizes, BLOCK=block,
            STEPS=STEPS)
    return torch.add(*gx, out=x.new_empty(x.shape)), g_delta, gBC.sum(0), g_parameters.sum((2, 3))


@torch.compiler.assume_constant_result
def backend_fault(backend: str) -> str | None:
    """Why this process cannot use a backend; None where it can."""
    return _find_fault(backend)


@functools.cache
def _find_fault(backend):
    """Imports what the backend needs: Numba, which takes a moment, with the first scan. A warning tells, once, that it
    is installed and cannot be used."""
    modules = {"mamba_ssm": ["selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface"]}
    try:
        for name in modules.get(backend, [backend]):
            importlib.import_module(name)
        fault = "NUMBA_DISABLE_JIT is set" if backend == "numba" and sys.modules["numba"].config.DISABLE_JIT else None
    except Exception as error:    # besides ImportError, what a package built for another NumPy or LLVM raises
        fault = f"{type(error).__name__}: {error}"
    if fault and backend == "mamba_ssm":    # new releases leave the kernel out unless told otherwise
        fault += (" (run MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm "
                  "causal-conv1d, with the CUDA toolkit)")
    if fault and backend == "numba" and importlib.util.find_spec("numba"):
        warnings.warn(f"the backend torch, several times slower, scans on CPUs, as numba cannot be used: {fault}",
                      stacklevel=2)
    return fault


def _expect_backend(backend, x):
    """Raises RuntimeError where a backend cannot run on x."""
    fault, device = backend_fault(backend), {"torch": x.device.type, "numba": "cpu"}.get(backend, "cuda")
    if backend == "triton" and not fault and not isinstance(_triton_outputs, triton.JITFunction):
        device = x.device.type    # Triton's interpreter takes any tensors
    if fault or x.device.type != device or backend != "torch" and x.dtype == torch.float64:
        raise RuntimeError(f"the scan backend {backend} runs on {device.upper()} tensors in float32, bfloat16 or "
                           f"float16, found {fault or f'{x.dtype} on {x.device}'}; use the backend torch")


_SCANS = {"torch": (_torch_forward, _torch_backward), "numba": (_numba_forward, _numba_backward),
          "triton": (_triton_forward, _triton_backward), "mamba_ssm": (_mamba_ssm_forward, _mamba_ssm_backward)}
BACKENDS = ("loop", *_SCANS)


# -------------------------------------------------------------------------------------- appendix: published checkpoints

PUBLISHED_TASKS = {"human_parts": "parsing", "sal": "saliency", "normals": "normal", "edge": "boundary"}

# Published name, name here; applied in this order to each key without its prefix "module.". In timm, the next stage has
# the downsampling. block_stm and block_ctm are of MTMamba++.
_PUBLISHED_NAMES = [row.split() for row in r"""
    ^backbone\.norm(\d)\.                             encoder.norms.\1.
    ^backbone\.                                       encoder.backbone.
    patch_embed\.projection                           patch_embed.proj
    stages\.0\.downsample                             layers_1.downsample
    stages\.1\.downsample                             layers_2.downsample
    stages\.2\.downsample                             layers_3.downsample
    backbone\.stages\.(\d)\.                          backbone.layers_\1.
    attn\.w_msa\.                                     attn.
    ffn\.layers\.0\.0\.                               mlp.fc1.
    ffn\.layers\.1\.                                  mlp.fc2.
    ^expand_layers\.(\w+)_(\d)\.                      stages.\2.expand.\1.
    ^concat_layers\.(\w+)_(\d)\.                      stages.\2.fuse.\1.
    ^block_1\.(\w+)_(\d)\.                            stages.\2.blocks.\1.0.
    ^block_2\.(\w+)_(\d)\.                            stages.\2.blocks.\1.1.
    ^block_stm\.(\w+)_(\d)\.(\d)\.                    stages.\2.blocks.\1.\3.
    ^block_(3|ctm)\.(\d)\.(0\.)?                      stages.\2.ctm.
    \.conv_share\.0\.                                 .linear_shared.
    \.conv_share\.1\.                                 .conv_shared.
    ctm\.op\.(\w+)\.in_proj_cross\.                   ctm.cross.\1.
    ctm\.op\.(\w+)\.out_proj\.                        ctm.out.\1.
    ctm\.in_proj\.                                    ctm.gate.
    (\.op)?\.out_proj\.                               .out.
    \.op([._])                                        .mfe\1
    _share\.                                          _shared.
    \.in_proj\.                                       .linear.
    \.conv2d\.                                        .conv.
    \.out_norm\.                                      .norm.
    \.(x_proj_weight|A_log|D)s?$                      .ss2d.\1
    \.dt_projs_(weight|bias)$                         .ss2d.dt_\1
    ^final_expand\.(\w+)\.0\.                         heads.\1.conv.
    ^final_expand\.(\w+)\.1\.                         heads.\1.norm.
    ^final_expand\.(\w+)\.                            heads.\1.expand.
    ^final_project\.(\w+)\.                           heads.\1.project.
    \.expand\.weight$                                 .linear.weight
""".strip().splitlines()]
_PUBLISHED_NAMES += [(rf"\.{published}\.", f".{name}.") for published, name in PUBLISHED_TASKS.items()]


def published_config(state: dict[str, Tensor]) -> dict:
    """MTMamba's arguments "tasks" and "variant" for a published state_dict."""
    keys = " ".join(state)
    config = DecoderConfig(ctm="semantic" if "block_ctm." in keys else "feature",
                           head="lite" if re.search(r"final_expand\.\w+\.0\.", keys) else "dense")
    heads = {m[1]: len(value) for key, value in state.items()
             if (m := re.search(r"final_project\.(\w+)\.weight$", key))}
    return {"tasks": {PUBLISHED_TASKS.get(task, task): channels for task, channels in heads.items()},
            "variant": next(name for name, row in VARIANTS.items() if DecoderConfig(**row) == config)}


def load_published_checkpoint(model: MTMamba, checkpoint: str | os.PathLike | dict) -> int:
    """Loads a checkpoint of the published implementation into a model of the same tasks, encoder and variant.

    checkpoint: a path, {"model": state_dict}, or the state_dict itself. Returns the number of its tensors; none is left
    over. Raises ValueError with all that does not fit, before anything is loaded.
    """
    if not isinstance(checkpoint, dict):
        checkpoint = read_tensors(checkpoint)
    if isinstance(checkpoint, dict):
        checkpoint = checkpoint.get("model", checkpoint)
    if not isinstance(checkpoint, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in checkpoint.items()):
        raise ValueError("expected a published checkpoint: a state_dict or {'model': state_dict}")
    state, own = {}, model.state_dict()
    for key, value in checkpoint.items():
        if not key.endswith("relative_position_index"):    # a constant, which timm computes
            state |= _convert_published(key, value)
    state["_extra_state"] = own["_extra_state"]    # published files have none
    shapes, expected = ({key: tuple(value.shape) for key, value in each.items()} for each in (state, own))
    problems = [f"{key}: expected {expected.get(key, 'nothing')}, found {shapes.get(key, 'nothing')}"
                for key in expected | shapes if expected.get(key) != shapes.get(key)]
    found = published_config(checkpoint)
    if list(found["tasks"]) != list(model.tasks):    # all shapes may fit
        problems += [f"tasks: {list(found['tasks'])}, concatenated in another order than {list(model.tasks)}"]
    if problems:
        raise ValueError(f"the checkpoint, of the variant {found['variant']}, does not fit the model; nothing was "
                         "loaded:\n  " + "\n  ".join(problems))
    model.load_state_dict(state)
    return len(checkpoint)


def read_tensors(path: str | os.PathLike):
    """Tensors and plain values of a file of torch.save, read when they are used. So replace it, never write into it."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of one")
    try:
        mapped = zipfile.is_zipfile(path) and os.name == "posix"    # Windows does not replace a mapped file
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:    # the unpickler and the zip reader raise many kinds
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        fault = (f"objects other than tensors ({refused[1]}), which may run code; save its state_dict alone" if refused
                 else f"truncated, or another kind of file ({type(error).__name__})")
        raise ValueError(f"{path} is not a readable checkpoint, found {fault}") from error


def _convert_published(key, value):
    """One published tensor -> the tensors here, by name."""
    name = key.removeprefix("module.")
    for pattern, replacement in _PUBLISHED_NAMES:
        name = re.sub(pattern, replacement, name)
    if re.search(r"block_(1|2|stm|ctm)\..*\.in_proj\.weight$", key):
        linear, gate = value.chunk(2)                                # STM and SCTM stack MFE's linear map and the gate
        return {name: linear, re.sub(r"mfe(\.\w+)?\.linear", r"gate\1", name): gate}
    if ".downsample." in name:
        # Patch merging. A cell of 2x2 pixels is (c, row, column) in the published weights, (column, row, c) in timm's.
        value = value.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)
    elif ".ctm.gate." in name:                                       # there, CTM's g multiplies the other feature
        value = -value
    elif name.endswith(("A_log", "ss2d.D")):                         # (K * D, ...) -> (K, D, ...)
        value = value.unflatten(0, (K, -1))
    elif name.endswith("num_batches_tracked"):                       # a number, which some archives keep as a vector
        value = value.squeeze()
    elif value.shape[2:] == (1, 1):                                  # 1x1 convolution -> linear map
        value = value.flatten(1)
    return {name: value}


# ---------------------------------------------------------------------------------- appendix: batch norm over processes

def _has_processes() -> bool:
    """Whether torch.distributed runs. One process of torchrun is treated as several are."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@torch.library.custom_op("mtmamba::sum_over_processes", mutates_args=())
def _sum_over_processes(x: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sum and what the next one takes for `after`."""
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x)
    return x, torch.zeros_like(after)


_sum_over_processes.register_fake(lambda x, after: (torch.empty_like(x, memory_format=torch.contiguous_format),
                                                    torch.empty_like(after)))
_sum_over_processes.register_autograd(lambda _, *gradients: _sum_over_processes(*gradients))

# All processes must make their sums in the same order. Those of different heads do not depend on each other, so a
# compiler might choose. So inside MTMamba.forward each sum takes the second output of the one before, which stands
# here. In the backward pass that output's gradient links them in the opposite order.
_last_sum = None


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, C, H, W) of this process -> mean (C,), biased variance (C,) and number of pixels () of all processes. One sum
    over the processes, in float64: the variance can be small beside the square of the mean."""
    var, mean = (t.double() for t in torch.var_mean(x.to(_compute_dtype(x)), (0, 2, 3), correction=0))
    sums = torch.stack([torch.ones_like(mean), mean, var + mean ** 2]) * (x.numel() / len(mean))
    global _last_sum
    (n, total, squares), after = _sum_over_processes(sums, sums.new_zeros(()) if _last_sum is None else _last_sum)
    _last_sum = None if _last_sum is None else after
    mean = total / n
    return mean, squares / n - mean ** 2, n[0]
