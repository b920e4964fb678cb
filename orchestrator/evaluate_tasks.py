"""The adapter for EleutherAI's lm-evaluation-harness: its tasks, on local data, with a model of ours.

Imported only where tasks are asked for: the harness is the optional extra `eval`. Nothing is downloaded: the harness's
own catalogue of tasks is left out, and the libraries below it are told to stay offline.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb

from model.decode import Decoder
from model.generate import Sampling, generate
from model.score import score, score_texts
from orchestrator.errors import BadRequest, NotFit, SparingError
from orchestrator.inference import Loaded, TextStream
from orchestrator.train.tokenizer import begun

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
try:
    import lm_eval
    from lm_eval.api.model import LM
except ImportError as error:
    raise NotFit(f"tasks: need the package lm-eval ({error}); pip install 'sparing[eval]'") from None

KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
"""Of a task's generation_kwargs; others are refused."""
MAX_NEW_TOKENS = 256
"""Where a task does not say how long an answer may be."""
SLOTS = 16
"""Answers that are decoded at once, where there is room for that many."""


def evaluate_tasks(loaded: Loaded, tasks: list[str], folder: str, *, limit: int | None = None) -> dict:
    """The harness's own result for tasks defined by YAML files in `folder`. `limit`: examples of each task."""
    from lm_eval.tasks import TaskManager

    if not Path(folder).is_dir():
        raise BadRequest(f"task_dir={folder}: is no directory; name one with a YAML file for each task")
    with _plain_errors(tasks, folder):
        manager = TaskManager(include_path=str(Path(folder).resolve()), include_defaults=False)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if unknown:
            raise BadRequest(f"tasks={','.join(unknown)}: not in task_dir={folder}; there are "
                             f"{', '.join(manager.all_tasks) or 'none'}")
        return lm_eval.simple_evaluate(model=HarnessModel(loaded), tasks=tasks, task_manager=manager, limit=limit,
                                       bootstrap_iters=0)


@contextlib.contextmanager
def _plain_errors(tasks: list[str], folder: str) -> Iterator[None]:
    """What a task's file asks for is run by the harness and the libraries below it; any error but a model's is the
    file's."""
    try:
        yield
    except SparingError:
        raise
    except Exception as error:
        if any(isinstance(frame.f_locals.get("self"), HarnessModel) for frame, _ in walk_tb(error.__traceback__)):
            raise
        said = " ".join(str(error).split())
        raise BadRequest(f"tasks={','.join(tasks)}: {type(error).__name__}: {said[:400]}; mend the task's YAML file in "
                         f"task_dir={folder}, or the data that it names (nothing is downloaded)") from error


def table(results: dict) -> str:
    from lm_eval.utils import make_table

    return make_table(results)


class HarnessModel(LM):
    """What the harness asks of a model. Requests carry their arguments in `args`; answers come in the same order."""

    def __init__(self, loaded: Loaded):
        super().__init__()
        self.loaded, self.window = loaded, min(loaded.trained_len, loaded.window)
        self.begin = loaded.tokenizer.begin or (loaded.tokenizer.eos,)

    def encode(self, text: str) -> list[int]:
        """Behind what a text begins with or, where the model knows nothing of that, the end of a document."""
        return begun(self.loaded.tokenizer, text, self.begin)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would say it."""
        rows, firsts = [], []
        for request in requests:
            context, continuation = self._parted(*request.args)
            row = [*context, *continuation][-max(self.window, len(continuation) + 1) :]
            rows.append(row)
            firsts.append(len(row) - len(continuation))
        return [(float(found.log_prob.double().sum()), bool(found.is_best.all()))
                for found in score(self.loaded.model, rows, firsts, batch_tokens=self.loaded.batch_tokens)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts."""
        found = score_texts(self.loaded.model, (self.encode(request.args[0]) for request in requests),
                            first=len(self.begin), window=self.window, stride=self.window,
                            batch_tokens=self.loaded.batch_tokens)
        return [float(score.log_prob.double().sum()) for score in found]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Text up to a stop text, greedy where the task does not ask for samples. Requests that are alike go together;
        samples are by the first one's place, and that among them."""
        asked, texts, alike = [_asked(request.args[1]) for request in requests], [""] * len(requests), {}
        for place, (sampling, _, most) in enumerate(asked):
            alike.setdefault((sampling, most), []).append(place)
        for (sampling, most), places in alike.items():
            contexts, stops = [requests[place].args[0] for place in places], [asked[place][1] for place in places]
            for place, text in zip(places, self._continue(contexts, stops, sampling, most, places[0]), strict=True):
                texts[place] = text
        return texts

    def _parted(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness's own models do it: what a text begins with may be other tokens alone than inside one."""
        blank = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blank], context[len(context) - blank :] + continuation
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def _continue(self, contexts: list[str], stops: list[list[str]], sampling: Sampling, most: int,
                  seed: int) -> list[str]:
        """A context that fits into the window is kept whole, and the answer gets what is left; a longer one leaves the
        answer all that it may have, as with the harness's own models, but at most half."""
        window = self.loaded.window
        prompts = [ids if len(ids) < window else ids[-max(window - most, window // 2) :]
                   for ids in map(self.encode, contexts)]
        mosts = [min(most, window - len(prompt)) for prompt in prompts]
        streams = [TextStream(self.loaded.tokenizer, *given) for given in zip(stops, prompts, strict=True)]
        capacity = max(len(prompt) + most for prompt, most in zip(prompts, mosts, strict=True))
        slots = max(1, min(SLOTS, len(prompts), self.loaded.cache_tokens // (capacity + 1)))
        texts, counts = [""] * len(prompts), [0] * len(prompts)
        for row, token in generate(Decoder(self.loaded.model, slots=slots, capacity=capacity), prompts,
                                   max_tokens=max(mosts), sampling=sampling, seed=seed,
                                   stops=lambda row, token: streams[row].stopped or counts[row] == mosts[row]):
            texts[row] += streams[row].push(token)
            counts[row] += 1
        return [text + stream.finish() for text, stream in zip(texts, streams, strict=True)]


def _asked(options: dict) -> tuple[Sampling, list[str], int]:
    """What a task's generation_kwargs ask for, and BadRequest where that cannot be: sampling, the texts that end an
    answer (of which empty ones end none, as the harness has it), most tokens."""
    if unknown := sorted(set(options) - KNOWN):
        raise BadRequest(f"generation_kwargs.{unknown[0]}={options[unknown[0]]}: is not supported; a task may give "
                         f"{', '.join(sorted(KNOWN))}")
    stops, most = options.get("until") or [], options.get("max_gen_toks", MAX_NEW_TOKENS)
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise BadRequest(f"generation_kwargs.until={options['until']}: must be a text or a list of texts; use "
                         r'until: ["\n"]')
    if type(most) is not int or most < 1:
        raise BadRequest(f"generation_kwargs.max_gen_toks={most!r}: must be a whole number of at least 1; use "
                         f"max_gen_toks: {MAX_NEW_TOKENS}")
    return _sampling(options), [stop for stop in stops if stop], most


def _sampling(options: dict) -> Sampling:
    """Samples where `do_sample` or a temperature says so, unless `do_sample` is false."""
    temperature, top_p = options.get("temperature"), options.get("top_p", 1.0)
    if not options.get("do_sample", bool(temperature)):
        return Sampling()
    temperature = 1.0 if temperature is None else temperature
    for key, value, most in ("temperature", temperature, 100), ("top_p", top_p, 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise BadRequest(f"generation_kwargs.{key}={value}: must be a number between 0 and {most}; use {key}: 1")
    return Sampling(temperature, max(top_p, 1e-6))
