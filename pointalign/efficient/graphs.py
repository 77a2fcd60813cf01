"""The decoder's forward and backward pass as two CUDA graphs: the host launches each at once, not operator by operator.

A graph repeats what was recorded, on the same memory. So every batch must have the shape of the first
(`pointalign.data.collator.fill`), inputs are copied into buffers, and hooks on the layers get the buffers that their
outputs were recorded in. Random numbers come from PyTorch's generator of the device, which each replay moves on as the
recorded operators would, so dropout and the seeds of `lora_dropout` are those of a run without graphs. Head, losses and
point branch, whose sizes follow the batch, stay outside.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WARM_UP_RUNS = 3  # before recording: libraries set themselves up, fused parts fill their buffers


class CudaRecorder:
    """Records functions as CUDA graphs, on one stream and in one pool of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Run `run` as it is, on the stream that records."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """The result of `run`, in memory that belongs to the graph, and a function that computes it anew."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = run()
        return result, graph.replay


@contextmanager
def decoder_in_graphs(decoder: Any, recorder: Any = None) -> Iterator[None]:
    """Within the block `decoder` trains by replaying what its first training pass recorded.

    Passes in evaluation mode or without gradients run as they are. A backward pass must follow its forward pass before
    the next one. Gradients are parts of the graph's memory: the next backward pass overwrites them unless they are
    still the parameters' gradients, to which it adds.

    Args:
        decoder: a model of transformers with `layers`, called with names; dropout rates and weights stay in place.
        recorder: by default a `CudaRecorder`.

    Raises (in a forward pass): ValueError: inputs that differ in shape or value from the recorded ones.
    """
    original = decoder.forward
    recorder = CudaRecorder() if recorder is None else recorder
    passes: RecordedPasses | None = None

    def forward(**inputs: Any) -> Any:
        nonlocal passes
        if not (decoder.training and torch.is_grad_enabled()):
            return original(**inputs)
        if passes is None:
            passes = RecordedPasses(decoder, original, inputs, recorder)
        return passes(inputs)

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward  # the method of its class is there again


class RecordedPasses:
    """Forward and backward pass of a decoder, recorded on its first inputs."""

    def __init__(self, decoder: Any, forward: Callable, inputs: dict[str, Any], recorder: Any):
        self.forward = forward
        self.buffers = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        self.constants = {name: value for name, value in inputs.items() if name not in self.buffers}
        self.tapped: list[nn.Module] = [layer for layer in decoder.layers if layer._forward_hooks]
        self.parameters = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
        self.leaves = [buffer for buffer in self.buffers.values() if buffer.requires_grad] + self.parameters
        self.output_type: Any = None
        self.calls = 0
        device = next(iter(self.buffers.values())).device
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a cast of before, or of the warm-up, would be gone at a replay
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                recorder.warm_up(lambda: self._backward(outputs := self._forward(), self._upstream(outputs)))
                outputs, self.replay_forward = recorder.record(self._forward)
                self.upstream = self._upstream(outputs)
                self.gradients, self.replay_backward = recorder.record(lambda: self._backward(outputs, self.upstream))
        finally:
            torch.set_autocast_cache_enabled(cached)
        self.outputs = [output.detach() for output in outputs]

    def _forward(self) -> list[Tensor]:
        """The last hidden state, and the outputs of the layers that have hooks."""
        noted: dict[nn.Module, Tensor] = {}

        def note(layer: nn.Module, _args: tuple, output: Any) -> None:
            noted[layer] = output[0] if isinstance(output, tuple) else output

        hooks = [layer._forward_hooks for layer in self.tapped]
        for layer in self.tapped:
            layer._forward_hooks = OrderedDict({0: note})
        try:
            result = self.forward(**self.buffers, **self.constants)
        finally:
            for layer, before in zip(self.tapped, hooks, strict=True):
                layer._forward_hooks = before
        others = [name for name, value in result.items() if name != "last_hidden_state" and value is not None]
        if others:
            raise ValueError(f"CUDA graphs hold a decoder's last hidden state; this decoder returns {others[0]} too")
        self.output_type = type(result)
        return [result.last_hidden_state, *(noted[layer] for layer in self.tapped)]

    @staticmethod
    def _upstream(outputs: list[Tensor]) -> list[Tensor | None]:
        return [torch.zeros_like(output) if output.requires_grad else None for output in outputs]

    def _backward(self, outputs: list[Tensor], upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        pairs = [(output, buffer) for output, buffer in zip(outputs, upstream, strict=True) if buffer is not None]
        return torch.autograd.grad([o for o, _ in pairs], self.leaves, [u for _, u in pairs], allow_unused=True)

    def __call__(self, inputs: dict[str, Any]) -> Any:
        shapes = {name: value.shape for name, value in inputs.items() if isinstance(value, Tensor)}
        constants = {name: value for name, value in inputs.items() if name not in shapes}
        expected = {name: buffer.shape for name, buffer in self.buffers.items()}
        if (shapes, constants) != (expected, self.constants):
            raise ValueError(
                f"a CUDA graph repeats one shape: expected {expected} and {self.constants}, got {shapes} and "
                f"{constants}; fill the batches to one shape"
            )
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                buffer.copy_(inputs[name])
        leaves = [inputs[name] for name, buffer in self.buffers.items() if buffer.requires_grad]
        last, *tapped = Replay.apply(self, *leaves, *self.parameters)  # type: ignore[misc]
        for layer, output in zip(self.tapped, tapped, strict=True):
            for hook in layer._forward_hooks.values():
                hook(layer, (), output)
        return self.output_type(last_hidden_state=last)


class Replay(torch.autograd.Function):
    """A replay of the forward pass and, in the backward pass, one of the backward pass."""

    @staticmethod
    def forward(ctx, passes: RecordedPasses, *_leaves: Tensor) -> tuple[Tensor, ...]:
        passes.replay_forward()
        passes.calls += 1
        ctx.passes, ctx.call = passes, passes.calls
        outputs = tuple(output.detach() for output in passes.outputs)
        pairs = zip(outputs, passes.upstream, strict=True)
        ctx.mark_non_differentiable(*(output for output, buffer in pairs if buffer is None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: Tensor):  # type: ignore[override]
        passes: RecordedPasses = ctx.passes
        if ctx.call != passes.calls:
            raise RuntimeError("the decoder ran again before this backward pass: its saved tensors are overwritten")
        for leaf, gradient in zip(passes.leaves, passes.gradients, strict=True):
            if leaf.grad is not None and gradient is not None and leaf.grad.data_ptr() == gradient.data_ptr():
                leaf.grad = leaf.grad.clone()  # of an earlier batch of the same step
        for buffer, value in zip(passes.upstream, upstream, strict=True):
            if buffer is not None:
                buffer.copy_(value)
        passes.replay_backward()
        # new tensors of the same memory: autograd takes them as they are, without a copy
        return None, *(None if gradient is None else gradient.detach() for gradient in passes.gradients)
