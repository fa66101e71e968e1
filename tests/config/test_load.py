"""Files and flags become a recipe, or one error with every mistake."""

from pathlib import Path

import pytest

from grpo.config import (
    REWARD_KINDS,
    ConvertRecipe,
    GenerateRecipe,
    GRPORecipe,
    PretrainRecipe,
    UserError,
    job_of_file,
    load_recipe,
)
from grpo.config.keys import section_keys
from grpo.config.reference_flags import ALL_FLAGS

MINIMAL = ["--data.name", "synthetic"]


@pytest.fixture
def recipe_file(tmp_path: Path):
    """Writes a recipe file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "experiment.toml"
        path.write_text(text)
        return str(path)

    return write


def problems_of(recipe_class: type, argv: list[str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_class, argv)
    return caught.value.problems


def test_flag_overrides_file_overrides_default(recipe_file) -> None:
    path = recipe_file('[data]\nname = "synthetic"\n[optimizer]\nlr = 1e-3\nbeta1 = 0.5\n')
    recipe = load_recipe(GRPORecipe, ["--config", path, "--optimizer.lr", "2"])
    assert (recipe.optimizer.lr, recipe.optimizer.beta1, recipe.optimizer.beta2) == (2.0, 0.5, 0.95)


def test_argv_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *MINIMAL, "--training.steps", "3"])
    assert load_recipe(GRPORecipe).training.steps == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [(["--metrics.wandb"], True), (["--metrics.wandb", "true"], True), (["--metrics.wandb=false"], False), ([], False)],
)
def test_switches(argv: list[str], expected: bool) -> None:
    assert load_recipe(GRPORecipe, [*argv, *MINIMAL]).metrics.wandb is expected


@pytest.mark.parametrize(("text", "expected"), [("all", "all"), ("3", [3]), ("207,360,387", [207, 360, 387])])
def test_list_flags(text: str, expected: object) -> None:
    needed = ["--model.checkpoint", "gpt.pt", "--tokenizer.checkpoint", "vq.pt", "--output.grid", "grid.png"]
    assert load_recipe(GenerateRecipe, [*needed, "--sampling.class_ids", text]).sampling.class_ids == expected


def test_list_in_file(recipe_file) -> None:
    path = recipe_file(
        "[sampling]\nclass_ids = [1, 2]\n"
        '[model]\ncheckpoint = "gpt.pt"\n[tokenizer]\ncheckpoint = "vq.pt"\n[output]\nnpz = "images.npz"\n'
    )
    assert load_recipe(GenerateRecipe, ["--config", path]).sampling.class_ids == [1, 2]


def test_none_unsets_an_optional_key(recipe_file) -> None:
    path = recipe_file(
        '[data]\nname = "synthetic"\n[training]\ngrad_precision = "bf16"\n[model]\ncheckpoint = "none"\n'
    )
    recipe = load_recipe(GRPORecipe, ["--config", path, "--training.grad_precision", "none"])
    assert recipe.training.grad_precision is None
    assert recipe.model.checkpoint is None
    assert problems_of(GRPORecipe, [*MINIMAL, "--optimizer.lr", "none"]) == [
        "--optimizer.lr none: optimizer.lr must be a number >= 0"
    ]


def test_negative_numbers() -> None:
    recipe = load_recipe(GRPORecipe, [*MINIMAL, "--objective.entropy_weight=-1e-3", "--reward-rec-weight", "-0.5"])
    assert recipe.objective.entropy_weight == -1e-3
    assert recipe.reward.tables["reconstruction"].weight == -0.5


def test_all_mistakes_are_reported_together(recipe_file) -> None:
    path = recipe_file(
        "steps = 3\n"
        'rollout = "teacher_forced"\n'
        "[optimizer]\nlr = '0.1'\nbeta3 = 1\n"
        "[objective]\nclip_rang = 0.2\n"
        "[optimiser]\nlr = 1\n"
        "[weather]\nsun = true\n"
        "[training]\nsteps = 2.5\nbatch_size = true\nmixed_precision = 'int8'\n"
        "[model]\ndropout = 1\n"
        "[data]\nimage_size = 250\nname = 'synthetic'\n"
    )
    argv = ["--config", path, "--lr", "abc", "--top-p=1.5", "--num-generation", "4", "stray", "--zzz", "--ckpt-dir"]
    assert problems_of(GRPORecipe, argv) == [
        "--num-generation: unknown flag; did you mean --num-generations?",
        "stray: unexpected argument; a recipe is given as --config NAME, settings as --section.key VALUE",
        "--zzz: unknown flag",
        "--ckpt-dir: a value is missing (write --ckpt-dir=VALUE if it begins with a minus)",
        f"{path}: steps: unknown key outside of the sections; did you mean training.steps?",
        f"{path}: rollout: is a section: write [rollout] and its keys below",
        f'{path}: optimizer.lr must be a number >= 0, not "0.1"',
        f"{path}: optimizer.beta3: unknown key; did you mean optimizer.beta2?",
        f"{path}: objective.clip_rang: unknown key; did you mean objective.clip_range?",
        f"{path}: [optimiser]: unknown section; did you mean optimizer?",
        f"{path}: [weather]: unknown section; there are model, lora, text, tokenizer, data, rollout, reward, "
        "objective, optimizer, training, parallel, compile, activation_checkpoint, checkpoint, metrics, judge, debug",
        f"{path}: training.steps must be a whole number > 0, not 2.5",
        f"{path}: training.batch_size must be a whole number > 0 or none, not true",
        f'{path}: training.mixed_precision must be one of auto, fp32, tf32, bf16, fp16, not "int8"',
        f"{path}: model.dropout must be a number >= 0 and < 1, not 1",
        "--lr abc: optimizer.lr must be a number >= 0",
        "--top-p 1.5: rollout.top_p must be a number > 0 and <= 1",
        f"{path}: data.image_size = 250 must be a multiple of tokenizer.downsample_size = 16",
    ]


def test_each_message_is_one_line(recipe_file) -> None:
    path = recipe_file("[optimizer]\nlr = '''a\nb'''\n")
    assert not [line for line in problems_of(GRPORecipe, ["--config", path]) if "\n" in line]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--vq-ckp", "vq.pt", "--data-path", "images"], "--vq-ckp: unknown flag; did you mean --vq-ckpt?"),
        (["--vq-ckpt", "--data-path", "images"], "--vq-ckpt: a value is missing"),
        (["--confg", "a.toml"], "--confg: unknown flag; did you mean --config?"),
        (["--config", "nowhere.toml"], "--config nowhere.toml: cannot be read: No such file or directory"),
        (["--config"], "--config: a value is missing"),
    ],
)
def test_a_mistake_is_not_reported_twice(argv: list[str], line: str) -> None:
    """What the mistyped setting would have supplied is not called missing."""
    (problem,) = problems_of(GRPORecipe, argv)
    assert problem.startswith(line)


def test_broken_toml_names_the_place(recipe_file) -> None:
    path = recipe_file("[optimizer]\nlr = \n")
    problems = problems_of(GRPORecipe, ["--config", path, "--top-k", "x"])
    assert problems[0] == f"{path}: is not valid TOML: Invalid value (at line 2, column 6)"
    assert problems[1] == "--top-k x: rollout.top_k must be a whole number >= 0"


def test_key_in_the_wrong_section_is_found(recipe_file) -> None:
    path = recipe_file('[training]\nlr = 1\n[data]\nname = "synthetic"\n')
    assert problems_of(GRPORecipe, ["--config", path]) == [
        f"{path}: training.lr: unknown key; did you mean optimizer.lr?"
    ]


def test_recipe_of_another_job_is_refused(recipe_file) -> None:
    path = recipe_file('job = "train"\n[rollout]\ntop_k = 1\n')
    assert problems_of(PretrainRecipe, ["--config", path]) == [
        f"{path}: is a recipe of `grpo train`, not of `grpo pretrain`"
    ]
    path = recipe_file("job = ['train']\n")
    (problem,) = problems_of(PretrainRecipe, ["--config", path])
    assert problem.startswith(f"{path}: job must be one of train, pretrain, ")


def test_former_names_of_jobs_are_read(recipe_file) -> None:
    path = recipe_file('job = "grpo"\n[data]\nname = "synthetic"\n')
    assert load_recipe(GRPORecipe, ["--config", path]).job == "train"
    assert job_of_file(path) == "train"


def test_shipped_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = load_recipe(GRPORecipe, ["--config", "debug"])
    assert by_name.run_dir == Path("runs/debug")
    assert load_recipe(GRPORecipe, ["--config", "debug.toml"]) == by_name
    assert job_of_file("quickstart/tokenizer") == "tokenizer"
    (problem,) = problems_of(GRPORecipe, ["--config", "quickstart/grp"])
    assert problem.endswith("did you mean the shipped recipe quickstart/grpo?")


def test_combination_names_every_origin(recipe_file) -> None:
    path = recipe_file('[data]\nname = "synthetic"\n[training]\nbatch_size = 12\n')
    assert problems_of(GRPORecipe, ["--config", path, "--sample-batch-size", "4"]) == [
        f"{path}, --sample-batch-size 4: training.batch_size = 12 completions of one optimizer step must divide "
        "rollout.batch_size x rollout.num_generations = 32 completions of one rollout"
    ]


def test_missing_key_names_its_flag() -> None:
    assert problems_of(GRPORecipe, []) == [
        'data.path is required with data.name = "imagenet"; set it by --data-path or in the recipe file',
        'tokenizer.checkpoint is required (only data.name = "synthetic" runs on random weights); set it by --vq-ckpt '
        "or in the recipe file",
    ]
    assert problems_of(ConvertRecipe, ["--convert.input", "a.pt"]) == [
        "convert.output is required; set it by --convert.output or in the recipe file"
    ]


def test_run_folder_has_the_name_of_the_file(recipe_file) -> None:
    path = recipe_file('[data]\nname = "synthetic"\n')
    recipe = load_recipe(GRPORecipe, ["--config", path])
    assert recipe.metrics.run_dir == "runs/experiment"
    assert recipe.checkpoint_dir == "runs/experiment/checkpoints"
    assert load_recipe(GRPORecipe, MINIMAL).run_dir == Path("runs/train")
    moved = load_recipe(GRPORecipe, ["--config", path, "--metrics.run_dir", "there", "--ckpt-dir", "out"])
    assert (moved.run_dir, moved.checkpoint_dir) == (Path("there"), "out")


def test_help_lists_every_key_and_flag(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        load_recipe(GRPORecipe, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in section_keys(GRPORecipe.sections()):
        assert f"  --{key}" in text
    for flag, key in ALL_FLAGS.items():
        assert f"  --{key}, {flag}  (" in text or f"  {flag}  (" in text
    assert "  --optimizer.lr, --lr  (a number >= 0; default 1e-05)\n      Learning rate (peak).\n" in text
    assert f"kinds: {', '.join(REWARD_KINDS)};" in text


def test_help_of_a_section(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        load_recipe(GRPORecipe, ["--help", "reward"])
    text = capsys.readouterr().out
    assert "  --reward.reconstruction.distance, --reward-rec-type  (one of l1, l2; default" in text
    assert "  --reward.class_log_prob.checkpoint  (text; required)" in text
    assert "optimizer" not in text
    with pytest.raises(UserError, match="--help rewards: no section of this job; did you mean reward"):
        load_recipe(GRPORecipe, ["--help", "rewards"])


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--top-k", str(10**20)], f"--top-k {10**20}: rollout.top_k must be a whole number >= 0 and <= 2147483647"),
        (
            ["--global-seed", str(2**63)],
            f"--global-seed {2**63}: training.seed must be a whole number >= 0 and <= {2**63 - 1}",
        ),
        (["--gpt-ckpt", ""], "--gpt-ckpt (empty): model.checkpoint must be text or none, but not empty"),
        (
            ["--num-generations", "5000"],
            "--num-generations 5000: rollout.num_generations must be a whole number > 0 and <= 4096",
        ),
    ],
)
def test_values_that_would_fail_far_below_are_refused(flags: list[str], line: str) -> None:
    assert problems_of(GRPORecipe, [*MINIMAL, *flags]) == [line]


@pytest.mark.parametrize("text", ["-1", "-1e-3", "-.5"])
def test_negative_numbers_need_no_equals_sign(text: str) -> None:
    recipe = load_recipe(GRPORecipe, [*MINIMAL, "--reward-rec-weight", text])
    assert recipe.reward.tables["reconstruction"].weight == float(text)


def test_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes('\ufeff[data]\nname = "synthetic"\n'.encode())
    assert load_recipe(GRPORecipe, ["--config", str(tmp_path / "bom.toml")]).data.name == "synthetic"


def test_the_folder_of_a_shipped_recipe_may_be_left_out_where_its_name_is_unique(monkeypatch, tmp_path):
    whole, short = (load_recipe(GRPORecipe, ["--config", name]) for name in ("published/vapi_xxl_384", "vapi_xxl_384"))
    assert short == whole
    assert short.metrics.run_dir == "runs/vapi_xxl_384"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.toml").write_text("")
    monkeypatch.setattr("grpo.config.load.SHIPPED_RECIPES", tmp_path)
    with pytest.raises(UserError, match="--config same: cannot be read"):
        load_recipe(GRPORecipe, ["--config", "same"])


def test_classes_are_ids_or_names(recipe_file) -> None:
    flags = ["--config", recipe_file('[data]\nname = "synthetic"\nclasses = [7, "goldfish"]\n')]
    assert load_recipe(PretrainRecipe, flags).data.classes == ["7", "goldfish"]
    assert load_recipe(PretrainRecipe, [*flags, "--data.classes", "all"]).data.classes == "all"
    assert load_recipe(PretrainRecipe, [*MINIMAL, "--data.classes", "7,goldfish"]).data.classes == ["7", "goldfish"]
