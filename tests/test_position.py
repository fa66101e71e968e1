"""How far a process is within a long piece of work."""

import torch

from grpo.models import GPT, GPTConfig
from grpo.position import counted, position
from grpo.rollout import generate
from grpo.rollout.cached_sampler import CachedSampler


def test_loops_inside_of_loops_add_up_and_end():
    seen = []
    for _ in counted(["a", "b"], "part"):
        for _ in counted(range(1), "batch"):
            for code in counted(range(3), "code"):
                seen.append(position())
                if code == 1:
                    break
        assert position().startswith("part")
        assert "code" not in position()
    assert seen == [f"part {part} of 2, code {code} of 3" for part in (1, 2) for code in (1, 2)]
    assert position() == ""


def test_sampling_tells_its_place(monkeypatch):
    seen, extend = [], CachedSampler.extend
    monkeypatch.setattr(CachedSampler, "extend", lambda engine: (seen.append(position()), extend(engine)))
    model = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=64, block_size=16, num_classes=5)).eval()
    generate(model, torch.tensor([1, 2]))
    assert seen[0] == "code 1 of 15"
