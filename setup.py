"""Optional native build, switched by POINTALIGN_BUILD=auto|none|cpu|cuda. Metadata lives in pyproject.toml."""

import os

from setuptools import setup

BUILDS = ("auto", "none", "cpu", "cuda")
build = os.environ.get("POINTALIGN_BUILD", "auto")
if build not in BUILDS:
    raise SystemExit(f"POINTALIGN_BUILD={build!r}: expected one of {', '.join(BUILDS)}")

setup()
