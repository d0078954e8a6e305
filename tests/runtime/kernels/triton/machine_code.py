"""What the compiler makes of a launch, for a GPU that need not be there.

`launches` records what a launcher would launch, with its arguments and as triton would specialise them; `compiled`
compiles that with the compiler and disassembler that triton's wheel brings, and reads the machine code.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes that a block may have
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)(.*?);")


@dataclass(frozen=True)
class Launch:
    """A kernel, its arguments by name, and triton's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Within: kernels are not launched but listed."""
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in [*kwargs] if name not in self.arg_names}
        found.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.JITFunction, "run", run)
        yield found


def recorded(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> list[Launch]:
    """What a call launches."""
    with launches(monkeypatch) as found:
        call()
    return found


@dataclass(frozen=True)
class Code:
    """Machine code: registers of a thread, bytes spilled of them, bytes of shared memory, instructions."""

    registers: int
    spilled: int
    shared: int
    text: str

    @cached_property
    def instructions(self) -> tuple[list[tuple[str, str]], dict[str, int]]:
        """(opcode, operands) in order, and where labels stand."""
        found: list[tuple[str, str]] = []
        labels = {}
        for line in self.text.splitlines():
            if label := re.match(r"^(\.L\w*):", line.strip()):
                labels[label[1]] = len(found)
            elif instruction := INSTRUCTION.match(line):
                found.append((instruction[1], instruction[2]))
        return found, labels

    @cached_property
    def loop(self) -> Counter[str]:
        """Instructions of the longest loop with a tensor core's in it, by the first part of their names; all as ''."""
        found, labels = self.instructions
        longest: list[str] = []
        for i, (opcode, operands) in enumerate(found):
            target = re.search(r"`\((\.L\w*)\)", operands)
            if opcode.startswith("BRA") and target and labels.get(target[1], i) < i:
                body = [name.split(".")[0] for name, _ in found[labels[target[1]] : i + 1]]
                if any(name.endswith("MMA") for name in body):
                    longest = max(longest, body, key=len)
        return Counter(longest) + Counter({"": len(longest)})


def compiled(launch: Launch, arch: int) -> Code:
    """Compile for a compute capability."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        value = launch.arguments[param.name]
        special = not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[param.name], constants[i,] = "constexpr", value
            continue
        if isinstance(value, float):
            signature[param.name] = "fp32"
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[param.name] = TYPES[value.dtype] if tensor else "i32"
        if special and (value.data_ptr() if tensor else value) % 16 == 0:
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage, text = _disassembled(made.asm["cubin"])
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", usage)
    assert found, usage
    return Code(int(found[1]), int(found[2]), made.metadata.shared, text)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        commands = ([TOOLS / "cuobjdump", "-res-usage"], [TOOLS / "nvdisasm", "-c"])
        usage, text = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    finally:
        os.unlink(file.name)
    return usage, text
