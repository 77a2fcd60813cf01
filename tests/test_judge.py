"""Judges, against a real server on loopback that misbehaves, and by rules."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pointalign.evaluation import judge as judging
from pointalign.evaluation.judge import (
    EndpointJudge,
    JudgeFailure,
    JudgeOptions,
    UnreadableReplies,
    build_judge,
    judge_cases,
    summary,
)
from pointalign.evaluation.judge_files import differences, judge_file, judge_tasks
from pointalign.evaluation.judge_prompts import OURS, Case
from pointalign.evaluation.judge_replies import verdict

openai = pytest.importorskip("openai", reason="the endpoint judge needs the openai package (extra: eval)")


class Server:
    """An OpenAI-compatible endpoint that answers from a script: `script(number, prompt)` gives (status, body, headers).

    A body may be a reply's text, raw bytes, or a number of seconds to hang.
    """

    def __init__(self, script):
        self.requests: list[dict] = []
        self.active, self.most = 0, 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    number = len(outer.requests)
                    outer.active += 1
                    outer.most = max(outer.most, outer.active)
                try:
                    status, answer, headers = script(number, body["messages"][0]["content"])
                    if isinstance(answer, float):
                        time.sleep(answer)
                        answer = b""
                    if isinstance(answer, str):
                        answer = completion(answer)
                    with lock:
                        outer.active -= 1
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    for name, value in headers.items():
                        self.send_header(name, value)
                    if "Content-Length" not in headers:
                        self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as it should

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def completion(text):
    return json.dumps(
        {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }
    ).encode()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(judging, "PAUSE", 0.01)
    started = []

    def start(script):
        started.append(Server(script))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def options(server, **changes):
    return JudgeOptions(**({"base_url": server.url, "model": "m", "timeout": 0.4} | changes))


CASES = [Case(f"a chair {i}", f"This is chair {i}.", "chair") for i in range(6)]


def test_a_misbehaving_server_is_asked_again_until_it_answers(serve, tmp_path, monkeypatch):
    trouble = {
        1: (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.02"}),
        2: (500, b"oops", {}),
        3: (200, 1.0, {}),  # longer than the timeout
        4: (200, b'{"choices": [{"mess', {}),  # truncated JSON, complete response
        5: (200, completion("T#x")[:40], {"Content-Length": "400"}),  # the connection closes half-way
        6: (200, b"<html>gateway</html>", {}),
        7: (200, b'{"choices": []}', {}),
        8: (200, b"[1, 2]", {}),
        9: (503, b"", {}),
    }
    monkeypatch.setattr(judging, "ATTEMPTS", len(trouble) + 1)
    server = serve(lambda number, prompt: trouble.get(number, (200, "T#the same", {})))
    judged = judge_cases(build_judge(options(server, concurrency=1)), "object", CASES[:1], tmp_path / "stored.jsonl")
    assert judged.values == [1.0]
    assert judged.usage.retries == len(trouble) and judged.usage.requests == 1
    request = server.requests[-1]
    assert request["temperature"] == 0 and request["seed"] == 0 and "a chair 0" in request["messages"][0]["content"]


def test_a_wrong_key_ends_the_run_without_retries(serve, tmp_path):
    server = serve(lambda number, prompt: (401, b'{"error": {"message": "bad key"}}', {}))
    with pytest.raises(JudgeFailure, match="401"):
        judge_cases(build_judge(options(server, concurrency=1)), "object", CASES[:1], tmp_path / "stored.jsonl")
    assert len(server.requests) == 1


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(serve, tmp_path, monkeypatch):
    stored = tmp_path / "stored.jsonl"
    down = serve(lambda number, prompt: (500, b"", {}) if number > 3 else (200, "F#other", {}))
    monkeypatch.setattr(judging, "ATTEMPTS", 2)
    retrying = options(down, concurrency=1)
    with pytest.raises(JudgeFailure, match="3 of 6 answers got no reply"):
        judge_cases(build_judge(retrying), "object", CASES, stored)
    with stored.open("a") as file:
        file.write('{"key": "cut sho')  # killed while writing
    requests = len(down.requests)
    up = serve(lambda number, prompt: (200, "T#same", {}))
    judge = build_judge(retrying)
    assert isinstance(judge, EndpointJudge)
    judge.client = judge.client.with_options(base_url=up.url)
    judged = judge_cases(judge, "object", CASES, stored)
    assert judged.values == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert len(up.requests) == 3 and len(down.requests) == requests
    assert judge_cases(judge, "object", CASES, stored).values == judged.values and len(up.requests) == 3


def test_requests_run_side_by_side_up_to_the_limit(serve, tmp_path):
    server = serve(lambda number, prompt: (time.sleep(0.05), (200, "T#", {}))[1])
    judge_cases(build_judge(options(server, concurrency=3)), "object", CASES, tmp_path / "stored.jsonl")
    assert server.most == 3 and len(server.requests) == 6


def test_an_unusable_reply_counts_once_as_wrong(serve, tmp_path):
    server = serve(lambda number, prompt: (200, "I think so" if "chair 2" in prompt else "T#same", {}))
    judged = judge_cases(build_judge(options(server)), "object", CASES, tmp_path / "stored.jsonl")
    result = summary(judged, [f"family {i}" for i in range(6)])
    assert result["invalid"] == 1 and result["score"]["mean"] == pytest.approx(5 / 6)
    assert result["score"]["count"] == 6
    assert result["usage"] == {"requests": 6, "retries": 0, "prompt_tokens": 600, "completion_tokens": 60}


@pytest.mark.parametrize(
    "kind, reply, expected",
    [
        ("object", "T#both are chairs", 1.0),
        ("object", "f#no", 0.0),
        ("object", "True", 1.0),
        ("object", "maybe#T", None),
        ("class", "1#bed#it is a bed", 1.0),
        ("class", "0#chair#", 0.0),
        ("class", "-1#none", 0.0),
        ("class", "7#?", None),
        ("class", "bed", None),
        ("caption", "85#most of it", 0.85),
        ("caption", "101#too much", None),
        ("caption", "about 80", None),
        ("caption", "", None),
    ],
)
def test_replies_are_read_strictly(kind, reply, expected):
    assert verdict(kind, reply, Case("a bed", "a bed", "bed", classes=("chair", "bed"))) == expected


@pytest.mark.parametrize(
    "kind, reply, expected",
    [
        ("object", "<think>Both seem to be seats.\nF? No, T.</think>\n\nT#both are seats", 1.0),
        ("object", "Both seem to be seats. F?\n</think>\nT#both are seats", 1.0),  # the prompt opened the thoughts
        ("object", "<think>Let me see, T#", None),  # cut inside its thoughts
        ("object", "<|channel|>analysis<|message|>Hm, F.<|end|><|channel|>final<|message|>T#same", 1.0),
        ("object", "T: same", 1.0),
        ("object", "F - a chair is no bed", 0.0),
        ("object", "**T**#both are chairs", 1.0),
        ("object", "**T#both are chairs**", 1.0),
        ("object", "Answer: F#no", 0.0),
        ("object", "```\nT#both are chairs\n```", 1.0),
        ("object", "Yes, both are chairs.", 1.0),
        ("object", "The reference is a chair, and so is the answer.\nT#the same", 1.0),
        ("object", "The same", None),
        ("object", "T-shirts differ", 1.0),
        ("class", "Index: 1#bed", 1.0),
        ("class", "1: bed", 1.0),
        ("class", "(1) bed", 1.0),
        ("class", "`1`#bed#it is a bed", 1.0),
        ("class", "1.5#", None),
        ("class", "-1 # none of them", 0.0),
        ("caption", "Score: 85#most of it", 0.85),
        ("caption", "85/100#most of it", 0.85),
        ("caption", "85 / 100", 0.85),
        ("caption", "8/10#most", 0.8),
        ("caption", "85 out of 100 - most", 0.85),
        ("caption", "85%#most", 0.85),
        ("caption", "87.5#most", 0.875),
        ("caption", "Final score: **85**#most", 0.85),
        ("caption", "850#", None),
        ("caption", "15 chairs are there", None),
    ],
)
def test_replies_in_the_shapes_that_judges_really_give(kind, reply, expected):
    assert verdict(kind, reply, Case("a bed", "a bed", "bed", classes=("chair", "bed"))) == expected


def refusing(allowed):
    """A script of an endpoint that refuses every parameter outside `allowed`, as OpenAI's reasoning models do."""

    def script(number, prompt, body):
        for name in ("temperature", "seed", "max_tokens", "max_completion_tokens"):
            if name in body and name not in allowed:
                error = {"message": f"Unsupported parameter: '{name}' is not supported with this model.", "param": name}
                return 400, json.dumps({"error": error}).encode(), {}
        return 200, "T#same", {}

    return script


@pytest.mark.parametrize("allowed", [("max_completion_tokens",), ("seed", "max_tokens"), ()])
def test_refused_parameters_are_left_out(serve, tmp_path, capsys, allowed):
    server = serve(lambda number, prompt: refusing(allowed)(number, prompt, server.requests[number - 1]))
    judge = build_judge(options(server, concurrency=1, max_tokens=77))
    assert judge_cases(judge, "object", CASES, tmp_path / "stored.jsonl").values == [1.0] * 6
    last = server.requests[-1]
    assert {name for name in last if name not in ("messages", "model")} == set(allowed)
    assert last.get("max_completion_tokens", 77) == 77
    refused = 6 - len(server.requests)
    assert refused < 0 and capsys.readouterr().err.count("refuses") == -refused  # each is tried once, not per answer


def test_another_bad_request_still_ends_the_run(serve, tmp_path):
    server = serve(lambda number, prompt: (400, b'{"error": {"message": "the model does not exist"}}', {}))
    with pytest.raises(JudgeFailure, match="400"):
        judge_cases(build_judge(options(server, concurrency=1)), "object", CASES[:1], tmp_path / "stored.jsonl")


def test_tokens_and_further_fields_are_sent(serve, tmp_path):
    server = serve(lambda number, prompt: (200, "T#", {}))
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    judge = build_judge(options(server, max_tokens=300, extra_body=extra))
    judge_cases(judge, "object", CASES[:1], tmp_path / "stored.jsonl")
    assert (
        server.requests[0]["max_tokens"] == 300
        and server.requests[0]["chat_template_kwargs"] == extra["chat_template_kwargs"]
    )
    assert judge.name != build_judge(options(server)).name  # its replies are stored under another name


def test_unreadable_replies_stop_with_advice_and_are_asked_again(serve, tmp_path):
    cut = json.loads(completion(""))
    cut["choices"][0] |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}}
    answers = ["<think>Let me", "<think>Let me", cut, "T#", "T#", "T#"]
    replies = [text if isinstance(text, str) else json.dumps(text).encode() for text in answers]
    server = serve(lambda number, prompt: (200, replies[number - 1] if number <= 6 else "F#", {}))
    judge = build_judge(options(server, concurrency=1))
    with pytest.raises(UnreadableReplies, match=r"3 of 6 replies .*<think>Let me.*--judge\.max_tokens"):
        judge_cases(judge, "object", CASES, tmp_path / "stored.jsonl")
    assert judge_cases(judge, "object", CASES, tmp_path / "stored.jsonl").values == [0.0] * 3 + [1.0] * 3
    assert len(server.requests) == 9  # what could be read was not asked again


def test_pointllms_own_answer_files(serve, tmp_path):
    """ModelNet40 with row numbers and class indices, without names; Objaverse with captions."""
    server = serve(lambda number, prompt: (200, "8#chair#" if "Classes" in prompt else "Score: 50#", {}))
    rows = [{"object_id": i, "ground_truth": truth, "model_output": f"A chair {i}."} for i, truth in enumerate((8, 39))]
    named = {"object_id": 2, "ground_truth": 23, "model_output": "A stand.", "label_name": "night_stand"}
    content = {"prompt": "What is this?", "results": [*rows, named]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    line = judge_file(tmp_path / "a.json", "class", options(server))
    written = json.loads((tmp_path / "a.judged.json").read_text())
    assert [row["verdict"] for row in written["results"]] == [1.0, 0.0, 0.0]
    assert (
        "the judge's class prompt is this project's, version 2, not a published one" in line and "question" not in line
    )
    assert "as PointLLM's evaluator counts: accuracy 33.33, clean accuracy 33.33, 0 invalid replies" in line
    assert written["judge_prompt"]["sha256"] == OURS.sha256("class") and written["asked"] == "What is this?"
    content["results"][0]["ground_truth"] = "A chair with arms."
    (tmp_path / "a.json").write_text(json.dumps(content | {"results": content["results"][:1]}))
    line = judge_file(tmp_path / "a.json", "caption", options(server))
    assert "the answers are to PointLLM's question 0, published are 2" in line
    (tmp_path / "b.json").write_text(json.dumps({"results": [{"object_id": 1, "ground_truth": "a"}]}))
    with pytest.raises(ValueError, match="result 0 lacks 'model_output'"):
        judge_file(tmp_path / "b.json", "caption", options(server))
    with pytest.raises(ValueError, match="ground_truth 39 is no text; for answers about ModelNet40 add --kind class"):
        (tmp_path / "c.json").write_text(json.dumps({"prompt": "", "results": rows[1:]}))
        judge_file(tmp_path / "c.json", "caption", options(server))
    judge = build_judge(options(server))
    assert any("another question, 'Tell me" in reason for reason in differences("Tell me.", "object", judge))


def write_answers(folder, texts):
    rows = [{"object_id": f"o{i}", "ground_truth": "a red chair", "model_output": text} for i, text in enumerate(texts)]
    (folder / "answers.json").write_text(json.dumps({"prompt": "p", "results": rows}))


def test_a_judged_evaluation_counts_families_once(serve, tmp_path):
    server = serve(lambda number, prompt: (200, "100#" if "good" in prompt else "0#", {}))
    write_answers(tmp_path, ["good"] * 9 + ["bad"])
    families = ["first"] * 9 + ["second"]
    questions = [{"family": family} for family in families]
    evaluation = {"tasks": {"answers": {"kind": "captioning", "questions": questions}}}
    assert "90.0 [0.0, 100.0] over 10 answers" in judge_tasks(tmp_path, evaluation, options(server))


def test_a_file_of_answers_is_judged_and_written(serve, tmp_path):
    server = serve(lambda number, prompt: (200, "40#some", {}))
    write_answers(tmp_path, ["a chair"] * 3)
    line = judge_file(tmp_path / "answers.json", "caption", options(server))
    written = json.loads((tmp_path / "answers.judged.json").read_text())
    assert "40.0 [40.0, 40.0] over 3 answers" in line
    assert len(server.requests) == 1  # equal questions are asked once
    assert [row["verdict"] for row in written["results"]] == [0.4] * 3 and written["score"]["mean"] == pytest.approx(
        0.4
    )


def test_options_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"needs --judge\.model"):
        JudgeOptions(base_url="http://localhost:1/v1")
    with pytest.raises(ValueError, match="expected `string`, or the folder"):
        build_judge(JudgeOptions(model=str(tmp_path)))
