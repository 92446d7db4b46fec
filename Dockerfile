# The gateway is one static binary, so its image is that binary in an empty file system: nothing to patch, no shell to
# get into. Beside it are only the CA certificates that tls:// backends are verified by where the map names no CA.
#
#   docker build -t tlsnat .
#
# The image to build in. Its tag names the patch release, and may still be moved by its publisher; for a release give its
# digest, which may not, and note it beside the release:
#
#   docker buildx imagetools inspect golang:1.26.8
#   docker build --build-arg GO_IMAGE=golang:1.26.8@sha256:... -t tlsnat .
#
# For a new patch release of Go change the go line in go.mod and this one; a test compares them.
ARG GO_IMAGE=golang:1.26.8
FROM ${GO_IMAGE} AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download && go mod verify
COPY . .
RUN CGO_ENABLED=0 GOTOOLCHAIN=local go build -trimpath -ldflags=-s -o /image/tlsnat ./cmd/tlsnat
# The bill of materials: every module in the binary, with its version and hash. Scanners (Syft, Trivy, Grype) read the same
# out of the binary itself.
RUN go version -m /image/tlsnat >/image/modules.txt
RUN mkdir -p /image/state

FROM scratch
COPY --from=build /image/tlsnat /tlsnat
COPY --from=build /image/modules.txt /modules.txt
# To trust other CAs mount a bundle here, or write backend-ca= into the map.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt

# Settings are TLSNAT_ variables (docs/reference/settings.md lists them): at least TLSNAT_MAP or TLSNAT_MAP_FILE, and TLSNAT_CERTS.
# The admin listens on the container's own loopback. For health checks and metrics from outside set
# TLSNAT_ADMIN=0.0.0.0:9180 and TLSNAT_ADMIN_TOKEN.
ENV STATE_DIRECTORY=/var/lib/tlsnat
# Mounted maps and certificates change under it, and nobody sends a signal then.
ENV TLSNAT_WATCH=on
COPY --from=build --chown=65532:65532 /image/state /var/lib/tlsnat

# Container runtimes let any user listen on ports below 1024 (net.ipv4.ip_unprivileged_port_start=0).
USER 65532:65532
EXPOSE 80 443 8443 9180

# SIGTERM lets connections end for TLSNAT_DRAIN_TIMEOUT: give `docker stop --timeout` some seconds more.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/tlsnat"]
CMD ["run"]
