"""benchmarks/test_train_step.py and its table: rows leave nothing behind, and only what was measured is shown."""

import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from transformers import PhiConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_step_table

BENCHMARK = Path(train_step_table.__file__).with_name("test_train_step.py")


@pytest.fixture(scope="module")
def train_step() -> ModuleType:
    """The benchmark as a module; it imports from the conftest.py beside it, of which this folder has one too."""
    spec = importlib.util.spec_from_file_location("train_step_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "conftest", SimpleNamespace(synchronize=lambda device: None))
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def config():
    return PhiConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        partial_rotary_factor=0.5,
    )


@pytest.mark.parametrize("name", ["b", "c", "e"])
def test_a_finished_row_is_in_no_reference_cycle(train_step, config, name):
    """Its memory is free at once, without the garbage collector."""
    (row,) = [row for row in train_step.ROWS if row.name.startswith(f"{name}:")]
    row = row._replace(quantization="none", dequantize_once=False, online=False)
    batch = train_step.make_batch(train_step.whole_config(config), 1, 0)
    gc.collect()
    gc.disable()
    try:
        with train_step.prepared(row, config, 2) as (aligned, loss):
            if not row.compiled:  # compiling takes longer than everything else here
                loss(batch)
            model = weakref.ref(aligned)
        del aligned, loss
        assert model() is None
    finally:
        gc.enable()


def test_the_model_of_a_finished_row_is_gone_before_the_next_is_measured(train_step, config, monkeypatch):
    built, measured = [], []
    build, measured_loss = train_step.build_row, train_step.measured_loss

    def recorded_build(*arguments):
        aligned = build(*arguments)
        aligned.cycle = aligned.model.cycle = [aligned]  # the collector has something to do
        built.append(weakref.ref(aligned))
        return aligned

    def recorded_loss(*arguments):
        measured.append([model() is not None for model in built])
        return measured_loss(*arguments)

    monkeypatch.setattr(train_step, "build_row", recorded_build)
    monkeypatch.setattr(train_step, "measured_loss", recorded_loss)
    monkeypatch.setattr(train_step, "_truth", {})
    benchmark = SimpleNamespace(pedantic=lambda step, **_: step(), stats=None)
    row = train_step.B3._replace(quantization="none", checkpointing=False, online=False)
    for _ in range(2):
        assert train_step.run_row(benchmark, row, config, 2, 1, (1,)) is None
    alive = [models[:-1] for models in measured]  # when each model was measured, which of the earlier ones lived
    assert alive == [[], [False], [False, False]]  # the plain modules, then the row twice


def test_the_table_of_a_cpu_shows_no_parts_of_a_step():
    def result(shape):
        rows = [
            {
                "name": name,
                "note": "",
                "seconds": {"p50": 0.1},
                "shape": shape,
                "samples": 2,
                "samples_per_second": speed,
                "supervised_tokens_per_second": 1.0,
                "tokens_per_second": 1.0,
                "peak_gb": 3.0,
                "lengths": [[6, 20]],
                "rank": 8,
                "steps": 5,
            }
            for name, speed in (("b: common", 2.0), ("b2: groups", 2.1), ("d1: varlen", 2.2), ("e: everything", 4.0))
        ]
        where = {"device": "a device", "torch": "2", "commit": "c", "date": "d"}
        return {"rows": rows, "provenance": where}

    small, full = (train_step_table._measured(result(shape)) for shape in ("small", "Phi-2"))
    for part in ("b2: groups", "d1: varlen"):
        assert part in full and part not in small
    assert "| e: everything | 4.0 | 2.00 x" in small and "| e: everything | 4.0 | 2.00 x" in full
    assert "measured on a GPU only" in small and "measured on a GPU only" not in full


def test_predictions_stand_beside_what_is_not_measured():
    lines = train_step_table._predictions([]).splitlines()
    assert "| H100 | everything | 52 | 85 to 100 | not measured |" in lines
    assert "predicted 6.0 to 7.0" in train_step_table._stage([], [])
