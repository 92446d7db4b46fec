// SPDX-License-Identifier: Apache-2.0

// Package ktls lets the kernel carry a TLS connection whose handshake is done: what is written to the socket is sealed
// there, what is read from it has been opened there, and splice(2) moves both without a byte in user space.
//
//	support := ktls.Probe() // at start: what this kernel carries, tried out
//
//	if support.TX(suite) == nil && ktls.Attach(fd) == nil {
//		k, seq := writer.Export()
//		err := ktls.SetTX(fd, &k, seq)
//		k.Wipe()
//		...
//	}
//
// It carries TLS 1.2 and 1.3 with AES-128-GCM, AES-256-GCM and ChaCha20-Poly1305. Alerts and KeyUpdates go by Send and
// come by Receive. Keys of one direction can be replaced from Linux 6.14 on; nothing brings a direction back to user
// space. It offloads nothing to network cards, and knows no policy: what goes to the kernel, and when, is the caller's.
package ktls

import (
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway/record"
)

// include/uapi/linux/tls.h
const (
	optTX = 1
	optRX = 2

	cmsgSetType = 1
	cmsgGetType = 2

	cipherAES128GCM = 51
	cipherAES256GCM = 52
	cipherChaCha20  = 54

	infoLen    = 4      // struct tls_crypto_info: version and cipher, both in the machine's byte order
	maxInfoLen = 4 + 52 // with AES-256-GCM or ChaCha20-Poly1305
)

// Attach puts the TLS layer between the socket and TCP. It is transparent until keys are set. Errors: ENOENT, there is
// no module; ENOTCONN, the peer has ended its stream (or there is none); EEXIST, it is there already.
func Attach(fd int32) error {
	return unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_ULP, "tls")
}

// SetTX has the kernel seal what is written from now on, beginning with the record of that number. Again, with the next
// keys behind a KeyUpdate, it fails with EBUSY before Linux 6.14.
func SetTX(fd int32, k *record.Keys, seq uint64) error { return setKeys(fd, optTX, k, seq) }

// SetRX has the kernel open what is read from now on: the next byte in the socket has to be a record's first. Again as
// SetTX.
func SetRX(fd int32, k *record.Keys, seq uint64) error { return setKeys(fd, optRX, k, seq) }

func setKeys(fd int32, direction int, k *record.Keys, seq uint64) error {
	kind, ok := KindOf(k.Suite())
	if !ok {
		return unix.EINVAL
	}
	var buf [maxInfoLen]byte
	defer clear(buf[:])
	info := kind.info(&buf, k, seq)
	if _, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_TLS, uintptr(direction),
		uintptr(unsafe.Pointer(&info[0])), uintptr(len(info)), 0); e != 0 {
		return e
	}
	return nil
}

// info is struct tls12_crypto_info_…: version, cipher, IV, key, salt, record number. Of the 12 bytes that AES-GCM calls
// its nonce the first 4 are the salt; the other 8 are the rest of the IV in TLS 1.3, and in TLS 1.2 what the next
// record has for its explicit nonce: any number that was not used before, which its sequence number is.
func (k Kind) info(buf *[maxInfoLen]byte, keys *record.Keys, seq uint64) []byte {
	var iv [12]byte
	copy(iv[:], keys.IV())
	if !k.TLS13() && k.cipher() != cipherChaCha20 {
		binary.BigEndian.PutUint64(iv[4:], seq)
	}
	binary.NativeEndian.PutUint16(buf[0:], k.version())
	binary.NativeEndian.PutUint16(buf[2:], k.cipher())
	b := buf[:infoLen]
	if k.cipher() == cipherChaCha20 {
		b = append(append(b, iv[:]...), keys.Key()...)
	} else {
		b = append(append(append(b, iv[4:]...), keys.Key()...), iv[:4]...)
	}
	return binary.BigEndian.AppendUint64(b, seq)
}

// Send sends p as one record of another type than data, behind what was written before. EAGAIN: there is no room,
// nothing was sent.
func Send(fd int32, typ byte, p []byte) unix.Errno {
	var oob [cmsgSpace]byte
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob))
	h.Level, h.Type = unix.SOL_TLS, cmsgSetType
	h.SetLen(unix.CmsgLen(1))
	oob[unix.CmsgLen(0)] = typ
	n, err := unix.SendmsgN(int(fd), p, oob[:], nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	switch e, _ := err.(unix.Errno); {
	case err != nil:
		return e
	case n < len(p):
		return unix.EAGAIN
	}
	return 0
}

// cmsgSpace is CMSG_SPACE(1) on 64-bit machines: struct cmsghdr and a byte, aligned.
const cmsgSpace = unix.SizeofCmsghdr + 8

// Receive reads into p what comes next: one record of the type that it returns, or data of several. With no error and
// type 0 the stream is over (FIN). EAGAIN: no whole record is there, or, behind an EINVAL or EMSGSIZE of another call,
// what is there is none. EBADMSG: one did not open.
func Receive(fd int32, p []byte) (n int, typ byte, e unix.Errno) {
	var oob [64]byte // the type, and room for what else the socket may be set to tell
	n, oobn, _, _, err := unix.Recvmsg(int(fd), p, oob[:], unix.MSG_DONTWAIT)
	if err != nil {
		e, _ = err.(unix.Errno)
		return 0, 0, e
	}
	if oobn < unix.CmsgLen(1) {
		return n, 0, 0
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&oob))
	if h.Level != unix.SOL_TLS || h.Type != cmsgGetType {
		return n, 0, 0
	}
	return n, oob[unix.CmsgLen(0)], 0
}

// Sent is how many bytes TCP has taken from the layers above it, but for a constant: those that were acknowledged and
// those that wait. The kernel's TLS takes more from us than it gives to TCP at once, and what it still has when the
// stream is ended is lost; so whoever ends one compares this with what it has to be.
func Sent(fd int32) (uint64, error) {
	// In this order: what is acknowledged between the two calls makes the sum smaller, never larger.
	info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, fmt.Errorf("TCP_INFO: %w", err)
	}
	queued, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	if err != nil {
		return 0, fmt.Errorf("SIOCOUTQ: %w", err)
	}
	return info.Bytes_acked + uint64(queued), nil
}

// NextTX is the number of the next record that the kernel will seal.
func NextTX(fd int32, suite uint16) (uint64, error) {
	kind, ok := KindOf(suite)
	if !ok {
		return 0, unix.EINVAL
	}
	var buf [maxInfoLen]byte
	defer clear(buf[:]) // the kernel tells the keys as well
	size := uint32(kind.infoLen())
	if _, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_TLS, optTX,
		uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&size)), 0); e != 0 {
		return 0, e
	}
	return binary.BigEndian.Uint64(buf[kind.infoLen()-8:]), nil
}

// Overhead is how many bytes a record is longer than its data: header, explicit nonce, type, tag.
func Overhead(suite uint16) int {
	kind, _ := KindOf(suite)
	switch {
	case kind.TLS13():
		return 5 + 1 + 16
	case kind.cipher() == cipherChaCha20:
		return 5 + 16
	}
	return 5 + 8 + 16
}

// Stat reads /proc/net/tls_stat: what the kernel has counted since it loaded the module, such as TlsTxSw (sockets whose
// TX was set) and TlsDecryptError. It is empty without the module.
func Stat() map[string]uint64 {
	stat := map[string]uint64{}
	b, _ := os.ReadFile("/proc/net/tls_stat")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 {
			stat[f[0]], _ = strconv.ParseUint(f[1], 10, 64)
		}
	}
	return stat
}
