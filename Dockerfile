# The gateway is one static binary, so its image is that binary in an empty file system: nothing to patch, no shell to
# get into. It verifies no certificate of others and needs no time zones, so nothing else has to be there.
#
#   docker build -t tlsnat .

FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags=-s -o /image/tlsnat ./cmd/tlsnat
RUN mkdir -p /image/state

FROM scratch
COPY --from=build /image/tlsnat /tlsnat

# Settings are TLSNAT_ variables (README.md lists them): at least TLSNAT_MAP or TLSNAT_MAP_FILE, and TLSNAT_CERTS.
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
