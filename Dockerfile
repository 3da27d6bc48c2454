# An image with the project, its environment and its tests. The working folder is the checkout, so make works in it.
#
#   docker build -t scmoe .                          CPU: torch without CUDA
#   docker build -t scmoe --build-arg KIND=cuda .    NVIDIA GPUs: torch brings its CUDA libraries, the host the driver
#   docker run --rm scmoe make test-fast
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/scmoe/runs" scmoe make train \
#     ARGS="trainer.accelerator=gpu trainer.devices=1 strategy.ep_size=1"
ARG KIND=cpu

# g++: torch.compile and the fake CUDA device of the tests. iproute2: shaped links of the testbed, which also need
# docker run --cap-add NET_ADMIN --cap-add SYS_ADMIN. procps: tests look for processes that are left behind.
FROM python:3.11-slim AS cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ git iproute2 make procps && rm -rf /var/lib/apt/lists/*

FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ git iproute2 make procps python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM ${KIND}
WORKDIR /scmoe
COPY . .
RUN make setup PIP_ARGS=--no-cache-dir
ENV PATH=/scmoe/.venv/bin:$PATH
CMD ["scmoe", "--help"]
