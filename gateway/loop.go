// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/turns"
	"github.com/tlsnat/tlsnat/sni"
)

// loop owns sockets: its listeners and the connections that they accepted. One goroutine runs it; everything else
// asks it by post. On it nothing blocks and nothing takes a lock, but for the short one of post.
type loop struct {
	index int
	gw    *Gateway
	poll  *poller

	socks     sockets
	conns     map[*conn]struct{}
	listeners []*listener
	wheel     wheel
	resumed   int64   // when the process had stood still last: deadlines until then passed meanwhile
	now       int64   // loop nanoseconds: since the gateway's start, read once a round
	looks     looks   // whether the sockets were looked at since
	later     []*conn // streams, and who used up a turn: they go on when the others have been served

	scratch    []byte       // what a turn reads into and seals in; nothing in it outlives the turn
	iov        []unix.Iovec // the same for vectors
	most       int          // what a turn may read: noEnd, but for a stream with a bandwidth
	work       int          // what the call that moves bytes has cost beside them, counted in bytes (recordCost, callCost)
	hello      sni.Hello    // of the connection that is being matched
	lent       lender
	pipes      pipes
	refusedNow uint32    // connections that begin has turned away
	arrivals   []arrival // the oldest first
	pacer      pacer
	sampler    sampler
	shakers    shakers
	fields     []zap.Field           // of the line that is being logged
	rounds     []uint32              // per route: how far the round-robin is
	queues     map[*route]*turnQueue // who waits for a backend with room
	waiting    atomic.Int32          // in queues
	called     atomic.Bool           // to serve them

	active       atomic.Int32                     // handshakes that compute right now
	queue        turns.Queue[netip.Prefix, *conn] // handshakes with clients, by their addresses
	begun        []*conn                          // who has a place of them, the oldest first
	encryptQueue turns.Queue[*server, *conn]      // handshakes with servers
	serverNext   bool                             // a server's is the next one, if both wait

	counters counters
	ended    endedRing // the last connections that are over, for the admin: with outcome ok,
	failed   endedRing // and with another one
	accept4  func(fd int32) (int32, netip.AddrPort, unix.Errno)
	lastID   uint64
	stopping bool // draining: the loop ends with its last connection

	mu     sync.Mutex
	posted []func()
	ran    []func() // the list that posted will be next
	done   chan struct{}
}

// scratchSize is room for a turn: so many full records with their headers, explicit nonces and tags, one more for the
// half record that is left of the turn before.
const scratchSize = (maxBatch + 1) * slotSize

func newLoop(g *Gateway, index int) (*loop, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	l := &loop{index: index, gw: g, poll: p, most: noEnd, conns: map[*conn]struct{}{}, queues: map[*route]*turnQueue{}, scratch: make([]byte, scratchSize),
		iov: make([]unix.Iovec, 0, maxVectors), accept4: sysAccept, done: make(chan struct{}), shakers: shakers{work: make(chan shaker)}}
	l.queue, l.encryptQueue = turns.New(sourceOf), turns.New(serverOf)
	l.lent.share, l.pipes.most = int(g.settings.Memory)/g.settings.Loops, pipesFor(g.settings.Loops)
	l.tick()
	l.looks.sure = l.now
	l.wheel.done, l.pacer.done = l.now>>tickShift, l.now>>paceShift
	return l, nil
}

// run is the loop: what is ready, what is due, what was posted, then the streams; then look again.
func (l *loop) run() {
	defer close(l.done)
	for !l.finished() {
		events, err := l.look()
		if err != nil {
			l.gw.fail(err)
			return
		}
		l.tick()
		for i := range events {
			l.dispatch(&events[i])
		}
		l.fireTimers()
		l.pacer.fire(l.now)
		l.runPosted()
		l.serveLater()
		l.startHandshakes()
		l.noteRound()
		l.noteMemory()
		if l.active.Load() > 0 || len(l.later) > 0 {
			runtime.Gosched() // handshakes get the P now, not when the monitor notices
		}
	}
	l.runPosted() // surveys that are on their way end here
	l.sampler.flush(l)
	l.closeAll()
}

// look fetches what is ready, and sleeps until something is unless somebody waits for a turn.
func (l *loop) look() ([]unix.EpollEvent, error) {
	l.looks.begin(l.now, l.socks.watched())
	some := l.poll.look()
	l.looks.note(l.poll.n)
	if some || len(l.later) > 0 || l.timersDue() {
		return l.poll.events[:l.poll.n], l.poll.fault
	}
	return l.poll.sleep(l.now, l.nextDue(), l.hasNews)
}

// timersDue says whether a deadline has passed. Then the loop does not sleep, but looks at the sockets once more.
func (l *loop) timersDue() bool {
	due := l.wheel.next()
	return due != 0 && due <= l.now
}

// nextDue is when there is something to do though nothing happens, in loop nanoseconds; 0: never.
func (l *loop) nextDue() int64 {
	due := l.wheel.next()
	if paced := l.pacer.next(); paced != 0 && (due == 0 || paced < due) {
		return paced
	}
	return due
}

func (l *loop) tick() { l.now = l.clock() }

func (l *loop) clock() int64 { return int64(time.Since(l.gw.started)) }

// dispatch hands an event to the owner of its socket.
func (l *loop) dispatch(ev *unix.EpollEvent) {
	if s := l.socks.at(ev.Fd, uint32(ev.Pad)); s != nil {
		s.owner.ready(s, ev.Events)
	}
}

// watch puts a connection's socket under the loop's care.
func (l *loop) watch(s *socket) error {
	l.socks.enlist(s)
	if err := l.poll.add(s.fd, s.slot, s.gen); err != nil {
		l.socks.strike(s)
		return err
	}
	return nil
}

func (l *loop) watchListener(ln *listener) error {
	ln.sock = socket{fd: ln.fd, owner: ln}
	l.socks.enlist(&ln.sock)
	if err := l.poll.addLevel(ln.sock.fd, ln.sock.slot, ln.sock.gen); err != nil {
		l.socks.strike(&ln.sock)
		return err
	}
	return nil
}

// unwatchListener takes a listener that may rest out of the loop's care.
func (l *loop) unwatchListener(ln *listener) {
	if ln.sock.gen != 0 {
		l.poll.remove(ln.fd)
		l.socks.strike(&ln.sock)
	}
}

// closeSocket closes the descriptor, which takes it out of the epoll set as well.
func (l *loop) closeSocket(s *socket) {
	if s.fd < 0 {
		return
	}
	l.socks.strike(s)
	sysClose(s.fd)
	if s.tls != nil {
		s.tls.reader.Wipe()
		s.tls.writer.Wipe()
	}
	s.fd, s.tls = -1, nil
}

// begin starts the story of an accepted connection.
func (l *loop) begin(ln *listener, fd int32, peer netip.AddrPort) {
	c := newConn(l, ln, fd, peer)
	defer c.rescue()
	l.conns[c] = struct{}{}
	l.counters.accepted.Add(1)
	if ln.wide != nil && !c.enterWide(ln.wide) {
		return
	}
	c.gen.open.Add(1)
	if l.gw.open.Add(1) > l.gw.maxConns.Load() && !l.makeRoom(c) {
		l.gw.open.Add(-1)
		l.turnAway(c, refusedMaxConns)
		return
	}
	c.counted = true
	c.to(c.port.first)
	if l.gw.trusts(peer.Addr()) {
		c.to(readingProxy)
	} else if why := c.knock(); why != notRefused {
		l.turnAway(c, why)
		return
	}
	if err := l.watch(&c.client); err != nil {
		c.finish(Internal, err.Error())
		return
	}
	l.noteArrival(&c.client)
	c.setDeadline(int64(l.gw.settings.HelloTimeout))
	if c.port.eager && c.stage != readingProxy {
		c.advance() // nothing to be read before this one goes on
	}
}

// arrival is a connection that was accepted, if the socket still has the generation. It does not keep the connection's memory.
type arrival struct {
	slot uint32
	gen  uint32
}

// noteArrival remembers who came when. Those at the front who are further than their hello are forgotten, and when most of the
// others are, too, so are they.
func (l *loop) noteArrival(s *socket) {
	for len(l.arrivals) > 0 && l.arriving(l.arrivals[0]) == nil {
		l.arrivals = turns.DeleteAt(l.arrivals, 0)
	}
	const few = 1024
	if len(l.arrivals) > few+2*len(l.conns) {
		l.arrivals = slices.DeleteFunc(l.arrivals, func(a arrival) bool { return l.arriving(a) == nil })
	}
	l.arrivals = append(l.arrivals, arrival{s.slot, s.gen})
}

// arriving is the connection of an arrival, as long as its hello, or its request, is not there.
func (l *loop) arriving(a arrival) *conn {
	if s := l.socks.at(int32(a.slot), a.gen); s != nil {
		if c, ok := s.owner.(*conn); ok && c.undecided() && s == &c.client {
			return c
		}
	}
	return nil
}

// leastArrival is how long a client has for its hello, however many come: a round trip of a slow network. Else whoever
// connects would end those who are about to speak.
const leastArrival = int64(250 * time.Millisecond)

// undecided says whether the client has not said yet what it wants.
func (c *conn) undecided() bool { return c.stage <= readingHello || c.stage == readingRequest }

// makeRoom ends a connection that is no session yet, when TLSNAT_MAX_CONNS are open: the handshake that is silent for longest,
// else a hello that waits, else an arrival without a hello. Silence must not shut out those who speak. Nor must
// newcomers shut out those who are at it: so a client goes only if it has had its time, or if its source has more handshakes
// than the newcomer's would have.
func (l *loop) makeRoom(newcomer *conn) bool {
	theirs := l.queue.Holds(newcomer) + 1
	if c := l.longestSilent(); c != nil && (l.now-c.hs.begun >= leastPatience || l.queue.Holds(c) > theirs) {
		c.giveUpSilent()
		return true
	}
	if c, many := l.queue.Longest(); many > theirs || many > 0 && l.now-c.active >= leastPatience {
		l.dropHello(refusedMaxConns)
		return true
	}
	c := l.crowdedArrival()
	if c == nil {
		return false
	}
	c.shut(refusedMaxConns)
	return true
}

// oldArrivals is how many arrivals are compared, the oldest ones: a look at a source takes some 5 ns.
const oldArrivals = 32

// crowdedArrival is who gives way of those that have not said hello and have had their time: the oldest of the source that
// has the most of the oldest arrivals; nil: nobody.
func (l *loop) crowdedArrival() *conn {
	var oldest [oldArrivals]*conn // of each source
	var count [oldArrivals]int
	sources, most := 0, 0
	for i, seen := 0, 0; i < len(l.arrivals) && seen < oldArrivals; seen++ {
		c := l.arriving(l.arrivals[i])
		if c == nil { // further than its hello, or gone
			l.arrivals = deleteNear(l.arrivals, i)
			continue
		}
		if l.now-c.report.accepted < leastArrival {
			break // the others came later
		}
		i++
		k := slices.IndexFunc(oldest[:sources], func(o *conn) bool { return sourceOf(o) == sourceOf(c) })
		if k < 0 {
			k = sources
			oldest[k] = c
			sources++
		}
		if count[k]++; count[k] > count[most] {
			most = k
		}
	}
	return oldest[most]
}

// deleteNear removes the element at i, which is near the beginning: what is before it moves.
func deleteNear[T any](list []T, i int) []T {
	copy(list[1:i+1], list[:i])
	return turns.DeleteAt(list, 0)
}

// turnAway ends a connection that has not begun.
func (l *loop) turnAway(c *conn, why refusal) {
	l.refusedNow++
	c.shut(why)
}

// putOff has a conn go on when those with less to do were served.
func (l *loop) putOff(c *conn) {
	if !c.busy {
		c.busy = true
		l.later = append(l.later, c)
	}
}

// serveLater gives a turn to whoever waits longest, and to the next ones until they had as much time as the round's
// events. So a message beside streams waits for one turn of one of them, and the streams get half of a busy loop.
func (l *loop) serveLater() {
	if len(l.later) == 0 {
		return
	}
	start := l.clock()
	for n := len(l.later); n > 0; n-- {
		c := l.later[0]
		l.later[0] = nil
		l.later = l.later[1:]
		c.busy = false
		c.advance()
		if l.clock()-start >= start-l.now {
			return
		}
	}
}

// post has f run on the loop. It may be called from anywhere; f runs in its turn.
func (l *loop) post(f func()) {
	l.mu.Lock()
	l.posted = append(l.posted, f)
	l.mu.Unlock()
	l.poll.wake()
}

// hasNews says whether there is something to do that no event tells of: what was posted, or a turn to shake hands that
// has become free.
func (l *loop) hasNews() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.posted) > 0 || l.turnFree()
}

// runPosted runs what was posted. The two lists change places, so that posting allocates nothing.
func (l *loop) runPosted() {
	l.mu.Lock()
	fs := l.posted
	l.posted = l.ran
	l.mu.Unlock()
	for _, f := range fs {
		l.try(f)
	}
	clear(fs)
	l.ran = fs[:0]
}

// try runs what was posted. A fault in what is about a connection ends that (rescue); any other must not end the loop,
// which has all the others.
func (l *loop) try(f func()) {
	defer func() {
		if p := recover(); p != nil {
			l.gw.log.Error("a fault of tlsnat's; please report it", zap.Any("panic", p), zap.Stack("stack"))
		}
	}()
	f()
}

// nextID numbers connections: the gateway's start in the upper half, so that numbers of two runs differ, the loop and
// a count in the lower.
func (l *loop) nextID() uint64 {
	l.lastID++
	return l.gw.idBase | (l.lastID*uint64(len(l.gw.loops))+uint64(l.index))&(1<<36-1)
}

func (l *loop) finished() bool { return l.stopping && len(l.conns) == 0 }

func (l *loop) closeAll() {
	for _, ln := range l.listeners {
		ln.close()
	}
	l.shakers.end()
	l.pipes.close()
	l.poll.close()
}
