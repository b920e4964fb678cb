"""Words of the command line that are no overrides: taken, passed on, or refused with the nearest known."""

import pytest

from orchestrator.arguments import number, taken
from orchestrator.errors import BadRequest

KNOWN = ("tokens", "gpus", "seeds")


def test_known_keys_are_taken_and_overrides_of_the_config_passed_on():
    words = ["tokens=1e12", "model=tiny", "layout.pp=2", "gpus=a=b", "seed=3", "~optim", "+x=1"]
    assert taken(words, KNOWN) == ({"tokens": "1e12", "gpus": "a=b"}, ["model=tiny", "layout.pp=2", "seed=3", "~optim",
                                                                      "+x=1"])


@pytest.mark.parametrize("word, said", [("tokns=1e12", "did you mean tokens=1e12"), ("gpu=4", "did you mean gpus=4"),
                                        ("tokens", "tokens: no such key; did you mean tokens=...")])
def test_what_is_nearly_a_key_is_refused_with_the_nearest(word, said):
    with pytest.raises(BadRequest, match=said):
        taken([word], KNOWN)


def test_a_whole_number_may_be_written_as_any_number():
    for text, value in (("12", 12), ("1.2e1", 12), ("12.0", 12)):
        assert number({"n": text}, "n", 1, 1) == value
    for text in ("1.5", "nan", "inf", "1e400", "0", "x"):
        with pytest.raises(BadRequest, match=f"n={text}: must be a whole number of at least 1; use n=1"):
            number({"n": text}, "n", 1, 1)
