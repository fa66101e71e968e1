"""Every published layout loads strictly; what cannot be loaded is explained; nothing in a file is executed."""

import argparse
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

from grpo.config import Model, UserError
from grpo.formats import read_config, saved_config, write_shards
from grpo.models import (
    GPT,
    MODEL_SPECS,
    GPTConfig,
    VQModel,
    imagenet_names,
    learned_classes,
    load_gpt,
    load_vq,
    read_weights,
    save_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def weights(llamagen) -> dict[str, torch.Tensor]:
    return torch.load(llamagen / "gpt_c2i_fsdp.pt", weights_only=True)


class RunsWhenUnpickled:
    """What a crafted checkpoint holds: creates a file when it is read carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("with_arguments", [True, False])
def test_pickled_layouts(tmp_path, weights, gpt_config, key, with_arguments):
    content = weights if key is None else {key: weights, "steps": 3}
    if with_arguments and key is not None:
        content["args"] = argparse.Namespace(gpt_model="tiny", lr=1e-4)
    torch.save(content, tmp_path / "weights.pt")
    assert_same(load_gpt(tmp_path / "weights.pt", gpt_config).state_dict(), weights)


def test_released_layouts(llamagen, weights, gpt_config):
    for name in ("gpt_c2i.pt", "gpt_c2i_fsdp.pt"):
        model = load_gpt(llamagen / name, gpt_config)
        assert not model.training
        assert model.config == gpt_config
        assert_same(model.state_dict(), weights)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth", "weights"])
def test_what_is_saved_is_read_again(tmp_path, weights, name):
    save_weights(tmp_path / name, weights)
    assert_same(read_weights(tmp_path / name), weights)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_layout_can_be_named_apart_from_the_suffix(tmp_path, weights):
    save_weights(tmp_path / "weights.bin", weights, layout="llamagen")
    assert_same(torch.load(tmp_path / "weights.bin", weights_only=True)["model"], weights)


@pytest.mark.parametrize("nested", [True, False])
def test_folder_of_a_distributed_checkpoint(tmp_path, weights, gpt_config, nested):
    content = {"model": weights, "optimizer": {"step": torch.ones(1)}} if nested else weights
    write_shards(tmp_path / "step-000001", content)
    assert_same(load_gpt(tmp_path / "step-000001", gpt_config).state_dict(), weights)


def test_consolidated_file_of_a_folder_without_shards(tmp_path, weights, gpt_config):
    folder = tmp_path / "step-000001"
    dcp.save({"model": {"other": torch.ones(1)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"model": weights}, folder / "consolidated.pth")
    assert_same(load_gpt(folder, gpt_config).state_dict(), weights)


def test_low_precision_files_load_in_full_precision(tmp_path, weights, gpt_config):
    safetensors.torch.save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "w.safetensors"
    )
    loaded = load_gpt(tmp_path / "w.safetensors", gpt_config).state_dict()
    assert_same(loaded, {name: tensor.bfloat16().float() for name, tensor in weights.items()})


def test_own_weights_carry_their_sizes(tmp_path):
    config = GPTConfig(dim=96, n_layer=1, n_head=6, n_kv_head=3, vocab_size=12, num_classes=3, block_size=36)
    model = GPT(replace(config, dropout=0.5, class_dropout=0.5))
    save_weights(tmp_path / "gpt.safetensors", model.state_dict(), config=model.config)
    loaded = load_gpt(tmp_path / "gpt.safetensors")
    assert loaded.config == config
    assert (loaded.config.dropout, loaded.config.class_dropout) == (0, 0)  # no sizes: they are not written
    assert_same(loaded.state_dict(), model.state_dict())
    assert load_gpt(tmp_path / "gpt.safetensors", replace(config, dropout=0.1)).config.dropout == 0.1


def test_own_tokenizers_carry_their_sizes(tmp_path, vq_configs):
    model = VQModel(vq_configs["vq8"])
    save_weights(tmp_path / "vq.safetensors", model.state_dict(), config=model.config)
    assert load_vq(tmp_path / "vq.safetensors").config == vq_configs["vq8"]


@pytest.mark.parametrize("load", [load_gpt, load_vq])
def test_sizes_are_asked_for_where_nothing_says_them(tmp_path, llamagen, load):
    path = llamagen / ("gpt_c2i.pt" if load is load_gpt else "vq16.pt")
    with pytest.raises(UserError, match=rf"nothing in it says its sizes; pass a config, such as {load.__name__}\(path"):
        load(path)
    save_weights(tmp_path / "weights.safetensors", read_weights(path))
    with pytest.raises(UserError, match="nothing in it says its sizes"):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 2}, "n_head 4, the recipe wants 2; set model.name = GPT-tiny"),
        ({"block_size": 256}, "block_size 36, the recipe wants 256; set the image size to that of 36 codes"),
        ({"rope_base": 100}, "rope_base 10000.0, the recipe wants 100; set model.name = GPT-tiny"),
        ({"vocab_size": 256}, "vocab_size 12, the recipe wants 256; set tokenizer.codebook_size = 12"),
    ],
)
def test_a_config_that_differs_from_the_files_own_is_explained(tmp_path, change, message):
    config = MODEL_SPECS["GPT-tiny"].config(image_size=96, vocab_size=12, num_classes=3)
    save_weights(tmp_path / "gpt.safetensors", GPT(config).state_dict(), config=config)
    with pytest.raises(UserError, match=message):
        load_gpt(tmp_path / "gpt.safetensors", replace(config, **change))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable"),
        ("[" * 100_000, "not a readable"),
        ("[1]", "sizes in this file are damaged"),
        ("{}", "no sizes of a GPT"),
        ('{"dim": "64", "n_layer": 2, "n_head": 4}', "no sizes of a GPT"),
        ('{"dim": 64, "n_layer": 2, "n_head": 4, "depth": 3}', "unknown depth"),
        ('{"dim": 64, "n_layer": 2, "n_head": 3}', "multiple of 4"),
        ('{"dim": 64, "n_layer": 1000, "n_head": 4}', "the sizes that are written with the weights are not"),
        ('{"dim": 64, "n_layer": 1000000000, "n_head": 4}', "a size that is not in 0"),
        ('{"dim": 64, "n_layer": 2, "n_head": 0}', "a size that is not in 0"),
        ('{"dim": 64, "n_layer": 2, "n_head": 4, "ffn_dim_multiplier": NaN}', "a size that is not in 0"),
        ('{"dim": 64, "n_layer": 2, "n_head": 4, "dropout": -1.0}', "unknown dropout"),
    ],
)
def test_crafted_sizes_are_refused(tmp_path, weights, text, message):
    path = tmp_path / "gpt.safetensors"
    safetensors.torch.save_file(weights, path, metadata={"config": text})
    with pytest.raises(UserError, match=message):
        load_gpt(path)


def test_a_name_with_a_huge_index_builds_no_huge_model(tmp_path, weights, gpt_config):
    torch.save({**weights, "layers.999999999.ffn_norm.weight": torch.ones(1)}, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="n_layer 3, the recipe wants 2"):
        load_gpt(tmp_path / "gpt.pt", gpt_config)


def test_other_layouts_have_no_place_for_sizes(tmp_path, weights, gpt_config):
    for name in ("weights.pt", "weights"):
        save_weights(tmp_path / name, weights, config=gpt_config)
        assert read_config(tmp_path / name) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_what_is_written_has_the_mode_of_any_new_file(tmp_path, weights, name):
    (tmp_path / "new").touch()
    save_weights(tmp_path / name, weights)
    assert (tmp_path / name).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_tokenizer_without_the_window_of_used_codes(tmp_path, llamagen, vq_configs):
    weights = read_weights(llamagen / "vq8.pt")
    del weights["quantize.codebook_used"]
    save_weights(tmp_path / "vq.safetensors", weights, config=vq_configs["vq8"])
    assert load_vq(tmp_path / "vq.safetensors").quantize.codebook_used.shape == (65536,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 256}, "vocab_size 128, the recipe wants 256; set tokenizer.codebook_size = 128"),
        ({"num_classes": 1000}, "num_classes 10, the recipe wants 1000; set model.num_classes = 10"),
        ({"n_layer": 3}, "n_layer 2, the recipe wants 3; set model.name = GPT-tiny"),
        ({"multiple_of": 32}, "ffn_dim 256, the recipe wants 192; set model.name = GPT-tiny"),
        ({"n_kv_head": 1}, "qkv_dim 192, the recipe wants 96; set model.name = GPT-tiny"),
    ],
)
def test_gpt_of_another_size_is_explained(llamagen, gpt_config, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_gpt(llamagen / "gpt_c2i.pt", replace(gpt_config, **change))
    assert len(caught.value.problems) == 1


def test_tokenizer_of_another_size_is_explained(llamagen, vq_configs):
    other = replace(vq_configs["vq16"], codebook_size=256, ch_mult=(1, 1, 1, 2), codebook_embed_dim=4)
    with pytest.raises(UserError) as caught:
        load_vq(llamagen / "vq16.pt", other)
    codebook, dimensions, name = caught.value.problems
    assert "set tokenizer.codebook_size = 128" in codebook
    assert "set tokenizer.codebook_embed_dim = 8" in dimensions
    assert "ch_mult (1, 1, 1, 1, 2), the recipe wants (1, 1, 1, 2); no tokenizer.name has these sizes" in name


def test_weights_of_another_kind_are_named(llamagen):
    with pytest.raises(UserError, match=r"not the weights of a GPT .* those of a VQ tokenizer"):
        load_gpt(llamagen / "vq16.pt")
    with pytest.raises(UserError, match=r"not the weights of a VQ tokenizer .* those of a GPT"):
        load_vq(llamagen / "gpt_c2i.pt")


@pytest.mark.parametrize("shape", [(300, 64), (300,)])
def test_a_fragment_of_a_model_is_refused(tmp_path, shape):
    torch.save({"model": {"tok_embeddings.weight": torch.zeros(shape)}}, tmp_path / "gpt.pt")
    with pytest.raises(UserError, match="the weights are not complete"):
        load_gpt(tmp_path / "gpt.pt")


def test_missing_and_superfluous_weights_are_named(tmp_path, weights, gpt_config):
    weights["extra.weight"] = weights.pop("norm.weight")
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"1 missing \(norm.weight, ...\); 1 unknown \(extra.weight, ...\)"):
        load_gpt(tmp_path / "weights.pt", gpt_config)


def test_a_bare_state_dict_can_be_insisted_on(llamagen):
    with pytest.raises(UserError, match="does not hold a bare state dict"):
        read_weights(llamagen / "gpt_c2i.pt", bare=True)
    assert read_weights(llamagen / "gpt_c2i_fsdp.pt", bare=True)


def test_crafted_pickle_is_refused_and_not_run(tmp_path, weights):
    marker = tmp_path / "ran"
    torch.save({"model": weights, "args": RunsWhenUnpickled(marker)}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"refused, reading it could run code: it holds posix\.mkdir"):
        read_weights(tmp_path / "weights.pt")
    assert not marker.exists()


def test_crafted_checkpoint_folder_is_refused_and_not_run(tmp_path, weights):
    marker = tmp_path / "ran"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".metadata").write_bytes(pickle.dumps(RunsWhenUnpickled(marker)))
    with pytest.raises(UserError, match="behind a pickle"):
        read_weights(tmp_path / "folder")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04damaged", b"PK\x03\x04damaged"])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_weights(tmp_path / name)


def test_cut_off_files_are_refused(tmp_path, weights):
    for name in ("weights.pt", "weights.safetensors"):
        save_weights(tmp_path / name, weights)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:50_000])
        with pytest.raises(UserError, match=name):
            read_weights(tmp_path / name)


def test_paths_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        read_weights(tmp_path)
    torch.save({"losses": [1.0]}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not hold a state dict"):
        read_weights(tmp_path / "other.pt")


def test_nothing_is_written_in_the_way_of_a_folder_or_under_an_unknown_suffix(tmp_path, weights):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="not overwritten"):
        save_weights(tmp_path / "taken", weights)
    with pytest.raises(UserError, match=r"not \.gguf"):
        save_weights(tmp_path / "weights.gguf", weights)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_names_of_classes_go_with_the_weights(tmp_path, weights, gpt_config):
    names = tuple(f"class {i}" for i in range(gpt_config.num_classes))
    save_weights(tmp_path / "gpt.safetensors", weights, config=replace(gpt_config, class_names=names))
    assert load_gpt(tmp_path / "gpt.safetensors").config.class_names == names
    recipe = Model(checkpoint=str(tmp_path / "gpt.safetensors"), num_classes=gpt_config.num_classes)
    assert learned_classes(recipe) == names
    assert learned_classes(recipe.model_copy(update={"checkpoint": None})) == ()
    assert learned_classes(recipe.model_copy(update={"num_classes": 4, "new_classes": 4})) == ()
    with pytest.raises(UserError, match=rf"{len(names)} classes; with model.new_classes = 1, "):
        learned_classes(recipe.model_copy(update={"new_classes": 1}))


def test_names_of_classes_of_weights_without(tmp_path, weights):
    save_weights(tmp_path / "gpt.pt", weights)
    recipe = Model(checkpoint=str(tmp_path / "gpt.pt"), num_classes=3)
    assert learned_classes(recipe) == ("0", "1", "2")
    assert learned_classes(recipe.model_copy(update={"num_classes": 1000})) == imagenet_names()
    assert learned_classes(recipe.model_copy(update={"num_classes": 1004, "new_classes": 4}))[7] == "cock"


@pytest.mark.parametrize("names", ['"abc"', "[1, 2]", "{}", '["a"]'])
def test_damaged_names_of_classes(tmp_path, weights, gpt_config, names):
    sizes = {**saved_config(gpt_config), "class_names": json.loads(names)}
    save_weights(tmp_path / "gpt.safetensors", weights, config=sizes)
    with pytest.raises(UserError, match="damaged"):
        load_gpt(tmp_path / "gpt.safetensors")
    with pytest.raises(UserError, match=r"gpt\.safetensors"):
        learned_classes(Model(checkpoint=str(tmp_path / "gpt.safetensors"), num_classes=gpt_config.num_classes))


@pytest.mark.parametrize("kept", [0, "all"])
def test_new_classes_start_as_the_unconditional_one(tmp_path, weights, gpt_config, kept):
    table = weights["cls_embedding.embedding_table.weight"]
    kept = len(table) - 1 if kept else 0
    save_weights(tmp_path / "gpt.pt", weights)
    model = load_gpt(tmp_path / "gpt.pt", replace(gpt_config, num_classes=kept + 3), new_classes=3)
    found = model.state_dict()
    assert torch.equal(found["cls_embedding.embedding_table.weight"][:kept], table[:kept])
    assert torch.equal(found["cls_embedding.embedding_table.weight"][kept:], table[-1:].expand(4, -1))
    assert_same({**found, "cls_embedding.embedding_table.weight": table}, weights)
    tokens, base = torch.tensor([[1, 2, 3]]), load_gpt(tmp_path / "gpt.pt", gpt_config)
    for class_id in range(kept, kept + 4):
        assert torch.equal(model(tokens, torch.tensor([class_id])), base(tokens, torch.tensor([len(table) - 1])))
