"""States in, decision out; resources in, placement out: no Ray, no processes."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

from orchestrator.__main__ import main
from orchestrator.cluster import nodes, preflight, session
from orchestrator.cluster.placement import (
    Node,
    Request,
    environment,
    nodes_of,
    order_ranks,
    rank_infos,
    request_for,
    request_of,
    what_is_missing,
)
from orchestrator.cluster.policy import Action, Fault, Limits, Phase, RankState, decide, respond
from orchestrator.config import Config
from orchestrator.errors import NotFit, Transient
from orchestrator.train.progress import Progress

LIMITS = Limits(start_s=60, step_s=30, save_s=30)


def states(*phases: Phase, **silent: float) -> list[RankState]:
    return [RankState(rank, phase, **silent) for rank, phase in enumerate(phases)]


def test_waits_while_ranks_work_and_finishes_when_all_are_done():
    assert decide(states(Phase.start, Phase.step), LIMITS, 0).action is Action.wait
    assert decide(states(Phase.done, Phase.step), LIMITS, 0).action is Action.wait
    assert decide(states(Phase.done, Phase.done), LIMITS, 0).action is Action.finish


def test_blames_the_rank_that_failed_on_its_own_account_even_if_others_told_first():
    seen = [RankState(0, Phase.failed, cause="connection closed", at=10, heard_at=10, is_consequence=True),
            RankState(1, Phase.step), RankState(2, Phase.failed, cause="out of memory", at=11)]
    decision = decide(seen, LIMITS, 11)
    assert (decision.action, decision.rank, decision.cause) == (Action.blame, 2, "out of memory")


def test_blames_a_dead_rank_over_those_that_lost_their_connection_to_it():
    seen = [RankState(0, Phase.failed, cause="connection closed", at=10, heard_at=10, is_consequence=True),
            RankState(1, Phase.dead, cause="killed", at=12, heard_at=12, exit_code=33)]
    decision = decide(seen, LIMITS, 12)
    assert (decision.rank, decision.exit_code) == (1, 33)


def test_waits_a_moment_for_the_root_cause_behind_a_lost_connection():
    seen = [RankState(0, Phase.failed, cause="connection closed", at=10, heard_at=10, is_consequence=True),
            RankState(1, Phase.step)]
    assert decide(seen, LIMITS, 10.5).action is Action.wait
    assert decide(seen, LIMITS, 10 + LIMITS.settle_s).action is Action.blame


@pytest.mark.parametrize("phase, limit", [(Phase.start, 60), (Phase.step, 30), (Phase.save, 30)])
def test_silence_has_a_limit_per_phase(phase, limit):
    assert decide([RankState(0, phase, silent_s=limit - 1)], LIMITS, 0).action is Action.wait
    decision = decide([RankState(0, Phase.step), RankState(1, phase, silent_s=limit + 1)], LIMITS, 0)
    assert (decision.action, decision.rank, decision.exit_code) == (Action.blame, 1, 33)
    assert phase.name in decision.cause


def test_of_ranks_that_wait_for_one_another_the_one_that_does_not_answer_is_blamed():
    waiting = [RankState(0, Phase.step, silent_s=33), RankState(1, Phase.step, silent_s=32, answers=False)]
    decision = decide(waiting, LIMITS, 0)
    assert decision.rank == 1 and "does not answer" in decision.cause
    unheard = [RankState(0, Phase.step, silent_s=33), RankState(1, Phase.data, silent_s=20, answers=False)]
    assert decide(unheard, LIMITS, 0).rank == 1  # it was last heard of in an earlier phase
    timed_out = RankState(0, Phase.failed, cause="Timed out waiting", at=0, is_consequence=True)
    assert decide([timed_out, waiting[1]], LIMITS, 0).rank == 1


@pytest.mark.parametrize("phase", [Phase.start, Phase.data, Phase.step, Phase.validate])
def test_a_process_that_does_not_answer_is_given_up_whatever_it_is_at(phase):
    """While data is made ready its peers are no less alive, and a start may last long."""
    frozen = RankState(1, phase, silent_s=50, answers=False, mute_s=LIMITS.step_s + 1)
    decision = decide([RankState(0, Phase.start), frozen], Limits(start_s=300, step_s=30), 0)
    assert (decision.action, decision.rank) == (Action.blame, 1) and phase.name in decision.cause
    busy = RankState(1, Phase.start, silent_s=50, answers=False, mute_s=LIMITS.step_s - 1)
    assert decide([RankState(0, Phase.start), busy], Limits(start_s=300, step_s=30), 0).action is Action.wait


@pytest.mark.parametrize("clock", [-3600, 3600])
def test_the_moment_for_a_root_cause_does_not_depend_on_another_machines_clock(clock):
    seen = [RankState(0, Phase.failed, at=10 + clock, heard_at=10, is_consequence=True), RankState(1, Phase.step)]
    assert decide(seen, LIMITS, 11).action is Action.wait
    assert decide(seen, LIMITS, 10 + LIMITS.settle_s).action is Action.blame


def test_a_lost_rank_is_replaced_until_faults_come_without_progress():
    killed = [Fault(1, "0", "its process died", step, 33) for step in (5, 9, 9, 9)]
    assert [respond(killed[:n]).action for n in (1, 2, 3)] == [Action.replace] * 3
    end = respond(killed)
    assert (end.action, end.exit_code) == (Action.stop, 93) and "3 faults without progress since step 9" in end.cause


def test_the_same_error_twice_at_one_step_is_a_bug_and_some_errors_are_final():
    bug = Fault(2, "0", "ZeroDivisionError: x", 3, 1)
    assert respond([bug]).action is Action.replace
    assert (respond([bug, bug]).action, respond([bug, bug]).exit_code) == (Action.stop, 1)
    assert respond([bug, Fault(2, "0", "ZeroDivisionError: x", 4, 1)]).action is Action.replace
    assert respond([Fault(0, "0", "no disk", 3, 3, is_final=True)]).exit_code == 3


def test_what_is_missing_is_said():
    nodes = [Node("a", 8, 8), Node("b", 8, 4, {"rack1": 2})]
    assert what_is_missing(Request(12, 1, True, False), nodes) is None
    assert what_is_missing(Request(13, 1, True, False), nodes) == (
        "13 ranks want 1 free GPU each, 12 can have that (a: 8 CPUs, 8 GPUs, b: 8 CPUs, 4 GPUs)")
    assert what_is_missing(Request(2, 4, True, True), nodes) is None
    missing = what_is_missing(Request(2, 8, True, True), nodes)
    assert missing.startswith("2 nodes with 8 free GPUs each are wanted, 1 such are there")
    assert "no nodes" in what_is_missing(Request(1, 1, False, False), [])
    rack = {"rack1": 0.5}
    assert what_is_missing(Request(4, 1, True, False, rack), nodes) is None
    assert what_is_missing(Request(5, 1, True, False, rack), nodes) == (
        "5 ranks want 1 free GPU and 0.5 rack1 each, 4 can have that (a: 8 CPUs, 8 GPUs, 0 rack1, b: 8 CPUs, 4 GPUs, "
        "2 rack1)")
    assert what_is_missing(Request(1, 8, True, False, spares=4), nodes) is None
    assert what_is_missing(Request(2, 4, True, True, spares=5), nodes).startswith(
        "cluster.spares=5 beside the 8 ranks want 1 free GPU each, 4 can have that")
    assert Request(1, 4, True, False, rack).bundle(4) == {"CPU": 4, "GPU": 4, "rack1": 2}


def test_expert_groups_are_asked_for_whole_where_they_fit():
    config = Config()
    config.layout.pp, config.layout.dp, config.layout.ep = 2, 4, 4
    whole = request_for(config, [Node("a", 5, 0), Node("b", 4, 0)], gpu=False, simulated=False)
    assert (whole.bundles, whole.ranks_per_bundle) == (2, 4)
    split = request_for(config, [Node("a", 6, 0), Node("b", 3, 0)], gpu=False, simulated=False)
    assert (split.bundles, split.ranks_per_bundle) == (8, 1)


def test_ranks_go_node_by_node_in_device_order_and_the_order_is_stable():
    homes = [("n10", 1), ("n2", 0), ("n10", 0), ("n2", 1), ("n10", 2)]
    order = order_ranks(homes, ep=1)
    assert [homes[i] for i in order] == [("n2", 0), ("n2", 1), ("n10", 0), ("n10", 1), ("n10", 2)]
    shuffled = [homes[i] for i in (4, 3, 2, 1, 0)]
    assert [shuffled[i] for i in order_ranks(shuffled, ep=1)] == [homes[i] for i in order]


def test_nodes_of_odd_sizes_split_no_more_expert_groups_than_they_must():
    homes = [(name, device) for name, size in (("a", 3), ("b", 2), ("c", 2), ("d", 1)) for device in range(size)]
    nodes = [homes[i][0] for i in order_ranks(homes, ep=2)]
    groups = [set(nodes[i : i + 2]) for i in range(0, 8, 2)]
    assert groups == [{"a"}, {"b"}, {"c"}, {"a", "d"}]


def test_a_group_on_several_nodes_is_made_of_whole_parts_of_them():
    homes = [(name, device) for name in ("a", "b") for device in range(6)]
    nodes = [homes[i][0] for i in order_ranks(homes, ep=8, ep_per_node=4)]
    assert nodes == ["a"] * 4 + ["b"] * 4 + ["a"] * 2 + ["b"] * 2


def test_ranks_get_torchruns_numbers():
    infos = rank_infos([("b", 4), ("b", 5), ("a", -1), ("a", -1)], "10.0.0.1", 29400)
    assert [info.rank for info in infos] == [0, 1, 2, 3] and {info.world_size for info in infos} == {4}
    assert [info.local_rank for info in infos] == [4, 5, 0, 1]
    assert [info.node_rank for info in infos] == [0, 0, 1, 1]
    assert {info.local_world_size for info in infos} == {2} and infos[3].master_addr == "10.0.0.1"
    assert [info.has_gpu for info in infos] == [True, True, False, False]


def test_nodes_are_simulated_here_and_real_on_a_cluster():
    config = Config()
    config.layout.pp, config.layout.dp, config.cluster.nodes = 2, 4, 2
    assert nodes_of(config) == (2, 4)
    assert request_of(config, gpu=True, simulated=False) == Request(2, 4, True, spread=True)
    assert request_of(config, gpu=False, simulated=True) == Request(8, 1, False, spread=False)
    config.cluster.nodes, config.cluster.ranks_per_node = 0, 2
    assert nodes_of(config) == (4, 2)


def test_a_rank_on_a_gpu_is_ended_by_its_controller_alone():
    """NCCL would end the process of every rank when one of them is lost, and the states in their memory with them."""
    there = environment(gpu=True, beside_gpus=True)
    assert there["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] == "1", "devices are not masked"
    assert (there["TORCH_NCCL_ASYNC_ERROR_HANDLING"], there["TORCH_NCCL_ENABLE_MONITORING"]) == ("0", "0")
    assert environment(gpu=False, beside_gpus=True) == {"CUDA_VISIBLE_DEVICES": ""}
    assert environment(gpu=False, beside_gpus=False) == {}


@pytest.mark.parametrize("gpus, device, told", [
    (0, "cuda", "hardware=h100: 4 ranks would train on the CPU at its price: Ray sees no GPUs here"),
    (1, "cuda", "Ray sees 1 GPU here; .*use a layout of 1 rank, or hardware=cpu"), (4, "cuda", True), (0, "cpu", False),
    (2, "cpu", False)])
def test_a_machine_without_the_gpus_that_were_named_is_refused(monkeypatch, gpus, device, told):
    config = Config()
    config.layout.dp, config.hardware.device, config.hardware.name = 4, device, "h100"
    monkeypatch.setattr(preflight.ray, "cluster_resources", lambda: {"GPU": float(gpus)} if gpus else {})
    if isinstance(told, bool):
        assert preflight.has_gpus(config, Progress(), here=True) is told
    else:
        with pytest.raises(NotFit, match=told):
            preflight.has_gpus(config, Progress(), here=True)


def test_nodes_on_their_way_are_asked_for_and_waited_for(monkeypatch):
    """By an autoscaler, which sees nothing else to start nodes for; and no longer than they are needed."""
    config, asked, now = Config(), [], [0.0]
    config.layout.dp, config.layout.ep, config.cluster.join_timeout_s = 16, 8, 60.0
    config.hardware.device = "cuda"
    node = {"NodeManagerAddress": "a", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 8.0}}

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(nodes, "alive", lambda: [node] * int(now[0] // 10))
    monkeypatch.setattr(nodes, "ask_for", asked.append)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(preflight.ray, "cluster_resources", dict)
    gpu = preflight.has_gpus(config, Progress(), here=False)
    assert gpu
    request = preflight.checked_request(config, gpu=gpu, simulated=False)
    assert (request.bundles, request.ranks_per_bundle, now) == (2, 8, [20.0])
    assert asked == [[{"CPU": 1.0, "GPU": 1.0}] * 16, []]
    config.cluster.join_timeout_s, now[0] = 5.0, 0.0
    with pytest.raises(NotFit, match="no room on the cluster: 16 ranks want 1 free GPU each, 0 can have that"):
        preflight.checked_request(config, gpu=gpu, simulated=False)
    assert asked[-1] == []


def test_sigterm_while_the_head_is_waited_for_is_a_preemption(tmp_path, monkeypatch, capsys):
    """Slurm starts such a run again, and not one that its signal has killed."""
    def knock(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(session, "_knock", knock)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["train", "experiment=tiny", f"run.dir={tmp_path}"]) == 34
    assert "SIGTERM before there were ranks" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) is before


def test_a_closed_terminal_asks_for_a_checkpoint_as_often_as_it_is_told_and_not_under_nohup(monkeypatch):
    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr(session, "ECHO_S", 0.0)
    with session.early_end():
        cause = session.stop_signals()
        for _ in range(2):  # by the shell and by the kernel
            signal.raise_signal(signal.SIGHUP)
        assert cause() == "SIGHUP"
        with pytest.raises(Transient, match="a second SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is before
    seen = []
    monkeypatch.setattr(session.ray, "init", lambda **_: seen.append(signal.getsignal(signal.SIGHUP)))
    session._start(1)
    assert seen == [signal.SIG_IGN], "what a Ray of our own starts inherits it"
    assert signal.getsignal(signal.SIGHUP) is before
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with session.early_end():
            cause = session.stop_signals()
            signal.raise_signal(signal.SIGHUP)
            assert cause() is None
    finally:
        signal.signal(signal.SIGHUP, before)
