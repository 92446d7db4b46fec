// SPDX-License-Identifier: Apache-2.0

package turns

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// TestTurnsAreFair compares a queue with its definition, over random histories: the next place goes to who has the fewest, then to
// whose last turn is longest ago, then to who came first; the longest queue loses its oldest; who has the most is known.
func TestTurnsAreFair(t *testing.T) {
	type item struct{ owner, n int }
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		q := New(func(x item) int { return x.owner })
		waiting, holding, held := map[int][]item{}, map[int][]item{}, map[int]int{}
		size := map[item]int{}
		for n := range 300 {
			switch x := (item{r.IntN(8), n}); r.IntN(6) {
			case 0, 1, 2:
				q.Push(x)
				waiting[x.owner] = append(waiting[x.owner], x)
			case 3:
				if q.Waiting.Load() == 0 {
					continue
				}
				fewest := q.Fewest()
				for o, w := range waiting {
					if len(w) > 0 && held[o] < fewest {
						t.Fatalf("seed %d: %d has %d places, and fewest is %d", seed, o, held[o], fewest)
					}
				}
				got := q.Take()
				if waiting[got.owner][0] != got || held[got.owner] != fewest {
					t.Fatalf("seed %d: %v was taken, of %v", seed, got, waiting)
				}
				waiting[got.owner] = waiting[got.owner][1:]
				holding[got.owner] = append(holding[got.owner], got)
				size[got] = 1 + r.IntN(2)
				held[got.owner] += size[got]
				if size[got] > 1 {
					q.Enlarge(got, 1)
				}
			case 4:
				if all := holding[x.owner]; len(all) > 0 {
					gone := all[r.IntN(len(all))]
					q.Leave(gone, size[gone])
					held[x.owner] -= size[gone]
					holding[x.owner] = slices.DeleteFunc(all, func(y item) bool { return y == gone })
				}
			case 5:
				if all := waiting[x.owner]; len(all) > 0 && r.IntN(2) == 0 {
					gone := all[r.IntN(len(all))]
					q.Remove(gone)
					waiting[x.owner] = slices.DeleteFunc(slices.Clone(all), func(y item) bool { return y == gone })
				} else if q.Waiting.Load() > 0 {
					got := q.Drop()
					for o, w := range waiting {
						if len(w) > len(waiting[got.owner]) || o == got.owner && w[0] != got {
							t.Fatalf("seed %d: %v was dropped, of %v", seed, got, waiting)
						}
					}
					waiting[got.owner] = waiting[got.owner][1:]
				}
			}
			total, most, owners := 0, 0, 0
			for o := range 8 {
				total += held[o]
				most = max(most, held[o])
				if len(waiting[o])+len(holding[o]) > 0 {
					owners++
				}
			}
			if richest := q.Richest(); most > 0 && (held[richest[0].owner] != most || !slices.Equal(richest, holding[richest[0].owner])) {
				t.Fatalf("seed %d: the richest are %v, of %v", seed, richest, holding)
			}
			if int(q.Held.Load()) != total || len(q.owners) != owners {
				t.Fatalf("seed %d: %d places and %d owners, want %d and %d", seed, q.Held.Load(), len(q.owners), total, owners)
			}
		}
	}
}
