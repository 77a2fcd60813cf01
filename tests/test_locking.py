"""A lock that one process holds at a time."""

import os
import subprocess
import sys

import pytest

from pointalign.storage import lock

pytestmark = pytest.mark.skipif(os.name != "posix", reason="without flock there is no lock")
TRY = """
import sys
from pathlib import Path
from pointalign.locking import lock
with lock(Path(sys.argv[1]), wait=False) as held:
    print(held)
"""


def tried(path) -> str:
    return subprocess.run([sys.executable, "-c", TRY, str(path)], capture_output=True, text=True, check=True).stdout


def test_another_process_does_without_or_holds_it(tmp_path):
    path = tmp_path / "new folder" / "one.lock"
    with lock(path) as held:
        assert held and tried(path) == "False\n"
    assert tried(path) == "True\n"


def test_it_is_free_again_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock(tmp_path / "one.lock"):
        raise KeyError
    assert tried(tmp_path / "one.lock") == "True\n"
