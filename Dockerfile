# The agent's image. The first stage builds BPF objects and wheel with locked dependencies, the last has what runs.
#   docker build -t isolator .
# How to run it: README.md, "In a container"; deploy/. What it may do and why: docs/container.md.
FROM debian:12-slim AS build
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY .ci .ci
RUN .ci/setup toolchain && .ci/setup uv
COPY Makefile ./
COPY bpf bpf
RUN make bpf
ENV UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_NO_CACHE=1 PATH=/src/build/bootstrap/bin:$PATH
COPY pyproject.toml requirements.lock ./
# The lock has the versions and hashes of far more than runs here: it constrains, pyproject.toml says what.
RUN uv venv -q --python /usr/bin/python3 /opt/isolator \
 && uv pip install -q --no-build --python /opt/isolator -c requirements.lock -r pyproject.toml \
 && uv pip install -q --no-build --python build/bootstrap -c requirements.lock hatchling
COPY README.md LICENSE ./
COPY parsers parsers
COPY isolator isolator
RUN uv build -q --wheel --no-build-isolation --python build/bootstrap/bin/python \
 && uv pip install -q --no-deps --python /opt/isolator dist/*.whl \
 && find /opt/isolator -name '*.so' -exec llvm-strip --strip-unneeded {} + \
 && find /opt/isolator -name '*.pyx' -delete -o -name '*.c' -delete -o -name '*.pxd' -delete \
 && python3 -m compileall -q /opt/isolator

FROM debian:12-slim
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends libbpf1 libnftables1 python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
COPY --from=build /opt/isolator /opt/isolator
ENV PATH=/opt/isolator/bin:$PATH PYTHONDONTWRITEBYTECODE=1
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Isolator" \
      org.opencontainers.image.description="A sidecar-free layer-7 firewall for containers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
# The agent answers; that an endpoint waits for its container is no illness of the agent's.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["/opt/isolator/bin/python", "-m", "isolator.control.client"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["isolator"]
CMD ["run", "-c", "/etc/isolator/isolator.yaml"]
