// SPDX-License-Identifier: Apache-2.0

// Package config is what the operator wrote: settings, map, certificates, lists of addresses. It reads all of it, checks it,
// and complains with the place and the remedy. A [Config] that was read never changes. Whoever only asks what a configuration
// says (check, explain, env, csr, firewall) needs this package, and no gateway.
package config
