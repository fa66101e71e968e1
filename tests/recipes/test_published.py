"""The published recipes in miniature: small networks with random weights of the real layouts, all else as published."""

import io
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from grpo.config import GRPORecipe, load_recipe
from grpo.models import GPT, MODEL_SPECS, TOKENIZER_SPECS, VQModel, save_weights
from tests.rewards.published_layouts import save_open_clip
from tests.vgg import save_vgg16

ARCHITECTURE = "miniature-quickgelu"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags that make a published recipe small: models, images, steps."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    sizes = {"image_size": 32, "downsample_size": 4, "vocab_size": 64, "num_classes": 10}
    generator = GPT(MODEL_SPECS["GPT-tiny"].config(**sizes))
    torch.nn.init.normal_(generator.output.weight, std=0.1)
    save_weights(folder / "gpt.pt", generator.state_dict())
    save_weights(folder / "vq.pt", VQModel(TOKENIZER_SPECS["VQ-tiny"].config(codebook_size=64)).state_dict())
    return [
        "--model.name", "GPT-tiny", "--model.checkpoint", folder / "gpt.pt", "--model.num_classes", 10,
        "--tokenizer.name", "VQ-tiny", "--tokenizer.checkpoint", folder / "vq.pt", "--tokenizer.codebook_size", 64,
        "--tokenizer.downsample_size", 4, "--data.name", "digits", "--data.path", "none", "--data.image_size", 32,
        "--data.num_workers", 0, "--training.steps", 2, "--metrics.image_interval", 0, "--checkpoint.interval", 0,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Weights of CLIP and of HPSv2.1, as the two rewards' flags."""
    pytest.importorskip("open_clip", reason="the extra [rewards] is not installed")
    clip, hps = save_open_clip(tmp_path_factory.mktemp("clip"), ARCHITECTURE, side=32)

    def flags(clips, preferences):
        files = {**dict.fromkeys(clips, clip), **dict.fromkeys(preferences, hps)}
        return [
            text
            for name, file in files.items()
            for text in (f"--reward.{name}.checkpoint", file, f"--reward.{name}.model", ARCHITECTURE)
        ]

    return flags


@pytest.fixture
def server(monkeypatch):
    """The address of a scorer that gives each image its number in the request."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
                scores = list(range(len(arrays["images"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": scores}).encode())

        def log_message(self, *_):
            pass

    scorer = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=scorer.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{scorer.server_port}/score"
    scorer.shutdown()
    scorer.server_close()


def check(lines, name):
    """Two finite steps in which every reward of the recipe has its mean and a spread that is a number."""
    rewards = load_recipe(GRPORecipe, ["--config", f"published/{name}"]).reward.active
    assert len(lines) == 2
    for line in lines:
        wanted = ["loss", "grad_norm", "entropy", *(f"reward/{reward}_std" for reward in rewards)]
        assert all(math.isfinite(line[metric]) for metric in wanted)
        assert line["grad_norm"] > 0
        assert line["skipped_steps"] == 0


@pytest.mark.parametrize("name", ["vapi_xl_384", "vapi_xxl_384"])
def test_vapi(run_here, small, tmp_path, name):
    """One optimizer step a rollout, with dropout: the ratio is 1 all the same."""
    flags = ["--reward.lpips.backbone", save_vgg16(tmp_path / "vgg.pth")]
    flags += ["--rollout.batch_size", 4, "--training.batch_size", 32, "--training.micro_batch_size", 2]
    lines = run_here("train", "--config", f"published/{name}", *small, *flags, "--metrics.run_dir", tmp_path / "run")
    check(lines, name)
    assert all(line["ratio"] == 1 for line in lines)
    assert all(line["reward/lpips_std"] > 0 for line in lines)


def test_ar_grpo(run_here, small, words, server, tmp_path):
    """The published 4 x 8 completions a step."""
    from tests.rewards.test_maniqa import released

    torch.save({"params": released()}, tmp_path / "maniqa.pth")
    flags = [*words(["clip", "clip_levels"], ["hps_v2", "hps_levels"]), "--reward.qwen.url", server]
    flags += ["--reward.maniqa.checkpoint", tmp_path / "maniqa.pth"]
    lines = run_here("train", "--config", "ar_grpo_xl_384", *small, *flags, "--metrics.run_dir", tmp_path / "run")
    check(lines, "ar_grpo_xl_384")
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6)  # the reference is the start
    assert lines[0]["reward/qwen_std"] > 0


def test_loo_fid(run_here, small, words, tmp_path):
    """Twelve completions of one image a rollout, gone through twice; the average and the entropy's weight move."""
    torchvision = pytest.importorskip("torchvision")
    inception = torchvision.models.inception_v3(weights=None, transform_input=True, init_weights=False)
    save_weights(tmp_path / "inception.pth", inception.state_dict())
    flags = [*words(["clip"], ["hps_v2"]), "--reward.loo_fid.checkpoint", tmp_path / "inception.pth"]
    flags += ["--reward.loo_fid.reference_images", 8, "--rollout.batch_size", 1, "--training.batch_size", 12]
    lines = run_here("train", "--config", "loo_fid_l_256", *small, *flags, "--metrics.run_dir", tmp_path / "run")
    check(lines, "loo_fid_l_256")
    assert all(line["kl"] > 0 for line in lines)
    assert all(line["reward/loo_fid_std"] > 0 for line in lines)
    assert lines[1]["entropy_weight"] != lines[0]["entropy_weight"]
    assert (tmp_path / "run" / "model_ema.safetensors").is_file()
