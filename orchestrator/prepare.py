"""`sparing prepare`: a corpus tokenised where no device is paid for. Runs that read the same then find it done."""

from orchestrator.choices import DataKind
from orchestrator.compose import compose_config
from orchestrator.own_files import expanded
from orchestrator.plan.layout import check_run

HELP = """\
usage: sparing prepare [KEY=VALUE ...]

  sparing prepare data=text data.path='/corpus/**/*.jsonl' data.tokenizer=tokenizer.json model.vocab_size=32768
  sparing prepare data=text data.path='s3://bucket/corpus/*.parquet' data.cache_dir=/shared/tokens

Takes the words of `train` and tokenises what such a run would read into data.cache_dir, on this machine's CPU. On a
cluster name a data.cache_dir that its nodes share, else each of them tokenises at the start of a run, in its time."""


def run(arguments: list[str]) -> int:
    from orchestrator.train import data
    from orchestrator.train.progress import Progress

    config = compose_config(expanded(arguments))
    check_run(config)
    if config.data.kind is not DataKind.text:
        print(f"data={config.data.kind.name}: nothing to prepare")
        return 0
    with Progress() as progress:
        corpus = data.prepare_here(config, progress)
    steps, read = config.train.steps, data.samples_before(config.train.steps, config.train) * config.train.seq_len
    for weight, streams in zip(corpus.weights, corpus.sources, strict=True):
        for split, stream in streams.items():
            print(f"{split:10s} {stream.num_tokens:,} tokens of {stream.num_bytes:,} bytes")
        share = f", {weight:.1%} of the sequences" * (len(corpus.sources) > 1)
        print(f"{'epochs':10s} {read * weight / streams['train'].num_tokens:.2g} in train.steps={steps}{share}\n"
              f"{'kept in':10s} {stream.folder}")
    print(f"bits per byte of the held-out text: bigram {corpus.baselines['bigram']:.3f}, gzip "
          f"{corpus.baselines['gzip']:.3f}")
    return 0
