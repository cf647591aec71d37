"""The pilot: several ways to fine-tune one model, side by side on the user's own rows, and one recommendation.

Every arm (one candidate, one learning rate, one seed) is a process of its own that trains with the plain ``Trainer``. Rates
are chosen by successive halving on rows split off the train side; the best candidates then train with several seeds and are
compared on held-out rows that nothing was chosen by. The cheapest candidate that is not shown to be worse than the best is
recommended, or the answer is that no difference was shown.

| word       | meaning                                                                                                   |
|------------|-----------------------------------------------------------------------------------------------------------|
| candidate  | a method with its settings, as ``perft-r:num_experts=8`` (`candidates.py`)                                |
| arm        | one training: candidate, learning rate, seed, steps (`arm.py`)                                            |
| rung       | a round of successive halving (arXiv 1502.07943); each trains anew, with a whole schedule (`stages.py`)    |
| choice     | rows split off the train side, by which rates and finalists are chosen                                    |
| finalist   | a candidate that is trained with every seed and measured on the held-out rows                             |
"""

from hf_moe_ext.pilot.request import PilotRequest

__all__ = ["PilotRequest"]
