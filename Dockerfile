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
    && mkdir --mode=1777 /home/anyone

# Data, models and runs are mounted where a recipe names them, at the same path as outside. Runs as root, as the base image
# does, so that a mounted folder can be written to whoever owns it; `docker run --user` makes the files somebody's own.
ENV PYTHONUNBUFFERED=1 HOME=/home/anyone
HEALTHCHECK --interval=24h --timeout=10m --retries=1 CMD ["bft-megatron", "doctor"]
CMD ["bft-megatron", "--help"]
