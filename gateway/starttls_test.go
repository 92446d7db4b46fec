// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"bufio"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tlsnat/tlsnat/gateway"
)

// script is a server of a protocol of lines: what it greets with, and what it answers to the first word of a line. What
// has no answer is echoed, and ends it.
type script struct {
	greeting string
	answers  map[string]string
	data     func(*bufio.Reader) error // reads what follows an answer that begins with 354
}

var (
	mailScript = script{"220-mx.test says\r\n220 hello\r\n", map[string]string{"EHLO": "250-mx.test\r\n250 SIZE 1000000\r\n", "LHLO": "250 mx.test\r\n",
		"MAIL": "250 ok\r\n", "RCPT": "250 ok\r\n", "DATA": "354 go on\r\n", "QUIT": "221 bye\r\n"}, readMail}
	imapScript = script{"* OK [CAPABILITY IMAP4rev1] mailbox.test\r\n", map[string]string{"CAPABILITY": "* CAPABILITY IMAP4rev1 AUTH=PLAIN SASL-IR\r\n# OK\r\n",
		"AUTHENTICATE": "# OK\r\n", "LIST": "* LIST (\\HasNoChildren) \"/\" INBOX\r\n# OK\r\n", "LOGOUT": "* BYE\r\n# OK\r\n"}, nil}
	popScript = script{"+OK <12.34@mailbox.test>\r\n", map[string]string{"CAPA": "+OK\r\nUSER\r\n.\r\n", "USER": "+OK\r\n", "PASS": "+OK\r\n",
		"LIST": "+OK\r\n1 120\r\n2 200\r\n.\r\n", "QUIT": "+OK\r\n"}, nil}
)

func readMail(r *bufio.Reader) error {
	for {
		line, err := r.ReadString('\n')
		if err != nil || line == ".\r\n" {
			return err
		}
	}
}

// speak serves one connection. In IMAP the tag, the word before the command, stands for # in the answer.
func (s script) speak(c net.Conn) {
	if _, err := io.WriteString(c, s.greeting); err != nil {
		return
	}
	for r := bufio.NewReader(c); ; {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		words := append(strings.Fields(line), "", "")
		answer, known := s.answers[strings.ToUpper(words[0])]
		if tagged, ok := s.answers[strings.ToUpper(words[1])]; !known && ok {
			answer, known = strings.ReplaceAll(tagged, "#", words[0]), true
		}
		if !known {
			answer = "you said " + line
		}
		if _, err := io.WriteString(c, answer); err != nil || !known {
			return
		}
		if strings.HasPrefix(answer, "354") {
			if s.data(r) != nil {
				return
			}
			_, _ = io.WriteString(c, "250 taken\r\n")
		}
	}
}

// serve runs the script until the test ends.
func (s script) serve(t testing.TB) string { return serve(t, func(c *net.TCPConn) { s.speak(c) }) }

// hostArg is the name that clients ask for, with the i-th port of the bed.
func (b *bed) hostArg(i int) string { return fmt.Sprintf("edge.test:%d", b.ports[i]) }

// curlUpgrades runs curl, which takes edge.test for this machine and demands TLS.
func (b *bed) curlUpgrades(t testing.TB, i int, stdin string, args ...string) string {
	t.Helper()
	args = append([]string{"-sS", "--ssl-reqd", "--resolve", b.hostArg(i) + ":127.0.0.1", "--cacert", pki(t).rootFile(t)}, args...)
	return run(t, command(t, program(t, "curl", "curl"), args...), stdin)
}

func TestMailClientsThroughStartTLS(t *testing.T) {
	beside(t)
	b := start(t, `
		:{0} edge.test -> `+mailScript.serve(t)+` starttls=smtp
		:{1} edge.test -> `+imapScript.serve(t)+` starttls=imap
		:{2} edge.test -> `+popScript.serve(t)+` starttls=pop3`)
	b.curlUpgrades(t, 0, "Subject: x\r\n\r\nhello\r\n", "smtp://"+b.hostArg(0), "--mail-from", "a@a.test", "--mail-rcpt", "b@b.test", "-T", "-")
	b.next(t).expect(t, logLine{Outcome: "ok", SNI: "edge.test", TLS: "1.3", Mode: "terminate"})
	if out := b.curlUpgrades(t, 1, "", "imap://"+b.hostArg(1), "-u", "user:secret"); !strings.Contains(out, "INBOX") {
		t.Errorf("curl lists %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "ok", TLS: "1.3"})
	if out := b.curlUpgrades(t, 2, "", "pop3://"+b.hostArg(2), "-u", "user:secret"); !strings.Contains(out, "2 200") {
		t.Errorf("curl lists %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "ok", TLS: "1.3"})
}

// TestSClientStartsTLS is OpenSSL's client with each protocol that needs no greeting of the backend's; its -starttls
// checks what it is answered.
func TestSClientStartsTLS(t *testing.T) {
	beside(t)
	plain := script{}.serve(t)
	b := start(t, strings.NewReplacer("MAIL", mailScript.serve(t), "IMAP", imapScript.serve(t), "POP", popScript.serve(t), "PLAIN", plain).Replace(`
		:{0} edge.test -> MAIL starttls=smtp
		:{1} edge.test -> IMAP starttls=imap
		:{2} edge.test -> POP starttls=pop3
		:{3} edge.test -> PLAIN starttls=postgres
		:{4} edge.test -> PLAIN starttls=ldap`))
	for i, protocol := range []string{"smtp", "imap", "pop3", "postgres", "ldap"} {
		b.sClient(t, i, "-starttls", protocol)
		b.next(t).expect(t, logLine{Outcome: "ok", SNI: "edge.test", TLS: "1.3"})
	}
	b.sClient(t, 0, "-starttls", "lmtp", "-tls1_2")
	b.next(t).expect(t, logLine{Outcome: "ok", TLS: "1.2"})
}

// psql asks a question through the i-th port.
func (b *bed) psql(t testing.TB, i int, settings string, sql ...string) (string, error) {
	t.Helper()
	args := []string{fmt.Sprintf("host=edge.test hostaddr=127.0.0.1 port=%d user=tester dbname=postgres %s", b.ports[i], settings),
		"-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"}
	for _, s := range sql {
		args = append(args, "-c", s)
	}
	cmd := command(t, program(t, "psql", "postgresql-client"), args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	launch(t, cmd)
	err := cmd.Wait()
	return out.String(), err
}

// expectEnd is expect for a line of peers that leave without reading each other's close_notify: then the one that is late
// meets a reset.
func (l logLine) expectEnd(t testing.TB, want logLine) {
	t.Helper()
	if !slices.Contains([]string{"ok", "client_reset", "backend_reset"}, l.Outcome) {
		t.Errorf("outcome %s: %s", l.Outcome, l)
	}
	l.expect(t, want)
}

const asksWhoSees = "select ssl from pg_stat_ssl where pid = pg_backend_pid()"

func TestPostgreSQLThroughTerminate(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> 127.0.0.1:"+postgres(t)+" starttls=postgres\n:{0} -> 127.0.0.1:1 starttls=postgres")
	verified := "sslmode=verify-full sslrootcert=" + pki(t).rootFile(t)
	if out, err := b.psql(t, 0, verified, "select 6 * 7", asksWhoSees, "select length(repeat('x', 3000000))"); out != "42\nf\n3000000\n" {
		t.Errorf("psql says %q, %v", out, err)
	}
	b.next(t).expect(t, logLine{Outcome: "ok", SNI: "edge.test", TLS: "1.3", Mode: "terminate"})
	out, err := b.psql(t, 0, "sslmode=disable", "select 1")
	if err == nil || !strings.Contains(out, "this port takes connections with TLS only") {
		t.Errorf("psql without TLS says %q, %v", out, err)
	}
	b.next(t).expect(t, logLine{Outcome: "bad_hello", Stage: "starttls", Error: "postgres: a startup message without TLS"})
}

// TestPostgreSQLThroughPass: the name routes, and the backend's own certificate is what the client sees.
func TestPostgreSQLThroughPass(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> 127.0.0.1:"+postgres(t, postgresTLS(t)...)+" starttls=postgres mode=pass\n:{0} -> reject starttls=postgres")
	verified := "sslmode=verify-full sslrootcert=" + pki(t).rootFile(t)
	if out, err := b.psql(t, 0, verified, "select 6 * 7", asksWhoSees); out != "42\nt\n" {
		t.Errorf("psql says %q, %v", out, err)
	}
	b.next(t).expectEnd(t, logLine{SNI: "edge.test", Mode: "pass"})
	if out, err := b.psql(t, 0, "sslmode=require sslsni=0", "select 1"); err == nil {
		t.Errorf("psql without a name says %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "denied"})
}

// postgresTLS are the settings of a server with TLS. The edge shows clients of PostgreSQL its other certificate.
func postgresTLS(t testing.TB) []string {
	a := pki(t)
	return []string{"ssl=on", "ssl_cert_file=" + string(a.chainPEM("edge-rsa")), "ssl_key_file=" + string(a.leaves["edge-rsa"].keyPEM())}
}

// TestPostgreSQLDirectTLS is what libpq 17 does with sslnegotiation=direct: TLS at once, with the ALPN that it insists on.
func TestPostgreSQLDirectTLS(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> 127.0.0.1:"+postgres(t)+" starttls=postgres")
	c := b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos = []string{"postgresql"} })
	if p := c.ConnectionState().NegotiatedProtocol; p != "postgresql" {
		t.Errorf("ALPN %q", p)
	}
	startup := "\x00\x03\x00\x00user\x00tester\x00database\x00postgres\x00\x00"
	_, _ = c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(4+len(startup))), startup...))
	answer := make([]byte, 9)
	if _, err := io.ReadFull(c, answer); err != nil || string(answer) != "R\x00\x00\x00\x08\x00\x00\x00\x00" {
		rest, _ := io.ReadAll(c)
		t.Errorf("the server answers %q, %v", append(answer, rest...), err)
	}
	_ = c.Close()
	b.lineOf(t, c.NetConn()).expect(t, logLine{ALPN: "postgresql", TLS: "1.3"})
}

// TestPostgreSQLCancelIsPassedOn: psql that is interrupted connects once more, in the clear, to cancel its query.
func TestPostgreSQLCancelIsPassedOn(t *testing.T) {
	beside(t)
	b := start(t, ":{0} -> 127.0.0.1:"+postgres(t)+" starttls=postgres cert=edge.test")
	cmd := command(t, program(t, "psql", "postgresql-client"), fmt.Sprintf("host=127.0.0.1 port=%d user=tester dbname=postgres sslmode=require", b.ports[0]),
		"-X", "-q", "-A", "-t", "-c", "select 'it runs'", "-c", "select pg_sleep(300)")
	var said output
	cmd.Stdout, cmd.Stderr = &said, &said
	launch(t, cmd)
	said.await(t, "it runs")
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for waiting := true; waiting; { // what comes before the query runs is lost
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
			waiting = false
		case <-time.After(100 * time.Millisecond):
		}
	}
	if !strings.Contains(said.text(), "canceling statement due to user request") {
		t.Errorf("psql says %q", said.text())
	}
	b.line(t, func(l logLine) bool { return l.TLS == "" && l.BytesUp == 16 }).expect(t, logLine{Outcome: "ok", Mode: "terminate"})
	b.line(t, func(l logLine) bool { return l.TLS != "" }).expect(t, logLine{Outcome: "ok"})
}

// mariadb runs a server with a user edge, as postgres does, and returns its port and its socket.
func mariadb(t testing.TB, settings ...string) (port, socket string) {
	t.Helper()
	install := program(t, "mariadb-install-db", "mariadb-server-core")
	daemon := program(t, "mariadbd", "mariadb-server-core")
	dir, err := os.MkdirTemp("", "tlsnat")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	as := unprivileged(t, dir)
	as2 := func(cmd *exec.Cmd) *exec.Cmd {
		cmd.SysProcAttr.Credential, cmd.Dir = as, dir
		cmd.Env = append(os.Environ(), "TMPDIR="+dir) // servers take each other's temporary tables for leavings
		return cmd
	}
	data, users := filepath.Join(dir, "data"), filepath.Join(dir, "users.sql")
	if err := os.WriteFile(users, []byte("create user edge@'%' identified by 'secret';\ngrant all on *.* to edge@'%';\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, as2(command(t, install, "--no-defaults", "--datadir="+data, "--auth-root-authentication-method=normal", "--skip-test-db")), "")
	port, socket = fmt.Sprint(freePorts(t, 1)[0]), filepath.Join(dir, "s")
	args := append([]string{"--no-defaults", "--datadir=" + data, "--port=" + port, "--socket=" + socket, "--bind-address=127.0.0.1",
		"--skip-name-resolve", "--init-file=" + users, "--pid-file=" + filepath.Join(dir, "pid"), "--innodb-flush-method=nosync"}, settings...)
	for i := range args {
		args[i] = fileFor(t, as, dir, args[i])
	}
	cmd := as2(command(t, daemon, args...))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	server(t, cmd, "127.0.0.1:"+port)
	return port, socket
}

// mysql asks a server through the i-th port.
func (b *bed) mysql(t testing.TB, i int, args ...string) (string, error) {
	t.Helper()
	args = append([]string{"--no-defaults", "-h", "127.0.0.1", "-P", fmt.Sprint(b.ports[i]), "-u", "edge", "-N", "-B"}, args...)
	cmd := command(t, program(t, "mariadb", "mariadb-client-core"), args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	launch(t, cmd)
	err := cmd.Wait()
	return out.String(), err
}

// TestMariaDBThroughTerminate: the server knows nothing of TLS, and its packets are counted for it.
func TestMariaDBThroughTerminate(t *testing.T) {
	beside(t)
	port, socket := mariadb(t)
	b := start(t, ":{0} -> 127.0.0.1:"+port+" starttls=mysql cert=edge.test\n:{1} -> 127.0.0.1:1 unix:"+socket+"/backup starttls=mysql cert=edge.test\n"+
		":{2} -> 127.0.0.1:1 starttls=mysql cert=edge.test")
	ca := "--ssl-ca=" + pki(t).rootFile(t)
	for i := range 2 {
		out, err := b.mysql(t, i, ca, "--ssl", "-psecret", "-e", "select 6 * 7; select length(repeat('x', 3000000)); select repeat('y', 100000)")
		if want := "42\n3000000\n" + strings.Repeat("y", 100000) + "\n"; out != want || err != nil {
			t.Errorf("mariadb says %.200q, %v", out, err)
		}
		b.next(t).expectEnd(t, logLine{TLS: "1.3", Mode: "terminate"})
	}
	out, err := b.mysql(t, 0, ca, "--ssl", "-pwrong", "-e", "select 1")
	if err == nil || !strings.Contains(out, "Access denied") {
		t.Errorf("with a wrong password mariadb says %q, %v", out, err)
	}
	b.next(t).expectEnd(t, logLine{TLS: "1.3"})
	out, err = b.mysql(t, 0, "--skip-ssl", "-psecret", "-e", "select 1")
	if err == nil || !strings.Contains(out, "with TLS only") {
		t.Errorf("without TLS mariadb says %q, %v", out, err)
	}
	b.next(t).expect(t, logLine{Outcome: "bad_hello", Error: "mysql: a login without TLS"})
	out, err = b.mysql(t, 2, ca, "--ssl", "-psecret", "-e", "select 1")
	if err == nil || !strings.Contains(out, "no server answers") {
		t.Errorf("without a server mariadb says %q, %v", out, err)
	}
	b.next(t).expect(t, logLine{Outcome: "connect_failed"})
	b.openSSL(t, 0, "mysql")
}

// openSSL has s_client start TLS and leave.
func (b *bed) openSSL(t testing.TB, i int, protocol string) {
	t.Helper()
	args := []string{"s_client", "-connect", b.addr(i), "-servername", "edge.test", "-CAfile", pki(t).rootFile(t), "-verify_return_error", "-starttls", protocol}
	if out := run(t, command(t, program(t, "openssl", "openssl"), args...), ""); !strings.Contains(out, "Verify return code: 0 (ok)") {
		t.Errorf("s_client says %s", out)
	}
	b.next(t).expect(t, logLine{SNI: "edge.test", TLS: "1.3"})
}

// mysqlGreeting is a server's, which knows no TLS.
var mysqlGreeting = func() string {
	s := "\x0a8.0.36\x00\x07\x00\x00\x0012345678\x00\xff\xf7\x2d\x02\x00\xff\x81\x15" + strings.Repeat("\x00", 10) + "123456789012\x00mysql_native_password\x00"
	return string(rune(len(s))) + "\x00\x00\x00" + s
}()

// mysqlTLS asks for TLS behind the greeting, which offers it.
func mysqlTLS(t testing.TB, c net.Conn) *tls.Conn {
	t.Helper()
	say(t, c, "\x20\x00\x00\x01\x00\xaa\x00\x00"+strings.Repeat("\x00", 28), strings.Replace(mysqlGreeting, "\xff\xf7", "\xff\xff", 1))
	return tls.Client(c, clientConfig(t, nil))
}

// mysqlServer greets, and listens.
func mysqlServer(t testing.TB) *mortal {
	return newMortal(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, mysqlGreeting)
		_, _ = io.Copy(io.Discard, c)
	})
}

// TestGateComesBeforeMySQLsBackend: a client that may not come in costs the backend nothing, and one that may is counted
// once, though its rule is looked at before the hello and behind it.
func TestGateComesBeforeMySQLsBackend(t *testing.T) {
	backend := mysqlServer(t)
	b := start(t, ":{0} -> "+backend.addr+" starttls=mysql cert=edge.test conns=1 handshakes=1 conns-per-ip=2")
	for range 2 {
		c := b.dial(t, 0)
		s := mysqlTLS(t, c)
		if err := s.Handshake(); err != nil {
			t.Fatal(err)
		}
		accepted := backend.accepted.Load()
		b.turnedAway(t, 0).expect(t, logLine{Outcome: "limited", Stage: "starttls"})
		if n := backend.accepted.Load(); n != accepted {
			t.Errorf("the backend has %d connections more", n-accepted)
		}
		_ = s.Close()
		b.lineOf(t, c).expectEnd(t, logLine{TLS: "1.3", Backend: backend.addr})
	}
}

// TestGateHoldsForCancelRequests: they reach a backend without a hello.
func TestGateHoldsForCancelRequests(t *testing.T) {
	backend := newMortal(t, echo)
	b := start(t, ":{0} -> "+backend.addr+" starttls=postgres cert=edge.test conns=1")
	c := b.dialTLS(t, 0, func(c *tls.Config) { c.NextProtos = []string{"postgresql"} })
	say(t, c, "hello", "hello")
	cancel := b.dial(t, 0)
	_, _ = io.WriteString(cancel, "\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01keys")
	b.lineOf(t, cancel).expect(t, logLine{Outcome: "limited", Stage: "starttls"})
	if n := backend.accepted.Load(); n != 1 {
		t.Errorf("the backend has %d connections", n)
	}
}

// TestMySQLWaitsForRoom: a client that has to wait for a backend gets its greeting when there is room, or is told.
func TestMySQLWaitsForRoom(t *testing.T) {
	backend := mysqlServer(t)
	b := start(t, ":{0} -> "+backend.addr+" starttls=mysql cert=edge.test max-conns=1 queue=1")
	first := b.dial(t, 0)
	say(t, first, "", strings.Replace(mysqlGreeting, "\xff\xf7", "\xff\xff", 1))
	second := b.dial(t, 0)
	until(t, "the other one waits", func() bool { return b.gateway.BackendCounts().Waiting == 1 })
	third := b.dial(t, 0)
	if said, err := io.ReadAll(third); err != nil || !strings.Contains(string(said), "no server answers") {
		t.Errorf("beyond the queue a client hears %q, %v", said, err)
	}
	_ = third.Close()
	b.lineOf(t, third).expect(t, logLine{Outcome: "limited"})
	_ = first.Close()
	s := mysqlTLS(t, second)
	if err := s.Handshake(); err != nil {
		t.Error(err)
	}
}

// TestLoginOfADownBackendIsCut: with on-down=cut also a connection that is translated is one that is open, and one whose
// client has been greeted by the backend, and has asked for TLS or not.
func TestLoginOfADownBackendIsCut(t *testing.T) {
	backend := mysqlServer(t)
	b := start(t, ":{0} -> "+backend.addr+" starttls=mysql cert=edge.test on-down=cut")
	greeted, asked, login := b.dial(t, 0), b.dial(t, 0), b.dial(t, 0)
	say(t, greeted, "", strings.Replace(mysqlGreeting, "\xff\xf7", "\xff\xff", 1))
	mysqlTLS(t, asked)
	if err := mysqlTLS(t, login).Handshake(); err != nil {
		t.Fatal(err)
	}
	until(t, "all are where they have to be", func() bool {
		stages := map[string]int{}
		for _, c := range b.conns(t, 10) {
			stages[c.Stage]++
		}
		return stages["login"] == 1 && stages["starttls"] == 1 && stages["hello"] == 1
	})
	if _, err := b.gateway.OrderBackend(backend.addr, gateway.MaintainBackend); err != nil {
		t.Fatal(err)
	}
	for c, stage := range map[net.Conn]string{greeted: "starttls", asked: "hello", login: "login"} {
		b.lineOf(t, c).expect(t, logLine{Outcome: "backend_reset", Stage: stage, Backend: backend.addr})
	}
}

// TestChecksAskForTLS: in the protocol of the backend, as connections do, or in the one that the check names.
func TestChecksAskForTLS(t *testing.T) {
	beside(t)
	for _, protocol := range []string{"smtp", "imap", "pop3", "ldap"} {
		t.Run(protocol, func(t *testing.T) {
			encrypted, asked, passed, named := encryptedServer(t, "", script{}), encryptedServer(t, protocol, script{}), encryptedServer(t, protocol, script{}), encryptedServer(t, protocol, script{})
			b := start(t, strings.NewReplacer("PROTOCOL", protocol, "OPTIONS", "every=1m"+verifiesBackends).Replace(`
				:{0} edge.test -> tls+PROTOCOL://`+asked+` check=tls OPTIONS
				:{1} edge.test -> `+passed+` mode=pass starttls=PROTOCOL check=tls every=1m
				:{2} -> `+named+` mode=tcp check=starttls:PROTOCOL every=1m
				:{3} edge.test -> tls://`+encrypted+` check=tls OPTIONS`), trusting(t))
			for _, addr := range []string{asked, passed, named, encrypted} {
				until(t, addr+" is checked", func() bool { return !b.backend(t, addr).Checks[0].At.IsZero() })
				if i := b.backend(t, addr); i.State != "up" || !i.Checks[0].Up {
					t.Errorf("%+v", i)
				}
			}
		})
	}
	plain := mailScript.serve(t)
	b := start(t, ":{0} -> "+plain+" mode=tcp check=starttls:smtp every=1m")
	b.becomes(t, plain, "down")
	if i := b.backend(t, plain); i.Reason != "check=starttls:smtp: it does not offer STARTTLS" {
		t.Errorf("%+v", i)
	}
}

// TestMySQLLoginThatIsNone: what comes instead of a login inside TLS goes to nobody.
func TestMySQLLoginThatIsNone(t *testing.T) {
	heard := make(chan string, 1)
	backend := serve(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, mysqlGreeting)
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	b := start(t, ":{0} -> "+backend+" starttls=mysql cert=edge.test")
	c := b.dial(t, 0)
	s := mysqlTLS(t, c)
	_, _ = io.WriteString(s, "\x05\x00\x00\x00\x03drop")
	if rest, _ := io.ReadAll(s); len(rest) > 0 {
		t.Errorf("the answer is %q", rest)
	}
	if got := <-heard; got != "" {
		t.Errorf("the backend hears %q", got)
	}
	b.lineOf(t, c).expect(t, logLine{Outcome: "bad_hello", Stage: "login", TLS: "1.3"})
}

// TestMySQLLoginAtALowBandwidth: a login that takes longer than its bandwidth lets it comes to its end all the same.
func TestMySQLLoginAtALowBandwidth(t *testing.T) {
	const rest = 1500                                       // of a login, that comes in pieces
	login := "\xdc\x05\x00\x02" + strings.Repeat("x", rest) // 0x5dc is 1500
	backend := serve(t, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, mysqlGreeting)
		if _, err := io.ReadFull(c, make([]byte, len(login))); err == nil {
			_, _ = io.WriteString(c, "\x07\x00\x00\x02\x00\x00\x00\x02\x00\x00\x00")
		}
	})
	b := start(t, ":{0} -> "+backend+" starttls=mysql cert=edge.test bandwidth=2KB/s idle=1s linger=1s")
	c := b.dial(t, 0)
	s := mysqlTLS(t, c)
	for piece := range strings.SplitSeq(login[:1000]+"|"+login[1000:1300]+"|"+login[1300:], "|") {
		if _, err := io.WriteString(s, piece); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond) // a record a read
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "\x07\x00\x00\x03\x00\x00\x00\x02\x00\x00\x00" {
		t.Errorf("the answer to the login is %q, %v", got, err)
	}
}

// slapd runs a directory of one entry, and returns its address.
func slapd(t testing.TB) string {
	t.Helper()
	daemon := program(t, "slapd", "slapd")
	dir, err := os.MkdirTemp("", "tlsnat")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	conf := filepath.Join(dir, "conf")
	text := "include /etc/ldap/schema/core.schema\nmodulepath /usr/lib/ldap\nmoduleload back_ldif\n" +
		"pidfile " + dir + "/pid\ndatabase ldif\nsuffix dc=test\ndirectory " + dir + "\nrootdn cn=admin,dc=test\nrootpw secret\n"
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", freePorts(t, 1)[0])
	cmd := command(t, daemon, "-d", "0", "-f", conf, "-h", "ldap://"+addr)
	cmd.SysProcAttr.Credential = unprivileged(t, dir)
	server(t, cmd, addr)
	add := command(t, program(t, "ldapadd", "ldap-utils"), "-x", "-H", "ldap://"+addr, "-D", "cn=admin,dc=test", "-w", "secret")
	run(t, add, "dn: dc=test\nobjectClass: dcObject\nobjectClass: organization\ndc: test\no: what is looked for\n")
	return addr
}

// ldapsearch looks for the entry through the i-th port.
func (b *bed) ldapsearch(t testing.TB, i int, args ...string) string {
	t.Helper()
	cmd := command(t, program(t, "ldapsearch", "ldap-utils"), append([]string{"-x", "-H", "ldap://" + b.addr(i), "-b", "dc=test", "-s", "base", "o"}, args...)...)
	cmd.Env = append(os.Environ(), "LDAPTLS_REQCERT=never") // it has an address, and no name to compare
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	launch(t, cmd)
	_ = cmd.Wait()
	return out.String()
}

func TestLDAPClientsThroughTerminate(t *testing.T) {
	beside(t)
	b := start(t, ":{0} -> "+slapd(t)+" starttls=ldap cert=edge.test")
	if out := b.ldapsearch(t, 0, "-ZZ"); !strings.Contains(out, "what is looked for") {
		t.Errorf("ldapsearch says %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "ok", TLS: "1.3"})
	if out := b.ldapsearch(t, 0); !strings.Contains(out, "StartTLS comes first") {
		t.Errorf("ldapsearch without TLS says %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "ok"})
	b.openSSL(t, 0, "ldap")
}

// output is what a program has written so far.
type output struct {
	logBook
	all strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all.Write(p)
}

func (o *output) text() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.all.String()
}

func (o *output) await(t testing.TB, words string) {
	t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(o.text(), words); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%q was not said: %s", words, o.text())
		}
	}
}

// say sends words and reads until the answer ends as it has to.
func say(t testing.TB, c net.Conn, words, answer string) {
	t.Helper()
	if _, err := io.WriteString(c, words); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(answer))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != answer {
		t.Fatalf("to %q the answer is %q, %v; wants %q", words, b[:n], err, answer)
	}
}

const (
	ehloAnswer = "250-edge.test\r\n250-ENHANCEDSTATUSCODES\r\n250 STARTTLS\r\n"
	tlsAnswer  = "220 2.0.0 Ready to start TLS\r\n"
)

// TestCommandsBehindSTARTTLSReachNobody: what is injected behind the request for TLS is not kept for later (the flaw of
// CVE-2011-0411), in one segment with it or not.
func TestCommandsBehindSTARTTLSReachNobody(t *testing.T) {
	beside(t)
	heard := make(chan string, 4)
	backend := serve(t, func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	b := start(t, ":{0} edge.test -> "+backend+" starttls=smtp")
	for _, pieces := range [][]string{{"EHLO me\r\nSTARTTLS\r\nRSET\r\nMAIL FROM:<x@y>\r\n"}, {"EHLO me\r\nSTARTTLS\r\n", "MAIL FROM:<x@y>\r\n"}} {
		c := b.dial(t, 0)
		say(t, c, pieces[0], "220 edge.test ESMTP\r\n"+ehloAnswer+tlsAnswer)
		for _, p := range pieces[1:] {
			_, _ = io.WriteString(c, p)
		}
		alert := make([]byte, 7)
		if _, err := io.ReadFull(c, alert); err != nil || alert[0] != 21 {
			t.Errorf("%x, %v", alert, err)
		}
		b.lineOf(t, c).expect(t, logLine{Outcome: "bad_hello", Stage: "hello"})
	}
	if len(heard) > 0 {
		t.Errorf("the backend hears %q", <-heard)
	}
}

// TestPreludeEnds holds every way that a prelude ends without TLS to its outcome.
func TestPreludeEnds(t *testing.T) {
	beside(t)
	b := start(t, ":{0} edge.test -> "+mailScript.serve(t)+" starttls=smtp\n:{1} edge.test -> "+echoServer(t)+" starttls=postgres", "HELLO_TIMEOUT=300ms")
	greeting := "220 edge.test ESMTP\r\n"
	for _, tt := range []struct {
		name         string
		port         int
		says, answer string
		want         logLine
	}{
		{"a look", 0, "", greeting, logLine{Outcome: "ok", Level: "debug"}},
		{"a look, and goodbye", 0, "EHLO me\r\nQUIT\r\n", greeting + ehloAnswer + "221 2.0.0 Bye\r\n", logLine{Outcome: "ok", Level: "debug"}},
		{"half a command", 0, "EH", greeting, logLine{Outcome: "bad_hello", Stage: "starttls", Error: "the client left after 2 bytes of it"}},
		{"HTTP", 1, "GET / HTTP/1.1\r\n\r\n", "", logLine{Outcome: "bad_hello", Stage: "starttls"}},
		{"cancel without a rule", 1, "\x00\x00\x00\x10\x04\xd2\x16\x2e\x00\x00\x00\x01keys", "", logLine{Outcome: "unknown_name", Stage: "starttls"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := b.dial(t, tt.port)
			say(t, c, tt.says, tt.answer)
			_ = c.CloseWrite()
			if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
				t.Errorf("%q, %v", rest, err)
			}
			b.lineOf(t, c).expect(t, tt.want)
		})
	}
	c := b.dial(t, 0)
	say(t, c, "NOOP\r\n", greeting+"250 2.0.0 OK\r\n")
	_, _ = io.ReadAll(c)
	b.lineOf(t, c).expect(t, logLine{Outcome: "hello_timeout", Stage: "starttls"})
}

// TestPreludeByteAtATime: and behind a PROXY header, on the way in and out.
func TestPreludeByteAtATime(t *testing.T) {
	heard := make(chan string, 1)
	backend := serve(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		header, _ := r.ReadString('\n')
		heard <- header
		mailScript.speak(c)
	})
	b := start(t, ":{0} edge.test -> "+backend+" starttls=smtp proxy=v1", "PROXY_FROM=127.0.0.0/8")
	c := b.dial(t, 0)
	for _, one := range []byte("PROXY TCP4 192.0.2.7 192.0.2.8 1234 25\r\nEHLO me\r\nSTARTTLS\r\n") {
		_, _ = c.Write([]byte{one})
	}
	say(t, c, "", "220 edge.test ESMTP\r\n"+ehloAnswer+tlsAnswer)
	s := tls.Client(c, clientConfig(t, nil))
	say(t, s, "EHLO me\r\n", mailScript.answers["EHLO"])
	if header := <-heard; header != "PROXY TCP4 192.0.2.7 192.0.2.8 1234 25\r\n" {
		t.Errorf("the backend hears %q first", header)
	}
	_ = s.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Client: "192.0.2.7:1234"})
}

// TestBackendThatDoesNotGreetIsPassedOver: by the next one, like one that does not answer.
func TestBackendThatDoesNotGreetIsPassedOver(t *testing.T) {
	beside(t)
	silent := serve(t, func(c *net.TCPConn) { _, _ = io.Copy(io.Discard, c) })
	gone := serve(t, func(c *net.TCPConn) {})
	busy := script{greeting: "421 later\r\n"}.serve(t)
	good := mailScript.serve(t)
	b := start(t, ":{0} edge.test -> "+strings.Join([]string{silent, gone, busy, good + "/backup"}, " ")+" starttls=smtp connect=2s\n"+
		":{1} edge.test -> "+busy+" starttls=smtp\n:{2} edge.test -> "+busy+" starttls=smtp mode=pass")
	c := b.dial(t, 0)
	say(t, c, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
	s := tls.Client(c, clientConfig(t, nil))
	say(t, s, "EHLO me\r\n", mailScript.answers["EHLO"])
	_ = s.Close()
	b.lineOf(t, c).expect(t, logLine{Outcome: "ok", Backend: good})
	for i := 1; i <= 2; i++ {
		c := b.dial(t, i)
		say(t, c, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
		if err := tls.Client(c, clientConfig(t, nil)).Handshake(); i == 2 && err == nil {
			t.Error("a handshake with nobody")
		}
		b.lineOf(t, c).expect(t, logLine{Outcome: "connect_failed", Error: busy + `: smtp: it says "421 later"`})
	}
}

// TestMailThroughPass: the backend is asked as the client has asked, and shows its own certificate.
func TestMailThroughPass(t *testing.T) {
	beside(t)
	for _, protocol := range []string{"smtp", "imap", "pop3", "ldap"} {
		t.Run(protocol, func(t *testing.T) {
			b := start(t, ":{0} edge.test -> "+encryptedServer(t, protocol, script{})+" mode=pass starttls="+protocol)
			b.sClient(t, 0, "-starttls", protocol)
			b.next(t).expectEnd(t, logLine{SNI: "edge.test", Mode: "pass"})
		})
	}
}

// startTLSAs is a backend's side of the prelude, word for word.
func startTLSAs(t testing.TB, c net.Conn, protocol string) {
	t.Helper()
	type exchange struct{ hears, says string }
	host, _ := os.Hostname() // what a port without a name of its own calls itself
	for _, e := range map[string][]exchange{
		"smtp": {{"", "220 mx\r\n"}, {"EHLO edge.test\r\n", "250-mx\r\n250 STARTTLS\r\n"}, {"STARTTLS\r\n", "220 go\r\n"}},
		"imap": {{"", "* OK hi\r\n"}, {"tls STARTTLS\r\n", "tls OK go\r\n"}},
		"pop3": {{"", "+OK hi\r\n"}, {"STLS\r\n", "+OK go\r\n"}},
		"ldap": {{"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037", "\x30\x0c\x02\x01\x01\x78\x07\x0a\x01\x00\x04\x00\x04\x00"}},
	}[protocol] {
		if heard, err := readAs(c, e.hears); err != nil || heard != e.hears && heard != strings.Replace(e.hears, "edge.test", host, 1) {
			t.Errorf("%s: the backend hears %q, %v; wants %q", protocol, heard, err, e.hears)
			return
		}
		_, _ = io.WriteString(c, e.says)
	}
}

// readAs reads a line if like is one, and else as many bytes as that has, and not one more.
func readAs(c net.Conn, like string) (string, error) {
	var b []byte
	for one := make([]byte, 1); ; b = append(b, one...) {
		if isLine := strings.HasSuffix(like, "\n"); isLine && strings.HasSuffix(string(b), "\n") || !isLine && len(b) == len(like) {
			return string(b), nil
		}
		if _, err := io.ReadFull(c, one); err != nil {
			return string(b), err
		}
	}
}

const verifiesBackends = " backend-ca=root backend-name=edge.test"

// encryptedServer is a backend that is asked for TLS, or with "" has TLS from the first byte on, and then goes on with
// its script.
func encryptedServer(t testing.TB, protocol string, inside script) string {
	a := pki(t)
	return serve(t, func(c *net.TCPConn) {
		if protocol != "" {
			startTLSAs(t, c, protocol)
		}
		s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{a.leaves["edge-ecdsa"].certificate(a)}})
		inside.speak(s)
		_ = s.CloseWrite()
	})
}

// TestBackendsAreAskedForTLS: by tls+PROTOCOL://, for clients that have asked for it themselves, for those that begin with
// TLS, and for those without. These two have had no greeting yet, and get the backend's.
func TestBackendsAreAskedForTLS(t *testing.T) {
	beside(t)
	for protocol, greeting := range map[string]string{"smtp": "220 mx\r\n", "imap": "* OK hi\r\n", "pop3": "+OK hi\r\n", "ldap": ""} {
		t.Run(protocol, func(t *testing.T) {
			to := "tls+" + protocol + "://" + encryptedServer(t, protocol, script{}) + verifiesBackends
			b := start(t, ":{0} edge.test -> "+to+" starttls="+protocol+"\n:{1} edge.test -> "+to+"\n:{2} -> "+to+" mode=tcp", trusting(t))
			b.sClient(t, 0, "-starttls", protocol)
			b.next(t).expectEnd(t, logLine{TLS: "1.3", BackendTLS: "1.3"})
			encrypted, plain := b.dialTLS(t, 1, nil), b.dial(t, 2)
			for i, c := range []net.Conn{encrypted, plain} {
				say(t, c, "", greeting)
				say(t, c, "hello\r\n", "you said hello\r\n")
				_ = c.Close()
				b.next(t).expectEnd(t, logLine{Mode: []string{"terminate", "tcp"}[i], BackendTLS: "1.3"})
			}
		})
	}
}

// TestGreetingInsideTLSIsTakenOff: a backend with TLS from the first byte on greets a client that has been greeted.
func TestGreetingInsideTLSIsTakenOff(t *testing.T) {
	good, busy := encryptedServer(t, "", mailScript), encryptedServer(t, "", script{greeting: "421 later\r\n"})
	b := start(t, ":{0} edge.test -> tls://"+good+" starttls=smtp"+verifiesBackends+"\n:{1} edge.test -> tls://"+busy+" starttls=smtp"+verifiesBackends, trusting(t))
	b.curlUpgrades(t, 0, "Subject: x\r\n\r\nhello\r\n", "smtp://"+b.hostArg(0), "--mail-from", "a@a.test", "--mail-rcpt", "b@b.test", "-T", "-")
	b.next(t).expectEnd(t, logLine{TLS: "1.3", BackendTLS: "1.3"})
	c := b.dial(t, 1)
	say(t, c, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
	s := tls.Client(c, clientConfig(t, nil))
	_, _ = io.WriteString(s, "EHLO me\r\n")
	if answer, err := io.ReadAll(s); err == nil || len(answer) > 0 {
		t.Errorf("%q, %v", answer, err)
	}
	b.lineOf(t, c).expect(t, logLine{Outcome: "connect_failed", Stage: "login", Alert: "internal_error", Error: busy + `: smtp: it says "421 later"`})
}

func TestPostgreSQLIsAskedForTLS(t *testing.T) {
	beside(t)
	secure, plain := "127.0.0.1:"+postgres(t, postgresTLS(t)...), "127.0.0.1:"+postgres(t)
	b := start(t, ":{0} edge.test -> tls+postgres://"+secure+" starttls=postgres"+verifiesBackends+"\n"+
		":{0} *.wild.test -> tls+postgres://"+plain+" starttls=postgres"+verifiesBackends, trusting(t))
	verified := "sslmode=verify-full sslrootcert=" + pki(t).rootFile(t)
	if out, err := b.psql(t, 0, verified, "select 6 * 7", asksWhoSees, "select length(repeat('x', 3000000))"); out != "42\nt\n3000000\n" {
		t.Errorf("psql says %q, %v", out, err)
	}
	b.next(t).expectEnd(t, logLine{TLS: "1.3", BackendTLS: "1.3", ALPN: ""})
	if out, err := b.psql(t, 0, "host=a.wild.test sslmode=require", "select 1"); err == nil {
		t.Errorf("psql says %q", out)
	}
	b.next(t).expect(t, logLine{Outcome: "connect_failed", Error: plain + ": postgres: it does not offer TLS (ssl = off)"})
}

// TestSCRAMKnowsWhoseTLSItIs: a password is bound to the certificate that the server shows. A plain backend shows none, with
// mode=pass the client sees it, and where the edge shows another one the client has to leave that out.
func TestSCRAMKnowsWhoseTLSItIs(t *testing.T) {
	beside(t)
	secure, plain := postgres(t, postgresTLS(t)...), postgres(t)
	for _, port := range []string{secure, plain} {
		psql := func(sql string) string {
			args := []string{"-h", "127.0.0.1", "-p", port, "-U", "tester", "-d", "postgres", "-X", "-q", "-A", "-t", "-c", sql}
			return strings.TrimSpace(run(t, command(t, program(t, "psql", "postgresql-client"), args...), ""))
		}
		psql("alter user tester password 'secret'")
		if err := os.WriteFile(psql("show hba_file"), []byte("host all all all scram-sha-256\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		psql("select pg_reload_conf()")
	}
	b := start(t, `
		:{0} edge.test -> 127.0.0.1:`+plain+` starttls=postgres
		:{1} edge.test -> 127.0.0.1:`+secure+` starttls=postgres mode=pass
		:{2} edge.test -> tls+postgres://127.0.0.1:`+secure+` starttls=postgres`+verifiesBackends, trusting(t))
	for _, tt := range []struct {
		port    int
		binding string
		works   bool
	}{{0, "prefer", true}, {1, "require", true}, {2, "prefer", false}, {2, "disable", true}} {
		out, err := b.psql(t, tt.port, "sslmode=require password=secret channel_binding="+tt.binding, "select 6 * 7")
		if works := out == "42\n" && err == nil; works != tt.works {
			t.Errorf("port %d, channel_binding=%s: psql says %q, %v", tt.port, tt.binding, out, err)
		}
		b.next(t).expectEnd(t, logLine{SNI: "edge.test"})
	}
}

func TestMariaDBIsAskedForTLS(t *testing.T) {
	beside(t)
	a := pki(t)
	port, _ := mariadb(t, "--ssl-cert="+string(a.chainPEM("edge-rsa")), "--ssl-key="+string(a.leaves["edge-rsa"].keyPEM()))
	plain, _ := mariadb(t, "--skip-ssl")
	b := start(t, ":{0} -> tls+mysql://127.0.0.1:"+plain+" tls+mysql://127.0.0.1:"+port+" starttls=mysql cert=edge.test"+verifiesBackends, trusting(t))
	for range 2 {
		out, err := b.mysql(t, 0, "--ssl", "--ssl-ca="+a.rootFile(t), "-psecret", "-e", "show status like 'Ssl_version'; select length(repeat('x', 3000000))")
		if out != "Ssl_version\tTLSv1.3\n3000000\n" || err != nil {
			t.Errorf("mariadb says %.200q, %v", out, err)
		}
		b.next(t).expectEnd(t, logLine{TLS: "1.3", BackendTLS: "1.3", Backend: "127.0.0.1:" + port})
	}
}

// TestPROXYHeaderComesBeforeTheQuestion: and once.
func TestPROXYHeaderComesBeforeTheQuestion(t *testing.T) {
	a := pki(t)
	heard := make(chan string, 1)
	backend := serve(t, func(c *net.TCPConn) {
		header, _ := readAs(c, "\n")
		heard <- header
		startTLSAs(t, c, "smtp")
		script{}.speak(tls.Server(c, &tls.Config{Certificates: []tls.Certificate{a.leaves["edge-ecdsa"].certificate(a)}}))
	})
	b := start(t, ":{0} edge.test -> tls+smtp://"+backend+" proxy=v1 starttls=smtp"+verifiesBackends, trusting(t))
	c := b.dial(t, 0)
	say(t, c, "STARTTLS\r\n", "220 edge.test ESMTP\r\n"+tlsAnswer)
	say(t, tls.Client(c, clientConfig(t, nil)), "hello\r\n", "you said hello\r\n")
	if header := <-heard; !strings.HasPrefix(header, "PROXY TCP4 127.0.0.1 127.0.0.1 ") {
		t.Errorf("the backend hears %q first", header)
	}
}

// TestInjectedAnswerIsRefused: a backend that says more than that TLS may begin is somebody else.
func TestInjectedAnswerIsRefused(t *testing.T) {
	backend := serve(t, func(c *net.TCPConn) {
		_, _ = io.ReadFull(c, make([]byte, 8))
		_, _ = io.WriteString(c, "SR\x00\x00\x00\x08\x00\x00\x00\x00")
		_, _ = io.Copy(io.Discard, c)
	})
	b := start(t, ":{0} edge.test -> "+backend+" mode=pass starttls=postgres")
	c := b.dial(t, 0)
	say(t, c, "\x00\x00\x00\x08\x04\xd2\x16\x2f", "S")
	if err := tls.Client(c, clientConfig(t, nil)).Handshake(); err == nil {
		t.Error("the handshake succeeds")
	}
	b.lineOf(t, c).expect(t, logLine{Outcome: "connect_failed", Error: backend + ": postgres: bytes in the clear follow its word that TLS may begin"})
}
