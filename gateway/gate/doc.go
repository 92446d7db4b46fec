// SPDX-License-Identifier: Apache-2.0

// Package gate decides who gets in, and how much of it: which addresses are allowed, how many connections one address
// may have open or open in a time, how many bytes a second a stream may carry.
//
//	entries, complaints := gate.ReadList("block.txt", text)
//	set, _ := gate.NewSet(entries, true) // who is in none of them is allowed
//	if !set.Allows(client) { ... }
//
//	rates := gate.NewRates()
//	if !rates.Take(rates.Key(scope, client), now, gate.Rate{N: 20, Per: time.Second}) { ... }
//
// All of it is called for every connection, on event loops that must not wait: nothing here takes a lock, allocates
// once it is made, or grows with the number of addresses that come by. It opens no file, reads no clock and logs
// nothing.
package gate
