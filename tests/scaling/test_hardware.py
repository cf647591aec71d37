"""Rows of hardware: the file that ships, a user's own, and what is wrong with either."""

from dataclasses import replace

import pytest

from hf_moe_ext.scaling.hardware import BUILT_IN, Hardware, find_hardware, list_hardware, write_hardware

ROW = Hardware(
    "mine", 1e12, 16e9, 1e11, intra_node_bytes_per_s=1e10, devices_per_node=2, source='a "quoted" \\ source\n'
)


def test_shipped_rows_say_where_they_are_from():
    rows = list_hardware()
    assert {"H100-SXM", "H200-SXM", "A100-80GB-SXM", "RTX-4090"} <= rows.keys()
    assert all(row.source for row in rows.values())
    assert (rows["H100-SXM"].flops_per_s, rows["H100-SXM"].memory_bytes_per_s) == (989e12, 3.35e12)
    assert rows["H200-SXM"].memory_bytes_per_s == 4.8e12


def test_names_in_any_case():
    assert find_hardware("h100-sxm") == find_hardware("H100-SXM")


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(ValueError, match=r"hardware 'H1000' is not known; known: .*H100-SXM.*measure-hardware"):
        find_hardware("H1000")


def test_a_users_file_adds_and_replaces(tmp_path):
    path = tmp_path / "own.toml"
    write_hardware(ROW, path)
    assert find_hardware("mine", path) == ROW
    faster = replace(ROW, flops_per_s=2e12)
    write_hardware(replace(ROW, name="H100-SXM"), path)
    write_hardware(faster, path)
    rows = list_hardware(path)
    assert rows["mine"] == faster
    assert rows["H100-SXM"].flops_per_s == 1e12
    assert path.stat().st_mode & 0o444 == 0o444  # for colleagues too
    assert rows["H200-SXM"] == list_hardware()["H200-SXM"]
    assert [found.name for found in tmp_path.iterdir()] == ["own.toml"]


def test_a_link_that_nobody_measured():
    assert ROW.link(between_nodes=False) == 1e10
    with pytest.raises(ValueError, match="'mine' has no inter_node_bytes_per_s, which this layout needs"):
        ROW.link(between_nodes=True)


def test_grouped_products_are_as_any_other_where_not_measured():
    assert ROW.grouped_peak == 1e12
    assert replace(ROW, grouped_flops_per_s=5e11).grouped_peak == 5e11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[x", "is not TOML"),
        ("x = 3", "x must be a table"),
        ("[x]\nflops_per_s = 1e12", r"row \[x\] has keys missing: memory_bytes, memory_bytes_per_s; known: "),
        ("[x]\nflops_per_s=1e12\nmemory_bytes=1\nmemory_bytes_per_s=1\nflop=2", "keys unknown: flop"),
        ("[x]\nflops_per_s=-1\nmemory_bytes=1\nmemory_bytes_per_s=1", "flops_per_s must be above 0, got -1"),
        ("[x]\nflops_per_s=nan\nmemory_bytes=1\nmemory_bytes_per_s=1", "flops_per_s must be above 0, got nan"),
        (
            "[x]\nflops_per_s=1\nmemory_bytes=1\nmemory_bytes_per_s=1\ndevices_per_node=1.5",
            "devices_per_node must be whole",
        ),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        list_hardware(path)
    # Nor is a file that is none written over.
    with pytest.raises(ValueError, match=message):
        write_hardware(ROW, path)
    assert path.read_text() == text


def test_bad_types_and_missing_files(tmp_path):
    path = tmp_path / "text.toml"
    path.write_text('[x]\nflops_per_s="fast"\nmemory_bytes=1\nmemory_bytes_per_s=1')
    with pytest.raises(TypeError, match="flops_per_s must be a number, got 'fast'"):
        list_hardware(path)
    with pytest.raises(OSError, match="none"):
        list_hardware(tmp_path / "none.toml")


def test_it_ships():
    assert BUILT_IN.is_file()
