"""torch's pipeline stage, with receive buffers that live as long as they are needed."""

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage


class Stage(PipelineStage):
    """torch makes a buffer for what each microbatch receives, activation and gradient, and holds all of them for the
    life of the runtime: 120 microbatches of DeepSeek-V3 take 28 GB a stage. Here a buffer is made when its
    message is asked for and belongs to whoever reads it; between, a tensor without storage remembers its shape.
    """

    def _setup_forward_recv_info(self, *args, **kwargs) -> None:
        super()._setup_forward_recv_info(*args, **kwargs)
        self._release(self.args_recv_info)

    def _setup_backward_recv_info(self, *args, **kwargs) -> None:
        super()._setup_backward_recv_info(*args, **kwargs)
        self._release(self.grad_recv_info)

    def _get_recv_ops(self, recv_infos: tuple) -> list:
        for info in recv_infos:
            if _buffer(info) is not None:
                info.buffer = torch.empty_like(info.buffer, device=self.device, requires_grad=info.buffer.requires_grad)
        return super()._get_recv_ops(recv_infos)

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple:
        found = super()._retrieve_recv_activations(fwd_chunk_id)
        self._release({fwd_chunk_id: self.args_recv_info[fwd_chunk_id]})
        return found

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple:
        found = super()._retrieve_recv_grads(bwd_chunk_id)
        self._release({bwd_chunk_id: self.grad_recv_info[bwd_chunk_id]})
        return found

    @staticmethod
    def _release(recv_infos: dict[int, tuple]) -> None:
        for infos in recv_infos.values():
            for info in infos:
                if _buffer(info) is not None:
                    info.buffer = torch.empty_like(info.buffer, device="meta", requires_grad=info.buffer.requires_grad)


def _buffer(info) -> Tensor | None:
    """None for a stage's own arguments and for what has no gradient."""
    return getattr(info, "buffer", None)
