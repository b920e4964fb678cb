"""What drafts by the MTP module gain, on text that a run has not seen.

    sparing train experiment=mtp run.dir=runs/mtp && python benchmarks/speculation.py runs/mtp

Prompts are spread over the run's held-out documents and continued one at a time, plainly and with drafts in turns, so
that each ratio is of two neighbours in time; the median is given with its quartiles. CPU seconds stand beside the wall
clock, for a machine that is shared. Then what one step costs, which is what bounds the gain: a plain step reads one
token, one with a draft reads two and runs the MTP module, so gain = (1 + acceptance) * one / (two + draft).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from model.attention import rope_table
from model.decode import Decoder
from model.generate import Counts, Sampling, generate
from orchestrator.config import DataConfig, from_dict
from orchestrator.inference import Loaded, load_for_inference
from orchestrator.train import data
from orchestrator.train.manifest import read_manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loaded = load_for_inference(options.run)
    texts = held_out(loaded, options.prompts, options.prompt_tokens)
    print(f"{loaded.path}: {options.prompts} held-out prompts of {options.prompt_tokens} tokens, each continued by "
          f"{options.tokens}, {options.threads} thread")
    print(on_given_text(loaded, texts))
    prompts = texts[:, : options.prompt_tokens].tolist()
    for name, sampling in [("greedy", Sampling()), ("temperature 1", Sampling(temperature=1.0))]:
        print(f"{name:14} {continued(loaded, prompts, sampling, options)}", flush=True)
    print(costs(loaded, prompts[0]))


def held_out(loaded: Loaded, number: int, length: int) -> torch.Tensor:
    """Token ids [number, length + 2] from the validation split of the run's own data."""
    config = from_dict(DataConfig, read_manifest(loaded.path).state["config"]["data"])
    corpus = data.prepare(config, model=loaded.model.config, seq_len=length, n_extra=2)
    return torch.from_numpy(data.validation_batch(corpus, range(number), number, length, 2))


@torch.inference_mode()
def on_given_text(loaded: Loaded, texts: torch.Tensor) -> str:
    """Over held-out text as it stands, nothing generated: how often model and draft are right, and agree."""
    model, length = loaded.model, texts.shape[1] - 2
    x, rope = model.embed(texts[:, :length]), rope_table(model.config, length, texts.device)
    for block in model.layers.values():
        x = block(x, rope)
    x = model.norm(x)
    module = model.mtp["0"]
    drafts = model.head(module.norm(module(x, texts[:, 1 : length + 1], model.tok_embeddings, rope)))[:, :-1]
    own = model.head(x)[:, 1:]
    right = [(logits.argmax(-1) == texts[:, 2 : length + 1]).float().mean().item() for logits in (own, drafts)]
    agree = (own.argmax(-1) == drafts.argmax(-1)).float().mean().item()
    sampled = torch.minimum(own.softmax(-1), drafts.softmax(-1)).sum(-1).mean().item()
    return (f"given text     next token right: model {right[0]:.1%}, draft {right[1]:.1%}; draft accepted: greedy "
            f"{agree:.1%}, temperature 1 {sampled:.1%}")


def continued(loaded: Loaded, prompts: list[list[int]], sampling: Sampling, options: argparse.Namespace) -> str:
    walls, cpus, counts, rates, same = [], [], Counts(), ([], []), True
    for turn in range(options.turns):
        for prompt in prompts:
            plain, drafted = (timed(loaded, prompt, sampling, options.tokens, turn, speculative, counts)
                              for speculative in (False, True))
            walls.append(plain[0] / drafted[0])
            cpus.append(plain[1] / drafted[1])
            for rate, one in zip(rates, (plain, drafted), strict=True):
                rate.append(options.tokens / one[0])
            same &= plain[2] == drafted[2]
    words = f"; the same tokens: {'yes' if same else 'NO'}" if sampling.temperature == 0 else ""
    plain, drafted = map(statistics.median, rates)
    return (f"accepted {counts.accepted / counts.drafted:.1%} of {counts.drafted}; {plain:.1f} and {drafted:.1f} "
            f"tokens/s; gain {spread(walls)} by the clock, {spread(cpus)} by CPU seconds{words}")


def timed(loaded: Loaded, prompt: list[int], sampling: Sampling, tokens: int, seed: int, speculative: bool,
          counts: Counts) -> tuple[float, float, list]:
    """Wall and CPU seconds and tokens of one continuation, prompt included."""
    decoder = Decoder(loaded.model, slots=1, capacity=len(prompt) + tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    found = list(generate(decoder, [prompt], max_tokens=tokens, sampling=sampling, seed=seed, speculative=speculative,
                          counts=counts))
    return time.perf_counter() - wall, time.process_time() - cpu, found


def costs(loaded: Loaded, prompt: list[int]) -> str:
    """Median milliseconds of a forward over one and two tokens and of a draft, taken in turns."""
    decoder = Decoder(loaded.model, slots=1, capacity=len(prompt) + 2)
    states = decoder.hidden([0], [prompt])[0]
    decoder.draft([0], [states[:-1]], [prompt[1:]])

    def forward(number: int) -> None:
        decoder.head(decoder.hidden([0], [prompt[:number]]))
        decoder.cache.cut(0, len(prompt))

    def draft() -> None:
        decoder.draft([0], [states[-2:]], [prompt[:2]])
        decoder.drafts.cut(0, len(prompt) - 1)

    parts: list[Callable[[], None]] = [lambda: forward(1), lambda: forward(2), draft]
    taken: list[list[float]] = [[], [], []]
    for _ in range(100):
        for part, seconds in zip(parts, taken, strict=True):
            start = time.process_time()
            part()
            seconds.append(time.process_time() - start)
    one, two, drafting = (statistics.median(seconds) * 1e3 for seconds in taken)
    return (f"one step       CPU ms: one token {one:.1f}, two tokens {two:.1f}, draft {drafting:.1f}; a gain of "
            f"at most {2 * one / (two + drafting):.2f}x, were every draft accepted")


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
