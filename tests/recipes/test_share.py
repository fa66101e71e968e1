"""`grpo share`: from a run to a folder that draws the same, and says what it is without saying where it was made."""

import json
import re
from pathlib import Path

import huggingface_hub.hub_mixin
import numpy as np
import pytest
import yaml
from PIL import Image

from grpo.config import UserError
from grpo.jobs import generate, share
from grpo.sharing import ImageGenerator, without_places
from tests.sharing.tiny import run_folder
from tests.texts.tiny_t5 import WIDTH

ROOT = Path(__file__).parents[2]
RESULT = {
    "metrics": {"classifier": {"fid": 1.25, "accuracy": None}},
    "images": {"count": 5000, "source": {"path": "/home/me/x.pt"}},
    "reference": {},
    "judges": {},
    "settings": {},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = run_folder(tmp_path / "runs/mine")
    (run / "evaluation.json").write_text(json.dumps(RESULT))
    (run / "judge.json").write_text(json.dumps([{"step": 1, "fid": 2.5, "accuracy": 0.5}]))
    rows = [{"name": "base", "seed": 0, "fid": 3.5}, {"name": "GRPO | 1", "seed": 0, "fid": 2.0}]
    (run.parent / "results.json").write_text(json.dumps({"rows": rows}))
    return run


def drawn(*arguments: object, folder: Path) -> np.ndarray:
    generate.main([*map(str, arguments), "--output.npz", str(folder / "x.npz"), "--output.num_images", "4"])
    with np.load(folder / "x.npz") as arrays:
        return arrays["arr_0"]


def test_a_folder_draws_as_its_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "shared"
    share.main([str(run), "--share.output", str(out), "--share.num_samples", "6"])
    assert "No licence is set" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "generator.toml", "model.safetensors", "samples.png", "tokenizer.safetensors",
    }  # fmt: skip
    assert Image.open(out / "samples.png").size == (6 * 18 - 2, 16)
    assert np.array_equal(
        drawn(out, "--sampling.mixed_precision", "fp32", folder=tmp_path), drawn(run, folder=tmp_path)
    )
    with pytest.raises(UserError, match="is not empty"):
        share.main([str(run), "--share.output", str(out)])


def test_the_page_about_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first command and the Python of docs/sharing.md."""
    page = (ROOT / "docs" / "sharing.md").read_text()
    command = re.search(r"```\n(grpo share runs/mine .*)\n```", page)[1]
    monkeypatch.chdir(tmp_path)
    share.main(command.split()[2:])
    names = {}
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], names)
    assert len(names["images"]) == 4


def test_the_card(run: Path, tmp_path: Path) -> None:
    flags = [
        "--share.license",
        "mit",
        "--share.base_model",
        "me/base",
        "--share.title",
        "Mine",
        "--share.num_samples",
        "0",
    ]
    share.main([str(run), "--share.output", str(tmp_path / "shared"), *flags])
    card = (tmp_path / "shared/README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["license"], head["base_model"], head["library_name"]) == ("mit", "me/base", "autoregressive-grpo")
    assert "# Mine\n" in card
    assert "samples.png" not in card
    for line in (
        "| fid | 1.25 |", "| accuracy | - |", "5000 images.",  # of evaluation.json
        "| GRPO \\| 1 | 2 |",  # of the quickstart's table
        "2.5", "0.25",  # of the judge; the reward at the end
        "- Weights at the start: base.pt", "- Job: `grpo train`", "cfg_scale = 2.0",
    ):  # fmt: skip
        assert line in card, line
    assert "secret" not in card
    assert str(tmp_path) not in card


def test_a_card_without_a_licence_says_so(run: Path, tmp_path: Path) -> None:
    share.main([str(run), "--share.output", str(tmp_path / "shared"), "--share.num_samples", "0"])
    card = (tmp_path / "shared/README.md").read_text()
    assert "license" not in yaml.safe_load(card.split("---\n")[1])
    assert "## Licence\n\nNot set." in card


def test_places_lose_their_folders() -> None:
    told = {
        "a": "/home/me/x.pt",
        "b": {"url": "https://me:password@host/score", "c": None},
        "d": "runs/x",
        "e": {},
        "f": 1,
    }
    assert without_places(told) == {"a": "x.pt", "b": {"url": "score"}, "d": "runs/x", "f": 1}
    assert without_places({"dir": "s3://bucket/runs/", "home": "~/x/y"}) == {"dir": "runs", "home": "y"}


def test_texts_and_bare_weights(tmp_path: Path) -> None:
    """Without a run; samples by a prompt."""
    from grpo.models import save_weights
    from tests.sharing.tiny import tiny_gpt, tiny_tokenizer

    save_weights(tmp_path / "gpt.pt", tiny_gpt(cls_token_num=6, caption_dim=WIDTH).state_dict())
    save_weights(tmp_path / "vq.pt", tiny_tokenizer().state_dict())
    flags = [
        "--model.name", "GPT-tiny", "--model.checkpoint", tmp_path / "gpt.pt", "--model.cls_token_num", 6,
        "--model.caption_dim", WIDTH, "--text.encoder", "words", "--tokenizer.name", "VQ-tiny",
        "--tokenizer.checkpoint", tmp_path / "vq.pt", "--tokenizer.codebook_size", 32,
        "--tokenizer.downsample_size", 4, "--sampling.image_size", 16,
    ]  # fmt: skip
    out = tmp_path / "shared"
    share.main(
        [*map(str, flags), "--share.output", str(out), "--sampling.prompt", "a red dot", "--share.num_samples", "2"]
    )
    assert (out / "samples.png").is_file()
    assert "## Results" not in (out / "README.md").read_text()
    again = drawn(out, "--sampling.prompt", "a red dot", "--sampling.mixed_precision", "fp32", folder=tmp_path)
    images = ImageGenerator.from_pretrained(out, precision="fp32", device="cpu")(prompts=["a red dot"], num_images=4)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), again)


def test_push(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    sent = []

    class Hub:
        def __init__(self, token: object) -> None:
            pass

        def create_repo(self, **asked: object) -> object:
            sent.append(asked)
            return type("Made", (), {"repo_id": asked["repo_id"]})

        def upload_folder(self, *, folder_path: Path, **_: object) -> str:
            sent.append({path.name for path in Path(folder_path).iterdir()})
            return "https://hub/me/mine"

    flags = ["--share.num_samples", "0"]
    with pytest.raises(UserError, match="give NAME/REPOSITORY"):
        share.main([str(run), "--share.output", str(tmp_path / "a"), "--share.push", "mine"])
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    share.main([str(run), "--share.output", str(tmp_path / "b"), "--share.push", "me/mine", *flags])
    assert sent[0] == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert sent[1] == {path.name for path in (tmp_path / "b").iterdir()}
    assert "pushed: https://hub/me/mine" in capsys.readouterr().out

    def refuse(self: Hub, **_: object) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(Hub, "create_repo", refuse)
    with pytest.raises(
        UserError, match=r"share\.push: me/mine could not be written: 401 Unauthorized; `hf auth login`"
    ):
        share.main([str(run), "--share.output", str(tmp_path / "c"), "--share.push", "me/mine", *flags])
    assert (tmp_path / "c/README.md").is_file()  # what was written stays


def test_what_others_left_beside_a_run_is_no_part_of_the_card(run: Path, tmp_path: Path) -> None:
    text = json.loads((run / "evaluation.json").read_text())
    text["metrics"] = {"a\n\n# heading <script>": {"fid": 1.5}}
    (run / "evaluation.json").write_text(json.dumps(text))
    (run.parent / "results.json").write_text('["of something else"]')
    share.main([str(run), "--share.output", str(tmp_path / "shared"), "--share.num_samples", "0"])
    card = (tmp_path / "shared/README.md").read_text()
    assert "| a  # heading &lt;script> |" in card
    assert "<script" not in card
