"""The component for torchx: what each scheduler would be handed, by its own dry run. Nothing is started."""

import pytest

torchx = pytest.importorskip("torchx.runner", reason="needs pip install 'autoregressive-grpo[launch]'")

COMPONENT = "train_configs/launch/torchx_component.py:job"
JOB = ["train", "--config", "published/vapi_xxl_384_two_hosts", "--training.steps", "5"]
SETTINGS = {
    "slurm": {"partition": "gpu"},
    "kubernetes": {"queue": "default"},
    "ray": {"dashboard_address": "127.0.0.1:8265"},
}


def dry_run(scheduler, *flags, folder):
    """The request as text, of two hosts with four GPUs each."""
    if scheduler in ("kubernetes", "ray"):
        pytest.importorskip(scheduler, reason="the scheduler's own package is not installed")
    settings = SETTINGS[scheduler] | ({"job_dir": str(folder / "job")} if scheduler == "slurm" else {})
    with torchx.get_runner() as runner:
        return str(
            runner.dryrun_component(COMPONENT, ["--hosts", "2", "--gpus", "4", *flags, "--", *JOB], scheduler, settings)
        )


@pytest.mark.parametrize("scheduler", SETTINGS)
def test_every_host_gets_an_agent_with_the_job_and_its_gpus(scheduler, tmp_path):
    flags = ["--image", str(tmp_path)] if scheduler == "ray" else ["--image", "registry/grpo:1"]
    request = " ".join(dry_run(scheduler, *flags, folder=tmp_path).split())
    for part in ("torchrun", "--nnodes 2", "--nproc_per_node 4", "--rdzv_backend c10d", " ".join(["-m grpo", *JOB])):
        assert part in request.replace("', '", " ").replace('", "', " "), f"{part} not in {request}"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in request
    gpus = {"slurm": "--gpus-per-task=4", "kubernetes": "nvidia.com/gpu: '4'", "ray": "num_gpus=4"}
    assert request.count(gpus[scheduler]) >= 2, request
