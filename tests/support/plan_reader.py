"""Makes every number of an explained plan again from its JSON alone; knows the published formulas and none of our code.

What is taken as given: inputs (configuration, hardware, layout, efficiencies, prices) and, for memory, the bytes that each operation
keeps and works in, which are listed in the JSON.
"""

from math import ceil, comb, exp, floor, inf, log, log2
from typing import Any

from scipy.optimize import brentq, minimize_scalar

Json = dict[str, Any]


class Reader:
    """One model of the JSON."""

    def __init__(self, told: Json, model: Json) -> None:
        self.told, self.model, self.config = told, model, model["config"]
        self.request, self.hardware, self.eff = (
            told["request"],
            told["request"]["hardware"],
            told["request"]["efficiency"],
        )
        c = self.config
        self.d, self.n, self.v = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
        self.ctx = c["max_position_embeddings"]
        head = self.d // c["num_attention_heads"]
        self.dq, self.dkv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
        self.dense = c["moe_block"] == "dense"
        self.E = 0 if self.dense else c["num_experts"]
        self.K = 0 if self.dense else c["num_experts_per_tok"]
        self.ffn = 3 * self.d * c["intermediate_size"]
        self.layout, self.step = model["layout"], model["step"]
        self.tokens = self.step["tokens"]["num_sequences"] * self.step["tokens"]["sequence_length"]
        self.m, self.rho = self.step["num_micro_batches"], self.step["tokens"]["imbalance"]

    # --- Counting ---

    def parameters(self) -> Json:
        d, n = self.d, self.n
        found = {
            "input_embedding": self.v * d,
            "output_embedding": self.v * d,
            "attention": n * (2 * d * (self.dq + self.dkv) + self.dq + self.dkv),
            "dense": n * self.ffn * self.dense,
            "router": n * d * self.E,
            "routed": n * self.E * self.ffn,
            "shared": 0,
            "projections": 0,
            "norms": (2 * n + 1) * d,
        }
        total = sum(found.values())
        active = total - found["routed"] + n * self.K * self.ffn
        return found | {
            "active_routed": n * self.K * self.ffn,
            "total": total,
            "active": active,
            "active_without_input_embedding": active - self.v * d,
        }

    def flops(self, per_weight: int, per_router: int) -> Json:
        return {
            "attention_projections": per_weight * self.n * 2 * self.d * (self.dq + self.dkv),
            "attention_scores": per_weight * self.n * self.ctx * self.dq,
            "attention_values": per_weight * self.n * self.ctx * self.dq,
            "router": per_router * self.n * self.d * self.E,
            "experts": per_weight * self.n * self.K * self.ffn,
            "shared": 0,
            "dense": per_weight * self.n * self.ffn * self.dense,
            "projections": 0,
            "unembedding": per_weight * self.v * self.d,
        }

    @property
    def training_flops(self) -> float:
        return sum(self.flops(6, 14).values())

    def on_rank(self, layout: Json) -> Json:
        p = self.parameters()
        whole = p["input_embedding"] + p["output_embedding"]
        cut = (whole + p["dense"] + self.n * 2 * self.d * (self.dq + self.dkv)) / layout["tensor"]
        vectors = self.n * (self.dq + self.dkv) + p["norms"] + p["router"]
        return {"dense": cut + vectors, "experts": p["routed"] / layout["expert"]}

    # --- Memory ---

    def shares(self) -> tuple[list[int], list[int]]:
        zero, dp = self.layout["zero"], self.layout["data"]
        edp = dp // self.layout["expert"]
        return [dp if zero > 2 else 1, dp if zero > 1 else 1, dp if zero > 0 else 1], [
            edp if zero > 2 else 1, edp if zero > 1 else 1, edp if zero > 0 else 1,
        ]  # fmt: skip

    def memory(self) -> Json:
        given, local = self.model["intermediate"], self.on_rank(self.layout)
        width, (dense, experts) = given["precision"], self.shares()
        part = [local["dense"] / dense[i] + local["experts"] / experts[i] for i in range(3)]
        resident = {"weights": part[0] * width["weight"], "optimizer": part[2] * width["optimizer"]}
        exchange, kept = self.exchange(local, width), given["residual_stream_bytes"]
        full = self.step["recompute"] == "full"
        ops = given["operations"]
        groups = [(ops["embedding"], False), *[(ops["layer"], True)] * self.n, (ops["head"], False)]
        waits = [kept if layer and full else sum(o["saved"] for o in group) for group, layer in groups]
        gradients = part[1] * width["gradient"] if self.m > 1 else 0.0
        best = resident | {"gradients": part[1] * width["gradient"], "exchange": exchange}
        moment, rest = "optimizer step", sum(waits)
        for (group, layer), own in reversed(list(zip(groups, waits, strict=True))):
            rest -= own
            held = sum(o["saved"] for o in group) + (kept if layer and full else 0)
            for o in reversed(group):
                fresh, head = o["gradients"] * width["gradient"], o["name"] in ("cross-entropy", "un-embedding")
                now = resident | {
                    "gradients": gradients + fresh,
                    "activations": rest + held - (o["saved"] if head else 0),
                    "working": 0 if head else o["working"],
                    "logits": o["saved"] + o["working"] if head else 0,
                    "exchange": exchange,
                }
                if sum(now.values()) > sum(best.values()):
                    best, moment = now, o["name"]
                held -= o["saved"]
                gradients += 0 if self.m > 1 else fresh / (experts if o["experts"] else dense)[1]
        return best | {"total": sum(best.values()), "moment": moment}

    def exchange(self, local: Json, width: Json) -> float:
        layout, dp = self.layout, self.layout["data"]
        edp = dp // layout["expert"]
        total = 2 * self.tokens * self.K * self.rho * self.d * width["expert"] if layout["expert"] > 1 else 0
        if layout["zero"] == 3 and dp > 1:
            ends = 2 * self.v * self.d + self.d
            layer = (local["dense"] - ends) / self.n + local["experts"] / self.n * (edp > 1)
            total += layer * width["gradient"] + (2 * layer + ends) * width["weight"]
        return total

    # --- Time ---

    def all_to_all(self, tokens: float, layout: Json, forward: int, backward: int, width: float) -> float:
        ep = layout["expert"]
        if ep == 1:
            return 0.0
        pairs = tokens * self.K * (ep - 1) / ep / layout["tensor"]
        if layout["dispatch"] == "all_to_all":
            rows, metadata = pairs, self.E // ep * (ep - 1) * 8 * forward
            messages = 3 * forward + 2 * backward
        else:
            distinct = ep * (1 - comb(self.E - self.E // ep, self.K) / comb(self.E, self.K))
            rows = tokens * distinct * (ep - 1) / ep / layout["tensor"]
            metadata = (16 * (ep - 1) + 8 * pairs) * forward + 4 * pairs * backward
            messages = 4 * forward + 3 * backward
        size = (2 * rows * self.d * width * (forward + backward) + metadata) * self.rho / self.eff["link"]
        near = min(ep, self.hardware["devices_per_node"])
        far = (ep - near) / (ep - 1)
        speeds = self.hardware["inter_node_bytes_per_s"], self.hardware["intra_node_bytes_per_s"]
        outside = size * far / speeds[0]
        inside = size * (1 - far) / speeds[1] if near > 1 else 0.0
        return self.n * (max(outside, inside) + messages * self.eff["collective_s"])

    def link(self, ranks: int, stride: int) -> float:
        near = ranks * stride <= self.hardware["devices_per_node"]
        return self.hardware["intra_node_bytes_per_s" if near else "inter_node_bytes_per_s"] * self.eff["link"]

    def time(self) -> Json:
        eff, hardware, layout = self.eff, self.hardware, self.layout
        flops, local = self.flops(2, 2), self.on_rank(layout)
        width, zero, dp = self.model["intermediate"]["precision"], layout["zero"], layout["data"]
        full = self.step["recompute"] == "full"
        passes = 4 if full else 3
        grouped = (hardware["grouped_flops_per_s"] or hardware["flops_per_s"]) * eff["grouped"]
        memory = hardware["memory_bytes_per_s"] * eff["memory"]
        products = (
            passes * self.tokens * (sum(flops.values()) - flops["experts"]) / (hardware["flops_per_s"] * eff["gemm"])
        )
        compute, read = self.tokens * self.rho * flops["experts"] / grouped, local["experts"] * width["expert"] / memory
        moved = self.all_to_all(self.tokens, layout, 2 if full else 1, 1, width["expert"])
        gradients, weights = {0: (2, 0), 1: (1, 1), 3: (self.m, 2 * self.m)}[zero]
        each, data, updated = gradients * width["gradient"] + weights * width["weight"], 0.0, 0.0
        for key, ranks in (("dense", dp), ("experts", dp // layout["expert"])):
            if ranks > 1 and local[key]:
                data += (ranks - 1) / ranks * local[key] * each / self.link(ranks, dp // ranks)
            updated += local[key] / (ranks if zero else 1)
        found = {
            "products": products * self.m,
            "experts": passes * max(compute, read) * self.m,
            "all_to_all": (1 - eff["overlap"]) * moved * self.m,
            "tensor": 0,
            "pipeline": 0,
            "data": (1 - eff["overlap_data"]) * data,
            "optimizer": updated * (2 * width["weight"] + width["gradient"] + 2 * width["optimizer"]) / memory,
        }
        return found | {"total": sum(found.values()), "experts_read": read > compute}

    # --- The whole run, and serving ---

    def derived(self) -> Json:
        request, prices = self.request, self.request["prices"]
        hours = request["gpu_hours"]
        if request["money"] is not None:
            fixed = (
                prices["effort_hours"] * prices["effort_hour"] + request["moved_bytes"] / 1e9 * prices["per_gb_moved"]
            )
            hours = (request["money"] - fixed) / prices["gpu_hour"]
        seconds = hours / request["num_devices"] * 3600 * request["utilisation"]
        flops = seconds * request["num_devices"] * self.hardware["flops_per_s"] * self.eff["gemm"]
        least = request["num_devices"] * request["context_length"]
        batch = request["batch_tokens"] or least * 2 ** max(0, round(log2(0.0694 * (flops / 3) ** 0.3644 / least)))
        usable = request["memory_bytes"] or self.hardware["memory_bytes"] * (1 - request["memory_reserve"])
        return {
            "usable_bytes": usable, "rented_hours": hours, "step_seconds": seconds, "expected_flops": flops,
            "step_tokens": batch,
        }  # fmt: skip

    def run(self, num_steps: int | None = None) -> Json:
        request, derived, seconds = self.request, self.derived(), self.time()["total"]
        affordable = steps = floor(derived["step_seconds"] / seconds) if num_steps is None else num_steps
        if num_steps is None and request["token_supply"] is not None:
            steps = min(steps, floor(request["token_supply"] * request["max_epochs"] / derived["step_tokens"]))
        hours = seconds * steps / 3600 / request["utilisation"]
        found: Json = {
            "num_steps": steps,
            "num_tokens": steps * derived["step_tokens"],
            "affordable_tokens": affordable * derived["step_tokens"],
            "hours": hours,
            "gpu_hours": hours * request["num_devices"],
            "limited_by": "data" if steps < affordable else "budget",
        }
        prices = request["prices"]
        cost = {
            "devices": found["gpu_hours"] * prices["gpu_hour"],
            "moved": request["moved_bytes"] / 1e9 * prices["per_gb_moved"],
            "effort": prices["effort_hours"] * prices["effort_hour"],
        }
        return found | {"cost": cost | {"gpu_hours": found["gpu_hours"]}, "total_cost": sum(cost.values())}

    def serving(self, chunk_tokens: int = 8192) -> Json:
        asked, layout, eff = self.request["inference"], self.model["serving"]["layout"], self.eff
        tp, ep, b, length = layout["tensor"], layout["expert"], asked["num_sequences"], asked["context_length"]
        local, hardware = self.on_rank(layout), self.hardware
        cache = 2 * self.dkv * self.n * length * b * 2 / tp
        tokens = min(chunk_tokens, b * length)
        routed = tokens * self.K * self.rho / tp
        inner = self.config["intermediate_size"]
        rows = max(3 * tokens * self.dq / tp, routed * (self.d + 3 * inner))
        memory = {
            "weights": 2 * (local["dense"] + local["experts"]),
            "working": 2 * (2 * tokens * self.d + rows),
            "logits": b * self.v * 4 / tp,
            "exchange": 4 * routed * self.d * (ep > 1),
            "kv_cache": cache,
        }
        # Prompts in whole sequences of the context: scores as at its full length.
        flops = self.flops(2, 2)
        scale = length / self.ctx
        flops |= {key: flops[key] * scale for key in ("attention_scores", "attention_values")}
        cut = sum(flops.values()) - flops["experts"] - flops["router"]
        outside = (cut / tp + flops["router"]) / (hardware["flops_per_s"] * eff["gemm"])
        grouped = (hardware["grouped_flops_per_s"] or hardware["flops_per_s"]) * eff["grouped"]
        inside = self.rho * flops["experts"] / tp / grouped

        def wire(t: int) -> float:
            reduced = 0.0
            if tp > 1:
                each = 2 * (tp - 1) / tp * t * self.d * 2 / self.link(tp, 1) + eff["collective_s"]
                reduced = 2 * self.n * each
            return (1 - eff["overlap"]) * self.all_to_all(t, layout, 1, 0, 2) + reduced

        prefill = chunk_tokens / (chunk_tokens * (outside + inside) + wire(chunk_tokens))
        touched = 1 - (1 - self.K / self.E) ** (b * ep / tp) if self.E else 0.0
        held = (local["dense"] - self.v * self.d / tp + local["experts"] * touched) * 2 + cache
        seconds = max(b * (outside + inside), held / (hardware["memory_bytes_per_s"] * eff["memory"])) + wire(b)
        rates = {
            "prefill_tokens_per_s": layout["data"] * prefill,
            "decode_tokens_per_s": layout["data"] * b / seconds,
            "decode_s": seconds,
        }
        demand = asked["demand"]
        busy = 1 / rates["decode_tokens_per_s"] + demand["prefill_tokens"] / rates["prefill_tokens_per_s"]
        hours = layout["world_size"] * 1e6 * busy / demand["utilisation"] / 3600
        moved = demand["moved_bytes"] * 1e6 / 1e9 * self.request["prices"]["per_gb_moved"]
        return {
            "memory": memory | {"total": sum(memory.values())},
            "rates": rates,
            "gpu_hours_per_million": hours,
            "cost_per_million": hours * self.request["prices"]["gpu_hour"] + moved,
        }

    # --- Laws ---

    def equivalent_budgets(self, tokens: float) -> dict[str, float]:
        p, total = self.parameters(), float(tokens)
        ratio = self.E / self.K if self.E else 1.0
        active = p["active"] - p["router"] - p["norms"]
        flops = self.flops(2, 2)
        own = (sum(flops.values()) - flops["unembedding"]) * total
        share, fine = (1 / ratio, 2 * self.d / self.config["intermediate_size"]) if self.E else (1.0, 2.0)
        exponent = 1.23 - 7.61e-2 * log(own) / log(10) + 1.67e-2 * log2(fine) ** 2 - 1.17e-1 * log2(fine)
        return {
            "abnar": abnar_dense_budget(abnar_loss(p["total"], total, 1 - 1 / ratio)),
            "joint": joint_dense_budget(joint_loss(active, total, ratio)),
            "leverage": saturate(share, 1.63e-2, 5.28e16) ** exponent * own,
        }

    def routed_multiplier(self) -> float:
        """S-BASE router, at equal tokens."""
        p, ratio = self.parameters(), self.E / self.K if self.E else 1.0
        size = log(p["active"] - p["input_embedding"] - p["output_embedding"] - p["router"]) / log(10)
        at, dense = (log(saturate(e - 1, 1.847, 314.478)) / log(10) for e in (ratio, 1.0))
        return 10 ** ((-0.082 * size - 0.108 * (at - dense) + 0.009 * size * at) / (-0.082 + 0.009 * dense) - size)

    def law_counts(self, tokens: float) -> dict[str, Json]:
        """What each law is asked about."""
        p, total = self.parameters(), float(tokens)
        ratio = self.E / self.K if self.E else 1.0
        active, train, forward = p["active"] - p["router"] - p["norms"], self.flops(6, 14), self.flops(2, 2)
        embeddings = p["input_embedding"] + p["output_embedding"]
        scores = train["attention_scores"] + train["attention_values"] + train["unembedding"]
        inner = self.config["intermediate_size"]
        return {
            "abnar": {
                "total_parameters": p["total"], "num_tokens": total, "sparsity": 1 - 1 / ratio,
                "budget_flops": self.training_flops * total,
            },
            "joint": {
                "active_parameters": active, "num_tokens": total, "num_experts": ratio,
                "budget_flops": 6 * active * total, "tokens_per_parameter": total / active,
            },
            "fine_grained": {
                "total_parameters": p["total"] - embeddings, "num_tokens": total, "expansion": ratio,
                "granularity": 8 / 3 * self.d / inner if self.E else 1.0,
                "budget_flops": (self.training_flops - scores) * total,
            },
            "leverage": {
                "activation_ratio": 1 / ratio, "granularity": 2 * self.d / inner if self.E else 2.0,
                "budget_flops": (sum(forward.values()) - forward["unembedding"]) * total,
            },
            "routed": {"dense_parameters": p["active"] - embeddings - p["router"], "num_experts": ratio},
            "kimi": {"expert_ratio": ratio},
        }  # fmt: skip

    def law_details(self, tokens: float) -> dict[str, Json]:
        """The numbers behind the multipliers."""
        asked, dense = self.law_counts(tokens), self.equivalent_budgets(tokens)
        a, j, r = asked["abnar"], asked["joint"], asked["routed"]
        abnar = abnar_loss(a["total_parameters"], a["num_tokens"], a["sparsity"])
        joint = joint_loss(j["active_parameters"], j["num_tokens"], j["num_experts"])
        size, e = log(r["dense_parameters"]) / log(10), log(saturate(r["num_experts"] - 1, 1.847, 314.478)) / log(10)
        return {
            "abnar": {"loss": abnar, "dense_budget_flops": dense["abnar"]},
            "joint": {"loss": joint, "dense_budget_flops": dense["joint"]},
            "leverage": asked["leverage"],
            "routed": {
                "loss": 10 ** (-0.082 * size - 0.108 * e + 0.009 * size * e + 1.104),
                "effective_parameters": self.routed_multiplier() * r["dense_parameters"],
            },
        }

    def laws_in_range(self, tokens: float) -> int:
        """Of the three that rank, by the ranges and the artefact of the specification; standard and dense blocks."""
        asked = self.law_counts(tokens)
        a, j, lever = asked["abnar"], asked["joint"], asked["leverage"]
        lowest = 1 - (17.26 * 0.1603 / (0.4598 * 0.1666 * a["total_parameters"] ** 0.1595)) ** (1 / (0.1603 + 0.1666))
        multiplier = self.equivalent_budgets(tokens)["leverage"] / lever["budget_flops"]
        return sum(
            (
                3e19 <= a["budget_flops"] <= 1e21 and 1e8 <= a["total_parameters"] <= 1e10
                and max(0, lowest) <= a["sparsity"] <= 0.95,
                j["active_parameters"] <= 2.7e9 and j["num_experts"] <= 32 and 1 <= j["tokens_per_parameter"] <= 400,
                3e18 <= lever["budget_flops"] <= 3e20 and multiplier <= 6,
            )
        )  # fmt: skip

    def row(self) -> Json:
        """Of the table of plans."""
        p, request, time, run = self.parameters(), self.request, self.time(), self.run()
        serving = self.serving() if request["inference"] else {"gpu_hours_per_million": None, "cost_per_million": None}
        return {
            "sparsity": 1 - self.K / self.E if self.E else 0.0, "total_parameters": p["total"],
            "active_parameters": p["active"], "num_tokens": run["num_tokens"],
            "training_flops": self.training_flops * run["num_tokens"], "memory_bytes": self.memory()["total"],
            "step_s": time["total"], "all_to_all_share": time["all_to_all"] / time["total"],
            "gpu_hours": run["gpu_hours"], "hours": run["hours"], "cost": run["total_cost"],
            "serving_gpu_hours_per_million": serving["gpu_hours_per_million"],
            "serving_cost_per_million": serving["cost_per_million"], "expert_ranks": self.layout["expert"],
            "zero": self.layout["zero"], "micro_batches": self.m,
            "micro_batch_sequences": self.step["tokens"]["num_sequences"],
            "laws_in_range": self.laws_in_range(run["num_tokens"]),
        }  # fmt: skip


def saturate(x: float, start: float, limit: float) -> float:
    return 1 / (1 / (x + 1 / (1 / start - 1 / limit)) + 1 / limit)


def abnar_loss(n: float, tokens: float, s: float) -> float:
    interaction = 17.26 / ((1 - s) ** 0.1603 * n**0.1595)
    return 16612.50 / n**0.5962 + 5455.67 / tokens**0.3954 + 0.4598 * (1 - s) ** 0.1666 + interaction + 0.94


def abnar_dense_budget(target: float) -> float:
    """C at which the best dense model (depth d / 64, FFN 4 d, V 50,432, context 2048) has this loss."""

    def best(log_budget: float) -> float:
        def at(log_width: float) -> float:
            d = exp(log_width)
            n = d / 64
            tokens = exp(log_budget) / (6 * (16 * n * d * d + 50432 * d + 2 * n * 2048 * d))
            return abnar_loss(16 * n * d * d + 2 * 50432 * d, tokens, 0.0)

        return float(minimize_scalar(at, bounds=(log(16), log(1e6)), method="bounded", options={"xatol": 1e-10}).fun)

    return exp(brentq(lambda x: best(x) - target, log(1e14), log(1e32), xtol=1e-12))


def joint_form(e: float) -> tuple[float, float, float, float]:
    effective = saturate(e - 1, 2.0732, 290.4521)
    m, k = 35.91 * effective**-0.2285, 35.98 * effective**0.5529
    return m, -0.1889 + 0.0098 * log(effective), k, -0.1775 - 0.0259 * log(effective)


def joint_loss(active: float, tokens: float, e: float) -> float:
    m, mu, k, nu = joint_form(e)
    return m * active**mu + k * tokens**nu + 1.3637


def joint_dense_budget(target: float) -> float:
    """C = 6 N D at which the best dense model has this loss."""
    m, mu, k, nu = joint_form(1)

    def best(log_budget: float) -> float:
        nd = exp(log_budget) / 6
        active = (-mu * m / (-nu * k)) ** (1 / (-mu - nu)) * nd ** (nu / (mu + nu))
        return joint_loss(active, nd / active, 1)

    return exp(brentq(lambda x: best(x) - target, log(1e12), log(1e36), xtol=1e-12))


def tokens_for_loss(law: str, reader: Reader, target: float) -> float:
    """At which a dense model has this loss."""
    p = reader.parameters()
    active = p["active"] - p["norms"]

    def short(log_tokens: float) -> float:
        tokens = exp(log_tokens)
        loss = abnar_loss(p["total"], tokens, 0.0) if law == "abnar" else joint_loss(active, tokens, 1)
        return loss - target

    return exp(brentq(short, log(1e3), log(1e22), xtol=1e-13))


def equal_loss_steps(law: str, reader: Reader, target: float) -> int:
    """Whole optimizer steps for it."""
    return ceil(tokens_for_loss(law, reader, target) / reader.derived()["step_tokens"])


def break_even(one_off: float, serving: float, other_one_off: float, other_serving: float) -> Json:
    """Null for infinities, as the JSON has it."""
    extra, saving = one_off - other_one_off, other_serving - serving
    if extra <= 0:
        tokens, until = 0.0, inf if saving >= 0 else 1e6 * extra / saving
        tokens = inf if until <= 0 else 0.0
    else:
        tokens, until = (1e6 * extra / saving, inf) if saving > 0 else (inf, 0.0)
    finite = {"tokens": None if tokens == inf else tokens, "until": None if until == inf else until}
    return {"one_off": extra, "saving_per_million": saving, **finite}
