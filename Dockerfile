# One image for every part of a fleet: Prefect's server, its workers, `tokencore follow`, any command.
#
#   docker build --tag tokencore .
#   docker build --tag tokencore --secret id=pip,src=$HOME/.config/pip/pip.conf .      for a package index of your own
#
# BASE has python3 3.11 or newer with venv, and useradd. A health check needs Docker's image format: buildah and podman
# want `--format docker`.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /opt/tokencore
COPY constraints.txt pyproject.toml README.md LICENSE prefect.yaml ./
COPY flows flows
COPY tokencore tokencore
# Editable: what runs is this folder, as with `make up`, and prefect.yaml is in it. pip stays behind. Byte-code is
# trusted without a look at the sources, whose times no layer has to keep.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv .venv \
    && .venv/bin/python -m pip install --quiet --no-cache-dir 'pip>=25' \
    && .venv/bin/python -m pip install --quiet --no-cache-dir --no-compile --constraint constraints.txt --editable '.[flows,fleet]' \
    && .venv/bin/python -m pip uninstall --quiet --yes pip \
    && { .venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash .venv/lib flows tokencore || true; }

FROM ${BASE}
RUN useradd --uid 1000 --create-home tokencore \
    && install --directory --mode 0700 --owner tokencore --group tokencore /var/lib/tokencore
COPY --from=build /opt/tokencore /opt/tokencore
ENV PATH=/opt/tokencore/.venv/bin:$PATH \
    KIS_TOKEN_DIR=/var/lib/tokencore \
    PREFECT_SERVER_API_HOST=0.0.0.0
USER 1000:1000
WORKDIR /home/tokencore
VOLUME /var/lib/tokencore
EXPOSE 4200
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:4200/api/health', timeout=4)"]
CMD ["python", "-m", "flows.stack", "run"]
