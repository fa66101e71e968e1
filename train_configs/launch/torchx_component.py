"""A job of grpo on many GPUs, for the schedulers that torchx knows: SLURM, Kubernetes (Volcano), Ray and others.

torchx run --scheduler slurm train_configs/launch/torchx_component.py:job --hosts 2 -- \\
    train --config published/vapi_xxl_384_two_hosts

It needs `pip install 'autoregressive-grpo[launch]'` where it is called; docs/scaling.md has a line for each scheduler.
"""

from torchx.components.dist import ddp
from torchx.specs import AppDef


def job(
    *arguments: str,
    hosts: int = 1,
    gpus: int = 8,
    image: str = "grpo:latest",
    name: str = "grpo",
    cpus: int = 64,
    memory_mb: int = 1_000_000,
    restarts: int = 20,
) -> AppDef:
    """One torchrun agent a host, which starts one process a GPU; a lost process or host is started again.

    Args:
        arguments: the job and its flags, as after the command `grpo`
        hosts: how many
        gpus: of each host
        image: container with the project installed, or for SLURM and Ray the folder to start in
        name: of the job, for the scheduler
        cpus: of each host
        memory_mb: of each host
        restarts: how often it may be started again
    """
    return ddp(
        *arguments,
        m="grpo",
        j=f"{hosts}x{gpus}",
        gpu=gpus,
        cpu=cpus,
        memMB=memory_mb,
        image=image,
        name=name,
        max_retries=restarts,
        # See docs/scaling.md: without it a host that comes back is told an address from before it left.
        env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "8"},
    )
