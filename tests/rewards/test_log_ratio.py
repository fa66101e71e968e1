"""The log-ratio of a frozen generator against its own logits, code by code."""

from dataclasses import replace

import torch

from grpo.models import GPT, ClassCondition, GPTConfig
from grpo.rewards import DecodedBatch
from grpo.rewards.log_ratio import LogRatio


def test_it_is_the_ratio_of_the_products_of_all_probabilities(context):
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=12, block_size=9, num_classes=4)).eval()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    asked = []

    def generator(checkpoint):
        asked.append(checkpoint)
        return model

    reward = LogRatio(LogRatio.Settings(kind="log_ratio", checkpoint="w.pt"), replace(context, generator=generator))
    assert asked == ["w.pt"]
    tokens, classes = torch.randint(12, (5, 9)), torch.tensor([0, 1, 2, 3, 1])
    batch = DecodedBatch(torch.zeros(5, 3, 4, 4), tokens, ClassCondition(classes), torch.zeros(5, 3, 4, 4), None)
    with torch.no_grad():
        found = reward(batch)
        expected = torch.zeros(5)
        for row in range(5):
            for sign, class_id in ((1, classes[row]), (-1, torch.tensor(4))):  # class 4 asks for nothing
                probabilities = model(tokens[row : row + 1, :-1], class_id[None]).softmax(dim=-1)
                expected[row] += sign * probabilities[0, torch.arange(9), tokens[row]].log().sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.01
