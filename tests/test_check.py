"""The pre-flight check names, counts and, if asked, skips bad objects."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import trimesh

from pointalign import check as check_command
from pointalign.data import check as check_module
from pointalign.data import reading_pool
from pointalign.data.check import BadObjectsError, check
from pointalign.data.dataset import ConversationDataset
from pointalign.data.point_cloud import Reading
from pointalign.data.reading_pool import Job

CLOUD = np.random.default_rng(0).random((64, 6)).astype(np.float32)


def build(folder, clouds, pairs=()):
    """A data set of one conversation per object of `clouds` (name -> array, None = no file) and per pair of names."""
    entries = []
    for ids in [*clouds, *pairs]:
        human = "<point>" * (1 if isinstance(ids, str) else len(ids)) + " What?"
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": "It."}]
        entries.append({"object_id": ids, "conversations": turns})
    for name, cloud in clouds.items():
        if cloud is not None:
            np.save(folder / f"{name}_8192.npy", cloud)
    (folder / "annotation.json").write_text(json.dumps(entries))
    return ConversationDataset(folder / "annotation.json", folder)


def broken():
    cloud = CLOUD.copy()
    cloud[5:20, 0] = np.nan
    return {"good": CLOUD, "missing": None, "nan": cloud, "small": CLOUD[:31], "other": CLOUD + 1 / 255}


def test_good_data_passes(tmp_path):
    dataset = build(tmp_path, {"a": CLOUD, "b": CLOUD}, [["a", "b"]])
    trimesh.creation.box().export(tmp_path / "mesh.ply")
    report = check(dataset, num_groups=64)
    assert (report.objects, report.read_in_full, report.bad) == (2, 2, {})
    assert str(report) == "2 objects checked (all read in full), none bad" and len(dataset) == 3


def test_bad_objects_stop_the_run_and_are_all_named(tmp_path):
    dataset = build(tmp_path, broken() | {"other": CLOUD})
    with pytest.raises(BadObjectsError) as caught:
        check(dataset, num_groups=32)
    message = str(caught.value)
    assert message.startswith("3 of 5 objects are bad (all read in full):") and "--data.skip_bad" in message
    assert "missing: no cloud of object 'missing'" in message and "point 5 has coordinates" in message
    assert "31 points, the encoder needs at least 32" in message
    assert len(dataset) == 5


def test_skip_bad_drops_their_conversations(tmp_path, capsys):
    dataset = build(tmp_path, broken() | {"other": CLOUD}, [["good", "other"], ["good", "nan"]])
    report = check(dataset, num_groups=32, skip_bad=True)
    assert sorted(report.bad) == ["missing", "nan", "small"] and report.dropped_conversations == 4
    assert [c.object_ids for c in dataset.conversations] == [("good",), ("other",), ("good", "other")]
    printed = capsys.readouterr().err
    assert "3 of 5 objects are bad" in printed and "4 conversations about them were dropped" in printed


def test_skip_bad_needs_something_left(tmp_path):
    with pytest.raises(BadObjectsError, match="No conversation is left"):
        check(build(tmp_path, {"a": None}), num_groups=32, skip_bad=True)


def test_ten_are_named_and_all_counted(tmp_path):
    with pytest.raises(BadObjectsError) as caught:
        check(build(tmp_path, {f"o{i:02}": None for i in range(25)} | {"good": CLOUD}), num_groups=32)
    message = str(caught.value)
    assert "25 of 26 objects" in message and "o09" in message and "o10" not in message and "and 15 more" in message


def test_large_sets_are_sampled_and_headers_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "FULL_READ_LIMIT", 20)
    monkeypatch.setattr(check_module, "FULL_READ_SAMPLE", 5)
    dataset = build(tmp_path, {f"o{i:02}": CLOUD for i in range(30)} | {"none": None, "small": CLOUD[:8]})
    for name in ("o03", "o17", "o29"):  # truncated: the header gives them away, read in full or not
        path = tmp_path / f"{name}_8192.npy"
        path.write_bytes(path.read_bytes()[:-1])
    trimesh.creation.box().export(tmp_path / "o11.stl")
    (tmp_path / "o11_8192.npy").unlink()
    report = check(dataset, num_groups=32, skip_bad=True)
    assert report.read_in_full == 5 and "(5 read in full)" in str(report)
    assert sorted(report.bad) == ["none", "o03", "o17", "o29", "small"]


def test_command_line(tmp_path, capsys):
    build(tmp_path, {"a": CLOUD})
    command = [
        sys.executable,
        "-m",
        "pointalign.check",
        str(tmp_path / "annotation.json"),
        "--clouds",
        str(tmp_path),
    ]
    bad = subprocess.run(command, capture_output=True, text=True)
    assert bad.returncode == 1 and "at least 512" in bad.stderr and "Traceback" not in bad.stderr
    assert check_command.main([*command[3:], "--num_groups", "64"]) == 0
    assert "1 conversations; 1 objects checked (all read in full), none bad" in capsys.readouterr().out
    assert check_command.main([str(tmp_path / "gone.json"), "--clouds", str(tmp_path)]) == 1
    assert "no such annotation file" in capsys.readouterr().err


def test_what_is_left_out_is_said_and_mixed_verticals_are_warned_of(tmp_path, capsys):
    cloud = CLOUD.copy()
    cloud[5, 0] = np.nan
    dataset = build(tmp_path, {"holes": cloud, "good": CLOUD, "mesh": None})
    trimesh.creation.box().export(tmp_path / "mesh.glb")
    report = check(dataset, num_groups=32)
    assert list(report.notes) == ["holes"] and "1 of 64 points are NaN" in report.notes["holes"]
    assert report.warning == "" and "holes_8192.npy" in capsys.readouterr().err
    turned = ConversationDataset(tmp_path / "annotation.json", tmp_path, up_axis="z")
    assert "the set holds 1 .glb (y up), and --data.up_axis z" in check(turned, num_groups=32).warning
    assert "docs/data.md" in capsys.readouterr().err


def hostile_files(folder):
    """A small file of every kind that is refused, by name, with a part of the reason."""
    header = b"ply\nformat ascii 1.0\nelement vertex 99999999999\nproperty float x\nend_header\n"
    (folder / "lies.ply").write_bytes(header)
    (folder / "caption.txt").write_text("A chair of wood.")
    np.save(folder / "nan.npy", np.full((90, 3), np.nan))
    (folder / "fan.gltf").write_text(json.dumps({"meshes": [{"primitives": [{"mode": 6, "attributes": {}}]}]}))
    (folder / "broken.npz").write_bytes(b"PK no archive")
    (folder / "short.laz").write_bytes(b"LASF")
    for name in ("chair.dae", "chair.3mf", "scene.splat"):
        (folder / name).write_bytes(b"of a program")
    (folder / "meshopt.gltf").write_text(json.dumps({"extensionsRequired": ["EXT_meshopt_compression"]}))
    (folder / "wood.png").write_bytes(b"a texture beside a mesh is no cloud")
    return {
        "lies.ply": "promises 99999999999 vertex", "caption.txt": "rows of numbers", "nan.npy": "90 of 90 points",
        "fan.gltf": "triangle fans", "broken.npz": "unreadable .npz file", "short.laz": "no LASF header",
        "chair.dae": "convert a mesh to .glb", "chair.3mf": "expected one of .npy, .ply, .obj",
        "scene.splat": "to .ply", "meshopt.gltf": "EXT_meshopt_compression",
    }  # fmt: skip


def test_files_are_checked_by_themselves(tmp_path, capsys):
    np.save(tmp_path / "good.npy", CLOUD)
    assert check_command.main([str(tmp_path / "good.npy"), "--num_groups", "64"]) == 0
    assert f"good {tmp_path / 'good.npy'}: 64 points" in capsys.readouterr().out
    reasons = hostile_files(tmp_path)
    assert check_command.main([str(tmp_path), str(tmp_path / "gone.ply")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line[:4] in ("good", "bad ")]) == len(reasons) + 2
    for name, reason in reasons.items():
        assert any(line.startswith(f"bad  {tmp_path / name}: ") and reason in line for line in lines), (name, lines)
    assert any("gone.ply: no such file" in line for line in lines)
    assert any("64 points, fewer than the 512 that the encoder needs" in line for line in lines)
    with pytest.raises(SystemExit):
        check_command.main([str(tmp_path / "annotation.json")])
    assert "needs --clouds" in capsys.readouterr().err


def test_a_summary_is_a_table_and_json(tmp_path, capsys):
    np.save(tmp_path / "a.npy", CLOUD)
    np.save(tmp_path / "b.npy", CLOUD)
    np.save(tmp_path / "c.npy", CLOUD * [2, 2, 2, 1, 1, 1])
    np.save(tmp_path / "few.npy", CLOUD[:9])
    (tmp_path / "bad.ply").write_bytes(b"ply")
    assert check_command.main([str(tmp_path), "--num_groups", "64", "--json", str(tmp_path / "out.json")]) == 1
    printed, summary = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert summary["files"] == 5 and summary["read"] == 4 and summary["formats"] == {".npy": 4, ".ply": 1}
    assert summary["duplicates"] == [[str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]]
    assert list(summary["unreadable"]) == [str(tmp_path / "bad.ply")]
    assert summary["fewer_points_than_needed"]["files"] == {str(tmp_path / "few.npy"): 9}
    assert summary["ranges"]["points"] == {"least": 9, "median": 64, "most": 64}
    assert summary["ranges"]["coordinates"]["most"] == pytest.approx(2 * CLOUD[:, :3].max())
    assert re.search(r"groups of equal clouds +1\n", printed) and re.search(r"points +9 +64 +64\n", printed)


def test_a_summary_names_objects_without_a_cloud(tmp_path):
    build(tmp_path, {"a": CLOUD, "gone": None})
    arguments = [str(tmp_path / "annotation.json"), "--clouds", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert check_command.main([*arguments, "--num_groups", "64"]) == 1
    assert json.loads((tmp_path / "out.json").read_text())["missing"] == ["gone"]


def test_many_files_are_read_in_processes_and_large_ones_alone(tmp_path, monkeypatch):
    for number in range(40):
        np.save(tmp_path / f"{number}.npy", CLOUD)
    (tmp_path / "7.npy").write_bytes(b"x")
    jobs = [Job(str(tmp_path / f"{number}.npy")) for number in range(40)]
    large = tmp_path / "3.npy"
    monkeypatch.setattr(reading_pool, "memory_bound", lambda path: 1 << 62 if path == large else 1)
    outcomes = reading_pool.read_all(jobs, Reading())
    assert [outcome.name for outcome in outcomes] == [job.name for job in jobs]
    assert [number for number, outcome in enumerate(outcomes) if outcome.error] == [7]
    assert reading_pool.read_job(jobs[3], Reading(), share=1 << 40) is None


def test_a_file_that_takes_too_long_is_named(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", CLOUD)

    def slow(*_):
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(reading_pool, "SECONDS", 0.1)
    monkeypatch.setattr(reading_pool, "read_point_cloud", slow)
    outcome = reading_pool.read_job(Job(str(tmp_path / "a.npy")), Reading())
    assert outcome is not None and "a.npy: refused: reading it takes more than 0 s" in outcome.error


def test_a_killed_process_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(reading_pool, "read_job", kill_itself)
    with pytest.raises(ChildProcessError, match="killed, mostly for its memory, at object '0'"):
        reading_pool.read_all([Job(str(number)) for number in range(40)], Reading())


def kill_itself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
