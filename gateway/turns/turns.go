// SPDX-License-Identifier: Apache-2.0

// Package turns shares places among owners, so that nobody who asks for many delays the others. It takes no locks and
// starts no goroutines: its user sees to it that one goroutine at a time calls it.
package turns

import (
	"cmp"
	"container/heap"
	"slices"
	"sync/atomic"
)

// Queue is who waits for a place, and who has one. An owner is whoever can fill all places alone: a client's address, a
// backend server, a machine that tasks ask. Everyone waits in a queue of their owner, and the next place goes to the owner that has the fewest:
// whoever asks for many delays only themselves.
type Queue[K comparable, T comparable] struct {
	ownerOf func(T) K
	owners  map[K]*claimant[K, T]
	ready   ranking[K, T] // owners with somebody waiting: whose turn is next comes first
	queues  ranking[K, T] // the same owners: the longest queue comes first
	holders ranking[K, T] // owners that have places: whoever has the most comes first

	Waiting atomic.Int32 // who has no place yet; this and Held may be read from anywhere
	Held    atomic.Int32 // places that are taken
	seq     uint64       // numbers arrivals and turns
	free    []*claimant[K, T]
}

// claimant is an owner: what they have, and who waits for more.
type claimant[K comparable, T comparable] struct {
	key     K
	waiting []T    // the oldest first
	holding []T    // who has a place, the oldest first
	held    int    // places; one in holding may have several
	arrived uint64 // when the queue began
	served  uint64 // when its last turn was; 0: never
	at      [3]int // its index in each ranking; -1: not there
}

// The rankings, as an index of claimant.at.
const (
	inReady = iota
	inQueues
	inHolders
)

// New makes an empty queue. ownerOf must give the same owner as long as something waits or has a place.
func New[K comparable, T comparable](ownerOf func(T) K) Queue[K, T] {
	type o = *claimant[K, T]
	return Queue[K, T]{
		ownerOf: ownerOf,
		owners:  map[K]*claimant[K, T]{},
		ready: ranking[K, T]{inReady, nil, func(a, b o) int {
			return cmp.Or(cmp.Compare(a.held, b.held), cmp.Compare(a.served, b.served), cmp.Compare(a.arrived, b.arrived))
		}},
		queues: ranking[K, T]{inQueues, nil, func(a, b o) int {
			return cmp.Or(cmp.Compare(len(b.waiting), len(a.waiting)), cmp.Compare(b.held, a.held), cmp.Compare(b.served, a.served))
		}},
		holders: ranking[K, T]{inHolders, nil, func(a, b o) int {
			return cmp.Or(cmp.Compare(b.held, a.held), cmp.Compare(a.served, b.served))
		}},
	}
}

// Push has x wait.
func (t *Queue[K, T]) Push(x T) {
	o := t.owner(t.ownerOf(x))
	if t.seq++; len(o.waiting) == 0 {
		o.arrived = t.seq
	}
	o.waiting = append(o.waiting, x)
	t.Waiting.Add(1)
	t.rank(o)
}

// Remove takes x out of its queue, if it waits there.
func (t *Queue[K, T]) Remove(x T) {
	if o := t.owners[t.ownerOf(x)]; o != nil {
		if i := slices.Index(o.waiting, x); i >= 0 {
			t.unqueue(o, i)
		}
	}
}

// unqueue takes the one at i out of an owner's queue.
func (t *Queue[K, T]) unqueue(o *claimant[K, T], i int) {
	o.waiting = DeleteAt(o.waiting, i)
	t.Waiting.Add(-1)
	t.rank(o)
}

// Fewest is how many places the owner has whose turn is next. Somebody waits.
func (t *Queue[K, T]) Fewest() int { return t.ready.list[0].held }

// Next is whose turn it is. Somebody waits.
func (t *Queue[K, T]) Next() T { return t.ready.list[0].waiting[0] }

// Take ends the wait of whoever is next, and gives them a place.
func (t *Queue[K, T]) Take() T {
	o := t.ready.list[0]
	x := o.waiting[0]
	t.seq++
	o.served = t.seq
	o.holding, o.held = append(o.holding, x), o.held+1
	t.Held.Add(1)
	t.unqueue(o, 0)
	return x
}

// Enlarge gives x, which has a place, n more of them.
func (t *Queue[K, T]) Enlarge(x T, n int) {
	o := t.owners[t.ownerOf(x)]
	o.held += n
	t.Held.Add(int32(n))
	t.rank(o)
}

// Leave gives back the n places that x has.
func (t *Queue[K, T]) Leave(x T, n int) {
	o := t.owners[t.ownerOf(x)]
	o.holding = TakeOut(o.holding, x)
	o.held -= n
	t.Held.Add(-int32(n))
	t.rank(o)
}

// Drop takes the oldest out of the longest queue. Somebody waits.
func (t *Queue[K, T]) Drop() T {
	o := t.queues.list[0]
	x := o.waiting[0]
	t.unqueue(o, 0)
	return x
}

// Longest is the oldest of the longest queue, and how long that is; 0 if nobody waits.
func (t *Queue[K, T]) Longest() (x T, n int) {
	if len(t.queues.list) == 0 {
		return x, 0
	}
	waiting := t.queues.list[0].waiting
	return waiting[0], len(waiting)
}

// Holds is how many places the owner of x has.
func (t *Queue[K, T]) Holds(x T) int {
	if o := t.owners[t.ownerOf(x)]; o != nil {
		return o.held
	}
	return 0
}

// Richest are those who have the places of the owner with the most of them, the oldest first.
func (t *Queue[K, T]) Richest() []T {
	if len(t.holders.list) == 0 {
		return nil
	}
	return t.holders.list[0].holding
}

// owner finds an owner, or makes one.
func (t *Queue[K, T]) owner(key K) *claimant[K, T] {
	o := t.owners[key]
	if o == nil {
		if n := len(t.free); n > 0 {
			o, t.free = t.free[n-1], t.free[:n-1]
		} else {
			o = &claimant[K, T]{}
		}
		o.key, o.served, o.at = key, 0, [3]int{-1, -1, -1}
		t.owners[key] = o
	}
	return o
}

// spareOwners is how many owners are kept for use again.
const spareOwners = 16

// rank puts an owner where it belongs after a change, and forgets one that neither waits nor has a place.
func (t *Queue[K, T]) rank(o *claimant[K, T]) {
	t.ready.put(o, len(o.waiting) > 0)
	t.queues.put(o, len(o.waiting) > 0)
	t.holders.put(o, len(o.holding) > 0)
	if len(o.waiting) > 0 || len(o.holding) > 0 {
		return
	}
	delete(t.owners, o.key)
	if len(t.free) < spareOwners {
		var none K
		o.key = none
		t.free = append(t.free, o)
	}
}

// DeleteAt removes the element at i. The first one is the usual one, and nothing is moved for it.
func DeleteAt[T any](list []T, i int) []T {
	if i > 0 || len(list) == 1 {
		return slices.Delete(list, i, i+1)
	}
	var none T
	list[0] = none
	return list[1:]
}

// TakeOut removes x, which is in the list. It looks from the end: whoever came last leaves soonest, as a rule.
func TakeOut[T comparable](list []T, x T) []T {
	i := len(list) - 1
	for i > 0 && list[i] != x {
		i--
	}
	return DeleteAt(list, i)
}

// ranking is a heap of owners.
type ranking[K comparable, T comparable] struct {
	which   int // index of claimant.at
	list    []*claimant[K, T]
	compare func(a, b *claimant[K, T]) int
}

// put has an owner in the ranking, at its place, or not at all.
func (r *ranking[K, T]) put(o *claimant[K, T], in bool) {
	switch i := o.at[r.which]; {
	case in && i < 0:
		heap.Push(r, o)
	case in:
		heap.Fix(r, i)
	case i >= 0:
		heap.Remove(r, i)
	}
}

func (r *ranking[K, T]) Len() int           { return len(r.list) }
func (r *ranking[K, T]) Less(i, j int) bool { return r.compare(r.list[i], r.list[j]) < 0 }

func (r *ranking[K, T]) Swap(i, j int) {
	r.list[i], r.list[j] = r.list[j], r.list[i]
	r.list[i].at[r.which], r.list[j].at[r.which] = i, j
}

func (r *ranking[K, T]) Push(x any) {
	o := x.(*claimant[K, T])
	o.at[r.which] = len(r.list)
	r.list = append(r.list, o)
}

func (r *ranking[K, T]) Pop() any {
	last := len(r.list) - 1
	o := r.list[last]
	r.list[last] = nil
	r.list, o.at[r.which] = r.list[:last], -1
	return o
}
