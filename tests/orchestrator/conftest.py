import contextlib
import dataclasses

import pytest

from tests.harness import Ranks


@pytest.fixture(scope="session")
def ranks():
    """Gloo processes shared by the whole session; `ranks.run(function, *args, world=4)`."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def loaded():
    from tests.orchestrator.serving import small_model

    return small_model()


@pytest.fixture(scope="module")
def server(loaded):
    from tests.orchestrator.serving import Server

    with contextlib.closing(Server(loaded)) as found:
        yield found


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a model of random weights as a checkpoint and, in `hf`, as Hugging Face has it. No test changes it.
    """
    import torch

    from model import hf
    from model.transformer import Transformer
    from orchestrator.train.export import import_hf
    from orchestrator.train.tokenizer import bytes_as_files
    from tests.model.test_hf import TINY

    config = dataclasses.replace(TINY, vocab_size=264, n_mtp_layers=1, max_seq_len=96)
    folder, model = tmp_path_factory.mktemp("generate"), Transformer(config)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
            if name == "lm_head.weight":  # letters only, so that the text can be read
                parameter[:97], parameter[123:] = 0, 0
    hf.export(folder / "hf", config, model.state_dict())
    for name, text in bytes_as_files().items():
        (folder / "hf" / name).write_text(text)
    import_hf(str(folder / "hf"), str(folder / "checkpoints"))
    return folder
