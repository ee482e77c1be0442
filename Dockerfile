# The agent in an image: BPF objects and the wheel are built in the first stage, the second has what it runs on.
#   docker build -t isolator .
#   docker run --privileged --network host --pid host -v /run:/run:rshared -v /sys/fs/bpf:/sys/fs/bpf \
#     -v ./isolator.yaml:/etc/isolator/isolator.yaml:ro -v ./policies:/etc/isolator/policies:ro isolator
# A first version: it is not built or tested by `make test` yet.
FROM debian:12-slim AS build
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends make
WORKDIR /src
COPY . .
RUN make setup bpf
RUN python3 -m venv --without-pip /opt/isolator \
 && export VIRTUAL_ENV=/opt/isolator UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never \
 && build/bootstrap/bin/uv pip sync -q --require-hashes requirements.lock \
 && build/bootstrap/bin/uv pip install -q --no-deps --no-build-isolation .

FROM debian:12-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends libbpf1 python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/isolator /opt/isolator
ENTRYPOINT ["/opt/isolator/bin/isolator"]
CMD ["run", "-c", "/etc/isolator/isolator.yaml"]
