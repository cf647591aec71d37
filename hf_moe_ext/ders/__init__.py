"""DeRS: experts stored as one shared base plus a light delta each (arXiv 2503.01359).

Experts upcycled from one dense FFN stay close to it, so each matrix of an expert is the base's plus a cheap code of the
difference: low rank, sparse at positions that a seed regenerates, or quantised. The base and the deltas train together,
the deltas from zero, so that the layer starts as the dense FFN. ``experts.DersExperts`` is called as stock experts are;
``forward`` has its two forwards, which agree: *materialised* builds each used expert's matrices, as the paper does, and
*fused* runs the base once per token whatever top_k is and adds thin deltas per pair of token and expert.

======== ==================================== =====================================================================
symbol   code                                 equation (rows are tokens; stored as ``F.linear`` has it, [out, in])
======== ==================================== =====================================================================
d        ``hidden_dim``                       width of the model
d_h      ``intermediate_dim``                 inner width of an expert
N, k     ``num_experts``, ``top_k``           experts of a layer, experts of a token
W        ``gate_up_proj``, ``up_proj``,       the shared base: [2 d_h, d] gate rows first, or [d_h, d] un-gated;
         ``down_proj``                        [d, d_h]
D_i      ``delta_{gate,up,down}_*``           W_i = W + D_i, one stack of N deltas for each matrix
A_i, B_i ``delta_*_A``, ``delta_*_B``         D_i = B_i A_i; [N, r, in], [N, out, r]
r        ``rank``                             of a low-rank delta
V_i      ``delta_*_values``                   [N, n] values at the positions I_i of a sparse delta
I_i      ``delta_*_stream``, or               [N, 4] seed, layer, matrix, expert: regenerates the n positions; or
         ``delta_*_positions``                [N, n] int32 (``stored_positions``: masks that depend on the data)
p        ``drop_rate``                        n = round((1 - p) in out)
b        ``bits``                             ``delta_*_codes``, ``delta_*_scales`` of a quantised delta or of V_i
g_i      ``top_k_weights``                    y = sum_i g_i E_i(x)
b_i      ``gate_up_proj_bias``,               [N, 2 d_h] or [N, d_h], and [N, d]: a full copy per expert
         ``up_proj_bias``, ``down_proj_bias``
phi      ``act``                              h_i = phi(x W_g,i) * (x W_u,i), or phi(x W_u,i) un-gated
======== ==================================== =====================================================================

The paper has no public code. Where we depart from it, and why:

* *Fused shared base*: with g_i on the expert's output and nothing nonlinear behind ``down``,
  y = (sum_i g_i h_i) W_d + sum_i (g_i h_i) D_d,i + sum_i g_i b_d,i. Exact but for rounding; the paper materialises.
* Positions of sparse deltas are regenerated from a seed by our own integer hash, where the paper appears to store int64
  indices, four times the bytes of their values. ``hold_positions`` keeps them in memory as int32, for speed.
* Gate and up have a delta each, as the paper counts them, though their bases are one tensor on disk.
* A is drawn as LoRA draws it; the paper leaves its law open. Low-rank deltas have no alpha / r factor, sparse ones no
  1 / (1 - p), as in the paper.
* Rank, drop rate and bits may differ between gate, up and down; the paper has one for all.
* Gates need not sum to 1; the layer then starts as (sum of gates) times the dense FFN.
"""
