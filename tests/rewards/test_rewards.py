"""Rewards by hand, their sum, that batches can be cut anywhere, and what abstaining means."""

import io
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from grpo.config import Compile, Rewards, UserError
from grpo.data import to_image
from grpo.models import ClassCondition, Classifier, ClassifierConfig, load_classifier, save_weights, to_uint8
from grpo.rewards import DecodedBatch, PopulationReward, Reward, RewardSum, RewardWatch, Seen, Term, build_rewards
from grpo.rewards.class_log_prob import ClassLogProb
from grpo.rewards.embedding_cosine import EmbeddingCosine
from grpo.rewards.jpeg_size import JPEGSize
from grpo.rewards.reconstruction import Reconstruction
from grpo.rewards.reward_sum import whole_groups

SHAPES = {"teacher_forced": (3, 4), "autoregressive": (12, 1)}  # R, M of 3 conditions with 4 completions each
NAN, INF = float("nan"), float("inf")


def reconstruction(distance):
    return Reconstruction(Reconstruction.Settings(kind="reconstruction", distance=distance), None)


def decoded(images, tokens, real_images):
    places = torch.arange(len(images))
    return DecodedBatch(images, tokens, ClassCondition(places % 4), real_images, places)


@pytest.fixture
def batch(tokenizer):
    tokens = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    return decoded(torch.full((3, 3, 16, 16), 0.5), tokens, torch.zeros(3, 3, 16, 16))


@pytest.fixture
def rollout():
    """Flat tokens [12, T], condition and real images of 3 conditions with 4 completions each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(32, (12, 16), generator=generator)
    return tokens, ClassCondition(torch.tensor([3, 0, 1])), torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1


def test_reconstruction_by_hand(batch):
    torch.testing.assert_close(reconstruction("l1")(batch), torch.full((3,), -0.5))
    torch.testing.assert_close(reconstruction("l2")(batch), torch.full((3,), -0.25))


@pytest.fixture
def classifier_file(tmp_path):
    torch.manual_seed(0)
    save_weights(tmp_path / "c.safetensors", Classifier(ClassifierConfig(width=8, num_classes=4)).state_dict())
    return str(tmp_path / "c.safetensors")


def test_class_log_prob_is_that_of_the_requested_class(batch, context, classifier_file):
    settings = ClassLogProb.Settings(kind="class_log_prob", checkpoint=classifier_file)
    log_probs = load_classifier(classifier_file)(batch.images).log_softmax(-1)
    torch.testing.assert_close(ClassLogProb(settings, context)(batch), log_probs[torch.arange(3), torch.arange(3)])


def test_embedding_cosine_is_zero_for_the_real_codes_own_vectors(tokenizer, context):
    """A completion whose code vectors point along the latents has cosine 1."""
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    tokens = tokenizer.encode(images)
    reward = EmbeddingCosine(EmbeddingCosine.Settings(kind="embedding_cosine"), context)
    own, other = reward(decoded(images, tokens, images)), reward(decoded(images, (tokens + 7) % 32, images))
    latents, vectors = tokenizer.encode_latents(images).flatten(1), tokenizer.lookup(tokens).flatten(1)
    cosine = (latents * vectors).sum(1) / (latents.norm(dim=1) * vectors.norm(dim=1))
    torch.testing.assert_close(own, cosine - 1, rtol=1e-5, atol=1e-6)
    assert (own > other).all()


@pytest.mark.parametrize(
    ("total", "most", "size"),
    [
        (64, 113, 64),
        (128, 113, 64),
        (256, 113, 64),
        (512, 113, 64),
        (88, 50, 48),
        (128, 5, 5),
        (8, 8, 8),
        (120, 64, 40),
    ],
)
def test_batches_are_whole_groups_of_equal_size(total, most, size):
    assert whole_groups(total, 8, most) == size


@pytest.mark.parametrize("mode", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 5, 6, 64])
def test_weighted_sum_over_any_batches(tokenizer, rollout, batch_size, mode):
    """In both modes the 3 x 4 completions are scored as a naive computation does it."""
    tokens, condition, real = rollout
    terms = {"square": Term(reconstruction("l2"), 2.0), "absolute": Term(reconstruction("l1"), -0.5)}
    shape = SHAPES[mode]
    rewarded = RewardSum(tokenizer, terms, batch_size=batch_size)(tokens.view(*shape, 16), condition, real, show=2)
    images = tokenizer.decode(tokens).view(3, 4, 3, 16, 16)
    l2 = -((images - real[:, None]) ** 2).mean(dim=(2, 3, 4)).view(shape)
    l1 = -(images - real[:, None]).abs().mean(dim=(2, 3, 4)).view(shape)
    torch.testing.assert_close(rewarded.components, torch.stack([l2, l1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rewarded.total, 2 * l2 - 0.5 * l1, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rewarded.images, images[:2], rtol=1e-4, atol=1e-5)
    assert rewarded.terms == terms


def test_both_modes_and_naive_batches_agree_in_every_bit(tokenizer, rollout):
    tokens, condition, real = rollout
    total = RewardSum(tokenizer, {"rec": Term(reconstruction("l2"))}, batch_size=6)  # so batches of one group
    forced, free = (total(tokens.view(*shape, 16), condition, real).total for shape in SHAPES.values())
    naive = [-(tokenizer.decode(tokens[4 * i : 4 * i + 4]) - real[i]).square().mean(dim=(1, 2, 3)) for i in range(3)]
    assert torch.equal(forced, torch.stack(naive))
    assert torch.equal(free.flatten(), forced.flatten())


class Fixed(Reward):
    """Given numbers; notes the conditions and tokens that it is asked about."""

    def __init__(self, values, *, may_abstain):
        self.values, self.may_abstain, self.asked = list(values), may_abstain, []

    def __call__(self, batch):
        self.asked += batch.condition.class_ids.tolist()
        return torch.tensor([self.values.pop(0) for _ in batch.images])


def test_conditions_and_phases_go_with_their_completions(tokenizer, rollout):
    tokens, condition, real = rollout
    reward, phases = Fixed(range(12), may_abstain=False), []

    @contextmanager
    def timer(phase):
        phases.append(phase)
        yield

    rewarded = RewardSum(tokenizer, {"fixed": Term(reward)}, batch_size=5)(
        tokens.view(12, 1, 16), condition, real, timer=timer
    )
    assert reward.asked == [3] * 4 + [0] * 4 + [1] * 4
    assert torch.equal(rewarded.total, torch.arange(12.0).view(12, 1))
    assert rewarded.images.numel() == 0
    assert phases == ["reward", *["decode", "reward/fixed"] * 3]


VALUES = [1.0, NAN, 4.0, 1.0, NAN, NAN, NAN, NAN, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("mode", SHAPES)
def test_who_abstains_neither_helps_nor_hurts(tokenizer, rollout, mode):
    """NaN counts as the mean of the group's others, and as 0 where the whole group abstains."""
    tokens, condition, real = rollout
    terms = {"sure": Term(Fixed(range(12), may_abstain=False)), "shy": Term(Fixed(VALUES, may_abstain=True), 10.0)}
    rewarded = RewardSum(tokenizer, terms, batch_size=5)(tokens.view(*SHAPES[mode], 16), condition, real)
    filled = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 5.0, 6.0, 7.0, 8.0]).view(SHAPES[mode])
    torch.testing.assert_close(
        rewarded.components[1], torch.tensor(VALUES).view(SHAPES[mode]), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(rewarded.total, torch.arange(12.0).view(SHAPES[mode]) + 10 * filled)
    metrics = rewarded.metrics().means()
    assert metrics["reward/shy_abstained"] == pytest.approx(5 / 12)
    assert metrics["reward/shy_mean"] == pytest.approx(32 / 7)  # of those that have an opinion
    assert set(metrics) == {"reward/shy_abstained"} | {
        f"reward{name}_{kind}" for name in ("", "/sure", "/shy") for kind in ("mean", "std")
    }


@pytest.mark.parametrize(("value", "may_abstain"), [(NAN, False), (INF, False), (INF, True), (-INF, True)])
def test_other_non_finite_rewards_stay_so(tokenizer, rollout, value, may_abstain):
    """They are faults: the step with them is skipped."""
    tokens, condition, real = rollout
    reward = Fixed([value, NAN, *range(10)], may_abstain=may_abstain)
    total = RewardSum(tokenizer, {"it": Term(reward)}, batch_size=0)(tokens.view(3, 4, 16), condition, real).total
    assert not total[0, :2].isfinite().any()
    assert total[1:].isfinite().all()


def build(tables, tokenizer, **changes):
    settings = {"class_names": "abcd", "device": torch.device("cpu"), "compile": Compile()}
    return build_rewards(Rewards(**tables), tokenizer, **(settings | changes))


def test_built_from_a_recipe(tokenizer, classifier_file):
    tables = {
        "near": Reconstruction.Settings(kind="reconstruction", normalise="batch", separate=True),
        "off": Reconstruction.Settings(kind="reconstruction", weight=0),
        "class": ClassLogProb.Settings(kind="class_log_prob", weight=0.5, checkpoint=classifier_file),
    }
    assert {name: term.weight for name, term in build(tables, tokenizer).terms.items()} == {"near": 1, "class": 0.5}
    assert build(tables, tokenizer).terms["near"][1:] == (1.0, "batch", True)
    tables["other"] = ClassLogProb.Settings(kind="class_log_prob", checkpoint="missing.safetensors")
    with pytest.raises(UserError) as error:
        build(tables, tokenizer, class_names="abcdefghij")
    first, second = error.value.problems
    assert first.startswith("reward.class: checkpoint: ")
    assert "knows 4 classes, model.num_classes is 10" in first
    assert second.startswith("reward.other: ")
    assert "missing.safetensors" in second


class Rank(PopulationReward):
    """The place of each completion's mean among those of the whole rollout; remembers how many it has seen."""

    def __init__(self):
        self.seen = torch.zeros((), dtype=torch.int64)

    def features(self, batch):
        return batch.images.mean(dim=(1, 2, 3))[:, None]

    def score(self, features):
        self.seen += len(features)
        return features[:, 0].argsort().argsort()

    def state_tensors(self):
        return {"seen": self.seen}


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_population_is_scored_when_all_of_it_is_there(tokenizer, rollout, batch_size):
    tokens, condition, real = rollout
    reward = RewardSum(tokenizer, {"rank": Term(Rank()), "near": Term(reconstruction("l2"))}, batch_size=batch_size)
    rewarded = reward(tokens.view(3, 4, 16), condition, real)
    places = tokenizer.decode(tokens).mean(dim=(1, 2, 3)).argsort().argsort()
    assert torch.equal(rewarded.components[0], places.view(3, 4).float())
    assert reward.state_tensors() == {"rank.seen": torch.tensor(12)}


def step(seconds=0.1, **abstained):
    named = {f"reward/{name}_abstained": share for name, share in abstained.items()}
    return {"seconds/step": 1.0, "seconds/reward/shy": seconds, **named}


def test_a_reward_that_keeps_silent_stops_the_run():
    shy = Fixed([], may_abstain=True)
    shy.place, shy.bad_steps, shy.most_abstained = "my_rewards.py:3", 3, 0.5
    watch = RewardWatch({"shy": Term(shy), "sure": Term(Fixed([], may_abstain=False))})
    assert watch(step(shy=0.5)) == Seen([])
    told = "reward.shy: my_rewards.py:3: no opinion (NaN) of 75% of the completions of a step"
    assert watch(step(shy=0.75)) == Seen([f"{told}; the run stops after 3 such steps in a row"])
    assert watch(step(shy=0.75)) == watch(step(shy=0.1)) == Seen([])  # told once, and begun anew
    assert [watch(step(shy=0.75)).problem for _ in range(3)] == [
        None,
        None,
        f"{told}, 3 steps in a row; mend it, or set its weight to 0",
    ]


def test_a_reward_that_never_spoke_is_told_if_the_run_ends():
    shy = Fixed([], may_abstain=True)
    shy.place = "my_rewards.py:3"
    watch = RewardWatch({"shy": Term(shy), "sure": Term(Fixed([], may_abstain=False))})
    assert [watch(step(shy=share)).if_last for share in (1.0, 1.0, 0.9, 1.0)] == [
        "reward.shy: my_rewards.py:3: had no opinion (NaN) in any step"
    ] * 2 + [None] * 2


def test_a_reward_that_is_not_finite_is_named():
    watch = RewardWatch({"shy": Term(Fixed([], may_abstain=True)), "sure": Term(Fixed([], may_abstain=False))})
    assert watch(step() | {"reward/shy_mean": float("inf"), "reward/sure_mean": 1.0}).not_finite == ("reward.shy",)


def test_a_slow_function_is_told_once():
    shy = Fixed([], may_abstain=True)
    shy.place = "my_rewards.py:3"
    watch = RewardWatch({"shy": Term(shy)})
    assert watch(step(seconds=0.9)).notes == []  # warm-up
    assert watch(step(seconds=0.5)).notes == []
    assert watch(step(seconds=0.6)).notes == [
        "reward.shy: my_rewards.py:3: slow, it takes 0.60 of the 1.00 seconds of a step"
    ]
    assert watch(step(seconds=0.6)).notes == []


def test_a_kind_is_found_by_its_name(tokenizer, monkeypatch):
    """What the registry gives is built with the table and the context, whatever it is."""
    built = []
    monkeypatch.setattr(
        "grpo.rewards.reward_sum.reward_class",
        lambda kind: lambda table, context: built.append((kind, table, context)) or SimpleNamespace(networks=()),
    )
    table = Reconstruction.Settings(kind="anything")
    build({"mine": table}, tokenizer)
    (kind, given, context) = built[0]
    assert (kind, given, context.class_names, context.tokenizer) == ("anything", table, "abcd", tokenizer)


def test_jpeg_size_is_that_of_the_file(batch, context):
    """A plain image takes fewer bytes than noise, and a coarser JPEG fewer than a fine one."""
    noise = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fine, coarse = (JPEGSize(JPEGSize.Settings(kind="jpeg_size", quality=q), context) for q in (95, 20))
    plain, noisy = fine(batch), fine(replace(batch, images=noise))
    assert plain.dtype == torch.float32
    assert (noisy < plain).all()
    assert (coarse(replace(batch, images=noise)) > noisy).all()
    file = io.BytesIO()
    to_image(to_uint8(noise[0])).save(file, format="jpeg", quality=95)
    assert noisy[0].item() == pytest.approx(-len(file.getvalue()) / 500_000)


@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_completion_keeps_its_number(tokenizer, rollout, batch_size):
    tokens, condition, real = rollout

    class Number(Reward):
        def __call__(self, batch):
            return batch.completion_ids.double()

    ids = torch.arange(12).flip(0).view(3, 4) * 1000
    total = RewardSum(tokenizer, {"it": Term(Number())}, batch_size=batch_size)
    assert torch.equal(total(tokens.view(3, 4, 16), condition, real, (), ids).total, ids.float())
