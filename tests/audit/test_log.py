"""The audit log: what was written is what was routed, nothing else, in bounded memory, and found again by expert."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hf_moe_ext.audit.batch import BatchFacts, tag_batch
from hf_moe_ext.audit.events import RoutingEvent, watch_routing
from hf_moe_ext.audit.log import FACTS_FILE, AuditLog, AuditLogWriter
from hf_moe_ext.audit.log_sampling import keep_tokens
from support import zoo
from support.perft import perft_r

WORD = "word-number-{:03d}-of-a-secret"


def _decode(token: int) -> str:
    return WORD.format(token)


def _passes(model, listener, batches: int = 3, rows: int = 3, length: int = 9) -> list[torch.Tensor]:
    """Forward passes over padded batches with slices and example ids; the token ids they were shown."""
    shown = []
    for number in range(batches):
        batch = zoo.random_batch(batch=rows, length=length, seed=number)
        names = [f"slice {(number + row) % 2}" for row in range(rows)]
        with watch_routing(model, listener), tag_batch(names, [f"e{number}-{row}" for row in range(rows)]):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        shown.append(batch["input_ids"][batch["attention_mask"].bool()])
    return shown


def _write(folder: Path, model, **options) -> list[RoutingEvent]:
    events: list[RoutingEvent] = []
    with AuditLogWriter(folder, **options) as writer:

        def listen(event: RoutingEvent) -> None:
            events.append(event)
            writer(event)

        _passes(model, listen)
    return events


def _rows_by_hand(events: list[RoutingEvent]) -> list[tuple]:
    """Every counted token of every event, one at a time."""
    rows = []
    for event in events:
        facts = event.batch
        ids = facts.input_ids.reshape(-1)
        for token in range(len(event.index)):
            if facts.mask is not None and not facts.mask[token]:
                continue
            row = int(facts.rows[token])
            rows.append(
                (
                    event.layer, event.router, facts.examples[row], int(facts.positions[token]), facts.slices[row],
                    event.index[token].tolist(), event.weights[token].tolist(), int(ids[token]),
                    _decode(int(ids[token])),
                )
            )  # fmt: skip
    return rows


def _event(tokens: int, first: int = 0, num_experts: int = 8, layer: str = "layers.0.experts") -> RoutingEvent:
    index = torch.stack([torch.arange(tokens) % num_experts, (torch.arange(tokens) + 1) % num_experts], dim=1)
    facts = BatchFacts(
        torch.full((1, tokens), 5),
        None,
        torch.arange(tokens) + first,
        torch.zeros(tokens, dtype=torch.long),
        None,
        ("x",),
    )
    return RoutingEvent(layer, "base", num_experts, index, torch.full((tokens, 2), 0.5), None, facts)


@pytest.fixture
def model():
    return perft_r("olmoe", torch.float32).eval()


def test_log_is_what_a_loop_over_the_events_finds(model, tmp_path: Path) -> None:
    events = _write(tmp_path / "log", model, decode=_decode, row_group_rows=7)
    log = AuditLog.open(tmp_path / "log")
    told = sorted(tuple(row.values()) for row in log.dataset().to_list())
    assert {event.router for event in events} == {"base", "default"}
    assert told == sorted(_rows_by_hand(events))
    assert sum(one["num_rows"] for one in log.routers) == len(told) > 100


def test_tokens_of_an_expert_are_what_a_loop_finds(model, tmp_path: Path) -> None:
    events = _write(tmp_path / "log", model, decode=_decode, row_group_rows=5)
    log = AuditLog.open(tmp_path / "log")
    rows = _rows_by_hand(events)
    for router, experts in (("base", 8), ("default", 4)):
        for expert in range(experts):
            expected = [r for r in rows if r[0] == "model.layers.1.mlp.experts" and r[1] == router and expert in r[5]]
            found = log.tokens_of(layer=1, expert=expert, limit=None, router=router)
            assert [(t.example, t.position, t.token_text) for t in found] == [(r[2], r[3], r[8]) for r in expected]
            assert [t.weight for t in found] == [r[6][r[5].index(expert)] for r in expected]
            assert [t.rank for t in found] == [r[5].index(expert) for r in expected]
            few = log.tokens_of(layer="model.layers.1.mlp.experts", expert=expert, limit=2, router=router)
            assert few == found[:2]
    texts = log.texts_of(layer=1, expert=0, limit=3)
    counted = [r[8] for r in rows if r[0] == "model.layers.1.mlp.experts" and r[1] == "base" and 0 in r[5]]
    assert texts[0][1] == max(counted.count(text) for text in counted)


def test_a_question_about_one_router_reads_no_other_file(model, tmp_path: Path) -> None:
    _write(tmp_path / "log", model)
    log = AuditLog.open(tmp_path / "log")
    expected = log.tokens_of(layer=0, expert=1)
    wanted = next(
        one for one in log.routers if one["layer"] == "model.layers.0.mlp.experts" and one["router"] == "base"
    )
    for one in log.routers:
        if one is not wanted:
            (tmp_path / "log" / one["file"]).unlink()
    assert log.tokens_of(layer=0, expert=1) == expected != []


def _all_bytes(folder: Path) -> bytes:
    """Every byte of a log with its tables decoded, since compression would hide a text from a search."""
    found = b""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            plain = path.with_suffix(".plain")
            pq.write_table(pq.read_table(path), plain, compression="none", use_dictionary=False, write_statistics=False)
            found += plain.read_bytes()
        elif path.is_file():
            found += path.read_bytes()
    return found


@pytest.mark.parametrize("shown", [False, True])
def test_a_redacted_log_holds_neither_text_nor_ids(shown: bool, model, tmp_path: Path) -> None:
    """The same search finds both in a log that shows them, so it would find them here."""
    shown_ids: list[torch.Tensor] = []
    with AuditLogWriter(tmp_path / "log", decode=_decode if shown else None) as writer:
        shown_ids = _passes(model, writer)
    content = _all_bytes(tmp_path / "log")
    texts = [_decode(int(i)).encode() in content for ids in shown_ids for i in ids]
    sequence = torch.cat(shown_ids).numpy()
    ids = [sequence.astype(kind).tobytes() in content for kind in (np.int16, np.int32, np.int64)]
    assert any(texts) is all(texts) is any(ids) is shown
    log = AuditLog.open(tmp_path / "log")
    assert log.redacted is not shown
    token = log.tokens_of(layer=0, expert=int(log.dataset()[0]["experts"][0]), limit=1)[0]
    assert (token.token_id is None, token.token_text is None) == (not shown, not shown)
    if not shown:
        with pytest.raises(ValueError, match="is redacted: it holds no text"):
            log.texts_of(layer=0, expert=0)


def test_memory_does_not_grow_with_what_was_written(tmp_path: Path) -> None:
    held = []
    with AuditLogWriter(tmp_path / "log", row_group_rows=256) as writer:
        before = pa.total_allocated_bytes()
        for number in range(120):
            writer(_event(100, first=100 * number))
            held.append(pa.total_allocated_bytes() - before)
        writer(_event(5000))
        after_long = pa.total_allocated_bytes() - before
    assert max(held[60:]) <= 1.2 * max(held[:60])
    assert after_long <= 1.2 * max(held[:60])  # of 5000 rows 136 wait, and no more is held for them
    with pq.ParquetFile(tmp_path / "log" / "data" / "part-0000.parquet") as file:
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(groups) == 17_000
    assert max(groups) == 256
    assert set(groups[:-1]) == {256}


def test_a_sample_is_the_same_for_every_layer_and_batch_size(tmp_path: Path) -> None:
    kept = {}
    for size in (50, 400):
        with AuditLogWriter(tmp_path / str(size), sample_rate=0.25, seed=3) as writer:
            for first in range(0, 2000, size):
                for layer in range(2):
                    writer(_event(size, first=first, layer=f"layers.{layer}.experts"))
        rows = AuditLog.open(tmp_path / str(size)).dataset().to_list()
        for layer in range(2):
            positions = [row["position"] for row in rows if row["layer"] == f"layers.{layer}.experts"]
            kept[size, layer] = positions
    assert len({tuple(each) for each in kept.values()}) == 1
    assert len(kept[50, 0]) == pytest.approx(500, abs=5 * (2000 * 0.25 * 0.75) ** 0.5)


def test_sampled_examples_are_whole_and_seeds_differ() -> None:
    examples = [f"example {i}" for i in range(400)]
    rows, positions = np.repeat(np.arange(400), 6), np.tile(np.arange(6), 400)
    kept = keep_tokens(examples, rows, positions, 0.5, "example", seed=1).reshape(400, 6)
    assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
    assert 140 < kept[:, 0].sum() < 260
    other = keep_tokens(examples, rows, positions, 0.5, "example", seed=2).reshape(400, 6)
    assert (kept[:, 0] != other[:, 0]).mean() > 0.3
    tokens = keep_tokens(examples, rows, positions, 0.5, "token", seed=1).reshape(400, 6)
    assert 0 < tokens.all(axis=1).sum() < 60  # a 64th of them by chance
    # Neighbours are drawn apart from each other.
    assert abs(np.corrcoef(tokens[:, 0], tokens[:, 1])[0, 1]) < 0.25


def test_rows_are_numbered_where_nobody_names_them_also_while_generating(tmp_path: Path) -> None:
    model = zoo.build("olmoe")
    prompts = torch.randint(3, zoo.VOCAB_SIZE, (2, 5))
    with AuditLogWriter(tmp_path / "log", decode=_decode) as writer, watch_routing(model, writer):
        model(input_ids=prompts)
        model.generate(prompts, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=zoo.PAD_ID)
    rows = [
        row for row in AuditLog.open(tmp_path / "log").dataset().to_list() if row["layer"].startswith("model.layers.1")
    ]
    places: dict[str, list[int]] = {}
    for row in rows:
        places.setdefault(row["example"], []).append(row["position"])
    assert places == {"0": [*range(5)], "1": [*range(5)], "2": [*range(7)], "3": [*range(7)]}


def test_tokens_of_which_nothing_is_known_are_logged_with_their_experts(tmp_path: Path) -> None:
    nowhere = torch.full((400,), -1)
    event = _event(400)
    unknown = RoutingEvent(
        event.layer, "base", 8, event.index, event.weights, None, BatchFacts(None, None, nowhere, nowhere)
    )
    with AuditLogWriter(tmp_path / "log", sample_rate=0.5) as writer:
        writer(unknown)
    rows = AuditLog.open(tmp_path / "log").dataset().to_list()
    assert 120 < len(rows) < 280
    assert {(row["example"], row["position"], row["slice"]) for row in rows} == {(None, -1, None)}


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with AuditLogWriter(folder, row_group_rows=4) as writer:
            writer(_event(50))
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fail(tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    with AuditLogWriter(tmp_path / "log") as writer:
        writer(_event(50))
        assert not (tmp_path / "log").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate": 0.0}, "sample_rate must be above 0 and at most 1, got 0.0"),
        ({"sample_rate": float("nan")}, "sample_rate must be above 0"),
        ({"sampled_by": "layer"}, "sampled_by must be 'token' or 'example', got 'layer'"),
        ({"row_group_rows": 0}, "row_group_rows must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_be_used(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        AuditLogWriter(tmp_path / "log", **options)


def test_a_taken_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="needs a folder of its own"):
        AuditLogWriter(tmp_path)
    with pytest.raises(ValueError, match="needs a folder of its own"):
        AuditLogWriter(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_text_needs_ids_and_a_log_needs_its_block(tmp_path: Path) -> None:
    event = _event(4)
    facts = BatchFacts(None, None, event.batch.positions, event.batch.rows)
    with (
        pytest.raises(ValueError, match="the model was called with embeddings"),
        AuditLogWriter(tmp_path / "log", decode=_decode) as writer,
    ):
        writer(RoutingEvent(event.layer, "base", 8, event.index, event.weights, None, facts))
    with pytest.raises(ValueError, match="in a with block"):
        writer(event)


def test_questions_without_an_answer(tmp_path: Path) -> None:
    with AuditLogWriter(tmp_path / "log") as writer:
        writer(_event(4))
        writer(_event(4, layer="encoder.layers.0.experts"))
        writer(_event(4, layer="layers.2.experts"))
    log = AuditLog.open(tmp_path / "log")
    for arguments, message in (
        ({"layer": 7, "expert": 0}, "has no layer 7; it has layers.0.experts"),
        ({"layer": 0, "expert": 0}, "layer 0 is one of several"),
        ({"layer": 2, "expert": 8}, "expert must be from 0 to 7"),
        ({"layer": 2, "expert": -1}, "expert must be from 0 to 7"),
        ({"layer": 2, "expert": 0, "router": "mine"}, "no router 'mine' in layers.2.experts; it has base"),
    ):
        with pytest.raises(ValueError, match=message):
            log.tokens_of(**arguments)


def test_what_is_no_log(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no audit log"):
        AuditLog.open(tmp_path)
    (tmp_path / FACTS_FILE).write_text("{")
    with pytest.raises(ValueError, match="is no audit log"):
        AuditLog.open(tmp_path)
    (tmp_path / FACTS_FILE).write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="has version 99"):
        AuditLog.open(tmp_path)
