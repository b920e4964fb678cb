"""`sparing status RUN`: what a live run is doing, from the status.json its controller keeps."""

import time
from itertools import count, groupby

from orchestrator.errors import BadRequest
from orchestrator.train import storage
from orchestrator.train.finish import format_usd, goes_on, headline, read_kept, read_summary
from orchestrator.train.metrics import EVENTS, read_lines
from orchestrator.train.run_dir import CONFIG, STATUS

WIDTH = 150
"""Of a table that is not printed to a terminal."""

DOING = {"data": "reading data", "step": "running", "validate": "validating", "save": "saving", "done": "ending"}
"""By what a rank calls it."""


def show_status(run_dir: str) -> None:
    """A table, one row a rank: where it is, what it hosts, what it received, when it last moved."""
    from rich.console import Console
    from rich.table import Table

    if not storage.exists(storage.join(run_dir, CONFIG)):
        raise BadRequest(f"{run_dir}: is no run directory (it has no {CONFIG}); name one, as in runs/NAME")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.width = console.width if console.is_terminal else WIDTH
    status, summary = read_kept(run_dir, STATUS), read_summary(run_dir)
    if status is None:
        live = summary is None or goes_on(read_lines(run_dir, EVENTS))
        console.print("no ranks have been placed by Ray; `sparing report` shows the steps of one under torchrun" if live
                      else "\n".join(headline(summary)))
        return
    ended = summary is not None and summary["released_at"] >= status["time"]
    lead = status["ranks"][0]
    waiting = None if ended else status.get("waiting")
    state = summary["status"] if ended else "waiting" if waiting else DOING.get(lead.get("phase"), "starting")
    step = summary["steps"] if ended else lead.get("step", 0)  # an attempt that was refused took none
    line = f"{run_dir}: {state}, step {step} of {lead.get('steps', '?')}, attempt {status['attempt']}"
    if lead.get("loss") is not None:
        told = summary if ended else lead  # a run is charged until its devices are released
        rate = "" if told["tokens_per_s"] is None else f", {told['tokens_per_s']:,.0f} tokens/s"
        line += f", loss {lead['loss']:.4f}{rate}, {format_usd(told['usd_total'])}" + " so far" * (not ended)
    console.print(line)
    if waiting:
        console.print(f"waits for {waiting}")
    for notice in lead.get("notices", ()):
        console.print(notice)
    if ended and summary["status"] == "failed":
        console.print(f"failed: {_cause(run_dir)}")
    if ended and not any(row.get("stages") for row in status["ranks"]):
        return
    rows = [_cells(row, live=not ended) for row in status["ranks"]]
    table = Table(*rows[0], box=None, pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    if not ended and time.time() - status["time"] > 30:
        console.print(f"the controller has been silent for {time.time() - status['time']:.0f} s: it may be gone")


def _cause(run_dir: str) -> str:
    """Why the last attempt failed, as its end told."""
    failures = [event for event in read_lines(run_dir, EVENTS) if event.get("kind") == "run_failed"]
    return (failures[-1].get("cause") if failures else None) or "its events do not say why"


def _cells(row: dict, *, live: bool) -> dict[str, str]:
    """By column."""
    experts = row.get("experts") or [0, 0]
    received = row.get("tokens_per_expert") or {}
    totals = [sum(column) for column in zip(*received.values(), strict=True)] if received else []
    shown = " ".join(f"{first}:{total:,}" for first, total in enumerate(totals[:16], experts[0]))
    now = time.time()
    process = {"pid": str(row["pid"])} if live else {}
    sign = {"last sign": f"{max(0.0, now - row.get('heartbeat_at', now)):.1f} s ago"} if live else {}
    return {"rank": str(row["rank"]), "node": str(row["node_rank"]), "host": row["host"], **process,
            "stages": _span(row.get("stages")), "layers": _span(row.get("layers")),
            "experts": f"{experts[0]}-{experts[1] - 1}" if received else "-", **sign,
            "tokens by expert (its layers, since its start)": shown + (" ..." if len(totals) > 16 else "")}


def _span(numbers: list[int] | None) -> str:
    """0-3, 8: what follows one upon the other is said by its ends."""
    runs = [list(run) for _, run in groupby(numbers or [], key=lambda number, place=count(): number - next(place))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"
