// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

const (
	// maxPlain is the most a record carries (RFC 8446, section 5.1).
	maxPlain = 16384
	// slotSize is a full record on the wire, at its largest: header, explicit nonce, payload, padding that a peer
	// may add, type and tag.
	slotSize = 5 + maxPlain + 256

	// A stream is carried so many records a call. One call a record spends as much in the kernel as in AES; with
	// 16 the calls hardly count any more, and 16 records still lie in a core's second-level cache.
	maxBatch = 16

	// Full records only once a flow streams: a receiver can't open half a record, and the first flight of a fresh or
	// idle connection is ten segments. So it begins with ten records of a segment each:
	smallRecord = 1460 - 12 - 5 - 8 - 17 // MSS on Ethernet less TCP timestamps, header, explicit nonce, type and tag
	smallFlight = 10
	freshAfter  = int64(time.Second)

	// Data of a record that is shorter than this is moved up to the data of the one before it, instead of being a
	// vector of its own. Every vector but the first has as many bytes of the scratch memory, and so there are no more than
	maxVectors  = scratchSize/worthVector + 1
	worthVector = 1024
	// which is less than a call takes (IOV_MAX).
	_ = uint(1024 - maxVectors)

	// A connection that was quiet for as long gives up its key schedules, which are most of its memory; to set them
	// up again takes less than a microsecond.
	parkAfter = 2 * time.Second
)

// seal carries bytes from a plain source to a destination that speaks TLS:
//
//	readv(source -> slots with room for header and tag), seal in place, write(all records)
func (t transfer) seal() int {
	l, w := t.c.loop, &t.to.tls.writer
	t.renewKeys()
	size, slots := t.recordSize(l.now)
	if l.most < size*slots {
		size, slots = min(size, l.most), max(1, l.most/size)
	}
	pre := w.Prefix()
	stride := pre + size + w.Suffix()
	n, e := l.readSlots(t.from.fd, pre, size, stride, slots)
	if t.from.event(n, e) == controlCame {
		return t.readControl(e)
	}
	if n = t.got(n, slots*size, e); n == 0 {
		return 0
	}
	end := 0
	for left := n; left > 0; left -= size {
		end += w.Seal(l.scratch[end:], min(left, size))
	}
	t.carried(n)
	t.at = l.now
	if t.small > 0 {
		t.small -= uint8(min((n+size-1)/size, int(t.small)))
	}
	t.send(l.scratch[:end])
	if size == maxPlain {
		t.adapt(n == slots*size)
		t.streamed(n)
	}
	return n
}

// recordSize says how large the next records are, and how many a call may bring.
func (f *flow) recordSize(now int64) (size, slots int) {
	if now-f.at > freshAfter {
		f.small, f.batch, f.run = smallFlight, 0, 0
	}
	if f.small > 0 {
		return smallRecord, int(f.small)
	}
	return maxPlain, int(f.batch) + 1
}

// adapt asks for more the next time if a read was filled, and for less if the destination is stuck or the source
// has little: what a destination does not take has to be kept.
func (f *flow) adapt(filled bool) {
	switch {
	case filled && !f.stuck():
		f.batch = min(2*f.batch+1, maxBatch-1)
	case f.batch > 0:
		f.batch /= 2
	}
}

// readSlots reads into the payloads of so many records, laid out one behind the other in the loop's memory.
func (l *loop) readSlots(fd int32, pre, size, stride, slots int) (int, unix.Errno) {
	if slots == 1 {
		return sysRead(fd, l.scratch[pre:pre+size])
	}
	iov := l.iov[:slots]
	for i := range iov {
		iov[i].Base = &l.scratch[i*stride+pre]
		iov[i].SetLen(size)
	}
	return sysReadv(fd, iov)
}

// open carries bytes from a source that speaks TLS to a plain destination:
//
//	read(source -> as many records as are there), open in place, writev(their data)
//
// Half a record at the end stays with the flow.
func (t transfer) open() int {
	b, filled := t.readRecords(t.c.loop.scratch)
	used := t.openAll(b)
	t.keepRest(b[used:])
	t.adapt(filled && t.c.loop.work < turnRecords*recordCost)
	return used
}

// readRecords reads into room, behind what was left of the records before. It says whether as much came as was asked
// for. An end that comes now is one without a close_notify, unless that is among the records.
func (t transfer) readRecords(room []byte) (b []byte, filled bool) {
	if t.c.loop.now-t.at > freshAfter && t.from.tls.rx != landing {
		t.run = 0
	}
	t.at = t.c.loop.now
	have := copy(room, t.carry)
	n, want := 0, 0
	if !t.wholeRecordWaits() { // so an end is heard of only when every record before it was opened
		want = t.wanted(len(room) - have)
	}
	if t.from.readable && want > 0 {
		m, e := sysRead(t.from.fd, room[have:have+want])
		n = t.got(m, want, e)
		t.cutShort = t.ended && !t.reset
	}
	if t.from.tls.rx != landing {
		t.streamed(n)
	}
	return room[:have+n], n == want && n > 0
}

// keepRest keeps half a record. If nothing comes any more it was broken off.
func (t transfer) keepRest(rest []byte) {
	t.keepCarry(t.c.loop, rest)
	switch {
	case !t.cutShort:
	case len(t.carry) > 0:
		t.violation(&record.Error{Alert: record.AlertDecodeError, Reason: "the stream ended inside a record"})
	case t.doubts():
		t.reset = true
	}
}

// wanted is how many bytes the next read asks for: what there's room for while the flow streams, and when the kernel is
// to go on behind the next record, exactly the rest of that, header first. So it is when nothing more can be kept.
func (t transfer) wanted(room int) int {
	if t.from.tls.rx == landing || t.c.memoryFull() {
		return t.from.tls.reader.Need(t.carry) - len(t.carry)
	}
	return min((int(t.batch)+1)*slotSize, room, max(t.c.loop.most, slotSize)) // no record opens in part
}

// openAll opens the records of b and sends their data on, with one call. It returns how many bytes of b are done with.
//
// Data is shorter than its record. So whatever was opened and moved up ends before the record that is opened next, and
// moving its data up as well touches nothing that is not opened yet.
func (t transfer) openAll(b []byte) int {
	var (
		iov   = t.c.loop.iov[:0]
		end   int // of the last vector, in b
		total int
		used  int
	)
	for {
		data, n := t.nextData(b[used:])
		used += n
		if len(data) == 0 {
			break
		}
		total += len(data)
		if len(iov) > 0 && (len(data) < worthVector || len(iov) == cap(iov)) {
			end += copy(b[end:], data)
			last := &iov[len(iov)-1]
			last.SetLen(int(last.Len) + len(data))
			continue
		}
		end = offsetIn(b, data) + len(data)
		iov = append(iov, unix.Iovec{Base: &data[0], Len: uint64(len(data))})
	}
	t.carried(total)
	t.sendVectors(iov, total)
	if t.from.tls.asked {
		t.back().renewKeys()
	}
	return used
}

// offsetIn is where data begins in b, which it is a part of.
func offsetIn(b, data []byte) int {
	return int(uintptr(unsafe.Pointer(&data[0])) - uintptr(unsafe.Pointer(&b[0])))
}

// nextData opens records of b until one has data, and handles those before it. It returns how many bytes of b are done
// with, and no data when no whole record is left in it, or nothing after it counts.
func (t transfer) nextData(b []byte) (data []byte, used int) {
	s := t.from.tls
	for t.c.loop.work < turnRecords*recordCost {
		t.c.loop.work += recordCost
		var ticket []byte
		if s.tickets != nil {
			ticket = s.copyTicket(b[used:])
		}
		rec, n, err := s.reader.Next(b[used:])
		if err != nil {
			t.violation(err)
			return nil, len(b)
		}
		if n == 0 {
			return nil, used
		}
		used += n
		if s.tickets != nil {
			s.takeTicket(ticket, rec.Kind)
		}
		if rec.Kind != record.Data {
			if t.handleRecord(rec) {
				return nil, len(b)
			}
		} else if len(rec.Data) > 0 {
			return rec.Data, used
		}
	}
	return nil, used
}

// sendVectors writes the data of several records, and keeps what the destination would not take.
func (t transfer) sendVectors(iov []unix.Iovec, total int) {
	if total == 0 {
		return
	}
	if t.c.stage == translating {
		for i := range iov {
			t.translated(vector(&iov[i]))
		}
		return
	}
	sent := 0
	if !t.stuck() {
		var e unix.Errno
		if len(iov) == 1 {
			sent, e = sysWrite(t.to.fd, vector(&iov[0]))
		} else {
			sent, e = sysWritev(t.to.fd, iov)
		}
		sent = t.to.wrote(sent, total, e)
	}
	if sent == total || t.to.failed != 0 {
		return
	}
	for i := range iov {
		v := vector(&iov[i])
		skip := min(sent, len(v))
		sent -= skip
		t.hold(t.c.loop, v[skip:])
	}
}

func vector(v *unix.Iovec) []byte { return unsafe.Slice(v.Base, int(v.Len)) }

// keepCarry keeps half a record for the next read, or the records that there was no turn left for. Memory that is much
// too large for them is given back.
func (f *flow) keepCarry(l *loop, rest []byte) {
	const small = 4 << 10 // not worth the change
	if n := len(rest); n == 0 || n > cap(f.carry) || cap(f.carry) > small && n < cap(f.carry)/4 {
		l.giveBack(f.carry)
		f.carry = nil
		if len(rest) == 0 {
			return
		}
		f.carry = l.lend(len(rest))
	}
	f.carry = append(f.carry[:0], rest...)
}

// handleRecord does what a record that is no data asks for. It says whether nothing after it counts any more.
func (t transfer) handleRecord(rec record.Record) bool {
	switch rec.Kind {
	case record.CloseNotify:
		t.ended, t.cutShort = true, false
		return true
	case record.AlertReceived:
		if !t.c.report.told {
			t.c.report.alertReceived, t.c.report.byBackend = int16(rec.Alert), !t.isUp()
			t.c.tell(TLSError, t.c.side(t.from.socket)+" sent the alert "+rec.Alert.String())
		}
		t.ended, t.cutShort = true, false
		return true
	case record.KeyUpdateRequested:
		t.from.tls.asked = true
	}
	return false
}

// renewKeys goes over to new keys if the peer has asked for it (RFC 8446, section 4.6.3), or if the old ones are used
// up (section 5.5). One answer does for all requests that came meanwhile; behind data that is stuck it waits for the next
// data, so that a client that asks and does not read costs nothing.
func (t transfer) renewKeys() {
	s := t.to.tls
	if t.stuck() || !s.asked && !s.writer.UpdateDue() {
		return
	}
	if t.to.kind() == kernelHalf {
		t.renewInKernel()
		return
	}
	s.asked = false
	t.send(s.writer.AppendKeyUpdate(nil, false))
}

// park is for a connection that has become quiet: its key schedules are let go, and from now on the kernel asks whether
// the backend is still there (the client's socket has that from its listener). Short connections are spared both.
func (c *conn) park() {
	if c.parked {
		return
	}
	c.parked = true
	c.upward().emptyPipe()
	c.downward().emptyPipe()
	if !c.kept {
		c.kept = true
		c.keepKnown()
	}
	for _, s := range [...]*session{c.client.tls, c.backend.tls} {
		if s != nil {
			s.reader.Park()
			s.writer.Park()
			s.tickets = nil
		}
	}
}

// reencrypt carries bytes from a source that speaks TLS to a destination that speaks it too:
//
//	read(source -> as many records as are there), open in place, seal in place, write(as many records)
//
// Where a record of the destination is as long as one of the source, for the same data, nothing is moved; else the
// data is copied to where its record begins. Records stay as long as the source made them.
func (t transfer) reencrypt() int {
	l := t.c.loop
	t.renewKeys()
	start := 0
	if t.to.tls.writer.Prefix()+t.to.tls.writer.Suffix() > t.from.tls.reader.Overhead() {
		start = growth
	}
	b, filled := t.readRecords(l.scratch[start:])
	used := t.resealAll(b, l.scratch[:start+len(b)])
	t.keepRest(b[used:])
	t.adapt(filled && t.c.loop.work < turnRecords*recordCost)
	return used
}

// growth is how far in front of the records that are read those that are written begin where they are longer: by 8
// bytes at most, from ChaCha20-Poly1305 to AES-GCM in TLS 1.2. So the longest batch is carried with one write; and of
// small records, of which there are more, some hundred go with a write.
const growth = 1 << 10

// resealAll opens the records of b, which is the end of room, and seals their data again from the beginning of room on.
// It returns how many bytes of b are done with.
//
// What is sealed never reaches what is not opened yet: where it would, it is written out first.
func (t transfer) resealAll(b, room []byte) int {
	w := &t.to.tls.writer
	pre, suf := w.Prefix(), w.Suffix()
	ahead := len(room) - len(b)
	end, used, total := 0, 0, 0
	for {
		data, n := t.nextData(b[used:])
		used += n
		if len(data) == 0 {
			break
		}
		if end+pre+len(data)+suf > ahead+used {
			t.send(room[:end])
			end = 0
		}
		if payload := room[end+pre:]; &payload[0] != &data[0] {
			copy(payload, data)
		}
		total += len(data)
		end += w.Seal(room[end:], len(data))
	}
	t.carried(total)
	t.send(room[:end])
	if t.from.tls.asked {
		t.back().renewKeys()
	}
	return used
}

// sealed is a copy of b in records.
func (s *session) sealed(b []byte) (records []byte) {
	w := &s.writer
	for len(b) > 0 {
		n := min(len(b), maxPlain)
		slot := make([]byte, w.Prefix()+n+w.Suffix())
		copy(slot[w.Prefix():], b[:n])
		records = append(records, slot[:w.Seal(slot, n)]...)
		b = b[n:]
	}
	return records
}
