// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"golang.org/x/sys/unix"
)

// What destinations do not take has to be kept, and each of a hundred thousand of them may be slow. So all that is kept has
// a bound, TLSNAT_MEMORY, of which each loop has an equal part: no loop can take what is another's, and none asks another.
// From half of the part on a flow reads a record at a time, so that each that stands still keeps a sixteenth of what it
// might. When the part is full, or the source's share of it (memory_shares.go), a flow reads less than what a socket takes
// that takes anything: who reads is served, who does not keeps little more. What would have to be kept until the rest of a
// record comes stays with the kernel then.

const (
	// leastRead is what a flow reads when memory is full: epoll calls a socket writable while a third of its buffer is
	// free, which is more than this.
	leastRead = 4 << 10
	// leastPerConn is what each connection may need then: leastRead both ways, twice at the most (lend), and itself.
	leastPerConn = 16 << 10
)

// memoryFull says whether the loop's part is used up.
func (l *loop) memoryFull() bool { return l.memoryUsed() >= l.lent.share }

// portion is how much a flow of the connection may read at a time: up to half of what the loop may lend, since all of it may
// have to be kept.
func (c *conn) portion() int {
	switch left := c.loop.lent.share/2 - c.loop.memoryUsed(); {
	case left > maxPlain:
		return left
	case !c.memoryFull():
		return maxPlain
	}
	return leastRead
}

// noteMemory publishes what is in use.
func (l *loop) noteMemory() {
	if used := int64(l.memoryUsed()); used != l.counters.lent.Load() {
		l.counters.lent.Store(used)
		l.watchHolders()
	}
}

// wholeRecordCame says whether reading a source that is opened here would leave half a record to be kept. Once some of it
// is kept, reading the rest is what ends that.
//
//	recv(MSG_PEEK), ioctl(SIOCINQ), getsockopt(SO_RCVBUF)
func (t transfer) wholeRecordCame() bool {
	if t.from.kind() != userHalf || len(t.carry) > 0 || t.from.hup || t.from.failed != 0 {
		return true
	}
	var header [5]byte
	n, _, err := unix.Recvfrom(int(t.from.fd), header[:], unix.MSG_PEEK)
	if n == 0 || err != nil {
		return true // the read finds out what that is
	}
	if n < len(header) {
		return false
	}
	came, err := unix.IoctlGetInt(int(t.from.fd), unix.SIOCINQ)
	if err != nil || came >= t.from.tls.reader.Need(header[:]) {
		return true
	}
	room, err := unix.GetsockoptInt(int(t.from.fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
	return err != nil || came >= room/4 // the rest has no room in the kernel either
}
