"""Rewards by the user's own functions: what they get, what they may return, and every mistake in plain words."""

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.config import Compile, Rewards, UserError
from grpo.models import ClassCondition
from grpo.rewards import DecodedBatch, build_rewards
from grpo.rewards.python_function import PythonFunction


def settings(file, name="f", **keys):
    return PythonFunction.Settings(kind="python", function=f"{file}:{name}", **keys)


@pytest.fixture
def write(tmp_path):
    """Source -> the file with it."""

    def write(source):
        file = tmp_path / "my_rewards.py"
        file.write_text(source)
        return file

    return write


@pytest.fixture
def build(write, context):
    """Source and keys of the table -> the reward by its function `f`."""
    return lambda source, name="f", **keys: PythonFunction(settings(write(source), name, **keys), context)


@pytest.fixture
def batch():
    """Three completions of two real images."""
    images = torch.tensor([-2.0, 0.25, 3.0])[:, None, None, None].expand(3, 3, 8, 8)
    real = torch.tensor([0.5, -0.5])[:, None, None, None].expand(2, 3, 8, 8)
    tokens = torch.arange(12).view(3, 4)
    return DecodedBatch(
        images.bfloat16(), tokens, ClassCondition(torch.tensor([1, 3, 3])), real, torch.tensor([0, 1, 1])
    )


def test_images_are_clamped_fp32_without_gradient(build, batch):
    source = """
import torch
def f(images):
    assert images.dtype == torch.float32 and images.shape == (3, 3, 8, 8)
    return images.mean(dim=(1, 2, 3))
"""
    assert build(source)(batch).tolist() == [-1.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("signature", "expression", "expected"),
    [
        ("images, class_ids", "class_ids * 2", [2, 6, 6]),
        ("images, *, class_names", "[len(name) for name in class_names]", [3, 4, 4]),
        ("images, real_images", "real_images.mean(dim=(1, 2, 3))", [0.5, -0.5, -0.5]),
        ("x, tokens=None", "tokens.sum(dim=1)", [6, 22, 38]),
        ("images, prompts=None", "[prompts is None] * 3", [1, 1, 1]),
        ("images, radius, power=2", "[radius ** power] * 3", [9, 9, 9]),
        ("images, **others", "[others.pop('radius')] * 3 if len(others) == 1 else None", [3, 3, 3]),
    ],
)
def test_what_the_signature_names_is_given(build, batch, signature, expression, expected):
    arguments = {"radius": 3} if "radius" in signature + expression else {}
    reward = build(f"def f({signature}):\n    return {expression}", arguments=arguments)
    scores = reward(batch)
    assert (scores.dtype, scores.tolist()) == (torch.float32, expected)


def test_prompts_take_the_place_of_classes(write, context, batch):
    texts = replace(context, has_prompts=True)
    reward = PythonFunction(settings(write("def f(images, prompts):\n    return [len(p) for p in prompts]")), texts)
    assert reward(replace(batch, captions=["a cat", "two cats"])).tolist() == [5, 8, 8]
    with pytest.raises(UserError, match=r"this model has no class_ids and no class_names$"):
        PythonFunction(settings(write("def f(images, class_ids): ...")), texts)


def test_what_is_given_may_be_written_into(build, batch):
    source = """
def f(images, class_ids, real_images, tokens):
    for tensor in (images, class_ids, real_images, tokens):
        tensor.zero_()
    return [0] * len(images)
"""
    before = [tensor.clone() for tensor in (batch.images, batch.condition.class_ids, batch.real_images, batch.tokens)]
    build(source)(batch)
    after = (batch.images, batch.condition.class_ids, batch.real_images, batch.tokens)
    assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    "expression",
    [
        "[0, float('nan'), 2.5]",
        "(0, float('nan'), 2.5)",
        "np.array([2.5, np.nan, 0])[::-1]",
        "np.array([0, np.nan, 2.5], dtype=np.float16)",
        "np.ma.masked_array([0, 7, 2.5], mask=[False, True, False])",
        "torch.tensor([0, float('nan'), 2.5], dtype=torch.float64)",
        "torch.tensor([0, float('nan'), 2.5]).bfloat16().requires_grad_()",
        "[torch.tensor(0.0), torch.tensor(float('nan')), np.float32(2.5)]",
    ],
)
def test_numbers_of_many_kinds(build, batch, expression):
    scores = build(f"import torch, numpy as np\ndef f(images):\n    return {expression}")(batch)
    torch.testing.assert_close(scores, torch.tensor([0, float("nan"), 2.5]), equal_nan=True)
    assert not scores.requires_grad


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("None", "NoneType"),
        ("1.0", "[] of float32"),
        ("[1.0, 2.0]", "[2] of float32"),
        ("images.mean(dim=(2, 3))", "[3, 3] of float32"),
        ("images.mean(dim=(1, 2, 3)) * 1j", "[3] of complex64"),
        ("['a', 'b', 'c']", "list"),
        ("[1.0, None, 2.0]", "list"),
        ("{'reward': 1.0}", "dict"),
        ("(x for x in images)", "generator"),
        ("torch.empty(3, device='meta')", "[3] of float32 on meta"),
        ("images.mean(dim=(1, 2, 3)).to_sparse()", "[3] of float32 on cpu in the layout torch.sparse_coo"),
    ],
)
def test_other_returns_stop_the_run(build, batch, expression, found):
    reward = build(f"import torch\n\ndef f(images):\n    return {expression}")
    text = f"{reward.file}:3: f must return 3 numbers, one an image, not {found}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        reward(batch)


@pytest.mark.parametrize(
    "raised",
    [
        "ValueError('too dark')",
        "SystemExit('too dark')",
        "BaseException('too dark')",
        "ValueError('\\n too dark\\nby far')",
    ],
)
def test_an_error_stops_the_run_with_its_line(build, batch, raised):
    reward = build(f"def helper():\n    raise {raised}\n\ndef f(images):\n    return helper()")
    text = rf"my_rewards\.py:2: f raised {raised.partition('(')[0]}: too dark$"
    with pytest.raises(UserError, match=text):
        reward(batch)
    reward = build("def f(images):\n    return images @ images.new_zeros(5, 5)")
    with pytest.raises(UserError, match=r"my_rewards\.py:2: f raised RuntimeError: "):
        reward(batch)


def test_a_lack_of_memory_is_left_to_the_launcher(build, batch):
    with pytest.raises(MemoryError):
        build("def f(images):\n    raise MemoryError")(batch)


@pytest.mark.parametrize(
    ("source", "keys", "told"),
    [
        ("", {}, "my_rewards.py has no function f"),
        ("f = 3", {}, "my_rewards.py has no function f"),
        ("def f(images):\n  return (", {}, "my_rewards.py:2: SyntaxError: "),
        ("x = 1\nx / 0\ndef f(images): ...", {}, "my_rewards.py:2: ZeroDivisionError: division by zero"),
        ("import helpers_beside_it", {}, "No module named 'helpers_beside_it'; modules beside the file are not found"),
        ("def f(): ...", {}, "my_rewards.py:1: cannot call f: too many positional arguments"),
        ("def f(images, radius): ...", {}, "cannot call f: missing a required argument: 'radius'"),
        ("def f(images, prompts): ...", {}, "missing a required argument: 'prompts'.*this model has no prompts"),
        ("def f(images): ...", {"arguments": {"radius": 3}}, "got an unexpected keyword argument 'radius'"),
    ],
)
def test_mistakes_are_told_when_it_is_built(build, source, keys, told):
    with pytest.raises(UserError, match=told) as error:
        build(source, **keys)
    assert error.value.problems[0].startswith("function: ")


def test_the_file_is_known_by_its_hash(write, context):
    file = write("def f(images):\n    return [1] * len(images)")
    resolved = settings(file).resolved()
    assert len(resolved.sha256) == 64
    assert resolved.resolved() == resolved
    write("def f(images):\n    return [2] * len(images)")
    for use in (resolved.resolved, lambda: PythonFunction(resolved, context)):
        with pytest.raises(UserError, match=r"my_rewards\.py has changed: bring back"):
            use()
    with pytest.raises(UserError, match="must be FILE:NAME"):
        PythonFunction.Settings(kind="python", function="sharpness").resolved()
    with pytest.raises(UserError, match=r"cannot read .*missing\.py: No such file"):
        settings("missing.py").resolved()


def test_the_file_runs_once_under_a_private_name(write, context):
    source = """
from dataclasses import dataclass

@dataclass
class Size:  # dataclasses look for their module
    side: "int"

def f(images): return [id(Size)] * len(images)
def g(images): return f(images)
"""
    path = list(sys.path)
    file = write(source)
    first, second = (PythonFunction(settings(file, name), context) for name in "fg")
    assert first.function.__globals__ is second.function.__globals__
    assert first.function.__globals__["__file__"] == str(file)
    assert sys.path == path
    assert "my_rewards" not in sys.modules
    assert not (file.parent / "__pycache__").exists()


def test_it_may_be_the_only_reward(tokenizer, write):
    file = write(
        "def f(images, class_names, bonus):\n    return [bonus if name == 'dog' else 0 for name in class_names]"
    )
    reward = build_rewards(
        Rewards(dogs=settings(file, weight=0.5, arguments={"bonus": 4})),
        tokenizer,
        class_names=["cat", "dog"],
        device=torch.device("cpu"),
        compile=Compile(),
    )
    tokens = torch.zeros(2, 3, 16, dtype=torch.int64)
    rewarded = reward(tokens, ClassCondition(torch.tensor([1, 0])), torch.zeros(2, 3, 16, 16))
    assert rewarded.total.tolist() == [[2.0] * 3, [0.0] * 3]
    assert rewarded.metrics().means()["reward/dogs_abstained"] == 0


def test_a_failure_names_the_table(tokenizer, write):
    tables = {"sharp": settings(write(""), "sharpness")}
    arguments = {"class_names": [], "device": torch.device("cpu"), "compile": Compile()}
    with pytest.raises(UserError, match=r"^reward\.sharp: function: .*my_rewards\.py has no function sharpness$"):
        build_rewards(Rewards(**tables), tokenizer, **arguments)


def test_a_wrong_return_names_the_table(tokenizer, write):
    arguments = {"class_names": [], "device": torch.device("cpu"), "compile": Compile()}
    reward = build_rewards(Rewards(sharp=settings(write("def f(images): return 1"))), tokenizer, **arguments)
    tokens = torch.zeros(2, 3, 16, dtype=torch.int64)
    with pytest.raises(UserError, match=r"^reward\.sharp: .*my_rewards\.py:1: f must return 6 numbers"):
        reward(tokens, ClassCondition(torch.tensor([1, 0])), torch.zeros(2, 3, 16, 16))


def example(first_line):
    """The code block of docs/own_reward.md that begins so."""
    text = (Path(__file__).parents[2] / "docs" / "own_reward.md").read_text()
    return next(block for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL) if block.startswith(first_line))


def test_the_documented_function_works(build, batch):
    reward = build(example("# my_rewards.py"), "sharpness", arguments={"radius": 3})
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = reward(replace(batch, images=torch.cat([batch.images[:2], noise])))
    assert scores.isnan().tolist() == [True, True, False]
    assert scores[2] > 0
    table = tomllib.loads(example("# sharp.toml"))["reward"]["sharp"]
    assert PythonFunction.Settings(**table).arguments == {"radius": 3}
