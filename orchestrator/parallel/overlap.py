"""A forward and a backward at once: the exchanges of one run beside the computation of the other (V3 report, section
3.2.1, figure 4).

Two threads take turns and only one ever runs: it hands over where it would wait for the rows of an exchange. So the
order of a rank's collectives is a fact of the program, the same on all ranks, and nothing else need know of threads. A
layer's forward is [attention, router, shared experts | experts | sums], its backward the same the other way round; each
`|` is an exchange and is spent on the other's work.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.pipelining.schedules import (
    OVERLAP_F_B,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
)


def overlap_pairs(runtime: _PipelineScheduleRuntime, device: torch.device) -> None:
    """Make the runtime of a schedule run the two halves of an overlapped pair at once, not one after the other."""
    def run(action: _Action, context: _PipelineContext) -> None:
        forward, backward = action.sub_actions
        take_turns(functools.partial(_forward, forward, context), functools.partial(_backward, backward, context),
                   device)

    runtime.register_custom_function(OVERLAP_F_B, run)


def take_turns(first: Callable[[], None], second: Callable[[], None], device: torch.device) -> None:
    """Run both, `first` in this thread, changing at each `hand_over`. Where one fails, the other ends at its next turn,
    and the failure is raised here."""
    global _turns
    if _turns is not None:
        raise RuntimeError("a pair is under way in this process")
    turns = _turns = _Turns()
    try:
        other = _partner(device).submit(turns.run, 1, second)
        turns.run(0, first)
        other.result()
    finally:
        _turns = None
    failure, turns.failure = turns.failure, None
    if failure is not None:
        raise failure


def hand_over() -> None:
    """The other half of a pair goes on, and this one when that hands over; without a pair, nothing."""
    if _turns is not None:
        _turns.hand_over()


class _Turns:
    """Whose turn it is, by half and not by thread: on a GPU a backward runs in a thread of autograd's own."""

    def __init__(self):
        self.running = 0
        self.under_way = {0, 1}
        self.turn = threading.Lock(), threading.Lock()
        self.turn[1].acquire()
        self.failure: BaseException | None = None

    def run(self, half: int, work: Callable[[], None]) -> None:
        try:
            self._wait_for_turn(half)
            work()
        except BaseException as failure:  # of two the first is raised, where the pair was asked for
            self.failure = self.failure or failure
        finally:
            self.under_way.remove(half)
            if self.under_way:
                self._give_turn(1 - half)

    def hand_over(self) -> None:
        half = self.running
        if self.failure is not None:
            raise _OtherFailed
        if 1 - half in self.under_way:
            self._give_turn(1 - half)
            self._wait_for_turn(half)

    def _give_turn(self, half: int) -> None:
        self.running = half
        self.turn[half].release()

    def _wait_for_turn(self, half: int) -> None:
        self.turn[half].acquire()
        if self.failure is not None:
            raise _OtherFailed


class _OtherFailed(Exception):
    pass


_turns: _Turns | None = None


@functools.cache
def _partner(device: torch.device) -> ThreadPoolExecutor:
    """One thread for the second halves. Each thread has a current GPU of its own. They share autocast's cache, which
    goes when one of them leaves its outermost region: this one never does."""
    def begin() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.autocast(device.type, enabled=False).__enter__()

    return ThreadPoolExecutor(1, "second half", initializer=begin)


def _forward(action: _Action, context: _PipelineContext) -> None:
    """As torch's runtime does it, with what torch offers a function of one's own."""
    runtime, stages, stage, microbatch = _of(action, context)
    if not stage.is_first and stage.stage_index - 1 not in stages:
        _wait_batch_p2p(runtime.fwd_recv_ops.pop((stage.stage_index, microbatch)))
    out = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch], context.kwarg_mbs[microbatch],
                                  save_forward_output=False)
    runtime._maybe_compute_loss(stage, out, context.target_mbs, microbatch)
    if stage.stage_index + 1 in stages:
        stages[stage.stage_index + 1].set_local_fwd_input(out, microbatch)


def _backward(action: _Action, context: _PipelineContext) -> None:
    runtime, stages, stage, microbatch = _of(action, context)
    if not stage.is_last and stage.stage_index + 1 not in stages:
        _wait_batch_p2p(runtime.bwd_recv_ops.pop((stage.stage_index, microbatch)))
    runtime.backward_counter[stage.stage_index] += 1
    stage.backward_one_chunk(microbatch, loss=runtime._maybe_get_loss(stage, microbatch), full_backward=True,
                             last_backward=runtime.backward_counter[stage.stage_index] == runtime._n_microbatches)
    if stage.stage_index - 1 in stages:
        stages[stage.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)


def _of(action: _Action, context: _PipelineContext) -> tuple:
    """The runtime, its stages on this rank, the action's own, whose weights are whole, and its microbatch."""
    runtime = context.schedule_ref
    stages = {stage.stage_index: stage for stage in runtime._stages}
    runtime._assert_unsharded(stages[action.stage_index])
    return runtime, stages, stages[action.stage_index], action.microbatch_index
