"""Compiles the scan's Triton kernels for NVIDIA GPUs and counts what they cost; needs no GPU.

    python tests/compile_kernels.py         # for compute capabilities 8.0 and 9.0

Prints per kernel, from its machine code, what a warp issues per step of one direction for 64 channels (two per lane),
and from that a model of the three decoder stages of Swin-Large. Exits with an error where a kernel does not compile,
spills more than SPILLED (in a loop over steps, or at N = 17 and 64: anything), exchanges tiles through shared memory,
does not leave every channel with one lane, or costs more than LIMITS.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
import mtmamba
from mtmamba import K

KERNELS = ("_triton_segments", "_triton_combine", "_triton_outputs", "_triton_gradients")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "maxnreg")
LIMITS = {"forward": 510, "forward and backward": 1720}     # slots per step
SPILLED = 8                                                 # bytes at N = 16, by Triton 3.3; newer ones spill nothing
COUNTED = {"MUFU": "MUFU", "loads": "LDG", "stores": "STG", "shuffles": "SHFL"}
# The model: a scheduler issues one instruction per clock, a MUFU (exponential) takes it 8 clocks; latencies and memory
# not counted.
CLOCKS_PER_MUFU = 8
H100 = 132 * 4 * 1.85                                         # schedulers x GHz
STAGES = [(28, 36, 1536), (56, 72, 768), (112, 144, 384)]     # H, W, D of Swin-Large's decoder at 448x576
SEGMENT = 128                                                 # steps, of all of them at batch 8


class Recorder:
    """Stands for a kernel, and keeps the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def record(dtype, batch=8, H=56, W=72, D=768, N=16, R=24) -> list:
    """(kernel, args, kwargs) of each launch of a forward and a backward pass."""
    shapes = [(batch, H, W, D), (batch, H, W, K, R), (K, D, N), *[(batch, H, W, K, N)] * 2, (K, D), (K, D), (K, D, R)]
    x, delta, A, B, C, *rest = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in shapes)
    inputs = mtmamba._scan_operands(x.to(dtype), delta.to(dtype), A, torch.cat([B, C], dim=-1), *rest, "triton")
    states = mtmamba._scan_states(x, A, "triton")
    recorders = {name: Recorder(getattr(mtmamba, name)) for name in KERNELS}
    vars(mtmamba).update(recorders)
    try:
        y = mtmamba._triton_forward(states, *inputs)
        mtmamba._triton_backward(y.to(dtype), states, *inputs)
    finally:
        vars(mtmamba).update({name: recorder.kernel for name, recorder in recorders.items()})
    launches = []
    for recorder in recorders.values():
        # The two pairs differ in nothing that is compiled in.
        distinct = {str(kwargs): (recorder.kernel, args, kwargs) for args, kwargs in recorder.launches}
        launches += distinct.values()
    return launches


def compile_for(capability: int, kernel, args, kwargs):
    """As Triton specialises at a launch: on None, on 1 and on what 16 divides unless told not to."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, divisible = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args)):
        if value is None or type(value) is int and value == 1 and not parameter.do_not_specialize:
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor) or value % 16 == 0 and not parameter.do_not_specialize:
            divisible[i,] = [["tt.divisibility", 16]]
        signature[parameter.name] = types[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    constants |= {name: value for name, value in kwargs.items() if name not in OPTIONS}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants, divisible), target=GPUTarget("cuda", capability, 32),
                          options={name: kwargs[name] for name in OPTIONS if name in kwargs})


def check_layout(name: str, compiled):
    """Kernels read back what they have stored, so every tensor must lay channels out in the same way: one per thread in
    turn, neighbours in neighbouring lanes."""
    layouts = re.findall(r"= #ttg\.blocked<\{sizePerThread = \[([\d, ]*)\], threadsPerWarp = \[([\d, ]*)\]",
                         compiled.asm["ttgir"])
    if compiled.metadata.shared or not layouts or not set(layouts) <= {("1", "32"), ("1, 1", "1, 32")}:
        sys.exit(f"{name}: {compiled.metadata.shared} bytes of shared memory, layouts (sizePerThread, threadsPerWarp) "
                 f"{sorted(set(layouts))}; expected no shared memory and one channel per thread in every tensor")


def machine_code(compiled) -> tuple[list[str], list[tuple[int, int]], dict[str, int]]:
    """Its instructions, its loops (first instruction, one after the last), outer ones first, and resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage")))
    instructions, labels = [], {}
    for label, instruction in re.findall(r"^(\.L_x_\d+):|^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z].*?);", text, re.M):
        if label:
            labels[label] = len(instructions)
        else:
            instructions.append(instruction.strip())
    branches = [(labels[target[1]], i + 1) for i, instruction in enumerate(instructions)
                if (target := re.match(r"BRA.*?(\.L_x_\d+)", instruction))]
    loops = sorted((loop for loop in branches if loop[0] < loop[1] - 1), key=lambda loop: (loop[0], -loop[1]))
    return instructions, loops, {what: int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK")}


def count_spills(name: str, instructions: list[str], loops: list[tuple[int, int]]) -> int:
    """The instructions inside loops over steps that move spilled registers. Outside they cost next to nothing."""
    if name in ("_triton_outputs", "_triton_gradients"):
        loops = loops[1:]    # the first one is over the two walks
    inside = {i for start, end in loops for i in range(start, end)}
    return sum(instructions[i].startswith(("LDL", "STL")) for i in inside)


def count(kernel, args, kwargs, code: tuple) -> dict[str, float]:
    """What a warp issues per step of one direction for 64 channels, in all and of some kinds; registers and spills.
    code: of machine_code."""
    instructions, loops, resources = code
    name, values = kernel.fn.__name__, dict(zip(kernel.arg_names, args)) | kwargs
    N, steps, chunk = values["N"], SEGMENT, values.get("STEPS", 1)
    # Per program: how often each loop runs, outer ones first; the steps, for 64 channels; the exponentials of a step.
    trips, done, exponentials = {
        "_triton_segments": ([steps // chunk, chunk] if values.get("ADJOINT") else [steps], steps, N + 1),
        "_triton_combine": ([values["segments"] / 8], values["segments"] * steps / N, N / steps),
        "_triton_outputs": ([2, steps], 2 * steps, N + 1),
        "_triton_gradients": ([2, steps // chunk, N], 2 * steps, N + 2)}[name]
    done *= values["BLOCK"] / 64
    if len(loops) != len(trips):
        sys.exit(f"{name}: expected {len(trips)} loops in its machine code, found {loops}: cannot count what it costs")
    weights = [1] * len(instructions)
    for (start, end), trip in zip(loops, trips):
        weights[start:end] = [weight * trip for weight in weights[start:end]]

    def total(opcode: str) -> float:
        return sum(weight for weight, text in zip(weights, instructions) if text.startswith(opcode)) / done
    if not math.isclose(total("MUFU.EX2"), 2 * exponentials):
        sys.exit(f"{name}: expected {2 * exponentials} exponentials per step, counted {total('MUFU.EX2')}: its loops "
                 "are not what they are taken for")
    return {"slots": total(""), **{kind: total(opcode) for kind, opcode in COUNTED.items()}, **resources}


def main(configurations):
    """configurations: pairs of a type and a compute capability."""
    print(f"Triton {triton.__version__}. Per step of one direction, N = 16, a warp with 64 channels:\n{'kernel':<27}"
          f"{'type':>9}{'sm':>4}" + "".join(f"{title:>10}" for title in ("slots", *COUNTED, "registers", "spilled B")))
    failed = []
    for dtype, capability in configurations:
        slots, clocks = Counter(), Counter()
        for kernel, args, kwargs in record(dtype):
            name = kernel.fn.__name__ + (" ADJOINT" if kwargs.get("ADJOINT") else "")
            compiled = compile_for(capability, kernel, args, kwargs)
            check_layout(name, compiled)
            code = machine_code(compiled)
            counts = count(kernel, args, kwargs, code)
            *figures, registers, spilled = counts.values()
            print(f"{name:<27}{str(dtype)[6:]:>9}{capability:>4}", *(f"{figure:>9.1f}" for figure in figures),
                  f"{registers:>9}{spilled:>10}")
            if spilled > SPILLED or count_spills(kernel.fn.__name__, *code[:2]):
                failed.append(f"{name} in {dtype} spills {spilled} bytes on {capability / 10}")
            passes = ["forward and backward"] if kwargs.get("ADJOINT") or "gradients" in name else list(LIMITS)
            for each in passes:
                slots[each] += counts["slots"]
                clocks[each] += max(counts["slots"], CLOCKS_PER_MUFU * counts["MUFU"])
        for each, limit in LIMITS.items():
            times = [clocks[each] * 8 * H * W * K * D / 64 / H100 / 1e6 for H, W, D in STAGES]
            ratio = clocks[each] / (2 * 16 * CLOCKS_PER_MUFU)
            print(f"    {each}: {slots[each]:.0f} slots; {clocks[each]:.0f} clocks, {ratio:.2f} x the exponentials'"
                  + (f"; H100, batch 8: {', '.join(f'{ms:.2f}' for ms in times)} ms" if capability == 90 else ""))
            if slots[each] > limit:
                failed.append(f"{each} in {dtype}: {slots[each]:.0f} slots on {capability / 10}, more than {limit}")
    # More states, and what Triton may lay out otherwise: channels that 16 does not divide, sizes of 1.
    for N, capability in [(17, 90), (64, 80)]:
        for kernel, args, kwargs in record(torch.float16, batch=1, W=1, D=100, N=N):
            name, compiled = f"{kernel.fn.__name__}, N = {N}", compile_for(capability, kernel, args, kwargs)
            check_layout(name, compiled)
            if spilled := machine_code(compiled)[2]["STACK"]:
                failed.append(f"{name} spills {spilled} bytes on {capability / 10}")
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main([(dtype, capability) for dtype in (torch.bfloat16, torch.float32) for capability in (80, 90)])
