"""What Windows and macOS lack: modules, calls and units of Linux."""

import ast
import builtins
import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pointalign import storage
from pointalign.allocator import keep_freed_memory
from pointalign.efficient import memory

ROOT = Path(__file__).parents[1]
UNIX = ("resource", "fcntl", "pwd", "grp", "termios")


def test_no_module_of_unix_is_imported_at_the_top():
    """In a function, behind a question about the system, it may be."""
    for package in ("pointalign", "kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                assert not set(names) & set(UNIX), path


def test_memory_without_sysconf_and_resource(monkeypatch):
    before = memory.device_bytes(torch.device("cpu"))
    assert before == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.delattr(os, "sysconf")
    assert memory.device_bytes(torch.device("cpu")) == before
    original = builtins.__import__

    def without_resource(name, *given, **named):
        if name == "resource":
            raise ImportError(name)
        return original(name, *given, **named)

    monkeypatch.setattr(memory.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert memory.peak_resident_bytes() is None


@pytest.mark.parametrize(("platform", "factor"), [("darwin", 1), ("freebsd", 1024)])
def test_the_unit_of_resident_memory_is_that_of_the_system(platform, factor, monkeypatch):
    import resource

    monkeypatch.setattr(memory.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=7))
    assert memory.peak_resident_bytes() == 7 * factor


def test_no_c_library_by_name_and_no_locks_are_no_error(monkeypatch, tmp_path):
    def windows(name):
        raise TypeError(f"bad argument type for built-in operation: {name}")

    monkeypatch.setattr(ctypes, "CDLL", windows)
    keep_freed_memory()
    monkeypatch.setattr(storage.os, "name", "nt")
    with storage.lock(tmp_path / "lock") as held:
        monkeypatch.undo()
        assert held
