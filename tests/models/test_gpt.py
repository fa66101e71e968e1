"""The GPT computes LlamaGen's numbers, and extending row by row computes the same as the forward pass."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from grpo.kernels import Dropout, drop_features
from grpo.models import GPT, ClassCondition, Condition, GPTConfig
from grpo.models.gpt import rotary_table

ROUNDING = {"rtol": 1e-5, "atol": 2e-5}


def small_config(**sizes) -> GPTConfig:
    defaults = {"dim": 32, "n_layer": 2, "n_head": 4, "vocab_size": 24, "block_size": 9, "num_classes": 5}
    return GPTConfig(**(defaults | {"multiple_of": 16} | sizes))


def small_gpt(**sizes) -> GPT:
    torch.manual_seed(0)
    model = GPT(small_config(**sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def extended_rows(model: GPT, tokens: torch.Tensor, class_ids: torch.Tensor, cache=None) -> torch.Tensor:
    """The rows of `hidden`, one at a time through the cache."""
    cache = cache or model.init_cache(len(class_ids), dtype=torch.float32, device="cpu")
    rows = [model.prefill(class_ids, cache)]
    for position, previous in enumerate(tokens.unbind(1), start=1):
        rows.append(model.extend(previous, torch.tensor(position), cache))
    return torch.stack(rows, dim=1)


def generate_greedily(model: GPT, class_ids: torch.Tensor, scale: float, last_guided: int) -> torch.Tensor:
    condition = ClassCondition(class_ids).with_unconditional()
    cache = model.init_cache(condition.rows, dtype=torch.float32, device="cpu")
    hidden, tokens = model.prefill(condition, cache), []
    for position in range(1, model.config.block_size + 1):
        conditional, unconditional = hidden.chunk(2)
        guided = last_guided < 0 or position - 2 <= last_guided
        combined = torch.lerp(unconditional, conditional, scale if guided else 1.0)
        tokens.append(model.output(combined).argmax(-1))
        if position < model.config.block_size:
            hidden = model.extend(tokens[-1].repeat(2), torch.tensor(position), cache)
    return torch.stack(tokens, dim=1)


class Prompts(Condition):
    """Two rows of another kind than classes."""

    rows = 2


@torch.no_grad()
def test_logits_are_llamagens(gpt, expected):
    context = expected["tokens"][:, :-1]
    no_class = torch.full_like(expected["class_ids"], gpt.config.num_classes)
    logits = gpt(context, expected["class_ids"])
    assert_close(logits, expected["logits"], **ROUNDING)
    assert_close(gpt(context, no_class), expected["logits_uncond"], **ROUNDING)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), expected["tokens"].flatten())
    assert_close(cross_entropy, expected["cross_entropy"], **ROUNDING)


@pytest.mark.parametrize(("scale", "interval"), [(1, -1), (4, -1), (2, 8)])
@torch.no_grad()
def test_greedy_generation_is_llamagens(gpt, expected, scale, interval):
    tokens = generate_greedily(gpt, expected["class_ids"], scale, interval)
    assert torch.equal(tokens, expected[f"greedy_cfg{scale}_interval{interval}"].long())


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@torch.no_grad()
def test_extending_equals_the_forward_pass(n_kv_head):
    model = small_gpt(n_kv_head=n_kv_head)
    tokens, class_ids = torch.randint(24, (3, 8)), torch.tensor([0, 4, 5])
    assert_close(extended_rows(model, tokens, class_ids), model.hidden(tokens, class_ids), **ROUNDING)


@torch.no_grad()
def test_a_used_cache_needs_no_clearing():
    model = small_gpt()
    cache = model.init_cache(3, dtype=torch.float32, device="cpu")
    class_ids = torch.tensor([0, 4, 5])
    extended_rows(model, torch.randint(24, (3, 8)), class_ids, cache)
    tokens = torch.randint(24, (3, 4))
    assert_close(extended_rows(model, tokens, class_ids, cache), model.hidden(tokens, class_ids), **ROUNDING)


@torch.no_grad()
def test_a_shorter_cache_serves_the_first_rows():
    model = small_gpt()
    tokens, class_ids = torch.randint(24, (2, 3)), torch.tensor([1, 2])
    cache = model.init_cache(2, dtype=torch.float32, device="cpu", length=4)
    assert cache.keys.shape == (2, 2, 4, 4, 8)
    assert_close(extended_rows(model, tokens, class_ids, cache), model.hidden(tokens, class_ids), **ROUNDING)


@torch.no_grad()
def test_grouped_queries_equal_repeated_keys_and_values():
    grouped, full = small_gpt(n_kv_head=2), small_gpt()
    weights = grouped.state_dict()
    for name in [name for name in weights if "wqkv" in name]:
        queries, keys, values = weights[name].split([32, 16, 16])
        repeated = (part.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1) for part in (keys, values))
        weights[name] = torch.cat([queries, *repeated])
    full.load_state_dict(weights)
    tokens, class_ids = torch.randint(24, (3, 8)), torch.tensor([0, 4, 5])
    assert_close(grouped(tokens, class_ids), full(tokens, class_ids), **ROUNDING)


@pytest.mark.parametrize("length", [0, 1, 5])
@torch.no_grad()
def test_rows_see_only_what_was_before_them_in_either_mode(gpt, expected, length):
    context, class_ids = expected["tokens"][:, :length], expected["class_ids"]
    for mode in (True, False):
        logits = gpt.train(mode)(context, class_ids)
        assert_close(logits, expected["logits"][:, : length + 1], **ROUNDING)


@torch.no_grad()
def test_dropout_is_where_masks_are_given_whatever_the_mode():
    model, plain = small_gpt(dropout=0.5, class_dropout=1.0), small_gpt()
    tokens, class_ids = torch.randint(24, (3, 4)), torch.tensor([0, 1, 2])
    masks = Dropout(torch.arange(3))
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model(tokens, class_ids), plain(tokens, class_ids))
        assert not torch.allclose(model(tokens, class_ids, masks), model(tokens, class_ids))
        assert torch.equal(
            model(tokens, class_ids, masks), model.hidden(tokens, class_ids, masks) @ model.output.weight.T
        )
    assert torch.equal(plain(tokens, class_ids, masks), plain(tokens, class_ids))  # whose rates are 0


@torch.no_grad()
def test_a_dropped_row_is_one_of_no_class():
    model = small_gpt()
    tokens, class_ids = torch.randint(24, (3, 4)), torch.tensor([0, 1, 2])
    condition = ClassCondition(class_ids)
    assert torch.equal(model(tokens, condition), model(tokens, class_ids))
    some = condition.drop(torch.tensor([False, True, False]))
    assert torch.equal(model(tokens, some), model(tokens, torch.tensor([0, 5, 2])))
    assert torch.equal(
        model(tokens, some.drop(torch.ones(3, dtype=torch.bool))), model(tokens, torch.tensor([5, 5, 5]))
    )


@torch.no_grad()
def test_class_dropout_makes_rows_unconditional_by_their_numbers():
    model = small_gpt(class_dropout=0.5)
    tokens, class_ids, masks = torch.randint(24, (8, 4)), torch.arange(8) % 5, Dropout(torch.arange(8) + 3, seed=1)
    dropped = masks.rows(0.5, place=0)
    assert 0 < dropped.sum() < 8
    assert torch.equal(model(tokens, class_ids, masks), model(tokens, class_ids.masked_fill(dropped, 5)))


def test_dropout_is_that_of_the_same_masks_multiplied_by_hand():
    """Weights, masks and gradients in fp64."""
    model, by_hand = small_gpt(dropout=0.3).double(), small_gpt().double()
    tokens, class_ids, masks = torch.randint(24, (3, 8)), torch.tensor([0, 4, 5]), Dropout(torch.tensor([7, 0, 2**40]))

    def factor(layer, place):
        ones = torch.ones(3, 9, 32, dtype=torch.float64)
        return drop_features(ones, 0.3, row_ids=masks.row_ids, seed=0, layer=torch.tensor(layer), place=place)

    by_hand.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor(0, 1),))
    for number, block in enumerate(by_hand.layers, start=1):
        for place, module in enumerate((block.attention, block.feed_forward)):
            scale = factor(number, place)
            module.register_forward_hook(lambda *seen, scale=scale: seen[-1] * scale)

    def loss(model, *masks):
        return model.hidden(tokens, class_ids, *masks).square().mul(torch.arange(32.0)).sum()

    ours, expected = loss(model, masks), loss(by_hand)
    assert_close(ours, expected)
    gradients = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)  # not of the projection
    by_hand_gradients = torch.autograd.grad(expected, list(by_hand.parameters()), allow_unused=True)
    for gradient, other in zip(gradients[:-1], by_hand_gradients[:-1], strict=True):
        assert_close(gradient, other)


def test_rotary_angles_follow_the_image_row_then_the_column():
    table = rotary_table(small_config(rope_base=100))  # 3 x 3 codes, heads of 8 dimensions: 2 + 2 pairs
    angles = torch.atan2(table[1:, :, 1], table[1:, :, 0]).view(3, 3, 4)
    assert not table[0].any()
    row, column = torch.meshgrid(torch.arange(3.0), torch.arange(3.0), indexing="ij")
    assert_close(angles, torch.stack([row, row / 10, column, column / 10], dim=-1))


@torch.no_grad()
def test_positions_survive_every_move_of_the_module():
    config = small_config()
    tokens, class_ids = torch.randint(24, (3, 4)), torch.tensor([0, 1, 2])
    model = small_gpt()
    reference = model(tokens, class_ids)
    assert_close(
        model.to(torch.bfloat16).float().layers[0].attention.rotary.table, rotary_table(config), rtol=0, atol=0
    )
    with torch.device("meta"):
        moved = GPT(config)
    moved.to_empty(device="cpu").load_state_dict(small_gpt().state_dict())
    assert torch.equal(moved(tokens, class_ids), reference)


def test_fresh_weights_are_drawn_as_by_llamagen():
    torch.manual_seed(0)
    model = GPT(GPTConfig(dim=128, n_layer=2, n_head=4, vocab_size=256, block_size=16))
    assert not model.output.weight.any()
    assert all(layer.ffn_norm.weight.eq(1).all() for layer in model.layers)
    for weight in (model.tok_embeddings.weight, model.layers[1].feed_forward.w2.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_block_and_a_cached_step_compile_without_graph_breaks():
    model = small_gpt()
    block = torch.compile(model.layers[0], backend="eager", fullgraph=True)
    x = torch.randn(2, 9, 32)
    assert torch.equal(block(x), model.layers[0](x))
    cache = model.init_cache(2, dtype=torch.float32, device="cpu")
    tokens, position = torch.tensor([3, 7]), torch.tensor(1)
    hidden = model.extend(tokens, position, cache)
    compiled = torch.compile(model.extend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens, position, cache), hidden)


@pytest.mark.parametrize(
    ("tokens", "class_ids", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, dtype=torch.long), "never fed"),
        (torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), r"\[B, S\]"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"\[B, S\]"),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), "tokens must be integers"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2), r"class ids must be \[B\] integers"),
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long), r"class ids must be \[B\] integers"),
        (torch.zeros(2, 3, dtype=torch.long), Prompts(), "takes classes as its condition, not Prompts"),
    ],
)
def test_wrong_inputs_are_refused(tokens, class_ids, message):
    with pytest.raises(ValueError, match=message):
        small_gpt()(tokens, class_ids)


def test_a_cache_of_another_batch_is_refused():
    model = small_gpt()
    cache = model.init_cache(2, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="2 sequences, the step 3"):
        model.prefill(torch.tensor([0, 1, 2]), cache)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_head": 3}, "multiple of 4 \\* n_head"),
        ({"n_kv_head": 3}, "n_kv_head"),
        ({"block_size": 10}, "square"),
        ({"cls_token_num": 120}, "exactly 1"),
        ({"caption_dim": 8, "cls_token_num": 0}, "positive"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        replace(small_config(), **sizes)
