"""The routing runs of Clark et al. (CC-BY-4.0), read where they lie beside the repository; nothing of them is kept here."""

import csv
from pathlib import Path

import numpy as np
import pytest

from hf_moe_ext.scaling.runs import make_runs

PATH = Path(__file__).resolve().parents[3] / "shared" / "data" / "deepmind_routing_final.csv"
needs_data = pytest.mark.skipif(
    not PATH.is_file(), reason="shared/data/deepmind_routing_final.csv is not beside the repository"
)
ROUTERS = ("S-Base", "RL-R", "Hash")


def read_rows():
    with PATH.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def standard_runs(router):
    """One router's runs with k = 1 in every second block, and the dense ones, in the columns of the forms."""
    rows = [
        row
        for row in read_rows()
        if row["router_type"] in (router, "Dense") and float(row["k"]) == 1 and row["routing_frequency"] == "0.5"
    ]

    def column(name):
        return np.array([float(row[name]) for row in rows])

    experts = column("num_experts")
    return make_runs(
        {
            "total_parameters": column("total_parameter_count"),
            "active_parameters": column("dense_parameter_count"),
            "dense_parameters": column("dense_parameter_count"),
            "num_experts": experts,
            "sparsity": 1 - 1 / experts,
            "loss": column("loss_validation"),
            "is_dense": np.array([row["router_type"] == "Dense" for row in rows]),
        }
    )
