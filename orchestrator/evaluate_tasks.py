"""The adapter for EleutherAI's lm-evaluation-harness: its tasks, on local data, with a model of ours.

Imported only where tasks are asked for: the harness is the optional extra `eval`. Nothing is downloaded: the harness's
own catalogue of tasks is left out, and the libraries below it are told to stay offline.
"""

import os
from pathlib import Path

from model.generate import Decoder, generate
from model.score import score, score_text
from orchestrator.errors import BadRequest, NotFit
from orchestrator.inference import Loaded, TextStream

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
try:
    import lm_eval
    from lm_eval.api.model import LM
except ImportError as error:
    raise NotFit(f"tasks: need the package lm-eval ({error}); pip install 'sparing[eval]'") from None

MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be."""


def evaluate_tasks(loaded: Loaded, tasks: list[str], folder: str, *, limit: int | None = None) -> dict:
    """The harness's own result for tasks defined by YAML files in `folder`. `limit`: examples of each task."""
    from lm_eval.tasks import TaskManager

    if not Path(folder).is_dir():
        raise BadRequest(f"task_dir={folder}: is no directory; name one with a YAML file for each task")
    manager = TaskManager(include_path=str(Path(folder).resolve()), include_defaults=False)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise BadRequest(f"tasks={','.join(unknown)}: not in task_dir={folder}; there are "
                         f"{', '.join(manager.all_tasks) or 'none'}")
    return lm_eval.simple_evaluate(model=HarnessModel(loaded), tasks=tasks, task_manager=manager, limit=limit,
                                   bootstrap_iters=0)


def table(results: dict) -> str:
    from lm_eval.utils import make_table

    return make_table(results)


class HarnessModel(LM):
    """What the harness asks of a model. Requests carry their arguments in `args`; answers come in the same order."""

    def __init__(self, loaded: Loaded):
        super().__init__()
        self.loaded, self.window = loaded, min(loaded.trained_len, loaded.window)
        self.encode = lambda text: loaded.tokenizer.encode(text).tolist()

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would say it."""
        rows, firsts = [], []
        for request in requests:
            context, continuation = self._parted(*request.args)
            row = [self.loaded.tokenizer.eos, *context, *continuation]
            row = row[-max(self.window, len(continuation) + 1) :]
            rows.append(row)
            firsts.append(len(row) - len(continuation))
        return [(float(found.log_prob.double().sum()), bool(found.is_best.all()))
                for found in score(self.loaded.model, rows, firsts)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts."""
        return [float(score_text(self.loaded.model, self.encode(request.args[0]), before=self.loaded.tokenizer.eos,
                                 window=self.window, stride=self.window).log_prob.double().sum())
                for request in requests]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy text up to a stop text."""
        return [self._continue(*request.args) for request in requests]

    def _parted(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness's own models do it: what a text begins with may be other tokens alone than inside one."""
        blank = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blank], context[len(context) - blank :] + continuation
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def _continue(self, context: str, options: dict) -> str:
        stops = options.get("until") or []
        max_tokens = min(options.get("max_gen_toks", MAX_NEW_TOKENS), self.loaded.window - 1)
        prompt = [self.loaded.tokenizer.eos, *self.encode(context)][-(self.loaded.window - max_tokens) :]
        stream = TextStream(self.loaded.tokenizer, [stops] if isinstance(stops, str) else stops, prompt)
        decoder = Decoder(self.loaded.model, slots=1, capacity=len(prompt) + max_tokens)
        text = "".join([stream.push(token) for _, token in generate(
            decoder, [prompt], max_tokens=max_tokens, stops=lambda row, token: stream.stopped)])
        return text + stream.finish()
