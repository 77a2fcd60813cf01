"""Benchmarks: fair turns, honest GPU timing, results only on request, provenance that survives a bare machine."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_programs import PYTEST, run_program

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import point_op_contenders as contenders
import point_ops_report
import turns

from pointalign import storage
from pointalign_kernels import point_ops, reference

ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(
    "cpu" not in point_ops.NATIVE_DEVICES or torch.cuda.is_available(),
    reason="needs native CPU point ops, and no GPU, which the benchmarks would prefer",
)


class Device:
    """A clock in milliseconds that calls move, and events that read it, as CUDA's do."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def call(self) -> None:
        self.now += 0.5
        self.calls += 1

    def event(self):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.synchronize = lambda: None
        event.elapsed_time = lambda end: end.at - event.at
        return event


def test_a_gpu_turn_is_ten_calls_between_two_events():
    device = Device()
    timer = turns.event_timer(device.event)
    assert timer.seconds(device.call) == pytest.approx(0.5e-3)
    assert device.calls == 11 and timer.calls == 10  # one runs ahead, untimed


def test_contenders_alternate_and_a_slow_one_gets_fewer_turns_spread_over_the_race():
    order = []
    costs = {"fast": 0.01, "slow": 2.0}
    current = {"name": ""}

    def contender(name: str):
        def call() -> None:
            current["name"] = name
            order.append(name)

        return call

    def seconds(call) -> float:
        call()
        return costs[current["name"]]

    race = turns.Race({name: contender(name) for name in costs}, turns.Timer("fake", seconds, 1, budget=8.0), 20)
    race.start()
    order.clear()
    for _ in range(20):
        race.round()
    assert order.count("fast") == 20 and order.count("slow") == 4
    gaps = [order[place + 1 :].index("slow") for place, name in enumerate(order) if name == "slow" and place < 16]
    assert set(gaps) == {5}
    assert race.results()["slow"] == {"seconds": dict.fromkeys(("min", "p20", "p50", "p80"), 2.0), "turns": 4}


def test_the_slowest_contender_still_gets_three_turns():
    assert turns.turns_of(1e9, turns.wall_timer(), 31) == {0, 10, 20}


@pytest.fixture
def clouds():
    return contenders.make_clouds(torch.device("cpu"), 2, 256, 16, 0, "reference")


def test_gpu_packages_take_part_where_they_are_installed(clouds, monkeypatch):
    """The calls that a GPU makes, on stand-ins with the signatures of torch-fps 0.6 and torch-quickfps 2.1."""

    def torch_fps(points, valid_mask, k, *, random_start=True, validate=True, assume_finite=False):
        assert valid_mask.shape == points.shape[:2] and valid_mask.all() and not random_start
        return reference.farthest_point_sample(points, k)

    def torch_quickfps(points, k, h, start_idx):
        assert 2**h <= points.shape[1]
        return reference.farthest_point_sample(points, k, start_idx)

    modules = {
        "torch_fps": SimpleNamespace(farthest_point_sampling=torch_fps),
        "torch_quickfps": SimpleNamespace(sample_idx=torch_quickfps),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(
        contenders, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name in modules))
    )
    with ThreadPoolExecutor(1) as executor:
        peers = contenders.sampling_peers(clouds, 16, executor)
    assert list(peers) == ["torch-quickfps h=3", "torch-quickfps h=5", "torch-quickfps h=7"]  # torch-fps is for CUDA
    batch, num_points, _ = clouds.points.shape
    peers |= contenders._torch_fps(clouds.points.device, batch, num_points, 16)
    for sample in peers.values():
        assert torch.equal(sample(clouds), clouds.index)


def test_the_exactness_check_rejects_a_sample_that_is_not_farthest(clouds):
    assert contenders.is_farthest_throughout(clouds.points[0], clouds.index[0])
    swapped = clouds.index[0].clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert not contenders.is_farthest_throughout(clouds.points[0], swapped)


def test_the_release_s_way_samples_and_groups_the_same_points(clouds):
    assert torch.equal(contenders.loop_sample(clouds.points, 16), clouds.index)
    truth = reference.group_points(clouds.coloured, clouds.index, 8)
    for group in (contenders.topk_group, contenders.expanded_group):
        torch.testing.assert_close(group(clouds.coloured, clouds.index, 8).sum(2), truth.sum(2))


def test_provenance_without_git_or_driver_and_with_a_named_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("POINTALIGN_COMMIT", raising=False)
    bare = storage.provenance(torch.device("cpu"))
    assert bare["commit"] is None and bare["driver"] is None and bare["uncommitted_changes"] is None
    assert bare["torch"].split("+")[0] == torch.__version__.split("+")[0] and bare["device"].endswith(
        f"threads: {torch.get_num_threads()}"
    )
    monkeypatch.setenv("POINTALIGN_COMMIT", "abc123")
    assert storage.provenance(torch.device("cpu"))["commit"] == "abc123"


def test_versions_are_found_by_import_name(monkeypatch):
    installed = {"torch_quickfps": ["torch-quickfps-cu130"]}
    monkeypatch.setattr(storage, "_distributions", lambda: installed)
    monkeypatch.setattr(storage.importlib.metadata, "version", {"torch-quickfps-cu130": "2.1.0"}.__getitem__)
    assert storage.version_of("torch_quickfps") == "2.1.0"
    assert storage.version_of("torch_fps") is None


def run_benchmarks(*arguments: str) -> str:
    words = ["-q", "-p", "no:cacheprovider", "benchmarks/test_point_ops.py", "--small", *arguments]
    done = run_program(PYTEST, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked_results() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (ROOT / "benchmarks/results").glob("point_ops_*")}


@needs_native
def test_the_benchmark_command_times_writes_and_is_reported(tmp_path, monkeypatch):
    before = tracked_results()
    out = run_benchmarks("--benchmark-only", "--results", str(tmp_path))
    assert "8 passed" in out and "skipped" not in out
    content = json.loads((tmp_path / "point_ops_cpu.json").read_text())
    assert {row["race"] for row in content["rows"]} == {"sampling", "scaling", "grouping", "latency", "pointnet"}
    assert min(content["ceilings"][name] for name in ("flops", "flops_fp32", "bytes")) > 0
    assert content["provenance"]["rehearsal"]
    assert content["provenance"]["load_average"] is not None and content["rows"][0]["timing"]
    monkeypatch.setattr(point_ops_report, "RESULTS", tmp_path)
    assert "| native |" in point_ops_report.point_ops() and (tmp_path / "point_ops_cpu.svg").exists()
    assert tracked_results() == before


@pytest.mark.skipif("POINTALIGN_LONG_TESTS" not in os.environ, reason="starts pytest again: run it by `make test-long`")
@needs_native
def test_without_a_results_folder_nothing_is_written():
    before = tracked_results()
    out = run_benchmarks("--benchmark-only", "-k", "pointnet")
    assert "1 passed" in out and "--results FOLDER was not given: point_ops_cpu.json" in out
    assert tracked_results() == before


def result(device: str, race: str, seconds: float, rehearsal: bool = False) -> dict:
    origin = {"device": device, "driver": "1", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-11-26"}
    origin |= {"uncommitted_changes": False, "load_average": 0.1, "rehearsal": rehearsal}
    row = {"race": race, "batch": 16, "points": 8192, "samples": 512, "neighbours": 32, "timing": "events"}
    quantiles = dict.fromkeys(("min", "p20", "p50", "p80"), seconds)
    row["contenders"] = {"native": {"seconds": quantiles, "turns": 3}}
    return {"provenance": origin, "ceilings": {"flops": 7e14, "flops_fp32": 5e13, "bytes": 3e12}, "rows": [row]}


def test_predictions_stand_beside_cells_until_a_gpu_fills_them(tmp_path, monkeypatch):
    monkeypatch.setattr(point_ops_report, "RESULTS", tmp_path)

    def line(title: str, clouds: str = "16 clouds") -> list[str]:
        start = f"| {title}, {clouds} of 8192 points |"
        found = [line for line in point_ops_report.point_ops().splitlines() if line.startswith(start)]
        return [cell.strip() for cell in found[-1].split("|")[2:-1]]

    assert line("Sampling") == ["150", *["not predicted"] * 2, *["not measured"] * 4]
    row = {"clouds": "ellipsoids and boxes", "points": 8192, "samples": 512}
    row["sampling"] = {"4": {"buckets": 256, "opened": 13.5, "samples_16": 3.4, "pairs_16": 0.9}}
    row["sampling_us"] = [{"scan": 306.6, "buckets": 152.0}, {"scan": 271.8, "buckets": 134.7}]
    row["grouping"] = {"scan": {"slow_steps": 197.4, "merges": 39.1}, "buckets": {"buckets": 13.5, "merges": 5.1}}
    row["grouping_us"] = {"1": [{"scan": 27.2, "buckets": 12.4}], "16": [{"scan": 105.4, "buckets": 32.6}]}
    origin = result("AMD EPYC", "sampling", 1.0)["provenance"]
    content = {"chosen": {"cell_bits": 4, "warps": 16}, "rows": [row], "provenance": origin}
    (tmp_path / "point_ops_simulated.json").write_text(json.dumps(content))
    assert line("Sampling") == ["150", "270-305", "135-150", *["not measured"] * 4]
    assert line("Grouping", "1 cloud") == ["", "27-27", "12-12", *["not measured"] * 4]
    assert "| 256 | 13.5 | 3.4 | 0.9 | 270-305 | 135-150 |" in point_ops_report.point_ops()
    (tmp_path / "point_ops_small.json").write_text(json.dumps(result("NVIDIA H200", "sampling", 1e-4, rehearsal=True)))
    assert line("Sampling")[4] == "not measured"
    (tmp_path / "point_ops_h100.json").write_text(json.dumps(result("NVIDIA H100 80GB HBM3", "sampling", 285e-6)))
    assert line("Sampling") == ["150", "270-305", "135-150", "285", *["not measured"] * 3]
    assert line("Grouping") == ["45", "105-105", "33-33", *["not measured"] * 4]


def test_a_section_that_was_not_measured_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(point_ops_report, "RESULTS", tmp_path)
    for section in (point_ops_report.encoder, point_ops_report.chat):
        with pytest.raises(FileNotFoundError, match=f"{section.__name__}_cpu.json"):
            section()
