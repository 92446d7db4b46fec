// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/ktls"
	"github.com/tlsnat/tlsnat/gateway/record"
)

// kernelWorth is how many bytes a flow carries in one run, by calls that bring a record or more and without a second of
// silence, before what it is opened or sealed with goes to the kernel. A variable only so that tests need not carry as much.
//
// To hand over a direction takes four system calls and two key schedules, and saves two copies of all that follows. On an
// emulated machine those are 0.25 ms to 0.8 ms against 9 ms a MiB, so that it pays from a tenth of a MiB on (package
// ktls, BenchmarkHandOver and BenchmarkTwoCopies). But whoever has sent so much need not send more: a MiB is what nearly
// every response stays below, and of what goes on behind it the tenth is no matter.
var kernelWorth int32 = 1 << 20

// probeKernel tries the kernel once for the process.
var probeKernel = sync.OnceValue(ktls.Probe)

// KernelTLS says in one line what of TLS this machine's kernel carries, or why it does not.
func KernelTLS() string { return probeKernel().String() }

// hindrance is why a half of a flow that streams stays in user space. The list is closed: it is a label of the metrics.
type hindrance uint8

const (
	noModule   hindrance = iota // the kernel has no TLS, or none that works
	noCipher                    // it has not this cipher, or it failed its test
	noRekey                     // it could not follow the peer's KeyUpdate
	oldKernel                   // faults are known in how it opens, and nobody said ktls=rx
	halfClosed                  // the peer had ended its stream before
	refused                     // the kernel would not take the keys
	hindrances
)

var hindranceNames = [hindrances]string{"no_module", "no_cipher", "no_rekey", "old_kernel", "half_closed", "refused"}

func (f hindrance) String() string { return hindranceNames[f] }

// streamed counts a read that brought n bytes to the run. Messages that are smaller than a record are no part of one: they
// are copied, whoever seals them.
func (f *flow) streamed(n int) {
	if n >= maxPlain {
		f.run = min(f.run+int32(n), kernelWorth)
	}
}

// considerKernel gives to the kernel what it carries cheaper than we do: for a flow that streams what its destination
// is sealed with, and what its source is opened with. It only pays if in the end no byte comes to user space.
func (t transfer) considerKernel() {
	if t.c.route.kernel == nil {
		t.run = 0
		return
	}
	if t.from.kind() == userHalf && !t.mayOpen() {
		t.run = 0
		return
	}
	if t.to.kind() == userHalf && !t.sealInKernel() {
		return
	}
	if t.from.kind() != userHalf {
		t.run, t.splice = 0, true
		return
	}
	if t.from.tls.rx = landing; len(t.carry) == 0 {
		t.openInKernel()
	}
}

// mayOpen says whether the kernel may open what the source brings. In TLS 1.3 the peer may change its keys at any time (RFC 8446,
// section 4.6.3), which only Linux 6.14 and newer can follow; and what they can't open can't be had back.
func (t transfer) mayOpen() bool {
	s, k := t.from.tls, t.c.route.kernel
	suite := s.reader.Suite()
	err := k.RX(suite)
	switch {
	case s.rx == stays:
		return false
	case s.rx == landing:
		return true
	case err != nil:
		return t.keepHere(&s.rx, whyNot(err))
	case s.reader.TLS13() && !k.Rekey:
		return t.keepHere(&s.rx, noRekey)
	case !t.c.route.kernelRX:
		return t.keepHere(&s.rx, oldKernel)
	}
	return true
}

// keepHere leaves a half with us, and counts why.
func (t transfer) keepHere(half *carrier, why hindrance) bool {
	*half = stays
	t.c.loop.counters.fallbacks[why].Add(1)
	return false
}

func whyNot(err error) hindrance {
	switch {
	case errors.Is(err, unix.ENOTCONN):
		return halfClosed
	case errors.Is(err, ktls.ErrCipher):
		return noCipher
	}
	if _, ok := errors.AsType[unix.Errno](err); ok {
		return refused
	}
	return noModule
}

// attach puts the kernel's TLS on the socket, unless the other direction has done so.
func (s *socket) attach() error {
	if s.tls.rx == inKernel || s.tls.tx == inKernel {
		return nil
	}
	if err := ktls.Attach(s.fd); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// sealInKernel hands the writing half over, at a moment when nothing is stuck. It says whether the kernel has it.
//
//	setsockopt(TCP_ULP), getsockopt(TCP_INFO), ioctl(SIOCOUTQ), setsockopt(TLS_TX)
func (t transfer) sealInKernel() bool {
	s := t.to.tls
	if s.tx == stays {
		t.run = 0
		return false
	}
	if s.asked || s.writer.UpdateDue() {
		return false // the next record is a KeyUpdate
	}
	err := t.c.route.kernel.TX(s.writer.Suite())
	if err == nil {
		err = t.to.attach()
	}
	var sent uint64
	if err == nil {
		sent, err = ktls.Sent(t.to.fd)
	}
	k, seq := s.writer.Export()
	defer k.Wipe()
	if err == nil {
		err = ktls.SetTX(t.to.fd, &k, seq)
	}
	if err != nil {
		t.run = 0
		return t.keepHere(&s.tx, whyNot(err))
	}
	s.debt = int64(sent) - t.moved - int64(seq)*int64(ktls.Overhead(k.Suite()))
	s.writer.Follow()
	s.tx = inKernel
	t.c.report.inKernel++
	t.c.loop.counters.kernelTX.Add(1)
	return true
}

// openInKernel hands the reading half over, at the end of a record: what the socket has is the beginning of the next.
func (t transfer) openInKernel() {
	s := t.from.tls
	t.run = 0
	k, seq := s.reader.Export()
	defer k.Wipe()
	err := t.from.attach()
	if err == nil {
		err = ktls.SetRX(t.from.fd, &k, seq)
	}
	if err != nil {
		t.keepHere(&s.rx, whyNot(err))
		return
	}
	s.reader.Follow()
	s.rx, s.tickets = inKernel, nil
	// The kernel hands out one record a call, so that a short read does not mean "drained".
	t.from.exact, t.from.readable = true, true
	t.splice = true
	t.c.report.inKernel++
	t.c.loop.counters.kernelRX.Add(1)
}

// readControl finds out what it is that the kernel opened and could not splice, or read, as data: said is the error, or 0 for
// a call that brought nothing.
//
//	0        the end of the stream, or an empty record
//	EINVAL   an alert or a handshake message, which waits; or no TLS at all, which is said only once
//	EIO      the same, of read(2)
//	other    a record that does not open, or is too long; or the end of the connection
//
// It returns how many bytes of data it carried.
func (t transfer) readControl(said unix.Errno) int {
	if said != 0 && said != unix.EINVAL && said != unix.EIO {
		t.unopened(said)
		return 0
	}
	if said == 0 && !t.from.ended() {
		t.judgeRecord(record.TypeData, nil) // recvmsg would go on behind it, however many there are
		return 0
	}
	before := 0
	if t.to.kind() == userHalf {
		before = t.to.tls.writer.Prefix()
	}
	buf := t.c.loop.scratch[before : before+maxPlain]
	n, typ, e := ktls.Receive(t.from.fd, buf)
	switch {
	case e == unix.EAGAIN && said == 0:
		t.drained()
		return 0
	case e == unix.EAGAIN:
		t.unopened(unix.EINVAL)
		return 0
	}
	return t.received(buf, n, typ, e)
}

// received does what a record asks for that the kernel has brought into buf: n bytes of a type, or e. It returns how many
// bytes of data it carried.
func (t transfer) received(buf []byte, n int, typ byte, e unix.Errno) int {
	r := &t.from.tls.reader
	switch {
	case e != 0:
		t.unopened(e)
	case n == 0 && typ == 0:
		t.openedEnd()
	case typ == record.TypeData && n > 0:
		r.Carried(n)
		t.carried(n)
		if t.to.kind() == userHalf {
			t.send(t.c.loop.scratch[:t.to.tls.writer.Seal(t.c.loop.scratch, n)])
		} else {
			t.send(buf[:n])
		}
		return n
	default:
		t.judgeRecord(typ, buf[:n])
	}
	return 0
}

// ended says whether the peer's FIN has come, seen as an event yet or not.
func (r readingHalf) ended() bool {
	if r.hup {
		return true
	}
	p := [1]unix.PollFd{{Fd: r.fd, Events: unix.POLLRDHUP}}
	n, _ := unix.Poll(p[:], 0)
	return n > 0
}

// judgeRecord does what a record asks for that the kernel has opened and that is no data.
func (t transfer) judgeRecord(typ byte, p []byte) {
	rec, err := t.from.tls.reader.Judge(typ, p)
	switch {
	case err != nil:
		t.ended, t.from.readable = true, false
		t.violation(err)
		return
	case rec.Kind == record.KeyUpdate || rec.Kind == record.KeyUpdateRequested:
		if !t.openWithNewKeys() {
			return
		}
	}
	t.handleRecord(rec)
}

// answerUpdate gives the destination one answer for all its KeyUpdates of a turn that ask for one: the kernel brings them
// one by one.
func (t transfer) answerUpdate() {
	if t.back().from.kind() == kernelHalf && t.to.tls.asked && !t.c.report.told && t.to.failed == 0 {
		t.renewKeys()
	}
}

// openWithNewKeys follows the peer's KeyUpdate. Where the kernel can't, nothing behind it can be opened any more: the
// peer gets an alert, and the other side a reset, so that it does not take what it has for the whole.
func (t transfer) openWithNewKeys() bool {
	r := &t.from.tls.reader
	k, seq := r.Export()
	defer k.Wipe()
	r.Follow()
	if err := ktls.SetRX(t.from.fd, &k, seq); err != nil {
		t.ended, t.from.readable = true, false
		t.back().stuckWithKeys("new keys, which the kernel can't open with: " + err.Error())
		return false
	}
	return true
}

// renewInKernel goes over to the next keys for what is sent, where the kernel can.
func (t transfer) renewInKernel() {
	s := t.to.tls
	if !t.c.route.kernel.Rekey || t.notified {
		return
	}
	suite := s.writer.Suite()
	if e := ktls.Send(t.to.fd, record.TypeHandshake, keyUpdate); e != 0 {
		t.to.wrote(0, len(keyUpdate), e)
		return
	}
	next, err := ktls.NextTX(t.to.fd, suite)
	s.debt += int64(len(keyUpdate)) + int64(next)*int64(ktls.Overhead(suite))
	s.asked = false
	s.writer.Update()
	k, seq := s.writer.Export()
	defer k.Wipe()
	s.writer.Follow()
	if err == nil {
		err = ktls.SetTX(t.to.fd, &k, seq)
	}
	if err != nil {
		t.stuckWithKeys("the kernel does not take new keys: " + err.Error())
	}
}

// keyUpdate asks for no answer: ours is one, or is due to what we have sent (RFC 8446, section 4.6.3).
var keyUpdate = []byte{24, 0, 0, 1, 0}

// keysServe says whether more may be sent to a socket that the kernel seals for. If not, room or the end is near: where
// the kernel can't renew its keys a connection goes on with the old ones while that's no breach, until there is data for
// a peer that wants an answer before (RFC 8446, section 4.6.3), or the keys are used up (section 5.5).
func (t transfer) keysServe() bool {
	s := t.to.tls
	if !s.asked && !s.writer.UpdateDue() {
		return true
	}
	if t.c.route.kernel.Rekey {
		t.renewKeys()
		return !t.c.report.told && t.to.failed == 0 && !s.asked
	}
	switch waits, _ := unix.IoctlGetInt(int(t.from.fd), unix.SIOCINQ); {
	case s.asked && waits > 0:
		t.stuckWithKeys("the peer asks for new keys, which the kernel can't change to (Linux 6.14 could); ktls=off serves such peers")
	case s.writer.UsedUp():
		t.stuckWithKeys("the keys are used up, and the kernel can't change them (Linux 6.14 could); ktls=off serves such streams")
	}
	return !t.c.report.told
}

// unopenable are the errors of a record that the kernel could not open. They are also left on the socket, where
// sending would fail with them.
func unopenable(e unix.Errno) bool {
	return e == unix.EBADMSG || e == unix.EMSGSIZE || e == unix.EINVAL
}

// unopened ends reading with the error that the kernel has: a breach of the record protocol, or the connection's end.
func (t transfer) unopened(e unix.Errno) {
	if !unopenable(e) {
		t.got(-1, 0, e)
		return
	}
	_ = takeError(t.from.fd)
	t.ended, t.from.readable = true, false
	alert, words := record.AlertBadRecordMAC, "it does not open: forged, damaged, or of other keys"
	switch e {
	case unix.EMSGSIZE:
		alert, words = record.AlertRecordOverflow, "it is longer than a record may be"
	case unix.EINVAL:
		alert, words = record.AlertProtocolVersion, "no record of TLS begins like this"
	}
	t.violation(t.from.tls.reader.Refuse(alert, words))
}

// openedEnd is a FIN behind what the kernel opens. Bytes that the kernel has not made a record of are half of one.
func (t transfer) openedEnd() {
	rest, err := unix.IoctlGetInt(int(t.from.fd), unix.SIOCINQ)
	t.sourceOver()
	t.cutShort = !t.reset
	switch {
	case err == nil && rest > 0:
		t.violation(t.from.tls.reader.Refuse(record.AlertDecodeError, "the stream ended inside a record"))
	case t.doubts(): // as in keepRest
		t.reset = true
	}
}

// say sends a closing alert behind everything else, and says whether it is on its way.
func (t transfer) say(a record.Alert) bool {
	if t.notified {
		return true
	}
	if t.to.kind() != kernelHalf {
		t.send(t.to.tls.writer.AppendAlert(nil, a))
		t.notified = true
		return true
	}
	if t.stuck() {
		return false
	}
	body := a.Body()
	e := ktls.Send(t.to.fd, record.TypeAlert, body[:])
	if t.back().from.kind() == kernelHalf && unopenable(e) { // the error of what came meanwhile; it's said once
		e = ktls.Send(t.to.fd, record.TypeAlert, body[:])
	}
	if e != 0 {
		t.to.wrote(0, len(body), e)
		return false
	}
	t.to.tls.debt += int64(len(body))
	t.notified = true
	return true
}

// held is how many bytes of a flow, on which nothing is stuck, the kernel has taken and TCP has not got yet. They would
// be lost with the end of the stream, which TCP alone hears of.
func (t transfer) held() int {
	if t.to.kind() != kernelHalf || t.closed || t.to.failed != 0 {
		return 0
	}
	suite := t.to.tls.writer.Suite()
	next, err := ktls.NextTX(t.to.fd, suite)
	if err != nil {
		return 0
	}
	sent, err := ktls.Sent(t.to.fd)
	if err != nil {
		return 0
	}
	return max(0, int(t.to.tls.debt+t.moved+int64(next)*int64(ktls.Overhead(suite))-int64(sent)))
}

// settling says whether the end waits for what the kernel holds, or for a peer to have everything, which no event tells
// of.
func (c *conn) settling() bool {
	return c.upward().ending() || c.downward().ending() || c.up.closed && c.down.closed
}

// clogged says whether closing the socket would take away what the peer has not acknowledged yet: unread bytes are answered with
// a reset, and behind its close_notify a peer may have sent what the kernel can't open, and so can't be read.
func (r readingHalf) clogged() bool {
	if r.kind() != kernelHalf || r.failed != 0 {
		return false
	}
	unread, err := unix.IoctlGetInt(int(r.fd), unix.SIOCINQ)
	return err == nil && unread > 0 && unsent(r.fd) > 0
}

func (t transfer) ending() bool {
	return (t.notified || t.ended && t.cutShort) && !t.closed && !t.stuck() && t.to.kind() == kernelHalf && t.to.failed == 0
}

// clearDecryptError clears the failure of the source if a write merely reported a record that could not be opened: the
// connection itself is fine.
func (t transfer) clearDecryptError() {
	e := t.from.failed
	if e == 0 || t.from.kind() != kernelHalf || !unopenable(e) {
		return
	}
	t.from.failed = 0
	if !t.ended {
		t.unopened(e)
	}
}

// takeSocketError takes the pending error of the source's socket (SO_ERROR). If it only says that a record did not open,
// the connection has not failed.
func (t transfer) takeSocketError() {
	e := takeError(t.from.fd) // 0 when a system call has taken it already
	if t.from.kind() != kernelHalf || !unopenable(e) {
		t.from.failed = e
		return
	}
	if t.c.stage == relaying && !t.ended {
		t.unopened(e)
	}
}
