"""Asks a model many questions: batches in a fixed order, seeded, stored one by one, and resumed after a stop."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pointalign import storage
from pointalign.certainty import generate_answers
from pointalign.evaluation.naming import shuffled
from pointalign.evaluation.protocol import Protocol
from pointalign.evaluation.tasks import ObjectSet, Question, Task
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor


class AnswerTree:
    """Tokenised answers as a tree in which common beginnings are shared.

    Args:
        answers: token ids of each answer, in order.
    """

    def __init__(self, answers: Sequence[Sequence[int]]):
        nodes: dict[tuple[int, ...], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []  # -1 stands for the prompt's last token
        self.paths: list[list[int]] = []
        for answer in answers:
            path: list[int] = []
            for end in range(1, len(answer) + 1):
                key = tuple(answer[:end])
                if key not in nodes:
                    nodes[key] = len(self.tokens)
                    self.tokens.append(answer[end - 1])
                    self.parents.append(path[-1] if path else -1)
                path.append(nodes[key])
            self.paths.append(path)
        self.visible = np.eye(len(self.tokens), dtype=bool)  # [K, K]: a node attends to its ancestors and itself
        self.depth = np.zeros(len(self.tokens), dtype=np.int64)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                self.visible[node] |= self.visible[parent]
                self.depth[node] = self.depth[parent] + 1

    def mask(self, prompt_lengths: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Additive attention mask `[B, 1, W + K, W + K]` behind prompts padded on the left to `width` W."""
        batch, nodes = len(prompt_lengths), len(self.tokens)
        device = prompt_lengths.device
        allowed = torch.zeros(batch, width + nodes, width + nodes, dtype=torch.bool, device=device)
        allowed[:, :, :width] = torch.ones(width + nodes, width, device=device).tril().bool()
        allowed[:, width:, width:] = torch.from_numpy(self.visible).to(device)
        real = torch.arange(width, device=device)[None] >= width - prompt_lengths[:, None]
        allowed[:, :, :width] &= real[:, None]
        allowed |= torch.eye(width + nodes, dtype=torch.bool, device=device)  # padding attends to itself: no empty row
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


@torch.inference_mode()
def answer_likelihoods(
    model: PointAlignForConditionalGeneration, batch: dict[str, Tensor], tree: AnswerTree
) -> np.ndarray:
    """Log-likelihoods `[B, A]` of A answers after each prompt of a batch padded on the left.

    Args:
        batch: `input_ids`, `attention_mask`, and the point inputs of the model.
    """
    model.eval()
    input_ids = batch["input_ids"]
    rows, width = input_ids.shape
    lengths = batch["attention_mask"].sum(dim=1)
    prompt, _ = model.model.embed(
        input_ids,
        batch.get("point_values"),
        batch.get("point_lengths"),
        batch.get("point_mask"),
        batch.get("query_features"),
    )
    tokens = torch.tensor(tree.tokens, device=input_ids.device)
    branches = model.get_input_embeddings()(tokens).expand(rows, -1, -1)
    depth = torch.from_numpy(tree.depth).to(input_ids.device)
    positions = torch.cat(
        [(torch.arange(width, device=input_ids.device)[None] - (width - lengths)[:, None]).clamp(min=0),
         lengths[:, None] + depth[None]], dim=1,
    )  # fmt: skip
    hidden = model.get_decoder()(
        inputs_embeds=torch.cat([prompt, branches.to(prompt)], dim=1),
        attention_mask=tree.mask(lengths, width, prompt.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[:, width - 1 :]  # [B, 1 + K, H]: the prompt's last token, then the nodes
    parents = torch.tensor(tree.parents, device=input_ids.device) + 1
    scores = []
    for row in hidden:
        inner, place = parents.unique(return_inverse=True)
        log_probabilities = model.get_output_embeddings()(row[inner]).float().log_softmax(dim=-1)
        node_scores = log_probabilities[place, tokens].cpu().numpy()
        scores.append([float(node_scores[path].sum()) for path in tree.paths])
    return np.array(scores)


def margins(likelihoods: np.ndarray, truths: Sequence[int]) -> np.ndarray:
    """`[B]` log-likelihood of the true answer less that of the best wrong answer."""
    rows = np.arange(len(likelihoods))
    others = likelihoods.copy()
    others[rows, truths] = -np.inf
    return likelihoods[rows, truths] - others.max(axis=1)


INPUTS = ("true", "shuffled", "zeroed", "blind")
JOURNAL = "answers.jsonl"  # in the folder of an evaluation
_ZERO = "\0zero"  # the name of an object whose point tokens are zeros


@dataclass
class Generation:
    """How answers are generated (`--generation.*`).

    Attributes:
        batch_size: questions answered together. It belongs to the definition of a run, because padding can change the
            last bits.
        seed: of sampling; a batch is seeded in the same way whether or not the run was interrupted.
        max_new_tokens: in place of the protocol's limit.
    """

    batch_size: int = 32
    seed: int = 0
    max_new_tokens: int | None = None


class Journal:
    """The results of a run so far, a JSON line for each batch, so that an interrupted run continues after the last.

    Args:
        path: the file, created if missing.
        run: the definition of the run, which is the first line of the file.

    Raises:
        ValueError: the file belongs to a run with another definition.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path = path
        self.done: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        known = path.read_text(encoding="utf-8") if path.exists() else ""
        *complete, _torn = known.split("\n")  # the part behind the last newline is an incomplete line
        if complete:
            if (other := json.loads(complete[0])) != json.loads(json.dumps(run)):
                different = sorted(key for key in run.keys() | other.keys() if run.get(key) != other.get(key))
                raise ValueError(
                    f"{path} belongs to another run ({', '.join(different)} differ): choose another --output"
                )
            for line in complete[1:]:
                entry = json.loads(line)
                self.done[entry["key"]] = entry["value"]
        text = "".join(line + "\n" for line in complete) or json.dumps(run) + "\n"
        if text != known:
            with storage.replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of `key` (JSON values only), computed and appended to the file if it is not there."""
        if key not in self.done:
            value = compute()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
            self.done[key] = value
        return self.done[key]


class Features:
    """Q-Former tokens `[Q, Dq]` of objects by name, each computed once."""

    def __init__(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor):
        self.model, self.processor = model, processor
        size = model.config.num_query_tokens, model.config.qformer_config.hidden_size
        self.known = {_ZERO: torch.zeros(size)}

    def compute(self, names: Sequence[str], cloud: Callable[[str], np.ndarray], batch_size: int = 16) -> None:
        missing = [name for name in dict.fromkeys(names) if name not in self.known]
        self.model.eval()
        with torch.inference_mode():
            for start in tqdm(range(0, len(missing), batch_size), desc="encoding clouds", unit="batch", leave=False):
                chunk = missing[start : start + batch_size]
                points = self.processor.feature_extractor([cloud(name) for name in chunk])
                tokens = self.model.get_qformer_features(
                    points["point_values"].to(self.model.device), points["point_lengths"].to(self.model.device)
                )
                self.known |= dict(zip(chunk, tokens.float().cpu(), strict=True))

    def __getitem__(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self.known[name] for name in names])


def prompt_batch(
    processor: PointAlignProcessor, features: Features, questions: Sequence[Question]
) -> dict[str, Tensor]:
    """Tensors of questions on the model's device, padded on the left, with the clouds as `query_features`."""
    messages = [
        [{"role": "user", "content": [
            *({"type": "point", "point": None} for _ in question.object_ids), {"type": "text", "text": question.text},
        ]}]
        for question in questions
    ]  # fmt: skip
    batch = encode(processor, messages, features[names] if (names := _names(questions)) else None)
    return {name: tensor.to(features.model.device) for name, tensor in batch.items()}


def encode(
    processor: PointAlignProcessor, messages: list[list[dict]], features: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """The processor's tensors of conversations whose clouds are rows of `features [C, Q, Dq]`, in reading order."""
    texts_only = copy.copy(processor)
    texts_only.feature_extractor = lambda clouds, **_: {}
    options.setdefault("add_generation_prompt", True)
    batch = dict(texts_only.apply_chat_template(messages, tokenize=True, **options))
    if features is None:
        del batch["point_mask"]
        return batch
    return batch | {"query_features": features}


def _names(questions: Sequence[Question]) -> list[str]:
    return [name for question in questions for name in question.object_ids]


def with_input(task: Task, kind: str, seed: int = 0) -> Task:
    """The same questions with another object's cloud (`shuffled`), `zeroed` tokens, or no cloud (`blind`)."""
    if kind == "true":
        return task
    if kind not in INPUTS:
        raise ValueError(f"--inputs {kind}: expected one of {', '.join(INPUTS)}")
    others = shuffled(len(task.questions), seed)
    questions = []
    for question, other in zip(task.questions, others, strict=True):
        object_ids = {
            "shuffled": task.questions[other].object_ids,
            "zeroed": (_ZERO,) * len(question.object_ids),
            "blind": (),
        }[kind]
        questions.append(replace(question, object_ids=object_ids))
    return replace(task, name=f"{task.name}-{kind}", questions=questions)


@dataclass
class Answers:
    """For each question of a task the text and, if there is a closed set, the log-likelihoods `[N, A]` of its answers.

    Rows of questions whose label is not in the set are NaN.
    """

    texts: list[str]
    likelihoods: np.ndarray | None


def answer(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    task: Task,
    objects: ObjectSet,
    features: Features,
    protocol: Protocol,
    generation: Generation,
    journal: Journal,
) -> Answers:
    """Answers to a task's questions, and scores of its closed set, batch by batch through the journal."""
    starts = range(0, len(task.questions), generation.batch_size)
    if any(f"{task.name}/{start}" not in journal.done for start in starts):
        features.compute([name for name in _names(task.questions) if name != _ZERO], objects.cloud)
    tree = None
    if task.candidates:
        ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in task.candidates.values()]
        tree = AnswerTree(ids)
    texts: list[str] = []
    likelihoods: list[list[float] | None] = []
    for start in tqdm(starts, desc=task.name, unit="batch", leave=False):
        questions = task.questions[start : start + generation.batch_size]

        def generate(questions=questions, start=start) -> list[str]:
            batch = prompt_batch(processor, features, questions)
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(generation.seed * 1_000_003 + start)
                options = protocol.arguments(task.kind, generation.max_new_tokens)
                answers = generate_answers(model, processor, batch, **options)
            return [protocol.process(answer.text) for answer in answers]

        texts += journal.get(f"{task.name}/{start}", generate)
        if tree is not None:

            def score(questions=questions) -> list[list[float] | None]:
                scorable = [question for question in questions if question.label in task.candidates]
                if not scorable:
                    return [None] * len(questions)
                batch = prompt_batch(processor, features, scorable)
                parts = [answer_likelihoods(model, part, tree) for part in _rows(batch, model.config.num_query_tokens)]
                rows = iter(np.concatenate(parts).tolist())
                return [next(rows) if question.label in task.candidates else None for question in questions]

            likelihoods += journal.get(f"{task.name}/{start}/likelihoods", score)
    if tree is None:
        return Answers(texts, None)
    unknown = [float("nan")] * len(task.candidates)
    return Answers(texts, np.array([row or unknown for row in likelihoods]))


def _rows(batch: dict[str, Tensor], queries: int, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Parts of a batch with at most `size` rows: the tree of answers makes every row long."""
    first = 0
    for start in range(0, len(batch["input_ids"]), size):
        part = {name: tensor[start : start + size] for name, tensor in batch.items() if name != "query_features"}
        if "query_features" in batch:
            clouds = int(part["point_mask"].sum()) // queries
            part["query_features"] = batch["query_features"][first : first + clouds]
            first += clouds
        yield part
