# The image of a training node. Not yet built with, or run on, GPUs.
#
#   docker build -t arat-dist .
#   docker run --rm arat-dist demo
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/home/arat/runs" arat-dist train NAME
#
# The base is Python's own image rather than CUDA's: torch's wheels bring their CUDA libraries along, so a CUDA base
# would hold them twice; the driver comes from the host through the NVIDIA container toolkit. One stage, because the
# compiler is needed at run time as well: Triton and torch.compile call it.
FROM python:3.11-slim-bookworm

# FFCV builds against OpenCV and turbojpeg; wget is what KubeRay's probes call. The versions are those of the base's
# Debian release: single ones would leave its mirrors.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libopencv-dev libturbojpeg0-dev pkg-config wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY arat_dist arat_dist
COPY launcher launcher
COPY recipes recipes
# Into the image's own Python, so that `arat` and `ray` are on the PATH of login shells too, which KubeRay starts.
RUN pip install --no-cache-dir -c constraints.txt pip setuptools \
    && pip install --no-cache-dir -c constraints.txt --build-constraint constraints.txt .

RUN useradd --create-home --uid 1000 arat
USER 1000
WORKDIR /home/arat
ENV RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
ENTRYPOINT ["arat"]
CMD ["--help"]
