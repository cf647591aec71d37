"""DCCA: a Mixture-of-Experts layer that communicates in a narrow latent width (BigMac, arXiv 2502.16927).

The router reads a token in full width; one projection shared by all experts narrows it (descend), experts run on the
latent wherever they live, and one shared projection widens the weighted sum (ascend). Both all-to-alls of expert
parallelism move latents, so they move r = R / H of the bytes, while an expert keeps its number of parameters by being
wider inside. On top of the paper, `hf_moe_ext.dcca.dispatch` sends a token once per destination rank and sums that
rank's experts there, before the way back.

======== =========================== ==============================================================================
symbol   code                        equation
======== =========================== ==============================================================================
H        ``hidden_size``             width of the model
R        ``moe_latent_size``         width of the latent, r = R / H
W_g      ``gate.weight``             [E, H]; p = softmax(x W_g), the k largest are kept
W_d      ``descend.weight``          [R, H]; z = x W_d
U_i      ``experts.up_proj``         [E, F, R]; gated: ``experts.gate_up_proj`` [E, 2F, R]
D_i      ``experts.down_proj``       [E, R, F]; u = sum_i p_i act(z U_i) D_i
W_u      ``ascend.weight``           [H, R]; y = u W_u
E, k     ``num_experts``, ``top_k``  experts of a layer, experts of a token
F        ``intermediate_size``       inner width of an expert; un-gated F = H keeps the parameters of H -> R -> H
P        ``ep_size``                 ranks that share a layer's experts
T        ``num_tokens``              tokens, where not said otherwise on one rank
======== =========================== ==============================================================================

Departures from the paper, which has no public code, and why:

* Dropless: no token exceeds a capacity, so that several processes compute what one computes.
* ``latent_all_to_all`` combines on the experts' rank, in the latent width, what the paper combines on the token's rank:
  the combination and ascend are linear, so only rounding differs, and k rows per token become one per distinct rank.
* Optional, and off by default: gated experts, an RMSNorm of u before W_u, a full-width shared expert.
"""
