# Untried: no machine of ours could build images. PyTorch's wheels bring CUDA; the host needs NVIDIA's driver alone.
#   docker build -t grpo . && docker run --gpus all --ipc=host -v "$PWD:/work" grpo train --config debug
#   docker run --gpus all --ipc=host -v "$PWD:/work" --entrypoint torchrun grpo --nproc_per_node=8 -m grpo train --config ...
FROM python:3.11-slim

RUN apt-get update && apt-get install --no-install-recommends -y gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /opt/grpo
RUN pip install --no-cache-dir -c /opt/grpo/constraints.txt "/opt/grpo[evaluation,low-bit,rewards,text]"
WORKDIR /work
ENTRYPOINT ["grpo"]
