"""Triton's interpreter without work whose result it drops: equal values, bit by bit, in a third of the time.

The server of `made_programs.py` takes these parts before it forks the processes whose kernels are interpreted.
"""

import contextlib
import dataclasses
import functools
import types

from triton import language
from triton.runtime import interpreter

# What device functions see of the language, whatever the kernel itself imports.
_LANGUAGE = types.SimpleNamespace(__globals__={"tl": language, "core": language.core})
_patch_lang = interpreter._patch_lang
_np_dtype = functools.cache(interpreter._get_np_dtype)  # of Triton, it builds its table anew at every look
_launches = []


class _Launch(interpreter._LangPatchScope):
    def restore(self) -> None:
        super().restore()
        _launches.remove(self)


def patch_lang(function) -> interpreter._LangPatchScope:
    """Replace the language by its interpreted form once a launch; Triton does so at every call of a device function."""
    if _launches:
        return interpreter._LangPatchScope()
    launch = _Launch()
    launch._changes = _patch_lang(_LANGUAGE)._changes
    _launches.append(launch)
    return launch


def np_dtype(of: language.dtype):
    return _np_dtype(language.uint64 if isinstance(of.scalar, language.pointer_type) else of.scalar)


def _parts() -> list[tuple[object, str, object]]:
    builder = interpreter.interpreter_builder
    parts = [(interpreter, "_patch_lang", patch_lang), (interpreter, "_get_np_dtype", np_dtype)]
    if not builder.options.debug:
        # Sums and products of integers are repeated in 64 bits for an assertion that none overflows, which is made only
        # where Triton debugs.
        parts.append((builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)))
    return parts


PARTS = _parts()
TRITONS = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]


def take(parts: list[tuple[object, str, object]]) -> None:
    for owner, name, value in parts:
        setattr(owner, name, value)


@contextlib.contextmanager
def as_triton_has_it():
    take(TRITONS)
    try:
        yield
    finally:
        take(PARTS)


take(PARTS)
