"""vfio-user, coverage-guided, from real conversations. A long run: ``VFIOD_FUZZ_EXAMPLES=100000``, or with atheris
(``pip install atheris``) ``python -m tests.fuzz.vfio_user_atheris``.
"""

from __future__ import annotations

import os

from tests.fuzz.guided import Guided
from tests.fuzz.vfio_user_targets import CORPUS, corpus, target

INPUTS = int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100")) * 10


def test_the_corpus_is_there_and_passes() -> None:
    assert list(CORPUS.glob("*.txt"))
    for one in corpus():
        target(one)


def test_nothing_that_grows_out_of_it_breaks_either_side() -> None:
    run = Guided(target, corpus(), modules="vfiod.protocol.vfio_user")
    before = len(run.lines)
    run.run(INPUTS)
    assert len(run.kept) > 5
    assert len(run.lines) > before  # it finds its way to what no conversation has
