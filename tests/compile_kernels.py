"""Compiles the scan's Triton kernels for NVIDIA GPUs; needs none.

    python tests/compile_kernels.py         # for compute capabilities 8.0 and 9.0

Prints what each kernel needs, exits with an error where one does not compile or exchanges tiles through shared memory.
"""

import re
import subprocess
import sys
import tempfile
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
    inputs = (x.to(dtype), delta.to(dtype), A, B.to(dtype), C.to(dtype), *rest)
    recorders = {name: Recorder(getattr(mtmamba, name)) for name in KERNELS}
    vars(mtmamba).update(recorders)
    try:
        y, states = mtmamba._triton_forward(*inputs)
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
    """As Triton specialises at a launch: on None, and on what 16 divides unless told not to."""
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature, constants, divisible = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args)):
        if value is None:
            constants[parameter.name] = None
        elif isinstance(value, torch.Tensor) or value % 16 == 0 and not parameter.do_not_specialize:
            divisible[i,] = [["tt.divisibility", 16]]
        signature[parameter.name] = types[value.dtype] if isinstance(value, torch.Tensor) else "i32"
    constants |= {name: value for name, value in kwargs.items() if name not in OPTIONS}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    return triton.compile(ASTSource(kernel, signature, constants, divisible), target=GPUTarget("cuda", capability, 32),
                          options={name: kwargs[name] for name in OPTIONS if name in kwargs})


def main():
    print(f"Triton {triton.__version__}\n{'kernel':<28}{'type':>10}{'sm':>5}{'registers':>11}{'stack bytes':>13}"
          f"{'exponentials':>14}")
    for dtype in (torch.bfloat16, torch.float32):
        for kernel, args, kwargs in record(dtype):
            for capability in (80, 90):
                compiled = compile_for(capability, kernel, args, kwargs)
                layouts = set(re.findall(r"sizePerThread = \[([\d, ]*)\]", compiled.asm["ttgir"]))
                name = kernel.fn.__name__ + (" ADJOINT" if kwargs.get("ADJOINT") else "")
                if compiled.metadata.shared or not layouts <= {"1", "1, 1"}:
                    sys.exit(f"{name}: {compiled.metadata.shared} bytes of shared memory, layouts {layouts}; expected "
                             "none and one channel per thread")
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(compiled.asm["cubin"])
                    file.flush()
                    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True,
                                           text=True, check=True).stdout
                registers, stack = (re.search(rf"{what}:(\d+)", usage)[1] for what in ("REG", "STACK"))
                exponentials = compiled.asm["ptx"].count("ex2.approx")
                print(f"{name:<28}{str(dtype)[6:]:>10}{capability:>5}{registers:>11}{stack:>13}{exponentials:>14}")


if __name__ == "__main__":
    main()
