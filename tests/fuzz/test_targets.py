"""Every target: the corpus is replayed, and a short, repeatable run grows out of it; ``make fuzz`` goes on."""

from __future__ import annotations

import os

import pytest
from tests.fuzz.guided import Guided
from tests.fuzz.target import CORPUS, Target, written
from tests.fuzz.targets import TARGETS

FACTOR = int(os.environ.get("VFIOD_FUZZ_EXAMPLES", "100")) / 100


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def test_the_corpus_passes_and_nothing_that_grows_out_of_it_breaks_a_promise(target: Target) -> None:
    seeds = target.seeds()
    run = Guided(target.run, seeds, modules=target.modules)
    kept = len(run.kept)
    assert run.places, "it does not reach what it is about"
    run.run(int(target.inputs * FACTOR))
    assert run.tried == len(seeds) + int(target.inputs * FACTOR)
    assert len(run.kept) >= kept


def test_a_run_finds_its_way() -> None:
    """Past three bytes that must be right, one after the other: chance alone would take sixteen million inputs."""
    run = Guided(_puzzle, [b"...."], modules=(__name__,))
    with pytest.raises(AssertionError, match="found") as found:
        run.run(200_000)
    note = found.value.__notes__[-1]
    assert written(note.removeprefix("input: ")).startswith(b"\xff\x80\x7f")


def _puzzle(data: bytes) -> None:
    if data[:1] != b"\xff":
        return
    if data[1:2] != b"\x80":
        return
    if data[2:3] == b"\x7f":
        raise AssertionError("found")


def test_every_file_of_the_corpus_belongs_to_a_target_and_is_small_text() -> None:
    assert {path.stem for path in CORPUS.glob("*.txt")} == TARGETS.keys()
    for path in CORPUS.rglob("*.txt"):
        assert path.read_text().isascii()
        assert path.stat().st_size < 64 * 1024, f"{path.name} is too large to keep"
