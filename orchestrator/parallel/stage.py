"""torch's pipeline stage, with receive buffers that live as long as they are needed."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.utils import checkpoint


class Stage(PipelineStage):
    """torch makes a buffer for what each microbatch receives, activation and gradient, and holds all of them for the
    life of the runtime: 120 microbatches of DeepSeek-V3 take 28 GB a stage. Here a buffer is made when its message is
    asked for and belongs to whoever reads it; between, a tensor without storage remembers its shape.
    """

    def _prepare_forward_infra(self, *args, **kwargs) -> object:
        with self._without_storage():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args, **kwargs) -> object:
        with self._without_storage():
            return super()._prepare_backward_infra(*args, **kwargs)

    def _get_init_p2p_neighbors_ops(self) -> list:
        """torch before 2.13 greets the neighbours first, in a V schedule itself too, which gloo does not deliver."""
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]

    def _get_recv_ops(self, recv_infos: tuple) -> list:
        for info, buffer in _buffers(recv_infos):
            info.buffer = torch.empty_like(buffer, device=self.device, requires_grad=buffer.requires_grad)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple:
        found = super()._retrieve_recv_activations(fwd_chunk_id)
        _let_go(self.args_recv_info[fwd_chunk_id])
        return found

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple:
        found = super()._retrieve_recv_grads(bwd_chunk_id)
        _let_go(self.grad_recv_info[bwd_chunk_id])
        return found

    def backward_weight_one_chunk(self, *args, **kwargs) -> object:
        """torch asks for one group of parameters after the other: what is recomputed for the first serves them all."""
        with getattr(checkpoint, "GraphExecGroup", contextlib.nullcontext)():
            return super().backward_weight_one_chunk(*args, **kwargs)

    @contextlib.contextmanager
    def _without_storage(self) -> Iterator[None]:
        """Where shapes are given, as here, the device is only asked for to make the buffers."""
        device, self.device = self.device, torch.device("meta")
        try:
            yield
        finally:
            self.device = device


def _let_go(recv_infos: tuple) -> None:
    for info, buffer in _buffers(recv_infos):
        info.buffer = torch.empty_like(buffer, device="meta", requires_grad=buffer.requires_grad)


def _buffers(recv_infos: tuple) -> list[tuple[object, Tensor]]:
    """Not a stage's own arguments, nor what has no gradient."""
    return [(info, info.buffer) for info in recv_infos if getattr(info, "buffer", None) is not None]
