"""benchmarks/test_train_step.py and its table: rows leave nothing behind, and only what was measured is shown."""

import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from made_graphs import CpuRecorder
from torch import nn
from transformers import PhiConfig

from pointalign.efficient import graphs
from pointalign.efficient.fused_lora import AdapterGroup
from pointalign_kernels import lora_dropout

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import train_step_rows
import train_step_table

BENCHMARK = Path(train_step_table.__file__).with_name("test_train_step.py")


@pytest.fixture(scope="module")
def train_step() -> ModuleType:
    """The benchmark as a module, under a name that no test has."""
    spec = importlib.util.spec_from_file_location("train_step_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.parametrize("name", ["b", "c", "e", "e3"])
def test_a_finished_row_is_in_no_reference_cycle(config, name):
    """Its memory is free at once, without the garbage collector."""
    (row,) = [row for row in train_step_rows.ROWS if row.name.startswith(f"{name}:")]
    row = row._replace(quantization="none", dequantize_once=False, online=False)
    batch = train_step_rows.make_batch(train_step_rows.whole_config(config), 1, 0)
    gc.collect()
    gc.disable()
    try:
        with train_step_rows.prepared(row, config, 2) as (aligned, loss):
            if not row.compiled:  # compiling takes longer than everything else here
                loss(batch)
            model = weakref.ref(aligned)
        del aligned, loss
        assert model() is None
    finally:
        gc.enable()


def test_the_model_of_a_finished_row_is_gone_before_the_next_is_measured(train_step, config, monkeypatch):
    built, measured = [], []
    build, measured_loss = train_step_rows.build_row, train_step.measured_loss

    def recorded_build(*arguments):
        aligned = build(*arguments)
        aligned.cycle = aligned.model.cycle = [aligned]  # the collector has something to do
        built.append(weakref.ref(aligned))
        return aligned

    def recorded_loss(*arguments):
        measured.append([model() is not None for model in built])
        return measured_loss(*arguments)

    monkeypatch.setattr(train_step_rows, "build_row", recorded_build)
    monkeypatch.setattr(train_step, "measured_loss", recorded_loss)
    monkeypatch.setattr(train_step, "_truth", {})
    benchmark = SimpleNamespace(pedantic=lambda step, **_: step(), stats=None)
    row = train_step_rows.B3._replace(quantization="none", checkpointing=False, online=False)
    for _ in range(2):
        assert train_step.run_row(benchmark, row, config, 2, 1, (1,)) is None
    alive = [models[:-1] for models in measured]  # when each model was measured, which of the earlier ones lived
    assert alive == [[], [False], [False, False]]  # the plain modules, then the row twice


@pytest.fixture
def recordings(monkeypatch):
    """(recorded passes, the largest dropout rate in them) of row f, which here replays operators, not CUDA graphs."""
    recordings = []

    class Recorded(graphs.RecordedPasses):
        def __init__(self, decoder, *arguments):
            rates = [module.p for module in decoder.modules() if isinstance(module, nn.Dropout)]
            recordings.append((weakref.ref(self), max(rates)))
            super().__init__(decoder, *arguments)

    monkeypatch.setattr(graphs, "RecordedPasses", Recorded)
    monkeypatch.setattr(graphs, "CudaRecorder", CpuRecorder)
    return recordings


ON_A_CPU = {"attention": "masked", "quantization": "none", "dequantize_once": False}


def test_row_f_is_recorded_without_dropout_for_its_gate_and_again_for_the_clock(train_step, config, recordings):
    alive = []

    def pedantic(step, **_):
        alive.append([recording() is not None for recording, _ in recordings])
        step()
        step()
        alive.append([recording() is not None for recording, _ in recordings])

    benchmark = SimpleNamespace(pedantic=pedantic, stats=SimpleNamespace(stats=SimpleNamespace(data=[0.1, 0.2])))
    gc.disable()  # the memory of the gate's recording is free at once, without the garbage collector
    try:
        result = train_step.run_row(benchmark, train_step_rows.F._replace(**ON_A_CPU), config, 2, 2, (2, 1))
    finally:
        gc.enable()
    assert alive == [[False], [False, True]]
    assert [rate > 0 for _, rate in recordings] == [False, True]
    assert result["filled_to"] > result["tokens"] > 0  # the second batch is smaller
    assert result["loss_error"] < 1e-2


@pytest.mark.parametrize("broken", ["replay_forward", "replay_backward"])
def test_the_gate_of_row_f_refuses_what_is_not_replayed(train_step, config, recordings, monkeypatch, broken):
    replay = graphs.RecordedPasses.__call__

    def stale(passes, inputs):
        setattr(passes, broken, lambda: None)
        return replay(passes, inputs)

    monkeypatch.setattr(graphs.RecordedPasses, "__call__", stale)
    row = train_step_rows.F._replace(**ON_A_CPU)
    batches = [train_step_rows.make_batch(train_step_rows.whole_config(config), 1, seed) for seed in (0, 1)]
    with train_step_rows.prepared(row, config, 2) as (aligned, loss):
        with pytest.raises(AssertionError, match="from CUDA graphs"):
            train_step.replayed_loss(aligned, loss, batches, train_step_rows.shape_of(batches))


@pytest.mark.skipif(train_step_rows.CUDA, reason="a GPU runs the row")
def test_row_f_is_skipped_on_a_cpu(train_step):
    with pytest.raises(pytest.skip.Exception, match="CUDA graphs need a GPU"):
        train_step.test_train_step(None, None, train_step_rows.F)


def test_row_e3_stores_masks_where_row_e_draws_them(config, monkeypatch):
    seeds, draw = [], lora_dropout.draw_seed
    monkeypatch.setattr(lora_dropout, "draw_seed", lambda device: (seeds.append(1), draw(device))[1])
    monkeypatch.setattr(AdapterGroup, "draws_from_counter", lambda group, rows: True)  # as on a GPU
    batch = train_step_rows.make_batch(train_step_rows.whole_config(config), 1, 0)
    drawn = []
    for row in (train_step_rows.E3, train_step_rows.E):
        with train_step_rows.prepared(row._replace(**ON_A_CPU), config, 2) as (_, loss):
            loss(batch)
        drawn.append(len(seeds))
    groups_of_a_layer = 3  # query, key, value and fc1; dense; fc2
    assert drawn == [0, groups_of_a_layer * config.num_hidden_layers]


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
    assert "| H100 | everything, filled batches, CUDA graphs | 52 |  | not measured |" in lines
    assert "predicted 6.0 to 7.0" in train_step_table._stage([], [])
