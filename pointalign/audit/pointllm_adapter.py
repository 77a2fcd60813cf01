"""The adapter of checkpoints in PointLLM's format (Xu et al., ECCV 2024), through that project's package.

PointLLM pins a version of transformers that cannot stand beside ours. `POINTLLM_PYTHON` names the interpreter of an
environment that has `pointllm`; this file then runs there as a worker, which is why it imports nothing of pointalign.
Without it `pointllm` is imported here.
"""

import base64
import json
import os
import subprocess
import sys

import numpy as np

TEMPLATE = "vicuna_v1_1"  # the conversation that the released checkpoints were trained with
LONGEST_ANSWER = 64  # tokens; PointLLM answers in sentences
STOPPED = "PointLLM's worker ended; what it printed stands above"


def load(model):
    python = os.environ.get("POINTLLM_PYTHON")
    return Worker(python, model) if python else PointLLM(model)


def prompt(_loaded, question, cloud):
    return question, cloud


def answer(loaded, prompts, candidates):
    return [loaded.reply(question, cloud, texts) for (question, cloud), texts in zip(prompts, candidates)]  # noqa: B905


def as_pointllm(cloud):
    """A cloud `[N, 6]` with y up as PointLLM reads it: z up, centred, in the unit sphere. Zeros stay zeros."""
    cloud = np.asarray(cloud, dtype=np.float32)
    xyz = cloud[:, [0, 2, 1]] * np.array([1, -1, 1], dtype=np.float32)
    xyz = xyz - xyz.mean(axis=0)
    radius = np.linalg.norm(xyz, axis=1).max()
    return np.concatenate([xyz / radius if radius > 0 else xyz, cloud[:, 3:]], axis=1)


class PointLLM:
    """A checkpoint in this process; prompts are answered one at a time, as PointLLM's batches have no padding."""

    def __init__(self, name):
        import torch
        from pointllm.conversation import conv_templates  # pyright: ignore[reportMissingImports]
        from pointllm.model import PointLLMLlamaForCausalLM  # pyright: ignore[reportMissingImports]
        from transformers import AutoTokenizer

        self.torch, self.template = torch, conv_templates[TEMPLATE]
        on_gpu = torch.cuda.is_available()
        self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = PointLLMLlamaForCausalLM.from_pretrained(name, torch_dtype=torch.bfloat16 if on_gpu else torch.float32)
        self.model = model.to("cuda" if on_gpu else "cpu").eval()
        self.model.initialize_tokenizer_point_backbone_config_wo_embedding(self.tokenizer)
        self.point = self.model.get_model().point_backbone_config

    def reply(self, question, cloud, candidates):
        torch = self.torch
        ids = self.tokenizer(self.text(question, cloud is not None), return_tensors="pt").input_ids
        ids = ids.to(self.model.device)
        clouds = {}
        if cloud is not None:
            points = torch.from_numpy(as_pointllm(cloud)[:, : self.point["point_cloud_dim"]])
            clouds["point_clouds"] = points[None].to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(
                ids, **clouds, do_sample=False, max_new_tokens=LONGEST_ANSWER, use_cache=True,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            tokens = output.sequences[0, ids.shape[1] :]
            chosen = [row[0].float().log_softmax(-1)[token] for row, token in zip(output.scores, tokens)]  # noqa: B905
            scores = [self.likelihood(ids, clouds, text) for text in candidates]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for end in (self.template.sep2, "</s>"):
            text = text.split(end)[0] if end else text
        return {
            "text": text.strip(),
            "probability": float(torch.stack(chosen).double().sum().exp()) if chosen else 0.0,
            "scores": scores or None,
        }

    def text(self, question, with_cloud):
        """The conversation up to the answer, with PointLLM's placeholders in a cloud's place."""
        if with_cloud:
            places = self.point["default_point_patch_token"] * self.point["point_token_len"]
            if self.point["mm_use_point_start_end"]:
                places = self.point["default_point_start_token"] + places + self.point["default_point_end_token"]
            question = places + "\n" + question
        talk = self.template.copy()
        talk.append_message(talk.roles[0], question)
        talk.append_message(talk.roles[1], None)
        return talk.get_prompt()

    def likelihood(self, ids, clouds, text):
        torch = self.torch
        answer_ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(ids.device)
        logits = self.model(torch.cat([ids, answer_ids], dim=1), **clouds).logits[0, ids.shape[1] - 1 : -1]
        return float(logits.float().log_softmax(-1).gather(1, answer_ids[0][:, None]).sum())


class Worker:
    """A checkpoint in another interpreter: a JSON line to it for every prompt, and a JSON line back."""

    def __init__(self, python, model):
        self.process = subprocess.Popen(
            [python, os.path.abspath(__file__), model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()  # it has loaded the model

    def reply(self, question, cloud, candidates):
        request = {"question": question, "candidates": candidates, "cloud": None}
        if cloud is not None:
            request["cloud"] = base64.b64encode(np.ascontiguousarray(cloud, "<f4").tobytes()).decode()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise OSError(STOPPED)
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def work(model):
    """Answer the requests on standard input; what PointLLM prints goes to standard error."""
    replies, sys.stdout = sys.stdout, sys.stderr

    def send(value):
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    loaded = PointLLM(model)
    send({})
    for line in sys.stdin:
        request = json.loads(line)
        cloud = request["cloud"]
        if cloud is not None:
            cloud = np.frombuffer(base64.b64decode(cloud), "<f4").reshape(-1, 6)
        send(loaded.reply(request["question"], cloud, request["candidates"]))


if __name__ == "__main__":
    work(sys.argv[1])
