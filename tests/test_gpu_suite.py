"""The GPU suite without a GPU: its time limits, what it remembers and packs, and that its commands exist."""

import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from conftest import wait_until
from made_programs import SCRIPT, run_program

from pointalign_kernels import point_ops

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_suite
from gpu_suite import STAGES, Stage

ROOT = Path(__file__).parents[1]
FOREVER = "{python} -c 'import time; print(\"started\", flush=True); time.sleep(600)'"
GOOD = "{python} -c 'print(\"all good\")'"
BAD = "{python} -c 'print(\"what went wrong\"); raise SystemExit(3)'"


@pytest.fixture
def run(tmp_path):
    """Runs stages as on a GPU; returns their outcomes."""

    def run_stages(*stages, seconds=60.0, again=(), rehearsal=False):
        return gpu_suite.run_stages(stages, tmp_path / "out", tmp_path / "out.tgz", seconds, again, rehearsal)

    return run_stages


@pytest.fixture
def quick_pytest(monkeypatch):
    """A stage's pytest starts without the plugins that happen to be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


def packed(tmp_path) -> list[str]:
    with tarfile.open(tmp_path / "out.tgz") as archive:
        return archive.getnames()


def test_a_stage_is_stopped_at_its_limit_with_everything_that_it_started(run, tmp_path):
    # a shell in between, and a child in the background that ignores the polite signal
    child = (
        f"{shlex.quote(sys.executable)} -c 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)'"
    )
    command = f"sh -c {shlex.quote(f'{child} & echo $! > {tmp_path}/pid; wait')}".replace("{", "{{").replace("}", "}}")
    started = time.monotonic()
    outcomes = run(Stage("slow", 1, 2, (command,)), Stage("next", 1, 30, (GOOD,)))
    assert time.monotonic() - started < 20
    assert outcomes["slow"]["status"] == "stopped after 2 s"
    assert outcomes["next"]["status"] == "passed"
    pid = int((tmp_path / "pid").read_text())
    assert wait_until(lambda: not alive(pid), 5)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_limit_is_of_all_commands_together(run):
    outcomes = run(Stage("slow", 1, 2, (FOREVER, FOREVER, FOREVER)))
    assert outcomes["slow"]["seconds"] < 12


def test_the_time_left_bounds_a_stage(run):
    seconds = gpu_suite.PACKING_SECONDS + 3
    outcomes = run(Stage("slow", 1, 300, (FOREVER,)), seconds=seconds)
    assert re.fullmatch(r"stopped after [23] s", outcomes["slow"]["status"])
    assert outcomes["slow"]["seconds"] < 10


def test_a_stage_that_takes_longer_than_the_time_left_is_skipped(run, tmp_path):
    outcomes = run(Stage("long", 100, 200, (GOOD,)), Stage("short", 1, 5, (GOOD,)), seconds=30)
    assert outcomes["long"]["status"] == "skipped: takes about 100 s, 25 s are left"
    assert outcomes["short"]["status"] == "passed"
    assert not (tmp_path / "out/long").exists()


def test_a_finished_stage_is_not_repeated_unless_asked(run, tmp_path):
    count = tmp_path / "count"
    stages = [Stage("counted", 1, 30, (f"sh -c 'echo x >> {count}'",)), Stage("bad", 1, 30, (BAD,))]
    assert {name: outcome["status"] for name, outcome in run(*stages).items()} == {
        "counted": "passed",
        "bad": "failed with status 3",
    }
    outcomes = run(*stages)
    assert outcomes["counted"]["status"] == "finished earlier"
    assert outcomes["bad"]["status"] == "failed with status 3"  # run again
    assert count.read_text() == "x\n"
    run(*stages, seconds=1)  # no time for anything: what has passed is still known
    assert json.loads((tmp_path / "out/gpu_suite.json").read_text())["stages"]["counted"]["status"] == "passed"
    assert run(*stages, again=["counted"])["counted"]["status"] == "passed"
    assert count.read_text() == "x\nx\n"


def test_a_rehearsal_and_a_run_do_not_share_a_folder(run):
    run(Stage("good", 1, 30, (GOOD,)), rehearsal=True)
    with pytest.raises(SystemExit, match="is of a rehearsal on a CPU, this is a run on a GPU"):
        run(Stage("good", 1, 30, (GOOD,)))


def test_a_failing_stage_shows_the_end_of_its_log_and_does_not_stop_the_next(run, capsys):
    noise = "{python} -c 'for i in range(1000): print(\"line\", i)'"
    outcomes = run(Stage("bad", 1, 30, (noise, BAD, GOOD)), Stage("next", 1, 30, (GOOD,)))
    assert outcomes["next"]["status"] == "passed"
    shown = capsys.readouterr().out.splitlines()
    assert "    what went wrong" in shown
    assert "    all good" in shown  # a stage's commands all run
    assert "    line 1" not in shown
    assert len(shown) <= gpu_suite.TAIL_LINES + 2


def test_everything_is_packed_after_every_stage(run, tmp_path):
    look = f"tar -tzf {tmp_path}/out.tgz"
    outcomes = run(Stage("first", 1, 30, (GOOD,)), Stage("second", 1, 30, (look,)))
    assert outcomes["second"]["status"] == "passed"
    log = (tmp_path / "out/second/log.txt").read_text()
    assert "results/first/log.txt" in log and "results/gpu_suite.json" in log
    assert {"results/first/log.txt", "results/second/log.txt", "results/gpu_suite.json"} <= set(packed(tmp_path))


def test_a_suite_that_is_stopped_packs_what_it_has_and_leaves_no_process(tmp_path):
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_suite as s;"
        f"forever = 'sh -c \"echo started; echo $$ > {tmp_path}/pid; exec sleep 600\"';"
        "s.STAGES = (s.Stage('slow', 1, 300, (forever,)),);"
        f"sys.argv = ['gpu_suite.py', '--output', '{tmp_path}/out', '--archive', '{tmp_path}/out.tgz'];"
        "sys.exit(s.main())"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    assert wait_until((tmp_path / "pid").exists)
    process.terminate()
    assert process.wait(30) == 143
    assert "results/slow/log.txt" in packed(tmp_path)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_stage_whose_package_or_program_is_missing_is_skipped_with_the_reason(run):
    outcomes = run(
        Stage("package", 1, 30, (GOOD,), needs=("no_such_package",)),
        Stage("program", 1, 30, (GOOD,), programs=("no-such-program",)),
    )
    assert outcomes["package"]["status"] == "skipped: no_such_package missing"
    assert outcomes["program"]["status"] == "skipped: no-such-program missing"


def test_the_study_needs_the_assets_and_is_left_out_of_a_rehearsal(run, tmp_path, monkeypatch):
    monkeypatch.setenv("POINTALIGN_HOME", str(tmp_path / "home"))
    stage = Stage("study", 1, 30, (GOOD,), assets=("llm/some",))
    assert run(stage)["study"]["status"] == "skipped: llm/some missing"
    (tmp_path / "home/llm/some").mkdir(parents=True)
    (tmp_path / "home/llm/some/.complete.json").write_text("{}")
    assert run(stage)["study"]["status"] == "passed"
    (tmp_path / "out/gpu_suite.json").unlink()
    assert run(stage, rehearsal=True)["study"]["status"] == "skipped: a GPU missing"
    studies = STAGES[-2:]
    assert [stage.name for stage in studies] == ["study", "study-full"] and all(stage.assets for stage in studies)
    recipes = [re.findall(r"experiments.ablation (\w+) ", stage.commands[0]) for stage in studies]
    assert recipes == [["language_model"], ["language_model_full"]]
    assert all((ROOT / f"experiments/recipes/{name}.yaml").exists() for [name] in recipes)


@pytest.mark.parametrize(
    ("body", "on_a_gpu", "in_a_rehearsal"),
    [
        ("import pytest\n\npytest.skip('no GPU', allow_module_level=True)", "failed with status 5", "passed"),
        ("", "failed with status 5", "failed with status 5"),
        ("def test_it(): assert False", "failed with status 1", "failed with status 1"),
    ],
)
def test_a_stage_whose_tests_are_all_skipped_has_not_passed(
    run, tmp_path, quick_pytest, body, on_a_gpu, in_a_rehearsal
):
    (tmp_path / "test_something.py").write_text(body)
    stage = Stage("tests", 1, 60, (f"{{pytest}} {tmp_path}/test_something.py",))
    assert run(stage)["tests"]["status"] == on_a_gpu
    (tmp_path / "out/gpu_suite.json").unlink()
    assert run(stage, rehearsal=True)["tests"]["status"] == in_a_rehearsal


def test_what_a_sanitizer_prints_after_the_tests_does_not_hide_that_they_passed(run, tmp_path, quick_pytest):
    (tmp_path / "test_something.py").write_text("def test_it(): pass")
    script = tmp_path / "sanitizer.sh"
    script.write_text('"$@"; status=$?; echo "========= ERROR SUMMARY: 0 errors"; exit $status')
    command = f"bash {script} {{pytest}} {tmp_path}/test_something.py"
    outcome = run(Stage("sanitized", 1, 60, (command, command)))["sanitized"]
    assert outcome["status"] == "passed" and outcome["summary"].count("1 passed") == 2
    (tmp_path / "test_something.py").write_text("import pytest\npytest.skip('no GPU', allow_module_level=True)")
    outcome = run(Stage("skipped", 1, 60, (command,)))["skipped"]
    assert outcome["status"] == "failed with status 5"


def test_a_rehearsal_is_not_collected(run, tmp_path, monkeypatch):
    run(Stage("good", 1, 30, (GOOD,)), rehearsal=True)
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "--collect", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="is of a rehearsal"):
        gpu_suite.main()


def content(rows, **provenance):
    origin = {"device": "card", "driver": "1", "torch": "2", "commit": "abc"} | provenance
    return {"benchmark": "loss", "provenance": origin, "ceilings": {"flops": 1.0}, "rows": rows}


def test_rows_of_several_stages_come_together(tmp_path):
    for stage, rows in (("alignment", [1, 2]), ("sizes", [3])):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "loss_card.json").write_text(json.dumps(content(rows)))
    (tmp_path / "sizes/probe_card.json").write_text('{"benchmark": "probe"}')
    (tmp_path / "into").mkdir()
    paths = gpu_suite.collect(tmp_path, tmp_path / "into")
    assert [path.name for path in paths] == ["loss_card.json", "probe_card.json"]
    assert json.loads(paths[0].read_text()) == content([1, 2, 3])
    (tmp_path / "sizes/loss_card.json").write_text(json.dumps(content([3], commit="def")))
    with pytest.raises(SystemExit, match="commit is def, of the rows of earlier stages abc"):
        gpu_suite.collect(tmp_path, tmp_path / "into")


def test_the_command_in_the_header(tmp_path):
    """It fits where commands are limited to 2,000 characters, and the suite takes its options."""
    text = gpu_suite.__doc__ or ""
    command = text.partition("    export POINTALIGN_COMMIT")[2].partition("\n\n")[0]
    command = "export POINTALIGN_COMMIT" + command
    assert 500 < len(command) < 2000
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    (line,) = (line for line in command.splitlines() if "gpu_suite.py" in line)
    words = shlex.split(line)[2:]
    options = gpu_suite.parse([word.replace("$OUT", str(tmp_path)) for word in words])
    assert options.minutes < 10 and options.archive == tmp_path / "gpu_results.tgz"
    rehearsal = (ROOT / "benchmarks/gpu_rehearsal.sh").read_text()
    (folder,) = re.findall(r"TRITON_CACHE_DIR=(\S+)", command)
    assert f"TRITON_CACHE_DIR={folder} " in rehearsal  # its paths are absolute


def test_the_first_seven_stages_fit_into_one_call():
    first = [stage.name for stage in STAGES[:7]]
    assert first == ["build", "smoke", "alignment", "points", "step", "probe", "memory"]
    assert sum(stage.expected_s for stage in STAGES[:7]) <= 600
    assert all(stage.expected_s < stage.limit_s <= 540 for stage in STAGES)
    assert len({stage.name for stage in STAGES}) == len(STAGES)


COLLECT = """
import json, os, sys
import pytest

class Ids:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]

for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]  # pytest-benchmark does not time where a worker of xdist is named, as this one may be
for commands in json.loads(sys.argv[1]):  # of a folder: their conftest.py share a name, so each has a process
    if not os.fork():
        for command in commands:
            ids = Ids()
            status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *command], plugins=[ids])
            print("RESULT", json.dumps([int(status), getattr(ids, "ids", [])]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def collected():
    """(stage, arguments of pytest, exit status, ids) of every command of every stage that runs pytest."""
    values = gpu_suite.substitutions(Path("results"), rehearsal=False) | {"small": "", "memcheck": "", "racecheck": ""}
    commands = []
    for stage in STAGES:
        for template in stage.commands:
            _, found, after = template.partition("{pytest}")
            if found:
                words = shlex.split(after.format(**values))
                place = words.index("--results") if "--results" in words else len(words)
                commands.append((stage.name, words[:place] + words[place + 2 :]))
    different = dict.fromkeys(tuple(words) for _, words in commands)  # the sanitizer's tools run the same tests
    chosen = [
        [words for words in different if any(word.startswith(f"{folder}/") for word in words)]
        for folder in ("benchmarks", "tests")
    ]
    # tests/test_alignment_kernels.py is there on a CPU only when interpreted
    result = run_program(COLLECT, json.dumps(chosen), interpreted=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(different), result.stdout[-2000:] + result.stderr[-2000:]
    everything = [words for group in chosen for words in group]
    of_words = {words: json.loads(line[7:]) for words, line in zip(everything, lines, strict=True)}
    return [(stage, words, *of_words[tuple(words)]) for stage, words in commands]


def test_the_tests_of_every_stage_exist(collected):
    assert {stage for stage, *_ in collected} == {
        *(
            "smoke",
            "alignment",
            "points",
            "step",
            "memory",
            "encoder",
            "sizes",
            "tests",
            "sanitizer",
            "parts",
            "compiled",
        )
    }
    for stage, words, status, ids in collected:
        assert status == 0 and ids, f"{stage}: pytest {' '.join(words)} collects nothing (status {status})"


def test_the_stages_of_the_step_measure_every_row_once(collected):
    import ast

    rows = [name for stage, _, _, ids in collected for name in ids if "::test_train_step[" in name]
    assert len(rows) == len(set(rows))
    tree = ast.parse((ROOT / "benchmarks/train_step_rows.py").read_text())
    names = {
        node.value.partition(":")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"[a-f]\d*: ", node.value)
    }
    assert {name.partition("[")[2].rstrip("]") for name in rows} == names


def test_the_two_stages_of_the_alignment_loss_share_the_rows(collected):
    of = {stage: set(ids) for stage, _, _, ids in collected}
    assert not of["alignment"] & of["sizes"]
    assert all("512-2560" in name for name in of["alignment"])


def test_every_script_of_a_stage_exists():
    scripts = {
        script
        for stage in STAGES
        for command in stage.commands
        for script in re.findall(r"benchmarks/\w+\.py", command)
    }
    assert {"benchmarks/gpu_check.py", "benchmarks/gpu_probe.py", "benchmarks/parity.py"} <= scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


@pytest.mark.skipif("cpu" not in point_ops.NATIVE_DEVICES, reason="no native CPU point ops")
@pytest.mark.parametrize(
    "words", [["gpu_check.py"], ["gpu_probe.py", "--sections", "points"]], ids=lambda words: words[0]
)
def test_scripts_rehearse_and_carry_the_ceilings(tmp_path, words):
    script, *options = words
    command = [str(ROOT / "benchmarks" / script), *options, "--rehearse", "--output", str(tmp_path)]
    result = run_program(SCRIPT, *command)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    (path,) = tmp_path.glob(f"{script.removesuffix('.py')}_*.json")
    measured = json.loads(path.read_text())
    assert measured["ceilings"]["flops"] > 0 and measured["ceilings"]["bytes"] > 0
    assert measured["provenance"]["rehearsal"] is True
