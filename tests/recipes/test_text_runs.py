"""Training on texts: every job, one and two processes, resumption, and what rewards are told."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from grpo.config import GRPORecipe, UserError, load_recipe
from grpo.models import TOKENIZER_SPECS, TextCondition, VQModel, save_weights

DEBUG = ["--config", "debug_text"]
WITHOUT_IMAGES = [
    "--rollout.mode", "autoregressive", "--objective.aux_ce_weight", 0, "--data.name", "prompts",
    "--training.steps", 2, "--checkpoint.save_final", "false", "--metrics.image_interval", 0,
]  # fmt: skip
SIZES = [
    "--model.name", "GPT-tiny", "--model.cls_token_num", 12, "--model.caption_dim", 32, "--text.encoder", "words",
    "--tokenizer.name", "VQ-tiny", "--tokenizer.codebook_size", 64, "--tokenizer.downsample_size", 4,
    "--data.name", "synthetic", "--data.image_size", 16, "--data.num_workers", 0, "--training.mixed_precision", "fp32",
    "--training.batch_size", 4, "--training.steps", 3, "--optimizer.lr", 1e-3, "--checkpoint.save_final", "false",
]  # fmt: skip


def same(lines, others, **tolerance):
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in others], **tolerance)


def test_debug_recipe_goes_on_bit_by_bit(run_here, tmp_path):
    """Several processes: `tests/parallel/test_all_modes.py` has a mode of texts."""
    whole = run_here("train", *DEBUG, "--metrics.run_dir", tmp_path / "whole")
    assert len(whole) == 6
    assert all(line["grad_norm"] > 0 for line in whole)
    run_here("train", *DEBUG, "--metrics.run_dir", tmp_path / "run", "--training.steps", 3)
    resumed = run_here("train", *DEBUG, "--metrics.run_dir", tmp_path / "run")
    for name in ("loss", "grad_norm", "reward_mean", "entropy"):
        assert [line[name] for line in resumed] == [line[name] for line in whole]
    assert (tmp_path / "whole" / "samples" / "step-000006.png").is_file()


def test_a_run_refuses_other_texts(run_here, tmp_path):
    flags = [*DEBUG, "--metrics.run_dir", tmp_path / "run", "--metrics.image_interval", 0]
    run_here("train", *flags, "--training.steps", 3)
    with pytest.raises(UserError, match=r"model.cls_token_num: 12 -> 6"):
        run_here("train", *flags, "--model.cls_token_num", 6)


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("pretrain", ["--model.class_dropout", 0.1]),
        ("finetune", ["--finetune.loss", "cca"]),
        ("finetune", ["--finetune.loss", "gft"]),
        ("distill", ["--distill.cfg_scale", 2]),
    ],
)
def test_other_jobs(run_here, tmp_path, job, flags):
    lines = run_here(job, *SIZES, *flags, "--metrics.run_dir", tmp_path / "run")
    assert len(lines) == 3
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["grad_norm"] > 0 or job == "distill"  # whose student starts as its teacher


def test_pretraining_on_two_processes(run_here, run_on_two, tmp_path):
    one = run_here("pretrain", *SIZES, "--metrics.run_dir", tmp_path / "one")
    assert one[-1]["loss"] < one[0]["loss"]
    same(run_on_two("pretrain", *SIZES, "--metrics.run_dir", tmp_path / "two"), one, rel=1e-4)


@pytest.fixture
def prompts(tmp_path):
    """Two prompts and a tokenizer, as flags."""
    (tmp_path / "prompts.txt").write_text("a red dot\na very large blue square\n")
    torch.manual_seed(0)
    save_weights(tmp_path / "vq.pt", VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=256)).state_dict())
    return ["--data.path", tmp_path / "prompts.txt", "--tokenizer.checkpoint", tmp_path / "vq.pt"]


def test_a_function_is_told_the_prompts(run_here, tmp_path, prompts):
    """Guided rollouts of prompts alone, whose reward is the length of the prompt: both are drawn in every step."""
    (tmp_path / "lengths.py").write_text(
        "import torch\n"
        "def length(images, prompts):\n"
        "    assert len(prompts) == len(images) == 4\n"
        "    return torch.tensor([float(len(prompt)) for prompt in prompts])\n"
    )
    flags = [
        *prompts,
        "--rollout.batch_size",
        2,
        "--rollout.num_generations",
        4,
        "--reward.batch_size",
        4,
    ]
    flags += ["--training.batch_size", 8, "--rollout.cfg_scale", 2, "--reward.mine.kind", "python"]
    flags += ["--reward.mine.function", f"{tmp_path}/lengths.py:length", "--metrics.run_dir", tmp_path / "run"]
    lines = run_here("train", *DEBUG, *WITHOUT_IMAGES, *flags)
    expected = (len("a red dot") + len("a very large blue square")) / 2
    assert [line["reward_mean"] for line in lines] == pytest.approx([expected] * 2)
    (tmp_path / "classes.py").write_text("def classes(images, class_ids):\n    return class_ids\n")
    flags[flags.index("--reward.mine.function") + 1] = f"{tmp_path}/classes.py:classes"
    with pytest.raises(UserError, match="this model has no class_ids and no class_names"):
        run_here("train", *DEBUG, *WITHOUT_IMAGES, *flags[:-1], tmp_path / "other")


def test_a_server_is_told_the_prompts(run_here, tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                seen.append(json.loads(arrays["about"].tobytes()))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": list(range(len(seen[-1]["captions"])))}).encode())

        def log_message(self, *_):
            pass

    scorer = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=scorer.serve_forever, daemon=True).start()
    flags = [*prompts, "--rollout.batch_size", 2, "--rollout.num_generations", 2]
    flags += ["--training.batch_size", 4, "--reward.judge.kind", "http", "--metrics.run_dir", tmp_path / "run"]
    flags += ["--reward.judge.url", f"http://127.0.0.1:{scorer.server_port}/"]
    run_here("train", *DEBUG, *WITHOUT_IMAGES, *flags)
    scorer.shutdown()
    scorer.server_close()
    assert len(seen) == 2
    for about in seen:
        first, second = about["captions"][0], about["captions"][2]
        assert about["captions"] == [first, first, second, second]
        assert {first, second} == {"a red dot", "a very large blue square"}
        assert about["class_ids"] is None


def test_words_of_rewards_are_the_prompts_as_they_are():
    from grpo.rewards.base import DecodedBatch
    from grpo.rewards.words import WordsTable

    condition = TextCondition(torch.ones(2, 1, 4), torch.ones(2, 1, dtype=torch.bool))
    batch = DecodedBatch(torch.ones(2, 3, 8, 8), torch.ones(2, 4), condition, torch.ones(2, 3, 8, 8),
                         torch.arange(2), captions=["a dog", "two cats"])  # fmt: skip
    assert WordsTable(kind="clip").texts(batch) == ["a dog", "two cats"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--reward.class_log_prob.checkpoint", "c.pth"], "it needs classes, and the model takes texts"),
        (["--data.name", "classes"], 'data.name = "classes" has no texts'),
        (["--text.encoder", "t5"], "text.features is required"),
        (["--model.new_classes", 2], "model.new_classes must be 0"),
        (["--text.features", "f", "--text.llamagen_features", "f"], "give one of them"),
        (["--text.llamagen_short_features", "f"], "needs text.llamagen_features"),
    ],
)
def test_what_cannot_go_with_texts_is_told(flags, told):
    with pytest.raises(UserError, match=told):
        load_recipe(GRPORecipe, [*DEBUG, *map(str, flags)])
