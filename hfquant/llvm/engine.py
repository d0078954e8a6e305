"""Compiling, and keeping on disk what was compiled, so that the next process need not.

An object is named by everything that decides what is in it: the generators' source, what was asked of them, the
instructions, the compiler.  A file that is damaged, or lies in a folder that others may write to, is not loaded.
"""

import ctypes
import hashlib
import os
import stat
import threading
from array import array
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from .. import storage
from .ir import Code
from .machine import Level

_LOCK = threading.RLock()
_ENGINES: list[Any] = []  # code lives as long as what loaded it
DIGEST = 32


def call(function: int, record: "array[int]") -> None:
    """Run a function that takes the address of a record."""
    FUNCTION(function)(record.buffer_info()[0])


FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ADDRESSES: dict[tuple[Level, str], int] = {}


def function(level: Level, what: str, name: str, generate: Callable[[Code], None], folder: Path | None = None) -> int:
    """Address of the function `name` of the module that `generate` writes.

    `what` says all that it depends on, beside the source in this folder and in `folder`: by default the one where
    `generate` is written.
    """
    with _LOCK:
        key = level, what
        if key not in _ADDRESSES:
            written = source(folder or Path(generate.__code__.co_filename).parent)
            _ADDRESSES[key] = _load(level, _object(level, f"{written}\n{what}", generate), name)
        return _ADDRESSES[key]


def _object(level: Level, what: str, generate: Callable[[Code], None]) -> bytes:
    """From disk if it is there, else compiled and left there."""
    versions = f"{llvmlite.__version__} {llvm.llvm_version_info} {llvm.get_default_triple()}"
    key = hashlib.sha256("\n".join((repr(level), what, versions)).encode()).hexdigest()
    path = None if (folder := _folder()) is None else folder / f"{key}.o"
    if path is not None and (found := _read(path)) is not None:
        return found
    compiled = compile(level, generate)
    if path is not None:
        _write(path, compiled)
    return compiled


def assembly(level: Level, generate: Callable[[Code], None]) -> str:
    """The same for reading."""
    machine, module = _optimized(level, generate)
    return str(machine.emit_assembly(module))


def compile(level: Level, generate: Callable[[Code], None]) -> bytes:
    """An object file."""
    machine, module = _optimized(level, generate)
    return bytes(machine.emit_object(module))


def _optimized(level: Level, generate: Callable[[Code], None]) -> tuple[Any, Any]:
    code = Code(level)
    generate(code)
    machine = _target(level)
    module = llvm.parse_assembly(str(code.module))
    module.triple, module.data_layout = llvm.get_default_triple(), str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    # what should be unrolled is; what should be a vector is one
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return machine, module


def _load(level: Level, compiled: bytes, name: str) -> int:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target(level))
    engine.add_object_file(llvm.ObjectFileRef.from_data(compiled))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(name))


def _target(level: Level) -> Any:
    """A new one: an engine takes it over."""
    _initialize()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=level.cpu, features=level.features, opt=3, reloc="pic", codemodel="default", jit=True
    )


@cache
def _initialize() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


@cache
def source(folder: Path) -> str:
    """What code is generated from by what lies in a folder."""
    files = sorted(path for each in (Path(__file__).parent, folder) for path in each.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in files)


def _folder() -> Path | None:
    """Where objects lie; None where there is no place that belongs to this user alone."""
    folder = storage.cache_folder() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return None
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return folder if mine and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, compiled = content[:DIGEST], content[DIGEST:]
    return compiled if hashlib.sha256(compiled).digest() == digest else None


def _write(path: Path, compiled: bytes) -> None:
    """Whole or not at all; without room for it, the next process compiles again."""
    part = path.with_suffix(f".{os.getpid()}")
    try:
        part.write_bytes(hashlib.sha256(compiled).digest() + compiled)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
