// SPDX-License-Identifier: Apache-2.0

// Package bench measures what tlsnat costs, beside its peers, in one run:
//
//	go test -run '^$' -bench . ./bench
//	go test -run '^$' -bench 'Echo/(tlsnat|haproxy)/256B' ./bench
//	go run ./bench/report -rounds 5
//
// A gateway is built (or found), started as a process of its own and pinned to one core. The load and the backend share another, and are made to be
// cheaper than any gateway: one that waits for its load is measured half asleep. What is reported is
// first of all the gateway's CPU time for a unit of work, read from its process clock (nanoseconds, ended threads included) before and after that
// work, because CPU time stays put on a busy machine where wall time does not. Beside it: throughput, latency, proportional set size, descriptors.
//
// The names are Workload/peer=NAME/CASE, so that benchstat sets the peers side by side:
//
//	benchstat -col /peer bench/results/raw.txt
//
// The metrics of a benchmark:
//
//	ns/op           wall time for a unit of work (one echo, one handshake, one connection); for bulk see MiB/s
//	cpu-ns/op       the gateway's CPU time for that unit, all its processes together
//	cpu-s/GiB       the same for bulk: CPU seconds for 2^30 bytes of payload
//	cpu-ns/conn/s   CPU time for keeping a connection for a second in which nothing happens
//	MiB/s           payload, at the client
//	p50-ns, p99-ns  latency seen by the client
//	pss-B           proportional set size of all of the gateway's processes
//	pss-B/conn      what a connection adds to it
//	fds/conn        descriptors a connection holds in the gateway
//	times-NAME      the gateway's CPU time as a multiple of a peer's, both at work by turns; times-best: of the best peer's
//	times-bare      as a multiple of its own under a map of four plain rules
//	offered/s       connections a second that were begun beside the measured ones
//
// Another binary is given by BENCH_TLSNAT, BENCH_HAPROXY, BENCH_NGINX, BENCH_HITCH and BENCH_STUNNEL; BENCH_SHORT=1 (or -short) makes every crowd small.
// A peer that is not installed is named as missing, and the others go on.
//
// What it does not do: it does not leave the loopback interface, so it says nothing about network cards and their offloads, and it does not compare
// features. Map lookups and ClientHello parsing are measured beside their code. The package has no code besides its tests.
package bench
