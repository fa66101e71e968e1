"""recipes/convert.py changes the layout of weights and nothing else."""

from pathlib import Path

import pytest
import torch

from grpo.config import UserError
from grpo.jobs.convert import main
from grpo.models import GPT, MODEL_SPECS, load_gpt, read_weights, save_weights

RELEASED = Path(__file__).parents[1] / "fixtures" / "llamagen" / "gpt_c2i.pt"


def convert(source: Path, target: Path, *more: str) -> None:
    main(["--convert.input", str(source), "--convert.output", str(target), *more])


def test_round_trip_through_every_layout(tmp_path, capsys):
    source = RELEASED
    for name in ("gpt.safetensors", "gpt-folder", "gpt.pt"):
        convert(source, tmp_path / name)
        source = tmp_path / name
        assert f"{source}: 18 tensors" in capsys.readouterr().out
    wanted, found = read_weights(RELEASED), read_weights(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_format_overrules_the_name(tmp_path):
    convert(RELEASED, tmp_path / "gpt.bin", "--convert.format", "safetensors")
    convert(RELEASED, tmp_path / "gpt.safetensors")
    assert (tmp_path / "gpt.bin").read_bytes() == (tmp_path / "gpt.safetensors").read_bytes()


def test_nothing_is_overwritten(tmp_path):
    target = tmp_path / "gpt.pt"
    target.write_text("mine")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        convert(RELEASED, target)
    assert target.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        convert(RELEASED, tmp_path / "file" / "gpt.pt")


def test_a_runs_folder_stands_for_its_final_weights(tmp_path):
    config = MODEL_SPECS["GPT-tiny"].config(image_size=96, vocab_size=12, num_classes=3)
    final = GPT(config).state_dict()
    save_weights(tmp_path / "run/model.safetensors", final, config=config)
    average = {name: 2 * tensor for name, tensor in final.items()}
    save_weights(tmp_path / "run/model_ema.safetensors", average, config=config)
    convert(tmp_path / "run", tmp_path / "gpt.safetensors")
    found = load_gpt(tmp_path / "gpt.safetensors")
    assert found.config == config
    assert all(torch.equal(tensor, final[name]) for name, tensor in found.state_dict().items())


def test_the_sizes_go_with_the_weights(tmp_path):
    config = MODEL_SPECS["GPT-tiny"].config(image_size=96, vocab_size=12, num_classes=3)
    save_weights(tmp_path / "gpt.safetensors", GPT(config).state_dict(), config=config)
    convert(tmp_path / "gpt.safetensors", tmp_path / "copy.safetensors")
    assert load_gpt(tmp_path / "copy.safetensors").config == config
    convert(tmp_path / "gpt.safetensors", tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="nothing in it says its sizes"):
        load_gpt(tmp_path / "gpt.pt")
