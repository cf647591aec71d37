"""Routing audit: which expert sees what, of any MoE model that Transformers serves, of ours and of routed adapters.

``watch_routing`` is the one seam to a model: hooks that raise a ``RoutingEvent`` per router and forward pass.
``RoutingRecorder`` sums events on the model's device, and a ``RoutingReading`` is what it has seen, in numbers.

| symbol | name | meaning |
|---|---|---|
| c[i] | ``counts`` | tokens that chose expert i, over all choices, padding left out |
| f[i] = c[i] / sum c | ``load`` | share of the choices |
| sd(f) / mean(f) | ``variation`` | coefficient of variation of the load, the "importance" measure of arXiv 1701.06538 eq. 6 taken of counts |
| -sum f log f / log E | ``load_entropy`` | 1 is an even load |
| -sum p log p / log E | ``entropy`` | of one token's distribution p over all experts, then the mean over tokens |
| p(1) - p(2) | ``margin`` | largest minus second largest probability |
| C[i, j] | ``coactivation`` | tokens that chose both i and j |

``p`` is the router's softmax over all experts, or its scores divided by their sum where it scores by a sigmoid (or square
root of softplus): also for families that take the softmax of the chosen logits only.
"""
