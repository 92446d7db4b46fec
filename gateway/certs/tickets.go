// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

const (
	// ticketEpoch is how long one key seals tickets.
	ticketEpoch = 12 * time.Hour

	// ticketEpochs is how many keys open tickets. crypto/tls tells clients to keep a ticket for 7 days, the most
	// that RFC 8446, 4.6.1 allows, and opens none that is older. So a key has to open for 7 days after the end of
	// its 12 hours: 14 epochs and the one in which it seals.
	ticketEpochs = 1 + 14

	// minTicketSecret is the length of the keys that are made of it.
	minTicketSecret = 32
)

// Tickets are the keys that seal session tickets, one for each 12 hours since 1970. A config takes them so:
//
//	if g := tickets.Generation(now); g != have {
//		config.SetSessionTicketKeys(tickets.Keys(now))
//	}
//
// With a secret, each key is HKDF-SHA256 (RFC 5869) of it and the number of its epoch, so gateways with the same
// secret behind one load balancer open each other's tickets without a word between them. Who learns the secret has
// every key there was: TLS 1.3 sessions keep their forward secrecy by a new key exchange in each handshake, those
// of TLS 1.2 that were resumed do not. Without a secret the keys are random and forgotten after a week.
//
// Tickets may be used from many goroutines.
type Tickets struct {
	secret []byte

	mu     sync.Mutex
	random map[uint64][32]byte // by epoch; only without a secret
}

// NewTickets makes keys from a secret of at least 32 bytes, or random ones if it is empty.
func NewTickets(secret []byte) (*Tickets, error) {
	if n := len(secret); n > 0 && n < minTicketSecret {
		return nil, fmt.Errorf("ticket secret: %d bytes are too few; make %d with: openssl rand -hex %[2]d", n, minTicketSecret)
	}
	return &Tickets{secret: bytes.Clone(secret), random: make(map[uint64][32]byte)}, nil
}

// Generation is the number of the epoch. It changes when the keys do, and costs nothing.
func (t *Tickets) Generation(now time.Time) uint64 {
	return uint64(max(now.Unix(), 0)) / uint64(ticketEpoch/time.Second)
}

// Keys are the keys for [tls.Config.SetSessionTicketKeys], newest first: the first one seals, all of them open. The
// last is that of the epoch to come, for tickets of a gateway whose clock is a little ahead.
func (t *Tickets) Keys(now time.Time) [][32]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	newest := t.Generation(now)
	oldest := newest - min(newest, ticketEpochs-1)
	keys := make([][32]byte, 0, ticketEpochs+1)
	for age := range newest - oldest + 1 {
		keys = append(keys, t.key(newest-age))
	}
	keys = append(keys, t.key(newest+1))
	for epoch := range t.random {
		if epoch < oldest {
			delete(t.random, epoch)
		}
	}
	return keys
}

func (t *Tickets) key(epoch uint64) (key [32]byte) {
	if len(t.secret) == 0 {
		return t.randomKey(epoch)
	}
	info := binary.BigEndian.AppendUint64([]byte("tlsnat session ticket key "), epoch)
	derived, err := hkdf.Key(sha256.New, t.secret, nil, string(info), len(key))
	if err != nil {
		panic(err) // only for more than 255 hashes of output
	}
	copy(key[:], derived)
	return key
}

func (t *Tickets) randomKey(epoch uint64) [32]byte {
	key, ok := t.random[epoch]
	if !ok {
		rand.Read(key[:]) // never fails: the program ends if the system has no randomness
		t.random[epoch] = key
	}
	return key
}
