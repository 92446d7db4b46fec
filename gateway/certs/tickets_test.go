// SPDX-License-Identifier: Apache-2.0

package certs

import (
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"io"
	"slices"
	"testing"
	"time"
)

func tickets(t testing.TB, secret []byte) *Tickets {
	t.Helper()
	k, err := NewTickets(secret)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

var sharedSecret = bytes.Repeat([]byte("s"), 32)

// start is the beginning of an epoch.
var start = time.Unix(1780272000, 0)

func TestTicketKeysMoveOnByOneEachEpoch(t *testing.T) {
	for name, secret := range map[string][]byte{"shared": sharedSecret, "random": nil} {
		t.Run(name, func(t *testing.T) {
			k := tickets(t, secret)
			have := k.Keys(start)
			if len(have) != ticketEpochs+1 {
				t.Fatalf("%d keys", len(have))
			}
			for i := 1; i <= 40; i++ {
				now := start.Add(time.Duration(i)*ticketEpoch - time.Nanosecond)
				if !slices.Equal(k.Keys(now), have) || k.Generation(now) != k.Generation(start)+uint64(i)-1 {
					t.Fatalf("epoch %d: the keys changed within it", i)
				}
				next := k.Keys(now.Add(time.Nanosecond))
				if next[0] != have[len(have)-1] || !slices.Equal(next[1:ticketEpochs], have[:ticketEpochs-1]) || slices.Contains(have, next[ticketEpochs]) {
					t.Fatalf("epoch %d: not the next key and the ones before it", i)
				}
				have = next
			}
			if len(k.random) > ticketEpochs+1 {
				t.Errorf("%d keys are kept", len(k.random))
			}
		})
	}
}

// A ticket that is sealed in the last moment of a key has to open for as long as its client was told to keep it.
func TestTicketKeyOpensAsLongAsItsTicketsLive(t *testing.T) {
	k := tickets(t, nil)
	sealed := k.Keys(start)[0]
	for now := start; now.Before(start.Add(9 * days)); now = now.Add(time.Hour) {
		if alive := slices.Contains(k.Keys(now), sealed); alive != now.Before(start.Add(7*days+ticketEpoch)) {
			t.Fatalf("after %v it opens tickets: %v", now.Sub(start), alive)
		}
	}
}

func TestRandomTicketKeysAreForgotten(t *testing.T) {
	k := tickets(t, nil)
	before := k.Keys(start)
	k.Keys(start.Add(30 * days))
	for _, key := range k.Keys(start) {
		if slices.Contains(before, key) {
			t.Fatal("a key of a month ago is still there")
		}
	}
	if a, b := tickets(t, nil).Keys(start), tickets(t, nil).Keys(start); a[0] == b[0] {
		t.Error("two gateways have the same random key")
	}
}

// Gateways that share a secret must agree in all versions: this value may never change.
func TestSharedTicketKeyIsTheSameEverywhere(t *testing.T) {
	const want = "393deb3bf600cbe0b89048df17cefc823f31a8d6cdc10f7d923b979f3e40eb27"
	if got := tickets(t, sharedSecret).Keys(start)[0]; hex.EncodeToString(got[:]) != want {
		t.Errorf("%x", got)
	}
	if tickets(t, bytes.Repeat([]byte("t"), 32)).Keys(start)[0] == tickets(t, sharedSecret).Keys(start)[0] {
		t.Error("another secret gives the same key")
	}
}

func TestClockBefore1970GivesKeys(t *testing.T) {
	for _, at := range []int64{-1 << 40, 0, 3 * 43200} {
		if keys := tickets(t, nil).Keys(time.Unix(at, 0)); len(keys) != 2+int(max(at, 0)/43200) {
			t.Errorf("%d: %d keys", at, len(keys))
		}
	}
}

func TestShortTicketSecretIsRefused(t *testing.T) {
	_, err := NewTickets([]byte("hunter2"))
	if want := "ticket secret: 7 bytes are too few; make 32 with: openssl rand -hex 32"; err == nil || err.Error() != want {
		t.Errorf("%v", err)
	}
}

func TestSecretMayBeWipedAfterwards(t *testing.T) {
	secret := bytes.Clone(sharedSecret)
	k := tickets(t, secret)
	clear(secret)
	if k.Keys(start)[0] != tickets(t, sharedSecret).Keys(start)[0] {
		t.Error("the keys changed")
	}
}

// A session begun at one gateway is resumed at another, whose clock is an epoch behind, on time, or six days ahead.
func TestSessionResumesAtAnotherGateway(t *testing.T) {
	id := leaf(t, nil, "a.example")
	clock := func() time.Time { return noon }
	certificate := tls.Certificate{Certificate: [][]byte{id.Raw}, PrivateKey: id.key}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for skew, resumes := range map[time.Duration]bool{-time.Second: true, 0: true, 6 * days: true, 8 * days: false} {
			client := &tls.Config{Time: clock, InsecureSkipVerify: true, ServerName: "a.example", MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
			gateway := func(now time.Time) *tls.Config {
				c := &tls.Config{Time: clock, Certificates: []tls.Certificate{certificate}}
				c.SetSessionTicketKeys(tickets(t, sharedSecret).Keys(now))
				return c
			}
			if resumed(t, gateway(start), client) {
				t.Fatal("the first session is resumed")
			}
			if got := resumed(t, gateway(start.Add(skew)), client); got != resumes {
				t.Errorf("%s, %v later: resumed is %v", tls.VersionName(version), skew, got)
			}
		}
	}
}

// resumed makes a connection and reads all of it, and with it the session ticket of TLS 1.3.
func resumed(t *testing.T, server, client *tls.Config) bool {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Write([]byte{1})
			c.Close()
		}
	}()
	c, err := tls.Dial("tcp", l.Addr().String(), client)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.ReadAll(c); err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState().DidResume
}

func BenchmarkKeysOfASharedSecret(b *testing.B) {
	k := tickets(b, sharedSecret)
	b.ReportAllocs()
	for b.Loop() {
		k.Keys(start)
	}
}
