// SPDX-License-Identifier: Apache-2.0

package gateway

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// unsent is how many bytes the peer has not acknowledged yet.
func unsent(fd int32) int {
	n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ)
	if err != nil {
		return 0
	}
	return n
}

// takeError reads and clears the error that waits on a socket.
func takeError(fd int32) unix.Errno {
	v, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return unix.ECONNRESET
	}
	return unix.Errno(v)
}

// delayAcks has the acknowledgement of what comes next wait for data of ours to go along with: a packet less for each
// question that is answered at once.
func delayAcks(fd int32) { _ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0) }

// ackNow sends the acknowledgement that waits, and leaves those after it as they were (any even number but 0 does that).
// Without it a backend that speaks first hears of its connection only after TCP_DELACK_MAX, which is 200 ms.
func ackNow(fd int32) { _ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 2) }

const (
	// AWS's network load balancer forgets a flow after 350 s of silence, most firewalls after longer: idle
	// connections are kept known to them from well before that.
	keepaliveIdle     = 120
	keepaliveInterval = 30
	keepaliveCount    = 4
)

// keepAlive has the kernel ask a silent peer from time to time whether it is still there.
func keepAlive(fd int32) {
	for _, o := range [...][3]int{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, keepaliveIdle},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, keepaliveInterval},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, keepaliveCount},
	} {
		_ = sysSet(fd, o[0], o[1], o[2]) // a kernel without one of them still works
	}
}

func setNodelay(fd int32) { _ = sysSet(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) }

// sysDropSYN has a listener drop segments that begin a connection. Since Linux 6.17 or so that takes CAP_NET_ADMIN.
func sysDropSYN(fd int32) error {
	return unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(dropSYN)), Filter: &dropSYN[0]})
}

// dropSYN is a classic BPF program for a TCP socket: drop segments with SYN set, take the others. The program sees
// the TCP header; its flags are in byte 13.
var dropSYN = []unix.SockFilter{
	{Code: unix.BPF_LD | unix.BPF_B | unix.BPF_ABS, K: 13},
	{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: 0x02, Jt: 0, Jf: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	{Code: unix.BPF_RET | unix.BPF_K, K: 0xffff},
}

// hearFrom has a socket drop packets that arrive with fewer hops left than this, in both families: IPv4 reaches an IPv6
// socket as well.
func hearFrom(fd int32, hops int) error {
	if e := sysSet(fd, unix.IPPROTO_IP, unix.IP_MINTTL, hops); e != 0 {
		return e
	}
	e := sysSet(fd, unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, hops)
	if e != 0 && e != unix.ENOPROTOOPT && e != unix.EOPNOTSUPP { // what an IPv4 socket says
		return e
	}
	return nil
}

func setTransparent(fd, family int) error {
	if family == unix.AF_INET6 {
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT, 1)
	}
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TRANSPARENT, 1)
}

// setPortRange has the kernel choose among these ports (IP_LOCAL_PORT_RANGE, since Linux 6.3).
func setPortRange(fd int, lo, hi uint16) error {
	return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_LOCAL_PORT_RANGE, int(uint32(hi)<<16|uint32(lo)))
}

// kernelChooses says whether these ports are within the range that is set for the whole machine. Of others the kernel
// takes no notice.
func kernelChooses(lo, hi uint16) bool {
	var from, to uint16
	text, _ := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	n, _ := fmt.Sscan(string(text), &from, &to)
	return n == 2 && from <= lo && hi <= to
}
