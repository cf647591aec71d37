"""What a training step holds beside parameters: per operation the bytes saved for backward, and those its backward works in.

Derived operation by operation from what autograd keeps in Transformers' blocks (SDPA or flash attention, experts with
``grouped_mm``), not fitted to measurements; `recipes/benchmarks/memory_model.py` compares them with real steps.

Symbols: d ``hidden_size``, T tokens of a micro-batch on one rank, K ``top_k``, d_e ``intermediate_size``, rho ``imbalance``
(rows of the busiest rank over the mean). Statistics and norms are float32, whatever the precision is.
"""

from dataclasses import dataclass

from hf_moe_ext.scaling.attention import Attention, GroupedAttention
from hf_moe_ext.scaling.feed_forward import DenseFfn, MoeFfn
from hf_moe_ext.scaling.layout import Layout
from hf_moe_ext.scaling.operations import Operation, Tokens, activation_operations
from hf_moe_ext.scaling.precision import Precision
from hf_moe_ext.scaling.shape import MoeShape

WIDE = 4  # bytes of a float32
INDEX = 8  # bytes of an id
# Bottlenecks of all experts of a layer up to which `ders.forward` masks them instead of sorting rows by expert.
MASKED_LIMIT = 128
# Families whose routers hand on float32 weights: rows are weighted and summed in float32 even where they are bfloat16.
FLOAT32_ROUTING = ("mixtral", "mixtral_ext", "deepseek_v2", "deepseek_v3", "glm4_moe")


@dataclass(frozen=True)
class BlockBytes:
    """The operations of a model's parts for given tokens, layout and precision.

    Attributes:
        shape: the model.
        tokens: of a micro-batch.
        layout: parallel degrees.
        precision: widths.
    """

    shape: MoeShape
    tokens: Tokens
    layout: Layout
    precision: Precision

    @property
    def num_tokens(self) -> float:
        """T."""
        return self.tokens.num_sequences * self.tokens.sequence_length / self.layout.context

    def num_rows(self, ffn: MoeFfn) -> float:
        """Rows of the busiest rank's experts: T K rho ETP / TP."""
        return self.num_tokens * ffn.top_k * self.tokens.imbalance * self.layout.row_share

    @property
    def stream(self) -> float:
        """Bytes of the residual stream of all tokens."""
        return self.num_tokens * self.shape.hidden_size * self.precision.stream

    def layer(self, index: int) -> list[Operation]:
        """All operations of one layer, in forward order."""
        layer = self.shape.layers[index]
        attention = self._attention(self.shape.attention)
        return attention + (self._moe(layer) if isinstance(layer, MoeFfn) else self._dense(layer))

    def embedding(self) -> list[Operation]:
        """Ids; the table's gradient is as large as the table, and is added to that of a tied un-embedding."""
        entries = self.shape.vocab_size * self.shape.hidden_size / self.layout.tensor
        ids = INDEX * self.num_tokens
        if self.shape.tied_embeddings and self.layout.pipeline == 1:
            return [Operation("embedding", ids, self.stream + entries * self.precision.gradient)]
        return [Operation("embedding", ids, self.stream, entries)]

    def head(self) -> list[Operation]:
        """Final norm, un-embedding, cross-entropy in float32: log-probabilities, their gradient and the logits' at once."""
        d, logits = self.shape.hidden_size, self.num_tokens * self.shape.vocab_size / self.layout.tensor
        working, entries = (
            logits * self.precision.matmul + self._rows(d),
            self.shape.vocab_size * d / self.layout.tensor,
        )
        return [
            self._norm("final norm", d, out=self.precision.stream),
            self._linear("un-embedding", d, working, entries),
            Operation("cross-entropy", logits * WIDE + self.num_tokens * INDEX, 2 * logits * WIDE),
        ]

    def _rows(self, width: float) -> float:
        return self.num_tokens * width * self.precision.matmul

    def _norm(self, name: str, width: float, out: int, scales: float | None = None) -> Operation:
        """RMS norm: float32 input, its factor, the normed rows for the scale's gradient, as wide as ``out``.

        Its backward multiplies float32 rows twice: three of them live at a time, beside the gradient at the residual sum.
        """
        saved = self.num_tokens * (WIDE * width + WIDE + out * width)
        return Operation(
            name, saved, self.stream + 3 * self.num_tokens * WIDE * width, width if scales is None else scales
        )

    def _linear(
        self, name: str, width: float, working: float, entries: float, inputs: int = 1, inner: bool = False
    ) -> Operation:
        """Product with a matrix; ``inputs`` copies of its input are kept (0: another operation keeps it).

        Autocast keeps a cast of the matrix until backward, and makes its gradient there before it is cast.
        """
        casts = self.precision.matmul * entries if self.precision.casts else 0
        return Operation(name, inputs * self._rows(width) + casts, working + casts, entries, inner=inner)

    def _attention(self, attention: Attention) -> list[Operation]:
        """Norm, projections, rotation, scores, output projection."""
        d, tp, matmul = self.shape.hidden_size, self.layout.tensor, self.precision.matmul
        queries, values = (width / tp for width in attention.score_widths)
        matrices = attention.matrix_parameters(d) / tp
        output = d * values
        # Each projection casts the rows for itself under autocast; else they share one tensor.
        copies = 3 if self.precision.casts else 1
        operations = [self._norm("attention norm", d, self.precision.stream, (self.shape.layer_norms - 1) * d)]
        vectors = attention.vector_parameters(d)
        if isinstance(attention, GroupedAttention):
            keys = read = attention.key_size / tp
            working = self.stream + 2 * self._rows(d) + self._rows(queries + keys + read)
            normed = attention.query_key_norm != "none"
            entries = matrices - output + (0 if normed else vectors)
            operations.append(self._linear("queries, keys, values", d, working, entries, copies))
            if normed:
                norm = self._norm("query and key norms", queries + keys, matmul, vectors)
                operations.append(norm)
        else:
            keys, read = queries, values
            rank = attention.key_value_rank + (attention.query_rank or 0)
            working = self.stream + 2 * self._rows(d) + 2 * self._rows(rank)
            operations.append(self._linear("down projections", d, working, d * rank, 2 if copies > 1 else 1))
            operations.append(self._norm("norms of the compressed", rank, matmul, vectors))
            working = self.stream + 2 * self._rows(queries + keys + read)
            operations.append(self._linear("up projections", rank, working, matrices - output - d * rank))
        rotated = self.stream + 3 * self.num_tokens * (queries + keys) * self.precision.stream
        operations.append(Operation("rotation", 0, rotated))
        operations.append(self._scores(attention, queries, keys, read, values))
        return [*operations, self._linear("output projection", 0, self.stream + self._rows(values), output, 0)]

    def _scores(self, attention: Attention, queries: float, keys: float, read: float, values: float) -> Operation:
        """Queries, keys, values, output and a statistic per row and head; eager: repeated keys and all weights."""
        heads = self.num_tokens * attention.num_heads / self.layout.tensor
        saved = self._rows(queries + keys + read + values)
        working = self.stream + self._rows(values + queries + keys + read)
        if not self.tokens.eager_attention:
            return Operation("attention", saved + WIDE * heads, working)
        weights = heads * self.tokens.sequence_length
        repeated = self._rows(queries - keys + values - read)
        kept = (WIDE + (self.precision.matmul if self.precision.matmul < WIDE else 0)) * weights
        return Operation("attention", saved + repeated + kept, working + repeated + 3 * WIDE * weights, inner=True)

    def _dense(self, ffn: DenseFfn, shared: bool = False) -> list[Operation]:
        """Up projections, activation, down projection; after a norm of its own unless it is a shared expert."""
        d, width = self.shape.hidden_size, ffn.intermediate_size / self.layout.tensor
        products = 2 if ffn.gated else 1
        copies = (products if self.precision.casts else 0 if shared else 1) or 0
        inner = self._rows(width)
        up = self.stream + products * inner + 2 * self._rows(d)
        operations = [] if shared else [self._norm("ffn norm", d, out=self.precision.stream)]
        return [
            *operations,
            self._linear("ffn up", d, up, products * d * width + ffn.vector_parameters(d), copies),
            *activation_operations("ffn", ffn.gated, inner, self.stream, split=False),
            self._linear("ffn down", width, 2 * self.stream + inner, d * width, inner=True),
        ]

    def _moe(self, ffn: MoeFfn) -> list[Operation]:
        """Norm, router, descend, experts, ascend, shared expert."""
        d = self.shape.hidden_size
        norm = self._norm("ffn norm", d, out=self.precision.stream)
        operations = [norm, self._router(ffn)]
        # The gradient at the residual sum, and beside it what came back through a shared expert.
        held = self.stream * (1 if ffn.shared is None else 2)
        if ffn.latent_size is None:
            operations += self._experts(ffn, d, held)
        else:
            rows, entries, copies = self._rows(ffn.latent_size), d * ffn.latent_size, int(self.precision.casts)
            operations.append(self._linear("descend", d, 2 * self.stream + rows, entries, copies))
            operations += self._experts(ffn, ffn.latent_size, held)
            if ffn.latent_norm:
                operations.append(self._norm("latent norm", ffn.latent_size, self.precision.matmul))
            operations.append(self._linear("ascend", ffn.latent_size, self.stream + rows, entries))
        if ffn.shared is None:
            return operations
        gate = Operation("shared gate", self._rows(d), 2 * self.stream + self._rows(d), d)
        return operations + self._dense(ffn.shared, shared=True) + [gate] * ffn.shared_gate

    def _router(self, ffn: MoeFfn) -> Operation:
        """The normed rows, which all that follows reads too; softmax in float32; ids and the chosen weights."""
        saved = self.num_tokens * (WIDE * ffn.num_experts + (INDEX + WIDE) * ffn.top_k)
        working = 2 * self.stream + 3 * self.num_tokens * WIDE * ffn.num_experts
        linear = self._linear("router", self.shape.hidden_size, working, ffn.router_parameters(self.shape.hidden_size))
        return Operation(linear.name, linear.saved + saved, linear.working, linear.gradients)

    def _experts(self, ffn: MoeFfn, width: int, held: float) -> list[Operation]:
        """Rows sorted by expert, two grouped products around the activation, the weighting, the way back to tokens.

        A rank has T K rho rows (ETP / TP of them under TP): with experts on other ranks it receives as many as it sends.
        """
        rows, size = self.num_rows(ffn), self.precision.expert
        wide, inner = rows * width * size, rows * ffn.intermediate_size * size / self.layout.expert_tensor
        if ffn.deltas is not None:
            return self._deltas(ffn, width, held)
        products = 2 if ffn.gated else 1
        local = self.layout.expert * self.layout.expert_tensor
        each = width * ffn.intermediate_size * ffn.num_experts / local
        first = ffn.routed_parameters(self.shape.hidden_size) / local - each
        weighted = 3 * wide
        if size < WIDE and self.shape.family in FLOAT32_ROUTING:
            # Rows and both products in float32, and one product cast back, all at a time.
            weighted = rows * width * (3 * WIDE + size)
        back = rows * INDEX
        return [
            Operation("gather", 2 * back, held + wide + self.num_tokens * width * size),
            Operation("expert up", wide, held + products * inner + wide, first, experts=True),
            *activation_operations("expert", ffn.gated, inner, held, split=True),
            Operation("expert down", inner, held + wide + inner, each, experts=True, inner=True),
            Operation("weighting", wide + rows * WIDE, held + weighted),
            Operation("combine", back, held + 2 * wide),
        ]

    def _deltas(self, ffn: MoeFfn, width: int, held: float) -> list[Operation]:
        """A shared base and light deltas, fused: the base once per token, gate, activation and weighting per choice.

        Few narrow low-rank deltas run masked, a choice of all tokens at a time; others on rows sorted by expert, and then
        low-rank ones are padded by an expert of zeros, a copy that stays. Others are decoded one expert at a time.
        """
        assert ffn.deltas is not None
        # They take the type of their input under autocast, and weight and sum in float32.
        size, rows, products = self.precision.matmul, self.num_rows(ffn), 2 if ffn.gated else 1
        inner, once = rows * ffn.intermediate_size * size, self.num_tokens * ffn.intermediate_size * size
        base = width * ffn.intermediate_size
        entries = (ffn.routed_parameters(width) - base * (products + 1)) / self.layout.expert
        masked = ffn.deltas.form == "low_rank" and ffn.num_experts * max(ffn.deltas.rank) <= MASKED_LIMIT
        if masked:
            thin = (rows + self.num_tokens) * size * ffn.num_experts * sum(ffn.deltas.rank)
            gathered, turn, copies = 0.0, once, 0.0
        else:
            thin = rows * size * sum(ffn.deltas.rank)
            gathered, turn = rows * width * size, inner
            padded = (ffn.num_experts + 1) / ffn.num_experts
            copies = entries * size * padded if ffn.deltas.form == "low_rank" else 0.0
        bases, wide = products * once, WIDE / size
        cast = base * size if self.precision.casts else 0.0
        # In forward: what the base gave, one more copy of the inner rows, and what the deltas gave.
        forward = bases + wide * (turn + gathered)
        return [
            Operation("gather", rows * INDEX, held + gathered + self.num_tokens * width * size),
            Operation(
                "base up",
                products * cast,
                held + products * cast + bases + 2 * self.num_tokens * width * size,
                products * base,
            ),
            Operation("deltas up", gathered + thin + copies, held + 2 * products * turn, entries, experts=True),
            *activation_operations("expert", ffn.gated, inner, held + bases - 3 * (inner - turn), split=False),
            Operation("weighting", inner * wide, held + bases + 3 * turn * wide, inner=True),
            Operation("deltas down", inner, held + 2 * turn + gathered, experts=True, inner=True),
            Operation("base down", once + cast, max(held + once + cast, forward), base),
        ]
