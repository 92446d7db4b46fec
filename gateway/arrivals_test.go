// SPDX-License-Identifier: Apache-2.0

package gateway

import "testing"

// TestCrowdedSourceGivesWay: of those who have not said hello it is the source with the most that makes room, not whoever came
// first; and nobody who has not had their time.
func TestCrowdedSourceGivesWay(t *testing.T) {
	s := newStill(t, ":1 -> 127.0.0.1:2 mode=pass")
	came := func(source string) *conn {
		c := s.newcomer(t, source)
		c.stage = readingHello
		s.loop.noteArrival(&c.client)
		return c
	}
	patient, gone := came("192.0.2.1"), came("192.0.2.2")
	var crowd []*conn
	for range 3 {
		crowd = append(crowd, came("2001:db8::1"), came("2001:db8::2")) // a /64 is one source
	}
	other := came("192.0.2.1")
	if c := s.loop.crowdedArrival(); c != nil {
		t.Errorf("%v has had no time", c.report.source)
	}
	s.loop.now += leastArrival
	gone.finish(OK, "")
	for _, want := range append(crowd[:5:5], patient, crowd[5], other) {
		c := s.loop.crowdedArrival()
		if c != want {
			t.Fatalf("%v gives way, want %v", c.report.source, want.report.source)
		}
		c.finish(OK, "")
	}
	if c := s.loop.crowdedArrival(); c != nil || len(s.loop.arrivals) != 0 {
		t.Errorf("of %d arrivals %v is left", len(s.loop.arrivals), c)
	}
}
