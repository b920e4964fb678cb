"""Where the seconds of a step go, on the device's own clock."""

import time

import torch


class Stopwatch:
    """Laps of one step after another. A GPU's laps are events in its stream, read a step later, so nothing waits."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, object]] = []
        self.before: list[tuple[str, object]] = []
        self.cpu_began = 0.0

    def start(self) -> None:
        self.before, self.marks = self.marks, []
        self.cpu_began = time.process_time()
        self.lap("")

    def lap(self, name: str) -> None:
        """What ran since the lap before is `name`."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def cpu_s(self) -> float:
        """CPU seconds of this process's threads since the start; on a GPU they say nothing and are 0."""
        return 0.0 if self.on_gpu else time.process_time() - self.cpu_began

    def read(self) -> dict[str, float]:
        """Seconds by lap: of this step on a CPU, of the step before on a GPU."""
        marks = self.before if self.on_gpu else self.marks
        return {name: begun.elapsed_time(ended) / 1e3 if self.on_gpu else ended - begun
                for (_, begun), (name, ended) in zip(marks, marks[1:], strict=False)}
