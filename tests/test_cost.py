"""Parameters and FLOPs of the paper's Tables 2-4 (and the parameters that Table 6's encoders lead to)."""

import math

import pytest
import torch

from conftest import NYUD_TASKS, TINY_SWIN
from evaluate import count_cost
from mtmamba import ENCODERS, MTMamba

# Millions of parameters and 1e9 FLOPs as printed, at 448x576 with Swin-Large: the paper cuts after two decimals.
PAPER = {
    "mtmamba": (307.99, 540.81),
    "stm1": (252.51, 354.13),
    "stm2": (276.48, 435.47),
    "stm3": (300.45, 516.82),
    "swin-multi-task": (303.18, 466.35),
    "mfe-wmsa": (451.81, 884.61),
    "gate-wmsa": (345.33, 659.29),
}


def cut(value):
    return math.floor(value * 100) / 100


def cost(variant, tasks=NYUD_TASKS, **arguments):
    with torch.device("meta"):
        model = MTMamba(tasks, variant=variant, **arguments)
    parameters, flops = count_cost(model, (448, 576))
    return parameters / 1e6, flops / 1e9


@pytest.mark.paper("Table 2-4", against="the paper's #Param and FLOPs, cut")
@pytest.mark.parametrize("variant", PAPER)
def test_equals_the_paper(variant, compare):
    compare(tuple(map(cut, cost(variant))), PAPER[variant], rtol=0, atol=0)


def test_single_task_row_is_the_sum_of_four_models():
    """The paper's 888.77 and 1074.79 add figures that were cut to two decimals first."""
    by_channels = {channels: cost("swin-single-task", {"task": channels}) for channels in {*NYUD_TASKS.values()}}
    models = [by_channels[channels] for channels in NYUD_TASKS.values()]
    assert tuple(round(sum(map(cut, column)), 2) for column in zip(*models)) == (888.77, 1074.79)
    small = dict(encoder_kwargs=TINY_SWIN)
    models = [cost("swin-single-task", {task: channels}, **small) for task, channels in NYUD_TASKS.items()]
    torch.testing.assert_close(cost("swin-single-task", **small), tuple(map(sum, zip(*models))))


@pytest.mark.parametrize("encoder, millions", [("swin-tiny", 57.59), ("swin-small", 78.91), ("swin-base", 138.67),
                                               ("swin-large", 308.00)])
def test_parameters_by_encoder(encoder, millions):
    with torch.device("meta"):
        model = MTMamba(NYUD_TASKS, encoder=ENCODERS[encoder])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def test_counting_changes_nothing(tiny_model):
    model = tiny_model(backend="loop").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = count_cost(model, (64, 96))
    assert first == count_cost(model.eval(), (64, 96)) and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert first == count_cost(tiny_model(), (64, 96)) == count_cost(tiny_model().bfloat16(), (64, 96))
