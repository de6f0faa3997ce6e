# The image of a training job:  docker build -t bft-megatron .
# On NVIDIA's PyTorch image, whose torch, Transformer Engine and apex are built for each other and for its CUDA, and stay.
# 26.06 is the one that Megatron-Core 0.19 is developed in.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/bft-megatron
# The requirements change less often than the code: a layer of their own.
COPY pyproject.toml launch/image.py /opt/bft-megatron/build/
RUN python build/image.py install build/pyproject.toml

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && python build/image.py verify \
    && rm -r build \
    && useradd --create-home --uid 10001 bft

# Data, models and runs are mounted where a recipe names them, at the same path as outside.
USER 10001
ENV PYTHONUNBUFFERED=1
# One step of the tiny model on the CPU: every import, the data, the loss and a checkpoint.
HEALTHCHECK --interval=24h --timeout=10m --retries=1 CMD ["sh", "-c", "rm -rf /tmp/health && bft-megatron train recipes/tiny.yaml device=cpu train.iterations=1 train.warmup_iterations=0 output=/tmp/health"]
CMD ["bft-megatron", "--help"]
