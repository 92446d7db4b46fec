// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tlsnat/tlsnat/gateway"
	"github.com/tlsnat/tlsnat/gateway/ktls"
)

// handOverErrnos are what setsockopt(2) and getsockopt(2) fail with, on any socket and in Linux' net/tls/tls_main.c.
var handOverErrnos = []unix.Errno{unix.ENOENT, unix.ENOTCONN, unix.EBUSY, unix.EINVAL, unix.ENOMEM, unix.ENOPROTOOPT, unix.EOPNOTSUPP,
	unix.EBADF, unix.EFAULT, unix.ENOTSOCK, unix.EPERM, unix.EACCES, unix.EINTR, unix.EAGAIN, unix.EMSGSIZE, unix.ECONNRESET, 4000}

// worthLittle is after how many bytes a stream goes to the kernel here: a test makes many.
const worthLittle = 64 << 10

// TestKTLSHandOverThatFailsLeavesTheStreamWithUs: whatever the calls fail with that give a direction to the kernel, the
// stream goes on in user space, whole. Where the kernel has no TLS, the first of them fails by itself.
func TestKTLSHandOverThatFailsLeavesTheStreamWithUs(t *testing.T) {
	k := ktls.Probe()
	absent := k.Absent != nil
	if absent {
		k = &ktls.Support{Rekey: true, Mended: true} // it claims what it has not
	}
	t.Cleanup(gateway.Kernel(k, worthLittle))
	var call atomic.Pointer[string]
	var errno, hits atomic.Int32
	t.Cleanup(gateway.Inject(func(c string, _ int) unix.Errno {
		switch failing := call.Load(); {
		case failing != nil && c == *failing:
			hits.Add(1)
			return unix.Errno(errno.Load())
		case absent && failing != nil && c == "TCP_ULP":
			return unix.EEXIST // it is there already, says a kernel that has none: so the next call is made
		}
		return 0
	}))
	b := start(t, fmt.Sprintf(":{0} edge.test -> %s\n:{1} edge.test -> tls://%s backend-ca=root backend-name=edge.test", echoServer(t), tlsEcho(t)),
		"LOOPS=1", "BACKEND_CAS="+filepath.Dir(pki(t).rootFile(t)))
	calls := []string{"TCP_ULP", "TLS_TX", "TLS_RX", "getsockopt"}
	for _, c := range calls {
		for i, e := range handOverErrnos {
			call.Store(&c)
			errno.Store(int32(e))
			hits.Store(0)
			version := []uint16{tls.VersionTLS12, tls.VersionTLS13}[i/2%2]
			conn := b.dialTLS(t, i%2, func(c *tls.Config) { c.MaxVersion = version })
			exchange(t, conn, random(uint64(i), 1<<20))
			asked := hits.Load()
			call.Store(nil) // what is in the kernel by now ends as it should
			_ = conn.CloseWrite()
			_, err := io.Copy(io.Discard, conn)
			_ = conn.Close()
			must := version == tls.VersionTLS12 || k.Rekey || i%2 == 0 && c != "TLS_RX" // else nothing would come of it
			if l := b.lineOf(t, conn.NetConn()); l.Outcome != "ok" || err != nil || must && asked == 0 || l.BytesUp != 1<<20 || l.BytesDown != 1<<20 {
				t.Errorf("%s of %s, %d times: the client saw %v, line: %s", e, c, asked, err, l)
			}
		}
	}
	b.stop(t)
	if left := gateway.Leftovers(b.gateway); left != "" {
		t.Error(left)
	}
	s := b.gateway.Status().Kernel
	if s.Fallbacks["refused"] == 0 || s.Fallbacks["half_closed"] == 0 {
		t.Errorf("counted: %+v", s)
	}
}
