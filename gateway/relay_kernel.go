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

// carrier is who opens what a socket brings, or seals what is sent to it.
type carrier uint8

const (
	inUser   carrier = iota // we do; and the kernel may when the flow streams
	landing                 // we do, reading to the end of a record and no further: there the kernel goes on
	stays                   // we do for good
	inKernel                // the kernel does for good: there is no way back
)

// opens says whether what is read from s has to be opened here, seals whether what is sent to it has to be sealed here.
func (s *socket) opens() bool { return s.tls != nil && s.tls.rx != inKernel }
func (s *socket) seals() bool { return s.tls != nil && s.tls.tx != inKernel }

// kernelOpens and kernelSeals are the same of the kernel.
func (s *socket) kernelOpens() bool { return s.tls != nil && s.tls.rx == inKernel }
func (s *socket) kernelSeals() bool { return s.tls != nil && s.tls.tx == inKernel }

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
func (c *conn) considerKernel(f *flow, from, to *socket) {
	if c.route.kernel == nil {
		f.run = 0
		return
	}
	if from.opens() && !c.mayOpen(from) {
		f.run = 0
		return
	}
	if to.seals() && !c.sealInKernel(f, to) {
		return
	}
	if !from.opens() {
		f.run, f.splice = 0, true
		return
	}
	if from.tls.rx = landing; len(f.carry) == 0 {
		c.openInKernel(f, from)
	}
}

// mayOpen says whether the kernel may open what s brings. In TLS 1.3 the peer may change its keys at any time (RFC 8446,
// section 4.6.3), which only Linux 6.14 and newer can follow; and what they can't open can't be had back.
func (c *conn) mayOpen(s *socket) bool {
	k, suite := c.route.kernel, s.tls.reader.Suite()
	err := k.RX(suite)
	switch {
	case s.tls.rx == stays:
		return false
	case s.tls.rx == landing:
		return true
	case err != nil:
		return c.keepHere(&s.tls.rx, whyNot(err))
	case s.tls.reader.TLS13() && !k.Rekey:
		return c.keepHere(&s.tls.rx, noRekey)
	case !c.route.kernelRX:
		return c.keepHere(&s.tls.rx, oldKernel)
	}
	return true
}

// keepHere leaves a half with us, and counts why.
func (c *conn) keepHere(half *carrier, why hindrance) bool {
	*half = stays
	c.loop.counters.fallbacks[why].Add(1)
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
	if s.kernelOpens() || s.kernelSeals() {
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
func (c *conn) sealInKernel(f *flow, to *socket) bool {
	s := to.tls
	if s.tx == stays {
		f.run = 0
		return false
	}
	if s.asked || s.writer.UpdateDue() {
		return false // the next record is a KeyUpdate
	}
	err := c.route.kernel.TX(s.writer.Suite())
	if err == nil {
		err = to.attach()
	}
	var sent uint64
	if err == nil {
		sent, err = ktls.Sent(to.fd)
	}
	k, seq := s.writer.Export()
	defer k.Wipe()
	if err == nil {
		err = ktls.SetTX(to.fd, &k, seq)
	}
	if err != nil {
		f.run = 0
		return c.keepHere(&s.tx, whyNot(err))
	}
	s.debt = int64(sent) - f.moved - int64(seq)*int64(ktls.Overhead(k.Suite()))
	s.writer.Follow()
	s.tx = inKernel
	c.report.inKernel++
	c.loop.counters.kernelTX.Add(1)
	return true
}

// openInKernel hands the reading half over, at the end of a record: what the socket has is the beginning of the next.
func (c *conn) openInKernel(f *flow, from *socket) {
	s := from.tls
	f.run = 0
	k, seq := s.reader.Export()
	defer k.Wipe()
	err := from.attach()
	if err == nil {
		err = ktls.SetRX(from.fd, &k, seq)
	}
	if err != nil {
		c.keepHere(&s.rx, whyNot(err))
		return
	}
	s.reader.Follow()
	s.rx, s.tickets = inKernel, nil
	// The kernel hands out one record a call, so that a short read does not mean "drained".
	from.exact, from.readable = true, true
	f.splice = true
	c.report.inKernel++
	c.loop.counters.kernelRX.Add(1)
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
func (c *conn) readControl(f *flow, from, to *socket, said unix.Errno) int {
	if said != 0 && said != unix.EINVAL && said != unix.EIO {
		c.unopened(f, from, said)
		return 0
	}
	if said == 0 {
		if !from.ended() {
			c.judgeRecord(f, from, record.TypeData, nil) // recvmsg would go on behind it, however many there are
			return 0
		}
	}
	before := 0
	if to.seals() {
		before = to.tls.writer.Prefix()
	}
	buf := c.loop.scratch[before : before+maxPlain]
	n, typ, e := ktls.Receive(from.fd, buf)
	switch {
	case e == unix.EAGAIN && said == 0:
		f.drained(from)
		return 0
	case e == unix.EAGAIN:
		c.unopened(f, from, unix.EINVAL)
		return 0
	}
	return c.received(f, from, to, buf, n, typ, e)
}

// received does what a record asks for that the kernel has brought into buf: n bytes of a type, or e. It returns how many
// bytes of data it carried.
func (c *conn) received(f *flow, from, to *socket, buf []byte, n int, typ byte, e unix.Errno) int {
	r := &from.tls.reader
	switch {
	case e != 0:
		c.unopened(f, from, e)
	case n == 0 && typ == 0:
		c.streamEnded(f, from, to)
	case typ == record.TypeData && n > 0:
		r.Carried(n)
		c.carried(f, n)
		if to.seals() {
			c.send(f, to, c.loop.scratch[:to.tls.writer.Seal(c.loop.scratch, n)])
		} else {
			c.send(f, to, buf[:n])
		}
		return n
	default:
		c.judgeRecord(f, from, typ, buf[:n])
	}
	return 0
}

// ended says whether the peer's FIN has come, seen as an event yet or not.
func (s *socket) ended() bool {
	if s.hup {
		return true
	}
	p := [1]unix.PollFd{{Fd: s.fd, Events: unix.POLLRDHUP}}
	n, _ := unix.Poll(p[:], 0)
	return n > 0
}

// judgeRecord does what a record asks for that the kernel has opened and that is no data.
func (c *conn) judgeRecord(f *flow, from *socket, typ byte, p []byte) {
	rec, err := from.tls.reader.Judge(typ, p)
	switch {
	case err != nil:
		f.ended, from.readable = true, false
		c.violation(from, err)
		return
	case rec.Kind == record.KeyUpdate || rec.Kind == record.KeyUpdateRequested:
		if !c.openWithNewKeys(f, from) {
			return
		}
	}
	c.handleRecord(f, from, rec)
}

// answerUpdates gives one answer for all the KeyUpdates of a turn that ask for one: the kernel brings them one by one.
func (c *conn) answerUpdates() {
	for _, s := range [...]*socket{&c.client, &c.backend} {
		if s.kernelOpens() && s.tls.asked && !c.report.told && s.failed == 0 {
			c.renewKeys(c.flowTo(s), s)
		}
	}
}

// openWithNewKeys follows the peer's KeyUpdate. Where the kernel can't, nothing behind it can be opened any more: the
// peer gets an alert, and the other side a reset, so that it does not take what it has for the whole.
func (c *conn) openWithNewKeys(f *flow, from *socket) bool {
	r := &from.tls.reader
	k, seq := r.Export()
	defer k.Wipe()
	r.Follow()
	if err := ktls.SetRX(from.fd, &k, seq); err != nil {
		f.ended, from.readable = true, false
		c.stuckWithKeys(from, "new keys, which the kernel can't open with: "+err.Error())
		return false
	}
	return true
}

// renewInKernel goes over to the next keys for what is sent, where the kernel can.
func (c *conn) renewInKernel(f *flow, to *socket) {
	s := to.tls
	if !c.route.kernel.Rekey || f.notified {
		return
	}
	suite := s.writer.Suite()
	if e := ktls.Send(to.fd, record.TypeHandshake, keyUpdate); e != 0 {
		to.wrote(0, len(keyUpdate), e)
		return
	}
	next, err := ktls.NextTX(to.fd, suite)
	s.debt += int64(len(keyUpdate)) + int64(next)*int64(ktls.Overhead(suite))
	s.asked = false
	s.writer.Update()
	k, seq := s.writer.Export()
	defer k.Wipe()
	s.writer.Follow()
	if err == nil {
		err = ktls.SetTX(to.fd, &k, seq)
	}
	if err != nil {
		c.stuckWithKeys(to, "the kernel does not take new keys: "+err.Error())
	}
}

// keyUpdate asks for no answer: ours is one, or is due to what we have sent (RFC 8446, section 4.6.3).
var keyUpdate = []byte{24, 0, 0, 1, 0}

// keysServe says whether more may be sent to a socket that the kernel seals for. If not, room or the end is near: where
// the kernel can't renew its keys a connection goes on with the old ones while that's no breach, until there is data for
// a peer that wants an answer before (RFC 8446, section 4.6.3), or the keys are used up (section 5.5).
func (c *conn) keysServe(f *flow, from, to *socket) bool {
	s := to.tls
	if !s.asked && !s.writer.UpdateDue() {
		return true
	}
	if c.route.kernel.Rekey {
		c.renewKeys(f, to)
		return !c.report.told && to.failed == 0 && !s.asked
	}
	switch waits, _ := unix.IoctlGetInt(int(from.fd), unix.SIOCINQ); {
	case s.asked && waits > 0:
		c.stuckWithKeys(to, "the peer asks for new keys, which the kernel can't change to (Linux 6.14 could); ktls=off serves such peers")
	case s.writer.UsedUp():
		c.stuckWithKeys(to, "the keys are used up, and the kernel can't change them (Linux 6.14 could); ktls=off serves such streams")
	}
	return !c.report.told
}

// stuckWithKeys ends a connection whose keys have to change and can't.
func (c *conn) stuckWithKeys(s *socket, why string) {
	if c.report.told {
		return
	}
	c.tell(RekeyFailed, c.side(s)+": "+why)
	c.report.byBackend = s == &c.backend
	c.report.alertSent = int16(record.AlertInternalError)
	c.say(c.flowTo(s), s, record.AlertInternalError)
}

// unopenable are the errors of a record that the kernel could not open. They are also left on the socket, where
// sending would fail with them.
func unopenable(e unix.Errno) bool {
	return e == unix.EBADMSG || e == unix.EMSGSIZE || e == unix.EINVAL
}

// unopened ends reading with the error that the kernel has: a breach of the record protocol, or the connection's end.
func (c *conn) unopened(f *flow, from *socket, e unix.Errno) {
	if !unopenable(e) {
		f.got(from, -1, 0, e)
		return
	}
	_ = takeError(from.fd)
	f.ended, from.readable = true, false
	alert, words := record.AlertBadRecordMAC, "it does not open: forged, damaged, or of other keys"
	switch e {
	case unix.EMSGSIZE:
		alert, words = record.AlertRecordOverflow, "it is longer than a record may be"
	case unix.EINVAL:
		alert, words = record.AlertProtocolVersion, "no record of TLS begins like this"
	}
	c.violation(from, from.tls.reader.Refuse(alert, words))
}

// streamEnded is a FIN. Bytes that the kernel has not made a record of are half of one.
func (c *conn) streamEnded(f *flow, from, to *socket) {
	rest, err := unix.IoctlGetInt(int(from.fd), unix.SIOCINQ)
	f.got(from, 0, 0, 0)
	f.cutShort = !f.reset
	switch {
	case err == nil && rest > 0:
		c.violation(from, from.tls.reader.Refuse(record.AlertDecodeError, "the stream ended inside a record"))
	case c.doubts(from, to): // as in keepRest
		f.reset = true
	}
}

// say sends a closing alert behind everything else, and says whether it is on its way.
func (c *conn) say(f *flow, to *socket, a record.Alert) bool {
	if f.notified {
		return true
	}
	if !to.kernelSeals() {
		c.send(f, to, to.tls.writer.AppendAlert(nil, a))
		f.notified = true
		return true
	}
	if f.stuck() {
		return false
	}
	body := a.Body()
	e := ktls.Send(to.fd, record.TypeAlert, body[:])
	if to.kernelOpens() && unopenable(e) { // the error of what came meanwhile; it's said once
		e = ktls.Send(to.fd, record.TypeAlert, body[:])
	}
	if e != 0 {
		to.wrote(0, len(body), e)
		return false
	}
	to.tls.debt += int64(len(body))
	f.notified = true
	return true
}

// held is how many bytes of a flow, on which nothing is stuck, the kernel has taken and TCP has not got yet. They would
// be lost with the end of the stream, which TCP alone hears of.
func (f *flow) held(to *socket) int {
	if !to.kernelSeals() || f.closed || to.failed != 0 {
		return 0
	}
	suite := to.tls.writer.Suite()
	next, err := ktls.NextTX(to.fd, suite)
	if err != nil {
		return 0
	}
	sent, err := ktls.Sent(to.fd)
	if err != nil {
		return 0
	}
	return max(0, int(to.tls.debt+f.moved+int64(next)*int64(ktls.Overhead(suite))-int64(sent)))
}

// settling says whether the end waits for what the kernel holds, or for a peer to have everything, which no event tells
// of.
func (c *conn) settling() bool {
	return c.up.ending(&c.backend) || c.down.ending(&c.client) || c.up.closed && c.down.closed
}

// clogged says whether closing s would take away what the peer has not acknowledged yet: unread bytes are answered with
// a reset, and behind its close_notify a peer may have sent what the kernel can't open, and so can't be read.
func (s *socket) clogged() bool {
	if !s.kernelOpens() || s.failed != 0 {
		return false
	}
	unread, err := unix.IoctlGetInt(int(s.fd), unix.SIOCINQ)
	return err == nil && unread > 0 && unsent(s.fd) > 0
}

func (f *flow) ending(to *socket) bool {
	return (f.notified || f.ended && f.cutShort) && !f.closed && !f.stuck() && to.kernelSeals() && to.failed == 0
}

// clearDecryptError clears the failure of s if a write merely reported a record that could not be opened: the connection
// itself is fine.
func (c *conn) clearDecryptError(s *socket) {
	if s.failed == 0 || !s.kernelOpens() || !unopenable(s.failed) {
		return
	}
	e := s.failed
	s.failed = 0
	if f := c.flowFrom(s); !f.ended {
		c.unopened(f, s, e)
	}
}

// flowTo is the direction that ends at s, flowFrom the one that begins there.
func (c *conn) flowTo(s *socket) *flow {
	if s == &c.client {
		return &c.down
	}
	return &c.up
}

func (c *conn) flowFrom(s *socket) *flow { return c.other(c.flowTo(s)) }

// takeSocketError takes the pending error of s (SO_ERROR). If it only says that a record did not open, the connection
// has not failed.
func (c *conn) takeSocketError(s *socket) {
	e := takeError(s.fd) // 0 when a system call has taken it already
	if !s.kernelOpens() || !unopenable(e) {
		s.failed = e
		return
	}
	if f := c.flowFrom(s); c.stage == relaying && !f.ended {
		c.unopened(f, s, e)
	}
}
