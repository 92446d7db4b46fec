// SPDX-License-Identifier: Apache-2.0

// Package record carries the application data of a TLS connection whose handshake somebody else has
// done: bytes in, bytes out, opened and sealed in place.
//
//	read, err := record.TrafficKeys(suite, clientSecret) // from the handshake's key log
//	write, err := record.TrafficKeys(suite, serverSecret)
//	var r record.Reader
//	var w record.Writer
//	r.Init(read, 0, record.Server)
//	w.Init(write, 0)
//
//	rec, n, err := r.Next(received) // rec.Data lies inside received[:n]
//
//	slot := make([]byte, w.Prefix()+len(reply)+w.Suffix())
//	copy(slot[w.Prefix():], reply)
//	sent := slot[:w.Seal(slot, len(reply))]
//
// It is the record layer of RFC 8446 5 (TLS 1.3) and of RFC 5246 6 with RFC 5288 and RFC 7905 (TLS
// 1.2), for AES-128-GCM, AES-256-GCM and ChaCha20-Poly1305, with what may follow a handshake: alerts,
// KeyUpdate, and the tickets that a client is sent. Whatever else a peer sends has its alert.
//
// It does no handshake and no renegotiation, reads no ticket, knows no CBC; it has no sockets, no
// buffers, no clock and no locks. A [Reader] and a [Writer] together take some 300 bytes when parked
// and allocate nothing for a record.
package record
