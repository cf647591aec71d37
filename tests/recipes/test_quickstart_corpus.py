"""The quickstart's text: split, fingerprint, and what the installed Python has."""

import sys

import pytest

from built_in_data import split_train_modules
from quickstart.corpus import HELD_OUT_ONE_IN, Corpus, Module, is_held_out, read_corpus


@pytest.fixture(scope="module")
def library() -> Corpus:
    """The running Python's own."""
    return read_corpus()


def test_split_is_disjoint_by_top_level_module(library: Corpus) -> None:
    train, held_out = ({module.top_level for module in side} for side in (library.train, library.held_out))
    assert len(train) > 100
    assert len(held_out) > 10
    assert not train & held_out
    assert {name.strip("_") for name in train}.isdisjoint(name.strip("_") for name in held_out)


def test_split_has_the_stated_size_and_no_foreign_text(library: Corpus) -> None:
    names = {module.top_level for module in library.train + library.held_out}
    share = sum(map(is_held_out, names)) / len(names)
    assert 0.5 / HELD_OUT_ONE_IN < share < 2 / HELD_OUT_ONE_IN
    assert not any("site-packages" in module.name or "/test" in module.name for module in library.train)
    assert {"asyncio", "json"} <= names <= set(sys.stdlib_module_names) | names


def test_private_twins_stay_together() -> None:
    assert all(is_held_out(f"_{name}") == is_held_out(name) == is_held_out(f"_py{name}") for name in ("io", "decimal"))


def test_validation_split_takes_train_modules_only(library: Corpus) -> None:
    again = split_train_modules(library)
    assert set(again.train) | set(again.held_out) == set(library.train)
    assert set(again.train).isdisjoint(again.held_out)
    assert again.held_out


def test_fingerprint_changes_with_text_and_with_side() -> None:
    a, b = Module("a.py", "x = 1\n"), Module("b.py", "y = 2\n")
    prints = {Corpus((a,), (b,)).fingerprint, Corpus((b,), (a,)).fingerprint, Corpus((a, b), ()).fingerprint}
    assert len(prints) == 3
    assert Corpus((a,), (b,)).fingerprint == Corpus((a,), (b,)).fingerprint


def test_order_and_coding_do_not_depend_on_the_file_system(tmp_path) -> None:
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_bytes("# coding: latin-1\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text("c = 1\n")
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe\xfa")
    corpus = read_corpus(tmp_path)
    modules = {module.name: module for module in corpus.train + corpus.held_out}
    assert sorted(modules) == ["a/z.py", "b.py"]
    assert "é" in modules["a/z.py"].text
