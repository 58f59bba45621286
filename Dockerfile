# The image: the static binary, the CA certificates, and no shell. It runs as user 65532 and keeps the sign-in in /data.
#
#   docker build -t qwen-go-proxy .
#
# This needs BuildKit, which Docker uses by default since version 23. podman and buildah build it too, with --format docker, because
# the OCI format has no HEALTHCHECK. The version comes from .git. Without .git, in an unpacked archive or a linked work tree, the
# version is "dev". --build-arg VERSION=, COMMIT= and DATE= set the version and the image's labels.

FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY . .
ARG TARGETOS
ARG TARGETARCH
ARG VERSION
ARG COMMIT
ARG DATE
# .dockerignore leaves files out: git checkout puts them back, because Go calls a version with missing files dirty.
RUN --mount=type=cache,target=/root/.cache/go-build \
    git ls-files -z --deleted | xargs -0r git checkout -q -- && \
    CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath \
    -ldflags "-s -w -X main.buildVersion=$VERSION -X main.buildCommit=$COMMIT -X main.buildDate=$DATE" \
    -o /out/qwen-go-proxy . && mkdir /out/data

FROM gcr.io/distroless/static-debian13:nonroot
ARG VERSION
ARG COMMIT
ARG DATE
LABEL org.opencontainers.image.title="qwen-go-proxy" \
      org.opencontainers.image.description="An OpenAI-compatible server in front of Alibaba's Qwen models" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.created="$DATE"
COPY --from=build /out/qwen-go-proxy /qwen-go-proxy
# A new volume gets its owner from this directory.
COPY --from=build --chown=65532:65532 /out/data /data
VOLUME /data
ENV QWEN_DIR=/data
# A number, so that Kubernetes can see that it is not root.
USER 65532:65532
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s CMD ["/qwen-go-proxy", "healthcheck"]
ENTRYPOINT ["/qwen-go-proxy"]
