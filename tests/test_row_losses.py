"""Losses per row, answers, choices."""

import numpy as np
import pytest
import torch

from hf_moe_ext.row_losses import RowLosses, choose_answers, generate_answers, sum_answer_nats
from support import words, zoo


def test_row_sums_equal_a_loop() -> None:
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :3] = -100
    labels[2, :] = -100
    sums = sum_answer_nats((torch.tensor(0.5), logits), labels)
    for row in range(3):
        expected, count = 0.0, 0
        for position in range(1, 5):
            if labels[row, position] != -100:
                expected -= torch.log_softmax(logits[row, position - 1], -1)[labels[row, position]].item()
                count += 1
        assert sums[row].tolist() == pytest.approx([expected, count], rel=1e-5)


def test_mean_is_per_token() -> None:
    assert RowLosses(np.array([4.0, 2.0]), np.array([1.0, 5.0])).mean == pytest.approx(1.0)


def test_most_likely_choice_wins_and_ties_go_to_the_first() -> None:
    losses = RowLosses(np.array([3.0, 1.0, 2.0, 2.0, 2.0]), np.ones(5))
    assert choose_answers(losses, [0, 0, 1, 1, 1]) == {0: 1, 1: 0}


def test_batched_generation_equals_one_by_one() -> None:
    model, tokenizer = zoo.build("olmoe"), words.build_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("w3 w4 w5", "w6", "w7 w8 w9 w10 w11")]
    together = generate_answers(model, tokenizer, prompts, max_new_tokens=5, batch_size=2)
    assert together == [generate_answers(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
