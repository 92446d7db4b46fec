// SPDX-License-Identifier: Apache-2.0

package record

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway/testkit"
)

// opensslNames are the suites as s_client wants them.
var opensslNames = map[uint16]string{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256:       "ECDHE-ECDSA-AES128-GCM-SHA256",
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384:       "ECDHE-ECDSA-AES256-GCM-SHA384",
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256: "ECDHE-ECDSA-CHACHA20-POLY1305",
}

// A peer that is not crypto/tls, and that asks for a KeyUpdate, which crypto/tls never does.
func TestOpenSSLClientIsServed(t *testing.T) {
	testkit.Program(t, "openssl", "openssl")
	for _, suite := range fastSuites {
		t.Run(tls.CipherSuiteName(suite), func(t *testing.T) { serveOpenSSL(t, suite) })
	}
}

func serveOpenSSL(t *testing.T, suite uint16) {
	s, stdin, stdout := dialOpenSSL(t, suite)
	say := func(line string) { io.WriteString(stdin, line+"\n") }
	say("hello from openssl")
	s.await("hello from openssl\n", Data)
	if isTLS13(suite) {
		say("K") // s_client's command for a KeyUpdate that asks for one
		s.await("", KeyUpdateRequested)
		s.out.write(s.w.AppendKeyUpdate(nil, false))
		say("new keys")
		s.await("new keys\n", Data)
	}
	s.send([]byte("hello from the engine\n"), 5)
	for line := ""; !strings.Contains(line, "hello from the engine"); {
		var err error
		if line, err = stdout.ReadString('\n'); err != nil {
			t.Fatalf("openssl never printed what we sealed: %v", err)
		}
	}
	say("Q")
	s.await("", CloseNotify)
}

// dialOpenSSL has s_client do a handshake with crypto/tls on loopback, and takes over.
func dialOpenSSL(t *testing.T, suite uint16) (*session, io.Writer, *bufio.Reader) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	listener.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
	args := []string{"s_client", "-connect", listener.Addr().String(), "-tls1_2", "-cipher", opensslNames[suite]}
	if isTLS13(suite) {
		args = append(args[:3], "-tls1_3", "-ciphersuites", tls.CipherSuiteName(suite))
	}
	client := exec.Command("openssl", args...)
	stdin, err1 := client.StdinPipe()
	stdout, err2 := client.StdoutPipe()
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Process.Kill(); client.Wait() })
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return serveOn(t, conn, suite), stdin, bufio.NewReader(stdout)
}

// serveOn puts a session's two queues before a socket.
func serveOn(t *testing.T, conn net.Conn, suite uint16) *session {
	t.Helper()
	handshaking.Lock()
	defer handshaking.Unlock()
	in, out := newQueue(), newQueue()
	go pump(in.write, in.finish, conn.Read)
	go pump(func(b []byte) { conn.Write(b) }, func() {}, out.take)
	t.Cleanup(out.finish)
	var log bytes.Buffer
	config := testConfig(suite)
	config.KeyLogWriter = &log
	if err := tls.Server(&wire{in: in, out: out}, config).Handshake(); err != nil {
		t.Fatal(err)
	}
	s := &session{t: t, suite: suite, in: in, out: out}
	out.mu.Lock()
	sent := bytes.Clone(out.all)
	out.mu.Unlock()
	s.takeOver(Server, log.String(), sent)
	return s
}

func pump(write func([]byte), finish func(), read func([]byte) (int, error)) {
	defer finish()
	buf := make([]byte, 1<<16)
	for {
		n, err := read(buf)
		write(buf[:n])
		if err != nil {
			return
		}
	}
}

// await reads until the wanted data or event has come, and nothing else.
func (s *session) await(want string, kind Kind) {
	s.t.Helper()
	var got []byte
	buf := make([]byte, MaxRecord)
	for {
		n, err := s.in.take(buf)
		if err != nil {
			s.t.Fatalf("waiting for %v %q: %v", kind, want, err)
		}
		data, events, rest, err := openAll(&s.r, append(s.unread, buf[:n]...))
		if err != nil {
			s.t.Fatal(err)
		}
		s.unread = bytes.Clone(rest)
		got = append(got, data...)
		if len(events) > 0 && events[0].Kind == kind || kind == Data && string(got) == want {
			return
		}
		if len(events) > 0 || !strings.HasPrefix(want, string(got)) {
			s.t.Fatalf("waiting for %v %q: got %q and %v", kind, want, got, events)
		}
	}
}
