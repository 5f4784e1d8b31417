# A server of the page and the API. CPU by default; for CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 XDG_CACHE_HOME=/data/cache HF_HOME=/data/hub
WORKDIR /source
# torch first: a change of this package does not load it again; versions are those that setup.py admits
# hadolint ignore=DL3013
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
COPY setup.py pyproject.toml MANIFEST.in README.md lavis_lstp.pth ./
COPY lavis_lstp lavis_lstp
COPY webdataset_tools webdataset_tools
COPY projects projects
# hadolint ignore=DL3013
RUN pip install '.[serve]' && pip install --no-deps salesforce-lavis==1.0.2
RUN useradd --create-home --uid 10001 serve && mkdir /data && chown serve /data
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
# beyond loopback a key is needed: LAVIS_LSTP_API_KEY
ENTRYPOINT ["lavis-lstp", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--example"]
